"""The remote engine over a scripted server: it agrees with the native engine, and it survives a server that fails."""

import asyncio
import math
import ssl
import subprocess
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest
from aiohttp import web
from transformers import AutoTokenizer

from parse import EngineSettings, Pair
from parse.acceptance import AcceptancePolicy
from parse.config import VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.engine_config import RemoteEngineConfig
from parse.engines.loader import load_engine
from parse.engines.remote import server_pool
from parse.engines.remote.errors import ServerUnavailable
from parse.engines.remote.vllm import VLLM
from parse.errors import EngineStopped, ModelLoadError, RequestError, ServerError
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, GenerationRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import SamplingParams, TokenDelta
from tests.parse.engines.remote.fake_vllm import FakeVLLM
from training.measure import draw_problems

GREEDY = SamplingParams(temperature=0.0)
TOKENIZER = AutoTokenizer.from_pretrained(DEMO_TARGET)
VERIFICATION = VerificationSettings.for_model(DEMO_TARGET)
SUFFIX = build_verification_suffix(TOKENIZER, VERIFICATION.prompt, VERIFICATION.correct, VERIFICATION.incorrect)
PROMPTS = [
    chat_prompt_token_ids(TOKENIZER, [{"role": "user", "content": problem.question}]) for problem in draw_problems(5, 3)
]


@pytest.fixture(scope="module")
def module_server():
    server = FakeVLLM(DEMO_TARGET)
    yield server
    server.close()


@pytest.fixture
def server(module_server):
    yield module_server
    module_server.misbehave = lambda body: None
    module_server.lacks, module_server.version = set(), "0.32.0"
    module_server.bodies.clear()
    module_server.calls.clear()


def remote(*servers, **config):
    urls = tuple(server.url for server in servers)
    return load_engine(EngineSettings(model=DEMO_TARGET, engine=RemoteEngineConfig(kind="remote", url=urls, **config)))


async def collect(deltas):
    async with aclosing(deltas):
        return [delta async for delta in deltas]


def tokens_of(deltas):
    return [token for delta in deltas if isinstance(delta, TokenDelta) for token in delta.token_ids]


def run(engine, *requests):
    """Returns the deltas of each request. They run at the same time."""

    async def all_of_them():
        return await asyncio.gather(*(collect(engine.generate(request)) for request in requests))

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.shutdown()


def generation(prompt=PROMPTS[0], **changes):
    return GenerateRequest(**dict(prompt_token_ids=prompt, sampling_params=replace(GREEDY, max_tokens=30)) | changes)


def verification(draft, **changes):
    fields = dict(
        prompt_token_ids=PROMPTS[0],
        draft_token_ids=draft,
        prefix_lengths=[*range(8, len(draft), 8), len(draft)],
        draft_complete=True,
        suffix=SUFFIX,
        policy=AcceptancePolicy(VERIFICATION.thresholds()),
    )
    return VerifyRequest(**fields | changes)


def answer_of(native, prompt=PROMPTS[0], sampling_params=GREEDY):
    request = GenerateRequest(prompt_token_ids=prompt, sampling_params=sampling_params)
    return tokens_of(asyncio.run(collect(native.generate(request))))


# What it answers


def test_it_generates_what_the_native_engine_generates(server, native):
    requests = [generation(prompt) for prompt in PROMPTS]
    assert [tokens_of(deltas) for deltas in run(remote(server), *requests)] == [
        tokens_of(asyncio.run(collect(native.generate(request)))) for request in requests
    ]


@pytest.mark.parametrize("include", [False, True])
def test_minimum_length_and_stop_tokens_are_those_of_the_native_engine(server, native, include):
    answer = answer_of(native)
    longer = replace(GREEDY, min_tokens=len(answer) + 5, max_tokens=len(answer) + 9)
    stopped = replace(GREEDY, stop_token_ids=(answer[12],), include_stop_str_in_output=include)
    requests = [
        generation(sampling_params=longer),
        generation(sampling_params=longer, output_token_ids=answer[:7]),
        generation(sampling_params=stopped),
        generation(sampling_params=replace(stopped, min_tokens=answer.index(answer[12]) + 1)),
        generation(sampling_params=replace(GREEDY, include_eos_token=include)),
        generation(sampling_params=replace(GREEDY, include_eos_token=include), output_token_ids=answer),
        generation(sampling_params=replace(stopped, include_eos_token=True)),
    ]
    assert len(answer_of(native, sampling_params=replace(GREEDY, include_eos_token=include))) == len(answer) + include
    for request, deltas in zip(requests, run(remote(server), *requests), strict=True):
        expected = asyncio.run(collect(native.generate(request)))
        assert tokens_of(deltas) == tokens_of(expected)
        assert deltas[-1].finish_reason == expected[-1].finish_reason


def test_the_last_delta_says_why_it_ended(server, native):
    answer = answer_of(native)
    params = replace(GREEDY, max_tokens=len(answer) + 1)
    complete, limited = run(remote(server), generation(sampling_params=params), generation())
    assert complete[-1].finish_reason == "stop" and tokens_of(complete) == answer  # without the end token
    assert limited[-1].finish_reason == "length" and len(tokens_of(limited)) == 30


def test_deltas_have_the_requested_size(server):
    (deltas,) = run(remote(server), generation(stream_interval=8))
    assert [len(delta.token_ids) for delta in deltas] == [8, 8, 8, 6]


def test_log_probabilities_are_those_of_the_native_engine(server, native):
    request = generation(sampling_params=replace(GREEDY, max_tokens=10, logprobs=3))
    (deltas,) = run(remote(server), request)
    expected = asyncio.run(collect(native.generate(request)))
    ours, theirs = ([logprob for delta in each for logprob in delta.logprobs] for each in (deltas, expected))
    assert [logprob.logprob for logprob in ours] == pytest.approx([logprob.logprob for logprob in theirs], abs=1e-3)
    assert [[token for token, _ in logprob.top] for logprob in ours] == [
        [token for token, _ in logprob.top] for logprob in theirs
    ]


def test_a_stop_string_that_begins_in_the_given_output_is_found(server, native):
    answer = answer_of(native)
    stop = str(TOKENIZER.decode(answer[9:12]))
    request = generation(output_token_ids=answer[:10], sampling_params=replace(GREEDY, stop=[stop]))
    (deltas,) = run(remote(server), request)
    assert deltas[-1].finish_reason == "stop" and tokens_of(deltas) == answer[10:12]


@pytest.mark.parametrize("policy", [None, AcceptancePolicy(VERIFICATION.thresholds())])
def test_p_correct_is_that_of_the_native_engine(server, native, policy):
    answer = answer_of(native)
    wrong = [*answer[:20], answer[20] + 1, *answer[21:]]
    engine = remote(server)

    async def all_of_them():
        return [await engine.verify(verification(draft, policy=policy)) for draft in (answer, wrong)]

    for result, draft in zip(asyncio.run(all_of_them()), (answer, wrong), strict=True):
        expected = asyncio.run(native.verify(verification(draft, policy=policy)))
        evaluated = [index for index, p in enumerate(result.p_correct) if p is not None]
        assert evaluated and (policy is not None or len(evaluated) == len(result.p_correct))
        for index in evaluated:
            if expected.p_correct[index] is not None:
                assert result.p_correct[index] == pytest.approx(expected.p_correct[index], abs=1e-3)
                assert result.answer_mass[index] == pytest.approx(expected.answer_mass[index], abs=1e-3)
    engine.shutdown()


def test_a_server_without_chosen_tokens_never_overestimates_p_correct(server, native):
    server.lacks = {"logprob_token_ids"}
    engine = remote(server)
    draft = answer_of(native)
    request = verification(draft, policy=None)
    result, expected = asyncio.run(engine.verify(request)), asyncio.run(native.verify(request))
    engine.shutdown()
    assert all(ours <= theirs + 1e-3 for ours, theirs in zip(result.p_correct, expected.p_correct, strict=True))
    assert result.p_correct[-1] > 0.97


def test_log_probabilities_of_a_draft_are_those_of_the_native_engine(server, native):
    draft = answer_of(native)[:20]
    request = verification(draft, prefix_lengths=(), draft_complete=False, num_logprobs=2)
    engine = remote(server)
    result, expected = asyncio.run(engine.verify(request)), asyncio.run(native.verify(request))
    engine.shutdown()
    assert [each.logprob for each in result.logprobs] == pytest.approx(
        [each.logprob for each in expected.logprobs], abs=1e-3
    )
    assert [[token for token, _ in each.top] for each in result.logprobs] == [
        [token for token, _ in each.top] for each in expected.logprobs
    ]


@pytest.mark.parametrize("wrong_at", [None, 20])
def test_verify_and_generate_keeps_and_continues_like_the_native_engine(server, native, wrong_at):
    draft = answer_of(native)
    if wrong_at is not None:
        draft[wrong_at] += 1
    request = VerifyAndGenerateRequest(verify=verification(draft), sampling_params=replace(GREEDY, max_tokens=60))
    engine = remote(server)
    result, *deltas = asyncio.run(collect(engine.verify_and_generate(request)))
    expected, *expected_deltas = asyncio.run(collect(native.verify_and_generate(request)))
    engine.shutdown()
    assert request.accepted_prefix_length(result) == request.accepted_prefix_length(expected)
    assert tokens_of(deltas) == tokens_of(expected_deltas)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 13])
def test_a_draft_ends_at_a_stop_token(server, native, include, max_tokens):
    answer = answer_of(native)
    params = replace(
        GREEDY, stop_token_ids=(answer[12],), include_stop_str_in_output=include, max_tokens=max_tokens, min_tokens=10
    )
    request = generation(draft_token_ids=answer, sampling_params=params)
    (deltas,) = run(remote(server), request)
    expected = asyncio.run(collect(native.generate(request)))
    assert tokens_of(deltas) == tokens_of(expected)
    assert deltas[-1].finish_reason == expected[-1].finish_reason


@pytest.mark.parametrize("wrong_at", [None, 0, 11])
def test_a_draft_does_not_change_greedy_output(server, native, wrong_at):
    answer = answer_of(native)
    draft = list(answer)
    if wrong_at is not None:
        draft[wrong_at] += 1
    (deltas,) = run(remote(server), generation(draft_token_ids=draft, sampling_params=GREEDY))
    assert tokens_of(deltas) == answer and deltas[-1].finish_reason == "stop"
    assert sum(delta.num_accepted for delta in deltas) == (len(draft) if wrong_at is None else wrong_at)


@pytest.mark.slow
def test_a_draft_does_not_change_the_distribution_of_sampled_output(server, native):
    """The first token after a draft, compared with the probabilities of the model itself."""
    import torch

    # The model has learned nothing about such a message, so several tokens are about equally likely.
    prompt = chat_prompt_token_ids(TOKENIZER, [{"role": "user", "content": "Hello."}])
    probabilities = server.network(torch.tensor([prompt])).logits[0, -1].detach().softmax(-1)
    draft = [int(probabilities.topk(2).indices[1])]  # it is accepted about every third time
    num_samples = 400
    params = SamplingParams(temperature=1.0, max_tokens=2)
    requests = [
        GenerateRequest(prompt_token_ids=prompt, draft_token_ids=draft, sampling_params=replace(params, seed=seed))
        for seed in range(num_samples)
    ]
    counts = Counter((tokens_of(deltas) or [-1])[0] for deltas in run(remote(server), *requests))
    compared = {token: p for token, p in enumerate(probabilities.tolist()) if p * num_samples >= 5}
    assert len(compared) >= 5
    for token, p in compared.items():
        assert abs(counts[token] - num_samples * p) < 4 * math.sqrt(num_samples * p * (1 - p)) + 1


def test_two_draft_tokens_in_a_row_do_not_share_their_random_number():
    """Otherwise, the second one would be accepted too often."""
    from parse.engines.remote.dialect import PromptLogprob
    from parse.engines.remote.engine import _accepts
    from parse.types import Logprob

    entry, params = PromptLogprob(Logprob(math.log(0.5)), is_argmax=False), SamplingParams(temperature=1.0)
    pairs = Counter(
        (_accepts(entry, replace(params, seed=seed), 0), _accepts(entry, replace(params, seed=seed), 1))
        for seed in range(2000)
    )
    assert all(400 < pairs[pair] < 600 for pair in [(a, b) for a in (True, False) for b in (True, False)])


# What a server lacks


@pytest.mark.parametrize(
    ("version", "is_tested"),
    [("0.26.1", False), ("0.27.0", True), ("0.32.4+cpu", True), ("0.33.0", False), ("1.0.0", False), ("dev", False)],
)
def test_versions_that_were_not_tested_are_named_in_the_log(server, caplog, version, is_tested):
    server.version = version
    remote(server).shutdown()
    assert (f"vLLM {version} was not tested; tested: 0.27 to 0.32" not in caplog.text) == is_tested


def test_all_sampling_parameters_are_sent(server):
    """Otherwise, the server would fill them in from the generation config of the model."""
    run(remote(server), generation())
    (body,) = (body for body in server.bodies if body.get("stream"))
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"} <= set(body)


def test_modes_that_the_server_does_not_support_are_not_offered(server):
    server.misbehave = lambda body: (
        web.json_response({"error": {"message": "no logprobs here"}}, status=400)
        if (body.get("logprob_token_ids") or body.get("logprobs") == 20 or body.get("prompt_logprobs") is not None)
        else None
    )
    engine = remote(server)
    assert engine.capabilities().modes == ("off",)
    engine.shutdown()


def test_parameters_that_a_server_with_speculation_ignores_are_rejected(server):
    server.has_speculation = True
    try:
        capabilities = remote(server).capabilities()
    finally:
        server.has_speculation = False
    for params in ({"min_p": 0.1}, {"logit_bias": {3: 1.0}}):
        with pytest.raises(RequestError, match="is not supported by this engine"):
            capabilities.check(GenerationRequest(PROMPTS[0], sampling_params=SamplingParams(**params)))
    assert capabilities.draft_obstacle("exact", SamplingParams(temperature=1.0)) is not None
    assert capabilities.draft_obstacle("exact", GREEDY) is None
    for method in ("none", "ngram"):
        with pytest.raises(RequestError, match="speculation: the server of the target chooses the method itself"):
            capabilities.check(GenerationRequest(PROMPTS[0], speculative_method=method))
    assert capabilities.default_method is None and capabilities.method_choices == ()
    assert capabilities.prefill_interval is None and remote(server).capabilities().prefill_interval == 128


def test_a_connection_that_breaks_during_the_checks_is_opened_again(server):
    """vLLM closes the connection after an internal error, and the next call on it is lost."""
    failures = iter([True])

    def misbehave(body):
        if "prompt_logprobs" in body and next(failures, False):
            return asyncio.sleep(0, "cut")
        return None

    server.misbehave = misbehave
    assert "exact" in remote(server).capabilities().modes


def test_limits_are_those_of_the_server(server):
    engine = remote(server)
    assert engine.capabilities().max_model_len == server.max_model_len
    assert engine.capabilities().block_size == 16
    with pytest.raises(RequestError, match="prompt"):
        run(engine, generation(range(600)))


@pytest.mark.parametrize(
    ("params", "mode", "possible"),
    [
        (dict(temperature=0), "exact", True),
        (dict(temperature=1), "exact", True),
        (dict(temperature=0.7), "exact", False),
        (dict(temperature=1, top_p=0.9), "exact", False),
        (dict(temperature=0, logit_bias={3: 1.0}), "exact", False),
        (dict(temperature=0.7, top_p=0.9), "full", True),
        (dict(temperature=0, frequency_penalty=0.5), "full", False),
    ],
)
def test_drafts_that_would_change_the_distribution_are_not_used(server, params, mode, possible):
    engine = remote(server)
    assert (engine.capabilities().draft_obstacle(mode, SamplingParams(**params)) is None) == possible
    engine.shutdown()


# Start-up


def load_error(url, **config):
    with pytest.raises(ModelLoadError) as error:
        Pair(EngineSettings(model=DEMO_TARGET, engine=RemoteEngineConfig(kind="remote", url=url, **config)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_wrong_with_a_server_is_named_at_start_up(server, monkeypatch):
    assert "http://127.0.0.1:9: " in load_error("http://127.0.0.1:9", connect_timeout_s=0.5)
    assert "the server does not serve 'other'" in load_error(server.url, model_name="other")
    assert "environment variable NO_SUCH_KEY is not set" in load_error(server.url, api_key_env="NO_SUCH_KEY")
    assert "404" in load_error(server.url + "/nothing")
    assert "https" not in server.url and load_error(server.url.replace("http:", "https:"))


def test_a_wrong_key_is_named():
    server = FakeVLLM(DEMO_DRAFT, api_key="secret")
    try:
        assert "401: Unauthorized" in load_error(server.url)
    finally:
        server.close()


def test_a_right_key_is_sent(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    server = FakeVLLM(DEMO_TARGET, api_key="secret")
    try:
        assert tokens_of(run(remote(server, api_key_env="SERVER_KEY"), generation())[0])
    finally:
        server.close()


@pytest.fixture
def tls(tmp_path):
    """The paths of a self-signed certificate for this machine and of its key."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=model server", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def test_a_certificate_is_checked(tls, tmp_path):
    certificate, key = tls
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = FakeVLLM(DEMO_TARGET, tls=context)
    try:
        assert tokens_of(run(remote(server, tls_ca_file=str(certificate)), generation())[0])
        assert "CERTIFICATE_VERIFY_FAILED" in load_error(server.url)
        assert "127.0.0.1" in load_error(server.url.replace("https:", "http:"))
    finally:
        server.close()
    missing, wrong = tmp_path / "missing.pem", tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for path in (missing, wrong):
        assert f"engine.tls_ca_file: {path}: " in load_error("https://127.0.0.1:9", tls_ca_file=str(path))


def test_another_tokenizer_is_named(server, monkeypatch):
    tokenizer = server.tokenizer
    server.tokenizer = type("Other", (), {"encode": lambda self, text, **_: [1, 2, 3], "eos_token_id": 0})()
    try:
        assert "the tokenizer of" in load_error(server.url)
    finally:
        server.tokenizer = tokenizer


# Failures


def test_a_broken_stream_continues_after_its_last_token(server, native):
    expected = tokens_of(run(remote(server), generation())[0])
    lengths = iter([5, 3, 0])
    server.misbehave = lambda body: next(lengths, None) if body.get("stream") else None
    engine = remote(server)
    (deltas,) = run(engine, generation())
    assert tokens_of(deltas) == expected and next(lengths, "used") == "used"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_burst_of_errors_is_survived(server, status):
    expected = tokens_of(run(remote(server), generation())[0])
    engine = remote(server)
    failures = iter(range(2))
    server.misbehave = lambda body: (
        web.json_response({"error": {"message": "busy"}}, status=status, headers={"Retry-After": "0"})
        if next(failures, None) is not None
        else None
    )
    assert tokens_of(run(engine, generation())[0]) == expected


def test_an_error_that_does_not_end_is_reported_with_the_words_of_the_server(server):
    engine = remote(server)
    server.misbehave = lambda body: web.json_response({"error": {"message": "out of order"}}, status=500)
    with pytest.raises(ServerError, match="out of order"):
        run(engine, generation())


def test_a_rejected_request_is_not_repeated(server):
    engine = remote(server)
    before = server.calls["completions"]
    server.misbehave = lambda body: (
        web.json_response({"error": {"message": "too long"}}, status=400) if body.get("stream") else None
    )
    with pytest.raises(RequestError, match="too long"):
        run(engine, generation())
    assert sum(bool(body.get("stream")) for body in server.bodies) == 1 and before


def test_choices_in_another_order_are_sorted(server, native):
    draft = answer_of(native)
    engine = remote(server)
    expected = asyncio.run(native.verify(verification(draft, policy=None)))
    server.misbehave = lambda body: "reversed"
    result = asyncio.run(engine.verify(verification(draft, policy=None)))
    engine.shutdown()
    assert result.p_correct == pytest.approx(expected.p_correct, abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda choices: choices[:-1],
        lambda choices: [choices[0], *choices[:-1]],
        lambda choices: [{**choice, "logprobs": None} for choice in choices],
        lambda choices: [{**choice, "index": "0"} for choice in choices],
        lambda choices: [{**choice, "logprobs": {"top_logprobs": [{"Correct": -0.1}]}} for choice in choices],
        lambda choices: [{**choice, "logprobs": {"top_logprobs": [{"token_id:5": 7.0}]}} for choice in choices],
        lambda choices: "nothing",
    ],
)
def test_an_unreadable_verification_accepts_nothing(server, native, change):
    draft = answer_of(native)
    engine = remote(server)
    server.misbehave = lambda body: change if isinstance(body["prompt"][0], list) and len(body["prompt"]) > 1 else None
    with pytest.raises(ServerError, match="not as expected"):
        asyncio.run(engine.verify(verification(draft, policy=None)))
    engine.shutdown()


def test_a_stalled_call_is_repeated(server):
    expected = tokens_of(run(remote(server), generation())[0])
    stalls = iter(range(1))

    def misbehave(body):
        return asyncio.sleep(3600) if body.get("stream") and next(stalls, None) is not None else None

    engine = remote(server, stall_timeout_s=1.0)
    server.misbehave = misbehave
    assert tokens_of(run(engine, generation())[0]) == expected


def test_a_closed_generator_ends_the_call_on_the_server(server):
    engine = remote(server)
    before = server.num_aborted

    async def leave():
        deltas = engine.generate(generation(sampling_params=replace(GREEDY, max_tokens=300, ignore_eos=True)))
        await anext(deltas)
        await deltas.aclose()
        for _ in range(100):
            if server.num_aborted > before:
                return
            await asyncio.sleep(0.05)

    asyncio.run(leave())
    engine.shutdown()
    assert server.num_aborted > before


def test_requests_wait_for_a_server_that_restarts(native):
    server = FakeVLLM(DEMO_TARGET)
    engine = remote(server)
    requests = [generation(prompt) for prompt in PROMPTS]
    expected = [tokens_of(asyncio.run(collect(native.generate(request)))) for request in requests]

    async def restart():
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(server.start)

    async def both():
        answers, _ = await asyncio.gather(
            asyncio.gather(*(collect(engine.generate(request)) for request in requests)), restart()
        )
        return answers

    try:
        assert [tokens_of(deltas) for deltas in asyncio.run(both())] == expected
    finally:
        engine.shutdown()
        server.close()


@pytest.mark.parametrize("change", ["name", "max_model_len", "weights"])
def test_a_server_that_returns_with_another_model_is_rejected(change, monkeypatch):
    import torch

    monkeypatch.setattr(server_pool, "RECHECK_AFTER_S", 0.0)  # a real server takes longer to restart
    server = FakeVLLM(DEMO_TARGET)
    engine = remote(server, retry_timeout_s=20)

    async def use():
        await collect(engine.generate(generation()))
        await asyncio.to_thread(server.stop)
        if change == "name":
            server.name = "other"
        elif change == "max_model_len":
            server.max_model_len = 100
        else:
            with torch.no_grad():
                server.network.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        await asyncio.to_thread(server.start)
        await collect(engine.generate(generation()))

    try:
        with pytest.raises(ServerError, match=r"does not serve|with a context of|other weights"):
            asyncio.run(use())
    finally:
        engine.shutdown()
        server.close()


def test_a_server_may_be_down_for_any_time(monkeypatch):
    monkeypatch.setattr(server_pool, "RECHECK_AFTER_S", 0.0)
    server = FakeVLLM(DEMO_TARGET)
    engine = remote(server)
    (member,) = engine._pool.members
    for _ in range(5000):
        member.record_failure(ServerUnavailable("refused"))
    member._open_until = 0.0
    try:
        asyncio.run(engine.check_available())
        assert member.failure is None
    finally:
        engine.shutdown()
        server.close()


def test_sessions_stay_on_their_server_and_move_if_it_is_lost():
    servers = [FakeVLLM(DEMO_TARGET) for _ in range(2)]
    engine = remote(*servers)
    keys = [f"conversation {number}" for number in range(8)]

    async def find_server(key):
        before = [len(server.bodies) for server in servers]
        params = replace(GREEDY, max_tokens=2)
        await collect(engine.generate(generation(sampling_params=params, session_key=key)))
        return [len(server.bodies) > count for server, count in zip(servers, before, strict=True)].index(True)

    async def all_of_them():
        first = [await find_server(key) for key in keys]
        again = [await find_server(key) for key in keys]
        await asyncio.to_thread(servers[0].stop)
        moved = [await find_server(key) for key in keys]
        return first, again, moved

    try:
        first, again, moved = asyncio.run(all_of_them())
        assert first == again and set(first) == {0, 1}
        assert set(moved) == {1}
    finally:
        engine.shutdown()
        for server in servers:
            server.close()


def test_it_is_unavailable_while_no_server_can_be_used(monkeypatch):
    monkeypatch.setattr(server_pool, "RECHECK_AFTER_S", 0.0)
    servers = [FakeVLLM(DEMO_TARGET) for _ in range(2)]
    engine = remote(*servers)

    async def states():
        await engine.check_available()
        yield await engine.read_stats()
        await asyncio.to_thread(servers[0].stop)
        await engine.check_available()
        yield await engine.read_stats()
        await asyncio.to_thread(servers[1].stop)
        with pytest.raises(
            EngineStopped, match=f"no server .* {servers[0].url}: .*; {servers[1].url}: .*Connect call failed"
        ):
            await engine.check_available()
        yield await engine.read_stats()
        servers[0].name = "other"
        await asyncio.to_thread(servers[0].start)
        await asyncio.sleep(0.3)  # the circuit breaker
        with pytest.raises(EngineStopped, match=f"{servers[0].url}: the server does not serve 'served'"):
            await engine.check_available()
        yield await engine.read_stats()
        await asyncio.to_thread(servers[1].start)
        await engine.check_available()
        yield await engine.read_stats()

    async def collect_states():
        return [state async for state in states()]

    try:
        collected = asyncio.run(collect_states())
    finally:
        engine.shutdown()
        for server in servers:
            server.close()
    assert [stats.servers_failing for stats in collected] == [0, 1, 2, 2, 1]
    assert [stats.servers_responding for stats in collected] == [2, 1, 0, 0, 1]
    assert [stats.num_running for stats in collected] == [4, 2, 0, 2, 4]  # gauges of lost servers count as zero
    assert {stats.num_steps for stats in collected} == {14}  # counters do not fall and rise again


def test_the_speculation_of_the_server_is_counted(server):
    server.has_speculation = True
    try:
        stats = asyncio.run(remote(server).read_stats())
    finally:
        server.has_speculation = False
    assert (stats.num_proposed_tokens, stats.num_accepted_tokens) == (30, 12)


def test_the_cache_usage_of_each_server_counts_with_its_own_size():
    def metrics_text(num_blocks: int, *usages: float) -> str:
        """Returns the metrics of a server with several engines. It reports the blocks of all of them for each one."""
        lines = []
        for k, usage in enumerate(usages):
            lines.append(f'vllm:cache_config_info{{engine="{k}",num_gpu_blocks="{num_blocks}"}} 1.0')
            lines.append(f'vllm:kv_cache_usage_perc{{engine="{k}",model_name="m"}} {usage}')
        return "\n".join(lines)

    stats = VLLM().read_stats([metrics_text(100, 0.5), metrics_text(1000, 0.1, 0.3)])
    assert (stats.blocks_used, stats.blocks_total) == (50 + 200, 1100)


# The whole pipeline


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "rounds", "progressive", "exact", "off"])
def test_a_pair_answers_as_with_the_native_engine(server, mode):
    native_target = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512)
    draft = EngineSettings(model=DEMO_DRAFT, num_threads=1)
    remote_target = EngineSettings(model=DEMO_TARGET, engine=RemoteEngineConfig(kind="remote", url=server.url))
    messages = [problem.question for problem in draw_problems(8, 4)]
    texts = []
    for target in (native_target, remote_target):
        with Pair(target, draft) as pair:
            texts.append([pair.generate(message, mode=mode, temperature=0).text for message in messages])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_server_drafts_with_another_tokenizer(foreign_draft):
    target = EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512)
    foreign_server = FakeVLLM(str(foreign_draft))
    drafts = (
        EngineSettings(model=DEMO_DRAFT, num_threads=1),
        EngineSettings(model=str(foreign_draft), engine=RemoteEngineConfig(kind="remote", url=foreign_server.url)),
    )
    answers = []
    try:
        for draft in drafts:
            with Pair(target, draft) as pair:
                outputs = [
                    pair.generate(problem.question, mode="full", temperature=0) for problem in draw_problems(9, 3)
                ]
                answers.append([(output.text, output.usage.accepted_tokens) for output in outputs])
    finally:
        foreign_server.close()
    (texts, accepted), (foreign_texts, foreign_accepted) = (zip(*answer, strict=True) for answer in answers)
    assert texts == foreign_texts
    assert sum(foreign_accepted) >= 0.8 * sum(accepted) > 0
