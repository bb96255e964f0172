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

from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.programs import TreeOutput, generate, prefill, verify
from parse.engines.native.sampler import Sampler, sample
from parse.prompts import VerificationSuffix
from parse.speculative.cost_model import StepCostModel
from parse.speculative.guard import GuardedProposer
from parse.speculative.policy import ProposalCall, SpeculativeMethod
from parse.speculative.proposal import Proposal, Proposer
from parse.tree import TokenTree
from parse.types import SamplingParams, SpeculationStats, VerifyResult, sum_stats
from tests.parse.engines.native.chance import surprising
from training.tokenizer import build_tokenizer

VOCABULARY = 9
END = 8
TABLE = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
PROMPT = [2, 5]


def tokens(ask):
    return ask.nodes.tokens.tolist() if isinstance(ask.nodes, TokenTree) else list(ask.nodes)


def write(sampling, output=(), *, room=12, ends=(), table=TABLE, prompt=PROMPT, **options):
    """All pieces, the context in the end, and how many times the model was run."""
    pieces: list = []
    program = generate(
        prompt, output, sampling, stop_token_ids=ends, max_new_tokens=room, emit=pieces.append, **options
    )
    context = [*prompt, *output][:-1]
    runs = 0
    nodes: list[int] = []
    asked = next(program)
    try:
        while True:
            if isinstance(asked, ProposalCall):
                asked = program.send(asked.method.propose([asked.request])[0])
                continue
            context += [nodes[node] for node in asked.accepted_path]
            nodes = tokens(asked)
            logits = table[nodes]
            runs += bool(nodes)
            asked = program.send(TreeOutput(logits, sample(logits, asked.sampling)))
    except StopIteration:
        return pieces, context, runs


def speculating(proposer):
    """On this one text."""

    class Method(Proposer[Any]):
        def new_state(self):
            return proposer

        def propose(self, wishes):
            return [proposer.propose(wish.most) for wish in wishes]

    return SpeculativeMethod(
        "ngram", GuardedProposer(Method(), VOCABULARY), 100, False, (), StepCostModel()
    ).start_sequence()


def ids(pieces):
    return [token for piece in pieces for token in piece.ids]


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
def test_a_proposal_changes_nothing_but_the_number_of_runs(sampling, room, ending, data):
    ends = {END} if ending else set()
    plain, _, _ = write(sampling, room=room, ends=ends)
    text = ids(plain)
    right = data.draw(st.integers(0, len(text)))
    proposal = text[:right] + data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=15))
    pieces, context, runs = write(sampling, room=room, ends=ends, given=proposal)
    assert ids(pieces) == text
    assert pieces[-1].finish == plain[-1].finish
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert context == [*PROMPT, *text][: len(context)]
    held = 0
    while held < min(len(text), len(proposal)) and text[held] == proposal[held]:
        held += 1
    held -= held == room  # the last token there is room for needs no run of its own, and so is not proposed
    assert sum(piece.accepted for piece in pieces) == held
    assert runs == len(text) - held + (plain[-1].finish == "stop")
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    assert len(logprobs) == (0 if sampling.logprobs is None else len(text))
    for last, token, got in zip([PROMPT[-1], *text], text, logprobs, strict=False):
        wanted = TABLE[last].log_softmax(-1)
        assert got.logprob == pytest.approx(float(wanted[token]), abs=1e-5)
        assert [other for other, _ in got.top] == wanted.topk(sampling.logprobs).indices.tolist()


class Guesser:
    """Proposes a tree at random, in which the right tokens stand as far as it is told that they should."""

    def __init__(self, text, seed, right):
        self.text, self.rng, self.right = [*PROMPT, *text], random.Random(seed), right
        self.taken = []

    def take(self, tokens, features, foreseen):
        assert features is None
        self.taken += tokens
        assert self.taken == self.text[: len(self.taken)]

    def propose(self, most):
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
        return Proposal(tuple(tokens[: max(0, most)]), tuple(parents[: max(0, most)]))


@given(samplings, st.integers(1, 12), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99), st.booleans())
def test_a_proposer_changes_nothing_but_the_number_of_runs(sampling, room, piece, right, seed, proposed):
    plain, _, _ = write(sampling, room=room, ends={END})
    text = ids(plain)
    options = dict(given=text[:2]) if proposed else {}
    guesser = Guesser(text, seed, right)
    pieces, context, runs = write(
        sampling, room=room, ends={END}, piece=piece, speculation=speculating(guesser), **options
    )
    assert ids(pieces) == text and pieces[-1].finish == plain[-1].finish
    assert [logprob for each in pieces for logprob in each.logprobs] == [
        logprob for each in plain for logprob in each.logprobs
    ]
    assert context == [*PROMPT, *text][: len(context)] and len(context) >= len(PROMPT) + len(text) - 1
    assert runs <= len(text) + 1
    assert sum(piece.accepted for piece in pieces) <= (2 if proposed else 0)
    came = sum_stats(piece.speculated for piece in pieces)
    assert came is not None and came.passes == runs
    # A pass yields one token, or the end, beside those that were proposed.
    took = sum(came.accepted_per_position) + sum(piece.accepted for piece in pieces)
    assert len(text) - took in (runs, runs - 1)


def test_a_proposer_that_is_right_saves_runs_and_siblings_may_hold_the_right_token():
    sampling = SamplingParams(temperature=1.0, seed=5, ignore_eos=True)
    text = ids(write(sampling, room=9)[0])

    class Knowing:
        size = 0

        def take(self, tokens, features, foreseen):
            self.size += len(tokens)

        def propose(self, most):
            first, second = [*PROMPT, *text, 0, 0][self.size : self.size + 2]
            wrong = (first + 1) % VOCABULARY
            return Proposal((wrong, first, second, wrong)[:most], (-1, -1, 1, 0)[:most])

    pieces, _, runs = write(sampling, room=9, speculation=speculating(Knowing()))
    assert ids(pieces) == text and runs == 4  # three tokens each, as long as there is room
    assert sum_stats(piece.speculated for piece in pieces) == SpeculationStats("ngram", 4, (6, 4), (3, 2))


@given(samplings, st.data())
def test_a_text_goes_on_the_same_from_anywhere(sampling, data):
    pieces, _, _ = write(sampling, room=12, ends={END})
    text = ids(pieces)
    split = data.draw(st.integers(0, len(text)))
    if split < 12:
        rest, _, _ = write(sampling, text[:split], room=12 - split, ends={END})
        assert text[:split] + ids(rest) == text
        assert rest[-1].finish == pieces[-1].finish


@given(samplings, st.integers(1, 5), st.integers(1, 12))
def test_pieces_are_of_the_size_asked_for(sampling, piece, room):
    sampling = replace(sampling, ignore_eos=True)
    pieces, _, _ = write(sampling, room=room, piece=piece, given=[])
    assert [len(each.ids) for each in pieces] == [piece] * (room // piece) + [room % piece] * bool(room % piece)
    assert [each.finish for each in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_the_end_token_ends_the_text_unless_it_is_to_be_ignored():
    table = torch.full((VOCABULARY, VOCABULARY), -9.0)
    for last, follows in ((5, 1), (1, END), (END, 3), (3, 3)):
        table[last, follows] = 9.0
    (first, last), context, _ = write(SamplingParams(temperature=0), ends={END}, table=table)
    assert (first.ids, last.ids, last.finish) == ((1,), (), "stop")
    assert context == [2, 5, 1]
    pieces, _, _ = write(SamplingParams(temperature=0, ignore_eos=True), ends={END}, table=table, room=5)
    assert ids(pieces) == [1, END, 3, 3, 3]
    assert pieces[-1].finish == "length"


@pytest.mark.parametrize("proposed", [0, 3, 40])
def test_what_was_written_stays_in_the_context_but_for_the_last_token(proposed):
    """So that the next turn of a conversation starts from it, however it came about."""
    text = ids(write(SamplingParams(), room=20)[0])
    pieces, context, _ = write(SamplingParams(), room=20, given=text[:proposed])
    assert ids(pieces) == text
    assert context == [*PROMPT, *text[:-1]]


@given(st.integers(0, 10**6), st.integers(0, 6), st.data())
def test_a_stop_string_ends_the_text_wherever_the_tokens_borders_lie(seed, split, data):
    tokenizer = build_tokenizer()
    prompt = tokenizer.encode("a")
    table = torch.full((len(tokenizer), len(tokenizer)), -torch.inf)
    letters = [tokenizer.encode(letter)[0] for letter in "abc"]
    for last in letters:
        table[last, letters] = 0.0
    whole = ids(write(SamplingParams(seed=seed), room=30, table=table, prompt=prompt)[0])
    stop = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
    size = next((n for n in range(31) if any(each in tokenizer.decode(whole[:n]) for each in stop)), None)
    split = min(split, size - 1 if size else 29)
    text = IncrementalDetokenizer(tokenizer, stop)
    text.add(whole[:split])
    sampling = SamplingParams(seed=seed, stop=stop)
    proposal = whole[split : split + 7]
    rest, _, _ = write(sampling, whole[:split], room=30 - split, table=table, prompt=prompt, text=text, given=proposal)
    assert whole[:split] + ids(rest) == whole[:size]
    assert rest[-1].finish == ("stop" if size else "length")


def first_two(rule):
    counts = np.zeros((VOCABULARY, VOCABULARY), int)
    for seed in range(4000):
        one, two = rule(seed)
        counts[one, two] += 1
    return counts.ravel()


def test_whatever_is_proposed_texts_come_as_often_as_they_should():
    start, chances = TABLE[PROMPT[-1]].double().softmax(-1), TABLE.double().softmax(-1)
    wanted = (start[:, None] * chances).flatten().tolist()
    likely = [int(start.argmax()), int(chances[start.argmax()].argmax())]

    def favouring(seed):
        """Wrong: takes a draft's token with its probability, and draws among all where it does not."""
        rng, last, out = np.random.default_rng(seed), PROMPT[-1], []
        for proposed in likely:
            chance = TABLE[last].double().softmax(-1).numpy()
            last = proposed if rng.random() < chance[proposed] else int(rng.choice(VOCABULARY, p=chance))
            out.append(last)
        return out

    for proposal in ([], likely, [0, 0], [7, 1]):
        got = first_two(lambda seed, p=proposal: ids(write(SamplingParams(seed=seed), room=2, given=[*p, 0])[0]))
        assert not surprising(got, wanted)
    assert surprising(first_two(favouring), wanted)


CHECK = VerificationSuffix((1, 2, 3), correct_token_ids=(4, 5), incorrect_token_ids=(6,))


def verdicts(probabilities, cuts, *, most=100, at_once=False, full=None, prefix=None, trunk=(), top=0):
    """The verdict where the model answers so at each cut, and which cuts are asked about, run by run."""
    prompt, kept = 50, 0
    done: list[VerifyResult] = []
    runs: list[list[int]] = []
    program = verify(
        prompt,
        cuts,
        CHECK,
        full_threshold=full,
        prefix_threshold=prefix,
        in_one_pass=at_once,
        max_nodes=most,
        trunk=trunk,
        num_logprobs=top,
        done=done.append,
    )
    try:
        ask = next(program)
        while True:
            kept += len(ask.accepted_path)
            if isinstance(ask.nodes, TokenTree):
                read = list(ask.logits_nodes or ())
                assert tokens(ask) == [1, 2, 3] * len(read)
                assert read == list(range(2, 3 * len(read), 3))
                at = ask.nodes.visible_context(999)[read].tolist()
                runs.append([place - prompt for place in at])
                logits = torch.randn(len(at), VOCABULARY)
                for row, place in zip(logits, at, strict=True):
                    p = probabilities[cuts.index(place - prompt)]
                    # Shared among the variants of a word, however the rest of the vocabulary fares.
                    row[[4, 5, 6]] = torch.tensor([p / 4, 3 * p / 4, 1 - p]).log() + row[0]
            else:
                assert tokens(ask) == list(trunk)
                logits = TABLE[tokens(ask)]
            ask = program.send(TreeOutput(logits, sample(logits, ask.sampling)))
    except StopIteration:
        assert kept == len(trunk)
        (verdict,) = done
        return verdict, runs


def test_every_cut_is_asked_about_in_as_few_runs_as_fit():
    chances = [0.1, 0.9, 0.5, 0.7]
    verdict, runs = verdicts(chances, [3, 8, 9, 20])
    assert verdict.correct == pytest.approx(chances, abs=1e-5)
    assert runs == [[3, 8, 9, 20]]
    verdict, runs = verdicts(chances, [3, 8, 9, 20], most=8)
    assert verdict.correct == pytest.approx(chances, abs=1e-5)
    assert runs == [[3, 8], [9, 20]]
    assert verdicts([], []) == (replace(verdict, correct=()), [])


@pytest.mark.parametrize(
    ("chances", "options", "runs", "known"),
    [
        ([0.1, 0.9, 0.95], dict(full=0.9), [[30]], [2]),  # the full answer passes: nothing else matters
        ([0.1, 0.9, 0.95], dict(full=0.9, at_once=True), [[10, 20, 30]], [0, 1, 2]),
        ([0.1, 0.9, 0.95], dict(full=0.9, at_once=True, most=6), [[10, 30]], [0, 2]),
        ([0.1, 0.9, 0.8], dict(full=0.9), [[30], [10, 20]], [0, 1, 2]),  # it does not: the prefixes are asked about
        ([0.1, 0.9, 0.8], dict(full=0.9, prefix=0.5, most=3), [[30], [10]], [0, 2]),
        ([0.6, 0.1, 0.8], dict(prefix=0.5, most=3), [[10], [20]], [0, 1]),
        ([0.6, 0.7, 0.1], dict(prefix=0.5, most=3), [[10], [20], [30]], [0, 1, 2]),
        ([0.6, 0.7, 0.1], dict(full=0.5, prefix=0.5, most=3), [[30], [10], [20]], [0, 1, 2]),
    ],
)
def test_what_no_longer_matters_is_not_asked(chances, options, runs, known):
    verdict, asked = verdicts(chances, [10, 20, 30], **options)
    assert asked == runs
    for place, (got, chance) in enumerate(zip(verdict.correct, chances, strict=True)):
        assert got == (pytest.approx(chance, abs=1e-5) if place in known else None)


def test_the_drafts_log_probabilities_come_with_the_verdict():
    trunk = [5, 0, 3, 3, 7]
    verdict, runs = verdicts([0.5, 0.6], [2, 4], trunk=trunk, top=2)
    assert runs == [[2, 4]]
    assert verdicts([0.5, 0.6], [2, 4], trunk=trunk, top=2, most=3)[1] == [[2], [4]]
    assert len(verdict.logprobs) == 4
    for last, token, got in zip(trunk, trunk[1:], verdict.logprobs, strict=False):
        chances = TABLE[last].double().softmax(-1)
        assert math.exp(got.logprob) == pytest.approx(float(chances[token]), abs=1e-5)
        assert [other for other, _ in got.top] == chances.argsort(descending=True)[:2].tolist()


def test_to_warm_is_to_want_the_context_and_nothing_else():
    program = prefill()
    ask = next(program)
    assert (tokens(ask), ask.logits_nodes) == ([], ())
    with pytest.raises(StopIteration):
        program.send(TreeOutput(torch.empty(0), []))


def test_a_sampler_that_starts_amid_a_text_draws_what_it_would_have():
    sampler = Sampler(SamplingParams(), PROMPT, [])
    sampler.append(3)
    assert sampler.position == Sampler(SamplingParams(), PROMPT, [3]).position
