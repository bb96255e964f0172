from copy import deepcopy

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from parse.errors import RequestError
from parse.prompts import TemplateError, build_verification_suffix, chat_prompt_token_ids


def test_prompt_draft_suffix_and_conversation_are_the_same_tokens(tokenizer):
    """Prompt, draft and suffix, concatenated, are what the template makes of the finished conversation."""
    messages = [
        {"role": "system", "content": "Answer step by step."},
        {"role": "user", "content": "How many nuts now?"},
    ]
    answer, verification_prompt = "So Max has 5 nuts now.", "Is this right so far?"
    after = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": verification_prompt}]
    conversation = tokenizer.apply_chat_template(after, add_generation_prompt=True)["input_ids"]
    suffix = build_verification_suffix(tokenizer, verification_prompt)
    assert (
        chat_prompt_token_ids(tokenizer, messages) + tokenizer.encode(answer) + list(suffix.token_ids) == conversation
    )
    assert tokenizer.decode(suffix.correct_token_ids[0]) == "Correct"
    assert tokenizer.decode(suffix.incorrect_token_ids[0]) == "Incorrect"


def test_a_template_that_rewrites_the_generation_prompt_is_refused(tokenizer):
    other = deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>Well,"
    )
    with pytest.raises(TemplateError, match="generation prompt"):
        build_verification_suffix(other, "Is this right so far?")


def test_words_of_several_tokens_are_told_apart_by_the_first_that_differs(tokenizer):
    """In the demo's tokenizer a word beyond the task is spelled, byte by byte."""
    plain = build_verification_suffix(tokenizer, "Is this right so far?")
    suffix = build_verification_suffix(tokenizer, "Is this right so far?", correct="Perhaps", incorrect="Perfect")
    assert suffix.token_ids == (*plain.token_ids, *tokenizer.encode("Per"))
    assert [tokenizer.decode(ids) for ids in (suffix.correct_token_ids, suffix.incorrect_token_ids)] == ["h", "f"]


def test_a_word_counts_with_a_leading_space_too():
    words = ["<s>", "</s>", "Ask", "Yes", "No", "\u2581Yes", "\u2581No", "\u2581Ask"]
    model = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}))
    model.pre_tokenizer = Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}",
        extra_special_tokens=["</s>"],
    )  # fmt: skip
    suffix = build_verification_suffix(tokenizer, "Ask", correct="Yes", incorrect="No")
    assert (suffix.correct_token_ids, suffix.incorrect_token_ids) == ((3, 5), (4, 6))


@pytest.mark.parametrize(("correct", "incorrect"), [("Yes", "Yes"), ("Per", "Perhaps")])
def test_words_that_cannot_be_told_apart_are_refused(tokenizer, correct, incorrect):
    with pytest.raises(TemplateError, match="begin alike"):
        build_verification_suffix(tokenizer, "Is this right so far?", correct=correct, incorrect=incorrect)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        build_verification_suffix(bare)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([{"role": "function", "content": "x"}], r"messages\[0\].role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"messages\[1\].content"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused_by_its_field(tokenizer, messages, field):
    with pytest.raises(RequestError, match=field):
        chat_prompt_token_ids(tokenizer, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system messages') }}",
        "{% if %}",
        # Forgets every question but the first.
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}{% elif loop.first %}U:{{ m.content }}\n"
        "{% else %}\n{% endif %}{% endfor %}{% if messages[-1].role == 'user' %}A:{% endif %}",
        # Says every answer twice.
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}|{{ m.content }}{% else %}U:"
        "{{ m.content }}\n{% endif %}{% endfor %}{% if messages[-1].role == 'user' %}A:{% endif %}",
    ],
)
def test_a_template_that_fails_or_breaks_the_layout_is_refused(tokenizer, template):
    broken = deepcopy(tokenizer)
    broken.chat_template = template
    with pytest.raises(TemplateError):
        build_verification_suffix(broken)
