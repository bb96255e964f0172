"""A published model, SmolLM2-135M-Instruct, against transformers: its text, its prompts and its verification."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.smollm2 import smollm2
from parse.config import EngineSettings, VerificationSettings
from parse.errors import RequestError
from parse.pair import Pair

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = ["Name three primary colors.", "What is the capital of France?", "Write one sentence about the sea."]


@pytest.fixture(scope="module")
def folder():
    try:
        return str(smollm2())
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def settings(folder):
    return EngineSettings(model=folder, num_threads=1, max_model_len=512, kv_cache_memory_bytes=512 * 2**20)


@pytest.fixture(scope="module")
def pair(settings, folder):
    with Pair(settings, verification=VerificationSettings.for_model(folder, min_answer_mass=0.0)) as pair:
        yield pair


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def texts(reference):
    """The greedy answers of transformers."""
    model, tokenizer = reference
    texts = []
    for prompt in PROMPTS:
        ids = rendered(tokenizer, [{"role": "user", "content": prompt}])
        with torch.inference_mode():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, repetition_penalty=1.0
            )
        texts.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_it_generates_the_text_of_transformers(pair, texts):
    outputs = [pair.generate(prompt, mode="off", temperature=0, max_tokens=24) for prompt in PROMPTS]
    assert [output.text for output in outputs] == texts
    assert any(text.strip() for text in texts)


def answer_word_probabilities(reference, settings, prompt, answer):
    """The probabilities of both answer words, from a rendered conversation and one forward pass of transformers."""
    model, tokenizer = reference
    conversation = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": settings.prompt},
    ]
    with torch.inference_mode():
        logits = model(rendered(tokenizer, conversation)).logits[0, -1]
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in (settings.correct, settings.incorrect)]
    return logits.double().softmax(-1)[words]


def test_it_verifies_an_answer_as_a_rendered_conversation_does(pair, reference, texts):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        correct, incorrect = answer_word_probabilities(reference, pair.pipeline.settings, prompt, text)
        output = pair.generate(prompt, mode="full", prediction=text, temperature=0, max_tokens=24)
        (verification,) = output.verifications
        assert verification.p_correct[-1] == pytest.approx(float(correct / (correct + incorrect)), abs=2e-3)
        assert verification.answer_mass[-1] == pytest.approx(float(correct + incorrect), rel=0.02)


def test_without_mass_on_the_answer_words_it_offers_no_mode_that_verifies(settings, caplog):
    """SmolLM2 is too small to reply to the verification prompt with one of the two words."""
    with Pair(settings) as pair:
        assert "full" not in pair.pipeline.capabilities.modes
        with pytest.raises(RequestError, match="full"):
            pair.generate("Hello", mode="full", prediction="Hi")
        assert pair.generate("Hello", temperature=0, max_tokens=4).usage.mode == "off"
    assert "does not reply to the verification prompt" in caplog.text
