"""A drafter with its own tokenizer: the tokens of its drafts, and how many of them there can be."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parse.engines.drafter import RetokenizingDrafter
from parse.prompts import chat_prompt_token_ids
from parse.requests import DraftRequest
from parse.types import SamplingParams, TokenDelta

CONTEXT_LENGTH = 5000


class EndlessEngine:
    """Generates one token up to the limit of the request, or up to its context length."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.num_generated = 0

    async def generate(self, request):
        limit = request.sampling_params.max_tokens
        count = CONTEXT_LENGTH if limit is None else limit - len(request.output_token_ids)
        self.num_generated += count
        yield TokenDelta((self.tokenizer.encode(" 7")[0],) * count, finish_reason="length")


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


ANSWER = "Uma scores 73, above 27.\nMax: 52 < 73!  So naïve Max…\n\nTop Uma 73.\n"


@pytest.fixture(scope="module")
def byte_tokenizer(tokenizer):
    """A tokenizer that splits every word into bytes."""
    special_tokens = tokenizer.all_special_tokens
    entries = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)]
    backend = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=[token for token in special_tokens if token != tokenizer.eos_token],
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


class ScriptedEngine:
    """Generates a text in deltas of as many tokens as the request asks for."""

    def __init__(self, tokenizer, text):
        self.tokenizer = tokenizer
        self.token_ids = tokenizer.encode(text, add_special_tokens=False)
        self.requests = []

    async def generate(self, request):
        self.requests.append(request)
        for start in range(0, len(self.token_ids), request.stream_interval):
            yield TokenDelta(tuple(self.token_ids[start : start + request.stream_interval]))
        yield TokenDelta((), finish_reason="stop")


@pytest.mark.parametrize("stream_interval", [1, 2, 3, 7, 1000])
def test_words_that_the_drafter_splits_become_whole_tokens_of_the_target(tokenizer, byte_tokenizer, stream_interval):
    assert byte_tokenizer.decode(byte_tokenizer.encode(ANSWER)) == ANSWER
    engine: Any = ScriptedEngine(byte_tokenizer, ANSWER)
    drafter = RetokenizingDrafter(engine, tokenizer)
    messages = [{"role": "user", "content": "Who has the record now?"}]
    output = "First Uma 73."
    request = DraftRequest(
        prompt_token_ids=tuple(chat_prompt_token_ids(tokenizer, messages)),
        output_token_ids=tuple(tokenizer.encode(output)),
        messages=messages,
        sampling_params=SamplingParams(),
        stream_interval=stream_interval,
    )

    async def draft():
        async with aclosing(drafter.draft(request)) as deltas:
            return [delta async for delta in deltas]

    deltas = asyncio.run(draft())
    assert [token for delta in deltas for token in delta.token_ids] == tokenizer.encode(ANSWER)
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert stream_interval == 1000 or sum(bool(delta.token_ids) for delta in deltas) > 5  # the draft is streamed
    (engine_request,) = engine.requests
    assert list(engine_request.prompt_token_ids) == list(chat_prompt_token_ids(byte_tokenizer, messages))
    assert byte_tokenizer.decode(list(engine_request.output_token_ids)) == output
