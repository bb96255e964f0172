"""A published model, SmolLM2-135M-Instruct, against transformers: its text, its prompts and its verification."""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.engine_speed import resident_mb
from bench.smollm2 import smollm2
from parse.acceptance import Thresholds
from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.errors import RequestError
from parse.events import TextDelta
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


def test_the_default_verification_prompt_is_short_and_names_both_answers(pair, reference):
    assert len(pair.pipeline.suffix.token_ids) <= 18
    assert "full" in pair.pipeline.capabilities.modes


def test_without_mass_on_the_answer_words_it_offers_no_mode_that_verifies(settings, caplog):
    with Pair(settings, verification=VerificationSettings(prompt="Describe the sea in one sentence.")) as pair:
        assert "full" not in pair.pipeline.capabilities.modes
        with pytest.raises(RequestError, match="full"):
            pair.generate("Hello", mode="full", prediction="Hi")
        assert pair.generate("Hello", temperature=0, max_tokens=4).usage.mode == "off"
    assert "does not reply to the verification prompt" in caplog.text


SUBJECTS = [
    "rivers",
    "a small dog",
    "the number seven",
    "bread",
    "winter",
    "chess",
    "a red car",
    "Paris",
    "bees",
    "sleep",
]
MIXED_PROMPTS = [
    *(f"Say something about {subject}." for subject in SUBJECTS),
    *(f"{'Please think about it carefully. ' * number}What is {subject}?" for number, subject in enumerate(SUBJECTS)),
]


def test_mixed_batches_give_the_tokens_of_transformers(pair, reference):
    """Twenty prompts of different lengths run at the same time, with answers of different lengths."""
    model, tokenizer = reference

    async def answer_all():
        calls = (
            pair.agenerate(prompt, mode="off", temperature=0, max_tokens=4 + number % 9)
            for number, prompt in enumerate(MIXED_PROMPTS)
        )
        return await asyncio.gather(*calls)

    for number, output in enumerate(asyncio.run(answer_all())):
        ids = rendered(tokenizer, [{"role": "user", "content": MIXED_PROMPTS[number]}])
        with torch.inference_mode():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4 + number % 9, do_sample=False
            )
        expected = answer[0, ids.shape[1] :].tolist()
        assert list(output.token_ids) == [token for token in expected if token != tokenizer.eos_token_id]


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive", "exact"])
def test_each_mode_keeps_a_draft_that_the_target_would_write(pair, texts, mode):
    for prompt, text in zip(PROMPTS, texts, strict=True):
        thresholds = None if mode == "exact" else Thresholds(0.0, 0.0)
        output = pair.generate(prompt, mode=mode, prediction=text, temperature=0, max_tokens=24, thresholds=thresholds)
        assert output.text == text
        assert output.usage.accepted_tokens >= 0.8 * len(output.token_ids)


@pytest.mark.parametrize("mode", ["full", "rounds", "progressive", "exact"])
def test_each_mode_replaces_a_draft_that_is_rejected(pair, texts, mode):
    thresholds = None if mode == "exact" else Thresholds(1.0, 1.0)
    output = pair.generate(
        PROMPTS[0], mode=mode, prediction="Zebras, if any.", temperature=0, max_tokens=24, thresholds=thresholds
    )
    assert output.text == texts[0]
    assert output.usage.accepted_tokens == 0


def test_proposals_of_ngram_do_not_change_the_text(settings, folder, texts):
    ngram = settings.model_copy(update={"speculative_configs": (SpeculativeConfig(method="ngram"),)})
    with Pair(ngram, verification=VerificationSettings.for_model(folder)) as pair:
        outputs = [pair.generate(prompt, mode="off", temperature=0, max_tokens=24) for prompt in PROMPTS]
        repeated = pair.generate("Repeat: one two one two one two one two", mode="off", temperature=0, max_tokens=40)
    assert [output.text for output in outputs] == texts
    assert repeated.usage.speculation is not None and sum(repeated.usage.speculation.proposed_per_position) > 0


def test_a_stream_is_the_text_of_its_tokens(pair, reference):
    _, tokenizer = reference
    for prompt in ("Write a line with emoji 🙂 and the word naïve.", "Write 3 numbers."):
        deltas = [
            event
            for event in pair.stream(prompt, mode="off", temperature=0, max_tokens=24)
            if isinstance(event, TextDelta)
        ]
        token_ids = [token for delta in deltas for token in delta.token_ids]
        assert "".join(delta.text for delta in deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)
        assert len(deltas) > 3


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_memory_stays_flat_over_500_requests(pair):
    def run(first, last):
        async def answer_all():
            slots = asyncio.Semaphore(16)

            async def answer(number):
                async with slots:
                    await pair.agenerate(f"Number {number}: {SUBJECTS[number % 10]}", mode="off", max_tokens=4)

            await asyncio.gather(*map(answer, range(first, last)))

        asyncio.run(answer_all())

    run(0, 150)
    before = resident_mb()
    run(150, 650)
    assert resident_mb() < before + 40
