import math
from itertools import product

import pytest
import torch

from parse.speculative.proposal import ProposalRequest
from parse.speculative.proposers import head_proposer
from parse.speculative.proposers.base import ProposerLoadError
from parse.speculative.proposers.eagle3 import Eagle3Proposer
from parse.speculative.proposers.eagle_checkpoint import load_head
from parse.speculative.proposers.parallelspec import ParallelSpecProposer
from tests.parse.speculative import naive
from tests.parse.speculative.naive import path_probabilities, propose, propose_tree, tree_of
from tests.parse.speculative.proposers.test_eagle3 import EMBEDDING, HIDDEN_STATES, MORE, TARGET, TEXT

PARALLEL_TOKENS = 4


def head_of(tmp_path, layers=2):
    config = naive.sizes(num_hidden_layers=layers, parallel_tokens=PARALLEL_TOKENS)
    tensors = naive.checkpoint(config)
    return config, tensors, *load_head(naive.write(tmp_path, config, tensors), TARGET)


def logprobs(config, tensors, size):
    """Log-probabilities after the first `size` tokens, [PARALLEL_TOKENS, draft vocabulary]."""
    tokens = [*TEXT, *MORE][1:size]
    embedded = torch.cat([EMBEDDING[torch.tensor(tokens)], tensors["mask_embedding"].expand(PARALLEL_TOKENS - 1, -1)])
    fused = HIDDEN_STATES[: size - 1] @ tensors["fc.weight"].T
    hidden = torch.cat([fused, tensors["mask_hidden"].expand(PARALLEL_TOKENS - 1, -1)])
    out = naive.run(tensors, config, embedded, hidden, range(len(hidden)))
    return naive.logits(tensors, config, out[-PARALLEL_TOKENS:]).log_softmax(-1)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_chain_is_the_most_likely_token_of_each_position(tmp_path, layers):
    config, tensors, head, embedding = head_of(tmp_path, layers)
    proposer = ParallelSpecProposer(head, embedding)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    for size in (len(TEXT), len(TEXT) + 1, len(TEXT) + 3):
        new = [*TEXT, *MORE][state.length : size]
        state.extend(new, HIDDEN_STATES[size - 1 - len(new) : size - 1])
        likeliest = logprobs(config, tensors, size).argmax(-1).tolist()
        tokens = tuple(naive.target_token(tensors, token) for token in likeliest)
        assert propose_tree(proposer, state, 9) == (tokens, (-1, 0, 1, 2))
        assert propose_tree(proposer, state, 2) == (tokens[:2], (-1, 0))


@pytest.mark.parametrize(("topk", "max_tokens"), [(2, 7), (3, 20), (3, 500)])
def test_a_tree_holds_the_most_likely_paths(tmp_path, topk, max_tokens):
    config, tensors, head, embedding = head_of(tmp_path)
    proposer = ParallelSpecProposer(head, embedding, topk=topk)
    state = proposer.new_state()
    state.extend(TEXT, HIDDEN_STATES[: len(TEXT) - 1])
    top_logprobs, tokens = logprobs(config, tensors, len(TEXT)).topk(topk)
    scores = {
        tuple(naive.target_token(tensors, int(tokens[position, k])) for position, k in enumerate(ranks)): sum(
            float(top_logprobs[position, k]) for position, k in enumerate(ranks)
        )
        for size in range(1, PARALLEL_TOKENS + 1)
        for ranks in product(range(topk), repeat=size)
    }
    proposal = propose(proposer, state, max_tokens)
    expected = {path: scores[path] for path in sorted(scores, key=scores.__getitem__, reverse=True)[:max_tokens]}
    assert path_probabilities(proposal) == pytest.approx(
        {path: math.exp(score) for path, score in expected.items()}, rel=1e-3
    )
    shallow = {path for path in scores if len(path) <= 2}
    assert path_probabilities(propose(proposer, state, 1000, max_depth=2)).keys() == shallow
    min_probability = math.exp(sorted(expected.values())[len(expected) // 2]) * 1.0001
    likely_paths = {path for path, score in expected.items() if math.exp(score) >= min_probability}
    assert path_probabilities(propose(proposer, state, max_tokens, min_probability)).keys() == likely_paths
    assert all(parent < node for node, parent in enumerate(proposal.parents))


def test_many_requests_at_once_are_as_each_alone(tmp_path):
    *_, head, embedding = head_of(tmp_path)
    proposer = ParallelSpecProposer(head, embedding, topk=2)
    alone, together = [], [proposer.new_state() for _ in range(3)]
    for state, length in zip(together, (len(TEXT), 1, 5), strict=True):
        other = proposer.new_state()
        for each in (state, other):
            each.extend(TEXT[:length], HIDDEN_STATES[: length - 1] if length > 1 else None)
        alone.append(propose_tree(proposer, other, 6))
    assert [tree_of(proposal) for proposal in proposer.propose([ProposalRequest(one, 6) for one in together])] == alone
    assert alone[1] == ((), ())


def test_a_long_prompt_is_computed_as_if_it_came_in_parts(tmp_path):
    *_, head, embedding = head_of(tmp_path)
    proposer = ParallelSpecProposer(head, embedding)
    tokens = torch.randint(40, (600,), generator=torch.Generator().manual_seed(5)).tolist()
    hidden_states = torch.randn(599, 48, generator=torch.Generator().manual_seed(6))
    at_once, in_parts = proposer.new_state(), proposer.new_state()
    at_once.extend(tokens, hidden_states)
    in_parts.extend(tokens[:20], hidden_states[:19])
    for end in range(40, 601, 20):
        propose_tree(proposer, in_parts, 2)
        in_parts.extend(tokens[end - 20 : end], hidden_states[end - 21 : end - 1])
    assert propose_tree(proposer, at_once, 4) == propose_tree(proposer, in_parts, 4)
    torch.testing.assert_close(at_once.keys[:, :, :599], in_parts.keys[:, :, :599], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_short", [False, True])
def test_a_long_sequence_is_prefilled_in_chunks_and_then_gets_proposals(tmp_path, monkeypatch, with_short):
    monkeypatch.setattr(head_proposer, "MAX_PREFILL_TOKENS", 50)
    *_, head, embedding = head_of(tmp_path)
    proposer = ParallelSpecProposer(head, embedding)
    tokens = torch.randint(40, (180,), generator=torch.Generator().manual_seed(5)).tolist()
    hidden_states = torch.randn(179, 48, generator=torch.Generator().manual_seed(6))
    chunked, at_once, short = (proposer.new_state() for _ in range(3))
    chunked.extend(tokens, hidden_states)
    at_once.extend(tokens, hidden_states)
    short.extend(tokens[:20], hidden_states[:19])
    requests = [ProposalRequest(chunked, 4), *([ProposalRequest(short, 4)] if with_short else [])]
    ready = []
    for _ in range(4):
        first, *others = proposer.propose(requests)
        ready.append(first.ready)
        assert all(len(other.token_ids) == 4 for other in others)
    assert ready == [False, False, True, True]
    monkeypatch.setattr(head_proposer, "MAX_PREFILL_TOKENS", 1000)
    assert tree_of(first) == propose_tree(proposer, at_once, 4)
    torch.testing.assert_close(at_once.keys[:, :, :178], chunked.keys[:, :, :178], atol=1e-4, rtol=1e-4)


def test_each_head_is_for_its_own_method(tmp_path):
    *_, head, embedding = head_of(tmp_path / "parallel")
    with pytest.raises(ProposerLoadError, match="not an EAGLE-3 head"):
        Eagle3Proposer(head, embedding)
    config = naive.sizes()
    single = naive.write(tmp_path / "single", config, naive.checkpoint(config))
    with pytest.raises(ProposerLoadError, match="not a parallel head"):
        ParallelSpecProposer(*load_head(single, TARGET))
