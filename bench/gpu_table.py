"""The tables of a measurement on a GPU. Figures that are missing leave an empty cell."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench.output import heading, row

TITLES = {"cuda_graphs": "CUDA graphs", "eager": "eager"}


def table(document: Mapping[str, Any]) -> str:
    lines = [describe(document), ""]
    for part in (decode_table, verification_table, fused_call_table):
        if rows := part(document):
            lines += [*rows, ""]
    return "\n".join([*lines, *sentences(document)])


def describe(document: Mapping[str, Any]) -> str:
    details = [str(document[key]) for key in ("device", "dtype", "versions") if key in document]
    if roofline := document.get("roofline"):
        details.append(
            f"copies at {roofline['copied_tb_per_s']:.2f} TB/s, "
            f"multiplies at {roofline['multiplied_tflops']:.0f} TFLOP/s"
        )
    shape, tokens = document.get("shape", "model"), document.get("context", 0)
    return f"{shape} with random weights, after {tokens} tokens of context; {'; '.join(details)}."


def decode_table(document: Mapping[str, Any]) -> list[str]:
    measured = {name: document.get(name, {}).get("decode", {}) for name in ("cuda_graphs", "eager", "generate")}
    batches = sorted({batch for by_batch in measured.values() for batch in by_batch}, key=int)
    limits = document.get("roofline", {}).get("decode_ms", {})
    lines = heading(
        "batch", "ms per step with CUDA graphs", "eager", "`generate()`", "roofline", "of the roofline", "sampled"
    )
    for batch in batches:
        ms = {name: by_batch.get(batch, {}).get("ms") for name, by_batch in measured.items()}
        limit, best = limits.get(batch), ms["cuda_graphs"] or ms["eager"]
        sampled = document.get("cuda_graphs", {}).get("sampled", {}).get(batch, {}).get("ms")
        share = f"{limit / best:.0%}" if limit and best else ""
        lines.append(row(batch, *(_number(value, 2) for value in (*ms.values(), limit)), share, _number(sampled, 2)))
    return lines if batches else []


def verification_table(document: Mapping[str, Any]) -> list[str]:
    lines = heading(
        *("draft tokens", "", "prefixes", "passes", "all prefixes", "in decode steps"),
        *("accepted at once", "in decode steps", "one by one"),
    )
    num_headings = len(lines)
    one_by_one = document.get("generate", {}).get("one_by_one_ms", {})
    drafts = {draft for mode in TITLES for draft in document.get(mode, {}).get("verification", {})}
    for draft in sorted(drafts, key=int):
        for mode, title in TITLES.items():
            if not (figures := document.get(mode, {}).get("verification", {}).get(draft)):
                continue
            step_ms = _decode_step_ms(document, mode)
            cells = [
                cell
                for ms in (figures["all_prefixes_ms"], figures["accepted_ms"])
                for cell in (_number(ms, 1, " ms"), _number(step_ms and ms / step_ms, 1))
            ]
            counts = str(figures["prefixes"]), str(figures["passes"])
            lines.append(row(draft, title, *counts, *cells, _number(one_by_one.get(draft), 0, " ms")))
    return lines if len(lines) > num_headings else []


def fused_call_table(document: Mapping[str, Any]) -> list[str]:
    lines = heading("verify and generate", "first token, two calls", "one call", "last token, two calls", "one call")
    num_headings = len(lines)
    keys = "two_calls_first_token_ms", "one_call_first_token_ms", "two_calls_ms", "one_call_ms"
    for mode, title in TITLES.items():
        if figures := document.get(mode, {}).get("fused_call"):
            accepted, generated = figures["accepted_tokens"], figures["generated_tokens"]
            name = f"{title}, {generated} tokens after {accepted} of the draft"
            lines.append(row(name, *(_number(figures[key], 1, " ms") for key in keys)))
    return lines if len(lines) > num_headings else []


def sentences(document: Mapping[str, Any]) -> Iterator[str]:
    for mode, title in TITLES.items():
        figures = document.get(mode, {})
        if mode == "cuda_graphs" and (decode := figures.get("decode")):
            shares = ", ".join(f"{each['replayed_share']:.0%} at batch {batch}" for batch, each in decode.items())
            yield f"Decode steps that replayed a CUDA graph: {shares}."
        if speed := figures.get("prompt_tokens_per_s"):
            limit = document.get("roofline", {}).get("prompt_tokens_per_s")
            share = f", {speed / limit:.0%} of the roofline" if limit else ""
            yield f"Prompts, {title}: {speed:.0f} tokens/s{share}."
        if ms := figures.get("verification_while_decoding_ms"):
            yield (
                f"Verification of the shortest draft while {document['num_decoding']} requests decode, {title}: "
                f"{ms:.1f} ms."
            )
        for batch, profile in document.get("profile", {}).get(mode, {}).items():
            kernels = ", ".join(f"{name} {ms:.3f}" for name, ms in profile["longest_ms_per_step"].items())
            yield (
                f"Profile, {title}, batch {batch}: the device computes {profile['busy_share']:.0%} of the time, "
                f"{profile['kernels_per_step']:.0f} kernels per step; ms per step: {kernels}."
            )
    memory_gib = {name: gib for name, gib in document.get("memory_gib", {}).items() if gib is not None}
    if memory_gib:
        parts = ", ".join(f"{TITLES.get(name, name)} {gib:.1f} GiB" for name, gib in memory_gib.items())
        yield f"Memory: {parts}. The figures with and without CUDA graphs are peaks, and include the weights."
    if errors := document.get("errors"):
        yield f"Failed measurements: {'; '.join(f'{name} ({error})' for name, error in errors.items())}."


def _decode_step_ms(document: Mapping[str, Any], mode: str) -> float | None:
    """Returns the milliseconds of a decode step of the smallest batch."""
    decode = document[mode].get("decode", {})
    smallest = min(decode, key=int, default=None)
    return None if smallest is None else decode[smallest]["ms"]


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"
