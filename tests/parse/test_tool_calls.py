import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.tool_calls import (
    MAX_CALLS,
    MAX_NAME_LENGTH,
    TOOL_CALL_PARSERS,
    ParsedText,
    ToolCallStream,
    detect_tool_call_parser,
    parse_hermes,
)

NAMES = ("get_weather", "add", "get")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab\"'\\{}[]<>/;,: \n", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=5,
)
arguments = st.dictionaries(st.sampled_from(["a", "city", "unit"]), values, max_size=3)
calls = st.lists(st.tuples(st.sampled_from(NAMES), arguments), min_size=1, max_size=3)


def hermes(content: str, items: list) -> str:
    bodies = (json.dumps({"name": name, "arguments": values}) for name, values in items)
    return "\n".join([*([content] if content else []), *(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)])


def llama3_json(_: str, items: list) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": values}) for name, values in items)


def mistral(_: str, items: list) -> str:
    return json.dumps([{"name": name, "arguments": values} for name, values in items])


def pythonic(_: str, items: list) -> str:
    texts = (f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})" for name, values in items)
    return f"[{', '.join(texts)}]"


WRITERS = {"hermes": hermes, "llama3_json": llama3_json, "mistral": mistral, "pythonic": pythonic}


def streamed(name: str, parts: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """Returns the content and the calls, put together as a client does."""
    stream = ToolCallStream(TOOL_CALL_PARSERS[name], NAMES, **options)
    content, parsed, ids = "", dict[int, list[str]](), set[str]()
    for text, deltas in [*(stream.add(part) for part in parts), stream.finish()]:
        content += text
        for delta in deltas:
            if delta.id is not None:
                assert delta.index == len(parsed) and delta.id not in ids and delta.name
                ids.add(delta.id)
                parsed[delta.index] = [delta.name, ""]
            parsed[delta.index][1] += delta.arguments
    assert stream.num_calls == len(parsed)
    return content, [(function, text) for function, text in parsed.values()]


def split(text: str, data: st.DataObject) -> list[str]:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]


@pytest.mark.parametrize("name", WRITERS)
@given(items=calls, content=st.sampled_from(["", "I will look.", "1 < 2 <tool"]), data=st.data())
def test_calls_are_found_however_the_text_is_split(name, items, content, data):
    content = content if name == "hermes" else ""
    text = WRITERS[name](content, items)
    got, parsed = streamed(name, split(text, data))
    assert got == content
    assert [(function, json.loads(text)) for function, text in parsed] == items


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "text",
    [
        "The answer is 5.",
        '{"answer": 5}',
        '{"name": 5, "parameters": {}}',
        '{"name": "add", "arguments": [1]}',
        '{"name": "Ann", "age": 5}',
        r'{"name": "get\_weather", "arguments": {}}',
        '[{"name": "Ann"}, {"name": "Ben"}]',
        "[add(a=1e999)]",
        "<tool_call>" * 1000,
        "[1, 2] is a list.",
        "[add(1)]",
        "[add(a=open('x'))]",
        "A <tool_call> without JSON </tool_call> is text.",
        "get well",
        "",
        "  \n",
        "{",
        "[",
        "[add(",
        "<tool_ca",
    ],
)
@given(data=st.data())
def test_what_is_no_call_is_content(name, text, data):
    assert streamed(name, split(text, data)) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', [("add", '{"a": 1')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>', [("add", '{"a": 1,}}')]),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {a}}</tool_call>'
            '<tool_call>{"name": "get", "arguments": {}}}</tool_call>',
            [("add", "{a}}"), ("get", "{}")],
        ),
        ("llama3_json", '<|python_tag|>{"name": "add", "parameters": {}}', [("add", "{}")]),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}]', [("add", "{}")]),
        ("mistral", '[TOOL_CALLS]add{"a": 1}', [("add", '{"a": 1}')]),
        ("mistral", 'add{"a": 1}get{"b": [2]}', [("add", '{"a": 1}'), ("get", '{"b": [2]}')]),
    ],
)
def test_variants_that_models_write_are_calls(name, text, expected):
    for size in (1, 3, len(text)):
        assert streamed(name, [text[at : at + size] for at in range(0, len(text), size)]) == ("", expected)


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "add"',
    ', "arguments": ',
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "a",
    " ",
]
FRAGMENTS += ["add(", ")", "a=", "1", ",", ";", "[TOOL_CALLS]", "<|python_tag|>"]


@pytest.mark.parametrize("name", WRITERS)
@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=20), data=st.data())
def test_any_text_is_parsed(name, fragments, data):
    """Nothing is raised. If there is no call, no character is lost."""
    text = "".join(fragments)
    content, parsed = streamed(name, split(text, data))
    assert parsed or content == text


@pytest.mark.parametrize("name", WRITERS)
def test_deeply_nested_arguments_are_no_error(name):
    text = WRITERS[name]("", [("add", {"a": 1})]).replace("1", "[" * 100_000)
    streamed(name, [text])


def test_ids_are_those_that_the_templates_of_mistral_accept():
    for name, pattern in (("mistral", "[a-zA-Z0-9]{9}"), ("hermes", "call_[0-9a-f]{24}")):
        stream = ToolCallStream(TOOL_CALL_PARSERS[name], NAMES)
        _, (delta,) = stream.finish(WRITERS[name]("", [("add", {})]))
        assert re.fullmatch(pattern, delta.id or "")


def test_arguments_are_streamed_while_they_are_written():
    stream = ToolCallStream(TOOL_CALL_PARSERS["hermes"], NAMES)
    assert stream.add('Wait. <tool_call>{"name": "add", "arg') == ("Wait.", [])
    _, (start,) = stream.add('uments": {"a')
    assert (start.index, start.name, start.arguments) == (0, "add", '{"a') and start.id
    _, (more,) = stream.add('": 1')
    assert (more.id, more.name, more.arguments) == (None, None, '": 1')
    _, (end,) = stream.add("}}</tool_call>")
    assert end.arguments == "}"
    assert stream.finish() == ("", [])


def test_only_the_first_calls_are_returned_on_request():
    text = hermes("", [("add", {}), ("get", {}), ("get", {})])
    assert streamed("hermes", [text], max_calls=1) == ("", [("add", "{}")])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (r"{{ '<tool_call>\n{\"name\": <function-name>' }}", "hermes"),
        (r"{{ '<tool_call>\n<function=' }}", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '[func_name1(params_name1=params_value1' }}", "pythonic"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_chat_template_shows_the_format(template, name):
    assert detect_tool_call_parser(template) == name


@pytest.mark.parametrize("name", ["", "n" * (MAX_NAME_LENGTH + 1), "\\ud800", "a\\udfff"])
@pytest.mark.parametrize("call", ['{"name": "%s", "arguments": {}}', '{"arguments": {}, "name": "%s"}'])
def test_a_name_that_cannot_be_sent_back_is_no_call(name, call):
    text = f"<tool_call>{call % name}</tool_call>"
    assert parse_hermes(text, ("f",), final=True) == ParsedText(text, [])


def test_no_more_calls_are_returned_than_can_be_sent_back():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parsed = parse_hermes(call * (MAX_CALLS + 2), ("f",), final=True)
    assert (len(parsed.calls), parsed.content) == (MAX_CALLS, call * 2)
