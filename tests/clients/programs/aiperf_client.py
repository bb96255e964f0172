"""AIPerf of NVIDIA, with benchmarks of a few requests."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import checks

FOLDER = tempfile.TemporaryDirectory()
# With HF_HUB_OFFLINE it takes tokenizers from the cache of the hub only, and not from a folder.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
}
ENVIRONMENT |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": FOLDER.name}
ADDRESS = checks.BASE_URL.removesuffix("/v1")
REQUESTS, PROMPT_TOKENS, ANSWER_TOKENS = 6, 64, 16


def run(*options: str, requests: int = REQUESTS) -> tuple[dict, Path]:
    """Runs a benchmark. Returns its report and the folder with the other exports. All requests must be successful."""
    exports = Path(tempfile.mkdtemp(dir=FOLDER.name))
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", checks.MODEL, "--url", ADDRESS]
    command += ["--tokenizer", os.environ["MODEL_PATH"], "--request-count", str(requests), *options]
    command += ["--artifact-dir", str(exports), "--ui", "none"]
    done = subprocess.run(command, cwd=FOLDER.name, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-1000:]}"
    report = json.loads((exports / "profile_export_aiperf.json").read_text())
    counts = (figure(report, "request_count"), figure(report, "completed_request_count"))
    assert report["is_complete"] and not report["error_summary"], report["error_summary"]
    assert counts == (requests, requests), f"{counts} of {requests} requests"
    return report, exports


def figure(report: dict, name: str) -> float:
    return report[name]["avg"]


def check_synthetic(*options: str) -> Path:
    """Runs a benchmark with synthetic prompts on two connections and checks its figures."""
    sizes = ["--synthetic-input-tokens-mean", str(PROMPT_TOKENS), "--output-tokens-mean", str(ANSWER_TOKENS)]
    # The whole length of an answer needs a field that AIPerf recommends.
    report, exports = run(*options, *sizes, "--extra-inputs", "ignore_eos:true", "--concurrency", "2")
    assert figure(report, "total_usage_completion_tokens") == REQUESTS * ANSWER_TOKENS
    assert figure(report, "output_sequence_length") == ANSWER_TOKENS
    prompt_tokens = figure(report, "total_usage_prompt_tokens") / REQUESTS
    assert abs(prompt_tokens - PROMPT_TOKENS) <= 4, f"{prompt_tokens} tokens"  # with or without the chat template
    return exports


@checks.check("streamed chat benchmark, with the metrics of the server")
def streamed_chat() -> None:
    exports = check_synthetic("--endpoint-type", "chat", "--streaming")
    metrics = json.loads((exports / "server_metrics_export.json").read_text())["metrics"]
    answers = sum(series["stats"]["total"] for series in metrics["parse_answers"]["series"])
    assert answers == REQUESTS, f"the metrics count {answers} answers"


@checks.check("chat benchmark")
def chat() -> None:
    check_synthetic("--endpoint-type", "chat")


@checks.check("streamed completions benchmark")
def streamed_completions() -> None:
    check_synthetic("--endpoint-type", "completions", "--streaming")


@checks.check("benchmark with questions from a file")
def questions() -> None:
    file = Path(FOLDER.name) / "questions.jsonl"
    file.write_text(json.dumps({"text": checks.QUESTION}) + "\n")
    options = ["--input-file", str(file), "--custom-dataset-type", "single_turn", "--extra-inputs", "temperature:0"]
    _, exports = run("--endpoint-type", "chat", *options, "--export-level", "raw", requests=1)
    (record,) = (json.loads(line) for line in (exports / "profile_export_raw.jsonl").read_text().splitlines())
    (response,) = record["responses"]
    checks.check_text(json.loads(response["text"])["choices"][0]["message"]["content"])


checks.main()
