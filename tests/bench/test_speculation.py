import asyncio

import pytest

from bench import concurrency, forward_passes, speculation
from bench.contenders import BenchResult, PipelineContender, tokens_per_s
from bench.speculation import contender_name, speculation_settings, summarize
from parse.config import EngineSettings, SpeculativeConfig
from parse.pair import Pair
from parse.prompts import chat_prompt_token_ids
from parse.registry import METHODS
from parse.types import SpeculationStats
from training import measure
from training.evaluate import MODELS
from training.examples import ExampleBuilder
from training.wording import TARGET


@pytest.fixture(scope="module")
def pair():
    ngram = SpeculativeConfig(method="ngram")
    with Pair(EngineSettings(model=str(MODELS / "demo-target"), num_threads=1, speculative_configs=(ngram,))) as pair:
        yield pair


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(forward_passes, "TOKEN_COUNTS", (1, 13, 48))
    monkeypatch.setattr(forward_passes, "NUM_TRIALS", 1)
    monkeypatch.setattr(concurrency, "CLIENT_COUNTS", (1, 2))
    monkeypatch.setattr(concurrency, "ANSWERS_PER_CLIENT", 1)
    monkeypatch.setattr(concurrency, "MIN_ANSWERS", 2)


def prompts_of(pair, count):
    problems = measure.draw_problems(1, count, split="bench")
    return [chat_prompt_token_ids(pair.tokenizer, [{"role": "user", "content": p.question}]) for p in problems]


def answer(ids, *, seconds=1.0, speculation=None):
    return BenchResult(tuple(ids), True, seconds, 0.1, decode_s=0.5, speculation=speculation)


def test_every_method_of_the_engine_has_its_settings():
    assert {settings.method for settings in speculation_settings(MODELS)} == set(METHODS)


def test_contenders_are_named_after_mode_and_method():
    assert contender_name("full", "eagle3") == "full + eagle3" and contender_name("rounds", "none") == "rounds"


def test_speedups_are_ratios_to_the_target_alone_and_texts_are_compared(pair):
    speculation = SpeculationStats("eagle3", 4, (4, 4), (3, 2))
    answers = {
        "off": [answer(range(10), seconds=2.0), answer(range(20), seconds=4.0)],
        "off + eagle3": [answer(range(10), speculation=speculation), answer(range(19), speculation=speculation)],
    }
    summary = summarize(answers, measure.draw_problems(1, 2), ExampleBuilder(pair.tokenizer, own=TARGET))["contenders"]
    assert summary["off"]["speedup"] == 1.0 and summary["off"]["tokens_per_pass"] is None
    with_eagle3 = summary["off + eagle3"]
    assert with_eagle3["speedup"] == pytest.approx(14.5 / 5) and tokens_per_s(answers["off"]) == 5
    assert with_eagle3["tokens_per_pass"] == pytest.approx(18 / 8) and with_eagle3["accepted"] == (6, 4)
    assert with_eagle3["as_plain"] == 1 and with_eagle3["accuracy"] == 0.0 and with_eagle3["writing_share"] == 0.5


def test_steps_are_recorded_and_passed_on_to_the_cost_model_of_the_engine(pair):
    cost_model = pair.target.core.cost_model
    recorder = forward_passes.RecordingCostModel(pair.target)
    (prompt,) = prompts_of(pair, 1)
    try:
        result = asyncio.run(PipelineContender(pair, "off", "ngram")(prompt))
        records = recorder.pop_records()
    finally:
        pair.target.core.cost_model = cost_model
    assert result.speculation is not None
    assert len(records.passes) == result.speculation.passes - 1  # the first pass computes the prompt
    proposed = sum(result.speculation.proposed_per_position)
    assert sum(p.num_tokens for p in records.passes) in range(len(records.passes), len(records.passes) + proposed + 1)
    assert len(records.proposal_times) >= result.speculation.proposed_per_position[0] and all(
        s > 0 for _, s in records.proposal_times
    )
    assert cost_model.num_tokens != 1.0 and recorder.pop_records() == forward_passes.PassRecords()


def test_bare_passes_take_time(pair, few):
    curve = forward_passes.measure_passes(pair.target.model, 2)
    assert curve.num_seqs == 2 and curve.num_tokens == (1, 13, 48) and all(s > 0 for s in curve.seconds)
    assert forward_passes.measure_prefill_s(pair.target.model, 30) > 0


def test_all_clients_share_one_list_of_prompts(pair, few):
    recorder = forward_passes.RecordingCostModel(pair.target)
    summary = asyncio.run(
        concurrency.run_concurrently(PipelineContender(pair, "off", "ngram"), recorder, prompts_of(pair, 3), 3)
    )
    assert len(summary.results) == 3 and summary.tokens_per_s > 0
    assert max(p.num_seqs for p in summary.records.passes) == 3


@pytest.mark.slow
def test_the_whole_comparison_on_a_single_problem(few, monkeypatch):
    monkeypatch.setattr(speculation, "MODES", ("off", "full"))
    summary = speculation.run(1, 5, MODELS, 1, rounds=1)
    composed = {f"{mode} + {method}" for mode in ("off", "full") for method in METHODS}
    assert set(summary["contenders"]) == composed | {"off", "full", "off, none loaded", "hf_generate", "hf_assisted"}
    for method in METHODS:
        assert summary["contenders"][f"off + {method}"]["as_plain"] == 1
        explained = summary["model"]["methods"][method]
        assert explained["predicted"] > 0 and explained["tokens_per_pass"] >= 1
    assert [(one["clients"], one["method"]) for one in summary["crowds"]] == [
        (clients, settings.method) for clients in (1, 2) for settings in speculation_settings(MODELS)
    ]
    shown = speculation.tables(summary)
    assert all(f"| {name} |" in shown for name in summary["contenders"])
    assert all(f"| 2 | {method} |" in shown for method in METHODS)
    assert summary["contenders"]["off, none loaded"]["speedup_over_none_loaded"] == 1.0
    assert [line.split(" | ")[0] for line in speculation.grid_table(summary).splitlines()[2:]] == [
        "| `off`",
        "| `full`",
    ]
