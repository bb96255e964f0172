import math

import pytest
import torch

from parse.speculative.proposal import ProposalRequest
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import ProposerLoadError, TargetModel
from tests.parse.speculative import naive
from tests.parse.speculative.naive import bare, chances, drafted, proposed

TEXT = [3, 17, 9, 9, 30, 22, 5, 11]
MORE = [8, 2, 33]


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING = drawn(40, 16)
FEATURES = drawn(len(TEXT) + len(MORE) - 1, 48, seed=2)  # of all tokens but the last
TARGET = TargetModel(6, EMBEDDING)
CONFIG = naive.sizes()
NONE: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def head_of(tmp_path, config=CONFIG, seed=0):
    tensors = naive.checkpoint(config, seed=seed)
    return tensors, *load_head(naive.write(tmp_path, config, tensors), TARGET)


def chain(tensors, size, first=0, config=CONFIG):
    tokens = [*TEXT, *MORE][first + 1 : size]
    return naive.Chain(tensors, config, EMBEDDING, tokens, FEATURES[first : size - 1], range(first, size - 1))


@pytest.mark.parametrize(
    ("beam", "depth", "most"), [(1, 5, 6), (1, 5, 3), (3, 3, 100), (4, 2, 9), (3, 4, 14), (2, 0, 2)]
)
def test_a_tree_is_the_one_that_is_found_without_a_cache(tmp_path, beam, depth, most):
    tensors, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=beam, depth=depth)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    proposal = proposed(method, proposer, most)
    wanted = naive.tree(chain(tensors, len(TEXT)), beam, min(depth, most - 1), most)
    assert chances(proposal) == pytest.approx({path: math.exp(score) for path, score in wanted.items()}, rel=1e-3)
    assert all(parent < node for node, parent in enumerate(proposal.parents))
    assert len(proposal.token_ids) <= most


@pytest.mark.parametrize(("beam", "depth"), [(1, 6), (3, 3)])
def test_what_is_less_likely_than_the_floor_is_left_out(tmp_path, beam, depth):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=beam, depth=depth)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    all_of_them = chances(proposed(method, proposer, 100))
    for floor in sorted(all_of_them.values())[:: max(1, len(all_of_them) // 5)]:
        found = chances(proposed(method, proposer, 100, floor * 1.0001))
        assert found.keys() == {path for path, chance in all_of_them.items() if chance >= floor * 1.0001}


@pytest.mark.parametrize(("beam", "depth"), [(1, 6), (3, 3)])
def test_a_text_that_wants_less_depth_gets_the_same_tree_cut_off(tmp_path, beam, depth):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=beam, depth=depth)
    texts = [method.new_state() for _ in range(2)]
    for text in texts:
        text.extend(TEXT, FEATURES[: len(TEXT) - 1])
    for wanted in range(1, depth + 2):
        whole, cut = (
            chances(found)
            for found in method.propose([ProposalRequest(texts[0], 99), ProposalRequest(texts[1], 99, 0.0, wanted)])
        )
        assert cut == pytest.approx({path: chance for path, chance in whole.items() if len(path) <= wanted}, rel=1e-4)


def test_what_was_drafted_gives_way_to_what_was_written(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=2, depth=3)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    drafted(method, proposer, 20)
    proposer.extend(MORE[:1], FEATURES[len(TEXT) - 1 : len(TEXT)])
    drafted(method, proposer, 20)
    proposer.extend(MORE[1:], FEATURES[len(TEXT) :])
    assert (
        naive.paths(proposed(method, proposer, 9)) == naive.tree(chain(tensors, len(TEXT) + len(MORE)), 2, 3, 9).keys()
    )


def test_features_may_lie_in_memory_that_is_used_again(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=2)
    one, other = (method.new_state() for _ in range(2))
    features = FEATURES[: len(TEXT) - 1].clone()
    one.extend(TEXT, features)
    other.extend(TEXT, FEATURES[: len(TEXT) - 1])
    features.zero_()
    assert drafted(method, one, 5) == drafted(method, other, 5)


def test_asked_again_it_says_the_same(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=2, depth=3)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    assert drafted(method, proposer, 7) == drafted(method, proposer, 7)
    assert drafted(method, proposer, 3) != NONE


@pytest.mark.parametrize("beam", [1, 3])
def test_many_requests_at_once_are_as_each_alone(tmp_path, beam):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=beam, depth=3)
    alone, together = [], [method.new_state() for _ in range(4)]
    lengths = [len(TEXT), 3, 6, 1]
    for proposer, length in zip(together, lengths, strict=True):
        other = method.new_state()
        for taker in (proposer, other):
            taker.extend(TEXT[:length], FEATURES[: length - 1] if length > 1 else None)
        alone.append(drafted(method, other, 8))
    assert [bare(found) for found in method.propose([ProposalRequest(one, 8) for one in together])] == alone
    assert alone[3] == ((), ())  # nothing is known of it
    for proposer, length in zip(together, lengths, strict=True):
        proposer.extend(MORE[:1], FEATURES[length - 1 : length])
    again = method.propose([ProposalRequest(one, 8) for one in together])
    assert len(again[3].token_ids) > 0
    assert bare(again[0]) == drafted(method, together[0], 8)


def test_it_starts_with_what_is_known(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=2, depth=2)
    late = method.new_state()
    late.extend(TEXT, FEATURES[3 : len(TEXT) - 1])
    assert naive.paths(proposed(method, late, 6)) == naive.tree(chain(tensors, len(TEXT), first=3), 2, 2, 6).keys()


def test_features_may_be_missing_in_between(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=2, depth=2)
    proposer = method.new_state()
    proposer.extend(TEXT[:4], FEATURES[:3])
    assert drafted(method, proposer, 4) != NONE
    proposer.extend(TEXT[4:6], None)
    assert drafted(method, proposer, 4) == NONE
    proposer.extend(TEXT[6:], FEATURES[6:7])
    known = [0, 1, 2, 6]
    tokens = [TEXT[place + 1] for place in known]
    wanted = naive.Chain(tensors, CONFIG, EMBEDDING, tokens, FEATURES[known], known)
    assert naive.paths(proposed(method, proposer, 6)) == naive.tree(wanted, 2, 2, 6).keys()


def test_nothing_is_proposed_where_nothing_may_be(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding)
    proposer = method.new_state()
    assert drafted(method, proposer, 4) == NONE
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    assert drafted(method, proposer, 0) == NONE


def test_more_features_than_tokens_are_refused(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding)
    proposer = method.new_state()
    with pytest.raises(ValueError, match="8 rows of features are too many for 8 tokens after 0"):
        proposer.extend(TEXT, FEATURES[:8])
    proposer.extend(TEXT, FEATURES[:7])
    with pytest.raises(ValueError, match="2 rows of features are too many for 1 tokens after 8"):
        proposer.extend(MORE[:1], FEATURES[:2])


def test_a_long_text_outgrows_its_first_memory(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3Proposer(head, embedding, beam=1, depth=3)
    grown, whole = method.new_state(), method.new_state()
    tokens, features = drawn(700, seed=5).argsort().remainder(40).tolist(), drawn(699, 48, seed=6)
    grown.extend(tokens[:100], features[:99])
    for end in range(150, 701, 50):
        drafted(method, grown, 4)
        grown.extend(tokens[end - 50 : end], features[end - 51 : end - 1])
    whole.extend(tokens, features)
    assert drafted(method, grown, 4) == drafted(method, whole, 4)


@pytest.mark.parametrize("how", [{"beam": 0}, {"beam": 26}, {"depth": -1}])
def test_a_tree_that_cannot_be_is_refused(tmp_path, how):
    _, head, embedding = head_of(tmp_path)
    with pytest.raises(ProposerLoadError, match=r"beam in 1\.\.25"):
        Eagle3Proposer(head, embedding, **how)
