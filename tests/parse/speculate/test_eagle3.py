import pytest
import torch

from parse.speculate.checkpoint import load_head
from parse.speculate.eagle3 import Eagle3
from parse.speculate.head import HeadError, Target
from parse.speculate.proposal import Proposal
from tests.parse.speculate import naive

TEXT = [3, 17, 9, 9, 30, 22, 5, 11]
MORE = [8, 2, 33]


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING = drawn(40, 16)
FEATURES = drawn(len(TEXT) + len(MORE) - 1, 48, seed=2)  # of all tokens but the last
TARGET = Target(6, EMBEDDING)
CONFIG = naive.sizes()


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
    proposer = Eagle3(head, embedding, beam=beam, depth=depth).proposer()
    proposer.take(TEXT, FEATURES[: len(TEXT) - 1])
    proposal = proposer.propose(most)
    wanted = naive.tree(chain(tensors, len(TEXT)), beam, min(depth, most - 1), most)
    assert naive.paths(proposal) == wanted.keys()
    assert all(parent < node for node, parent in enumerate(proposal.parents))
    assert len(proposal.tokens) <= most


def test_what_was_drafted_gives_way_to_what_was_written(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3(head, embedding, beam=2, depth=3).proposer()
    proposer.take(TEXT, FEATURES[: len(TEXT) - 1])
    proposer.propose(20)
    proposer.take(MORE[:1], FEATURES[len(TEXT) - 1 : len(TEXT)])
    proposer.propose(20)
    proposer.take(MORE[1:], FEATURES[len(TEXT) :])
    assert naive.paths(proposer.propose(9)) == naive.tree(chain(tensors, len(TEXT) + len(MORE)), 2, 3, 9).keys()


def test_features_may_lie_in_memory_that_is_used_again(tmp_path):
    _, head, embedding = head_of(tmp_path)
    one, other = (Eagle3(head, embedding, beam=2).proposer() for _ in range(2))
    features = FEATURES[: len(TEXT) - 1].clone()
    one.take(TEXT, features)
    other.take(TEXT, FEATURES[: len(TEXT) - 1])
    features.zero_()
    assert one.propose(5) == other.propose(5)


def test_asked_again_it_says_the_same(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3(head, embedding, beam=2, depth=3).proposer()
    proposer.take(TEXT, FEATURES[: len(TEXT) - 1])
    assert proposer.propose(7) == proposer.propose(7)
    assert proposer.propose(3) != Proposal()


@pytest.mark.parametrize("beam", [1, 3])
def test_many_requests_at_once_are_as_each_alone(tmp_path, beam):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3(head, embedding, beam=beam, depth=3)
    alone, together = [], [method.proposer() for _ in range(4)]
    lengths = [len(TEXT), 3, 6, 1]
    for proposer, length in zip(together, lengths, strict=True):
        other = method.proposer()
        for taker in (proposer, other):
            taker.take(TEXT[:length], FEATURES[: length - 1] if length > 1 else None)
        alone.append(other.propose(8))
    assert method.propose(together, 8) == alone
    assert alone[3] == Proposal()  # nothing is known of it
    for proposer, length in zip(together, lengths, strict=True):
        proposer.take(MORE[:1], FEATURES[length - 1 : length])
    again = method.propose(together, 8)
    assert len(again[3].tokens) > 0
    assert again[0] == method.propose(together[:1], 8)[0]


def test_it_starts_with_what_is_known(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    method = Eagle3(head, embedding, beam=2, depth=2)
    late = method.proposer()
    late.take(TEXT, FEATURES[3 : len(TEXT) - 1])
    assert naive.paths(late.propose(6)) == naive.tree(chain(tensors, len(TEXT), first=3), 2, 2, 6).keys()


def test_features_may_be_missing_in_between(tmp_path):
    tensors, head, embedding = head_of(tmp_path)
    proposer = Eagle3(head, embedding, beam=2, depth=2).proposer()
    proposer.take(TEXT[:4], FEATURES[:3])
    assert proposer.propose(4) != Proposal()
    proposer.take(TEXT[4:6], None)
    assert proposer.propose(4) == Proposal()
    proposer.take(TEXT[6:], FEATURES[6:7])
    known = [0, 1, 2, 6]
    tokens = [TEXT[place + 1] for place in known]
    wanted = naive.Chain(tensors, CONFIG, EMBEDDING, tokens, FEATURES[known], known)
    assert naive.paths(proposer.propose(6)) == naive.tree(wanted, 2, 2, 6).keys()


def test_nothing_is_proposed_where_nothing_may_be(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3(head, embedding).proposer()
    assert proposer.propose(4) == Proposal()
    proposer.take(TEXT, FEATURES[: len(TEXT) - 1])
    assert proposer.propose(0) == Proposal()


def test_more_features_than_tokens_are_refused(tmp_path):
    _, head, embedding = head_of(tmp_path)
    proposer = Eagle3(head, embedding).proposer()
    with pytest.raises(ValueError, match="8 rows of features are too many for 8 tokens after 0"):
        proposer.take(TEXT, FEATURES[:8])
    proposer.take(TEXT, FEATURES[:7])
    with pytest.raises(ValueError, match="2 rows of features are too many for 1 tokens after 8"):
        proposer.take(MORE[:1], FEATURES[:2])


def test_a_long_text_outgrows_its_first_memory(tmp_path):
    _, head, embedding = head_of(tmp_path)
    method = Eagle3(head, embedding, beam=1, depth=3)
    grown, whole = method.proposer(), method.proposer()
    tokens, features = drawn(700, seed=5).argsort().remainder(40).tolist(), drawn(699, 48, seed=6)
    grown.take(tokens[:100], features[:99])
    for end in range(150, 701, 50):
        grown.propose(4)
        grown.take(tokens[end - 50 : end], features[end - 51 : end - 1])
    whole.take(tokens, features)
    assert grown.propose(4) == whole.propose(4)


@pytest.mark.parametrize("how", [{"beam": 0}, {"beam": 26}, {"depth": -1}])
def test_a_tree_that_cannot_be_is_refused(tmp_path, how):
    _, head, embedding = head_of(tmp_path)
    with pytest.raises(HeadError, match=r"beam in 1\.\.25"):
        Eagle3(head, embedding, **how)
