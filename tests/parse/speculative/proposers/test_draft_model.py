"""Proposals of small random models are compared with transformers: one sequence at a time, and without a cache."""

import gc
import math
import random
import threading
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from parse.engines.native.model import Model
from parse.speculative.guard import GuardedProposer
from parse.speculative.proposal import NO_PROPOSAL, NOT_READY, ProposalRequest
from parse.speculative.proposers import draft_model
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.draft_model import DraftModelProposer
from tests.parse.engines.native.tiny import VOCABULARY, build, plain
from tests.parse.speculative.naive import propose, tree_of

MAX_TOKENS = 5
CAPACITY = 160  # tokens
REFERENCE = build("llama", seed=4)


def random_tokens(rng, size):
    return [rng.randrange(VOCABULARY) for _ in range(size)]


def greedy_continuation(token_ids, size, reference=REFERENCE):
    """The tokens that transformers generates greedily, and the probability of them up to each one."""
    input_ids = torch.tensor([token_ids])
    out = reference.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=size, do_sample=False, use_cache=False
    )[0].tolist()
    probabilities = plain(reference, out[:-1]).double().softmax(-1)[len(token_ids) - 1 :]
    token_probabilities = [float(row[token]) for row, token in zip(probabilities, out[len(token_ids) :], strict=True)]
    return out[len(token_ids) :], [math.prod(token_probabilities[: position + 1]) for position in range(size)]


def is_greedy_chain(proposal, token_ids, size=MAX_TOKENS, reference=REFERENCE):
    tokens, probabilities = greedy_continuation(token_ids, size, reference)
    assert tree_of(proposal) == (tuple(tokens), tuple(range(-1, size - 1)))
    assert list(proposal.probabilities) == pytest.approx(probabilities, rel=1e-3)
    return True


class PassSizes:
    """Records the sizes of all passes of a model."""

    def __init__(self, model):
        self.sizes: list[int] = []
        self._forward, model.forward = model.forward, self

    def __call__(self, tokens, *rest):
        self.sizes.append(len(tokens))
        return self._forward(tokens, *rest)

    def pop(self):
        sizes, self.sizes = self.sizes, []
        return sizes


def draft_proposer(tokenizer, reference=REFERENCE, max_sequences=4, capacity=CAPACITY):
    proposer = DraftModelProposer(Model(deepcopy(reference), tokenizer))
    proposer.reserve(max_sequences, capacity)
    return proposer, PassSizes(proposer.model)


def state_of(proposer, token_ids):
    state = proposer.new_state()
    state.extend(token_ids, None, None)
    return state


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2", "mixtral"])
def test_a_chain_is_the_greedy_continuation_of_the_small_model(kind, tokenizer):
    reference = build(kind, seed=2)
    proposer, _ = draft_proposer(tokenizer, reference, max_sequences=6)
    rng = random.Random(0)
    for size in (1, 2, 15, 16, 17, 90):
        token_ids = random_tokens(rng, size)
        assert is_greedy_chain(
            propose(proposer, state_of(proposer, token_ids), MAX_TOKENS), token_ids, reference=reference
        )


def test_accepted_tokens_are_not_computed_again_and_rejected_ones_leave_no_trace(tokenizer):
    proposer, passes = draft_proposer(tokenizer, capacity=256)
    rng = random.Random(1)
    token_ids = random_tokens(rng, 20)
    state, expected = state_of(proposer, token_ids), [len(token_ids) - 1, 1]
    for max_tokens in (4, 1, 6, 3, 5, 5, 2, 7, 4, 4, 6, 1, 3):
        proposal = propose(proposer, state, max_tokens)
        assert is_greedy_chain(proposal, token_ids, max_tokens)
        assert passes.pop() == expected + [1] * (max_tokens - 1)
        accepted = rng.randint(0, max_tokens)
        correction = (
            greedy_continuation([*token_ids, *proposal.token_ids[:accepted]], 1)[0][0]
            + 1
            + rng.randrange(VOCABULARY - 1)
        ) % VOCABULARY
        new = [*proposal.token_ids[:accepted], correction]
        # The model has not computed the last token that it drafted.
        expected = [len(new) - min(accepted, max_tokens - 1)]
        token_ids += new
        state.extend(new, None, None)


def test_a_sequence_that_went_on_without_proposals_is_caught_up_with(tokenizer):
    proposer, passes = draft_proposer(tokenizer)
    rng = random.Random(2)
    token_ids = random_tokens(rng, 9)
    state = state_of(proposer, token_ids)
    first = propose(proposer, state, MAX_TOKENS)
    new = [*first.token_ids, *random_tokens(rng, 30)]
    for token in new:
        state.extend([token], None, None)
    passes.pop()
    assert is_greedy_chain(propose(proposer, state, MAX_TOKENS), [*token_ids, *new])
    assert sum(passes.pop()) == len(new) - (MAX_TOKENS - 1) + MAX_TOKENS - 1


def test_a_repeated_request_gets_no_proposal_and_loses_nothing(tokenizer):
    proposer, _ = draft_proposer(tokenizer)
    token_ids = random_tokens(random.Random(3), 9)
    state = state_of(proposer, token_ids)
    first = propose(proposer, state, MAX_TOKENS)
    assert propose(proposer, state, MAX_TOKENS) == NO_PROPOSAL
    state.extend(first.token_ids[:3], None, None)
    assert is_greedy_chain(propose(proposer, state, MAX_TOKENS), [*token_ids, *first.token_ids[:3]])


def test_nothing_is_proposed_for_an_empty_sequence(tokenizer):
    proposer, passes = draft_proposer(tokenizer)
    assert not propose(proposer, proposer.new_state(), MAX_TOKENS).token_ids and not passes.pop()


def test_a_long_sequence_is_prefilled_in_chunks_while_it_grows(tokenizer, monkeypatch):
    monkeypatch.setattr(draft_model, "MAX_PREFILL_TOKENS", 16)
    proposer, passes = draft_proposer(tokenizer)
    rng = random.Random(4)
    token_ids = random_tokens(rng, 100)
    state = state_of(proposer, token_ids)
    for _ in range(6):
        assert propose(proposer, state, MAX_TOKENS) == NOT_READY
        assert passes.pop() == [16]
        new = random_tokens(rng, 2)
        token_ids += new
        state.extend(new, None, None)
    assert is_greedy_chain(propose(proposer, state, MAX_TOKENS), token_ids)
    assert passes.pop() == [3, 13] + [1] * (MAX_TOKENS - 1)


def test_while_long_sequences_are_prefilled_the_others_keep_their_proposals_and_no_pass_is_large(
    tokenizer, monkeypatch
):
    monkeypatch.setattr(draft_model, "MAX_PREFILL_TOKENS", 16)
    proposer, passes = draft_proposer(tokenizer)
    rng = random.Random(5)
    short, *long = random_tokens(rng, 10), random_tokens(rng, 40), random_tokens(rng, 30)
    state = state_of(proposer, short)
    propose(proposer, state, MAX_TOKENS)
    requests = [
        ProposalRequest(one, MAX_TOKENS) for one in (*(state_of(proposer, token_ids) for token_ids in long), state)
    ]
    for step in range(5):
        passes.pop()
        short.append(rng.randrange(VOCABULARY))
        state.extend(short[-1:], None, None)
        *others, chain = proposer.propose(requests)
        assert is_greedy_chain(chain, short)
        assert sum(passes.pop()) <= 16 + 3 * (MAX_TOKENS + 1)
        if step < 2:
            assert others == [NOT_READY, NOT_READY]
        if step == 2:
            assert is_greedy_chain(others[0], long[0]) and others[1] == NOT_READY
        if step == 4:
            assert is_greedy_chain(others[1], long[1])


def test_sequences_together_have_the_proposals_of_each_alone(tokenizer):
    """They have different lengths, start and end, and accept different shares of what is proposed."""
    proposer, passes = draft_proposer(tokenizer, max_sequences=12)
    rng = random.Random(6)
    running: list = []
    for step in range(12):
        for _ in range(2 if step < 4 else 0):
            token_ids = random_tokens(rng, rng.choice((1, 5, 18, 40)))
            running.append((state_of(proposer, token_ids), token_ids))
        chosen = rng.sample(running, rng.randint(1, len(running)))
        requests = [ProposalRequest(state, rng.randint(1, MAX_TOKENS)) for state, _ in chosen]
        passes.pop()
        proposals = proposer.propose(requests)
        assert len(passes.pop()) <= len(chosen) + max(request.max_tokens for request in requests)
        for (state, token_ids), request, proposal in zip(chosen, requests, proposals, strict=True):
            assert is_greedy_chain(proposal, token_ids, request.max_tokens)
            new = [*proposal.token_ids[: rng.randint(0, request.max_tokens)], rng.randrange(VOCABULARY)]
            token_ids += new
            state.extend(new, None, None)
        if step > 6:
            running.pop(0)


def test_nothing_is_drafted_below_the_minimum_probability(tokenizer):
    proposer, passes = draft_proposer(tokenizer)
    rng = random.Random(7)
    for size in (3, 12, 30, 31):
        token_ids = random_tokens(rng, size)
        _, probabilities = greedy_continuation(token_ids, MAX_TOKENS)
        for kept in range(MAX_TOKENS):
            upper, lower = [1.0, *probabilities][kept], probabilities[kept]
            state = state_of(proposer, token_ids)
            proposal = propose(proposer, state, MAX_TOKENS, math.sqrt(upper * lower))
            assert list(proposal.token_ids) == greedy_continuation(token_ids, MAX_TOKENS)[0][:kept]
            assert sum(1 for size in passes.pop() if size == 1) <= kept + 1
            # The sequence then continues as if nothing had been proposed.
            state.extend([8], None, None)
            assert is_greedy_chain(propose(proposer, state, MAX_TOKENS), [*token_ids, 8])
            passes.pop()


def test_each_request_has_its_own_minimum_probability_and_depth(tokenizer):
    proposer, _ = draft_proposer(tokenizer, max_sequences=5)
    rng = random.Random(8)
    sequences = [random_tokens(rng, 12) for _ in range(4)]
    min_probabilities = [0.0, 1.0, math.sqrt(math.prod(greedy_continuation(sequences[2], 3)[1][1:])), 0.0]
    max_depths = [2, 9, 9, 9]
    requests = [
        ProposalRequest(state_of(proposer, token_ids), MAX_TOKENS, min_probability, max_depth)
        for token_ids, min_probability, max_depth in zip(sequences, min_probabilities, max_depths, strict=True)
    ]
    lengths = [len(proposal.token_ids) for proposal in proposer.propose(requests)]
    assert lengths == [2, 0, 2, MAX_TOKENS]


def test_without_free_memory_nothing_is_proposed_until_there_is_some(tokenizer):
    proposer, _ = draft_proposer(tokenizer, max_sequences=2)
    rng = random.Random(9)
    sequences = [random_tokens(rng, 40) for _ in range(3)]
    states = [state_of(proposer, token_ids) for token_ids in sequences]
    first, second, third = proposer.propose([ProposalRequest(state, MAX_TOKENS) for state in states])
    assert is_greedy_chain(first, sequences[0]) and is_greedy_chain(second, sequences[1]) and third == NOT_READY
    for token_ids, state in zip(sequences, states, strict=True):
        token_ids.append(7)
        state.extend([7], None, None)
    del state, states[0]
    second, third = proposer.propose([ProposalRequest(state, MAX_TOKENS) for state in states])
    assert is_greedy_chain(second, sequences[1]) and is_greedy_chain(third, sequences[2])


def release_states(states):
    states.clear()


def release_states_in_another_thread(states):
    thread = threading.Thread(target=states.clear)
    thread.start()
    thread.join()


def release_states_in_a_cycle(states):
    for state in states:
        state.itself = state
    state = None
    states.clear()
    gc.collect()


@pytest.mark.parametrize("release", [release_states, release_states_in_another_thread, release_states_in_a_cycle])
def test_released_states_return_their_memory(release, tokenizer):
    proposer, _ = draft_proposer(tokenizer, max_sequences=3)
    rng = random.Random(10)
    for _ in range(5):
        sequences = [random_tokens(rng, 30) for _ in range(3)]
        states = [state_of(proposer, token_ids) for token_ids in sequences]
        proposals = proposer.propose([ProposalRequest(state, MAX_TOKENS) for state in states])
        assert all(
            is_greedy_chain(proposal, token_ids) for proposal, token_ids in zip(proposals, sequences, strict=True)
        )
        release(states)


@pytest.mark.parametrize("in_use", [True, False], ids=["while it is generated", "when it is done"])
def test_a_shared_prefix_is_computed_once(in_use, tokenizer):
    proposer, passes = draft_proposer(tokenizer)
    rng = random.Random(11)
    prefix = random_tokens(rng, 64)
    first_tokens, second_tokens = [*prefix, *random_tokens(rng, 10)], [*prefix, *random_tokens(rng, 5)]
    first = state_of(proposer, first_tokens)
    propose(proposer, first, MAX_TOKENS)
    if not in_use:
        del first
    passes.pop()
    assert is_greedy_chain(propose(proposer, state_of(proposer, second_tokens), MAX_TOKENS), second_tokens)
    assert sum(passes.pop()) == len(second_tokens) - len(prefix) + MAX_TOKENS - 1
    if in_use:  # the first sequence is not affected
        first.extend([3], None, None)
        assert is_greedy_chain(propose(proposer, first, MAX_TOKENS), [*first_tokens, 3])


def test_a_sequence_longer_than_its_memory_gets_no_proposals(tokenizer):
    proposer, passes = draft_proposer(tokenizer, max_sequences=3, capacity=48)
    rng = random.Random(12)
    other_sequences = [random_tokens(rng, 20) for _ in range(2)]
    others = [state_of(proposer, token_ids) for token_ids in other_sequences]
    proposer.propose([ProposalRequest(state, MAX_TOKENS) for state in others])
    token_ids = random_tokens(rng, 42)
    grown, huge = state_of(proposer, token_ids), state_of(proposer, random_tokens(rng, 70))
    for _ in range(8):
        passes.pop()
        grown_chain, nothing = proposer.propose([ProposalRequest(grown, MAX_TOKENS), ProposalRequest(huge, MAX_TOKENS)])
        # The last drafted token needs no memory.
        depth = max(0, min(MAX_TOKENS, 48 - len(token_ids) + 1))
        if depth:
            assert is_greedy_chain(grown_chain, token_ids, depth)
        assert len(grown_chain.token_ids) == depth and nothing == NO_PROPOSAL
        token_ids.append(9)
        grown.extend([9], None, None)
    for state, token_ids in zip(others, other_sequences, strict=True):
        state.extend([5], None, None)
        assert is_greedy_chain(propose(proposer, state, MAX_TOKENS), [*token_ids, 5])


def test_a_small_model_with_fewer_positions_than_the_target_stays_within_them(tokenizer, caplog):
    reference = build("gpt2", seed=3, n_positions=32, max_position_embeddings=32)
    proposer, _ = draft_proposer(tokenizer, reference, capacity=300)
    guard = GuardedProposer(proposer, VOCABULARY)
    rng = random.Random(13)
    for size, depth in ((20, MAX_TOKENS), (30, 3), (32, 1), (33, 0), (200, 0)):
        token_ids = random_tokens(rng, size)
        state = guard.new_state()
        state.extend(token_ids, None, None)
        (proposal,) = guard.propose([ProposalRequest(state, MAX_TOKENS)])
        assert list(proposal.token_ids) == (greedy_continuation(token_ids, depth, reference)[0] if depth else [])
    assert not caplog.records


def test_a_token_that_only_the_target_has_ends_the_proposals_for_its_sequence(tokenizer, caplog):
    """The embeddings of models of one family may be padded to different sizes."""
    proposer, _ = draft_proposer(tokenizer)
    guard = GuardedProposer(proposer, VOCABULARY + 8)
    token_ids = random_tokens(random.Random(14), 12)
    early, unaffected, late = (guard.new_state() for _ in range(3))
    early.extend([*token_ids, VOCABULARY, 4], None, None)
    unaffected.extend(token_ids, None, None)
    late.extend(token_ids, None, None)
    proposals = guard.propose([ProposalRequest(state, MAX_TOKENS) for state in (early, unaffected, late)])
    assert (
        proposals[0] == NO_PROPOSAL
        and is_greedy_chain(proposals[1], token_ids)
        and is_greedy_chain(proposals[2], token_ids)
    )
    for state in (early, unaffected):
        state.extend([4], None, None)
    late.extend([VOCABULARY + 7], None, None)
    proposals = guard.propose([ProposalRequest(state, MAX_TOKENS) for state in (early, unaffected, late)])
    assert proposals[0] == proposals[2] == NO_PROPOSAL and is_greedy_chain(proposals[1], [*token_ids, 4])
    assert not caplog.records


def test_a_token_that_only_the_small_model_has_is_never_proposed(tokenizer):
    vocab_size = 40
    proposer = DraftModelProposer(Model(deepcopy(REFERENCE), tokenizer), vocab_size)
    proposer.reserve(8, CAPACITY)
    rng = random.Random(16)
    for size in range(1, 9):
        token_ids = [rng.randrange(vocab_size) for _ in range(size)]
        proposal = propose(proposer, state_of(proposer, token_ids), MAX_TOKENS)
        logits = plain(REFERENCE, [*token_ids, *proposal.token_ids])[size - 1 : -1, :vocab_size]
        assert list(proposal.token_ids) == logits.argmax(-1).tolist()


def test_a_model_with_another_tokenizer_is_refused(tokenizer, tmp_path):
    REFERENCE.save_pretrained(tmp_path)
    words = {f"word{number}": number for number in range(len(tokenizer))}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "word0"))).save_pretrained(tmp_path)
    target = Model(build("llama"), tokenizer)
    with pytest.raises(ProposerLoadError, match=f"{tmp_path} has a different tokenizer than the target"):
        DraftModelProposer.load(tmp_path, target.tokenizer, vocab_size=target.vocab_size, device="cpu", dtype="float32")


def test_a_model_on_disk_is_served_as_it_is(tokenizer, tmp_path):
    reference = build("llama", vocab_size=len(tokenizer), seed=4)
    reference.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    target = Model(build("llama", vocab_size=len(tokenizer)), tokenizer)
    proposer = DraftModelProposer.load(
        tmp_path, target.tokenizer, vocab_size=target.vocab_size, device="cpu", dtype="float32"
    )
    proposer.reserve(1, CAPACITY)
    token_ids = random_tokens(random.Random(15), 25)
    assert is_greedy_chain(propose(proposer, state_of(proposer, token_ids), MAX_TOKENS), token_ids, reference=reference)
    keys_and_values = 2 * 2 * 2 * 8  # of two layers with two key heads of width 8
    assert proposer.bytes_per_token == keys_and_values * 4
