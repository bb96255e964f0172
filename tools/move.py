"""Moves modules and rewrites what names them: imports, dotted names and paths in text.

    python tools/move.py tools/moves.txt

Each line is `old.module new.module`.
"""

import re
import subprocess
import sys
from pathlib import Path

TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".svg", ".js", ".html"}
WIDTH = 120


def files() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split("\n")
    paths = [Path(line) for line in tracked if line]
    return [p for p in paths if p.is_file() and (p.suffix in TEXT or p.name in ("Makefile", "Dockerfile"))]


def move(old: str, new: str) -> None:
    source, target = Path(old.replace(".", "/") + ".py"), Path(new.replace(".", "/") + ".py")
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "mv", str(source), str(target)], check=True)
    test = Path("tests") / source.parent / f"test_{source.name}"
    if test.is_file():
        moved = Path("tests") / target.parent / f"test_{target.name}"
        moved.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "mv", str(test), str(moved)], check=True)


def rewrite(text: str, moves: dict[str, str]) -> str:
    for old in sorted(moves, key=len, reverse=True):
        new = moves[old]
        text = re.sub(rf"(?<![\w./]){re.escape(old)}(?![\w(=])(?!\.\w+ =)", new, text)
        text = re.sub(rf"(?<![\w.]){old.replace('.', '/')}\.py", new.replace(".", "/") + ".py", text)
        package, name = old.rsplit(".", 1)
        new_package, new_name = new.rsplit(".", 1)

        def split(
            match: re.Match[str], name: str = name, new_name: str = new_name, new_package: str = new_package
        ) -> str:
            indent, package, names = match[1], match[2], [part.strip() for part in match[3].split(",")]
            mine = [part for part in names if part.split(" as ")[0] == name]
            rest = [part for part in names if part not in mine]
            lines = [f"{indent}from {package} import {', '.join(rest)}"] if rest else []
            for part in mine:
                alias = part if new_name == name else part.replace(name, new_name, 1)
                lines.append(f"{indent}from {new_package} import {alias}")
            return "\n".join(lines)

        text = re.sub(
            rf"(?m)^( *)from ({re.escape(package)}) import ((?:\w+(?: as \w+)?, )*{name}(?: as \w+)?(?:, \w+)*)$",
            split,
            text,
        )
    return text


def main() -> None:
    pairs = [line.split() for line in Path(sys.argv[1]).read_text().splitlines() if line and line[0] != "#"]
    moves = dict(pairs)
    for old, new in pairs:
        move(old, new)
    for path in files():
        if path.parts[0] == "tools":
            continue
        text = path.read_text()
        changed = rewrite(text, moves)
        if changed != text:
            path.write_text(changed)


if __name__ == "__main__":
    main()
