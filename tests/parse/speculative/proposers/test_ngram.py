import random

from hypothesis import given
from hypothesis import strategies as st

from parse.speculative.proposers.ngram import MAX_NGRAM, MIN_NGRAM, NgramState

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def looked_up(text: list[int], most: int) -> list[int]:
    """By looking at every place, one token at a time."""
    for width in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for start in range(len(text) - width - 1, -1, -1):
            if width < len(text) and text[start : start + width] == text[-width:]:
                return text[start + width : start + width + most]
    return []


@given(texts, st.integers(0, 9), st.data())
def test_what_followed_the_same_tokens_last_time_is_proposed(text, most, data):
    proposer, rest = NgramState(), text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        proposer.extend(rest[:size])
        rest = rest[size:]
    found = proposer.continuation(most)
    assert list(found.token_ids) == looked_up(text, most)
    assert list(found.parents) == list(range(-1, len(found.token_ids) - 1))


def test_a_long_text_is_kept_whole():
    rng = random.Random(1)
    proposer, text = NgramState(), [rng.randrange(50) for _ in range(5000)]
    for start in range(0, 5000, 700):
        proposer.extend(text[start : start + 700])
    proposer.extend(text[:30])
    assert list(proposer.continuation(20).token_ids) == text[30:50]


def test_before_anything_was_said_nothing_is_proposed():
    assert NgramState().continuation(5).token_ids == ()
