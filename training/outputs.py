"""Generates outputs of a target, from which heads learn to predict it.

    python -m training.outputs --target models/demo-target --count 4000 --out runs/outputs.jsonl
    python -m training.outputs --target some/model --prompts prompts.jsonl --out runs/outputs.jsonl

Without `--prompts` the target answers questions of the demo task. Half of the answers continue the beginning of a
correct answer in the draft's wording, as after an accepted prefix. If the target is the demo draft, they continue such
a prefix and a correction in the wording of `demo-target`, as in mode rounds. A line of prompts has `messages`, or
`prompt`, which becomes a user message. An interrupted run continues after the last complete line.
"""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from parse.config import EngineSettings, VerificationSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native_loader import load_native_engine
from parse.errors import RequestError
from parse.prompts import chat_prompt_token_ids
from parse.requests import GenerateRequest
from parse.types import NO_STREAMING, SamplingParams
from training.task import Problem, correct_answer, draw_problem
from training.wording import DRAFT, TARGET

SPLIT = "speculation"  # the split of the problems; held-out texts use another one
CORRECTION_TOKENS = VerificationSettings.model_fields["correction_tokens"].default
DEMO_DRAFT = "demo-draft"
MAX_NUM_SEQS = 64  # outputs that are generated together; an interruption loses at most these


@dataclass(frozen=True)
class TargetOutput:
    prompt: list[int]
    output: list[int]  # with the end token, if it is complete
    begun: int  # number of its first tokens that come from a prefix

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


PromptAndPrefix = tuple[list[int], list[int]]
"""A prompt, and the first tokens of its answer, which the target continues."""


def demo_prompts(
    target: str | Path, tokenizer: PreTrainedTokenizerBase, seed: int, split: str = SPLIT
) -> Iterator[PromptAndPrefix]:
    """Yields endless prompts of the demo task: alternately plain ones and ones with the beginning of an answer.

    The beginnings are what the model has to continue in mode rounds: the demo draft continues after a correction, and
    any other model after an accepted prefix of a draft.
    """
    begin_answer = _corrected_prefix if Path(target).name == DEMO_DRAFT else _draft_prefix
    index = 0
    while True:
        problem = draw_problem(split, seed, index)
        rng = random.Random(f"{split}/{seed}/{index}/cut")
        prefix = begin_answer(tokenizer, problem, rng) if index // 2 % 2 else []
        yield chat_prompt_token_ids(tokenizer, [{"role": "user", "content": problem.question}]), prefix
        index += 1


def _draft_prefix(tokenizer: PreTrainedTokenizerBase, problem: Problem, rng: random.Random) -> list[int]:
    draft_answer = tokenizer.encode(correct_answer(problem, DRAFT), add_special_tokens=False)
    return draft_answer[: rng.randrange(1, len(draft_answer))]


def _corrected_prefix(tokenizer: PreTrainedTokenizerBase, problem: Problem, rng: random.Random) -> list[int]:
    """Returns lines in the draft's wording, and then some tokens in the target's."""
    draft_lines, target_lines = (
        correct_answer(problem, wording).splitlines(keepends=True) for wording in (DRAFT, TARGET)
    )
    line = rng.randrange(0, len(draft_lines) - 2)
    before, after = (
        tokenizer.encode("".join(lines), add_special_tokens=False) if lines else []
        for lines in (draft_lines[:line], target_lines[line:])
    )
    return before + after[:CORRECTION_TOKENS]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[PromptAndPrefix]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
                ids = chat_prompt_token_ids(tokenizer, messages)
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a prompt ({error})") from error
            yield ids, []


def read_outputs(path: Path) -> list[TargetOutput]:
    """Reads all complete lines. An incomplete last line is left from an interruption and ignored."""
    outputs = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            try:
                outputs.append(TargetOutput(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not an output ({error})") from error
    return outputs


async def generate_outputs(
    engine: NativeEngine, prompts: Sequence[PromptAndPrefix], max_tokens: int, *, temperature: float = 0.0
) -> list[TargetOutput]:
    """Returns the target's output for each prompt. All of them are generated at once."""

    async def generate_one(prompt: list[int], prefix: list[int]) -> TargetOutput:
        request = GenerateRequest(
            prompt_token_ids=prompt,
            output_token_ids=prefix,
            sampling_params=SamplingParams(temperature=temperature, max_tokens=len(prefix) + max_tokens),
            stream_interval=NO_STREAMING,
        )
        output, finish = list(prefix), None
        async for delta in engine.generate(request):
            output += delta.token_ids
            finish = delta.finish_reason
        return TargetOutput(prompt, output + [_eos_token_id(engine)] * (finish == "stop"), len(prefix))

    return await asyncio.gather(*(generate_one(*prompt_and_prefix) for prompt_and_prefix in prompts))


def write_outputs(
    engine: NativeEngine,
    prompts: Iterable[PromptAndPrefix],
    count: int,
    path: Path,
    *,
    max_tokens: int,
    temperature: float = 0.0,
) -> None:
    """Appends to `path` until it holds `count` lines, or there are no more prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_done = len(read_outputs(path)) if path.exists() else 0
    if num_done:
        content = path.read_text()
        path.write_text(content[: content.rindex("\n") + 1])
    remaining = islice(prompts, num_done, count)
    with path.open("a") as out, tqdm(total=count, initial=num_done, desc=path.name, unit="answer") as bar:
        while group := list(islice(remaining, MAX_NUM_SEQS)):
            for output in asyncio.run(generate_outputs(engine, group, max_tokens, temperature=temperature)):
                out.write(json.dumps(asdict(output)) + "\n")
            out.flush()
            bar.update(len(group))


def _eos_token_id(engine: NativeEngine) -> int:
    """Returns the end token; if there are several, the one of the tokenizer."""
    eos_token_id = engine.model.tokenizer.eos_token_id
    return (
        eos_token_id
        if isinstance(eos_token_id, int) and eos_token_id in engine.model.eos_token_ids
        else min(engine.model.eos_token_ids)
    )


def start_target(model: str, num_threads: int | None, max_model_len: int) -> NativeEngine:
    return load_native_engine(
        EngineSettings(model=model, num_threads=num_threads, max_num_seqs=MAX_NUM_SEQS, max_model_len=max_model_len)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.outputs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="models/demo-target", help="a local path or a Hugging Face id")
    parser.add_argument("--prompts", type=Path, metavar="JSONL", help="prompts; the default is the demo task")
    parser.add_argument("--out", type=Path, default=Path("runs/outputs.jsonl"))
    parser.add_argument("--count", type=int, default=4000, help="total number of outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=512, help="maximum tokens to generate for one output")
    parser.add_argument("--context", type=int, default=4096, help="maximum tokens of a prompt with its output")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, help="CPU threads for arithmetic")
    args = parser.parse_args()
    engine = None
    try:
        engine = start_target(args.target, args.threads, args.context)
        tokenizer = engine.model.tokenizer
        prompts = (
            read_prompts(args.prompts, tokenizer) if args.prompts else demo_prompts(args.target, tokenizer, args.seed)
        )
        write_outputs(engine, prompts, args.count, args.out, max_tokens=args.longest, temperature=args.temperature)
    except (ValueError, OSError, RequestError) as error:
        sys.exit(str(error))
    finally:
        if engine is not None:
            engine.shutdown()


if __name__ == "__main__":
    main()
