"""Measures how often bfloat16 and int8 on a CPU change the choices of a model in float32.

    python -m bench.precision --model PATH --json PATH

The model in float32 answers some prompts. Each variant then computes the log-probabilities of these answers.
"""

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.output import add_json_argument, heading, row, write_output
from bench.smollm2 import find_model
from parse.config import EngineSettings
from parse.engines.native.engine import NativeEngine
from parse.engines.native_loader import load_native_engine
from parse.prompts import VerificationSuffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams
from training.provenance import describe_run

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}
ANSWER_TOKENS = 64
SUBJECTS = (
    *("rivers", "dogs", "the number seven", "bread", "winter", "chess", "cars", "Paris", "bees", "sleep"),
    *("the moon", "music", "glass", "trees", "football", "money", "tea", "maps", "rain", "clocks"),
)
PROMPTS = tuple(f"Explain in a few sentences what one should know about {subject}." for subject in SUBJECTS)
NO_SUFFIX = VerificationSuffix((0,), (0,), (1,))  # no prefix is evaluated

Answers = list[tuple[list[int], list[int]]]
"""The tokens of each prompt and of its answer."""


async def answer(engine: NativeEngine) -> Answers:
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)

    async def answer_one(text: str) -> tuple[list[int], list[int]]:
        prompt = chat_prompt_token_ids(engine.tokenizer, [{"role": "user", "content": text}])
        deltas = engine.generate(GenerateRequest(prompt_token_ids=prompt, sampling_params=params))
        return prompt, [token async for delta in deltas for token in delta.token_ids]

    return list(await asyncio.gather(*map(answer_one, PROMPTS)))


async def compare(engine: NativeEngine, answers: Answers) -> dict[str, float]:
    """Returns how often the engine would choose the same next token, and the mean log-probability of the tokens."""
    is_same: list[bool] = []
    logprobs: list[float] = []
    for prompt, token_ids in answers:
        request = VerifyRequest(
            prompt_token_ids=prompt, draft_token_ids=token_ids, prefix_lengths=(), suffix=NO_SUFFIX, num_logprobs=1
        )
        result = await engine.verify(request)
        is_same += [logprob.top[0][0] == token for logprob, token in zip(result.logprobs, token_ids, strict=True)]
        logprobs += [logprob.logprob for logprob in result.logprobs]
    return {
        "same_choice": statistics.fmean(is_same),
        "mean_logprob": statistics.fmean(logprobs),
        "tokens": len(is_same),
    }


def table(document: Mapping[str, Any]) -> str:
    lines = [
        f"{document['model']}.",
        "",
        *heading("variant", "tokens", "same choice as float32", "mean log-probability"),
    ]
    for name, each in document["variants"].items():
        lines.append(row(name, str(each["tokens"]), f"{each['same_choice']:.1%}", f"{each['mean_logprob']:.4f}"))
    return "\n".join(lines)


def run(model: str, num_threads: int) -> dict[str, dict[str, float]]:
    answers: Answers = []
    results = {}
    for name, changes in VARIANTS.items():
        engine = load_native_engine(EngineSettings(model=model, num_threads=num_threads, max_model_len=512, **changes))
        try:
            answers = answers or asyncio.run(answer(engine))
            results[name] = asyncio.run(compare(engine, answers))
        finally:
            engine.shutdown()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=find_model, required=True, help="a local path, a Hugging Face id or smollm2")
    parser.add_argument("--num-threads", type=int, default=1)
    add_json_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    description = describe_run()
    document = {
        "model": Path(options.model).name,
        "variants": run(options.model, options.num_threads),
        "run": description,
    }
    write_output(document, table(document), options.json)


if __name__ == "__main__":
    main()
