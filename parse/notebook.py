"""Shows an answer in a notebook, with marks for the model that wrote each part."""

from collections.abc import Iterable
from html import escape
from typing import Literal

MarkedText = tuple[str, Literal["draft", "target", "rejected"]]

# The colors are translucent, so they work in light and dark themes. The marks differ in more than color.
STYLES = {
    "draft": "background:rgba(22,163,74,.22)",
    "target": "border-bottom:2px solid rgba(59,130,246,.75)",
    "rejected": "background:rgba(220,38,38,.18);text-decoration:line-through;opacity:.75",
}
LABELS = {
    "draft": "draft, accepted",
    "target": "written by the target",
    "rejected": "draft, rejected",
}


def render_html(texts: Iterable[MarkedText], usage_line: str) -> str:
    """Returns an HTML fragment: the marked texts, a legend and the usage.

    The fragment contains no scripts.
    """
    answer = "".join(_mark(text, kind) for text, kind in texts)
    legend = " &nbsp; ".join(_mark(label, kind) for kind, label in LABELS.items())
    return (
        # The classes keep MathJax from typesetting what lies between two dollar signs.
        '<div class="tex2jax_ignore mathjax_ignore" style="color:inherit;line-height:1.6">'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{answer}</div>'
        f'<div style="font-size:85%;opacity:.8;margin-top:.6em">{legend}<br>{escape(usage_line)}</div>'
        "</div>"
    )


def _mark(text: str, kind: str) -> str:
    tag = "del" if kind == "rejected" else "span"
    return f'<{tag} style="{STYLES[kind]}" title="{escape(LABELS[kind])}">{escape(text)}</{tag}>'
