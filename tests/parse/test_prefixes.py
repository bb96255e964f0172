import pytest

from parse.prefixes import prefix_lengths_at, prefix_lengths_every


def test_cuts_stand_every_stride_tokens():
    assert prefix_lengths_every(4, 10, ended=False) == [4, 8]


def test_the_end_is_a_cut_only_if_the_draft_ended_by_itself():
    assert prefix_lengths_every(4, 8, ended=True) == [4, 8]
    assert prefix_lengths_every(4, 8, ended=False) == [4]
    assert prefix_lengths_every(4, 3, ended=True) == [3]
    assert prefix_lengths_every(4, 0, ended=True) == []


def test_a_stride_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        prefix_lengths_every(0, 8, ended=True)


ANSWER = ["One", " step", ".\n", "Pi", " is", " 3", ".", "14", ".", " Done", "!"]


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        (["lines"], [3]),
        (["sentences"], [3, 9]),
        (["lines", "sentences"], [3, 9]),
        (["tokens"], [4, 8]),
        (["tokens", "sentences"], [3, 4, 8, 9]),
    ],
)
def test_cuts_stand_where_asked(places, wanted):
    """A stop within a number ends no sentence."""
    assert prefix_lengths_at(places, ANSWER, stride=4, ended=False) == wanted
    assert prefix_lengths_at(places, ANSWER, stride=4, ended=True) == [*wanted, len(ANSWER)]


def test_unknown_places_are_refused():
    for places in ([], ["words"]):
        with pytest.raises(ValueError, match="tokens, sentences, lines"):
            prefix_lengths_at(places, ANSWER, stride=4, ended=True)  # type: ignore[arg-type]
