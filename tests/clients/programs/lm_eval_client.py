"""The lm-evaluation-harness of EleutherAI, with tasks whose data are local files."""

import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": FOLDER.name, "OMP_NUM_THREADS": "1"}

import checks
from lm_eval import simple_evaluate

MODEL_PATH = os.environ["MODEL_PATH"]
COMPLETIONS = {"model": checks.MODEL, "base_url": f"{checks.BASE_URL}/completions", "tokenizer": MODEL_PATH}
CHAT = {"model": checks.MODEL, "base_url": f"{checks.BASE_URL}/chat/completions"}
NAMES = "Ada Ben Dan Finn Jack Kim Leo Max Nora Quinn Rosa Sam Tess Uma Will".split()
ENGLISH = """
The library opens at nine in the morning, and the reading room stays open until late. Nobody expected the rain to last
for a week. She wrote two letters, one to her brother and one to the editor of a newspaper in Zürich. A cat slept on the
warm stones while the fishermen mended their nets. "Where did you put the keys?" asked the café's owner. Most of the
bridges were built in 1874; three of them are still in use today. He counted the money twice - $350, or about €320 - and
put it back.
""".split()
NUMBER_OF_ITEMS = 200
Sample = tuple[float, bool]


def items() -> list[dict[str, str]]:
    """Returns contexts and continuations: about records, as the demo pair knows them, and from any English text."""
    generator = random.Random(17)
    half = NUMBER_OF_ITEMS // 2
    return [record_item(generator) for _ in range(half)] + [english_item(generator, number) for number in range(half)]


def record_item(generator: random.Random) -> dict[str, str]:
    """Returns a question about records with a part of an answer, which is right or wrong."""
    record, score = generator.sample(range(10, 99), 2)
    name, rival, stranger = generator.sample(NAMES, 3)
    question = f"{name} has the record with {record}. In turn: first {rival} {score}. Who has the record now?"
    comparison, leader, best = ("above", rival, score) if score > record else ("below", name, record)
    answer = f"First, {rival} scores {score}, {comparison} {record}, so"
    right, wrong = f" {leader} leads with {best}", f" {stranger} leads with {generator.randrange(100)}"
    continuation = generator.choice([right, right, wrong]) + generator.choice(["", "."])
    return {"context": f"<|user|>{question}<|end|><|assistant|>{answer}", "continuation": continuation}


def english_item(generator: random.Random, number: int) -> dict[str, str]:
    """Returns a piece of the text. The number makes it unique.

    The backend for Transformers confuses items with the same text that are divided into context and continuation at
    different places.
    """
    start = generator.randrange(len(ENGLISH) - 20)
    length, added = generator.randrange(1, 15), generator.randrange(1, 6)
    words = ENGLISH[start : start + length + added]
    return {"context": f"{number}. {' '.join(words[:length])}", "continuation": f" {' '.join(words[length:])}"}


def question_items() -> list[dict[str, str]]:
    others = [
        "Kim has the record with 27. In turn: first Uma 73, second Max 52. Who has the record now?",
        "Leo has the record with 64. In turn: first Ada 31, second Finn 88, third Sam 12. Who has the record now?",
    ]
    return [{"question": checks.QUESTION}, *({"question": question} for question in others)]


def evaluate(
    model: str,
    arguments: Mapping[str, object],
    documents: Sequence[Mapping[str, str]],
    task: Mapping[str, object],
    **options,
) -> list:
    """Runs a task and returns the first response of each item."""
    data = Path(FOLDER.name) / f"{task['task']}.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    results = simple_evaluate(model, model_args=dict(arguments), tasks=[config | task], bootstrap_iters=0, **options)
    samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(documents), f"{len(samples)} samples of {len(documents)} documents"
    return [sample["resps"][0][0] for sample in samples]


def log_likelihoods(model: str, arguments: Mapping[str, object]) -> list[Sample]:
    task = {
        "task": "continuations",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{continuation}}",
        "metric_list": [{"metric": "acc"}],
    }
    responses = evaluate(model, arguments, items(), task)
    return [(float(log_likelihood), is_greedy in (True, "True")) for log_likelihood, is_greedy in responses]


def generated(model: str, arguments: Mapping[str, object]) -> list[str]:
    task = {
        "task": "questions",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "",
        "metric_list": [{"metric": "exact_match"}],
    }
    return evaluate(model, arguments, question_items(), task, apply_chat_template=True)


def check_log_likelihoods(samples: Sequence[Sample], expected: Sequence[Sample]) -> None:
    greedy = sum(is_greedy for _, is_greedy in expected)
    assert 20 <= greedy <= NUMBER_OF_ITEMS - 20, f"{greedy} continuations are greedy, so the comparison says little"
    wrong = [
        (number, mine, theirs)
        for number, (mine, theirs) in enumerate(zip(samples, expected, strict=True))
        if not abs(mine[0] - theirs[0]) < 1e-3 or mine[1] != theirs[1]
    ]
    assert not wrong, f"{len(wrong)} of {len(expected)} differ (item, server, Transformers): {wrong[:5]}"


def check_answers(answers: Sequence[str]) -> None:
    checks.check_text(answers[0])
    for answer in answers[1:]:
        assert "has the record now" in answer.splitlines()[-1], answer


@checks.check("log-likelihoods equal those of Transformers to 1e-3")
def local_completions() -> None:
    check_log_likelihoods(log_likelihoods("local-completions", COMPLETIONS), TRANSFORMERS)


@checks.check("log-likelihoods in concurrent batches")
def batches() -> None:
    arguments = COMPLETIONS | {"num_concurrent": 2, "batch_size": 8}
    check_log_likelihoods(log_likelihoods("local-completions", arguments), TRANSFORMERS)


@checks.check("log-likelihoods of prompts that are sent as text")
def text_prompts() -> None:
    arguments = COMPLETIONS | {"tokenized_requests": False}
    check_log_likelihoods(log_likelihoods("local-completions", arguments), TRANSFORMERS)


@checks.check("generated answers (completions)")
def completions() -> None:
    check_answers(generated("local-completions", COMPLETIONS))


@checks.check("generated answers (chat)")
def chat() -> None:
    check_answers(generated("local-chat-completions", CHAT))


TRANSFORMERS = log_likelihoods("hf", {"pretrained": MODEL_PATH, "device": "cpu"})
checks.main()
