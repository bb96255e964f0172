"""Finds tool calls in the text of an answer, while it is generated.

Models write calls in different formats. A parser is a function in the registry `TOOL_CALL_PARSERS`, which reads the
text so far. As the text grows, the content and the calls that it returns only grow, so the differences can be streamed.
Text that looks like the beginning of a call is held back until it is clear whether it is one.
"""

import ast
import json
import re
import secrets
import string
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MAX_CALLS = 128  # of one answer; what follows them is not parsed
MAX_NAME_LENGTH = 256


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """JSON, or the beginning of it while the call is incomplete."""


@dataclass(frozen=True)
class ParsedText:
    """The content and the calls of a text, as far as they are clear."""

    content: str
    calls: Sequence[ToolCall] = ()


@dataclass(frozen=True)
class ToolCallDelta:
    """A new part of a call. The first part of each call has its id and its name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


ParseFunction = Callable[[str, Collection[str], bool], ParsedText]
"""Reads a text, given the names of the tools and whether the text is final."""


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    """Mistral's chat templates accept only ids with nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True)
class ToolCallParser:
    parse: ParseFunction
    template_pattern: str
    """A regular expression that finds the format in the chat templates of models that write it."""
    create_id: Callable[[], str] = _random_id


class ToolCallStream:
    """Parses the text of one answer, piece by piece."""

    def __init__(self, parser: ToolCallParser, tool_names: Collection[str], *, max_calls: int | None = None) -> None:
        self._parser, self._tool_names, self._max_calls = parser, tool_names, max_calls
        self._text = self._content = ""
        self._arguments: list[str] = []  # the part of each call's arguments that has been returned

    @property
    def num_calls(self) -> int:
        return len(self._arguments)

    def add(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Returns new content and new parts of calls."""
        if not text:
            return "", []
        self._text += text
        return self._difference(final=False)

    def finish(self, text: str = "") -> tuple[str, list[ToolCallDelta]]:
        """Returns what was held back. `text` is the last piece."""
        self._text += text
        return self._difference(final=True)

    def _difference(self, *, final: bool) -> tuple[str, list[ToolCallDelta]]:
        parsed = self._parser.parse(self._text, self._tool_names, final)
        if self._arguments and not parsed.calls:  # text after a call has made the whole text unreadable
            return "", []
        content = parsed.content[len(self._content) :]
        self._content += content
        deltas: list[ToolCallDelta] = []
        for index, call in enumerate(parsed.calls[: self._max_calls]):
            if index == len(self._arguments):
                self._arguments.append(call.arguments)
                deltas.append(ToolCallDelta(index, call.arguments, self._parser.create_id(), call.name))
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
    """Where the call ends in the text, or None if it is incomplete or not JSON."""


NotACall = Literal["undecided", "not_a_call"]
"""A text that may become a call, or one that is none."""


def _decode(text: str, start: int = 0) -> tuple[Any, int] | None:
    """Returns the JSON value at this position and its end, or None if it is incomplete or not JSON."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value, end


def _is_name(name: object, tool_names: Collection[str] | None) -> bool:
    """Whether a call can have this name. It has to be one that a client can send back."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH:
        return False
    if tool_names is not None and name not in tool_names:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in name)  # half of a surrogate pair


def _read_json_call(text: str, tool_names: Collection[str] | None, *, final: bool) -> _JsonCall | NotACall:
    """Reads a call such as `{"name": "f", "arguments": {}}` at the beginning of a text.

    If `tool_names` are given, other names are no calls.
    """
    match = _CALL_START.match(text)
    if match is not None:
        decoded_name = _decode(match[1])
        if decoded_name is None or not _is_name(decoded_name[0], tool_names):
            return "not_a_call"
        decoded = _decode(text, match.end())
        if decoded is None:
            return _JsonCall(ToolCall(decoded_name[0], text[match.end() :]), None)
        call = ToolCall(decoded_name[0], text[match.end() : decoded[1]])
        rest = text[decoded[1] :].lstrip()
        if not rest and not final:
            return _JsonCall(call, None)
        return _JsonCall(call, len(text) - len(rest) + rest.startswith("}"))  # some models forget the last brace
    if not text.startswith("{"):
        return "not_a_call" if text or final else "undecided"
    decoded = _decode(text)
    if decoded is None:
        return "not_a_call" if final else "undecided"
    value, end = decoded
    arguments = value.get("arguments", value.get("parameters"))  # the keys may be in another order
    name = value.get("name")
    if not _is_name(name, tool_names) or not isinstance(arguments, dict):
        return "not_a_call"
    return _JsonCall(ToolCall(str(name), json.dumps(arguments)), end)


def _read_json_calls(
    text: str, separators: str, tool_names: Collection[str], *, final: bool
) -> list[ToolCall] | NotACall:
    """Reads calls one after the other. What follows the last one is ignored."""
    calls: list[ToolCall] = []
    while len(calls) < MAX_CALLS:
        text = text.lstrip(" \t\r\n" + separators)
        read = _read_json_call(text, tool_names, final=final)
        if not isinstance(read, _JsonCall):
            return calls or read
        calls.append(read.call)
        if read.end is None:
            return calls
        text = text[read.end :]
    return calls


def _find_outside_strings(text: str, marker: str) -> int:
    """Returns where a marker begins that is not inside a string of JSON, or -1. An unfinished string hides it too."""
    pattern = rf'"(?:[^"\\]|\\.)*(?:"|\\?$)|({re.escape(marker)})'
    return next((match.start(1) for match in re.finditer(pattern, text, re.DOTALL) if match[1]), -1)


def _without_partial(text: str, marker: str) -> str:
    """Returns a text without what may be the beginning of a marker at its end, and without white space before that."""
    length = next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
    return text[: len(text) - length].rstrip()


def parse_hermes(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once for each call, anywhere in the text."""
    start, end = "<tool_call>", "</tool_call>"
    content, calls = "", list[ToolCall]()
    for _ in range(2 * MAX_CALLS):
        before, marker, rest = text.partition(start)
        if not marker or len(calls) == MAX_CALLS:
            break
        content += before
        body = rest.lstrip()
        read = _read_json_call(body, None, final=final)
        if read == "undecided":
            return ParsedText(content.rstrip(), calls)
        if read == "not_a_call":
            content, text = content + marker, rest
            continue
        call, call_end = read.call, read.end
        if call_end is None:
            # The arguments are incomplete, or they are not JSON and end with the call.
            length = _find_outside_strings(call.arguments, end)
            if length < 0:
                arguments = call.arguments if final else _without_partial(call.arguments, end)
                return ParsedText(content.rstrip(), [*calls, ToolCall(call.name, arguments)])
            call_end = len(body) - len(call.arguments) + length
            call = ToolCall(call.name, call.arguments[:length].rstrip())
        calls.append(call)
        text = body[call_end:]
        gap, closed, after = text.partition(end)
        if closed and start not in gap:
            text = after
        elif not final and start not in text:
            return ParsedText(content.rstrip(), calls)
    rest = text if final else _without_partial(text, start)
    return ParsedText((content + rest).rstrip() if calls else content + rest, calls)


def parse_llama3_json(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`{"name": ..., "parameters": {...}}` as the whole answer, with `;` between several calls."""
    return _parse_whole_answer(text, "<|python_tag|>", "{", ";", tool_names, final=final)


def parse_mistral(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` or `[TOOL_CALLS]name{...}` as the whole answer.

    The marker is a special token, which decoding removes.
    """
    rest = text.lstrip().removeprefix("[TOOL_CALLS]").lstrip()
    if not final and rest and any(name.startswith(rest.rstrip()) for name in tool_names):
        return ParsedText("")
    calls: list[ToolCall] = []
    while len(calls) < MAX_CALLS:
        name, brace, _ = rest.partition("{")
        if not brace or name.strip(" \n;,") not in tool_names:
            break
        decoded = _decode(rest, len(name))
        length = len(rest) if decoded is None else decoded[1]
        calls.append(ToolCall(name.strip(" \n;,"), rest[len(name) : length]))
        rest = rest[length:]
    return (
        ParsedText("", calls)
        if calls
        else _parse_whole_answer(text, "[TOOL_CALLS]", "[", "[,", tool_names, final=final)
    )


def _parse_whole_answer(
    text: str, marker: str, first: str, separators: str, tool_names: Collection[str], *, final: bool
) -> ParsedText:
    """Reads an answer that consists of JSON calls, after a marker that may be missing."""
    stripped = text.lstrip()
    if not final and marker.startswith(stripped):
        return ParsedText("")
    body = stripped.removeprefix(marker).lstrip()
    if body.startswith(first) or (not body and not final):
        calls = _read_json_calls(body, separators, tool_names, final=final)
        if calls != "not_a_call":
            return ParsedText("", () if calls == "undecided" else calls)
    return ParsedText(text)


def parse_pythonic(text: str, tool_names: Collection[str], final: bool) -> ParsedText:
    """`[name(key=value, ...), ...]` as the whole answer, with literals of Python as values."""
    stripped = text.strip()
    if not re.match(r"\[(\s*[a-zA-Z_][\w.]*\s*(\(|$)|\s*$)|$", stripped) or (final and not stripped):
        return ParsedText(text)
    calls = _read_python_calls(stripped) if stripped.endswith("]") else None
    if calls is not None:
        return ParsedText("", calls)
    return ParsedText(text if final else "")


def _read_python_calls(text: str) -> list[ToolCall] | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in the strings of the model
            expression = ast.parse(text, mode="eval").body
        if not isinstance(expression, ast.List) or not expression.elts:
            return None
        return [_read_python_call(element) for element in expression.elts[:MAX_CALLS]]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def _read_python_call(node: ast.expr) -> ToolCall:
    """Raises ValueError or TypeError if it is no call that can be written as JSON."""
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError("not a call with keywords only")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a dictionary of keywords")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(ast.unparse(node.func), json.dumps(arguments, allow_nan=False))


TOOL_CALL_PARSERS: Mapping[str, ToolCallParser] = {
    "hermes": ToolCallParser(parse_hermes, r'<tool_call>(\\n|\s)*\{+\s*\\?"name'),
    "mistral": ToolCallParser(parse_mistral, r"\[TOOL_CALLS\]|\[AVAILABLE_TOOLS\]", _mistral_id),
    "pythonic": ToolCallParser(parse_pythonic, r"\[func_name1\(|\[func1\("),
    "llama3_json": ToolCallParser(parse_llama3_json, r'"parameters": dictionary of|<\|python_tag\|>'),
}


def detect_tool_call_parser(chat_template: Any) -> str | None:
    """Returns the name of the parser for what a chat template shows to its model, or None."""
    text = str(chat_template)
    return next((name for name, parser in TOOL_CALL_PARSERS.items() if re.search(parser.template_pattern, text)), None)
