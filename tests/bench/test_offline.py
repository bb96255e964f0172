import json
import subprocess
import sys

import pytest

from bench import adversary, offline
from bench.contenders import MODES as PARSE_MODES
from bench.contenders import BenchResult, PipelineContender, build_contenders
from bench.offline import ideal_speedup, table
from training.evaluate import MODELS
from training.measure import ForwardCosts

COSTS = ForwardCosts(
    draft_token=1.0, target_token=10.0, draft_prompt=2.0, target_prompt=15.0, judge_whole=20.0, judge_prefixes=30.0
)


def result(*, ids, draft_tokens, accepted_tokens, target_tokens):
    return BenchResult(tuple(range(ids)), True, 1.0, 0.1, draft_tokens, accepted_tokens, target_tokens, 1)


def test_the_ideal_speedup_matches_a_calculation_by_hand():
    accepted_in_full = result(
        ids=40, draft_tokens=40, accepted_tokens=40, target_tokens=0
    )  # 2 + 40 to draft, 20 to verify: 62; the target alone: 15 + 400
    assert ideal_speedup([accepted_in_full], COSTS) == pytest.approx(415 / 62)
    part = result(
        ids=50, draft_tokens=40, accepted_tokens=30, target_tokens=20
    )  # 42 to draft, 20 + 30 to verify, 200 to generate
    assert ideal_speedup([accepted_in_full, part], COSTS) == pytest.approx((415 + 515) / (62 + 292))


def test_the_prompt_is_prefilled_while_the_draft_is_written():
    short = result(
        ids=5, draft_tokens=5, accepted_tokens=5, target_tokens=0
    )  # the draft is complete after 7, the prompt is computed after 15
    assert ideal_speedup([short], COSTS) == pytest.approx((15 + 50) / (15 + 20))


@pytest.mark.slow
def test_the_command_measures_every_mode_and_peer(tmp_path):
    picture, figures = tmp_path / "offline.svg", tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.offline", "--problems", "2", "--json", str(figures), "--plot", str(picture)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(figures.read_text())
    assert set(figures["modes"]) == {*PARSE_MODES, "hf_generate", "hf_assisted", "sequential"}
    for name, mode in figures["modes"].items():
        assert set(mode) >= {"tokens_per_s", "speedup", "speedup_interval", "accuracy", "accepted_share", "ttft_s"}
        assert mode["accuracy_count"] == 2 and mode["accuracy_interval"][0] <= mode["accuracy"]
        assert mode["tokens_per_s"] > 0 and 0 < mode["ttft_s"] <= mode["answer_s"] and 0 <= mode["accuracy"] <= 1
        assert f"| {name} |" in shown
    assert figures["modes"]["off"]["speedup"] == 1.0
    assert figures["of_ideal"] == pytest.approx(figures["modes"]["full"]["speedup"] / figures["ideal_speedup"])
    assert picture.read_text().startswith("<?xml")
    assert table(figures) in shown
    assert figures["run"]["problems"] == 2 and figures["run"]["command"].startswith(
        "python -m bench.offline --problems"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--problems 0", "--problems: at least 1"),
        ("--engine --problems 4", "--problems has no effect with --engine"),
        ("--speculation --plot x.svg", "--plot draws the modes only"),
        ("--rounds 2", "--rounds applies to"),
    ],
)
def test_options_without_effect_are_rejected(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offline", *options.split()])
    with pytest.raises(SystemExit):
        offline.main()
    assert message in capsys.readouterr().err


def test_every_contender_has_a_drafting_controller_of_its_own():
    pair, contenders = build_contenders(MODELS, num_threads=1)
    pair.close()
    pipelines = [contender.pipeline for contender in contenders.values() if isinstance(contender, PipelineContender)]
    controllers = {id(pipeline.controller) for pipeline in (*pipelines, pair.pipeline)}
    assert len(pipelines) == len(PARSE_MODES) and len(controllers) == len(pipelines) + 1


@pytest.mark.slow
def test_all_drafts_of_the_adversary_are_wrong():
    figures = adversary.run(12, seed=1, models=MODELS, num_threads=1)
    assert 3 <= figures["drafted_for"] < 12  # auto learns from them
    assert figures["accepted_tokens"] == 0
    assert figures["of_target_interval"][0] <= figures["of_target"] <= figures["of_target_interval"][1]
    assert figures["worst_request"] > 0


def test_the_figures_of_the_adversary_match_a_calculation_by_hand(monkeypatch):
    seconds = {"auto": [2.0, 4.0, 1.0], "off": [9.0, 1.0, 1.0, 0.5]}  # the first answer of `off` is a warm-up
    draft_tokens = {"auto": [8, 8, 0], "off": [0] * 4}  # the third request is answered without a draft

    class ScriptedContender:
        def __init__(self, pair, mode):
            self.results = [
                BenchResult((), True, s, s, d) for s, d in zip(seconds[mode], draft_tokens[mode], strict=True)
            ]

        async def __call__(self, prompt):
            return self.results.pop(0)

    monkeypatch.setattr(adversary, "PipelineContender", ScriptedContender)
    figures = adversary.run(3, seed=1, models=MODELS, num_threads=1)
    assert figures["requests"] == 3 and figures["drafted_for"] == 2
    assert figures["of_target"] == pytest.approx(2.5 / 7)
    assert (figures["first_request"], figures["worst_request"]) == (0.5, 0.25)
