"""Writes the figures of the JSON documents into README.md, the other pages and the model cards.

    python -m bench.report           # `make results`: updates the pages
    python -m bench.report --check   # exits with 1 if a page differs from its documents or a document is missing

A page contains two kinds of markers. A block stands on lines of its own, and its name is a key of `BLOCKS`:

    <!-- results: offline -->
    <!-- end -->

A figure stands within a sentence. It names a document, a path in it, and a format of Python:

    The speed-up is <!-- figure: bench/results/offline.json#/modes/full/speedup .2f -->3.07<!-- end -->.

If the document of a block does not exist yet, a notice says so, and the earlier content of the block stays below it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import (
    adversary,
    comparison,
    concurrency,
    drafting,
    engine_speed,
    engines,
    fused_call,
    gpu_table,
    long_drafts,
    metering,
    offline,
    overlap,
    precision,
    speculation,
    throughput,
)
from bench.output import heading, row
from training import cards, head_cards
from training.confidence import format_share
from training.provenance import PROJECT_ROOT, provenance_sentence

Document = Mapping[str, Any]

RESULTS = Path("bench") / "results"
MARKDOWN_FILES = "README.md", "bench/*.md", "docs/*.md"
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n)(?P<content>.*?)(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(
    r"(<!-- figure: (?P<file>[\w./-]+)#/(?P<path>[^>]+?) (?P<format>[.\d]*[a-z%]) -->)(?P<content>[^<]*)(<!-- end -->)"
)
NOTICE = "*Not measured with this version: run `{command}`.*"
EARLIER = "*The figures below are from an earlier version.*"


@dataclass(frozen=True)
class Block:
    """A generated part of a page."""

    document: Path  # relative to the project
    render: Callable[[Document], str]
    required: bool = True  # False if the measurement needs hardware that most machines do not have
    command: str | None = None  # None: the measurement of bench/measure.sh with the name of the document

    @property
    def notice(self) -> str:
        name = "pair" if self.document == PAIR else self.document.stem
        return NOTICE.format(command=self.command or f"bench/measure.sh {name}")


PAIR = Path("models") / "demo-target" / "figures.json"


def pair_table(metrics: Document) -> str:
    """Returns the figures of the demo pair."""
    draft, target, verifier = metrics["draft"], metrics["target"], metrics["verifier"]
    shares = (
        ("answers of the draft model with every step correct", draft, "accuracy"),
        ("answers of the target with every step correct", target, "accuracy"),
        ("answers correct if the target continues a correct prefix of a draft", target, "continuation_accuracy"),
        ("correct drafts accepted in full", verifier, "right_accepted_whole"),
        ("wrong drafts accepted in full", verifier, "wrong_accepted_whole"),
        ("wrong drafts accepted past their first error", verifier, "kept_past_error"),
        ("accepted prefixes that are correct (precision)", verifier, "prefix_precision"),
        ("correct prefixes that are accepted (recall)", verifier, "prefix_recall"),
    )
    lines = heading(f"{metrics['problems']} problems, split `{metrics['split']}`, seed {metrics['seed']}", "")
    lines += [row(title, format_share(part[name], part[f"{name}_interval"])) for title, part, name in shares]
    costs = f"{draft['ms_per_token']:.2f}, {target['ms_per_token']:.2f} ({metrics['cost_ratio']:.1f} times)"
    lines += [
        row("milliseconds per token on one thread: draft model, target", costs),
        row("next tokens of drafts that the target would choose as well", f"{metrics['token_agreement']:.1%}"),
        row("ideal speed-up, from bare forward costs", f"{metrics['ideal_speedup']:.1f}"),
    ]
    return "\n".join(lines)


def _result(name: str, render: Callable[[Document], str]) -> Block:
    return Block(RESULTS / f"{name}.json", render)


BLOCKS: dict[str, Block] = {
    "offline": _result("offline", offline.table),
    "offline-summary": _result("offline", offline.summary_table),
    "speculation": _result("speculation", speculation.contender_table),
    "speculation-summary": _result("speculation", speculation.grid_table),
    "speculation-reasons": _result("speculation", speculation.reasons_table),
    "speculation-positions": _result("speculation", speculation.positions_table),
    "speculation-passes": _result("speculation", speculation.passes_table),
    "speculation-clients": _result("speculation", lambda document: concurrency.table(document["crowds"])),
    "drafting": _result("drafting", drafting.table),
    "engine": _result("engine", engine_speed.table),
    "throughput": _result("throughput", throughput.table),
    "throughput-int8": _result("throughput_int8", throughput.table),
    "throughput-bfloat16": _result("throughput_bfloat16", throughput.table),
    "precision": _result("precision", precision.table),
    "long-drafts": _result("long_drafts", long_drafts.table),
    "adversary": _result("adversary", adversary.table),
    "load": _result("load", comparison.table),
    "load-summary": _result("load", comparison.summary_table),
    "metering": _result("metering", metering.table),
    "overlap": _result("overlap", overlap.table),
    "engines": _result("engines", engines.table),
    "engines-head": _result("engines_head", engines.table),
    "fused-call": _result("fused_call", fused_call.table),
    "gpu-8b": Block(RESULTS / "gpu" / "qwen3-8b.json", gpu_table.table, required=False, command="bench/gpu.sh"),
    "gpu-32b": Block(RESULTS / "gpu" / "qwen3-32b.json", gpu_table.table, required=False, command="bench/gpu.sh"),
    "pair": Block(PAIR, pair_table),
}


def update_markdown(text: str, root: Path) -> str:
    """Returns the text of a page with all blocks and figures from the documents in a project folder."""

    def replace_block(match: re.Match[str]) -> str:
        start, end = match[1], match[4]
        content = render_block(match["name"], match["content"], root)
        return f"{start}{content}\n{end}"

    def replace_figure(match: re.Match[str]) -> str:
        content = match["content"]
        if (document := read_document(root / match["file"])) is not None:
            content = format(value_at(document, match["path"]), match["format"])
        return f"{match[1]}{content}{match[6]}"

    return FIGURE.sub(replace_figure, BLOCK.sub(replace_block, text))


def render_block(name: str, content: str, root: Path) -> str:
    if name not in BLOCKS:
        raise ValueError(f"there is no block {name!r}; the blocks are {', '.join(BLOCKS)}")
    block = BLOCKS[name]
    if (document := read_document(root / block.document)) is None:
        earlier = content.removeprefix(block.notice).strip().removeprefix(EARLIER).strip()
        return f"{block.notice}\n\n{EARLIER}\n\n{earlier}" if earlier else block.notice
    run = document["run"]
    provenance = f"Measured {provenance_sentence(run)}" if run else "The command and the versions were not recorded."
    return f"{block.render(document)}\n\n{provenance} Confidence intervals in parentheses are at 95%."


def read_document(path: Path) -> Document | None:
    if not path.exists():
        return None
    document: Document = json.loads(path.read_text())
    return document


def value_at(document: Document, path: str) -> Any:
    """Returns the value at a path such as `modes/full/speedup`."""
    value: Any = document
    for name in path.split("/"):
        value = value[int(name) if isinstance(value, list) else name]
    return value


def markdown_files(root: Path) -> list[Path]:
    return sorted(path for pattern in MARKDOWN_FILES for path in root.glob(pattern))


def model_cards(models: Path) -> dict[Path, str]:
    """Returns the text of every model card, from the figures in the folder of its model."""
    pair = {"demo-target": cards.TARGET_CARD, "demo-draft": cards.DRAFT_CARD}
    folders = sorted(path.parent for path in models.glob("*/figures.json"))
    return {
        folder / "README.md": cards.render_card(figures, folder, pair[folder.name])
        if folder.name in pair
        else head_cards.render_card(folder, figures)
        for folder in folders
        if (figures := read_document(folder / "figures.json")) is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, and report differences")
    args = parser.parse_args()
    problems = [
        f"{block.document} is missing"
        for block in BLOCKS.values()
        if block.required and not (PROJECT_ROOT / block.document).exists()
    ]
    texts = {path: update_markdown(path.read_text(), PROJECT_ROOT) for path in markdown_files(PROJECT_ROOT)}
    for path, updated in (texts | model_cards(PROJECT_ROOT / "models")).items():
        if updated != path.read_text():
            problems.append(f"{path.relative_to(PROJECT_ROOT)} differs from its documents")
            if not args.check:
                path.write_text(updated)
                print(f"updated {path.relative_to(PROJECT_ROOT)}")
    if args.check and problems:
        sys.exit("\n".join(dict.fromkeys(problems)))
    if not args.check and (document := read_document(PROJECT_ROOT / RESULTS / "offline.json")):
        offline.plot(document, PROJECT_ROOT / "bench" / "offline.svg")


if __name__ == "__main__":
    main()
