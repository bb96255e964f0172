"""The handwritten pages: links, files, commands, settings and requests in them exist, and the README's examples run."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeDeploySchema

from deployments.api.request_models import ChatCompletionRequest, CompletionRequest
from deployments.config import AppSettings
from deployments.launch import read_config
from deployments.observability.metrics import ENGINE_METRICS, ROUTER_METRICS
from parse.config import EngineSettings, SpeculativeConfig

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "parse",
    "deployments",
    "training",
    "bench",
    "cluster",
    "tests",
    "docs",
    "models",
    "tools",
    "examples",
    ".github",
)
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
DOCS = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
FILE_SUFFIXES = "py|yaml|yml|md|js|html|svg|sh|toml|lock|json|jsonl|safetensors"
# Files that a page tells the reader to write, or that belong to another program or to a model.
OTHER_FILES = {
    "config.json",
    "figures.json",
    "model.safetensors",
    "my_config.yaml",
    "my_problems.jsonl",
    "outputs.jsonl",
    "prompts.jsonl",
    "report.json",
    "utils.py",  # a name that CONTRIBUTING.md advises against
}
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello."}]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_doc = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))


def code_blocks(page: Path, language: str | None = None) -> list[str]:
    """Returns the fenced code of a page, all of it or that in one language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for name, code in blocks if language is None or name == language]


def prose(page: Path) -> str:
    """Returns the text of a page without fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def shell_commands(page: Path) -> Iterator[str]:
    """Yields the lines of shell code, and inline code, without comments."""
    lines = "\n".join([*code_blocks(page, ""), *code_blocks(page, "bash"), *code_blocks(page, "sh")])
    indented = re.findall(r"^    (\S.*)$", prose(page), re.MULTILINE)
    for line in [*lines.replace("\\\n", " ").splitlines(), *indented, *inline_code(page)]:
        yield re.sub(r"(^|\s)#.*", "", line)


# Links


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    result: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = base = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 1
        while anchor in result:
            anchor, number = f"{base}-{number}", number + 1
        result.add(anchor)
    return result


def links(page: Path) -> list[tuple[str, str]]:
    """Returns the text and the target of each link and image."""
    text = prose(page)
    return [
        *re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text),
        *(("", target) for target in re.findall(r'(?:src|href|srcset)="([^"]+)"', text)),
    ]


@each_page
def test_links_lead_to_a_file_and_a_heading(page):
    for _, link in links(page):
        if not link.startswith(("http://", "https://", "mailto:")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for _, link in links(ROOT / "docs" / "README.md")}
    assert {page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"} <= listed


@cache
def defined_names(file: Path) -> frozenset[str]:
    """Returns the functions, classes, methods, attributes and variables that a module defines, as `Class.name`."""
    names: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.ClassDef(name=name):
                    names.add(prefix + name)
                    visit(child, f"{prefix}{name}.")
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(prefix + name)
                    visit(child, prefix)
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(prefix + name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(prefix + name)
                case _:
                    visit(child, prefix)

    visit(ast.parse(file.read_text()), "")
    return frozenset(names)


@each_page
def test_a_linked_name_is_defined_in_the_file_that_it_links(page):
    for text, link in links(page):
        name = re.fullmatch(r"`([A-Za-z_]\w*(?:\.\w+)?)`", text)
        if name and link.endswith(".py"):
            assert name[1] in defined_names((page.parent / link).resolve()), f"{name[1]} in {link}"


# Files and commands


@cache
def repository_files() -> tuple[str, ...]:
    files = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    return tuple(str(file.relative_to(ROOT)) for file in files if file.is_file())


def named_files(page: Path) -> Iterator[str]:
    """Yields what looks like a file or folder of the repository, in inline code and in shell commands."""
    words = [word for command in shell_commands(page) for word in command.split()]
    for word in [*inline_code(page), *words]:
        word = word.removeprefix("./")
        in_folder = re.fullmatch(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", word)
        if in_folder or re.fullmatch(rf"\w[\w./-]*\.(?:{FILE_SUFFIXES})", word):  # not an absolute path
            yield word


def exists(name: str) -> bool:
    if "*" in name:
        return any(ROOT.glob(name))
    return (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in repository_files())


@each_page
def test_files_that_a_page_names_exist(page):
    outputs = {
        file
        for command in shell_commands(page)
        for file in re.findall(r"(?:--json|--plot|>|training\.plots \S+) (\S+)", command)
    }
    missing = {name for name in named_files(page) if not exists(name)} - OTHER_FILES - outputs
    assert {name for name in missing if not name.startswith("runs/")} == set()


def python_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the module and the flags of each `python -m` command with a module of this project."""
    for command in shell_commands(page):
        for module, rest in re.findall(r"python3? -m ([\w.]+)([^|>&;)]*)", command):
            if module.partition(".")[0] in FOLDERS:
                yield module, re.findall(r"(?<!\S)--[a-z][\w-]*", rest)


@cache
def help_text(module: str) -> str:
    """Returns what a program prints for --help. It runs in this process, which has imported most modules already."""
    output = io.StringIO()
    with (
        patch.object(sys, "argv", [module, "--help"]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        warnings.catch_warnings(),
        pytest.raises(SystemExit),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may be imported already
        runpy.run_module(module, run_name="__main__")
    return output.getvalue()


@each_page
def test_python_commands_name_programs_and_their_flags(page):
    for module, flags in python_commands(page):
        is_package = (ROOT / module.replace(".", "/")).is_dir()
        assert importlib.util.find_spec(f"{module}.__main__" if is_package else module), module
        if flags:
            assert set(flags) <= set(re.findall(r"--[a-z][\w-]*", help_text(module))), f"{module} {flags}"


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in shell_commands(page):
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", command):
            assert target in targets, command


def test_commands_are_found():
    commands = [command for page in PAGES for command in python_commands(page)]
    assert ("bench.load", ["--url", "--compare"]) in commands
    assert len({module for module, _ in commands}) >= 10


# Settings


def check_yaml(snippet: Any, folder: Path) -> None:
    """Validates a configuration or a part of one. Fails for a part that it does not know."""
    assert isinstance(snippet, dict)
    if "kind" in snippet:  # a Kubernetes resource
        return
    if "applications" in snippet:
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(snippet))
        read_config(file)
        return
    for deployment in snippet.pop("deployments", ()):
        assert deployment["name"] in ("Router", "Verifier", "Drafter")
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
        assert deployment.get("ray_actor_options", {}).keys() <= RayActorOptionsSchema.model_fields.keys()
        DeploymentSchema.model_validate(deployment)
    if snippet.keys() & ServeDeploySchema.model_fields.keys():
        assert snippet.keys() <= ServeDeploySchema.model_fields.keys()
        ServeDeploySchema.model_validate({"applications": []} | snippet)
    elif "args" in snippet:
        AppSettings.model_validate(snippet["args"])
    elif snippet:
        AppSettings.model_validate({"target": {"model": "target"}} | snippet)


@each_page
def test_settings_in_a_page_are_valid(page, tmp_path):
    for block in code_blocks(page, "yaml"):
        check_yaml(yaml.safe_load(block), tmp_path)
    for code in inline_code(page):
        if re.match(r"\[?\{method:", code):
            configs = yaml.safe_load(code)
            for config in configs if isinstance(configs, list) else [configs]:
                SpeculativeConfig.model_validate(config)


def test_a_misspelled_setting_is_rejected(tmp_path):
    check_yaml({"verification": {"stride": 4}}, tmp_path)
    misspelled: list[dict[str, Any]] = [
        {"verification": {"strude": 4}},
        {"args": {"target": {"modle": "m"}}},
        {"target_model": "m"},
        {"deployments": [{"name": "Router", "num_replikas": 2}]},
        {"tracing_confg": {}},
    ]
    for snippet in misspelled:
        with pytest.raises((ValidationError, AssertionError)):
            check_yaml(snippet, tmp_path)


@each_doc
def test_dotted_names_of_settings_exist(page):
    sections = {name: field.annotation for name, field in AppSettings.model_fields.items()}
    sections["draft"] = EngineSettings
    for code in inline_code(page):
        match = re.fullmatch(r"(target|draft|verification|api|audit)\.(\w+)", code)
        if match and not exists(code):  # `api.js` is a file
            model: Any = sections[match[1]]
            assert match[2] in model.model_fields, code


@each_doc
def test_metrics_that_a_page_names_are_declared(page):
    declared = {metric.name for metric in (*ROUTER_METRICS, *ENGINE_METRICS)}
    for code in inline_code(page):
        if match := re.match(r"(?:ray_)?(parse_\w+_(?:total|seconds|tokens|share|nats|probability))$", code):
            assert match[1] in declared, code


def test_panels_that_the_page_on_monitoring_names_exist():
    boards = [json.loads(file.read_text()) for file in (ROOT / "cluster" / "grafana" / "dashboards").glob("*.json")]
    titles = {panel.get("title") for board in boards for panel in board["panels"]}
    variables = {variable.get("label") for board in boards for variable in board["templating"]["list"]}
    text = " ".join((ROOT / "docs" / "monitoring.md").read_text().split())
    named_panels = re.findall(r"panel \*([^*]+)\*", text)
    assert len(named_panels) >= 5
    assert set(named_panels) <= titles
    assert set(re.findall(r"variable \*([^*]+)\*", text)) <= variables


# Requests


def request_bodies(page: Path) -> Iterator[tuple[str, str]]:
    """Yields the path and the body of each curl command with a body."""
    for block in code_blocks(page):
        for command in re.findall(r"^curl .*?(?=^\S|\Z)", block.replace("\\\n", " "), re.MULTILINE | re.DOTALL):
            arguments = shlex.split(command)
            (url,) = [argument for argument in arguments if argument.startswith("http")]
            for flag, value in pairwise(arguments):
                if flag in ("-d", "--data", "--json"):
                    yield "/" + url.split("/", 3)[3], value


@each_page
def test_requests_in_a_page_are_valid(page):
    for path, body in request_bodies(page):
        model: Any = {CHAT_PATH: ChatCompletionRequest, COMPLETION_PATH: CompletionRequest}[path]
        model.model_validate_json(body)


def test_requests_are_found():
    assert len(list(request_bodies(ROOT / "docs" / "api.md"))) == 2


@each_page
def test_request_fields_in_inline_code_are_valid(page):
    """A field with a value, such as `"parse": {"mode": "full"}`, is accepted in a request."""
    for code in inline_code(page):
        match = re.fullmatch(r'"?(\w+)"?: (.+)', code)
        if not match or match[1] not in ChatCompletionRequest.model_fields | CompletionRequest.model_fields:
            continue
        try:
            value = json.loads(match[2])
        except ValueError:  # only a sketch, with three dots
            continue
        if page.name == "limits.md":  # it lists what is rejected
            continue
        base: dict[str, Any] = {"model": "m", "stream": True, "logprobs": True, "messages": MESSAGES}
        request_model: Any = ChatCompletionRequest
        if match[1] not in ChatCompletionRequest.model_fields:
            base, request_model = {"model": "m", "prompt": "Hello."}, CompletionRequest
        request_model.model_validate_json(json.dumps(base | {match[1]: value}))


# The README


def readme_example(language: str) -> str:
    (example,) = code_blocks(ROOT / "README.md", language)
    return example


def test_the_configuration_in_the_readme_is_valid():
    (application,) = yaml.safe_load(readme_example("yaml"))["applications"]
    settings = AppSettings.model_validate(application["args"])
    assert isinstance(settings.draft, EngineSettings)


def test_the_library_example_in_the_readme_runs(capsys):
    exec(compile(readme_example("python"), "README.md", "exec"), {})
    answer, _, summary = capsys.readouterr().out.strip().rpartition("\n")
    assert "Ben" in answer.splitlines()[-1]
    assert re.fullmatch(r"\d+ of \d+ draft tokens accepted", summary)
