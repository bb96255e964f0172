import logging
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch

from parse.engines.native import plan_store
from parse.engines.native.plan_store import FilePlanStore, ModelPlan, PlanKey
from tests.parse.engines.native.tiny import build


@pytest.fixture
def store(tmp_path):
    return FilePlanStore(tmp_path / "plans")


@pytest.fixture(scope="module")
def key():
    return PlanKey.of(build("llama"))


def unexpected():
    pytest.fail("measured again")


def test_a_plan_is_created_once_and_read_later(store, key):
    assert store.get_or_create(key, "kernels", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    assert store.get_or_create(key, "step_seconds", lambda: [[1, 0.5]]) == [[1, 0.5]]
    later = FilePlanStore(store.folder)
    assert later.get_or_create(key, "kernels", unexpected) == {"a": [1, 2]}
    assert later.get_or_create(key, "step_seconds", unexpected) == [[1, 0.5]]


def test_models_share_a_plan_if_their_architecture_is_the_same(key, monkeypatch):
    assert PlanKey.of(build("llama", seed=5)) == key
    assert PlanKey.of(build("llama", hidden_size=64)) != key
    assert PlanKey.of(build("llama").bfloat16()) != key
    assert PlanKey.of(build("llama"), quantization="int8") != key
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert PlanKey.of(build("llama")) != key


@pytest.mark.parametrize("change", [dict(processor="another"), dict(versions="torch 1.0"), dict(num_threads=9)])
def test_a_plan_of_another_processor_or_version_is_ignored(store, key, change, caplog):
    other = replace(key, **change)
    store.get_or_create(other, "kernels", lambda: "old")
    store.path(other).rename(store.path(key))
    with caplog.at_level(logging.WARNING):
        assert store.get_or_create(key, "kernels", lambda: "new") == "new"
    ((name, value),) = change.items()
    assert f"{name} {value!r} instead of" in caplog.text
    assert store.get_or_create(key, "kernels", unexpected) == "new"


def test_a_plan_of_an_older_version_is_replaced(store, key):
    older = replace(key, versions="torch 1.0")
    store.get_or_create(older, "kernels", lambda: "old")
    assert store.get_or_create(key, "kernels", lambda: "new") == "new"
    assert len(list(store.folder.glob("*.json"))) == 1


@pytest.mark.parametrize(
    "text", ["", "{", '{"key": {}}', "[]", "null", '{"key": 3, "sections": []}', '{"key": "a", "sections": {}}']
)
def test_a_damaged_file_is_ignored(store, key, text, caplog):
    store.get_or_create(key, "kernels", lambda: "first")
    store.path(key).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert store.get_or_create(key, "kernels", lambda: "second") == "second"
    assert "measured again" in caplog.text
    assert store.get_or_create(key, "kernels", unexpected) == "second"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_half_written_file_is_ignored(store, key, share):
    store.get_or_create(key, "kernels", lambda: "first")
    data = store.path(key).read_bytes()
    store.path(key).write_bytes(data[: int(share * len(data))])
    assert store.get_or_create(key, "kernels", lambda: "second") == "second"


def test_a_measurement_that_fails_leaves_no_file(store, key):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.get_or_create(key, "kernels", fail)
    assert not list(store.folder.glob("*.json")) and not list(store.folder.glob("*.tmp"))
    assert store.get_or_create(key, "kernels", lambda: "later") == "later"


def test_without_a_folder_that_can_be_written_the_plan_is_measured_each_time(tmp_path, key, caplog):
    (tmp_path / "file").write_text("")
    store = FilePlanStore(tmp_path / "file" / "plans")
    with caplog.at_level(logging.WARNING):
        assert store.get_or_create(key, "kernels", lambda: "measured") == "measured"
    assert "each start measures it again" in caplog.text


def create_slowly(folder, key, number, results):
    def create():
        time.sleep(0.3)
        return number

    results.put(FilePlanStore(folder).get_or_create(key, "kernels", create))


def test_processes_that_start_together_get_the_same_plan(store, key):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=create_slowly, args=(store.folder, key, n, results)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len({results.get(timeout=10) for _ in processes}) == 1


def test_plans_are_kept_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FilePlanStore().folder == tmp_path / "parse-serve" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert FilePlanStore().folder == tmp_path / "home" / ".cache" / "parse-serve" / "plans"


def test_the_processor_has_a_name_and_its_instruction_sets():
    assert plan_store.processor() == plan_store.processor() != ""


def test_a_loaded_model_has_a_plan(store):
    plan = ModelPlan.of(build("llama"), store=store)
    assert plan.get_or_create("kernels", lambda: [1]) == plan.get_or_create("kernels", unexpected) == [1]
