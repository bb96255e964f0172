"""Tests the API with the official client and the demo pair."""

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import AutoModelForCausalLM

from deployments.api.response_models import ParseReport
from parse.demo import DEMO_TARGET
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from tests.deployments.conftest import MODEL
from training import measure

# These problems have short answers.
PROBLEMS = sorted(measure.draw_problems(11, 60, split="client"), key=lambda problem: problem.steps)[:6]
MODES = ["off", "full", "progressive", "rounds", "exact", "auto"]
OPEN: Any = [{"role": "user", "content": "Hello."}]  # the demo pair writes long answers to unknown questions
REPEATABLE = ["off", "full", "progressive", "exact"]  # the other modes depend on measured times


def problem_messages(index: int = 0) -> Any:
    return [{"role": "user", "content": PROBLEMS[index].question}]


def chat(client: OpenAI, messages: Any = None, mode: str = "off", trace: bool = False, **params: Any) -> ChatCompletion:
    params = {"temperature": 0} | params
    body = {"parse": {"mode": mode, "trace": trace}}
    return client.chat.completions.create(
        model=MODEL, messages=messages or problem_messages(), extra_body=body, **params
    )


def chunks(
    client: OpenAI, messages: Any = None, mode: str = "off", trace: bool = False, **params: Any
) -> list[ChatCompletionChunk]:
    params = {"temperature": 0} | params
    body = {"parse": {"mode": mode, "trace": trace}}
    stream = client.chat.completions.create(
        model=MODEL, messages=messages or problem_messages(), extra_body=body, stream=True, **params
    )
    return list(stream)


def complete(client: OpenAI, prompt: Any, **params: Any) -> Completion:
    return client.completions.create(model=MODEL, prompt=prompt, **({"temperature": 0} | params))


def text_of(answer: ChatCompletion, choice: int = 0) -> str:
    return answer.choices[choice].message.content or ""


def joined_text(chunk_list: Iterable[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(choice.delta.content or "" for c in chunk_list for choice in c.choices if choice.index == index)


def parse_extension(answer: Any) -> Any:
    assert answer.model_extra is not None
    return answer.model_extra["parse"]


def report(answer: Any) -> ParseReport:
    return ParseReport.model_validate(parse_extension(answer))


def last_report(chunk_list: list[ChatCompletionChunk]) -> ParseReport:
    (ending,) = [chunk for chunk in chunk_list if chunk.choices and chunk.choices[0].finish_reason]
    return report(ending)


@pytest.fixture(scope="module")
def peer() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()


@pytest.fixture(scope="module")
def prompts(pair: Pair) -> list[list[int]]:
    """Returns prompts with long continuations."""
    return [chat_prompt_token_ids(pair.tokenizer, problem_messages(index)) for index in range(2)]


def logits_of(peer: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = peer(input_ids=torch.tensor([ids])).logits[0]
    return logits


@cache
def _generated(peer: Any, *prompt: int) -> list[int]:
    complete_answer: list[int] = peer.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=240)[0].tolist()
    return complete_answer[len(prompt) :]


def target_token_ids(peer: Any, pair: Pair, messages: Any) -> list[int]:
    """Returns what the target generates alone, without its end token."""
    *ids, end = _generated(peer, *chat_prompt_token_ids(pair.tokenizer, messages))
    assert end == pair.tokenizer.eos_token_id
    return ids


# Chat.


def test_a_greedy_answer_equals_that_of_the_library(client, pair, peer):
    for index in range(2):
        answer = chat(client, problem_messages(index))
        ids = target_token_ids(peer, pair, problem_messages(index))
        assert text_of(answer) == pair.tokenizer.decode(ids)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(chat_prompt_token_ids(pair.tokenizer, problem_messages(index)))
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(ids)


def test_an_answer_has_the_ids_and_names_of_the_api(client):
    before = int(time.time())
    first, second = chat(client, max_tokens=1), chat(client, max_tokens=1)
    assert first.object == "chat.completion" and first.model == MODEL and first.id != second.id
    assert before <= first.created <= second.created <= time.time()
    assert first.choices[0].message.role == "assistant" and first.choices[0].logprobs is None


@pytest.mark.parametrize("mode", REPEATABLE)
@pytest.mark.parametrize(
    "sampling_params", [{}, {"temperature": 1.0, "seed": 5, "max_tokens": 40}, {"stop": ["Third", "move"]}]
)
def test_the_parts_of_a_stream_form_the_answer(client, mode, sampling_params):
    complete_answer = chat(client, mode=mode, **sampling_params)
    chunk_list = chunks(client, mode=mode, **sampling_params)
    assert joined_text(chunk_list) == text_of(complete_answer) and text_of(complete_answer)
    assert chunk_list[0].choices[0].delta.role == "assistant"
    assert all(chunk.object == "chat.completion.chunk" and chunk.model == MODEL for chunk in chunk_list)
    assert len({chunk.id for chunk in chunk_list}) == 1
    finishes = [choice.finish_reason for chunk in chunk_list for choice in chunk.choices]
    assert finishes[-1] == complete_answer.choices[0].finish_reason and set(finishes[:-1]) == {None}
    assert all(chunk.usage is None for chunk in chunk_list)


def test_the_first_tokens_arrive_before_the_last_are_generated(client):
    assert len([chunk for chunk in chunks(client) if chunk.choices[0].delta.content]) > 1


def test_a_stream_ends_with_its_usage_if_it_is_requested(client):
    complete_answer = chat(client)
    *chunk_list, totals = chunks(client, stream_options={"include_usage": True})
    assert totals.choices == [] and totals.usage is not None and complete_answer.usage is not None
    assert totals.usage.completion_tokens == complete_answer.usage.completion_tokens
    assert totals.usage.prompt_tokens == complete_answer.usage.prompt_tokens
    assert all(chunk.choices and chunk.usage is None for chunk in chunk_list)


@pytest.mark.parametrize("mode", ["off", "full", "exact"])
def test_the_same_seed_gives_the_same_answer_and_each_choice_has_its_own_seed(client, mode):
    params: Any = {"messages": OPEN, "mode": mode, "temperature": 1.5, "max_tokens": 16}
    both = chat(client, n=2, seed=41, **params)
    one, other = chat(client, seed=41, **params), chat(client, seed=42, **params)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [text_of(both, 0), text_of(both, 1)] == [text_of(one), text_of(other)]
    assert text_of(one) != text_of(other)
    assert both.usage is not None and one.usage is not None and other.usage is not None
    assert both.usage.prompt_tokens == one.usage.prompt_tokens
    assert both.usage.completion_tokens == one.usage.completion_tokens + other.usage.completion_tokens
    chunk_list = chunks(client, n=2, seed=41, **params)
    assert [joined_text(chunk_list, 0), joined_text(chunk_list, 1)] == [text_of(one), text_of(other)]


def test_without_a_seed_answers_differ(client):
    params: Any = {"messages": OPEN, "temperature": 2.0, "max_tokens": 24}
    answers = [text_of(chat(client, n=2, **params), choice) for _ in range(2) for choice in range(2)]
    assert len(set(answers)) == 4


@pytest.mark.parametrize("mode", REPEATABLE)
def test_log_probabilities_are_the_targets_own(client, pair, peer, mode):
    answer = chat(client, mode=mode, logprobs=True, top_logprobs=3, max_tokens=40)
    assert answer.choices[0].logprobs is not None and answer.usage is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in entries) == text_of(answer)
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == text_of(answer)
    names = {pair.tokenizer.decode([token]): token for token in range(len(pair.tokenizer))}
    ids = [names[entry.token] for entry in entries]
    prompt = chat_prompt_token_ids(pair.tokenizer, problem_messages())
    expected = logits_of(peer, [*prompt, *ids])[len(prompt) - 1 : -1].log_softmax(-1)
    for row, token, entry in zip(expected, ids, entries, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    streamed = chunks(client, mode=mode, logprobs=True, top_logprobs=3, max_tokens=40)
    parts = [choice.logprobs.content or [] for c in streamed for choice in c.choices if choice.logprobs is not None]
    assert [entry.token for delta in parts for entry in delta] == [entry.token for entry in entries]


def test_log_probabilities_without_alternatives_name_no_other_tokens(client):
    answer = chat(client, logprobs=True, max_tokens=4)
    assert answer.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content or []] == [[]] * 4


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_ends_before_a_stop_string(client, pair, peer, mode):
    complete_answer = pair.tokenizer.decode(target_token_ids(peer, pair, problem_messages()))
    for stop in (complete_answer[20:24], [complete_answer[-5:], "no such thing"], complete_answer[:3]):
        answer = chat(client, mode=mode, stop=stop)
        strings = [stop] if isinstance(stop, str) else stop
        assert not any(string in text_of(answer) for string in strings)
        assert answer.choices[0].finish_reason == "stop"
        if mode in ("off", "exact"):
            assert (
                text_of(answer)
                == complete_answer[: min(complete_answer.find(s) for s in strings if s in complete_answer)]
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_token_limit(client, mode, name):
    for limit in (1, 7, 16):
        params: Any = {name: limit}
        answer = chat(client, mode=mode, **params)
        assert answer.usage is not None and answer.usage.completion_tokens == limit
        assert answer.choices[0].finish_reason == "length"


def test_an_answer_ends_at_the_context_length(client, pair):
    long: Any = [{"role": "user", "content": " 53" * 990}]
    answer = chat(client, long, logit_bias={str(pair.tokenizer.eos_token_id): -100})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024 and answer.choices[0].finish_reason == "length"


def test_content_parts_and_developer_messages_give_the_same_prompt(client):
    content = PROBLEMS[0].question
    plain: Any = [{"role": "system", "content": "Answer step by step."}, {"role": "user", "content": content}]
    halves = [{"type": "text", "text": text} for text in (content[:20], content[20:])]
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Answer step by step."}]},
        {"role": "user", "content": halves},
    ]
    one, other = chat(client, plain), chat(client, parts)
    assert text_of(one) == text_of(other)
    assert one.usage is not None and other.usage is not None and one.usage.prompt_tokens == other.usage.prompt_tokens


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact", "auto"])
def test_a_correct_prediction_is_accepted_in_full(client, pair, peer, mode):
    own = target_token_ids(peer, pair, problem_messages())
    text = pair.tokenizer.decode(own)
    for content in (text, [{"type": "text", "text": delta} for delta in (text[:30], text[30:])]):
        answer = chat(client, mode=mode, prediction={"type": "content", "content": content})
        assert text_of(answer) == text
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        assert answer.usage.completion_tokens_details.accepted_prediction_tokens == len(own)
        assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 0
        assert report(answer).written == 0


@pytest.mark.parametrize("mode", ["full", "progressive", "rounds", "exact"])
def test_a_wrong_prediction_is_rejected(client, pair, peer, mode):
    wrong = "So nobody has anything now. The answer is 3."
    answer = chat(client, mode=mode, prediction={"type": "content", "content": wrong})
    assert text_of(answer) == pair.tokenizer.decode(target_token_ids(peer, pair, problem_messages()))
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    details = answer.usage.completion_tokens_details
    assert details.rejected_prediction_tokens is not None and details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens > 0
    if mode != "rounds":  # there, the rest of the prediction is tried again after the correction
        drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
        assert drafted == len(pair.tokenizer.encode(wrong, add_special_tokens=False))


def test_a_bias_can_forbid_or_force_a_token(client, pair):
    free = chat(client, logprobs=True, max_tokens=8)
    assert free.choices[0].logprobs is not None
    first = (free.choices[0].logprobs.content or [])[0].token
    (token,) = pair.tokenizer.encode(first, add_special_tokens=False)
    without = chat(client, logprobs=True, max_tokens=40, logit_bias={str(token): -100})
    assert without.choices[0].logprobs is not None
    assert first not in [entry.token for entry in without.choices[0].logprobs.content or []]
    forced = chat(client, max_tokens=5, logit_bias={str(token): 100})
    assert text_of(forced) == first * 5


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 2.0), (-2.0, 0.5), (1.5, 1.5)])
def test_penalties_follow_the_definition_of_the_api(client, pair, peer, presence, frequency):
    prompt, ids = chat_prompt_token_ids(pair.tokenizer, OPEN), list[int]()
    for _ in range(40):
        logits = logits_of(peer, [*prompt, *ids])[-1].clone()
        for token, count in Counter(ids).items():
            logits[token] -= presence + frequency * count
        ids.append(int(logits.argmax()))
        if ids[-1] == pair.tokenizer.eos_token_id:
            ids.pop()
            break
    answer = chat(client, OPEN, presence_penalty=presence, frequency_penalty=frequency, max_tokens=40)
    assert text_of(answer) == pair.tokenizer.decode(ids) != text_of(chat(client, OPEN, max_tokens=40))


# Completions.


def test_prompts_may_be_one_or_several_texts_or_token_lists(client, pair, prompts):
    texts, ids = [pair.tokenizer.decode(tokens) for tokens in prompts], prompts
    alone = [complete(client, text, max_tokens=6) for text in texts]
    assert [answer.choices[0].text for answer in alone] == [
        complete(client, tokens, max_tokens=6).choices[0].text for tokens in ids
    ]
    for several in (texts, ids):
        answer = complete(client, several, max_tokens=6)
        assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 12


def test_a_continuation_equals_that_of_the_library(client, pair, peer, prompts):
    expected = peer.generate(torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=16)[0, len(prompts[0]) :]
    answer = complete(client, pair.tokenizer.decode(prompts[0]))
    assert answer.choices[0].text == pair.tokenizer.decode(expected)  # the default of the API is 16 tokens
    assert answer.object == "text_completion" and answer.choices[0].finish_reason == "length"
    assert report(answer).mode == "off"


def test_choices_of_several_prompts_are_in_order_and_have_their_own_seeds(client, pair):
    prompts = [
        chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": text}]) for text in ("Hello.", "What?")
    ]
    params: Any = {"temperature": 2.0, "max_tokens": 24}
    answer = complete(client, prompts, n=2, seed=8, **params)
    expected = [complete(client, prompt, seed=seed, **params).choices[0].text for prompt in prompts for seed in (8, 9)]
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) == 4
    assert len(parse_extension(answer)) == 4


def test_the_log_probabilities_of_a_completion_match_its_text(client, pair, peer, prompts):
    ids = prompts[0]
    (choice,) = complete(client, ids, max_tokens=8, logprobs=2).choices
    tokens = choice.logprobs
    assert tokens is not None and tokens.tokens and tokens.token_logprobs and tokens.top_logprobs and tokens.text_offset
    assert "".join(tokens.tokens) == choice.text
    assert [
        choice.text[o : o + len(t)] for o, t in zip(tokens.text_offset, tokens.tokens, strict=True)
    ] == tokens.tokens
    names = {pair.tokenizer.decode([token]): token for token in range(len(pair.tokenizer))}
    text = [names[token] for token in tokens.tokens]
    rows = logits_of(peer, [*ids, *text])[len(ids) - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, text, strict=True)]
    assert tokens.token_logprobs == pytest.approx(expected, abs=1e-3)
    for row, top in zip(rows, tokens.top_logprobs, strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


def test_a_completion_can_be_streamed(client, prompts):
    params: Any = {"model": MODEL, "prompt": prompts[0], "max_tokens": 12, "logprobs": 1, "temperature": 0}
    (complete_answer,) = client.completions.create(**params).choices
    stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **params)
    *chunk_list, totals = list(stream)
    parts = [chunk.choices[0] for chunk in chunk_list]
    assert "".join(delta.text for delta in parts) == complete_answer.text
    assert parts[-1].finish_reason == complete_answer.finish_reason and {
        delta.finish_reason for delta in parts[:-1]
    } == {None}
    assert totals.usage is not None and totals.usage.completion_tokens == 12 and totals.choices == []
    assert complete_answer.logprobs is not None
    for name in ("tokens", "text_offset"):
        streamed = [value for delta in parts if delta.logprobs for value in getattr(delta.logprobs, name)]
        assert streamed == getattr(complete_answer.logprobs, name)


def test_a_text_can_be_continued_with_drafts(client, pair):
    prompt = chat_prompt_token_ids(pair.tokenizer, problem_messages())
    answer = complete(client, prompt, max_tokens=200, extra_body={"parse": {"mode": "full"}})
    assert report(answer).accepted > 0
    assert answer.choices[0].text == text_of(chat(client, mode="full", max_tokens=200))


# Models and rejected requests.


def test_the_model_is_listed(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, client.models.retrieve(MODEL).id) == (MODEL, "model", MODEL)
    assert card.model_extra is not None and card.model_extra["max_model_len"] == 1024
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/one")


def test_the_client_understands_rejections(client):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, temperature=3)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=problem_messages())
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as wide:
        chat(client, n=17)
    assert wide.value.param == "n" and "16" in wide.value.message
    with pytest.raises(openai.BadRequestError) as many:
        complete(client, ["a"] * 17)
    assert many.value.param == "prompt"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_beyond_the_context_length_is_rejected(client, stream):
    long: Any = [{"role": "user", "content": "53 " * 2000}]
    params: list[Any] = [{"messages": long}, {"messages": problem_messages(), "max_tokens": 1000}]
    for body in params:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, stream=stream, **body)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
        assert "1024" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 1024, stream=stream)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_a_request_at_the_context_length_is_served_and_one_more_token_is_not(client):
    answer = complete(client, [5] * 1000, max_tokens=24, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.total_tokens == 1024
    with pytest.raises(openai.BadRequestError):
        complete(client, [5] * 1000, max_tokens=25)


# Reports on drafts.


@pytest.mark.parametrize("mode", MODES)
def test_a_request_chooses_its_mode_and_gets_a_report(client, mode):
    answer = chat(client, mode=mode, trace=True)
    response, usage = report(answer), answer.usage
    assert usage is not None and usage.completion_tokens_details is not None and usage.prompt_tokens_details is not None
    if mode != "auto":
        assert response.mode == mode
        assert (response.drafted > 0) == (response.rounds > 0) == (mode != "off")
    assert response.accepted + response.written == usage.completion_tokens
    assert response.accepted + response.rejected == response.drafted
    assert usage.completion_tokens_details.accepted_prediction_tokens == response.accepted
    assert usage.completion_tokens_details.rejected_prediction_tokens == response.rejected
    assert usage.prompt_tokens_details.cached_tokens == response.cached <= usage.prompt_tokens
    assert response.retries == 0 and (response.fallback is None or mode == "auto")
    check_trace(response, text_of(answer), mode)
    assert abs(response.arrived - time.time()) < 60


def check_trace(response: ParseReport, text: str, mode: str) -> None:
    assert response.pieces is not None and response.verdicts is not None
    assert "".join(delta.text for delta in response.pieces) == text
    counts: Counter[str] = Counter()
    for delta in response.pieces:
        counts[delta.origin] += delta.tokens
    assert (counts["draft"], counts["target"]) == (response.accepted, response.written)
    assert bool(response.verdicts) == (response.drafted > 0 and mode != "exact")
    for verification in response.verdicts:
        assert len(verification.cuts) == len(verification.correct) and verification.cuts == sorted(
            set(verification.cuts)
        )
        assert all(chance is None or 0 <= chance <= 1 for chance in verification.correct)
    check_times(response)


def check_times(response: ParseReport) -> None:
    assert 0 <= response.first_s <= response.total_s
    assert response.stages[0].name == "queue" and response.stages[0].start == 0
    for stage in response.stages:
        assert 0 <= stage.start <= stage.end <= response.total_s
        assert stage.name == "queue" or stage.start >= response.stages[0].end
    end_times = [stage.end for stage in response.stages]
    assert end_times == sorted(end_times)
    assert {stage.name for stage in response.stages} >= ({"draft"} if response.drafted else {"write"})


@pytest.mark.parametrize("mode", REPEATABLE)
@pytest.mark.parametrize("params", [{"stop": ["Third", "has"]}, {"max_tokens": 30, "logprobs": True}])
def test_a_stream_has_the_same_report(client, mode, params):
    response = report(chat(client, mode=mode, trace=True, **params))
    chunk_list = chunks(client, mode=mode, trace=True, **params)
    streamed = last_report(chunk_list)
    names = ["mode", "accepted", "written", "rounds", "boundary", "fallback", "retries"]
    if mode != "progressive":  # how far the drafter gets before it is stopped depends on timing
        names += ["drafted", "rejected"]
    assert [getattr(response, name) for name in names] == [getattr(streamed, name) for name in names]
    check_times(streamed)
    shown = [parse_extension(chunk) for chunk in chunk_list if "parse" in (chunk.model_extra or {})]
    pieces = [delta["piece"] for delta in shown if "piece" in delta]
    verdicts = [delta["verdict"] for delta in shown if "verdict" in delta]
    assert response.pieces is not None and response.verdicts is not None
    for origin, tokens in (("draft", response.accepted), ("target", response.written)):
        assert sum(delta["tokens"] for delta in pieces if delta["origin"] == origin) == tokens
        text = "".join(delta.text for delta in response.pieces if delta.origin == origin)
        assert "".join(delta["text"] for delta in pieces if delta["origin"] == origin) == text
    assert [(v["start"], v["cuts"], v["kept"], v["rejected"]) for v in verdicts] == [
        (v.start, v.cuts, v.kept, v.rejected) for v in response.verdicts
    ]


def test_the_report_contains_a_trace_only_on_request(client):
    response = report(chat(client, mode="full"))
    assert response.pieces is None and response.verdicts is None and response.accepted > 0
    chunk_list = chunks(client, mode="full")
    assert [chunk for chunk in chunk_list if "parse" in (chunk.model_extra or {})] == chunk_list[-1:]
    assert last_report(chunk_list).accepted == response.accepted


def test_every_choice_has_its_own_report(client):
    answer = chat(client, n=3, mode="full", seed=3, temperature=1.0, trace=True)
    reports = [ParseReport.model_validate(messages) for messages in parse_extension(answer)]
    assert len(reports) == 3
    for index, response in enumerate(reports):
        check_trace(response, text_of(answer, index), "full")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(response.accepted + response.written for response in reports)


def test_mode_exact_gives_the_answer_of_the_target_alone(client):
    options: list[Any] = [{}, {"temperature": 1.0, "seed": 3, "max_tokens": 60}]
    cases = list(product(range(2), options, ("exact", "off")))
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: chat(client, problem_messages(case[0]), mode=case[2], **case[1]), cases))
    for exact, off in zip(answers[::2], answers[1::2], strict=True):
        assert text_of(exact) == text_of(off) and exact.choices[0].finish_reason == off.choices[0].finish_reason


def test_thresholds_are_applied_and_have_a_minimum(client):
    def answer(**options: float) -> ParseReport:
        body = {"parse": {"mode": "full"} | options}
        return report(
            client.chat.completions.create(
                model=MODEL, messages=problem_messages(), temperature=0, extra_body=body, seed=1
            )
        )

    assert answer(full=1.0, prefix=1.0).accepted == 0  # P(correct) is never exactly 1
    assert answer(full=0.5, prefix=0.5).accepted >= answer().accepted > 0
    for name in ("full", "prefix"):
        with pytest.raises(openai.BadRequestError) as refused:
            answer(**{name: 0.49})
        assert refused.value.param == f"parse.{name}"


def test_a_repeated_prompt_is_reported_as_cached(client, pair):
    fresh: Any = [{"role": "user", "content": "A question nobody asked before: " + PROBLEMS[5].question}]
    first, second = chat(client, fresh, max_tokens=2), chat(client, fresh, max_tokens=2)
    assert first.usage is not None and first.usage.prompt_tokens_details is not None
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    length = first.usage.prompt_tokens
    assert (first.usage.prompt_tokens_details.cached_tokens or 0) < 5  # the header of the chat template
    block_size = pair.target.capabilities().block_size  # an engine may share only whole blocks
    num_shared = length - 1 if block_size > length else (length - 1) // block_size * block_size
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= num_shared > 0


def test_the_most_likely_ones_of_several_completions_are_returned(client, pair):
    fields: Any = dict(temperature=1.5, seed=3, max_tokens=6)
    prompts = [
        chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": text}])
        for text in ("Hello.", "Good evening.")
    ]
    candidates: Any = complete(client, prompts, n=4, logprobs=1, **fields).choices
    expected = []
    for group in (candidates[:4], candidates[4:]):
        assert len({choice.text for choice in group}) > 2  # otherwise it makes no difference
        means = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in group]
        ranked = sorted(range(4), key=lambda index: -means[index])
        expected += [group[index].text for index in ranked[:2]]
    best: Any = complete(client, prompts, n=2, best_of=4, **fields)
    assert [choice.text for choice in best.choices] == expected
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert len(parse_extension(best)) == 4
    assert best.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in candidates)
    with_logprobs: Any = complete(client, prompts, n=2, best_of=4, logprobs=1, **fields)
    assert all(choice.logprobs.tokens for choice in with_logprobs.choices)
    assert [choice.text for choice in with_logprobs.choices] == expected


def test_the_best_completion_does_not_depend_on_whether_logprobs_are_listed(client, pair, peer):
    """Some of these completions end by themselves, some at once, and the others at the limit."""
    prompt = chat_prompt_token_ids(pair.tokenizer, problem_messages())
    context = [*prompt, *target_token_ids(peer, pair, problem_messages())]
    bias = {str(pair.tokenizer.eos_token_id): -10}
    fields: Any = dict(temperature=2.0, seed=1, max_tokens=4, n=4, best_of=8, logit_bias=bias)
    plain: Any = complete(client, context, **fields)
    listed: Any = complete(client, context, logprobs=0, **fields)
    assert [choice.text for choice in plain.choices] == [choice.text for choice in listed.choices]
    assert plain.usage.completion_tokens == listed.usage.completion_tokens
    assert "stop" in {choice.finish_reason for choice in plain.choices}


def test_a_completion_with_logprobs_lists_the_end_token(client, pair, peer):
    """As in vLLM. Evaluation tools rely on one entry for each generated token, also if the answer ends at once."""
    prompt = chat_prompt_token_ids(pair.tokenizer, problem_messages())
    answer = target_token_ids(peer, pair, problem_messages())
    end = pair.tokenizer.eos_token_id
    for length in (len(answer) - 3, len(answer)):  # the second completion ends at once
        context, rest = [*prompt, *answer[:length]], answer[length:]
        plain: Any = complete(client, context, max_tokens=10)
        listed: Any = complete(client, context, max_tokens=10, logprobs=1)
        for each in (plain, listed):
            assert each.choices[0].text == pair.tokenizer.decode(rest) and each.choices[0].finish_reason == "stop"
        assert plain.usage.completion_tokens == len(rest)
        assert listed.usage.completion_tokens == len(rest) + 1
        logits = logits_of(peer, [*context, *rest])[len(context) - 1 :]
        expected = logits.log_softmax(-1).gather(1, torch.tensor([*rest, end])[:, None])[:, 0]
        assert listed.choices[0].logprobs.token_logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    streamed = client.completions.create(
        model=MODEL, prompt=[*prompt, *answer], max_tokens=10, logprobs=1, temperature=0, stream=True
    )
    assert sum(len(c.logprobs.tokens) for chunk in streamed for c in chunk.choices if c.logprobs) == 1
