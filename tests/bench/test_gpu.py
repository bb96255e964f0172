import json
import sys
from math import ceil, isfinite

import pytest
import torch

from bench import gpu, gpu_measurements, gpu_table, roofline
from bench.gpu_plan import BenchmarkPlan, estimated_seconds
from parse.engines.native.paged_attention import BLOCK_SIZE

TINY = "--shape tiny --device cpu --batches 3,1 --drafts 20,40 --context 40 --rounds 1 --decode-tokens 4"
SHAPES = "qwen3-8b", "qwen3-32b"  # those of bench/gpu.sh


def run_program(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments.split()])
    gpu.main()


def fail(*_args):
    raise ValueError("no luck")


def interrupt(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", roofline.SHAPES)
def test_the_bounds_count_the_weights_of_the_model(name):
    shape = roofline.SHAPES[name]
    network = roofline.build_model(shape, torch.device("meta"), torch.bfloat16)
    weights = sum(parameter.numel() for parameter in network.parameters())
    embedding = shape.vocab_size * shape.hidden_size
    least = roofline.roofline_costs(shape, 2)
    assert least.step_bytes == pytest.approx(2 * (weights - (0 if shape.tie_word_embeddings else embedding)), rel=1e-3)
    assert least.token_flops == pytest.approx(
        2 * (weights - (1 if shape.tie_word_embeddings else 2) * embedding), rel=1e-2
    )


def test_weights_and_kv_cache_of_both_shapes_fit_into_139_gib():
    plan = BenchmarkPlan()
    for name in SHAPES:
        shape = roofline.SHAPES[name]
        costs = roofline.roofline_costs(shape, 2)
        weight_bytes = costs.step_bytes + 2 * shape.vocab_size * shape.hidden_size  # the input embeddings as well
        cache_bytes = plan.kv_cache_tokens(contiguous=False) * costs.token_bytes
        assert weight_bytes + cache_bytes < 0.75 * 139 * 2**30  # the rest is for activations, graphs and masks


def test_the_kv_cache_holds_the_largest_batch_and_the_longest_draft_at_once():
    plan = BenchmarkPlan()
    blocks = plan.kv_cache_tokens(contiguous=False) // BLOCK_SIZE
    batch = max(plan.batch_sizes) * ceil((plan.prompt_tokens + plan.decode_tokens) / BLOCK_SIZE)
    draft = ceil((plan.prompt_tokens + max(plan.draft_lengths) + plan.suffix_tokens) / BLOCK_SIZE)
    assert blocks >= batch + draft


def test_the_estimates_of_both_shapes_leave_time_for_the_tests_within_eight_minutes():
    estimates = [estimated_seconds(roofline.SHAPES[name], BenchmarkPlan()) for name in SHAPES]
    assert sum(estimates) + 120 <= 480
    assert estimates[0] < estimates[1]


@pytest.mark.slow
def test_the_program_can_be_tried_without_a_gpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    run_program(f"{TINY} --profile --json {out}", monkeypatch)
    figures = json.loads(out.read_text())
    assert figures["errors"] == {}
    for mode in ("eager", "cuda_graphs"):
        assert list(figures[mode]["decode"]) == ["1", "3"]
        assert figures[mode]["prompt_tokens_per_s"] > 0 and list(figures[mode]["sampled"]) == ["3"]
        counts = {draft: each["prefixes"] for draft, each in figures[mode]["verification"].items()}
        assert counts == {"20": 3, "40": 5}  # 8, 16, 20 and 8, 16, 24, 32, 40
        fused_call = figures[mode]["fused_call"]
        assert fused_call["accepted_tokens"] == 16 and fused_call["generated_tokens"] == 8
        assert 0 < fused_call["one_call_first_token_ms"] <= fused_call["one_call_ms"]
        assert list(figures["profile"][mode]) == ["1", "3"]
        assert figures[mode]["decode"]["3"]["replayed_share"] == 0.0  # a CPU has no CUDA graphs
    assert list(figures["generate"]["decode"]) == ["1", "3"] and list(figures["generate"]["one_by_one_ms"]) == ["20"]
    assert all(isfinite(each["ms"]) for part in ("generate", "eager") for each in figures[part]["decode"].values())
    assert {"eager/decode/1", "cuda_graphs/fused_call", "generate/decode/3", "run"} <= figures["seconds"].keys()
    output = capsys.readouterr().out
    assert "| 3 |" in output and "| 40 | CUDA graphs | 5 |" in output


@pytest.mark.slow
def test_a_measurement_that_fails_does_not_affect_the_others(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(gpu_measurements, "measure_fused_call", fail)
    with pytest.raises(SystemExit) as ended:
        run_program(f"{TINY} --json {out}", monkeypatch)
    assert ended.value.code == 1
    figures = json.loads(out.read_text())
    assert figures["errors"] == dict.fromkeys(("eager/fused_call", "cuda_graphs/fused_call"), "ValueError: no luck")
    for mode in ("eager", "cuda_graphs"):
        assert "fused_call" not in figures[mode] and "verification_while_decoding_ms" in figures[mode]
    assert list(figures["generate"]["decode"]) == ["1", "3"]
    assert "Failed measurements: eager/fused_call (ValueError: no luck)" in capsys.readouterr().out


def test_a_program_that_is_stopped_keeps_what_it_has_measured(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(gpu_measurements, "measure_verification", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_program(f"{TINY} --json {out}", monkeypatch)
    figures = json.loads(out.read_text())
    assert list(figures["eager"]) == ["decode"] and list(figures["eager"]["decode"]) == ["1", "3"]
    assert "| 3 |" in gpu_table.table(figures)


def test_a_model_that_cannot_be_built_is_reported(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(gpu, "build_model", fail)
    with pytest.raises(SystemExit):
        run_program(f"{TINY} --json {out}", monkeypatch)
    assert json.loads(out.read_text())["errors"] == {"run": "ValueError: no luck"}
    assert "Failed measurements: run (ValueError: no luck)" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_program("", monkeypatch)
    assert "there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--batches 0,1", "--batches one", "--rounds 0", "--decode-tokens 1"])
def test_numbers_that_cannot_be_measured_are_rejected(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(f"--device cpu {arguments}", monkeypatch)
    assert ended.value.code == 2 and arguments.split()[0] in capsys.readouterr().err
