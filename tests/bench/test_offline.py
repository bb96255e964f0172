import json
import subprocess
import sys

import pytest

from bench import adversary
from bench.contenders import MODES as PARSE_MODES
from bench.contenders import BenchResult
from bench.offline import ideal_speedup, table
from training.evaluate import MODELS
from training.measure import ForwardCosts

COSTS = ForwardCosts(
    draft_token=1.0, target_token=10.0, draft_prompt=2.0, target_prompt=15.0, judge_whole=20.0, judge_prefixes=30.0
)


def result(*, ids, draft_tokens, accepted_tokens, target_tokens):
    return BenchResult(tuple(range(ids)), True, 1.0, 0.1, draft_tokens, accepted_tokens, target_tokens, 1)


def test_the_ideal_by_hand():
    accepted_in_full = result(
        ids=40, draft_tokens=40, accepted_tokens=40, target_tokens=0
    )  # 2 + 40 to draft, 20 to judge: 62; alone 15 + 400
    assert ideal_speedup([accepted_in_full], COSTS) == pytest.approx(415 / 62)
    part = result(
        ids=50, draft_tokens=40, accepted_tokens=30, target_tokens=20
    )  # 42 to draft, 20 + 30 to judge, 200 to write
    assert ideal_speedup([accepted_in_full, part], COSTS) == pytest.approx((415 + 515) / (62 + 292))


def test_the_prompt_is_prefilled_while_the_draft_is_written():
    short = result(
        ids=5, draft_tokens=5, accepted_tokens=5, target_tokens=0
    )  # the draft is done after 7, the prompt read after 15
    assert ideal_speedup([short], COSTS) == pytest.approx((15 + 50) / (15 + 20))


def test_the_command_measures_every_mode_and_peer(tmp_path):
    picture, figures = tmp_path / "offline.svg", tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.offline", "--problems", "2", "--json", str(figures), "--plot", str(picture)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(figures.read_text())
    assert set(figures["modes"]) == {*PARSE_MODES, "hf_generate", "hf_assisted", "sequential"}
    for name, mode in figures["modes"].items():
        assert set(mode) >= {"tokens_per_s", "speedup", "accuracy", "accepted_share", "ttft_s"}
        assert mode["tokens_per_s"] > 0 and 0 < mode["ttft_s"] <= mode["answer_s"] and 0 <= mode["accuracy"] <= 1
        assert f"| {name} |" in shown
    assert figures["modes"]["off"]["speedup"] == 1.0
    assert figures["of_ideal"] == pytest.approx(figures["modes"]["full"]["speedup"] / figures["ideal_speedup"])
    assert picture.read_text().startswith("<?xml")
    assert table(figures) in shown


def test_no_problems_are_refused():
    done = subprocess.run([sys.executable, "-m", "bench.offline", "--problems", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--problems: at least 1" in done.stderr


def test_the_adversarys_drafts_are_all_wrong():
    figures = adversary.run(3, seed=1, models=MODELS, num_threads=1)
    assert figures["drafted_for"] == 3 and figures["accepted_tokens"] == 0
    assert 0 < figures["worst_request"] <= figures["first_request"]
