import random

from hypothesis import given
from hypothesis import strategies as st

from parse.speculative.proposers.ngram import MAX_NGRAM, MIN_NGRAM, NgramState

sequences = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def brute_force_continuation(tokens: list[int], max_tokens: int) -> list[int]:
    """Compares the last tokens with those at every earlier position."""
    for width in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for start in range(len(tokens) - width - 1, -1, -1):
            if width < len(tokens) and tokens[start : start + width] == tokens[-width:]:
                return tokens[start + width : start + width + max_tokens]
    return []


@given(sequences, st.integers(0, 9), st.data())
def test_tokens_that_followed_the_last_match_are_proposed(tokens, max_tokens, data):
    state, rest = NgramState(), tokens
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        state.extend(rest[:size])
        rest = rest[size:]
    proposal = state.continuation(max_tokens)
    assert list(proposal.token_ids) == brute_force_continuation(tokens, max_tokens)
    assert list(proposal.parents) == list(range(-1, len(proposal.token_ids) - 1))


def test_a_long_sequence_is_kept_completely():
    rng = random.Random(1)
    state, tokens = NgramState(), [rng.randrange(50) for _ in range(5000)]
    for start in range(0, 5000, 700):
        state.extend(tokens[start : start + 700])
    state.extend(tokens[:30])
    assert list(state.continuation(20).token_ids) == tokens[30:50]


def test_nothing_is_proposed_for_an_empty_sequence():
    assert NgramState().continuation(5).token_ids == ()
