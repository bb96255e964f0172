import json
import shutil
import sys
from typing import Any

import pytest
import torch

from parse.speculative.proposal import Proposal, Proposer, chain_proposal
from parse.speculative.proposers.ngram import NgramProposer
from tests.training.test_head_data import target, texts
from training import eagle3, parallel
from training.acceptance import count_accepted, evaluate_head, main, measure_acceptance
from training.evaluate import MODELS
from training.head_cards import read_figures, render_card, write_card
from training.head_checkpoints import save_head
from training.outputs import TargetOutput


def test_accepted_tokens_follow_one_path_of_the_tree():
    tree = Proposal((5, 6, 7, 8, 9), (-1, -1, 1, 1, 3))
    assert count_accepted(tree, [6, 8, 9, 1]) == 3
    assert count_accepted(tree, [6, 8]) == 2
    assert count_accepted(tree, [5, 7]) == 1
    assert count_accepted(tree, [9]) == 0
    assert count_accepted(Proposal(), [1]) == 0


class OracleProposer(Proposer[Any]):
    """Proposes the next tokens of the text, or wrong ones."""

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
def test_passes_are_counted_and_every_feature_is_read_once(is_right):
    network = target()
    text = TargetOutput([1, 2, 3], [4, 5, 6, 7, 8, 9, 10], 1)
    seen: list[float] = []
    stats = measure_acceptance(OracleProposer(text.tokens, is_right, seen), network, [text], max_tokens=2)
    assert stats.tokens == 6  # the first token of the output was given
    assert stats.passes == (2 if is_right else 6)
    assert stats.mean_acceptance_length == stats.tokens / stats.passes
    assert stats.acceptance_rates == ((1.0, 1.0) if is_right else ())
    with torch.no_grad():
        states = network(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states[2][0, :, 0]
    assert seen == pytest.approx(states[: len(seen)].tolist(), abs=1e-5)


def test_methods_without_features_are_measured_in_the_same_way():
    stats = measure_acceptance(
        NgramProposer(), target(), [TargetOutput([1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3], 0)], max_tokens=4
    )
    assert stats.tokens == 7
    assert stats.passes < 7


@pytest.mark.parametrize(("method", "recipe"), [(eagle3, eagle3.HeadRecipe), (parallel, parallel.ParallelRecipe)])
def test_a_card_shows_the_figures(tmp_path, method, recipe):
    network, outputs = target(), texts(6)
    head = method.train_head(network, outputs, recipe(steps=2, ahead=3, texts=2), tmp_path / "run")
    save_head(head, folder := tmp_path / "head")
    stats = evaluate_head(folder, network, outputs)
    write_card(folder, {"trained": "2 steps, 6 texts", "run": None, **stats}, "some-target")
    card = (folder / "README.md").read_text()
    figures = json.loads((folder / "figures.json").read_text())
    assert "for `some-target`" in card
    for options in ("chain", "tree"):
        for kind in ("plain", "continued"):
            length = figures["ways"][options]["of"][kind]["mean_accepted_length"]
            assert length >= 1
            assert f"| {options}, {kind} | " in card
            assert f"{length:.2f}" in card


def test_the_command_measures_adapters_and_writes_their_card(tmp_path, monkeypatch):
    shutil.copytree(MODELS / "demo-space", folder := tmp_path / "demo-space")
    trained = read_figures(folder)["trained"]
    monkeypatch.setattr(sys, "argv", f"acceptance --head {folder} --problems 4 --seed 3 --card --threads 1".split())
    main()
    figures = read_figures(folder)
    assert figures["texts"] == 4 and figures["trained"] == trained and figures["run"]["seeds"] == [3]
    length = figures["ways"]["chain"]["of"]["plain"]
    low, high = length["mean_accepted_length_interval"]
    assert low <= length["mean_accepted_length"] <= high
    assert render_card(folder, figures) == (folder / "README.md").read_text()
