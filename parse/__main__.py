"""Answers a question in the terminal and shows which model wrote what.

Accepted words of the draft are green, those of the target are plain, and the rejected draft is red and struck through.
Without colours the target's words are in [brackets] and the rejected ones in {-braces-}.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from parse.config import EngineSettings, SpeculativeConfig
from parse.demo import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT
from parse.errors import RequestError
from parse.events import Event, Finished, TextDelta, Verification
from parse.generation_output import describe_usage
from parse.pair import Pair
from parse.registry import METHODS, MODES
from parse.types import SamplingParams

RESET = "\x1b[0m"
COLOURS = {
    "draft": ("\x1b[32m", RESET),
    "target": ("", ""),
    "rejected": ("\x1b[31;9m", RESET),
    "summary": ("\x1b[2m", RESET),
}
BRACKETS = {"draft": ("", ""), "target": ("[", "]"), "rejected": ("{-", "-}"), "summary": ("", "")}


class AnswerPrinter:
    """Prints in colour to a terminal, and with brackets elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._marks = COLOURS if out.isatty() and "NO_COLOR" not in os.environ else BRACKETS
        self._kind = "summary"

    def write(self, text: str, kind: str) -> None:
        if text and kind != self._kind:
            self._out.write(self._marks[self._kind][1] + self._marks[kind][0])
            self._kind = kind
        self._out.write(text)
        self._out.flush()


def print_answer(events: Iterable[Event], printer: AnswerPrinter) -> None:
    for event in events:
        match event:
            case TextDelta():
                printer.write(event.text, event.origin)
            case Verification():
                printer.write(event.rejected_text, "rejected")
            case Finished():
                limit = "; cut off at the token limit" if event.finish_reason == "length" else ""
                printer.write(f"\n{describe_usage(event.usage)}{limit}\n", "summary")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m parse",
        description=__doc__,
        epilog=f'The demo pair knows running totals and records only. Try: python -m parse "{EXAMPLE_PROMPT}"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", help="the question to answer; - reads it from standard input")
    parser.add_argument("--mode", choices=tuple(MODES), default="auto", help="how drafts are used (default: auto)")
    parser.add_argument("--target", default=DEMO_TARGET, help="directory or hub id of the target model")
    parser.add_argument("--draft", default=DEMO_DRAFT, help="directory or hub id of the draft model; empty for none")
    parser.add_argument(
        "--speculation", choices=tuple(METHODS), help="token-level method for what the target generates"
    )
    parser.add_argument("--head", help="directory or hub id of the checkpoint that the method needs")
    parser.add_argument("--system", help="a system message before the question")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer; can be repeated")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for arithmetic (default: 1)")
    return parser.parse_args(arguments)


def speculative_configs(args: argparse.Namespace) -> tuple[SpeculativeConfig, ...]:
    if not (args.speculation or args.head):
        return ()
    try:
        return (SpeculativeConfig(method=args.speculation, model=args.head),)
    except ValidationError as error:
        raise RequestError("speculation", error.errors()[0]["msg"]) from error


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    text = sys.stdin.read() if args.question == "-" else args.question
    try:
        if not text.strip():
            raise RequestError("question", "must not be empty")
        params = SamplingParams(
            temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens, stop=tuple(args.stop)
        )
        draft = EngineSettings(model=args.draft, num_threads=args.threads) if args.draft else None
        target = EngineSettings(
            model=args.target, num_threads=args.threads, speculative_configs=speculative_configs(args)
        )
        messages = [{"role": "system", "content": args.system}] if args.system else []
        messages.append({"role": "user", "content": text})
        with Pair(target, draft) as pair:
            events = pair.stream(messages, mode=args.mode, sampling_params=params)
            print_answer(events, AnswerPrinter(sys.stdout))
    except ValueError as error:  # its message names the invalid input
        sys.exit(f"python -m parse: {error}")


if __name__ == "__main__":
    main()
