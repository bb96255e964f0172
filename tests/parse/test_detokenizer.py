import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from parse.detokenizer import IncrementalDetokenizer
from training.tokenizer import build_tokenizer

BYTES = build_tokenizer()
WORDS = ["Hello", " wor", "ld", "é", "漢字", "🎉", "👩‍👩‍👧", "\n", "  ", "1", "23", ".", "STOP", "ST", "OP", "</s>"]
writing = st.lists(st.one_of(st.sampled_from(WORDS), st.characters(exclude_categories=["Cs"])), max_size=12).map(
    "".join
)


def spaced() -> PreTrainedTokenizerFast:
    """Words carry the space before them, the first one's is not written, and what is no word comes as bytes."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁Hello", "▁wor", "ld", "l", "o", "▁ST", "ST", "OP", ".", "▁▁"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(Regex(" "), "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


SPACED = spaced()


def cut_at_stop(text, stop):
    """Up to the stop string that is first complete; of several complete at once, the one that began first."""
    for end in range(1, len(text) + 1):
        if begun := [end - len(each) for each in stop if text[:end].endswith(each)]:
            return text[: min(begun)], True
    return text, False


def detokenized(tokenizer, parts, stop):
    stream = IncrementalDetokenizer(tokenizer, stop)
    text = "".join(stream.add(part) for part in parts) + stream.finish()
    assert stream.finish() == ""
    return text, stream.matched_stop


def split(ids, data):
    borders = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *borders], [*borders, len(ids)], strict=True)]


def stops(text, data):
    parts = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda at: text[at[0] : at[0] + at[1]])
    strings = st.one_of(parts, st.sampled_from(["STOP", "\n", "🎉", "never"]))
    return [each for each in data.draw(st.lists(strings, max_size=3)) if each and "\ufffd" not in each]


@pytest.mark.parametrize("tokenizer", [BYTES, SPACED], ids=["bytes", "spaced"])
@given(text=writing, data=st.data())
def test_the_deltas_are_the_text_of_all_tokens_up_to_the_first_stop_string(tokenizer, text, data):
    ids = tokenizer.encode(text, add_special_tokens=False)
    full_text = tokenizer.decode(ids, skip_special_tokens=True)
    stop = stops(full_text, data)
    expected, stopped = cut_at_stop(full_text, stop)
    got, met = detokenized(tokenizer, split(ids, data), stop)
    assert (got, met is not None) == (expected, stopped)


@pytest.mark.parametrize("tokenizer", [BYTES, SPACED], ids=["bytes", "spaced"])
@given(text=writing, data=st.data())
def test_the_stop_string_is_part_of_the_text_on_request(tokenizer, text, data):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stop = stops(tokenizer.decode(ids, skip_special_tokens=True), data)
    without, met = detokenized(tokenizer, split(ids, data), stop)
    stream = IncrementalDetokenizer(tokenizer, stop, include_stop=True)
    text = "".join(stream.add(part) for part in split(ids, data)) + stream.finish()
    assert (text, stream.matched_stop) == (without + (met or ""), met)


@given(text=writing, min_tokens=st.integers(0, 12), data=st.data())
def test_a_stop_string_counts_only_after_the_minimum_length(text, min_tokens, data):
    ids = BYTES.encode(text, add_special_tokens=False)
    stop = stops(text, data)
    stream = IncrementalDetokenizer(BYTES, stop, min_tokens=min_tokens)
    got = "".join(stream.add(part) for part in split(ids, data)) + stream.finish()
    # Only a stop string that ends in the text of a later token ends the text.
    expected, met = text, False
    for size in range(min_tokens + 1, len(ids) + 1):
        before, now = (str(BYTES.decode(ids[:count])).rstrip("\ufffd") for count in (size - 1, size))
        matches = [
            (end, end - len(each))
            for end in range(len(before) + 1, len(now) + 1)
            for each in stop
            if now[:end].endswith(each)
        ]
        if matches:
            expected, met = now[: min(matches)[1]], True
            break
    assert (got, stream.matched_stop is not None) == (expected, met)


@given(ids=st.lists(st.integers(0, len(BYTES) - 1), max_size=20), data=st.data())
def test_even_of_tokens_that_make_no_sense(ids, data):
    full_text = BYTES.decode(ids, skip_special_tokens=True)
    stop = stops(full_text, data)
    expected, stopped = cut_at_stop(full_text, stop)
    got, met = detokenized(BYTES, split(ids, data), stop)
    assert (got, met is not None) == (expected, stopped)


@given(text=writing)
def test_no_delta_ends_within_a_character(text):
    stream = IncrementalDetokenizer(BYTES)
    ids = BYTES.encode(text)
    deltas = [stream.add([token]) for token in ids]
    for size in range(len(ids) + 1):
        text_before = "".join(deltas[:size])
        assert text.startswith(text_before)
        # Nothing certain is held back: what is missing is less than one character.
        assert str(BYTES.decode(ids[:size])).rstrip("\ufffd") == text_before.rstrip("\ufffd")


def test_what_may_begin_a_stop_string_waits_until_it_is_certain():
    stream = IncrementalDetokenizer(BYTES, ["STOP", "TOM"])
    deltas = [stream.add(BYTES.encode(letter)) for letter in "aSTaSTOMb"]
    assert deltas == ["a", "", "", "STa", "", "", "", "S", ""]
    assert stream.matched_stop == "TOM"
    assert stream.finish() == ""
    assert stream.add(BYTES.encode("more")) == ""


def test_what_was_held_back_comes_at_the_end():
    stream = IncrementalDetokenizer(BYTES, ["STOP"])
    assert stream.add(BYTES.encode("a ST")) == "a "
    assert stream.finish() == "ST"
    emoji = BYTES.encode("🎉")
    assert len(emoji) == 4
    stream = IncrementalDetokenizer(BYTES)
    assert [stream.add([token]) for token in emoji] == ["", "", "", "🎉"]
    assert stream.add(emoji[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_no_text():
    rng = random.Random(0)
    ids = BYTES.encode("a few words")
    for special in BYTES.all_special_ids:
        ids.insert(rng.randint(0, len(ids)), special)
    assert detokenized(BYTES, [ids], ["<|end|>"]) == ("a few words", None)


def test_a_long_text_costs_no_more_per_token_than_a_short_one(monkeypatch):
    decoded = []
    decode = BYTES.decode

    def counting(ids, **how):
        decoded.append(len(ids))
        return decode(ids, **how)

    monkeypatch.setattr(BYTES, "decode", counting)
    IncrementalDetokenizer(BYTES, ["never"]).add(BYTES.encode("Some words and an emoji 🎉, again and again. " * 20))
    assert max(decoded) < 12
