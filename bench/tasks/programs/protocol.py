"""How `bench.quality` calls a program: a file with a request, and a file for the result. Both are JSON documents."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_REASON = 300  # characters


class UnusableData(Exception):
    """The data set cannot be used. The message says why."""


def serve_request(commands: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
    """Runs the command of the request. If it fails, the result is the reason in one line."""
    request_file, result_file = map(Path, sys.argv[1:])
    request = json.loads(request_file.read_text())
    try:
        result = commands[request["command"]](request)
    except UnusableData as error:
        result = {"error": str(error)}
    except KeyError as error:
        result = {"error": f"a problem of the data set has no field {error}"}
    except Exception as error:  # the libraries raise errors of many kinds, for example if the hub cannot be reached
        reason = " ".join(str(error).split())
        result = {"error": f"{type(error).__name__}: {reason}"[:MAX_REASON]}
    result_file.write_text(json.dumps(result))


def data_file(request: Mapping[str, Any], split: str) -> str | None:
    """Returns the file with a split of the data set, or None if the data set is downloaded."""
    if request["data_dir"] is None:
        return None
    file = Path(request["data_dir"], request["task"], f"{split}.jsonl")
    if not file.is_file():
        raise UnusableData(f"there is no {file}")
    return str(file)
