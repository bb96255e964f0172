"""Runs the checks of a client. Each program registers its checks and calls `main`.

It runs in the environment of the client, so it uses the standard library alone.
"""

import json
import os
import re
import traceback
from collections.abc import Callable

BASE_URL = os.environ["BASE_URL"]  # of the demo pair, with /v1
TOOLS_BASE_URL = os.environ["TOOLS_BASE_URL"]  # of a model that calls the tool get_weather and repeats its result
MODEL = os.environ["MODEL"]
QUESTION = os.environ["QUESTION"]
ANSWER = os.environ["ANSWER"]  # the last line of the model's answer to the question
WEATHER = "Sunny, 20 degrees"  # what the tool get_weather returns

Check = Callable[[], object]
CHECKS: list[tuple[str, str, tuple[str, ...], Check]] = []


def check(title: str) -> Callable[[Check], Check]:
    """Registers a feature that must work. The function raises an exception if it does not."""

    def register(function: Check) -> Check:
        CHECKS.append((title, "works", (), function))
        return function

    return register


def rejected(title: str, *words: str) -> Callable[[Check], Check]:
    """Registers a feature that the server must reject with a message that names all these fields."""

    def register(function: Check) -> Check:
        CHECKS.append((title, "rejected", words, function))
        return function

    return register


def main() -> None:
    """Runs all checks and prints the result of each one as a line of JSON."""
    for title, expected, words, function in CHECKS:
        try:
            function()
            result, detail = "works", ""
        except BaseException as error:
            is_rejection = expected == "rejected" and all(is_named(word, messages(error)) for word in words)
            trace = "".join(traceback.format_exception(error))
            result, detail = ("rejected", " ".join(words)) if is_rejection else ("failed", trace[-3000:])
        if result != expected and result != "failed":
            result, detail = "failed", "it was expected to be rejected, but it works"
        # Some clients print to the same stream, and not always whole lines.
        print("\n" + json.dumps({"title": title, "result": result, "detail": detail}), flush=True)
    print(f"\n{len(CHECKS)} checks", flush=True)
    os._exit(0)  # some clients keep threads


def is_named(word: str, text: str) -> bool:
    """Whether a message of the server names a field or an address: `field.path: reason` or `(POST /address)`.

    Clients reject some requests themselves, with messages of another form.
    """
    return re.search(rf"{re.escape(word)}[\w.\[\]]*(: |\))", text) is not None


def messages(error: BaseException | None) -> str:
    """Returns the messages of an exception and its causes. A traceback would also contain lines of code."""
    if error is None:
        return ""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{error}\n{messages(cause)}"


def check_text(text: object) -> None:
    assert isinstance(text, str) and text.endswith(ANSWER), f"expected {ANSWER!r} at the end of {text!r}"


def check_weather(text: object) -> None:
    assert isinstance(text, str) and WEATHER in text, f"expected {WEATHER!r} in {text!r}"
