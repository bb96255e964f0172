import json
import sys
from math import isfinite

import pytest
import torch

from bench import gpu, roofline


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


@pytest.mark.slow
def test_the_program_can_be_tried_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    out = tmp_path / "figures.json"
    command = f"gpu --shape tiny --device cpu --batches 3,1 --context 40 --json {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    gpu.main()
    figures = json.loads(out.read_text())
    assert list(figures["recorded"]["decode_ms"]) == ["1", "3"]
    # Times of so few tokens mean nothing. Their differences may even be negative.
    assert all(
        isfinite(ms) for method in ("generate", "ordinary", "recorded") for ms in figures[method]["decode_ms"].values()
    )
    assert "| 3 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU here" in capsys.readouterr().err
