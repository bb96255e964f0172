"""Tests the deployed service from the view of its clients."""

import asyncio

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parse.demo import DEMO_TARGET
from parse.prompts import chat_prompt_token_ids
from tests.deployments.service.service_client import MODEL, chat, problems


def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def messages_of(problem):
    return [{"role": "user", "content": problem.question}]


def library_answer(problem):
    """Returns the target's answer from `generate()` of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    model = AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()
    prompt = torch.tensor([chat_prompt_token_ids(tokenizer, messages_of(problem))])
    token_ids = model.generate(prompt, do_sample=False, max_new_tokens=300)[0, prompt.shape[1] :]
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def test_the_official_client_gets_all_kinds_of_answers(service):
    api, (problem, *_) = client(service), problems(1)
    request = dict(model=MODEL, messages=messages_of(problem), temperature=0, extra_body={"parse": {"mode": "off"}})
    completion = api.chat.completions.create(**request)
    text = completion.choices[0].message.content
    assert text == library_answer(problem) and completion.choices[0].finish_reason == "stop"

    *chunks, totals = api.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert totals.usage.completion_tokens == completion.usage.completion_tokens

    sampled = dict(request, temperature=2, seed=7, n=4)
    one, again = (api.chat.completions.create(**sampled) for _ in range(2))
    assert [c.message.content for c in one.choices] == [c.message.content for c in again.choices]
    assert len(one.choices) == 4 and len({c.message.content for c in one.choices}) > 1

    scored = api.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    tokens = scored.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == text and all(len(t.top_logprobs) == 2 for t in tokens)

    word = text.split()[5]
    stopped = api.chat.completions.create(**request, stop=[word])
    assert stopped.choices[0].message.content == text[: text.index(word)]

    prediction_request = dict(
        request, extra_body={"parse": {"mode": "full"}}, prediction={"type": "content", "content": text}
    )
    predicted = api.chat.completions.create(**prediction_request)
    details = predicted.usage.completion_tokens_details
    assert predicted.choices[0].message.content == text
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (
        completion.usage.completion_tokens,
        0,
    )

    assert [model.id for model in api.models.list()] == [MODEL]


def test_drafts_are_accepted_and_the_counts_are_consistent(service):
    async def request():
        return [await service.answer(chat(p.question, mode=mode)) for p in problems(4) for mode in ("full", "rounds")]

    answers = asyncio.run(request())
    for answer in answers:
        report, usage = answer["parse"], answer["usage"]
        assert report["accepted"] + report["written"] == usage["completion_tokens"]
        assert report["accepted"] + report["rejected"] == report["drafted"] > 0
        assert report["retries"] == 0 and report["fallback"] is None
        assert {"queue", "warm", "draft", "judge"} <= {stage["name"] for stage in report["stages"]}
    assert sum(answer["parse"]["accepted"] for answer in answers) > sum(
        answer["parse"]["rejected"] for answer in answers
    )


def test_drafter_and_verifier_have_one_device_each_and_the_router_has_none(service):
    async def described():
        return [await service.describe(name) for name in ("Verifier", "Drafter", "Router")]

    (verifier,), (drafter,), (router,) = asyncio.run(described())
    assert {verifier.visible_gpus, drafter.visible_gpus} == {"0", "1"} and router.visible_gpus == ""
    assert len({verifier.pid, drafter.pid, router.pid}) == 3


def test_one_request_is_drafted_while_another_is_verified(service):
    """Both engines have running requests at the same time, and not only requests that wait for a call."""

    async def both_run():
        """Whether the drafter runs a request before and after a moment at which the verifier runs one."""
        running = [(await service.stats(name))[0].num_running for name in ("Drafter", "Verifier", "Drafter")]
        return all(running)

    async def sample():
        bodies = [chat(problem.question, mode="full") for problem in problems(64)]
        requests = asyncio.gather(*(service.answer(body) for body in bodies))
        samples = []
        while not requests.done():
            samples.append(await both_run())
        await requests
        return samples

    samples = asyncio.run(sample())
    assert sum(samples) > 10, len(samples)
