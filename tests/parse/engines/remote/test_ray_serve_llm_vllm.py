"""The dialect of Ray Serve LLM over a real vLLM, whose streams Ray Serve LLM passes on unchanged."""

import asyncio

import pytest
from transformers import AutoTokenizer

from parse.demo import DEMO_TARGET
from parse.engines.remote.ray_serve_llm import RayServeLLM
from parse.engines.remote.server import Server, ServerAddress
from parse.engines.remote.vllm import VLLM
from parse.prompts import chat_prompt_token_ids
from training.measure import draw_problems

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_TARGET)
PROMPTS = [
    chat_prompt_token_ids(TOKENIZER, [{"role": "user", "content": problem.question}]) for problem in draw_problems(5, 3)
]
TOLERANCE = 1e-3  # nats; batches of other sizes give slightly other values


async def readings(dialect, server):
    """Returns what a dialect says about a server: the model, what it can do, and log-probabilities."""
    model = await dialect.identify(server, None, TOKENIZER)
    features = await dialect.find_features(server, model, TOKENIZER)
    next_tokens = [
        await dialect.next_token_logprobs(server, model.name, PROMPTS, [3, 5, 9], by_token_id=by_token_id)
        for by_token_id in (True, False)
    ]
    in_prompt = await dialect.prompt_logprobs(server, model.name, PROMPTS[0], 4, 3)
    return model, features, next_tokens, in_prompt


def test_streams_are_read_like_whole_responses(vllm):
    if vllm.process.poll() is not None:  # another test has killed it
        vllm.restart()

    async def both():
        server = Server(ServerAddress(vllm.url, connect_timeout_s=5.0, stall_timeout_s=60.0))
        try:
            return [await readings(dialect, server) for dialect in (VLLM(), RayServeLLM())]
        finally:
            await server.aclose()

    (model, features, next_tokens, in_prompt), streamed = asyncio.run(both())
    streamed_model, streamed_features, streamed_next_tokens, streamed_in_prompt = streamed
    assert streamed_model.name == model.name
    assert streamed_model.logprobs == pytest.approx(model.logprobs, abs=TOLERANCE)
    for name in ("verifies", "verifies_by_token_id", "has_prompt_logprobs", "has_speculation", "version"):
        assert getattr(streamed_features, name) == getattr(features, name), name
    assert features.verifies_by_token_id and not features.has_speculation
    for expected, read in zip(next_tokens, streamed_next_tokens, strict=True):
        assert read == [pytest.approx(logprobs, abs=TOLERANCE) for logprobs in expected]
    assert [entry.is_argmax for entry in streamed_in_prompt] == [entry.is_argmax for entry in in_prompt]
    assert {entry.is_argmax for entry in in_prompt} == {True, False}
    for entry, read in zip(in_prompt, streamed_in_prompt, strict=True):
        assert read.logprob.logprob == pytest.approx(entry.logprob.logprob, abs=TOLERANCE)
        assert dict(read.logprob.top) == pytest.approx(dict(entry.logprob.top), abs=TOLERANCE)
