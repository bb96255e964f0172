"""The published heads reach the figures of their cards on other problems."""

import json

import pytest

from training import space
from training.acceptance import acceptance_metrics, generate_held_out, load_method, measure_acceptance, proposal_options
from training.checkpoints import load_model
from training.confidence import NORMAL_QUANTILE
from training.evaluate import MODELS
from training.head_cards import read_figures, render_card

pytestmark = pytest.mark.slow

COUNT = 16


def reaches(measured, stated):
    """Returns whether a measured length is at most three standard errors less than the one that a card states."""
    low, high = measured["mean_accepted_length_interval"]
    standard_error = (high - low) / (2 * NORMAL_QUANTILE)
    return measured["mean_accepted_length"] >= stated["mean_accepted_length"] - 3 * standard_error


def target_of(name):
    return MODELS / read_figures(MODELS / name)["target"]


@pytest.fixture(scope="module")
def network():
    return load_model(MODELS / "demo-target")


@pytest.fixture(scope="module")
def texts():
    return generate_held_out(str(MODELS / "demo-target"), COUNT, seed=77, num_threads=1)


@pytest.mark.parametrize("name", ["demo-eagle3", "demo-parallel", "demo-draft-parallel"])
def test_a_pass_with_a_head_yields_what_its_card_says(network, texts, name):
    if target_of(name) != MODELS / "demo-target":
        network = load_model(target_of(name))
        texts = generate_held_out(str(target_of(name)), COUNT, seed=77, num_threads=1)
    card_stats = json.loads((MODELS / name / "figures.json").read_text())["ways"]["chain"]["of"]
    chain = proposal_options(json.loads((MODELS / name / "config.json").read_text()).get("parallel_tokens", 1))["chain"]
    method = load_method(MODELS / name, network, chain.method_options)
    for kind in ("plain", "continued"):
        some = [text for text in texts if bool(text.begun) == (kind == "continued")]
        metrics = acceptance_metrics(measure_acceptance(method, network, some, chain.max_tokens))
        assert metrics["mean_accepted_length"] > 5
        assert reaches(metrics, card_stats[kind])


def test_a_pass_with_adapters_yields_what_their_card_says(network, texts):
    card_stats = json.loads((MODELS / "demo-space" / "figures.json").read_text())["ways"]["chain"]["of"]
    stats = space.evaluate_adapters(MODELS / "demo-space", network, texts)["ways"]["chain"]["of"]
    for kind in ("plain", "continued"):
        assert stats[kind]["mean_accepted_length"] > 4
        assert reaches(stats[kind], card_stats[kind])


@pytest.mark.parametrize("name", ["demo-eagle3", "demo-parallel", "demo-space", "demo-draft-parallel"])
def test_a_head_is_small(name):
    assert (MODELS / name / "model.safetensors").stat().st_size < 2 << 20


@pytest.mark.parametrize("name", ["demo-eagle3", "demo-parallel", "demo-space", "demo-draft-parallel"])
def test_the_card_shows_the_figures_that_were_measured(name):
    folder = MODELS / name
    assert (folder / "README.md").read_text() == render_card(folder, read_figures(folder))
