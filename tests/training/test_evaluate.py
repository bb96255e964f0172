import json
import shutil
import subprocess
import sys

import pytest

from parse.acceptance import Thresholds
from training import measure
from training.evaluate import MODELS
from training.measure import VerifiedDraft
from training.task import draw_problem

pytestmark = pytest.mark.slow

FAMILY = draw_problem("test", 1, 0)
HALF = Thresholds(0.5, 0.5)


def verified_draft(*, first_wrong=None, complete=True, correct=(1.0, 1.0, 1.0)):
    return VerifiedDraft(FAMILY, tuple(range(20)), True, first_wrong, complete, (8, 16, 20), correct)


def test_the_figures_of_the_verifier_match_a_calculation_by_hand():
    drafts = [
        verified_draft(),  # correct, accepted in full
        verified_draft(correct=(0.9, 0.2, 0.3)),  # correct, accepted up to 8
        verified_draft(first_wrong=10, complete=False, correct=(0.9, 0.1, 0.1)),  # wrong, accepted before its error
        verified_draft(first_wrong=10, complete=False, correct=(0.9, 0.8, 0.1)),  # wrong, accepted past its error
        verified_draft(first_wrong=3, complete=False, correct=(0.1, 0.1, 0.9)),  # wrong, accepted in full
    ]
    metrics = measure.verifier_metrics(drafts, HALF)
    assert metrics["right_accepted_whole"] == 1 / 2
    assert metrics["wrong_accepted_whole"] == 1 / 3
    assert metrics["kept_past_error"] == 2 / 3
    # Accepted prefixes: 3 + 1 + 1 + 2 + 3, of which 3 + 1 + 1 + 1 + 0 are correct. Correct prefixes: 3 + 3 + 1 + 1 + 0.
    assert metrics["prefix_precision"] == 6 / 10
    assert metrics["prefix_recall"] == 6 / 8
    assert metrics["accepted_share"] == pytest.approx((1 + 0.4 + 0.4 + 0.8 + 1) / 5)
    assert metrics["oracle_share"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.15) / 5)


def test_an_answer_that_ends_too_early_has_correct_prefixes_but_is_wrong():
    early = verified_draft(complete=False)
    assert [early.is_prefix_correct(length) for length in early.prefix_lengths] == [True, True, False]


def test_reliability_matches_a_calculation_by_hand():
    sure, torn = (
        verified_draft(correct=(0.95, 0.95, 0.95)),
        verified_draft(first_wrong=0, complete=False, correct=(0.55, 0.55, 0.55)),
    )
    error, curve = measure.reliability([sure, torn])
    assert curve == [pytest.approx((0.55, 0.0, 3)), pytest.approx((0.95, 1.0, 3))]
    assert error == pytest.approx((0.55 + 0.05) / 2)


def test_the_ideal_speedup_matches_a_calculation_by_hand():
    cost = measure.ForwardCosts(
        draft_token=1.0, target_token=10.0, draft_prompt=5.0, target_prompt=9.0, judge_whole=30.0, judge_prefixes=20.0
    )
    # The target alone: 40 tokens, 400 ms. Drafting: 20 ms. Verification: 30 ms and in half of the cases 20 more.
    # The target generates a quarter of the answer: 100 ms.
    ideal = measure.ideal_speedup(cost, [verified_draft()], [range(40)], accepted_share=0.75, full_answer_share=0.5)
    assert ideal == pytest.approx(400 / 160)


def evaluate(*args):
    command = [sys.executable, "-m", "training.evaluate", "--problems", "6", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_every_figure_and_writes_the_cards(tmp_path):
    for name in ("demo-target", "demo-draft"):
        shutil.copytree(MODELS / name, tmp_path / name)
    done = evaluate("--models", str(tmp_path), "--seed", "3", "--json", "-", "--card")
    metrics = json.loads(done.stdout)
    for key in (
        *("draft.accuracy", "draft.ms_per_token", "target.accuracy", "target.ms_per_token"),
        *("target.continuation_accuracy", "cost_ratio", "token_agreement", "ideal_speedup"),
        *("verifier.right_accepted_whole", "verifier.wrong_accepted_whole", "verifier.kept_past_error"),
        *("verifier.prefix_precision", "verifier.prefix_recall", "verifier.ece", "verifier.accepted_share"),
        *("verifier.oracle_share", "verifier.sweep", "verifier.reliability"),
    ):
        value = metrics
        for name in key.split("."):
            value = value[name]
    assert metrics["run"]["seeds"] == [3] and metrics["run"]["command"].startswith("python -m training.evaluate")
    assert json.loads((tmp_path / "demo-draft" / "figures.json").read_text()) == metrics
    assert "On 6 problems" in (tmp_path / "demo-target" / "README.md").read_text()
    assert (tmp_path / "demo-target" / "verifier.svg").read_text() != (
        MODELS / "demo-target" / "verifier.svg"
    ).read_text()


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("demo-target/model.safetensors", lambda data: data[:5000], "demo-target/model.safetensors is damaged"),
        ("demo-draft/model.safetensors", lambda data: b"", "demo-draft/model.safetensors is damaged"),
        ("demo-draft/config.json", lambda data: data[:40], "demo-draft/config.json is damaged"),
        ("demo-target/tokenizer.json", lambda data: data[:40], "demo-target/tokenizer.json is damaged"),
        ("demo-target/tokenizer.json", None, "demo-target/tokenizer.json is missing"),
    ],
)
def test_an_error_names_the_damaged_file(tmp_path, name, damage, says):
    shutil.copytree(MODELS, tmp_path / "models")
    path = tmp_path / "models" / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    done = evaluate("--models", str(tmp_path / "models"))
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [("--problems", "0"), ("--stride", "-1"), ("--full", "1.5")])
def test_invalid_numbers_are_rejected(args):
    done = evaluate(*args)
    assert done.returncode == 2
    assert args[0] in done.stderr
