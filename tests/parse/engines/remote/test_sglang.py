"""The remote engine over a scripted SGLang: the same tests as with vLLM, and what is different."""

import asyncio
import logging
from dataclasses import replace

import pytest
from aiohttp import web

from parse.demo import DEMO_TARGET
from parse.errors import RequestError, ServerError
from parse.requests import GenerationRequest
from parse.types import SamplingParams
from tests.parse.engines.remote.fake_sglang import FakeSGLang
from tests.parse.engines.remote.test_remote_engine import (  # noqa: F401  # pytest collects them with the fixtures below
    GREEDY,
    PROMPTS,
    TOKENIZER,
    answer_of,
    generation,
    remote,
    run,
    test_a_broken_stream_continues_after_its_last_token,
    test_a_burst_of_errors_is_survived,
    test_a_draft_does_not_change_greedy_output,
    test_a_draft_does_not_change_the_distribution_of_sampled_output,
    test_a_draft_ends_at_a_stop_token,
    test_a_pair_answers_as_with_the_native_engine,
    test_a_server_without_chosen_tokens_never_overestimates_p_correct,
    test_a_stop_string_that_begins_in_the_given_output_is_found,
    test_deltas_have_the_requested_size,
    test_it_generates_what_the_native_engine_generates,
    test_log_probabilities_are_those_of_the_native_engine,
    test_log_probabilities_of_a_draft_are_those_of_the_native_engine,
    test_minimum_length_and_stop_tokens_are_those_of_the_native_engine,
    test_p_correct_is_that_of_the_native_engine,
    test_the_last_delta_says_why_it_ended,
    test_verify_and_generate_keeps_and_continues_like_the_native_engine,
    tokens_of,
    verification,
)


@pytest.fixture(scope="module")
def module_server():
    server = FakeSGLang(DEMO_TARGET)
    yield server
    server.close()


@pytest.fixture
def server(module_server):
    yield module_server
    module_server.misbehave = lambda body: None
    module_server.is_incremental = module_server.is_old = module_server.has_speculation = False
    module_server.truncates_at = None
    module_server.lacks = set()
    module_server.bodies.clear()


@pytest.mark.parametrize("is_incremental", [False, True])
def test_streams_of_all_tokens_and_of_new_tokens_are_read(server, native, is_incremental):
    server.is_incremental = is_incremental
    params = replace(GREEDY, logprobs=3, max_tokens=21)
    (deltas,) = run(remote(server), generation(sampling_params=params))
    assert tokens_of(deltas) == answer_of(native, sampling_params=params)
    assert len([logprob for delta in deltas for logprob in delta.logprobs]) == len(tokens_of(deltas))


def test_a_server_that_truncates_a_prompt_is_reported(server):
    engine = remote(server)
    server.truncates_at = 10
    with pytest.raises(ServerError, match="has read 10 of"):
        asyncio.run(engine.prefill(PROMPTS[0]))
    engine.shutdown()


@pytest.mark.parametrize(
    ("reason", "error", "message"),
    [
        ({"type": "abort", "message": "the input is too long", "status_code": 400}, RequestError, "input is too long"),
        ({"type": "stop", "matched": "NaN happened"}, ServerError, "no numbers"),
    ],
)
def test_errors_with_the_status_200_are_reported(server, reason, error, message):
    def change(results):
        return [{**result, "meta_info": {**result["meta_info"], "finish_reason": reason}} for result in results]

    engine = remote(server)
    server.misbehave = lambda body: change
    with pytest.raises(error, match=message):
        asyncio.run(engine.verify(verification([5] * 20)))
    engine.shutdown()


def test_a_call_that_the_server_aborts_is_repeated(server):
    aborted = {"finish_reason": {"type": "abort", "message": "evicted"}, "prompt_tokens": 1}
    engine, calls = remote(server), []

    def abort_the_first(body):
        if body.get("input_ids") != PROMPTS[0]:
            return None  # a check of the server
        calls.append(body)
        return (lambda results: [{"meta_info": aborted}]) if len(calls) == 1 else None

    server.misbehave = abort_the_first
    assert asyncio.run(engine.prefill(PROMPTS[0])) == 3 and len(calls) == 2
    engine.shutdown()


def test_stop_tokens_end_an_answer_although_the_end_token_is_ignored(server, native):
    expected = answer_of(native)
    stop_token = expected[12]
    params = replace(GREEDY, ignore_eos=True, stop_token_ids=(stop_token,), max_tokens=40)
    (deltas,) = run(remote(server), generation(sampling_params=params))
    assert tokens_of(deltas) == expected[: expected.index(stop_token)]
    assert deltas[-1].finish_reason == "stop"


def test_what_it_cannot_do_as_requested_is_rejected_by_name(server):
    engine = remote(server)
    request = GenerationRequest(prompt_token_ids=PROMPTS[0])
    with pytest.raises(RequestError, match="repetition_penalty"):
        engine.capabilities().check(replace(request, sampling_params=SamplingParams(repetition_penalty=1.2)))
    with pytest.raises(RequestError, match="divides them by the temperature"):
        run(engine, generation(sampling_params=SamplingParams(temperature=0.7, logprobs=2, seed=1)))


def test_it_is_reported_as_untested(server, caplog):
    with caplog.at_level(logging.WARNING):
        remote(server).shutdown()
    assert "no version of SGLang was tested" in caplog.text


def test_old_paths_are_used_if_the_new_ones_are_missing(server):
    server.is_old = True
    engine = remote(server)
    assert "rounds" in engine.capabilities().modes
    engine.shutdown()


def test_a_server_with_speculation_chooses_the_method_itself(server):
    server.has_speculation = True
    engine = remote(server)
    assert engine.capabilities().always_speculates
    assert engine.capabilities().sampling_params.isdisjoint({"min_p", "logit_bias"})
    engine.shutdown()


def test_another_tokenizer_is_named(server, monkeypatch):
    other = type("Other", (), {"encode": lambda self, text, **_: [1, 2, 3], "eos_token_id": 0})()
    monkeypatch.setattr(server, "tokenizer", other)
    with pytest.raises(ValueError, match="differs from the one of the settings"):
        remote(server)


def test_all_sampling_parameters_are_sent(server):
    """A server with preferred sampling parameters would fill in those that are missing."""
    run(remote(server), generation(sampling_params=SamplingParams(seed=3, max_tokens=2, logit_bias={7: -5.0})))
    (sent,) = (body["sampling_params"] for body in server.bodies if body.get("stream"))
    names = {"max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty"}
    names |= {"frequency_penalty", "repetition_penalty", "ignore_eos", "stop_token_ids", "sampling_seed", "logit_bias"}
    assert set(sent) == names | {"skip_special_tokens"} and sent["top_k"] == -1 and sent["logit_bias"] == {"7": -5.0}


def test_the_metrics_of_the_server_are_read(server):
    engine = remote(server)
    stats = asyncio.run(engine.read_stats())
    assert (stats.num_running, stats.num_waiting, stats.num_tokens, stats.prefix_hits) == (2, 1, 70, 60)
    engine.shutdown()


def test_a_key_is_sent(monkeypatch):
    server = FakeSGLang(DEMO_TARGET, api_key="secret")
    monkeypatch.setenv("SERVER_KEY", "wrong")
    try:
        with pytest.raises(ValueError, match="401"):
            remote(server, api_key_env="SERVER_KEY")
        monkeypatch.setenv("SERVER_KEY", "secret")
        server.misbehave = lambda body: web.json_response({"error": "Unauthorized"}, status=401)
        with pytest.raises(ValueError, match="401: Unauthorized"):
            remote(server, api_key_env="SERVER_KEY")
        server.misbehave = lambda body: None
        remote(server, api_key_env="SERVER_KEY").shutdown()
    finally:
        server.close()
