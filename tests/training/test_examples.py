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


def test_verdicts_say_whether_the_prefix_is_right(builder):
    for index, row in enumerate(drawn(builder)):
        given = draw_problem("test", 1, index)
        pieces = [builder.token_text(token) for token in row.answer if token != builder.eos_token_id]
        assert row.prefix_lengths[-1] == len(pieces)
        for cut in row.prefix_lengths:
            assert row.is_correct_up_to(cut) == (check_answer(given, pieces[:cut]).first_wrong is None)


def test_only_right_tokens_are_learnt_and_a_right_answer_in_ones_own_wording_wholly(builder):
    for row in drawn(builder):
        if row.first_wrong is not None:
            assert not any(row.trainable[row.first_wrong :])
    for row in drawn(builder, foreign=0.0, mistaken=0.0):
        assert all(row.trainable)
        assert row.answer[-1] == builder.eos_token_id


def test_another_wording_is_not_learnt_where_it_sets_in(builder):
    given = draw_problem("test", 1, 0)
    row = builder.build_synthetic(given, random.Random(1), foreign=1.0, mistaken=0.0, num_prefixes=0)
    skipped = {builder.token_text(t) for t, learnt in zip(row.answer, row.trainable, strict=True) if not learnt}
    own_words = set(WORD.findall(correct_answer(given, TARGET)))
    assert skipped
    assert skipped - own_words == skipped & (
        set(WORD.findall(correct_answer(given, DRAFT) + correct_answer(given, 2))) - own_words
    )


def test_a_batch_shows_each_token_its_own_text_and_each_probe_its_own_prefix(builder):
    rows = drawn(builder, 6)
    made = collate(rows, builder.verification_suffix, builder.pad_token_id)
    for b, row in enumerate(rows):
        text = [*row.prompt, *row.answer]
        visible = made.visible[b, 0]
        for q in range(len(text)):
            assert made.tokens[b][visible[q]].tolist() == text[: q + 1]
        ends = [int(node) for where, node in made.verification_nodes.tolist() if where == b]
        for cut, end in zip(row.prefix_lengths, ends, strict=True):
            seen = [*row.prompt, *row.answer[:cut], *builder.verification_suffix.suffix]
            assert made.tokens[b][visible[end]].tolist() == seen
            assert made.positions[b][visible[end]].tolist() == list(range(len(seen)))


def test_the_labels_of_a_batch_say_what_the_rows_say(builder):
    rows = drawn(builder, 8)
    made = collate(rows, builder.verification_suffix, builder.pad_token_id)
    verdicts = iter(made.verification_labels.tolist())
    for b, row in enumerate(rows):
        start, size = len(row.prompt), len(row.answer)
        for k, (token, learnt) in enumerate(zip(row.answer, row.trainable, strict=True)):
            assert made.next_token[b, start + k - 1] == (token if learnt else IGNORE_INDEX)
            wrong = row.first_wrong
            assert made.astray[b, start + k] == int(wrong is not None and k >= wrong)
            expected = IGNORE_INDEX if wrong is not None and k > wrong else int(k == wrong)
            assert made.slip[b, start + k] == expected
        assert (made.next_token[b, : start - 1] == IGNORE_INDEX).all()
        assert (made.slip[b, start + size :] == IGNORE_INDEX).all()
        assert [next(verdicts) for _ in row.prefix_lengths] == [
            builder.verification_suffix.correct[0]
            if row.is_correct_up_to(cut)
            else builder.verification_suffix.incorrect[0]
            for cut in row.prefix_lengths
        ]


def test_padding_changes_nothing(builder, tokenizer):
    from training.attention import TREE_ATTENTION
    from training.objectives import ErrorDetectionObjective
    from training.pair import new_model, target_config

    model = new_model(target_config(tokenizer, 3), 0)
    assert model.config._attn_implementation == TREE_ATTENTION
    lesson = ErrorDetectionObjective(model, builder.verification_suffix, base_layers=1)
    rows = drawn(builder, 2)
    alone = collate(rows[:1], builder.verification_suffix, builder.pad_token_id, multiple=1)
    padded = collate(rows[:1], builder.verification_suffix, builder.pad_token_id, multiple=512)
    assert padded.tokens.shape[1] > alone.tokens.shape[1]
    torch.testing.assert_close(lesson(alone)[0], lesson(padded)[0], rtol=2e-2, atol=2e-2)


def test_a_scrambled_answer_teaches_no_writing_and_asks_no_verdict(builder):
    rng = random.Random(0)
    wrong = 0
    for index in range(20):
        given = draw_problem("test", 1, index)
        row = builder.scrambled(given, rng, foreign=0.5, share=0.15)
        assert not any(row.trainable)
        assert not row.prefix_lengths
        wrong += row.first_wrong is not None
    assert wrong >= 18


def test_an_answer_that_stops_too_early_is_wrong_at_its_end(builder):
    given = draw_problem("test", 1, 0)
    words = builder.ids(correct_answer(given, DRAFT))[:9]
    row = builder.drafted(given, [*words, builder.eos_token_id], random.Random(0), num_prefixes=3)
    assert row.first_wrong == 9
    assert all(row.is_correct_up_to(cut) for cut in row.prefix_lengths)
