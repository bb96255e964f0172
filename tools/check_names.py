"""Checks that names use the vocabulary of the field, and that modules and classes stay short.

    python tools/check_names.py [PATH...]

Run it in the root of the repository. The list of words is `tools/names.toml`. A word is looked up in all names that a
Python file defines or uses: modules, classes, functions, arguments, variables, attributes and keyword arguments. A
violation is printed as `file:line`. Without a path the whole repository is checked. Only then are unused allowances of
the list reported.
"""

import argparse
import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

LIST = Path(__file__).with_name("names.toml")
FOLDERS = ("parse", "deployments", "training", "bench", "cluster", "tests", "tools")
MAX_MODULE_LINES = 400
MAX_CLASS_LINES = 250

Match = Literal["part", "name", "class"]
Kind = Literal["module", "class", "function", "test", "argument", "variable", "attribute", "keyword"]


@dataclass(frozen=True)
class Name:
    """One occurrence of a name in a file."""

    identifier: str
    line: int
    kind: Kind  # "test": the name of a test function, which is a sentence


@dataclass(frozen=True)
class Allowance:
    """A context in which a word is legitimate."""

    files: tuple[str, ...]
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]  # empty: all kinds
    reason: str

    def covers(self, path: str, name: Name) -> bool:
        return (
            (not self.kinds or name.kind in self.kinds)
            and any(fnmatchcase(path, glob) for glob in self.files)
            and any(fnmatchcase(name.identifier.strip("_"), glob) for glob in self.names)
        )


@dataclass(frozen=True)
class Word:
    """A word that must not occur in names.

    `match` says where: as a part of a name (`part`: "wish" in `_wish_for`, but not in `wishes`), as the entire name
    without regard to case (`name`), or as the exact name of a class (`class`).
    """

    word: str
    use: str
    match: Match
    files: tuple[str, ...]  # where the word is forbidden
    in_test_sentences: bool  # is it also forbidden in the names of test functions?
    allowances: tuple[Allowance, ...]

    def occurs_in(self, name: Name) -> bool:
        if self.match == "class":
            return name.kind == "class" and name.identifier.strip("_") == self.word
        if name.kind == "test" and not self.in_test_sentences:
            return False
        if self.match == "name":
            return name.identifier.strip("_").lower() == self.word
        return f"_{self.word}_" in f"_{'_'.join(split_name(name.identifier))}_"


@dataclass(frozen=True)
class NameList:
    words: tuple[Word, ...]
    shared_classes: Mapping[str, frozenset[str]]  # class name -> the files that may all define it


def split_name(identifier: str) -> list[str]:
    """Returns the words of a name in lower case, e.g. `["kv", "cache"]` for `KVCache` and `kv_cache`."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def read_list(file: Path = LIST) -> NameList:
    """Reads the list of words and raises `ValueError` if an allowance has no reason."""
    data = tomllib.loads(file.read_text())
    words: list[Word] = []
    for entry in data["word"]:
        allowances = tuple(_read_allowance(item) for item in entry.get("allow", ()))
        words += [_read_word(word, entry, allowances) for word in entry["words"]]
    shared = {item["name"]: frozenset(item["files"]) for item in data.get("shared_class", ())}
    return NameList(tuple(words), shared)


def _read_word(word: str, entry: Mapping[str, Any], allowances: tuple[Allowance, ...]) -> Word:
    unknown = entry.keys() - {"words", "use", "match", "files", "in_test_sentences", "allow"}
    if unknown:
        raise ValueError(f"{word}: unknown keys {', '.join(sorted(unknown))}")
    return Word(
        word,
        entry["use"],
        entry.get("match", "part"),
        tuple(entry.get("files", ("*",))),
        entry.get("in_test_sentences", False),
        allowances,
    )


def _read_allowance(item: Mapping[str, Any]) -> Allowance:
    if not item.get("reason") or not item.keys() & {"files", "names"}:
        raise ValueError(f"an allowance needs a reason, and files or names: {dict(item)}")
    return Allowance(
        tuple(item.get("files", ("*",))),
        tuple(item.get("names", ("*",))),
        tuple(item.get("kinds", ())),
        item["reason"],
    )


def names_in(tree: ast.Module) -> Iterator[Name]:
    """Yields each name that the code defines, assigns, passes by keyword or reads as an attribute.

    An attribute of a variable called `args` is a command-line flag, which is not checked.
    """
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name):
                yield Name(name, node.lineno, "class")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield Name(name, node.lineno, "test" if name.startswith("test_") else "function")
            case ast.arg(arg=name):
                yield Name(name, node.lineno, "argument")
            case ast.Attribute(value=ast.Name(id="args")):
                continue
            case ast.Attribute(attr=name):
                yield Name(name, node.end_lineno or node.lineno, "attribute")
            case ast.keyword(arg=str(name)):
                yield Name(name, node.lineno, "keyword")
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                yield Name(name, node.lineno, "variable")


def check_words(path: str, source: str, words: Iterable[Word]) -> Iterator[tuple[str, Word, Name, Allowance | None]]:
    """Yields each occurrence of a word in a file, and the allowance that covers it, if there is one."""
    words_here = [word for word in words if any(fnmatchcase(path, glob) for glob in word.files)]
    module = Name(path.removesuffix(".py").removesuffix("__init__").strip("/").rpartition("/")[2], 1, "module")
    for name in (module, *sorted(names_in(ast.parse(source, path)), key=lambda name: name.line)):
        for word in words_here:
            if word.occurs_in(name):
                allowed = next((item for item in word.allowances if item.covers(path, name)), None)
                yield f"{path}:{name.line}", word, name, allowed


def check_sizes(path: str, source: str) -> Iterator[str]:
    """Yields a message for a module and for each class that is too long."""
    num_lines = len(source.splitlines())
    if num_lines > MAX_MODULE_LINES:
        yield f"{path}:1: the module has {num_lines} lines; the limit is {MAX_MODULE_LINES}"
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.ClassDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_CLASS_LINES:
                yield f"{path}:{node.lineno}: class {node.name} has {num_lines} lines; the limit is {MAX_CLASS_LINES}"


def check_classes(sources: Mapping[str, str], shared: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Yields a message for each class name that several files define, unless they may share it."""
    places = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source, path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append((path, node.lineno))
    for name, definitions in sorted(places.items()):
        files = [path for path, _ in definitions]
        if len(files) > 1 and not (len(set(files)) == len(files) and set(files) <= shared.get(name, frozenset())):
            where = ", ".join(f"{path}:{line}" for path, line in definitions)
            yield f"{where}: the class name {name} is used more than once"


def check(sources: Mapping[str, str], name_list: NameList, *, report_unused: bool = False) -> list[str]:
    """Returns all violations in files, given as their paths and texts."""
    problems: list[str] = []
    used: set[Allowance] = set()
    for path, source in sources.items():
        for where, word, name, allowed in check_words(path, source, name_list.words):
            if allowed:
                used.add(allowed)
            else:
                problems.append(f'{where}: {name.identifier}: "{word.word}" is a private word; use {word.use}')
    code = {path: source for path, source in sources.items() if not path.startswith("tests/")}
    for path, source in code.items():
        problems += check_sizes(path, source)
    problems += check_classes(code, name_list.shared_classes)
    if report_unused:
        listed = {item: word.word for word in name_list.words for item in word.allowances}
        problems += [
            f'{LIST.name}: an allowance for "{word}" is not used: {item.reason}'
            for item, word in listed.items()
            if item not in used
        ]
    return problems


def read_sources(paths: Sequence[Path]) -> dict[str, str]:
    """Reads the Python files at or below each path; the keys are relative to the current folder."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return {file.resolve().relative_to(Path.cwd()).as_posix(): file.read_text() for file in files}


def main() -> None:
    """Prints every violation and exits with 1 if there is one."""
    parser = argparse.ArgumentParser(description="Checks names and sizes against tools/names.toml.")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; the default is the whole repository")
    paths = parser.parse_args().paths
    sources = read_sources(paths or [Path(folder) for folder in FOLDERS])
    problems = check(sources, read_list(), report_unused=not paths)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(f"{len(problems)} names or sizes are not as they should be")


if __name__ == "__main__":
    main()
