"""Mutation testing: counts changes of the core modules that no test notices.

    python tools/mutants.py [--count 200] [--seed 0] [--only parse/tree.py] [--processes 2]

Run it in the root of the repository. Every mutant is one changed expression or a removed statement. A mutant survives
if all tests of its module pass. The survivors are printed, and the exit status is 1 if they are 10% or more.

This is not one of the published tools, because those start a fresh interpreter for each mutant or instrument whole
test suites. Importing torch and transformers takes longer than most of these tests, so here each mutant is a fork of a
process that has imported them already.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MAX_SURVIVORS = 0.1
# A mutant counts as noticed if its tests take this many times as long as without a mutant. The processor time is
# compared, because other processes do not change it. Only tests that wait for something are ended by the clock.
TIMEOUT_FACTOR = 3
MIN_CPU_S = 10
MIN_WAIT_S = 60
NATIVE, NATIVE_TESTS = "parse/engines/native", "tests/parse/engines/native"
# The tests of each module, the quickest ones first.
TESTS = {
    "parse/tree.py": [
        "tests/parse/test_tree.py",
        f"{NATIVE_TESTS}/test_scheduled_chunk.py",
        f"{NATIVE_TESTS}/test_generation.py",
    ],
    "parse/acceptance.py": [
        "tests/parse/test_acceptance.py",
        "tests/parse/test_registry.py",
        "tests/parse/test_pipeline.py",
    ],
    "parse/controller.py": ["tests/parse/test_controller.py", "tests/parse/test_pipeline.py"],
    "parse/pipeline.py": ["tests/parse/test_pipeline.py"],
    f"{NATIVE}/sampler.py": [f"{NATIVE_TESTS}/test_sampler.py"],
    f"{NATIVE}/prefix_cache.py": [f"{NATIVE_TESTS}/test_prefix_cache.py", f"{NATIVE_TESTS}/test_scheduler.py"],
    f"{NATIVE}/generation.py": [f"{NATIVE_TESTS}/test_generation.py", f"{NATIVE_TESTS}/test_native_engine.py"],
    f"{NATIVE}/verification.py": [f"{NATIVE_TESTS}/test_generation.py", f"{NATIVE_TESTS}/test_native_engine.py"],
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class TimeLimit:
    cpu_s: int
    elapsed_s: float


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    change: str
    tree: ast.Module


def mutants_of(path: str) -> Iterator[Mutant]:
    """Yields all mutants of a module.

    Changes of messages are left out, because tests need not check their exact figures.
    """
    original = ast.parse(Path(path).read_text())
    lines = ast.unparse(original).splitlines()
    messages = [node for node in ast.walk(original) if isinstance(node, (ast.JoinedStr, ast.Raise))]
    in_messages = {id(node) for message in messages for node in ast.walk(message)}
    for index, node in enumerate(ast.walk(original)):
        if id(node) in in_messages:
            continue
        for change, apply in _changes(node):
            tree = copy.deepcopy(original)
            apply(next(itertools.islice(ast.walk(tree), index, None)))
            before, after = _first_difference(lines, ast.unparse(tree).splitlines())
            yield Mutant(path, getattr(node, "lineno", 0), f"{change}: `{before}` becomes `{after}`", tree)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """Yields the changes that are possible at a node, each as a function that changes an equal node in place."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            yield "comparison", lambda at: setattr(at, "ops", [COMPARISONS[type(operator)]()])
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in OPERATORS:
            yield "operator", lambda at: setattr(at, "op", OPERATORS[type(operator)]())
        case ast.BoolOp(op=operator):
            other = ast.Or if isinstance(operator, ast.And) else ast.And
            yield "condition", lambda at: setattr(at, "op", other())
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield "condition", lambda at: setattr(at, "test", ast.UnaryOp(ast.Not(), copy.deepcopy(test)))
        case ast.Constant(value=bool() as value):
            yield "constant", lambda at: setattr(at, "value", not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", lambda at: setattr(at, "value", value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            yield "function", lambda at: setattr(at, "func", ast.Name(FUNCTIONS[name], ast.Load()))
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield "result", lambda at: setattr(at, "value", ast.Constant(None))
    for field in ("body", "orelse"):
        statements = getattr(node, field, None)
        if not isinstance(statements, list):
            continue
        for k, statement in enumerate(statements):
            if _is_removable(statement):
                yield "removed", _remover(field, k)


def _is_removable(statement: ast.stmt) -> bool:
    """Whether a module without the statement is still valid: calls, changes of attributes, and jumps."""
    match statement:
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Continue() | ast.Break():
            return True
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return True
    return False


def _remover(field: str, index: int) -> Callable[[ast.AST], None]:
    def remove(at: ast.AST) -> None:
        getattr(at, field)[index] = ast.Pass()

    return remove


def _first_difference(original: Sequence[str], mutated: Sequence[str]) -> tuple[str, str]:
    return next((a.strip(), b.strip()) for a, b in zip(original, mutated, strict=False) if a != b)


class MutantLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed syntax tree instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self._name, self._mutant = mutant.path.removesuffix(".py").replace("/", "."), mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(self._mutant.path).resolve(), loader=self)

    def exec_module(self, module: ModuleType) -> None:
        tree = ast.fix_missing_locations(copy.deepcopy(self._mutant.tree))
        exec(compile(tree, self._mutant.path, "exec"), vars(module))


class WithoutShrinking:
    """Plugin of pytest: a failed property test ends at once, instead of minutes later with the smallest example."""

    @staticmethod
    def pytest_sessionstart() -> None:
        from hypothesis import Phase, settings

        settings.register_profile("mutants", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")


class LoadedModules:
    """Plugin of pytest: writes the names of all imported modules to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_collection_finish(self) -> None:
        self._file.write_text("\n".join(sys.modules))


def import_dependencies(tests: Sequence[str]) -> None:
    """Imports the modules of other packages that the tests import, so that not every mutant has to."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if not child:
            import pytest

            silence_output()
            options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-n0", *tests]
            os._exit(int(pytest.main(options, plugins=[LoadedModules(Path(file.name))])))
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError("the tests cannot be collected")
        names = Path(file.name).read_text().split()
    own = {path.name for path in Path().iterdir() if path.is_dir()}
    for name in names:
        if name.partition(".")[0] not in own | {"__main__"}:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def silence_output() -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def run_tests(tests: Sequence[str], mutant: Mutant | None, cpu_s: int = resource.RLIM_INFINITY) -> int:
    """Starts a process that runs tests, with a mutant if there is one, and returns its id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    silence_output()
    if mutant is not None:
        sys.meta_path.insert(0, MutantLoader(mutant))
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-n0", "-m", "not ray", *tests]
    os._exit(int(pytest.main(options, plugins=[WithoutShrinking()])))


def measure_time_limits(paths: Sequence[str], num_processes: int) -> dict[str, TimeLimit | None]:
    """Returns how long the tests of each module may take, or None if they fail without a mutant."""
    waiting, running, limits = list(reversed(paths)), dict[int, tuple[str, float]](), dict[str, TimeLimit | None]()
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                path = waiting.pop()
                running[run_tests(TESTS[path], None)] = path, time.monotonic()
            child, status, usage = os.wait4(-1, 0)
            path, started = running.pop(child)
            limits[path] = None
            if os.waitstatus_to_exitcode(status) == 0:
                limits[path] = TimeLimit(
                    cpu_s=math.ceil(max(MIN_CPU_S, TIMEOUT_FACTOR * (usage.ru_utime + usage.ru_stime))),
                    elapsed_s=max(MIN_WAIT_S, 2 * TIMEOUT_FACTOR * (time.monotonic() - started)),
                )
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)
    return limits


def survivors_of(mutants: Sequence[Mutant], time_limits: Mapping[str, TimeLimit], num_processes: int) -> list[Mutant]:
    """Runs the tests of all mutants, several at a time, and returns the mutants that pass them."""
    waiting, survivors = list(reversed(mutants)), []
    running: dict[int, tuple[Mutant, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                mutant = waiting.pop()
                limit = time_limits[mutant.path]
                child = run_tests(TESTS[mutant.path], mutant, limit.cpu_s)
                running[child] = mutant, time.monotonic() + limit.elapsed_s
            for child, (mutant, deadline) in list(running.items()):
                if time.monotonic() > deadline:
                    os.killpg(child, signal.SIGKILL)
                    print(f"waits: {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
                    running[child] = mutant, math.inf
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    del running[child]
                    result = os.waitstatus_to_exitcode(status)
                    if result in (-signal.SIGKILL, -signal.SIGXCPU) and deadline < math.inf:
                        print(f"too slow: {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
                    if result == 0:
                        survivors.append(mutant)
                        print(f"survived: {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
            time.sleep(0.02)
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="number of mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--only", choices=TESTS, help="mutate this module only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one per core)")
    options = parser.parse_args()
    paths = [options.only] if options.only else list(TESTS)
    import torch

    torch.set_num_threads(1)
    import_dependencies(sorted({test for path in paths for test in TESTS[path]}))
    time_limits: dict[str, TimeLimit] = {}
    for path, limit in measure_time_limits(paths, options.processes).items():
        if limit is None:
            print(f"the tests of {path} fail without a mutant", file=sys.stderr)
            return 2
        time_limits[path] = limit
        print(f"{path}: at most {limit.cpu_s} s of processor time for each mutant", flush=True)
    population = [mutant for path in paths for mutant in mutants_of(path)]
    sample = random.Random(options.seed).sample(population, min(options.count, len(population)))
    survivors = survivors_of(sample, time_limits, options.processes)
    per_module = Counter(mutant.path for mutant in survivors)
    for path, number in Counter(mutant.path for mutant in sample).items():
        print(f"{path}: {per_module[path]} of {number} survived")
    print(f"{len(survivors)} of {len(sample)} mutants survived, from {len(population)} possible ones")
    return len(survivors) >= MAX_SURVIVORS * len(sample)


if __name__ == "__main__":
    sys.exit(main())
