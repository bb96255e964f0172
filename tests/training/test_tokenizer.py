import random

import pytest
from transformers import AutoTokenizer

from training.mistakes import compose_answer
from training.task import WORD, correct_answer, draw_problem, vocabulary
from training.tokenizer import SYSTEM_PROMPTS, VERIFICATION_PROMPT


def test_every_word_of_the_task_is_one_token(tokenizer):
    for word in vocabulary():
        assert len(tokenizer.encode(word)) == 1
    text = correct_answer(draw_problem("test", 1, 0))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == WORD.findall(text)


def test_a_phrase_has_the_same_tokens_alone_and_in_its_answer(tokenizer):
    rng = random.Random(0)
    for index in range(60):
        phrases = compose_answer(draw_problem("test", 1, index), rng, lambda line, part: None)
        alone = [token for phrase in phrases for token in tokenizer.encode(phrase.text)]
        assert alone == tokenizer.encode("".join(phrase.text for phrase in phrases))


def test_any_text_survives_a_round_trip(tokenizer):
    rng = random.Random(0)
    strange = [chr(code) for code in (*range(32, 127), 0xE9, 0x4E2D, 0x1F600, 0x0A, 0x09, 0x0301, 0x200D)]
    texts = ["".join(rng.choices(strange, k=rng.randint(0, 40))) for _ in range(300)]
    for text in [*texts, "  two  spaces ", "12345", VERIFICATION_PROMPT, *SYSTEM_PROMPTS]:
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_saving_and_loading_does_not_change_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    messages = [{"role": role, "content": f"I am {role}."} for role in ("system", "user", "assistant", "user")]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|system|>I am system.<|end|><|user|>I am user.<|end|>"
        "<|assistant|>I am assistant.<|end|><|user|>I am user.<|end|><|assistant|>"
    )
    assert loaded.encode(rendered) == tokenizer.encode(rendered)
    assert loaded.eos_token == "<|end|>"
    assert loaded.pad_token == "<|pad|>"


def test_an_unknown_role_is_rejected(tokenizer):
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}])
