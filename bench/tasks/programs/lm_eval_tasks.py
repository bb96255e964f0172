"""Prepares and grades the tasks of lm-eval (the lm-evaluation-harness of EleutherAI).

lm-eval evaluates a model that it calls. Here this model is a recorder: to prepare, it records the requests of lm-eval,
and to grade, it returns the answers that a server has given to them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol import data_file, serve_request
from selection import take_in_turns


@dataclass(frozen=True)
class TaskDefinition:
    """Which task of lm-eval is used, and which of its metrics says whether an answer is correct.

    Instruct models write an answer in their own form. So the metric is the one that accepts the most forms.
    """

    files: str
    """The definitions in the folder of lm-eval's tasks. MMLU-Pro has one for each category."""
    metric: str
    filter: str
    splits: Sequence[str] = ("test",)


TASKS = {
    # No examples in the prompt. The last number of the answer is the result.
    "gsm8k": TaskDefinition("gsm8k/gsm8k-cot-zeroshot.yaml", "exact_match", "flexible-extract"),
    # Four examples. math_verify compares formulas, in a box or after "The final answer is".
    "math500": TaskDefinition("minerva_math/minerva_math500.yaml", "math_verify", "none"),
    # Five examples of the same category. The letter after "answer is" is the result.
    "mmlu_pro": TaskDefinition("mmlu_pro/mmlu_pro_*.yaml", "exact_match", "custom-extract", ("test", "validation")),
}

RequestKey = tuple[str, int]
"""The name of a task of lm-eval, and the number of a problem."""


@dataclass
class RequestRecorder:
    """What lm-eval asks of a model."""

    answers: Mapping[RequestKey, str] = field(default_factory=dict)
    requests: dict[RequestKey, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def generate_until(self, instances: Sequence[Any]) -> list[str]:
        keys = [(instance.task_name, instance.doc_id) for instance in instances]
        self.requests = {key: instance.args for key, instance in zip(keys, instances, strict=True)}
        return [self.answers.get(key, "") for key in keys]


def load_tasks(definition: TaskDefinition, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the tasks of lm-eval by name."""
    data_files = {split: data_file(request, split) for split in definition.splits}
    import lm_eval.tasks

    files = sorted(Path(lm_eval.tasks.__file__).parent.glob(definition.files))
    if request["data_dir"] is not None:
        files = [with_local_data(file, data_files) for file in files]
    # The default is to search the definitions of all tasks, which takes long.
    return lm_eval.tasks.TaskManager(include_defaults=False).load(list(map(str, files)))["tasks"]


def with_local_data(definition: Path, data_files: Mapping[str, str | None]) -> Path:
    """Writes a definition that reads the data set from files, and is otherwise the same."""
    settings: dict[str, Any] = {"include": str(definition), "dataset_path": "json", "dataset_name": None}
    settings |= {"training_split": None, "fewshot_split": "validation" if "validation" in data_files else None}
    settings["dataset_kwargs"] = {"data_files": dict(data_files), "cache_dir": str(Path.cwd())}
    file = Path(definition.name)  # in the current folder, which is temporary
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file.resolve()


def select(tasks: Mapping[str, Any], limit: int) -> dict[str, list[int]]:
    """Returns the numbers of the problems of each task that are used."""
    groups = [[(name, number) for number in range(min(limit, len(task.eval_docs)))] for name, task in tasks.items()]
    selected: dict[str, list[int]] = {}
    for name, number in take_in_turns(groups, limit):
        selected.setdefault(name, []).append(number)
    return selected


def evaluate(
    tasks: Mapping[str, Any], selected: Mapping[str, list[int]], recorder: RequestRecorder
) -> Mapping[str, Any]:
    """Lets lm-eval evaluate the recorder, and returns what it says about each problem."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate as evaluate_model

    class RecordedModel(LM):
        tokenizer_name = "none"

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return recorder.generate_until(requests)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("the tasks are generative")

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError("the tasks are generative")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return json.dumps(chat_history)

    results = evaluate_model(
        RecordedModel(),
        {"tasks": {name: tasks[name] for name in selected}, "groups": {}, "group_map": {}},
        samples=dict(selected),
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return results["samples"]


def in_turns(selected: Mapping[str, Sequence[int]]) -> list[RequestKey]:
    """Returns the problems in the order of the answers."""
    groups = [[(name, number) for number in numbers] for name, numbers in selected.items()]
    return take_in_turns(groups, sum(map(len, groups)))


def prepare(request: Mapping[str, Any]) -> Mapping[str, Any]:
    tasks = load_tasks(TASKS[request["task"]], request)
    selected = select(tasks, request["limit"])
    recorder = RequestRecorder()
    evaluate(tasks, selected, recorder)
    return {"problems": [prepare_problem(key, *recorder.requests[key]) for key in in_turns(selected)]}


def prepare_problem(key: RequestKey, chat: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"id": problem_id(key), "messages": json.loads(chat), "stop": arguments["until"]}


def problem_id(key: RequestKey) -> str:
    return f"{key[0]}/{key[1]}"


def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
    definition = TASKS[request["task"]]
    tasks = load_tasks(definition, request)
    selected = select(tasks, request["limit"])
    keys = in_turns(selected)
    grades = {}
    for mode, answers in request["answers"].items():
        samples = evaluate(tasks, selected, RequestRecorder(dict(zip(keys, answers, strict=True))))
        by_key = {
            (name, sample["doc_id"]): float(sample[definition.metric])
            for name, of_task in samples.items()
            for sample in of_task
            if sample["filter"] == definition.filter
        }
        grades[mode] = [by_key[key] for key in keys]
    return {"ids": list(map(problem_id, keys)), "grades": grades}


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    serve_request({"prepare": prepare, "grade": grade})
