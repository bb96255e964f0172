"""Programs driven by hand over a model that is a table: what follows depends on the last token alone."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parse.acceptance import AcceptancePolicy, Thresholds
from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.generation import TreeOutput, generate, prefill
from parse.engines.native.sampler import Sampler, sample
from parse.engines.native.verification import VerifyOptions, verify
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import Proposal, Proposer
from parse.speculative.proposal_policy import ProposalCall, SpeculativeMethod
from parse.tree import MASK, TokenTree, chain
from parse.types import SamplingParams, SpeculationStats, sum_stats
from tests.parse.engines.native.chance import surprising
from training.tokenizer import build_tokenizer

VOCABULARY = 9
END = 8
TABLE = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
PROMPT = [2, 5]


def tokens(tree_input):
    nodes = tree_input.nodes
    return nodes.tokens.tolist() if isinstance(nodes, TokenTree) else list(nodes)


def write(
    params,
    output=(),
    *,
    max_new_tokens=12,
    eos_token_ids=(),
    table=TABLE,
    prompt=PROMPT,
    draft=(),
    stream_interval=1,
    **options,
):
    """All deltas, the context in the end, and how many times the model was run."""
    deltas: list = []
    program = generate(
        GenerateRequest(
            prompt_token_ids=prompt,
            output_token_ids=output,
            sampling_params=params,
            draft_token_ids=draft,
            stream_interval=stream_interval,
        ),
        eos_token_ids=eos_token_ids,
        max_new_tokens=max_new_tokens,
        emit=deltas.append,
        **options,
    )
    final_context = [*prompt, *output][:-1]
    runs = 0
    nodes: list[int] = []
    step = next(program)
    try:
        while True:
            if isinstance(step, ProposalCall):
                step = program.send(step.method.propose([step.request])[0])
                continue
            final_context += [nodes[node] for node in step.accepted_path]
            nodes = tokens(step)
            logits = table[nodes]
            runs += bool(nodes)
            step = program.send(TreeOutput(logits, sample(logits, step.sampling_states)))
    except StopIteration:
        return deltas, final_context, runs


def speculating(proposer):
    """On this one text."""

    class Method(Proposer[Any]):
        def new_state(self):
            return proposer

        def propose(self, requests):
            return [proposer.propose(request.max_tokens) for request in requests]

    return SpeculativeMethod(
        "ngram", GuardedProposer(Method(), VOCABULARY), 100, False, (), StepCostModel()
    ).start_sequence()


def ids(deltas):
    return [token for delta in deltas for token in delta.token_ids]


def test_a_proposer_gets_the_predictions_at_the_masks_that_follow_the_accepted_tokens():
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    text = ids(write(params, max_new_tokens=6)[0])
    predictions: list[Any] = []

    class Masking:
        """Proposes the right token with one mask after it and two masks at once, then a wrong token with a mask."""

        size = 0

        def extend(self, tokens, hidden_states, mask_prediction):
            self.size += len(tokens)
            predictions.append(mask_prediction)

        def propose(self, max_tokens):
            right = [*PROMPT, *text, 0][self.size]
            if len(predictions) == 1:
                return Proposal((right, MASK, MASK), (-1, 0, 1))
            return Proposal((right + 1, MASK), (-1, 0))

    assert ids(write(params, max_new_tokens=6, speculation=speculating(Masking()))[0]) == text
    at_prompt, after_masks, *after_wrong_tokens = predictions
    expected = TABLE[MASK].softmax(-1)
    assert at_prompt is None and set(after_wrong_tokens) == {None}
    assert after_masks.token_ids == [int(expected.argmax())] * 2
    assert after_masks.probabilities == pytest.approx([float(expected.max())] * 2)


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 4]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 10**6),
    logprobs=st.sampled_from([None, 0, 3]),
    ignore_eos=st.booleans(),
)


@given(samplings, st.integers(1, 12), st.booleans(), st.data())
def test_a_proposal_changes_nothing_but_the_number_of_runs(params, max_new_tokens, ending, data):
    eos_token_ids = {END} if ending else set()
    plain, _, _ = write(params, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)
    text = ids(plain)
    right = data.draw(st.integers(0, len(text)))
    proposal = text[:right] + data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=15))
    deltas, final_context, runs = write(
        params, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, draft=proposal
    )
    assert ids(deltas) == text
    assert deltas[-1].finish_reason == plain[-1].finish_reason
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert final_context == [*PROMPT, *text][: len(final_context)]
    held = 0
    while held < min(len(text), len(proposal)) and text[held] == proposal[held]:
        held += 1
    held -= held == max_new_tokens  # the last token there is room for needs no run of its own, and so is not proposed
    assert sum(delta.num_accepted for delta in deltas) == held
    assert runs == len(text) - held + (plain[-1].finish_reason == "stop")
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    assert len(logprobs) == (0 if params.logprobs is None else len(text))
    for last, token, got in zip([PROMPT[-1], *text], text, logprobs, strict=False):
        expected = TABLE[last].log_softmax(-1)
        assert got.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert [other for other, _ in got.top] == expected.topk(params.logprobs).indices.tolist()


class Guesser:
    """Proposes a tree at random, in which the right tokens stand as far as it is told that they should."""

    def __init__(self, text, seed, right):
        self.text, self.rng, self.right = [*PROMPT, *text], random.Random(seed), right
        self.taken = []
        self.spare_tokens = []  # for each proposal, how many tokens of the text it may have

    def extend(self, tokens, hidden_states, mask_prediction):
        assert hidden_states is None
        self.taken += tokens
        assert self.taken == self.text[: len(self.taken)]

    def propose(self, max_tokens):
        self.spare_tokens.append(max_tokens - (len(self.text) - len(self.taken)))
        coming = self.text[len(self.taken) :][: self.rng.randint(0, self.right)]
        tokens, parents = [], []
        trunk = [-1]
        for _ in range(self.rng.randint(0, 4)):
            tokens.append(self.rng.randrange(VOCABULARY))
            parents.append(self.rng.randrange(-1, len(tokens) - 1))
        for token in coming:
            parents.append(trunk[-1])
            tokens.append(token)
            trunk.append(len(tokens) - 1)
        return Proposal(tuple(tokens[: max(0, max_tokens)]), tuple(parents[: max(0, max_tokens)]))


@given(samplings, st.integers(1, 12), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99), st.booleans())
def test_a_proposer_changes_nothing_but_the_number_of_runs(
    params, max_new_tokens, stream_interval, right, seed, proposed
):
    plain, _, _ = write(params, max_new_tokens=max_new_tokens, eos_token_ids={END})
    text = ids(plain)
    options = dict(draft=text[:2]) if proposed else {}
    guesser = Guesser(text, seed, right)
    deltas, final_context, runs = write(
        params,
        max_new_tokens=max_new_tokens,
        eos_token_ids={END},
        stream_interval=stream_interval,
        speculation=speculating(guesser),
        **options,
    )
    assert ids(deltas) == text and deltas[-1].finish_reason == plain[-1].finish_reason
    assert [logprob for each in deltas for logprob in each.logprobs] == [
        logprob for each in plain for logprob in each.logprobs
    ]
    assert final_context == [*PROMPT, *text][: len(final_context)] and len(final_context) >= len(PROMPT) + len(text) - 1
    assert runs <= len(text) + 1
    assert sum(delta.num_accepted for delta in deltas) <= (2 if proposed else 0)
    stats = sum_stats(delta.speculation for delta in deltas)
    assert stats is not None and stats.passes == runs
    if plain[-1].finish_reason == "length":  # the last token of a text comes from the pass itself
        assert all(spare == -1 for spare in guesser.spare_tokens)
    # A pass yields one token, or the end, beside those that were proposed.
    took = sum(stats.accepted_per_position) + sum(delta.num_accepted for delta in deltas)
    assert len(text) - took in (runs, runs - 1)


def test_a_proposer_that_is_right_saves_runs_and_siblings_may_hold_the_right_token():
    params = SamplingParams(temperature=1.0, seed=5, ignore_eos=True)
    text = ids(write(params, max_new_tokens=9)[0])

    class Knowing:
        size = 0

        def extend(self, tokens, hidden_states, mask_prediction):
            self.size += len(tokens)

        def propose(self, max_tokens):
            first, second = [*PROMPT, *text, 0, 0][self.size : self.size + 2]
            wrong = (first + 1) % VOCABULARY
            return Proposal((wrong, first, second, wrong)[:max_tokens], (-1, -1, 1, 0)[:max_tokens])

    deltas, _, runs = write(params, max_new_tokens=9, speculation=speculating(Knowing()))
    assert ids(deltas) == text and runs == 4  # three tokens each, as long as there is room
    assert sum_stats(delta.speculation for delta in deltas) == SpeculationStats("ngram", 4, (6, 4), (3, 2))


@given(samplings, st.data())
def test_a_text_goes_on_the_same_from_anywhere(params, data):
    deltas, _, _ = write(params, max_new_tokens=12, eos_token_ids={END})
    text = ids(deltas)
    split = data.draw(st.integers(0, len(text)))
    if split < 12:
        rest, _, _ = write(params, text[:split], max_new_tokens=12 - split, eos_token_ids={END})
        assert text[:split] + ids(rest) == text
        assert rest[-1].finish_reason == deltas[-1].finish_reason


@given(samplings, st.integers(1, 5), st.integers(1, 12))
def test_deltas_are_as_long_as_the_stream_interval(params, stream_interval, max_new_tokens):
    params = replace(params, ignore_eos=True)
    deltas, _, _ = write(params, max_new_tokens=max_new_tokens, stream_interval=stream_interval, draft=[])
    assert [len(each.token_ids) for each in deltas] == [stream_interval] * (max_new_tokens // stream_interval) + [
        max_new_tokens % stream_interval
    ] * bool(max_new_tokens % stream_interval)
    assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_the_end_token_ends_the_text_unless_it_is_to_be_ignored():
    table = torch.full((VOCABULARY, VOCABULARY), -9.0)
    for last, follows in ((5, 1), (1, END), (END, 3), (3, 3)):
        table[last, follows] = 9.0
    (first, last), final_context, _ = write(SamplingParams(temperature=0), eos_token_ids={END}, table=table)
    assert (first.token_ids, last.token_ids, last.finish_reason) == ((1,), (), "stop")
    assert final_context == [2, 5, 1]
    deltas, _, _ = write(
        SamplingParams(temperature=0, ignore_eos=True), eos_token_ids={END}, table=table, max_new_tokens=5
    )
    assert ids(deltas) == [1, END, 3, 3, 3]
    assert deltas[-1].finish_reason == "length"


@given(samplings, st.integers(1, 11), st.booleans(), st.integers(0, 3))
def test_no_end_token_is_chosen_before_the_minimum_length(params, min_tokens, is_stop_token, proposed):
    """The same as excluding the end token with a bias for the first tokens, and then going on without one."""
    params = replace(params, ignore_eos=is_stop_token)
    ending = dict(stop_token_ids=(END,)) if is_stop_token else {}
    biased = replace(params, ignore_eos=True, logit_bias={END: -1000.0 + 900.0})
    first = ids(write(biased, max_new_tokens=min_tokens)[0])
    rest, _, _ = write(replace(params, **ending), first, max_new_tokens=12 - min_tokens, eos_token_ids={END})
    expected = first + ids(rest)
    deltas, _, _ = write(
        replace(params, min_tokens=min_tokens, **ending), eos_token_ids={END}, draft=expected[:proposed]
    )
    assert ids(deltas) == expected and deltas[-1].finish_reason == rest[-1].finish_reason


@given(samplings, st.integers(0, VOCABULARY - 2), st.booleans(), st.integers(0, 12))
def test_a_stop_token_ends_the_text_and_is_part_of_it_on_request(params, stop, include, proposed):
    params = replace(params, ignore_eos=True)
    text = ids(write(params)[0])
    end = text.index(stop) if stop in text else None
    params = replace(params, stop_token_ids=(stop,), include_stop_str_in_output=include)
    deltas, _, _ = write(params, draft=text[:proposed])
    assert ids(deltas) == (text if end is None else text[: end + include])
    assert deltas[-1].finish_reason == ("length" if end is None else "stop")
    assert sum(len(delta.logprobs) for delta in deltas) == (0 if params.logprobs is None else len(ids(deltas)))


@pytest.mark.parametrize("proposed", [0, 3, 40])
def test_what_was_written_stays_in_the_context_but_for_the_last_token(proposed):
    """So that the next turn of a conversation starts from it, however it came about."""
    text = ids(write(SamplingParams(), max_new_tokens=20)[0])
    deltas, final_context, _ = write(SamplingParams(), max_new_tokens=20, draft=text[:proposed])
    assert ids(deltas) == text
    assert final_context == [*PROMPT, *text[:-1]]


@given(st.integers(0, 10**6), st.integers(0, 6), st.data())
def test_a_stop_string_ends_the_text_wherever_the_tokens_borders_lie(seed, split, data):
    tokenizer = build_tokenizer()
    prompt = tokenizer.encode("a")
    table = torch.full((len(tokenizer), len(tokenizer)), -torch.inf)
    letters = [tokenizer.encode(letter)[0] for letter in "abc"]
    for last in letters:
        table[last, letters] = 0.0
    full_output = ids(write(SamplingParams(seed=seed), max_new_tokens=30, table=table, prompt=prompt)[0])
    stop = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
    size = next((n for n in range(31) if any(each in tokenizer.decode(full_output[:n]) for each in stop)), None)
    split = min(split, size - 1 if size else 29)
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    detokenizer.add(full_output[:split])
    params = SamplingParams(seed=seed, stop=stop)
    proposal = full_output[split : split + 7]
    rest, _, _ = write(
        params,
        full_output[:split],
        max_new_tokens=30 - split,
        table=table,
        prompt=prompt,
        detokenizer=detokenizer,
        draft=proposal,
    )
    assert full_output[:split] + ids(rest) == full_output[:size]
    assert rest[-1].finish_reason == ("stop" if size else "length")


def first_two(rule):
    counts = np.zeros((VOCABULARY, VOCABULARY), int)
    for seed in range(4000):
        one, two = rule(seed)
        counts[one, two] += 1
    return counts.ravel()


def test_whatever_is_proposed_texts_come_as_often_as_they_should():
    start, probabilities = TABLE[PROMPT[-1]].double().softmax(-1), TABLE.double().softmax(-1)
    expected = (start[:, None] * probabilities).flatten().tolist()
    likely_ids = [int(start.argmax()), int(probabilities[start.argmax()].argmax())]

    def favouring(seed):
        """Wrong: takes a draft's token with its probability, and draws among all where it does not."""
        rng, last, out = np.random.default_rng(seed), PROMPT[-1], []
        for proposed in likely_ids:
            chance = TABLE[last].double().softmax(-1).numpy()
            last = proposed if rng.random() < chance[proposed] else int(rng.choice(VOCABULARY, p=chance))
            out.append(last)
        return out

    for proposal in ([], likely_ids, [0, 0], [7, 1]):
        got = first_two(
            lambda seed, p=proposal: ids(write(SamplingParams(seed=seed), max_new_tokens=2, draft=[*p, 0])[0])
        )
        assert not surprising(got, expected)
    assert surprising(first_two(favouring), expected)


SUFFIX = VerificationSuffix((1, 2, 3), correct_token_ids=(4, 5), incorrect_token_ids=(6,))


def verified(probabilities, prefix_lengths, *, max_nodes=100, in_one_pass=False, full=None, prefix=None, **fields):
    """The output where the model answers so at each prefix, and which prefixes are evaluated, run by run.

    `full` and `prefix` are thresholds; without both of them every prefix matters.
    """
    prompt_length, committed = 50, 0
    runs: list[list[int]] = []
    thresholds = Thresholds(full=1.0 if full is None else full, prefix=1.0 if prefix is None else prefix)
    policy = AcceptancePolicy(thresholds, "longest_passing" if prefix is None else "first_failure")
    trunk = fields.pop("trunk", ())
    program = verify(
        VerifyRequest(
            prompt_token_ids=[0] * prompt_length,
            draft_token_ids=[0] * max(prefix_lengths, default=0),
            draft_complete=full is not None,
            prefix_lengths=prefix_lengths,
            suffix=SUFFIX,
            policy=None if full is prefix is None else policy,
            **fields,
        ),
        VerifyOptions(max_nodes=max_nodes, max_model_len=1000, pass_seconds=None, answer_first=not in_one_pass),
        trunk,
    )
    context_length = prompt_length + max(prefix_lengths, default=0) - len(trunk)
    num_trunk = len(trunk)
    try:
        step = next(program)
        while True:
            committed += len(step.accepted_path)
            context_length += len(step.accepted_path)
            assert tokens(step)[:num_trunk] == list(trunk[:num_trunk])
            assert tokens(step)[num_trunk:] == [1, 2, 3] * ((len(step.nodes) - num_trunk) // 3)
            tree = step.nodes if isinstance(step.nodes, TokenTree) else chain(step.nodes)
            answers = [node for node in step.logits_nodes or () if node >= num_trunk]
            assert answers == list(range(num_trunk + 2, len(tree), 3))
            positions = tree.visible_context(context_length) + tree.depth
            lengths = [int(positions[node]) - 2 - prompt_length for node in answers]
            runs.append(sorted(lengths))
            logits = TABLE[[trunk[node] if node < num_trunk else 0 for node in step.logits_nodes or ()]]
            for row, length in zip(logits[len(logits) - len(answers) :], lengths, strict=True):
                p = probabilities[prefix_lengths.index(length)]
                # Shared among the variants of a word, however the rest of the vocabulary fares.
                row[[4, 5, 6]] = torch.tensor([p / 4, 3 * p / 4, 1 - p]).log() + row[0]
            num_trunk = 0
            step = program.send(TreeOutput(logits, sample(logits, step.sampling_states)))
    except StopIteration as finished:
        assert committed + len(finished.value.accepted_path) == len(trunk)
        return finished.value, runs


def test_every_cut_is_asked_about_in_as_few_runs_as_fit():
    probabilities = [0.1, 0.9, 0.5, 0.7]
    output, runs = verified(probabilities, [3, 8, 9, 20])
    assert output.result.p_correct == pytest.approx(probabilities, abs=1e-5)
    assert runs == [[3, 8, 9, 20]]
    output, runs = verified(probabilities, [3, 8, 9, 20], max_nodes=8)
    assert output.result.p_correct == pytest.approx(probabilities, abs=1e-5)
    assert runs == [[3, 8], [9, 20]]
    output, runs = verified([], [])
    assert (output.result.p_correct, runs) == ((), [])


@pytest.mark.parametrize(
    ("probabilities", "options", "runs", "evaluated_indices"),
    [
        ([0.1, 0.9, 0.95], dict(full=0.9), [[30]], [2]),  # the full answer passes: nothing else matters
        ([0.1, 0.9, 0.95], dict(full=0.9, in_one_pass=True), [[10, 20, 30]], [0, 1, 2]),
        ([0.1, 0.9, 0.95], dict(full=0.9, in_one_pass=True, max_nodes=6), [[10, 30]], [0, 2]),
        ([0.1, 0.9, 0.8], dict(full=0.9), [[30], [10, 20]], [0, 1, 2]),  # it does not: the prefixes are asked about
        ([0.1, 0.9, 0.8], dict(full=0.9, prefix=0.5, max_nodes=3), [[30], [10]], [0, 2]),
        ([0.6, 0.1, 0.8], dict(prefix=0.5, max_nodes=3), [[10], [20]], [0, 1]),
        ([0.6, 0.7, 0.1], dict(prefix=0.5, max_nodes=3), [[10], [20], [30]], [0, 1, 2]),
        ([0.6, 0.7, 0.1], dict(full=0.5, prefix=0.5, max_nodes=3), [[30], [10], [20]], [0, 1, 2]),
    ],
)
def test_what_no_longer_matters_is_not_asked(probabilities, options, runs, evaluated_indices):
    output, evaluated = verified(probabilities, [10, 20, 30], **options)
    assert evaluated == runs
    for place, (got, chance) in enumerate(zip(output.result.p_correct, probabilities, strict=True)):
        assert got == (pytest.approx(chance, abs=1e-5) if place in evaluated_indices else None)


def test_the_log_probabilities_of_the_draft_come_with_the_result():
    trunk = [5, 0, 3, 3, 7]
    output, runs = verified([0.5, 0.6], [2, 4], trunk=trunk, num_logprobs=2)
    assert runs == [[2, 4]]
    assert verified([0.5, 0.6], [2, 4], trunk=trunk, num_logprobs=2, max_nodes=3)[1] == [[2], [4]]
    assert len(output.result.logprobs) == 4
    for last, token, got in zip(trunk, trunk[1:], output.result.logprobs, strict=False):
        probabilities = TABLE[last].double().softmax(-1)
        assert math.exp(got.logprob) == pytest.approx(float(probabilities[token]), abs=1e-5)
        assert [other for other, _ in got.top] == probabilities.argsort(descending=True)[:2].tolist()


@pytest.mark.parametrize("options", [dict(), dict(in_one_pass=True), dict(max_nodes=3), dict(num_logprobs=0)])
@pytest.mark.parametrize("lengths", [[2, 4], [4], [1, 2, 3, 4], []])
def test_the_logits_after_each_prefix_come_from_the_pass_that_runs_the_trunk(options, lengths):
    trunk = [5, 0, 3, 3, 7] if lengths else [5]
    output, runs = verified([0.1] * len(lengths), lengths, full=0.9, trunk=trunk, **options)
    assert sum(run.count(4) for run in runs) == bool(lengths)  # the complete answer is evaluated once
    assert set(output.next_token_logits) >= {0, *lengths}
    for length, logits in output.next_token_logits.items():
        assert logits.tolist() == [TABLE[trunk[length]].tolist()]


def test_a_prefill_computes_the_context_and_nothing_else():
    program = prefill()
    step = next(program)
    assert (tokens(step), step.logits_nodes) == ([], ())
    with pytest.raises(StopIteration):
        program.send(TreeOutput(torch.empty(0), []))


def test_a_sampler_that_starts_amid_a_text_draws_what_it_would_have():
    sampler = Sampler(SamplingParams(), PROMPT, [])
    sampler.append(3)
    assert sampler.position == Sampler(SamplingParams(), PROMPT, [3]).position
