"""Finds tool calls in the text of an answer, while it is generated.

Models write calls in different formats. A format is a function in the registry `TOOL_CALL_FORMATS`, which reads the
text so far. As the text grows, the content and the calls that it finds only grow, so the differences can be streamed.
Text that looks like the beginning of a call is held back until it is clear whether it is one.
"""

import ast
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """JSON, or the beginning of it while the call is incomplete."""


@dataclass(frozen=True)
class ParsedText:
    """What a text consists of, as far as this is clear."""

    content: str
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class ToolCallDelta:
    """A new part of a call. The first part of each call has its id and its name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Format = Callable[[str, Collection[str], bool], ParsedText]
"""Reads a text, given the names of the tools and whether the text is final."""


class ToolCallStream:
    """Parses the text of one answer, piece by piece."""

    def __init__(self, parse: Format, tool_names: Collection[str], *, max_calls: int | None = None) -> None:
        self._parse, self._tool_names, self._max_calls = parse, tool_names, max_calls
        self._text = self._content = ""
        self._arguments: list[str] = []  # of each call, as far as they were returned

    @property
    def num_calls(self) -> int:
        return len(self._arguments)

    def add(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Returns new content and new parts of calls."""
        self._text += text
        return self._difference(final=False)

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """Returns what was held back."""
        return self._difference(final=True)

    def _difference(self, *, final: bool) -> tuple[str, list[ToolCallDelta]]:
        parsed = self._parse(self._text, self._tool_names, final)
        content, self._content = parsed.content[len(self._content) :], max(self._content, parsed.content, key=len)
        deltas: list[ToolCallDelta] = []
        for index, call in enumerate(parsed.calls[: self._max_calls]):
            if index == len(self._arguments):
                self._arguments.append(call.arguments)
                deltas.append(ToolCallDelta(index, call.arguments, f"call_{secrets.token_hex(12)}", call.name))
            elif more := call.arguments[len(self._arguments[index]) :]:
                self._arguments[index] = call.arguments
                deltas.append(ToolCallDelta(index, more))
        return content, deltas


_DECODER = json.JSONDecoder(strict=False)  # models write line breaks in strings
_CALL_START = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class _JsonCall:
    call: ToolCall
    end: int | None
    """Where the call ends in the text, or None if it is incomplete."""


NoCall = Literal["unclear", "none"]
"""A text that may become a call, or one that is none."""


def _read_json_call(text: str, *, final: bool) -> _JsonCall | NoCall:
    """Reads a call such as `{"name": "f", "arguments": {}}` at the beginning of a text."""
    match = _CALL_START.match(text)
    if match is not None:
        name = json.loads(match[1])
        try:
            _, end = _DECODER.raw_decode(text, match.end())
        except ValueError:
            return _JsonCall(ToolCall(name, text[match.end() :]), None)
        call = ToolCall(name, text[match.end() : end])
        rest = text[end:].lstrip()
        if not rest and not final:
            return _JsonCall(call, None)
        return _JsonCall(call, len(text) - len(rest) + rest.startswith("}"))  # some models forget the last brace
    if not text.startswith("{"):
        return "none" if text or final else "unclear"
    try:
        value, end = _DECODER.raw_decode(text)
    except ValueError:
        return "none" if final else "unclear"
    arguments = value.get("arguments", value.get("parameters", {}))  # the keys may be in another order
    if not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return "none"
    return _JsonCall(ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)), end)


def _read_json_calls(text: str, separators: str, *, final: bool) -> list[ToolCall] | NoCall:
    """Reads calls one after the other. What follows the last one is ignored."""
    calls: list[ToolCall] = []
    while True:
        text = text.lstrip(" \t\r\n" + separators)
        read = _read_json_call(text, final=final)
        if not isinstance(read, _JsonCall):
            return calls or read
        calls.append(read.call)
        if read.end is None:
            return calls
        text = text[read.end :]


def _without_partial(text: str, marker: str, *, final: bool) -> str:
    """Returns a text without white space at its end, and without what may be the beginning of a marker."""
    if final:
        return text
    length = next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
    return text[: len(text) - length].rstrip()


def parse_hermes(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call, anywhere in the text."""
    start, end = "<tool_call>", "</tool_call>"
    content, calls = "", list[ToolCall]()
    while True:
        before, marker, rest = text.partition(start)
        if not marker:
            rest = _without_partial(before, start, final=final)
            return ParsedText((content + rest).rstrip() if calls else content + rest, calls)
        content += before
        body = rest.lstrip()
        read = _read_json_call(body, final=final)
        if read == "unclear":
            return ParsedText(content.rstrip(), calls)
        if read == "none":
            content, text = content + marker, rest
            continue
        if read.end is None:
            arguments = read.call.arguments.partition(end)[0] if final else read.call.arguments
            return ParsedText(content.rstrip(), [*calls, ToolCall(read.call.name, arguments)])
        calls.append(read.call)
        text = body[read.end :].lstrip().removeprefix(end)
        if not final and end.startswith(text):
            return ParsedText(content.rstrip(), calls)


def parse_llama3_json(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`{"name": ..., "parameters": {...}}` as the whole answer, with `;` between several calls."""
    return _parse_whole_answer(text, "<|python_tag|>", "{", ";", final=final)


def parse_mistral(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` or `[TOOL_CALLS]name{...}` as the whole answer.

    The marker is a special token, which decoding removes.
    """
    stripped = text.lstrip().removeprefix("[TOOL_CALLS]").lstrip()
    name, brace, _ = stripped.partition("{")
    if brace and name.strip() in tool_names:
        calls: list[ToolCall] = []
        while brace and name.strip(" \n;,") in tool_names:
            start = stripped.index("{")
            try:
                _, end = _DECODER.raw_decode(stripped, start)
            except ValueError:
                end = len(stripped)
            calls.append(ToolCall(name.strip(" \n;,"), stripped[start:end]))
            stripped = stripped[end:]
            name, brace, _ = stripped.partition("{")
        return ParsedText("", calls)
    if stripped and not final and any(each.startswith(stripped) for each in tool_names):
        return ParsedText("")
    return _parse_whole_answer(text, "[TOOL_CALLS]", "[", "[,", final=final)


def _parse_whole_answer(text: str, marker: str, first: str, separators: str, *, final: bool) -> ParsedText:
    """Reads an answer that consists of JSON calls, after a marker that may be missing."""
    stripped = text.lstrip()
    if not final and marker.startswith(stripped):
        return ParsedText("")
    body = stripped.removeprefix(marker).lstrip()
    if body.startswith(first) or (not body and not final):
        calls = _read_json_calls(body, separators, final=final)
        if calls != "none":
            return ParsedText("", () if calls == "unclear" else calls)
    return ParsedText(text)


def parse_pythonic(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`[name(key=value, ...), ...]` as the whole answer, with literals of Python as values."""
    stripped = text.strip()
    if not re.match(r"\[(\s*[a-zA-Z_][\w.]*\s*(\(|$)|\s*$)|$", stripped) or (final and not stripped):
        return ParsedText(text)
    try:
        expression = ast.parse(stripped, mode="eval").body
        assert isinstance(expression, ast.List) and expression.elts
        return ParsedText("", [_read_python_call(element) for element in expression.elts])
    except (SyntaxError, ValueError, AssertionError, MemoryError, RecursionError, TypeError):
        return ParsedText(text if final else "")


def _read_python_call(node: ast.expr) -> ToolCall:
    """Raises ValueError or TypeError if it is none."""
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError("no call with keywords only")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a dictionary of keywords")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False))


TOOL_CALL_FORMATS: Mapping[str, Format] = {
    "hermes": parse_hermes,
    "llama3_json": parse_llama3_json,
    "mistral": parse_mistral,
    "pythonic": parse_pythonic,
}
_TEMPLATE_MARKS = {
    "hermes": r"<tool_call>",
    "mistral": r"\[TOOL_CALLS\]|\[AVAILABLE_TOOLS\]",
    "pythonic": r"\[func_name1\(|\[func1\(",
    "llama3_json": r'"parameters": dictionary of|<\|python_tag\|>',
}


def find_format(chat_template: Any) -> str | None:
    """Returns the name of the format that a chat template shows to its model, or None."""
    return next((name for name, mark in _TEMPLATE_MARKS.items() if re.search(mark, str(chat_template))), None)
