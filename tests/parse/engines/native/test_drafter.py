"""A drafter with its own tokenizer: how long its drafts can become."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from parse.engines.native.drafter import RetokenizingDrafter
from parse.requests import DraftRequest
from parse.types import SamplingParams, TokenDelta

CONTEXT_LENGTH = 5000


class EndlessEngine:
    """Generates one token up to the limit of the request, or up to its context length."""

    def __init__(self, tokenizer):
        self.model = SimpleNamespace(tokenizer=tokenizer)
        self.num_generated = 0

    async def generate(self, request):
        limit = request.sampling_params.max_tokens
        count = CONTEXT_LENGTH if limit is None else limit - len(request.output_token_ids)
        self.num_generated += count
        yield TokenDelta((self.model.tokenizer.encode(" 7")[0],) * count, finish_reason="length")


@pytest.mark.parametrize(
    ("num_output", "max_tokens", "lowest"), [(0, 30, 30), (12, 30, 18), (30, 30, 0), (0, None, 5000)]
)
def test_a_draft_that_does_not_end_is_limited_by_what_the_target_may_still_generate(
    tokenizer, num_output, max_tokens, lowest
):
    engine: Any = EndlessEngine(tokenizer)
    drafter = RetokenizingDrafter(engine, tokenizer)
    request = DraftRequest(
        prompt_token_ids=(1,),
        output_token_ids=tokenizer.encode(" 7")[:1] * num_output,
        messages=[{"role": "user", "content": "Hello."}],
        sampling_params=SamplingParams(max_tokens=max_tokens),
    )

    async def draft():
        async with aclosing(drafter.draft(request)) as deltas:
            return [delta async for delta in deltas]

    deltas = asyncio.run(draft())
    assert lowest <= engine.num_generated <= 2 * lowest + 16
    assert deltas[-1].finish_reason == "length"
