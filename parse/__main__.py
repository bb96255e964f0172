"""Answers a question in the terminal and shows who wrote what.

The draft's accepted words are green, the target's plain, the rejected draft red and struck out; where there are no
colours, the target's stand in [brackets] and the rejected in {-braces-}.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import TextIO, get_args

from pydantic import ValidationError
from transformers.utils import logging as transformers_logging

from parse.config import EngineSettings, SpeculativeConfig
from parse.local import DEMO_DRAFT, DEMO_TARGET, LocalPair
from parse.prompts import chat_prompt_token_ids
from parse.protocol import Finished, GenerationRequest, Mode, StageName, TextDelta, Usage, Verification
from parse.types import MethodName, RequestError, SamplingParams

EXAMPLE = (
    "Kim has the record with 27. In turn: first Uma 73, second Max 52, third Jack 74, fourth Quinn 34, fifth Dan 38, "
    "sixth Ben 80, seventh Sam 26. Who has the record now?"
)
RESET = "\x1b[0m"
COLOURS = {
    "draft": ("\x1b[32m", RESET),
    "target": ("", ""),
    "rejected": ("\x1b[31;9m", RESET),
    "figures": ("\x1b[2m", RESET),
}
BRACKETS = {"draft": ("", ""), "target": ("[", "]"), "rejected": ("{-", "-}"), "figures": ("", "")}


class Page:
    """Writes in colour to a terminal, and with brackets where there is none."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._marks = COLOURS if out.isatty() and "NO_COLOR" not in os.environ else BRACKETS
        self._kind = "figures"

    def write(self, text: str, kind: str) -> None:
        if text and kind != self._kind:
            self._out.write(self._marks[self._kind][1] + self._marks[kind][0])
            self._kind = kind
        self._out.write(text)
        self._out.flush()


def figures(usage: Usage) -> str:
    parts = [f"mode {usage.mode}"]
    if usage.draft_tokens:
        parts.append(
            f"accepted {usage.accepted_tokens} of {usage.draft_tokens} drafted tokens in {usage.rounds} round(s)"
        )
    parts.append(f"target wrote {usage.target_tokens}")
    stages: list[StageName] = ["draft", "judge", "write"]
    if speculated := usage.speculation:
        parts[-1] += f" in {speculated.passes} passes by {speculated.method}"
    times = [f"{name} {usage.seconds(name) * 1e3:.0f} ms" for name in stages]
    parts.append(", ".join([*times, f"total {usage.total_s * 1e3:.0f} ms"]))
    if usage.fallback:
        parts.append(usage.fallback.message)
    return "; ".join(parts)


async def answer(pair: LocalPair, question: GenerationRequest, page: Page) -> None:
    async for event in pair.pipeline.answer(question):
        match event:
            case TextDelta():
                page.write(event.text, event.origin)
            case Verification():
                page.write(event.rejected_text, "rejected")
            case Finished():
                cut = "; cut off at the token limit" if event.finish_reason == "length" else ""
                page.write(f"\n{figures(event.usage)}{cut}\n", "figures")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m parse",
        description=__doc__,
        epilog=f'The demo pair knows running totals and records only. Try: python -m parse "{EXAMPLE}"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("question", help="what to answer; - reads it from standard input")
    parser.add_argument("--mode", choices=get_args(Mode), default="auto", help="how drafts are used (default: auto)")
    parser.add_argument("--target", default=DEMO_TARGET, help="directory or hub id of the target model")
    parser.add_argument("--draft", default=DEMO_DRAFT, help="directory or hub id of the draft model; empty for none")
    parser.add_argument(
        "--speculation", choices=get_args(MethodName), help="how the target writes several tokens in a pass"
    )
    parser.add_argument("--head", help="directory or hub id of what that method needs")
    parser.add_argument("--system", help="a system message before the question")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be given again")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for arithmetic (default: 1)")
    return parser.parse_args(given)


def ways(args: argparse.Namespace) -> tuple[SpeculativeConfig, ...]:
    if not (args.speculation or args.head):
        return ()
    try:
        return (SpeculativeConfig(method=args.speculation, model=args.head),)
    except ValidationError as error:
        raise RequestError("speculation", error.errors()[0]["msg"]) from error


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    question = sys.stdin.read() if args.question == "-" else args.question
    try:
        if not question.strip():
            raise RequestError("question", "must not be empty")
        sampling = SamplingParams(
            temperature=args.temperature, seed=args.seed, max_tokens=args.max_tokens, stop=tuple(args.stop)
        )
        draft = EngineSettings(model=args.draft, num_threads=args.threads) if args.draft else None
        target = EngineSettings(model=args.target, num_threads=args.threads, speculative_configs=ways(args))
        pair = LocalPair(target, draft)
        try:
            turns = [{"role": "system", "content": args.system}] if args.system else []
            turns.append({"role": "user", "content": question})
            asked = GenerationRequest(chat_prompt_token_ids(pair.tokenizer, turns), turns, sampling, args.mode)
            asyncio.run(answer(pair, asked, Page(sys.stdout)))
        finally:
            pair.close()
    except ValueError as error:  # all that is refused, with its reason
        sys.exit(f"python -m parse: {error}")


if __name__ == "__main__":
    main()
