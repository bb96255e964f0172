"""The remote engine over a real, unmodified vLLM."""

import asyncio
import math
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench import vllm_server
from parse import EngineSettings, Pair
from parse.acceptance import AcceptancePolicy
from parse.config import VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.engine_config import RemoteEngineConfig
from parse.errors import ServerError
from parse.event_loop import EventLoopThread
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams
from training.measure import draw_problems

# The first test waits for the installation of vLLM.
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_PROBLEMS = 8
NUM_SAMPLES = 300
TIE = 1e-4  # nats between the two most likely tokens, below which either may be chosen


@pytest.fixture(scope="module")
def pair(vllm):
    if vllm.process.poll() is not None:  # another test has killed it
        vllm.restart()
    with Pair(target_settings(vllm), draft_settings()) as pair:
        yield pair


@pytest.fixture(scope="module")
def native_pair():
    with Pair(EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512), draft_settings()) as pair:
        yield pair


@pytest.fixture(scope="module", autouse=True)
def other_server(vllm, tmp_path_factory):
    """A server of a model with other weights. It starts while the first tests run."""
    other = shutil.copytree(DEMO_TARGET, tmp_path_factory.mktemp("other") / "demo-target")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layers.0.mlp.down_proj" in name)
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    server = vllm_server.start(replace(vllm.options, model=str(other)), wait=False)
    yield server
    server.kill()


def target_settings(server, **config):
    engine = RemoteEngineConfig(kind="remote", url=server.url, **config)
    return EngineSettings(model=DEMO_TARGET, engine=engine, max_model_len=512)


def draft_settings():
    return EngineSettings(model=DEMO_DRAFT, num_threads=1, max_model_len=512)


@contextmanager
def forwarding(port):
    """Yields an address whose connections are forwarded to a port, and a function that changes the port.

    The function also closes the connections that are open.
    """
    writers = []

    async def copy(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def connect(reader, writer):
        writers.append(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            writer.close()
            return
        writers.append(server_writer)
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer), return_exceptions=True)

    async def change_port(other_port):
        nonlocal port
        port = other_port
        while writers:
            writers.pop().close()

    def forward_to(other_port):
        event_loop.run(change_port(other_port))

    event_loop = EventLoopThread("forwarding")
    server = event_loop.run(asyncio.start_server(connect, "127.0.0.1", 0))
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", forward_to
    finally:
        server.close()
        event_loop.close()


async def answer_all(pair, mode, problems, **options):
    """Answers all problems at the same time."""
    calls = (pair.agenerate(problem.question, mode=mode, temperature=0, **options) for problem in problems)
    return await asyncio.gather(*calls)


def answers(pair, mode, problems, **options):
    return asyncio.run(answer_all(pair, mode, problems, **options))


def differs_only_after_a_tie(output, expected):
    """Returns whether two answers are equal up to a token at which the target has no clear preference."""
    for ours, theirs, logprob in zip(output.token_ids, expected.token_ids, expected.logprobs, strict=False):
        if ours != theirs:
            (_, first), (_, second) = logprob.top[:2]
            return first - second < TIE
    return len(output.token_ids) == len(expected.token_ids)


def test_what_it_finds_out_about_the_server(pair):
    capabilities = pair.target.capabilities()
    assert set(capabilities.modes) == {"full", "rounds", "progressive", "exact", "off"}
    assert (capabilities.max_model_len, capabilities.block_size) == (512, 32)
    assert pair.tokenizer.eos_token_id in capabilities.eos_token_ids


@pytest.mark.parametrize("mode", ["off", "exact", "full"])
def test_answers_are_those_of_the_native_engine(pair, native_pair, mode):
    problems = draw_problems(21, NUM_PROBLEMS)
    logprobs = dict(logprobs=2) if mode in ("off", "exact") else {}

    async def answer_with_both():
        return await asyncio.gather(*(answer_all(each, mode, problems, **logprobs) for each in (pair, native_pair)))

    outputs, expected = asyncio.run(answer_with_both())
    if mode in ("off", "exact"):
        assert all(map(differs_only_after_a_tie, outputs, expected))
    else:
        assert sum(ours.text == theirs.text for ours, theirs in zip(outputs, expected, strict=True)) >= NUM_PROBLEMS - 1


def test_servers_can_run_both_models(vllm, pair):
    """The target is its own draft model here, so it accepts all drafts."""
    with Pair(target_settings(vllm), target_settings(vllm)) as both:
        problems = draw_problems(27, 4)
        for output, expected in zip(answers(both, "full", problems), answers(pair, "off", problems), strict=True):
            assert output.text == expected.text
            assert output.usage.accepted_tokens == len(expected.token_ids)


def test_a_draft_in_mode_exact_changes_nothing(pair):
    """The prediction is the target's own answer, whole and with a changed token."""
    problems = draw_problems(22, 10)

    async def generate_from_predictions(problem, expected):
        changed = list(expected.token_ids)
        changed[len(changed) // 2] = changed[0]
        for prediction in (expected.text, pair.tokenizer.decode(changed)):
            output = await pair.agenerate(problem.question, mode="exact", temperature=0, prediction=prediction)
            assert differs_only_after_a_tie(output, expected)
            assert output.usage.accepted_tokens >= len(changed) // 2 - 1

    async def generate_all():
        await asyncio.gather(*map(generate_from_predictions, problems, expected_outputs))

    expected_outputs = answers(pair, "off", problems, logprobs=2)
    asyncio.run(generate_all())


def test_a_draft_in_mode_exact_does_not_change_the_distribution(pair):
    """The first two tokens after a draft, compared with the probabilities of the model in transformers."""
    network = AutoModelForCausalLM.from_pretrained(DEMO_TARGET).eval()

    @torch.inference_mode()
    def probabilities(tokens):
        return network(torch.tensor([tokens])).logits[0, -1].softmax(-1)

    # The model has learned nothing about such a message, so several tokens are about equally likely.
    prompt = chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": "Hello."}])
    first = probabilities(prompt)
    # The draft begins with the second most likely token, which is accepted about every third time.
    draft = [int(first.topk(2).indices[1])]
    draft.append(int(probabilities([*prompt, *draft]).argmax()))
    expected = {
        (token, other): float(first[token]) * p
        for token in first.topk(5).indices.tolist()
        for other, p in enumerate(probabilities([*prompt, token]).tolist())
    }
    params = SamplingParams(temperature=1.0, max_tokens=3)
    requests = [
        GenerateRequest(prompt_token_ids=prompt, draft_token_ids=draft, sampling_params=replace(params, seed=seed))
        for seed in range(NUM_SAMPLES)
    ]

    # On CPUs, vLLM 0.32 ends if a request with a seed is prefilled in several steps, as it is among many others.
    slots = asyncio.Semaphore(16)

    async def sample(request):
        async with slots:
            return [token async for delta in pair.target.generate(request) for token in delta.token_ids]

    async def sample_all():
        return await asyncio.gather(*map(sample, requests))

    counts = Counter(tuple(tokens[:2]) for tokens in pair._event_loop.run(sample_all()))
    compared = {tokens: p for tokens, p in expected.items() if p * NUM_SAMPLES >= 5}
    assert len(compared) >= 5 and tuple(draft) in compared
    for tokens, p in compared.items():
        assert abs(counts[tokens] - NUM_SAMPLES * p) < 4 * math.sqrt(NUM_SAMPLES * p * (1 - p)) + 1


def test_the_same_prefix_is_accepted_as_with_the_native_engine(pair, native_pair):
    verification = VerificationSettings.for_model(DEMO_TARGET)
    suffix = build_verification_suffix(
        pair.tokenizer, verification.prompt, verification.correct, verification.incorrect
    )

    def with_an_error(output):
        draft = list(output.token_ids)
        draft[-8] = draft[0]
        return VerifyRequest(
            prompt_token_ids=output.prompt_token_ids,
            draft_token_ids=draft,
            prefix_lengths=[*range(8, len(draft), 8), len(draft)],
            draft_complete=True,
            suffix=suffix,
            policy=AcceptancePolicy(verification.thresholds()),
        )

    requests = map(with_an_error, answers(native_pair, "off", draw_problems(23, NUM_PROBLEMS)))

    async def verify_all():
        calls = (engine.verify(request) for request in requests for engine in (pair.target, native_pair.target))
        return await asyncio.gather(*calls)

    results = pair._event_loop.run(verify_all())
    for ours, theirs in zip(results[::2], results[1::2], strict=True):
        compared = [
            (one, two) for one, two in zip(ours.p_correct, theirs.p_correct, strict=True) if None not in (one, two)
        ]
        assert compared and all(abs(one - two) < 1e-2 for one, two in compared)


def test_concurrent_answers_are_those_of_single_requests(pair):
    problems = draw_problems(24, 8)
    expected = [pair.generate(problem.question, mode="full", temperature=0).text for problem in problems]
    outputs = answers(pair, "full", problems)
    assert sum(output.text == text for output, text in zip(outputs, expected, strict=True)) >= 7


def test_another_model_at_the_same_address_is_rejected(vllm, other_server):
    """A call is lost, because no server is there. When one responds again, it has another model."""

    async def call_meanwhile(pair, forward_to):
        await asyncio.to_thread(other_server.wait_until_ready)
        await asyncio.to_thread(forward_to, vllm_server.free_port())
        call = asyncio.create_task(pair.agenerate("What is 1 plus 1?", mode="off", temperature=0))
        await asyncio.sleep(0.5)
        assert not call.done()
        await asyncio.to_thread(forward_to, other_server.port)
        with pytest.raises(ServerError, match=r"instead of|other weights"):
            await call

    with forwarding(vllm.port) as (url, forward_to):
        engine = RemoteEngineConfig(kind="remote", url=url)
        with Pair(EngineSettings(model=DEMO_TARGET, engine=engine, max_model_len=512), draft_settings()) as pair:
            assert pair.generate("What is 1 plus 1?", mode="off", temperature=0).text
            asyncio.run(call_meanwhile(pair, forward_to))


def test_requests_survive_a_killed_server(vllm):
    problems = draw_problems(25, 8)

    async def load(pair):
        calls = [
            asyncio.create_task(pair.agenerate(problem.question, mode=mode, temperature=0))
            for problem, mode in zip(problems, ["off", "full", "rounds", "progressive"] * 2, strict=True)
        ]
        await asyncio.sleep(0.5)
        vllm.kill()
        await asyncio.to_thread(vllm.restart)
        return await asyncio.gather(*calls)

    with Pair(target_settings(vllm), draft_settings()) as pair:
        outputs = asyncio.run(load(pair))
    assert all(output.finish_reason == "stop" for output in outputs)
