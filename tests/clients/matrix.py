"""The clients that are tested against the server, and what the page docs/clients.md says about them."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from parse.config import EngineSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.pair import Pair
from tests.clients.environments import NODE_LOCKS, install, install_node, locked_version
from tests.deployments.live import LocalBackend, served
from tests.deployments.tool_model import ToolCaller, with_tool_template
from training.measure import draw_problems

MODEL = "demo-target"
PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_S = 600


@dataclass(frozen=True)
class Client:
    name: str
    title: str
    packages: tuple[str, ...]
    """What is installed. The first one is the client, and its version is in docs/clients.md."""
    in_make_test: bool = False
    """Whether `make test` runs it."""
    in_node: bool = False

    @property
    def program(self) -> Path:
        return PROGRAMS / (f"{self.name}.mjs" if self.in_node else f"{self.name}.py")

    @property
    def version(self) -> str:
        if not self.in_node:
            return locked_version(self.name, self.packages[0])
        packages = json.loads((NODE_LOCKS / "package-lock.json").read_text())["packages"]
        version: str = packages[f"node_modules/{self.packages[0]}"]["version"]
        return version


CLIENTS = (
    Client("openai_client", "OpenAI for Python", ("openai",), in_make_test=True),
    Client("openai_node", "OpenAI for JavaScript", ("openai",), in_node=True),
    Client("langchain_client", "LangChain, with agents", ("langchain", "langchain-openai"), in_make_test=True),
    Client("litellm_client", "LiteLLM", ("litellm",), in_make_test=True),
    Client("instructor_client", "instructor", ("instructor",)),
    Client("pydantic_ai_client", "Pydantic AI", ("pydantic-ai-slim[openai]",)),
    Client("openai_agents", "OpenAI Agents SDK", ("openai-agents",)),
    Client("autogen_client", "AutoGen", ("autogen-agentchat", "autogen-ext[openai]"), in_make_test=True),
    Client("llama_index_client", "LlamaIndex", ("llama-index-llms-openai-like",)),
    Client("ai_sdk", "AI SDK", ("ai", "@ai-sdk/openai-compatible", "zod"), in_node=True),
    Client("llm_client", "llm", ("llm",)),
    Client("lm_eval_client", "lm-evaluation-harness", ("lm-eval[api,hf]", "torch==2.13.0")),
    Client("inspect_client", "Inspect", ("inspect-ai", "openai")),
    Client("guidellm_client", "GuideLLM", ("guidellm", "torch==2.13.0")),
    Client("aiperf_client", "AIPerf", ("aiperf",)),
)


@dataclass(frozen=True)
class CheckResult:
    title: str
    result: Literal["works", "rejected", "failed"]
    detail: str


@contextmanager
def servers() -> Iterator[Mapping[str, str]]:
    """Runs the demo pair and a model that calls tools. Yields the environment variables of the programs."""
    problem = min(draw_problems(11, 60, split="client"), key=lambda problem: problem.steps)
    settings = [
        EngineSettings(model=model, num_threads=1, max_model_len=1024, kv_cache_memory_bytes=512 * 2**20)
        for model in (DEMO_TARGET, DEMO_DRAFT)
    ]
    with Pair(*settings) as pair:
        tool_pipeline = with_tool_template(pair).pipeline
        tool_caller: Any = ToolCaller(tool_pipeline)
        tool_pipeline = replace(tool_pipeline, verifier=tool_caller, drafter=None)
        with (
            served(create_app(LocalBackend(pair.pipeline), ApiSettings(), MODEL)) as address,
            served(create_app(LocalBackend(tool_pipeline), ApiSettings(), MODEL)) as tools_address,
        ):
            yield {
                "BASE_URL": f"{address}/v1",
                "TOOLS_BASE_URL": f"{tools_address}/v1",
                "MODEL": MODEL,
                "MODEL_PATH": DEMO_TARGET,
                "QUESTION": problem.question,
                "ANSWER": pair.generate(problem.question, mode="off", temperature=0).text.splitlines()[-1],
            }


def run_checks(client: Client, variables: Mapping[str, str]) -> list[CheckResult]:
    """Runs the program of a client, which prints a line of JSON for each check."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(variables)
    with TemporaryDirectory() as folder:
        if client.in_node:
            # A program in Node finds its packages in the folder `node_modules` beside it.
            for program in (client.program, PROGRAMS / "checks.mjs"):
                shutil.copy(program, folder)
            (Path(folder) / "node_modules").symlink_to(install_node())
            command = ["node", client.program.name]
        else:
            command = [str(install(client.name)), str(client.program)]
        environment["TMPDIR"] = folder  # the programs do not clear their temporary folders
        # In a session of its own, so that the processes that a client starts can be ended too.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return [CheckResult("the program", "failed", f"it did not end within {TIMEOUT_S} s")]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = output.splitlines()
    results = [CheckResult(**json.loads(line)) for line in lines if line.startswith('{"title"')]
    if process.returncode or f"{len(results)} checks" not in lines or not results:
        results.append(CheckResult("the program", "failed", f"{output[-1000:]}{errors[-2000:]}"))
    return results
