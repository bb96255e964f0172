"""Reasoning is separated from the answer, however the text is divided."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.reasoning import ReasoningParser, ReasoningTags, find_reasoning_tags

TAGS = ReasoningTags("<think>", "</think>")

CASES = [
    ("<think>\nHm, 7 by 8.\n</think>\n\nIt is 56.", "expected", "Hm, 7 by 8.", "It is 56."),
    ("Hm, 7 by 8.\n</think>\n\nIt is 56.", "open", "Hm, 7 by 8.", "It is 56."),
    ("\n\nHm.</think>It is 56.", "open", "Hm.", "It is 56."),
    ("It is 56.", "expected", "", "It is 56."),
    ("It is 56.", "none", "", "It is 56."),
    ("  It is < 57.", "none", "", "  It is < 57."),
    ("<think>\n\n</think>\n\nIt is 56.", "none", "", "It is 56."),
    ("  <think>a</think> b", "none", "a", "b"),
    ("Say <think> and </think>.", "none", "", "Say <think> and </think>."),
    ("<think>a</think>b <think>c</think>", "none", "a", "b <think>c</think>"),
    ("It never ends", "open", "It never ends", ""),
    ("<think>It never </thin", "none", "It never </thin", ""),
    ("<thi", "none", "", "<thi"),
    ("", "open", "", ""),
    ("</think>", "open", "", ""),
    ("a\n", "open", "a\n", ""),
]


def separate(text, state, splits, tags=TAGS):
    parser = ReasoningParser(tags, state)
    bounds = [0, *sorted(min(split, len(text)) for split in splits), len(text)]
    parts = [parser.add(text[start:end]) for start, end in pairwise(bounds)]
    parts.append(parser.finish())
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(("text", "state", "reasoning", "answer"), CASES)
@given(splits=st.lists(st.integers(0, 50), max_size=8))
def test_any_parts_give_the_same_reasoning_and_answer(text, state, reasoning, answer, splits):
    assert separate(text, state, splits) == (reasoning, answer)


@pytest.mark.parametrize(("text", "state", "reasoning", "answer"), CASES)
def test_single_characters_give_the_same_reasoning_and_answer(text, state, reasoning, answer):
    assert separate(text, state, range(len(text))) == (reasoning, answer)


@given(text=st.text("<>/think a\n", max_size=30), splits=st.lists(st.integers(0, 30), max_size=5))
def test_without_tags_the_text_is_the_answer(text, splits):
    assert separate(text, None, splits, tags=None) == ("", text)


def test_the_tags_are_those_of_the_template():
    assert find_reasoning_tags("{{ content.split('</think>')[-1] }}") == TAGS
    assert find_reasoning_tags("{{ message.content }}") is None
