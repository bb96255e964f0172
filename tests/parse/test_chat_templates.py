"""Prompts and verification suffixes with the chat templates of well-known model families."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from parse.errors import RequestError
from parse.prompts import (
    TemplateError,
    build_verification_suffix,
    chat_prompt,
    reasoning_tags,
    validate_template_kwargs,
    visible_reasoning_tags,
)
from tests.parse.chat_templates import FAMILIES

VERIFICATION_PROMPT = "Is the answer right so far? Reply Correct or Incorrect."
HI = [{"role": "user", "content": "Hi"}]


def build_tokenizer(family):
    """A tokenizer of single bytes, with the special tokens of the family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos or None, eos_token=family.eos or None
    )
    fast.add_special_tokens({"additional_special_tokens": list(family.special_tokens)})
    fast.chat_template = family.template
    return fast


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_the_prompt_is_that_of_the_family(family):
    tokenizer = build_tokenizer(family)
    prompt = chat_prompt(tokenizer, HI)
    assert (tokenizer.decode(prompt.token_ids), prompt.reasoning) == (family.prompt, family.reasoning)


def test_without_reasoning_the_block_is_closed_or_never_opened(family):
    tokenizer = build_tokenizer(family)
    prompt = chat_prompt(tokenizer, HI, {"enable_thinking": False})
    assert (tokenizer.decode(prompt.token_ids), prompt.reasoning) == (family.prompt_without_reasoning, "none")


def test_reasoning_can_be_requested_where_the_template_has_a_switch():
    tokenizer = build_tokenizer(FAMILIES["Granite 3.3"])
    assert chat_prompt(tokenizer, HI, {"thinking": True}).reasoning == "expected"
    tokenizer = build_tokenizer(FAMILIES["Qwen3"])
    assert chat_prompt(tokenizer, HI, {"enable_thinking": True}).reasoning == "expected"


def test_only_switches_that_the_template_uses_count():
    qwen3 = build_tokenizer(FAMILIES["Qwen3"])  # it knows enable_thinking only
    assert chat_prompt(qwen3, HI, {"thinking": False}).reasoning == "expected"
    assert chat_prompt(qwen3, HI, {"thinking": True, "enable_thinking": False}).reasoning == "none"
    granite = build_tokenizer(FAMILIES["Granite 3.3"])
    assert chat_prompt(granite, HI, {"enable_thinking": False, "thinking": True}).reasoning == "expected"


def test_a_value_that_the_template_cannot_use_is_rejected():
    tokenizer = build_tokenizer(FAMILIES["Phi-4"])
    tokenizer.chat_template += "{% if budget is defined and budget > 5 %}{{ budget }}{% endif %}{{ date }}"
    for kwargs in ({"budget": "5"}, {"budget": None}, {"budget": [1]}, {"date": "\ud800"}):
        with pytest.raises(TemplateError, match="rejects the conversation"):
            chat_prompt(tokenizer, HI, kwargs)


def test_tags_that_are_special_tokens_are_not_searched_in_the_text():
    """Decoded text does not contain special tokens, so the end of the reasoning could not be found."""
    tokenizer = build_tokenizer(FAMILIES["Qwen3"])
    assert visible_reasoning_tags(tokenizer) == reasoning_tags(tokenizer) is not None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert visible_reasoning_tags(tokenizer) is None


def test_the_suffix_is_the_next_turn_of_the_family_and_ends_where_the_answer_word_begins(family):
    tokenizer = build_tokenizer(family)
    suffix = build_verification_suffix(tokenizer, VERIFICATION_PROMPT)
    assert tokenizer.decode(suffix.token_ids) == family.suffix.format(VERIFICATION_PROMPT)
    assert not set(suffix.correct_token_ids) & set(suffix.incorrect_token_ids)
    assert [tokenizer.decode([ids[0]]) for ids in (suffix.correct_token_ids, suffix.incorrect_token_ids)] == ["C", "I"]


def test_prompt_draft_and_suffix_are_the_conversation_that_the_template_renders(family):
    """Where earlier answers are rendered with an empty block, or none, the draft follows the block of the prompt."""
    tokenizer = build_tokenizer(family)
    prompt = chat_prompt(tokenizer, HI, {"enable_thinking": False}).token_ids
    suffix = build_verification_suffix(tokenizer, VERIFICATION_PROMPT).token_ids
    conversation = [*HI, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": VERIFICATION_PROMPT}]
    rendered = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )

    def without_blocks(text):
        for block in ("<think>\n\n</think>", "<think></think>", "<think>"):
            text = text.replace(block, "")
        return "".join(text.split())

    parts = [*prompt, *tokenizer.encode("Hello!", add_special_tokens=False), *suffix]
    assert without_blocks(tokenizer.decode(parts)) == without_blocks(rendered)
    if reasoning_tags(tokenizer) is None:
        assert tokenizer.decode(parts) == rendered


def test_a_word_of_the_user_does_not_open_a_reasoning_block():
    tokenizer = build_tokenizer(FAMILIES["Qwen3-Instruct-2507"])
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "What does <think> mean?"}])
    assert prompt.reasoning == "none"


def test_a_template_that_drops_a_turn_is_rejected():
    tokenizer = build_tokenizer(FAMILIES["Phi-4"])
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages[:1]")
    with pytest.raises(TemplateError, match="the chat template does not"):
        build_verification_suffix(tokenizer, VERIFICATION_PROMPT)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "x"},
        {"add_generation_prompt": False},
        {"messages": []},
        {"tokenize": True},
        {"bos_token": "x"},
        {"raise_exception": 1},
        {"namespace": 1},
        [],
        {1: 2},
    ],
)
def test_variables_that_would_replace_the_conversation_or_the_template_are_rejected(kwargs):
    with pytest.raises(RequestError, match=r"^chat_template_kwargs: must "):
        validate_template_kwargs(build_tokenizer(FAMILIES["SmolLM3"]), kwargs)


def test_a_variable_that_the_template_does_not_use_is_rejected():
    tokenizer = build_tokenizer(FAMILIES["Phi-4"])
    with pytest.raises(RequestError, match=r"^chat_template_kwargs: .* does not use 'enable_thinkin'"):
        validate_template_kwargs(tokenizer, {"enable_thinkin": False})
    assert validate_template_kwargs(tokenizer, {"enable_thinking": False}) == {"enable_thinking": False}
