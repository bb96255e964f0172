"""What an engine cannot do is refused by the name of the field, before anything is computed."""

import asyncio
from typing import Any

import pytest

from parse.config import VerificationSettings
from parse.engines.protocol import Capabilities
from parse.errors import RequestError
from parse.pipeline import Pipeline
from parse.prompts import VerificationSuffix
from parse.requests import GenerationRequest
from parse.types import SamplingParams

LIMITED = Capabilities(
    modes=("full", "off"),
    speculative_methods=("eagle3",),
    sampling_params=frozenset({"temperature", "top_p", "seed", "max_tokens", "logprobs"}),
    max_logprobs=5,
    max_model_len=100,
    block_size=16,
)


@pytest.mark.parametrize(
    ("fields", "params", "field", "reason"),
    [
        ({"mode": "progressive"}, {}, "mode", "supports full, off"),
        ({"speculative_method": "ngram"}, {}, "speculation", "eagle3, none"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty", "is not supported"),
        ({}, {"logit_bias": {5: 1.0}}, "logit_bias", "is not supported"),
        ({}, {"stop": ("x",)}, "stop", "is not supported"),
        ({}, {"logprobs": 6}, "logprobs", "at most 5, got 6"),
    ],
)
def test_what_is_beyond_the_capabilities_is_refused_by_name(fields, params, field, reason):
    request = GenerationRequest((1, 2), sampling_params=SamplingParams(**params), **fields)
    with pytest.raises(RequestError, match=reason) as refused:
        LIMITED.check(request)
    assert refused.value.field == field


def test_what_is_within_the_capabilities_and_every_default_is_served():
    variants: list[dict[str, Any]] = [
        {},
        {"mode": "full"},
        {"speculative_method": "eagle3"},
        {"speculative_method": "none"},
    ]
    for fields in variants:
        params = SamplingParams(temperature=0.5, top_p=0.9, seed=3, max_tokens=5, logprobs=5)
        LIMITED.check(GenerationRequest((1, 2), sampling_params=params, **fields))
        LIMITED.check(GenerationRequest((1, 2), **fields))


def limited_pipeline(tokenizer, **settings: Any) -> Pipeline:
    return Pipeline(
        verifier=None,  # type: ignore[arg-type]
        capabilities=LIMITED,
        tokenizer=tokenizer,
        suffix=VerificationSuffix((1,), (2,), (3,)),
        settings=VerificationSettings(**settings),
    )


def test_a_pipeline_refuses_a_request_before_it_calls_the_engine(tokenizer):
    pipeline = limited_pipeline(tokenizer, auto_mode="full")

    async def first_event():
        return await anext(pipeline.generate(GenerationRequest((1, 2), mode="rounds")))

    with pytest.raises(RequestError, match=r"^mode: this engine supports full, off, got 'rounds'"):
        asyncio.run(first_event())


def test_settings_that_the_engine_cannot_serve_are_refused_at_startup(tokenizer):
    with pytest.raises(ValueError, match=r"verification\.auto_mode: this engine supports full, off, got rounds"):
        limited_pipeline(tokenizer, auto_mode="rounds")
