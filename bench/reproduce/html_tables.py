"""The tables of the report, whose figures are links to the commands that measured them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --parse: #2a78d633; --vllm: #8883; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1150px; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
td { white-space: nowrap; }
th.text { text-align: left; }
td.text { text-align: left; white-space: normal; max-width: 34rem; overflow-wrap: anywhere; }
td.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent 0); }
tr.parse { --bar: var(--parse); } tr.vllm { --bar: var(--vllm); }
td a, p a, li a { color: inherit; text-decoration: underline dotted; text-underline-offset: 3px; }
sup a { text-decoration: none; } .bad { color: var(--bad); font-weight: 600; } .note { opacity: .8; }
pre, code { font: 12.5px/1.45 ui-monospace, monospace; } .scroll { overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; } :target { outline: 2px solid #2a78d6; }
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table, with the steps that measured its figure."""

    text: str
    steps: tuple[str, ...] = ()
    css_class: str = ""
    share: float | None = None
    """The length of a bar behind the figure, relative to the width of the cell."""


@dataclass(frozen=True)
class TableRow:
    cells: Sequence[Cell]
    css_class: str = ""


@dataclass(frozen=True)
class TableRenderer:
    """Links figures to their commands."""

    commands: Mapping[str, str]

    def figure(self, text: str, steps: Sequence[str]) -> str:
        measured = [step for step in steps if step in self.commands]
        if not measured:
            return escape(text)
        first, *others = measured
        link = f'<a href="#step-{escape(first)}" title="{escape(self.commands[first])}">{escape(text)}</a>'
        more = (
            f'<sup><a href="#step-{escape(step)}" title="{escape(self.commands[step])}">&divide;</a></sup>'
            for step in others
        )
        return link + "".join(more)

    def table(self, names: Sequence[str], rows: Iterable[TableRow]) -> str:
        listed = list(rows)
        classes = [cell.css_class for cell in listed[0].cells] if listed else [""] * len(names)
        head = "".join(
            f'<th class="{"text" if css_class == "text" else ""}">{escape(name)}</th>'
            for name, css_class in zip(names, classes, strict=True)
        )
        body = "\n".join(
            f'<tr class="{row.css_class}">{"".join(self._cell(cell) for cell in row.cells)}</tr>' for row in listed
        )
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'

    def _cell(self, cell: Cell) -> str:
        classes, style = cell.css_class, ""
        if cell.share is not None:
            classes, style = f"{classes} bar".strip(), f' style="--share: {100 * cell.share:.1f}%"'
        return f'<td class="{classes}"{style}>{self.figure(cell.text, cell.steps)}</td>'


def plural(number: int) -> str:
    return "" if number == 1 else "s"


def format_rate(value: float) -> str:
    return f"{value:.2f}"


def format_value(value: float | None, is_share: bool) -> str:
    if value is None:
        return "none"
    return f"{value:.1%}" if is_share else f"{value:.2f}"


def format_seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def format_share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" + (f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})" if interval else "")
