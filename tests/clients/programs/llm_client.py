"""llm, the command-line tool, with a file that adds models."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import checks

MODELS = [
    {"model_id": "demo", "model_name": checks.MODEL, "api_base": checks.BASE_URL, "supports_schema": True},
    {"model_id": "weather", "model_name": checks.MODEL, "api_base": checks.TOOLS_BASE_URL, "supports_tools": True},
    {"model_id": "text", "model_name": checks.MODEL, "api_base": checks.BASE_URL, "completion": True},
]
TASK = "What is the weather in Paris?"
TOOL = f'''
def get_weather(city: str) -> str:
    """Returns the weather in a city."""
    return {checks.WEATHER!r} if city == "Paris" else "unknown"
'''


def llm(*arguments: str, input_text: str = "") -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(MODELS))  # JSON is a part of YAML
        done = subprocess.run(
            [str(Path(sys.executable).parent / "llm"), *arguments],
            env=os.environ | {"LLM_USER_PATH": folder},
            input=input_text,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done


@checks.check("streamed chat")
def stream() -> None:
    checks.check_text(llm("prompt", checks.QUESTION, "-m", "demo", "-o", "temperature", "0").stdout.strip())


@checks.check("chat")
def chat() -> None:
    answer = llm("prompt", checks.QUESTION, "-m", "demo", "-o", "temperature", "0", "--no-stream")
    checks.check_text(answer.stdout.strip())


@checks.check("conversation")
def conversation() -> None:
    answer = llm("chat", "-m", "weather", input_text="Hello.\nHello.\nquit\n")
    assert answer.stdout.count("I will look.") == 2, answer.stdout


@checks.check("completions")
def completions() -> None:
    assert llm("prompt", "Hello.", "-m", "text", "-o", "max_tokens", "8").stdout.strip()


@checks.check("token usage")
def usage() -> None:
    for options in ([], ["--no-stream"]):
        report = llm("prompt", checks.QUESTION, "-m", "demo", "--usage", *options).stderr
        assert re.search(r"Token usage: [1-9]\d* input, [1-9]\d* output", report), report


@checks.check("agent with a tool")
def agent_with_tool() -> None:
    answer = llm("prompt", TASK, "-m", "weather", "--functions", TOOL, "--no-stream").stdout
    checks.check_weather(answer)
    assert "The tool says" in answer, answer


@checks.check("streamed agent with a tool")
def stream_agent() -> None:
    answer = llm("prompt", TASK, "-m", "weather", "--functions", TOOL).stdout
    checks.check_weather(answer)
    assert "The tool says" in answer, answer


@checks.rejected("structured output", "response_format")
def structured() -> None:
    llm("prompt", checks.QUESTION, "-m", "demo", "--schema", "name, points int")


checks.main()
