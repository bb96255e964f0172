"""An engine that starts and supervises a vLLM server: it ends with its replica, and it starts again when it is lost."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from parse import EngineSettings, Pair
from parse.config import VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.deployment_check import check_models
from parse.engine_config import VLLMEngineConfig
from parse.engines.loader import load_engine
from parse.engines.vllm import server_process
from parse.engines.vllm.command import SERVER_MODULE, command_line
from parse.errors import ModelLoadError
from tests.parse.engines.vllm.fake_cli import write_executable
from training.measure import draw_problems

ROOT = Path(__file__).parents[4]
PROBLEM = draw_problems(5, 1)[0].question
START_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def executable(tmp_path_factory):
    return write_executable(tmp_path_factory.mktemp("vllm"))


def settings(executable, *, engine_args=None, **config):
    engine = VLLMEngineConfig(
        kind="vllm",
        executable=executable,
        engine_args=engine_args or {},
        environment={"OMP_NUM_THREADS": "1"},
        start_timeout_s=START_TIMEOUT_S,
        **config,
    )
    return EngineSettings(model=DEMO_TARGET, max_model_len=512, engine=engine)


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(pid):
    return {process.pid: process for process in psutil.Process(pid).children(recursive=True)}


def alive(processes):
    return [p for p in processes.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def started(executable, **options):
    """Yields an engine, the processes of its server, and the supervisor among them."""
    before = set(descendants(os.getpid()))
    engine = load_engine(settings(executable, **options))
    processes = {pid: p for pid, p in descendants(os.getpid()).items() if pid not in before}
    try:
        yield engine, processes
    finally:
        engine.shutdown()


def command_of(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []


def server_of(processes):
    commands = {process: command_of(process) for process in processes.values()}
    return next(p for p, command in commands.items() if SERVER_MODULE in command and "-I" not in command)


def test_arguments_are_written_as_vllm_reads_them():
    assert command_line(
        {
            "tensor_parallel_size": 4,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "quantization": None,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
            "served_names": ["a", "b"],
        }
    ) == [
        *("--tensor-parallel-size", "4", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}', "--served-names", "a", "b"),
    ]


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"port": 8001}, "must not contain port"),
        ({"max-model-len": 8}, "must not contain max_model_len: set it beside"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size must be a positive whole number"),
        ({"--dtype": "half"}, "must be names of vLLM's arguments"),
    ],
)
def test_arguments_that_the_replica_sets_itself_are_rejected(engine_args, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngineConfig(kind="vllm", engine_args=engine_args)


def test_a_killed_server_starts_again_and_no_request_is_lost(executable):
    others = set(descendants(os.getpid()))  # for example the vLLM that other tests use
    with (
        Pair(settings(executable), EngineSettings(model=DEMO_DRAFT, num_threads=1)) as pair,
        Pair(EngineSettings(model=DEMO_TARGET, num_threads=1, max_model_len=512), DEMO_DRAFT) as native_pair,
    ):
        expected = native_pair.generate(PROBLEM, mode="full", temperature=0).text

        def read_stats():
            return pair._event_loop.run(pair.target.read_stats())

        async def answer_while_killed():
            server = server_of({pid: p for pid, p in descendants(os.getpid()).items() if pid not in others})
            call = asyncio.create_task(pair.agenerate(PROBLEM, mode="full", temperature=0))
            await asyncio.sleep(0.05)
            server.kill()
            return await call

        def has_restarted(number):
            stats = read_stats()
            return stats.num_server_restarts == number and stats.servers_responding

        for number in (1, 2):
            assert asyncio.run(answer_while_killed()).text == expected
            until(partial(has_restarted, number))
        stats = read_stats()
        assert 'vllm:num_requests_running{engine="0"} 2.0' in stats.server_metrics


def test_a_server_that_hangs_is_replaced(executable, monkeypatch):
    monkeypatch.setattr(server_process, "HEALTH_PERIOD_S", 0.2)
    monkeypatch.setattr(server_process, "HEALTH_TIMEOUT_S", 0.5)
    with started(executable, stall_timeout_s=2.0) as (engine, processes):
        server_of(processes).send_signal(signal.SIGSTOP)
        until(lambda: asyncio.run(engine.read_stats()).num_server_restarts == 1 and not alive(processes))
        until(lambda: asyncio.run(engine.read_stats()).servers_responding == 1)


@pytest.mark.parametrize("victims", ["replica", "outer", "inner", "server", "outer replica", "outer inner"])
def test_all_processes_of_the_server_end_with_any_of_these(executable, victims, tmp_path):
    """When a worker of Ray exits, Ray kills its direct children too."""
    program = (
        "import sys, time\n"
        "from tests.parse.engines.vllm.test_vllm_engine import load_engine, settings\n"
        "engine = load_engine(settings(sys.argv[1], engine_args={'fail_if_exists': sys.argv[2]}))\n"
        "print('ready', flush=True)\n"
        "time.sleep(1000)\n"
    )
    prevents_start = tmp_path / "prevents start"
    with subprocess.Popen(
        [sys.executable, "-c", program, executable, str(prevents_start)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as replica:
        assert replica.stdout is not None and replica.stdout.readline() == "ready\n"
        processes = descendants(replica.pid)
        assert len(processes) == 4  # two supervisors, the server and its own process
        server = server_of(processes)
        inner = server.parent()
        by_name = {"replica": psutil.Process(replica.pid), "outer": inner.parent(), "inner": inner, "server": server}
        prevents_start.touch()
        for name in victims.split():
            by_name[name].kill()
        until(lambda: not alive(processes))
        replica.kill()


def test_the_folder_of_the_socket_is_removed(executable):
    with started(executable) as (engine, processes):
        socket_path = engine._server.socket_path
        assert socket_path.exists() and socket_path.parent.stat().st_mode & 0o777 == 0o700
    assert not alive(processes) and not socket_path.parent.exists()


def test_a_server_that_does_not_start_is_reported_in_its_own_words(executable, tmp_path):
    with pytest.raises(ValueError, match=r"vLLM does not start \(exit code 1\): ValueError: No memory is left$"):
        load_engine(settings(executable, engine_args={"fail_if_exists": str(tmp_path)}))


def test_after_failed_starts_the_replica_is_reported_as_broken(executable, tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "RESTART_DELAY_S", 0.1)
    prevents_start = tmp_path / "prevents start"
    with started(executable, engine_args={"fail_if_exists": str(prevents_start)}) as (engine, processes):
        engine.check_health()
        prevents_start.touch()
        server_of(processes).kill()
        until(lambda: engine._server.failure is not None)
        with pytest.raises(RuntimeError, match="No memory is left"):
            engine.check_health()
        assert not alive(processes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_args": {"no_such": 1}}, "vllm serve: error: unrecognized arguments: --no-such"),
        ({"executable": "/no/such/python"}, "there is no /no/such/python"),
    ],
)
def test_a_deployment_is_checked_before_it_replaces_anything(executable, options, message):
    target = settings(**({"executable": executable} | options))
    with pytest.raises(ModelLoadError, match=message):
        check_models(target, None, VerificationSettings(), on_this_node=True)


def test_too_few_gpus_are_reported(executable, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(ValueError, match="need 4 GPUs, and 2 are assigned"):
        load_engine(settings(executable, engine_args={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}))
