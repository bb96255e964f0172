import math

import pytest
import torch

from parse.speculative.proposal import ProposalRequest
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import TargetModel
from tests.parse.speculative import naive
from tests.parse.speculative.naive import path_probabilities, propose, propose_tree, tree_of

TEXT = [3, 17, 9, 9, 30, 22, 5, 11]
MORE = [8, 2, 33]


def random_tensor(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING = random_tensor(40, 16)
HIDDEN_STATES = random_tensor(len(TEXT) + len(MORE) - 1, 48, seed=2)  # of all tokens but the last
TARGET = TargetModel(6, EMBEDDING)
CONFIG = naive.sizes()
NONE: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def head_of(tmp_path, config=CONFIG, seed=0):
    tensors = naive.checkpoint(config, seed=seed)
    return tensors, *load_head(naive.write(tmp_path, config, tensors), TARGET)


def chain(tensors, size, first=0, config=CONFIG):
    tokens = [*TEXT, *MORE][first + 1 : size]
    return naive.Chain(tensors, config, EMBEDDING, tokens, HIDDEN_STATES[first : size - 1], range(first, size - 1))


@pytest.mark.parametrize(
    ("topk", "depth", "max_tokens"), [(1, 5, 6), (1, 5, 3), (3, 3, 100), (4, 2, 9), (3, 4, 14), (2, 0, 2)]
)
def test_a_tree_is_the_one_that_is_found_without_a_cache(tmp_path, topk, depth, max_tokens):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=topk, depth=depth)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    proposal = propose(proposer, state, max_tokens)
    expected = naive.tree(chain(tensors, len(TEXT)), topk, min(depth, max_tokens - 1), max_tokens)
    assert path_probabilities(proposal) == pytest.approx(
        {path: math.exp(score) for path, score in expected.items()}, rel=1e-3
    )
    assert all(parent < node for node, parent in enumerate(proposal.parents))
    assert len(proposal.token_ids) <= max_tokens


@pytest.mark.parametrize(("topk", "depth"), [(1, 6), (3, 3)])
def test_nodes_below_the_minimum_probability_are_left_out(tmp_path, topk, depth):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=topk, depth=depth)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    all_nodes = path_probabilities(propose(proposer, state, 100))
    for min_probability in sorted(all_nodes.values())[:: max(1, len(all_nodes) // 5)]:
        selected = path_probabilities(propose(proposer, state, 100, min_probability * 1.0001))
        assert selected.keys() == {
            path for path, probability in all_nodes.items() if probability >= min_probability * 1.0001
        }


@pytest.mark.parametrize(("topk", "depth"), [(1, 6), (3, 3)])
def test_a_request_for_less_depth_gets_the_same_tree_cut_off(tmp_path, topk, depth):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=topk, depth=depth)
    states = [proposer.new_state() for _ in range(2)]
    for state in states:
        state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    for max_depth in range(1, depth + 2):
        full_tree, shallow_tree = (
            path_probabilities(proposal)
            for proposal in proposer.propose(
                [ProposalRequest(states[0], 99), ProposalRequest(states[1], 99, 0.0, max_depth)]
            )
        )
        assert shallow_tree == pytest.approx(
            {path: probability for path, probability in full_tree.items() if len(path) <= max_depth}, rel=1e-4
        )


def test_drafted_elements_are_replaced_by_those_of_the_target(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=2, depth=3)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    propose_tree(proposer, state, 20)
    state.extend(MORE[:1], HIDDEN_STATES[len(TEXT) - 1 : len(TEXT)])
    propose_tree(proposer, state, 20)
    state.extend(MORE[1:], HIDDEN_STATES[len(TEXT) :])
    assert naive.paths(propose(proposer, state, 9)) == naive.tree(chain(tensors, len(TEXT) + len(MORE)), 2, 3, 9).keys()


def test_hidden_states_may_lie_in_memory_that_is_used_again(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=2)
    one, other = (proposer.new_state() for _ in range(2))
    hidden_states = HIDDEN_STATES[: len(TEXT) - 1].clone()
    one.extend(TEXT, hidden_states)
    other.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    hidden_states.zero_()
    assert propose_tree(proposer, one, 5) == propose_tree(proposer, other, 5)


def test_a_repeated_request_gets_the_same_proposal(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=2, depth=3)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    assert propose_tree(proposer, state, 7) == propose_tree(proposer, state, 7)
    assert propose_tree(proposer, state, 3) != NONE


@pytest.mark.parametrize("topk", [1, 3])
def test_many_requests_at_once_are_as_each_alone(tmp_path, topk):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=topk, depth=3)
    alone, together = [], [proposer.new_state() for _ in range(4)]
    lengths = [len(TEXT), 3, 6, 1]
    for state, length in zip(together, lengths, strict=True):
        other = proposer.new_state()
        for each in (state, other):
            each.extend(TEXT[:length], HIDDEN_STATES[: length - 1] if length > 1 else None)
        alone.append(propose_tree(proposer, other, 8))
    assert [tree_of(proposal) for proposal in proposer.propose([ProposalRequest(one, 8) for one in together])] == alone
    assert alone[3] == ((), ())  # it has no hidden states yet
    for state, length in zip(together, lengths, strict=True):
        state.extend(MORE[:1], HIDDEN_STATES[length - 1 : length])
    again = proposer.propose([ProposalRequest(one, 8) for one in together])
    assert len(again[3].token_ids) > 0
    assert tree_of(again[0]) == propose_tree(proposer, together[0], 8)


def test_it_starts_with_the_tokens_whose_hidden_states_are_there(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=2, depth=2)
    late = proposer.new_state()
    late.extend(TEXT, HIDDEN_STATES[3 : len(TEXT) - 1])
    assert naive.paths(propose(proposer, late, 6)) == naive.tree(chain(tensors, len(TEXT), first=3), 2, 2, 6).keys()


def test_hidden_states_may_be_missing_in_between(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=2, depth=2)
    state = proposer.new_state()
    state.extend(TEXT[:4], HIDDEN_STATES[:3])
    assert propose_tree(proposer, state, 4) != NONE
    state.extend(TEXT[4:6], None)
    assert propose_tree(proposer, state, 4) == NONE
    state.extend(TEXT[6:], HIDDEN_STATES[6:7])
    positions = [0, 1, 2, 6]
    tokens = [TEXT[position + 1] for position in positions]
    expected = naive.Chain(tensors, CONFIG, EMBEDDING, tokens, HIDDEN_STATES[positions], positions)
    assert naive.paths(propose(proposer, state, 6)) == naive.tree(expected, 2, 2, 6).keys()


def test_nothing_is_proposed_where_nothing_may_be(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding)
    state = proposer.new_state()
    assert propose_tree(proposer, state, 4) == NONE
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    assert propose_tree(proposer, state, 0) == NONE


def test_more_hidden_states_than_tokens_are_refused(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding)
    state = proposer.new_state()
    with pytest.raises(ValueError, match="8 rows of hidden states are too many for 8 tokens after 0"):
        state.extend(TEXT, HIDDEN_STATES[:8])
    state.extend(TEXT, HIDDEN_STATES[:7])
    with pytest.raises(ValueError, match="2 rows of hidden states are too many for 1 tokens after 8"):
        state.extend(MORE[:1], HIDDEN_STATES[:2])


def test_a_long_sequence_outgrows_its_first_memory(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3Proposer(head, embedding, topk=1, depth=3)
    grown, at_once = proposer.new_state(), proposer.new_state()
    tokens, hidden_states = random_tensor(700, seed=5).argsort().remainder(40).tolist(), random_tensor(699, 48, seed=6)
    grown.extend(tokens[:100], hidden_states[:99])
    for end in range(150, 701, 50):
        propose_tree(proposer, grown, 4)
        grown.extend(tokens[end - 50 : end], hidden_states[end - 51 : end - 1])
    at_once.extend(tokens, hidden_states)
    assert propose_tree(proposer, grown, 4) == propose_tree(proposer, at_once, 4)


@pytest.mark.parametrize("options", [{"topk": 0}, {"topk": 26}, {"depth": -1}])
def test_a_tree_that_cannot_be_is_refused(tmp_path, options):
    _, head, embedding = head_of(tmp_path)
    with pytest.raises(ProposerLoadError, match=r"topk in 1\.\.25"):
        Eagle3Proposer(head, embedding, **options)
