"""Loads the tasks that `bench.quality` knows by name, and problems in files."""

from dataclasses import dataclass
from pathlib import Path

from bench.tasks.harness import HarnessTask, ProblemSource
from bench.tasks.judge import JudgeOptions
from bench.tasks.local import DEMO, demo_task, file_task
from bench.tasks.mt_bench import MTBenchTask
from bench.tasks.task import BenchmarkTask, TaskUnavailable

MT_BENCH = "mtbench"
# The program that prepares and grades a task, and the limit of its answers in tokens.
HARNESS_TASKS = {
    "gsm8k": ("lm_eval_tasks", 1024),
    "math500": ("lm_eval_tasks", 2048),
    "mmlu_pro": ("lm_eval_tasks", 2048),
    "humaneval": ("evalplus_tasks", 1024),
    "mbpp": ("evalplus_tasks", 1024),
}
NAMES = (DEMO, *HARNESS_TASKS, MT_BENCH)


@dataclass(frozen=True)
class TaskOptions:
    """What the user has chosen for all tasks."""

    limit: int
    seed: int = 1
    result: str | None = None
    data_dir: str | None = None
    judge: JudgeOptions | None = None


def load_task(name: str, options: TaskOptions) -> BenchmarkTask:
    """Returns a task by its name, or the problems of a file."""
    data_dir = options.data_dir and str(Path(options.data_dir).resolve())  # programs run in another folder
    source = ProblemSource(name, options.limit, data_dir)
    if name == DEMO:
        return demo_task(options.limit, options.seed)
    if name == MT_BENCH:
        if options.judge is None:
            raise TaskUnavailable(f"{name}: a judge model grades its answers, so --judge must be set")
        return MTBenchTask.load(source, options.judge)
    if name in HARNESS_TASKS:
        return HarnessTask.load(HARNESS_TASKS[name][0], source, HARNESS_TASKS[name][1])
    if not Path(name).exists():
        raise TaskUnavailable(f"{name}: is neither a file nor one of the tasks {', '.join(NAMES)}")
    return file_task(name, options.limit, options.result)
