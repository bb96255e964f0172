import random

import pytest
import torch

from training.rows import IGNORED, Writer, batch
from training.task import WORD, answer, check, problem
from training.wording import DRAFT, TARGET


@pytest.fixture(scope="module")
def writer(tokenizer):
    return Writer(tokenizer, own=TARGET)


def drawn(writer, count=24, **changes):
    rng = random.Random(0)
    settings = dict(foreign=0.5, mistaken=0.5, cuts=5) | changes
    return [writer.written(problem("test", 1, index), rng, **settings) for index in range(count)]


def test_verdicts_say_whether_the_prefix_is_right(writer):
    for index, row in enumerate(drawn(writer)):
        given = problem("test", 1, index)
        pieces = [writer.piece(token) for token in row.answer if token != writer.end]
        assert row.cuts[-1] == len(pieces)
        for cut in row.cuts:
            assert row.right_up_to(cut) == (check(given, pieces[:cut]).first_wrong is None)


def test_only_right_tokens_are_learnt_and_a_right_answer_in_ones_own_wording_wholly(writer):
    for row in drawn(writer):
        if row.first_wrong is not None:
            assert not any(row.learnt[row.first_wrong :])
    for row in drawn(writer, foreign=0.0, mistaken=0.0):
        assert all(row.learnt)
        assert row.answer[-1] == writer.end


def test_another_wording_is_not_learnt_where_it_sets_in(writer):
    given = problem("test", 1, 0)
    row = writer.written(given, random.Random(1), foreign=1.0, mistaken=0.0, cuts=0)
    skipped = {writer.piece(t) for t, learnt in zip(row.answer, row.learnt, strict=True) if not learnt}
    own_words = set(WORD.findall(answer(given, TARGET)))
    assert skipped
    assert skipped - own_words == skipped & (set(WORD.findall(answer(given, DRAFT) + answer(given, 2))) - own_words)


def test_a_batch_shows_each_token_its_own_text_and_each_probe_its_own_prefix(writer):
    rows = drawn(writer, 6)
    made = batch(rows, writer.check, writer.pad)
    for b, row in enumerate(rows):
        text = [*row.prompt, *row.answer]
        visible = made.visible[b, 0]
        for q in range(len(text)):
            assert made.tokens[b][visible[q]].tolist() == text[: q + 1]
        ends = [int(node) for where, node in made.verdict_at.tolist() if where == b]
        for cut, end in zip(row.cuts, ends, strict=True):
            seen = [*row.prompt, *row.answer[:cut], *writer.check.suffix]
            assert made.tokens[b][visible[end]].tolist() == seen
            assert made.positions[b][visible[end]].tolist() == list(range(len(seen)))


def test_the_labels_of_a_batch_say_what_the_rows_say(writer):
    rows = drawn(writer, 8)
    made = batch(rows, writer.check, writer.pad)
    verdicts = iter(made.verdict.tolist())
    for b, row in enumerate(rows):
        start, size = len(row.prompt), len(row.answer)
        for k, (token, learnt) in enumerate(zip(row.answer, row.learnt, strict=True)):
            assert made.next_token[b, start + k - 1] == (token if learnt else IGNORED)
            wrong = row.first_wrong
            assert made.astray[b, start + k] == int(wrong is not None and k >= wrong)
            expected = IGNORED if wrong is not None and k > wrong else int(k == wrong)
            assert made.slip[b, start + k] == expected
        assert (made.next_token[b, : start - 1] == IGNORED).all()
        assert (made.slip[b, start + size :] == IGNORED).all()
        assert [next(verdicts) for _ in row.cuts] == [
            writer.check.correct[0] if row.right_up_to(cut) else writer.check.incorrect[0] for cut in row.cuts
        ]


def test_padding_changes_nothing(writer, tokenizer):
    from training.attention import TREE_ATTENTION
    from training.lessons import Judging
    from training.pair import fresh, target_config

    model = fresh(target_config(tokenizer, 3), 0)
    assert model.config._attn_implementation == TREE_ATTENTION
    lesson = Judging(model, writer.check, base_layers=1)
    rows = drawn(writer, 2)
    alone = batch(rows[:1], writer.check, writer.pad, multiple=1)
    padded = batch(rows[:1], writer.check, writer.pad, multiple=512)
    assert padded.tokens.shape[1] > alone.tokens.shape[1]
    torch.testing.assert_close(lesson(alone)[0], lesson(padded)[0], rtol=2e-2, atol=2e-2)


def test_a_scrambled_answer_teaches_no_writing_and_asks_no_verdict(writer):
    rng = random.Random(0)
    wrong = 0
    for index in range(20):
        given = problem("test", 1, index)
        row = writer.scrambled(given, rng, foreign=0.5, share=0.15)
        assert not any(row.learnt)
        assert not row.cuts
        wrong += row.first_wrong is not None
    assert wrong >= 18


def test_an_answer_that_stops_too_early_is_wrong_at_its_end(writer):
    given = problem("test", 1, 0)
    words = writer.ids(answer(given, DRAFT))[:9]
    row = writer.drafted(given, [*words, writer.end], random.Random(0), cuts=3)
    assert row.first_wrong == 9
    assert all(row.right_up_to(cut) for cut in row.cuts)
