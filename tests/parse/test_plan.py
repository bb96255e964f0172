"""The program that prints the plan of a model."""

import pytest

from parse import plan
from parse.demo import DEMO_DRAFT
from parse.engines.native import kernel_selection, step_timing


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "parse-serve" / "plans"


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_it_measures_a_plan_and_prints_the_same_one_later(cache_folder, capsys, monkeypatch):
    assert plan.main([DEMO_DRAFT, "--num-threads", "1"]) == 0
    first = printed(capsys)
    (file,) = cache_folder.glob("*.json")
    assert any(str(file) in line for line in first)
    assert any(line.startswith("linear layer") for line in first)
    assert any(line.startswith("64 tokens") for line in first)
    assert first[-1].startswith("stride")

    def unexpected(*_):
        pytest.fail("measured again")

    monkeypatch.setattr(kernel_selection, "select_kernels", unexpected)
    monkeypatch.setattr(step_timing, "measure_step_seconds", unexpected)
    assert plan.main([DEMO_DRAFT, "--num-threads", "1"]) == 0
    assert printed(capsys) == first


def test_a_model_that_cannot_be_loaded_is_named_in_one_line(capsys):
    assert plan.main(["/nowhere"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "/nowhere: /nowhere is not a directory\n" and not captured.out
