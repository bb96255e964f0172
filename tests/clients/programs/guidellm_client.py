"""GuideLLM, with benchmarks of a few requests."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import checks

FOLDER = tempfile.TemporaryDirectory()
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": FOLDER.name}
TOKENIZER = f"kind=huggingface_auto,model={os.environ['MODEL_PATH']}"
REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 6, 64, 16


def run(backend: Mapping[str, object], *options: str) -> dict:
    """Runs a benchmark and returns its report. All requests must be successful."""
    path = Path(FOLDER.name) / "report.json"
    path.unlink(missing_ok=True)
    server = json.dumps({"kind": "openai_http", "target": checks.BASE_URL} | dict(backend))
    command = [sys.executable, "-m", "guidellm", "run", "--backend", server, "--tokenizer", TOKENIZER, *options]
    command += ["--output", f"kind=json,path={path}", "--disable-progress"]
    done = subprocess.run(command, cwd=FOLDER.name, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-2000:]}"
    (report,) = json.loads(path.read_text())["benchmarks"]
    errors = [request["info"]["error"] for request in report["requests"]["errored"]]
    assert not errors and not report["requests"]["incomplete"], f"{len(errors)} errors: {errors[:2]}"
    return report


def check_synthetic(backend: Mapping[str, object]) -> None:
    """Runs a benchmark with synthetic prompts on two connections and checks its figures."""
    data = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}"
    profile = "kind=concurrent,streams=2"
    report = run(backend, "--data", data, "--profile", profile, "--constraint", f"kind=max_requests,count={REQUESTS}")
    totals = report["metrics"]["request_totals"]
    assert totals == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}, totals
    for request in report["requests"]["successful"]:
        prompt, answer = request["input_metrics"]["text_tokens"], request["output_metrics"]["text_tokens"]
        assert PROMPT_TOKENS <= prompt <= PROMPT_TOKENS + 4, f"a prompt has {prompt} tokens"  # with the chat template
        assert answer == ANSWER_TOKENS, f"an answer has {answer} tokens"


@checks.check("chat benchmark")
def chat() -> None:
    check_synthetic({})


@checks.check("chat benchmark without streams")
def chat_without_streams() -> None:
    check_synthetic({"stream": False})


@checks.check("completions benchmark")
def completions() -> None:
    check_synthetic({"request_format": "/v1/completions"})


@checks.check("benchmark with questions from a file")
def questions() -> None:
    file = Path(FOLDER.name) / "questions.jsonl"
    file.write_text(json.dumps({"question": checks.QUESTION}) + "\n")
    backend = {"extras": {"body": {"temperature": 0}}}
    report = run(backend, "--data", f"kind=json_file,path={file}", "--profile", "kind=synchronous")
    (request,) = report["requests"]["successful"]
    checks.check_text(request["output"])


checks.main()
