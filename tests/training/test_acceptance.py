import json
from typing import Any

import pytest
import torch

from parse.speculative.proposal import Proposal, Proposer, chain_proposal
from parse.speculative.proposers.ngram import NgramProposer
from tests.training.test_head_data import target, texts
from training import eagle3, parallel
from training.acceptance import count_accepted, evaluate_head, measure_acceptance
from training.head_cards import write_head_card
from training.head_checkpoints import save_head
from training.outputs import TargetOutput


@pytest.fixture(autouse=True)
def one_thread():
    """Operations as small as these only wait for one another on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tree_is_followed_along_the_text():
    tree = Proposal((5, 6, 7, 8, 9), (-1, -1, 1, 1, 3))
    assert count_accepted(tree, [6, 8, 9, 1]) == 3
    assert count_accepted(tree, [6, 8]) == 2
    assert count_accepted(tree, [5, 7]) == 1
    assert count_accepted(tree, [9]) == 0
    assert count_accepted(Proposal(), [1]) == 0


class OracleProposer(Proposer[Any]):
    """Proposes what will stand there, one token too few at a time, or nonsense."""

    aux_hidden_state_layers = (2,)

    def __init__(self, text, is_right, seen):
        self.text, self.right, self.seen, self.length = text, is_right, seen, 0

    def new_state(self):
        return self

    def extend(self, tokens, features, mask_prediction):
        assert self.text[self.length : self.length + len(tokens)] == list(tokens)
        assert len(features) == len(tokens) - (self.length == 0)
        self.seen += features[:, 0].tolist()
        self.length += len(tokens)

    def propose(self, requests):
        (request,) = requests
        return [
            chain_proposal(
                self.text[self.length : self.length + request.max_tokens] if self.right else [39] * request.max_tokens
            )
        ]


@pytest.mark.parametrize("is_right", [True, False])
def test_passes_are_counted_and_every_feature_comes_once(is_right):
    network = target()
    text = TargetOutput([1, 2, 3], [4, 5, 6, 7, 8, 9, 10], 1)
    seen: list[float] = []
    stats = measure_acceptance(OracleProposer(text.tokens, is_right, seen), network, [text], max_tokens=2)
    assert stats.tokens == 6  # the first of the output was there
    assert stats.passes == (2 if is_right else 6)
    assert stats.mean_acceptance_length == stats.tokens / stats.passes
    assert stats.acceptance_rates == ((1.0, 1.0) if is_right else ())
    with torch.no_grad():
        states = network(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states[2][0, :, 0]
    assert seen == pytest.approx(states[: len(seen)].tolist(), abs=1e-5)


def test_methods_without_features_are_measured_alike():
    stats = measure_acceptance(
        NgramProposer(), target(), [TargetOutput([1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3], 0)], max_tokens=4
    )
    assert stats.tokens == 7
    assert stats.passes < 7


@pytest.mark.parametrize(("method", "recipe"), [(eagle3, eagle3.HeadRecipe), (parallel, parallel.ParallelRecipe)])
def test_a_card_holds_the_figures(tmp_path, method, recipe):
    network, outputs = target(), texts(6)
    head = method.train_head(network, outputs, recipe(steps=2, ahead=3, texts=2), tmp_path / "run")
    save_head(head, folder := tmp_path / "head")
    stats = evaluate_head(folder, network, outputs)
    write_head_card(folder, "some-target", stats, "2 steps, 6 texts")
    card = (folder / "README.md").read_text()
    figures = json.loads((folder / "figures.json").read_text())
    assert "for `some-target`" in card
    for options in ("chain", "tree"):
        for kind in ("plain", "continued"):
            length = figures["ways"][options]["of"][kind]["mean_accepted_length"]
            assert length >= 1
            assert f"| {options}, {kind} | " in card
            assert f"{length:.2f}" in card
