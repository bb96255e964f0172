"""Prepares MT-Bench: questions with a follow-up. A judge model grades the answers, outside this program."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol import data_file, serve_request
from selection import take_in_turns

DATASET = "HuggingFaceH4/mt_bench_prompts"


def load_rows(file: str | None) -> list[Mapping[str, Any]]:
    if file is not None:
        return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    from datasets import load_dataset

    return list(load_dataset(DATASET, split="train"))


def prepare(request: Mapping[str, Any]) -> Mapping[str, Any]:
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for row in load_rows(data_file(request, "train")):
        by_category.setdefault(row["category"], []).append(row)
    rows = take_in_turns(by_category.values(), request["limit"])
    problems = [
        {
            "id": str(row["prompt_id"]),
            "messages": [{"role": "user", "content": row["prompt"][0]}],
            "follow_ups": row["prompt"][1:],
        }
        for row in rows
    ]
    return {"problems": problems, "references": [list(row["reference"] or ()) for row in rows]}


if __name__ == "__main__":
    serve_request({"prepare": prepare})
