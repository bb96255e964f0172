import pytest

from parse.prefixes import prefix_lengths_at, prefix_lengths_every


def test_prefixes_end_every_stride_tokens():
    assert prefix_lengths_every(4, 10, complete=False) == [4, 8]


def test_the_whole_draft_is_a_prefix_only_if_it_is_complete():
    assert prefix_lengths_every(4, 8, complete=True) == [4, 8]
    assert prefix_lengths_every(4, 8, complete=False) == [4]
    assert prefix_lengths_every(4, 3, complete=True) == [3]
    assert prefix_lengths_every(4, 0, complete=True) == []


def test_a_stride_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        prefix_lengths_every(0, 8, complete=True)


ANSWER = ["One", " step", ".\n", "Pi", " is", " 3", ".", "14", ".", " Done", "!"]


@pytest.mark.parametrize(
    ("boundaries", "lengths"),
    [
        (["lines"], [3]),
        (["sentences"], [3, 9]),
        (["lines", "sentences"], [3, 9]),
        (["tokens"], [4, 8]),
        (["tokens", "sentences"], [3, 4, 8, 9]),
    ],
)
def test_prefixes_end_at_the_boundaries_named(boundaries, lengths):
    """A stop within a number ends no sentence."""
    assert prefix_lengths_at(boundaries, ANSWER, stride=4, complete=False) == lengths
    assert prefix_lengths_at(boundaries, ANSWER, stride=4, complete=True) == [*lengths, len(ANSWER)]


@pytest.mark.parametrize(("sign", "lengths"), [(".", [2]), ("!", [2]), ("?", [2]), ("…", [2]), (",", []), (":", [])])
def test_these_signs_end_a_sentence(sign, lengths):
    token_texts = ["Done", sign, " And", " now"]
    assert prefix_lengths_at(["sentences"], token_texts, stride=4, complete=False) == lengths


def test_unknown_boundaries_are_refused():
    for boundaries in ([], ["words"]):
        with pytest.raises(ValueError, match="tokens, sentences, lines"):
            prefix_lengths_at(boundaries, ANSWER, stride=4, complete=True)  # type: ignore[arg-type]
