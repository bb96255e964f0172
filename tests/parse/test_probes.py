import pytest

from parse.probes import cuts_every


def test_cuts_stand_every_stride_tokens():
    assert cuts_every(4, 10, ended=False) == [4, 8]


def test_the_end_is_a_cut_only_if_the_draft_ended_by_itself():
    assert cuts_every(4, 8, ended=True) == [4, 8]
    assert cuts_every(4, 8, ended=False) == [4]
    assert cuts_every(4, 3, ended=True) == [3]
    assert cuts_every(4, 0, ended=True) == []


def test_a_stride_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        cuts_every(0, 8, ended=True)
