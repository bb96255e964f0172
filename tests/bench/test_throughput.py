import pytest

from bench import long_drafts, throughput
from bench.throughput import ANSWER_TOKENS, PROMPT_TOKENS, Implementation


def implementation(name, decode_s, prefill_s):
    """Takes as many seconds per prompt as it is told, one after the other in each round."""
    decode, prefill = iter(decode_s), iter(prefill_s)
    return Implementation(
        name, lambda prompts: len(prompts) * next(decode), lambda prompts: len(prompts) * next(prefill)
    )


def test_ratios_are_medians_over_rounds_and_the_first_round_does_not_count():
    native = implementation("native", [9, 1, 2, 4], [9, 1, 1, 1])
    generate = implementation("generate()", [1, 1, 1, 1], [1, 2, 3, 4])
    row = throughput.measure([native, generate], batch=3, rounds=3, vocab_size=100)
    assert row["batch"] == 3
    assert row["decode_ratio"] == pytest.approx(0.5)  # of 1, 1/2 and 1/4
    assert row["prefill_ratio"] == pytest.approx(3)
    assert row["decode_tokens_per_s"] == pytest.approx((ANSWER_TOKENS - 1) / 2)
    assert row["prefill_tokens_per_s"] == pytest.approx(PROMPT_TOKENS)
    assert row["vllm_decode_ratio"] is None


def test_the_table_shows_all_ratios():
    seconds = {"native": 1, "generate()": 2, "vLLM": 0.5}
    parts = [implementation(name, [each] * 3, [each] * 3) for name, each in seconds.items()]
    row = throughput.measure(parts, batch=8, rounds=2, vocab_size=100)
    settings = {"model": "a model", "dtype": "float32", "num_threads": 1}
    run = {"processor": {"model": "a processor"}}
    text = throughput.table({"settings": settings, "rows": [row], "run": run})
    assert "a processor" in text and text.splitlines()[-1].split("|")[1:4] == [" 8 ", " 63.0 ", " 2.00 "]
    assert " 0.50 " in text


def test_the_table_of_long_drafts_has_a_line_for_each_length():
    numbers = dict(cached_s=1.0, cached_steps=7.5, exhaustive_steps=20.0, uncached_steps=30.0, prefill_steps=25.0)
    rows = [dict(draft_tokens=n, prefixes=n // 64, passes=3, kv_cache_mb=9.0, **numbers) for n in (100, 1000)]
    lines = long_drafts.table({"model": "a model", "rows": rows}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["100", "1000"]
    assert "7.5" in lines[-1]
