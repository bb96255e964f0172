import pytest

from parse.prompts import TemplateError, check_ids, prompt_ids


def test_prompt_probe_and_conversation_are_the_same_tokens(tokenizer):
    """Prompt, draft and suffix, concatenated, are what the template makes of the finished conversation."""
    turns = [{"role": "system", "content": "Answer step by step."}, {"role": "user", "content": "How many nuts now?"}]
    answer, question = "So Max has 5 nuts now.", "Is this right so far?"
    after = [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    whole = tokenizer.apply_chat_template(after, add_generation_prompt=True)["input_ids"]
    check = check_ids(tokenizer, question)
    assert prompt_ids(tokenizer, turns) + tokenizer.encode(answer) + list(check.suffix) == whole
    assert tokenizer.decode([check.correct]) == "Correct"
    assert tokenizer.decode([check.incorrect]) == "Incorrect"


def test_a_template_that_rewrites_the_generation_prompt_is_refused(tokenizer):
    from copy import deepcopy

    thinking = deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>"
    )
    with pytest.raises(TemplateError, match="generation prompt"):
        check_ids(thinking, "Is this right so far?")


def test_an_answer_word_of_several_tokens_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="'Perhaps' is 7 tokens"):
        check_ids(tokenizer, "Is this right so far?", correct="Perhaps")
