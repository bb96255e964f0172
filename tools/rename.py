"""Renames symbols across the project by meaning, not by spelling, with basedpyright's language server.

    python tools/rename.py tools/renames.txt [--root DIR]

Each line of the file is `path/to/file.py Symbol new_name`, where Symbol is a function, class or variable of the module,
or `Class.attribute`, `function.parameter`, `Class.method.parameter`. A line that starts with `#` is a comment,
one that starts with `@sub` replaces text: `@sub glob regex => replacement`. A symbol
that is not there is reported and skipped, so that the file can be run again on a tree that is partly renamed.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SERVER = "basedpyright-langserver"


class Server:
    def __init__(self, root: Path, executable: str) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [executable, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
        )
        self.number = 0
        self.versions: dict[str, int] = {}
        capabilities = {
            "workspace": {"workspaceEdit": {"documentChanges": True}, "configuration": True, "workspaceFolders": True},
            "textDocument": {"rename": {"prepareSupport": True}},
        }
        folders = [{"uri": root.as_uri(), "name": "root"}]
        self.request(
            "initialize",
            {"processId": None, "rootUri": root.as_uri(), "capabilities": capabilities, "workspaceFolders": folders},
        )
        self.notify("initialized", {})
        settings = {"python": {"pythonPath": str(root / ".venv/bin/python")}}
        self.notify("workspace/didChangeConfiguration", {"settings": settings})

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        length = 0
        while line := out.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        message: dict[str, Any] = json.loads(out.read(length))
        return message

    def notify(self, method: str, params: Any) -> None:
        self.send({"method": method, "params": params})

    def request(self, method: str, params: Any) -> Any:
        self.number += 1
        self.send({"id": self.number, "method": method, "params": params})
        while True:
            message = self.read()
            if message.get("id") == self.number and "method" not in message:
                if "error" in message:
                    raise RuntimeError(message["error"])
                return message["result"]
            if "method" in message and "id" in message:
                self.answer(message)

    def answer(self, message: dict[str, Any]) -> None:
        result: Any = None
        if message["method"] == "workspace/configuration":
            analysis = {"diagnosticMode": "openFilesOnly", "indexing": True, "typeCheckingMode": "off"}
            values = {
                "python": {"pythonPath": str(self.root / ".venv/bin/python")},
                "basedpyright": {"analysis": analysis},
                "basedpyright.analysis": analysis,
                "python.analysis": analysis,
            }
            result = [values.get(item.get("section", "")) for item in message["params"]["items"]]
        self.send({"id": message["id"], "result": result})

    def open(self, file: Path) -> None:
        uri = file.as_uri()
        text = file.read_text()
        self.versions[uri] = self.versions.get(uri, 0) + 1
        if self.versions[uri] == 1:
            document = {"uri": uri, "languageId": "python", "version": 1, "text": text}
            self.notify("textDocument/didOpen", {"textDocument": document})
        else:
            self.notify(
                "textDocument/didChange",
                {"textDocument": {"uri": uri, "version": self.versions[uri]}, "contentChanges": [{"text": text}]},
            )


def locate(file: Path, symbol: str) -> tuple[int, int] | None:
    """Line and column, both from zero, at which the symbol is defined."""
    text = file.read_text()
    scope: ast.AST = ast.parse(text)
    *outer, last = symbol.split(".")
    for name in outer:
        definition = next((n for n in ast.walk(scope) if getattr(n, "name", None) == name), None)
        if definition is None:
            return None
        scope = definition
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        nodes: Iterator[ast.AST] = ast.walk(scope)
    else:  # the names of a module or class, not those inside its functions
        nodes = _own(scope)
    for node in nodes:
        if node is scope:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == last:
            line = text.splitlines()[node.lineno - 1]
            return node.lineno - 1, line.index(last, node.col_offset)
        if isinstance(node, ast.arg) and node.arg == last:
            return node.lineno - 1, node.col_offset
        if isinstance(node, ast.Name) and node.id == last and isinstance(node.ctx, ast.Store):
            return node.lineno - 1, node.col_offset
    for node in ast.walk(scope):
        stored = isinstance(node, ast.Attribute) and node.attr == last and isinstance(node.ctx, ast.Store)
        if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.end_lineno - 1, node.end_col_offset - len(last)
    return None


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own(node)


def substitute(root: Path, rule: str) -> list[Path]:
    """`glob regex => replacement`: for strings, keywords of `replace` and what has no type."""
    pattern, rest = rule.split(maxsplit=1)
    regex, replacement = rest.split(" => ")
    changed = []
    for file in sorted(root.glob(pattern)):
        text = file.read_text()
        new = re.sub(regex, replacement, text)
        if new != text:
            file.write_text(new)
            changed.append(file)
    return changed


def apply(edit: dict[str, Any]) -> list[Path]:
    changes: dict[str, list[Any]] = dict(edit.get("changes") or {})
    for change in edit.get("documentChanges") or []:
        changes.setdefault(change["textDocument"]["uri"], []).extend(change["edits"])
    files = []
    for uri, edits in changes.items():
        file = Path(uri.removeprefix("file://"))
        if ".venv" in file.parts:
            continue
        lines = file.read_text().splitlines(keepends=True)
        spots = {(e["range"]["start"]["line"], e["range"]["start"]["character"]): e for e in edits}
        for (line, column), one in sorted(spots.items(), reverse=True):
            end = one["range"]["end"]
            assert end["line"] == line
            lines[line] = lines[line][:column] + one["newText"] + lines[line][end["character"] :]
        file.write_text("".join(lines))
        files.append(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("renames", type=Path)
    parser.add_argument("--root", type=Path, default=Path.cwd())
    parser.add_argument("--server", default=SERVER)
    args = parser.parse_args()
    root = args.root.resolve()
    server = Server(root, args.server)
    folders = ("parse", "deployments", "training", "bench", "cluster", "tests")
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            server.open(file)
    for number, line in enumerate(args.renames.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@sub "):
            changed = substitute(root, line.removeprefix("@sub "))
            for one in changed:
                if one.suffix == ".py":
                    server.open(one)
            print(f"{line}: {len(changed)} files")
            continue
        path, symbol, new = line.split()
        file = root / path
        spot = locate(file, symbol) if file.is_file() else None
        if spot is None:
            print(f"{number}: {path} {symbol}: not there", file=sys.stderr)
            continue
        position = {"line": spot[0], "character": spot[1]}
        try:
            edit = server.request(
                "textDocument/rename",
                {"textDocument": {"uri": file.as_uri()}, "position": position, "newName": new},
            )
        except RuntimeError as error:
            print(f"{number}: {path} {symbol}: {error}", file=sys.stderr)
            continue
        files = apply(edit or {})
        for changed in files:
            server.open(changed)
        print(f"{path} {symbol} -> {new}: {len(files)} files")
    server.process.kill()


if __name__ == "__main__":
    main()
