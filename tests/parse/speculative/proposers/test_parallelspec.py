import math
from itertools import product

import pytest
import torch

from parse.speculative.proposal import ProposalRequest
from parse.speculative.proposers import head_proposer
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.eagle_head import ProposerLoadError
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from tests.parse.speculative import naive
from tests.parse.speculative.naive import bare, chances, drafted, proposed
from tests.parse.speculative.proposers.test_eagle3 import EMBEDDING, FEATURES, MORE, TARGET, TEXT

AHEAD = 4


def head_of(tmp_path, layers=2):
    config = naive.sizes(num_hidden_layers=layers, parallel_tokens=AHEAD)
    tensors = naive.checkpoint(config)
    return config, tensors, *load_head(naive.write(tmp_path, config, tensors), TARGET)


def logprobs(config, tensors, size):
    """[AHEAD, draft vocabulary], behind the first `size` tokens."""
    tokens = [*TEXT, *MORE][1:size]
    embedded = torch.cat([EMBEDDING[torch.tensor(tokens)], tensors["mask_embedding"].expand(AHEAD - 1, -1)])
    fused = FEATURES[: size - 1] @ tensors["fc.weight"].T
    hidden = torch.cat([fused, tensors["mask_hidden"].expand(AHEAD - 1, -1)])
    out = naive.run(tensors, config, embedded, hidden, range(len(hidden)))
    return naive.logits(tensors, config, out[-AHEAD:]).log_softmax(-1)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_chain_is_the_likeliest_token_of_each_place(tmp_path, layers):
    config, tensors, head, embedding = head_of(tmp_path, layers)
    method = ParallelSpecProposer(head, embedding)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    for size in (len(TEXT), len(TEXT) + 1, len(TEXT) + 3):
        new = [*TEXT, *MORE][proposer.length : size]
        proposer.extend(new, FEATURES[size - 1 - len(new) : size - 1])
        likeliest = logprobs(config, tensors, size).argmax(-1).tolist()
        tokens = tuple(naive.target_token(tensors, token) for token in likeliest)
        assert drafted(method, proposer, 9) == (tokens, (-1, 0, 1, 2))
        assert drafted(method, proposer, 2) == (tokens[:2], (-1, 0))


@pytest.mark.parametrize(("beam", "most"), [(2, 7), (3, 20), (3, 500)])
def test_a_tree_holds_the_likeliest_rows_of_choices(tmp_path, beam, most):
    config, tensors, head, embedding = head_of(tmp_path)
    method = ParallelSpecProposer(head, embedding, beam=beam)
    proposer = method.new_state()
    proposer.extend(TEXT, FEATURES[: len(TEXT) - 1])
    likely, tokens = logprobs(config, tensors, len(TEXT)).topk(beam)
    scores = {
        tuple(naive.target_token(tensors, int(tokens[place, k])) for place, k in enumerate(ranks)): sum(
            float(likely[place, k]) for place, k in enumerate(ranks)
        )
        for size in range(1, AHEAD + 1)
        for ranks in product(range(beam), repeat=size)
    }
    proposal = proposed(method, proposer, most)
    wanted = {path: scores[path] for path in sorted(scores, key=scores.__getitem__, reverse=True)[:most]}
    assert chances(proposal) == pytest.approx({path: math.exp(score) for path, score in wanted.items()}, rel=1e-3)
    shallow = {path for path in scores if len(path) <= 2}
    assert chances(proposed(method, proposer, 1000, depth=2)).keys() == shallow
    floor = math.exp(sorted(wanted.values())[len(wanted) // 2]) * 1.0001
    likely = {path for path, score in wanted.items() if math.exp(score) >= floor}
    assert chances(proposed(method, proposer, most, floor)).keys() == likely
    assert all(parent < node for node, parent in enumerate(proposal.parents))


def test_many_requests_at_once_are_as_each_alone(tmp_path):
    *_, head, embedding = head_of(tmp_path)
    method = ParallelSpecProposer(head, embedding, beam=2)
    alone, together = [], [method.new_state() for _ in range(3)]
    for proposer, length in zip(together, (len(TEXT), 1, 5), strict=True):
        other = method.new_state()
        for taker in (proposer, other):
            taker.extend(TEXT[:length], FEATURES[: length - 1] if length > 1 else None)
        alone.append(drafted(method, other, 6))
    assert [bare(found) for found in method.propose([ProposalRequest(one, 6) for one in together])] == alone
    assert alone[1] == ((), ())


def test_a_long_prompt_is_read_as_if_it_came_in_pieces(tmp_path):
    *_, head, embedding = head_of(tmp_path)
    method = ParallelSpecProposer(head, embedding)
    tokens = torch.randint(40, (600,), generator=torch.Generator().manual_seed(5)).tolist()
    features = torch.randn(599, 48, generator=torch.Generator().manual_seed(6))
    whole, pieces = method.new_state(), method.new_state()
    whole.extend(tokens, features)
    pieces.extend(tokens[:20], features[:19])
    for end in range(40, 601, 20):
        drafted(method, pieces, 2)
        pieces.extend(tokens[end - 20 : end], features[end - 21 : end - 1])
    assert drafted(method, whole, 4) == drafted(method, pieces, 4)
    torch.testing.assert_close(whole.keys[:, :, :599], pieces.keys[:, :, :599], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_long_is_read_a_piece_at_a_time_and_proposes_when_it_is_read(tmp_path, monkeypatch, beside):
    monkeypatch.setattr(head_proposer, "READ", 50)
    *_, head, embedding = head_of(tmp_path)
    method = ParallelSpecProposer(head, embedding)
    tokens = torch.randint(40, (180,), generator=torch.Generator().manual_seed(5)).tolist()
    features = torch.randn(179, 48, generator=torch.Generator().manual_seed(6))
    text, whole, short = (method.new_state() for _ in range(3))
    text.extend(tokens, features)
    whole.extend(tokens, features)
    short.extend(tokens[:20], features[:19])
    wishes = [ProposalRequest(text, 4), *([ProposalRequest(short, 4)] if beside else [])]
    said = []
    for _ in range(4):
        first, *others = method.propose(wishes)
        said.append(first.ready)
        assert all(len(other.token_ids) == 4 for other in others)
    assert said == [False, False, True, True]
    monkeypatch.setattr(head_proposer, "READ", 1000)
    assert bare(first) == drafted(method, whole, 4)
    torch.testing.assert_close(whole.keys[:, :, :178], text.keys[:, :, :178], atol=1e-4, rtol=1e-4)


def test_each_head_is_for_its_own_method(tmp_path):
    *_, head, embedding = head_of(tmp_path / "parallel")
    with pytest.raises(ProposerLoadError, match="not an EAGLE-3 head"):
        Eagle3Proposer(head, embedding)
    config = naive.sizes()
    single = naive.write(tmp_path / "single", config, naive.checkpoint(config))
    with pytest.raises(ProposerLoadError, match="not a parallel head"):
        ParallelSpecProposer(*load_head(single, TARGET))
