import random

import pytest
import torch

from training.examples import IGNORE_INDEX, ExampleBuilder, collate
from training.task import WORD, check_answer, correct_answer, draw_problem
from training.wording import DRAFT, TARGET


@pytest.fixture(scope="module")
def builder(tokenizer):
    return ExampleBuilder(tokenizer, own=TARGET)


def drawn(builder, count=24, **changes):
    rng = random.Random(0)
    settings = dict(foreign=0.5, mistaken=0.5, num_prefixes=5) | changes
    return [builder.build_synthetic(draw_problem("test", 1, index), rng, **settings) for index in range(count)]


def test_labels_say_whether_the_prefix_is_correct(builder):
    for index, example in enumerate(drawn(builder)):
        problem = draw_problem("test", 1, index)
        token_texts = [builder.token_text(token) for token in example.answer if token != builder.eos_token_id]
        assert example.prefix_lengths[-1] == len(token_texts)
        for length in example.prefix_lengths:
            assert example.is_correct_up_to(length) == (check_answer(problem, token_texts[:length]).first_wrong is None)


def test_only_correct_tokens_are_learned_and_all_of_a_correct_answer_in_the_own_wording(builder):
    for example in drawn(builder):
        if example.first_wrong is not None:
            assert not any(example.trainable[example.first_wrong :])
    for example in drawn(builder, foreign=0.0, mistaken=0.0):
        assert all(example.trainable)
        assert example.answer[-1] == builder.eos_token_id


def test_the_first_token_of_another_wording_is_not_learned(builder):
    problem = draw_problem("test", 1, 0)
    example = builder.build_synthetic(problem, random.Random(1), foreign=1.0, mistaken=0.0, num_prefixes=0)
    skipped = {
        builder.token_text(t) for t, learned in zip(example.answer, example.trainable, strict=True) if not learned
    }
    own_words = set(WORD.findall(correct_answer(problem, TARGET)))
    assert skipped
    assert skipped - own_words == skipped & (
        set(WORD.findall(correct_answer(problem, DRAFT) + correct_answer(problem, 2))) - own_words
    )


def test_a_batch_shows_each_token_its_own_text_and_each_suffix_its_own_prefix(builder):
    examples = drawn(builder, 6)
    batch = collate(examples, builder.verification_suffix, builder.pad_token_id)
    for b, example in enumerate(examples):
        text = [*example.prompt, *example.answer]
        visible = batch.visible[b, 0]
        for q in range(len(text)):
            assert batch.tokens[b][visible[q]].tolist() == text[: q + 1]
        end_nodes = [int(node) for where, node in batch.verification_nodes.tolist() if where == b]
        for length, end in zip(example.prefix_lengths, end_nodes, strict=True):
            seen = [*example.prompt, *example.answer[:length], *builder.verification_suffix.token_ids]
            assert batch.tokens[b][visible[end]].tolist() == seen
            assert batch.positions[b][visible[end]].tolist() == list(range(len(seen)))


def test_the_labels_of_a_batch_match_its_examples(builder):
    examples = drawn(builder, 8)
    batch = collate(examples, builder.verification_suffix, builder.pad_token_id)
    labels = iter(batch.verification_labels.tolist())
    for b, example in enumerate(examples):
        start, size = len(example.prompt), len(example.answer)
        for k, (token, learned) in enumerate(zip(example.answer, example.trainable, strict=True)):
            assert batch.next_token[b, start + k - 1] == (token if learned else IGNORE_INDEX)
            wrong = example.first_wrong
            assert batch.astray[b, start + k] == int(wrong is not None and k >= wrong)
            expected = IGNORE_INDEX if wrong is not None and k > wrong else int(k == wrong)
            assert batch.slip[b, start + k] == expected
        assert (batch.next_token[b, : start - 1] == IGNORE_INDEX).all()
        assert (batch.slip[b, start + size :] == IGNORE_INDEX).all()
        assert [next(labels) for _ in example.prefix_lengths] == [
            builder.verification_suffix.correct_token_ids[0]
            if example.is_correct_up_to(length)
            else builder.verification_suffix.incorrect_token_ids[0]
            for length in example.prefix_lengths
        ]


def test_padding_changes_nothing(builder, tokenizer):
    from training.attention import TREE_ATTENTION
    from training.objectives import ErrorDetectionObjective
    from training.pair_recipe import new_model, target_config

    model = new_model(target_config(tokenizer, 3), 0)
    assert model.config._attn_implementation == TREE_ATTENTION
    objective = ErrorDetectionObjective(model, builder.verification_suffix, base_layers=1)
    examples = drawn(builder, 2)
    alone = collate(examples[:1], builder.verification_suffix, builder.pad_token_id, multiple=1)
    padded = collate(examples[:1], builder.verification_suffix, builder.pad_token_id, multiple=512)
    assert padded.tokens.shape[1] > alone.tokens.shape[1]
    torch.testing.assert_close(objective(alone)[0], objective(padded)[0], rtol=2e-2, atol=2e-2)


def test_a_scrambled_answer_trains_neither_generation_nor_verification(builder):
    rng = random.Random(0)
    wrong = 0
    for index in range(20):
        problem = draw_problem("test", 1, index)
        example = builder.build_scrambled(problem, rng, foreign=0.5, share=0.15)
        assert not any(example.trainable)
        assert not example.prefix_lengths
        wrong += example.first_wrong is not None
    assert wrong >= 18


def test_an_answer_that_stops_too_early_is_wrong_at_its_end(builder):
    problem = draw_problem("test", 1, 0)
    words = builder.token_ids(correct_answer(problem, DRAFT))[:9]
    example = builder.build_from_draft(problem, [*words, builder.eos_token_id], random.Random(0), num_prefixes=3)
    assert example.first_wrong == 9
    assert all(example.is_correct_up_to(length) for length in example.prefix_lengths)
