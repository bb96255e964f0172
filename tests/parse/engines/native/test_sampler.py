import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parse.engines.native.sampler import Sampler, sample, token_logprobs, uniform_noise
from parse.errors import RequestError
from parse.types import SamplingParams
from tests.parse.engines.native.chance import surprising

VOCAB_SIZE = 12


def probabilities(logits, params, prompt, output):
    """The probabilities by the definitions, one token after another in double precision."""
    s, scores = params, [float(score) for score in logits]
    for token in {*prompt, *output}:
        scores[token] = (
            scores[token] / s.repetition_penalty if scores[token] > 0 else scores[token] * s.repetition_penalty
        )
    for token in set(output):
        scores[token] -= s.presence_penalty + s.frequency_penalty * list(output).count(token)
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if s.temperature == 0:
        return [float(token == scores.index(max(scores))) for token in range(len(scores))]
    weights = [math.exp((score - max(scores)) / s.temperature) for score in scores]
    if s.top_k:
        lowest_kept = sorted(weights, reverse=True)[min(s.top_k, len(weights)) - 1]
        weights = [weight if weight >= lowest_kept else 0.0 for weight in weights]
    shares = [weight / sum(weights) for weight in weights]
    kept, total = [0.0] * len(shares), 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if total < s.top_p:
            kept[token] = shares[token]
        total += shares[token]
    kept = [share if share >= s.min_p * max(kept) else 0.0 for share in kept]
    return [share / sum(kept) for share in kept]


all_sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 11, 12, 40]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.3, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 7: -100.0}, {0: 100.0}]),
    seed=st.integers(-(2**63), 2**64),
)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6)


def next_token(sampler, logits):
    [token] = sample(logits[None], sampler.states())
    return token


@given(all_sampling_params, tokens, tokens, st.integers(0, 10**6))
def test_tokens_are_sampled_by_the_definitions(params, prompt, output, seed):
    sampler = Sampler(params, prompt, output[:2])
    for token in output[2:]:
        sampler.append(token)
    for logits in 2 * torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)):
        before = logits.clone()
        token = next_token(sampler, logits)
        assert torch.equal(logits, before)
        cumulative = np.cumsum(probabilities(logits, params, prompt, output))
        noise = uniform_noise(params.seed, len(output))
        if abs(cumulative - noise).min() > 1e-6:
            assert token == np.searchsorted(cumulative, noise, side="right")
        sampler.append(token)
        output = [*output, token]


@given(all_sampling_params, tokens, tokens, st.integers(0, 10**6))
def test_a_sampled_token_depends_on_nothing_but_the_tokens_so_far(params, prompt, output, seed):
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    at_once, one_by_one = Sampler(params, prompt, output), Sampler(params, prompt, [])
    for token in output:
        next_token(one_by_one, logits)
        one_by_one.append(token)
    assert next_token(at_once, logits) == next_token(one_by_one, logits)


@given(
    st.lists(st.tuples(all_sampling_params, tokens, tokens), min_size=1, max_size=9),
    st.integers(0, 10**6),
    st.sampled_from([3, 99]),
)
def test_a_sampled_token_is_the_same_whatever_else_is_in_the_batch(requests, seed, batch_rows):
    logits = 2 * torch.randn(len(requests), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    samplers = [Sampler(*request) for request in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parse.engines.native.sampler.MAX_LOGITS_PER_PASS_ON_CPU", batch_rows * VOCAB_SIZE)
        sampled = sample(logits, [next(iter(sampler.states()), None) for sampler in samplers])
    assert sampled == [next_token(sampler, row) for sampler, row in zip(samplers, logits, strict=True)]


@given(all_sampling_params, tokens, tokens, tokens, st.integers(0, 10**6))
def test_tokens_after_a_proposal_are_sampled_as_they_would_be_one_by_one(params, prompt, output, proposal, seed):
    logits = 2 * torch.randn(len(proposal) + 1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    sampler = Sampler(params, prompt, output)
    sampled = sample(logits, sampler.states([0, *proposal]))
    for token, row, place in zip(sampled, logits, range(len(logits)), strict=True):
        assert token == next_token(sampler, row)
        sampler.append(*proposal[place : place + 1] or [0])


def test_logits_that_are_not_finite_give_no_token_and_change_no_other():
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[:, 3] = 9.0
    logits[1, 5], logits[2, 5] = torch.nan, torch.inf
    assert sample(logits) == [3, -1, -1, 3]
    assert sample(logits, Sampler(SamplingParams(top_k=1, top_p=0.9, min_p=0.1), [], []).states([0] * 4)) == [
        3,
        -1,
        -1,
        3,
    ]
    assert sample(logits[:0]) == []


def test_tokens_come_as_often_as_they_should():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -20.0])
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=4),
        SamplingParams(temperature=1.5, top_p=0.8),
    ):
        expected = probabilities(logits, params, [], [])
        counts = np.zeros(len(logits), int)
        for position in range(4000):
            sampler = Sampler(params, [], [0] * position)
            counts[next_token(sampler, logits)] += 1
        assert not surprising(counts, expected)
        assert surprising(counts, probabilities(logits, SamplingParams(temperature=1.3), [], []))


def test_the_noise_is_uniform_over_positions_and_over_seeds():
    for noise in ([uniform_noise(7, k) for k in range(5000)], [uniform_noise(seed, 0) for seed in range(5000)]):
        assert min(noise) >= 0
        assert max(noise) < 1
        assert not surprising(np.bincount([int(20 * x) for x in noise], minlength=20), [0.05] * 20)
        pairs = [int(5 * one) * 5 + int(5 * two) for one, two in zip(noise[::2], noise[1::2], strict=True)]
        assert not surprising(np.bincount(pairs, minlength=25), [0.04] * 25)
    assert uniform_noise(1, 23) != uniform_noise(12, 3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-38, 1e-20, 1e-3])
def test_the_smallest_temperatures_are_as_good_as_greedy(temperature):
    logits = torch.tensor([1.0, 30.0, 29.0, -torch.inf])
    assert all(
        next_token(Sampler(SamplingParams(temperature=temperature, seed=seed), [], []), logits) == 1
        for seed in range(50)
    )


def test_tokens_of_probability_zero_are_never_sampled(monkeypatch):
    logits = torch.full((1000,), -torch.inf)
    logits[[10, 500]] = 0.0
    sampled = {next_token(Sampler(SamplingParams(seed=seed), [], []), logits) for seed in range(200)}
    assert sampled == {10, 500}
    assert {
        next_token(Sampler(SamplingParams(seed=s, top_k=1), [], []), torch.tensor([0.0, 0.1])) for s in range(50)
    } == {1}
    for noise, expected in ((0.0, 10), (1 - 2**-53, 500)):
        monkeypatch.setattr("parse.engines.native.sampler.uniform_noise", lambda *_, noise=noise: noise)
        assert next_token(Sampler(SamplingParams(), [], []), logits) == expected


def test_equal_logits():
    """Top-k keeps all tokens that are equal to the last one kept; top-p keeps no more than it needs."""
    logits = torch.zeros(8)
    assert {next_token(Sampler(SamplingParams(seed=s, top_k=3), [], []), logits) for s in range(300)} == set(range(8))
    assert {next_token(Sampler(SamplingParams(seed=s, top_p=0.49), [], []), logits) for s in range(300)} == set(
        range(4)
    )
    assert next_token(Sampler(SamplingParams(temperature=0.0), [], []), logits) == 0


@given(st.integers(0, VOCAB_SIZE - 1), st.integers(0, VOCAB_SIZE), st.integers(0, 10**6))
def test_logprobs_are_the_models_own(token, count, seed):
    logits = 3 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    expected = torch.log(torch.exp(logits.double()) / torch.exp(logits.double()).sum())
    [before, logprob] = token_logprobs(torch.stack([-logits, logits]), [0, token], count)
    assert before.logprob == token_logprobs(-logits[None], [0], 0)[0].logprob
    assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert [t for t, _ in logprob.top] == expected.argsort(descending=True)[:count].tolist()
    assert [value for _, value in logprob.top] == pytest.approx(
        sorted(expected.tolist(), reverse=True)[:count], abs=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e-40),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", 1.5),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("logprobs", True),
        ("seed", 0.5),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", None),
        ("stop", "a string is three"),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("logit_bias", {1: 101.0}),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("stop_token_ids", 5),
        ("include_stop_str_in_output", 1),
        ("include_eos_token", 1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", ["fine", ""]),
    ],
)
def test_sampling_out_of_bounds_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(RequestError, match=f"^{field}: ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_the_likeliest_token_stays_however_small_top_p_is():
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert {next_token(Sampler(SamplingParams(seed=seed, top_p=1e-300), [], []), logits) for seed in range(20)} == {1}
