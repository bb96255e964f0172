"""Prints the tables of a benchmark program and writes its JSON document."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.provenance import write_document


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="file for the figures; - writes them to standard output")


def write_output(document: Mapping[str, Any], table: str, json_file: str | None) -> None:
    """Prints the tables and writes the document. With `-` as the file only the document is printed."""
    if json_file == "-":
        print(json.dumps(document, indent=2))
        return
    print(table)
    if json_file:
        write_document(Path(json_file), document)


def heading(*names: str) -> list[str]:
    """Returns the first two lines of a Markdown table."""
    return [row(*names), row(*["---"] * len(names))]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.{0 if seconds >= 0.01 else 2}f} ms"
