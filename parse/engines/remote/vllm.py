"""The calls of vLLM's OpenAI-compatible server, with token ids in and out.

The functions write the bodies of requests and read the bodies of responses. A response that does not match its request
raises ServerUnavailable, so that no draft is accepted because of a response that was misread.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from parse.engines.protocol import EngineStats
from parse.engines.remote.errors import ServerUnavailable
from parse.types import FinishReason, Logprob, SamplingParams

COMPLETIONS = "/v1/completions"
TOKEN_PREFIX = "token_id:"  # of the keys in logprobs
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63
_NUM_BLOCKS = re.compile(r'^vllm:cache_config_info\{[^}]*\bnum_gpu_blocks="(\d+)"')


@dataclass(frozen=True)
class Chunk:
    """A part of a stream of generated tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int


@dataclass(frozen=True)
class PromptLogprob:
    """What a server returns about a token of a prompt."""

    logprob: Logprob
    rank: int
    """1 for the most likely token."""


def generation_body(
    model: str, prompt: Sequence[int], params: SamplingParams, *, max_new_tokens: int, position: int
) -> dict[str, Any]:
    """`position` is the number of tokens that have been generated before.

    All sampling parameters are sent, because a server fills in those that are missing from the model's own
    configuration.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "return_token_ids": True,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "min_tokens": min(max_new_tokens, max(0, params.min_tokens - position)),
        "stop_token_ids": list(params.stop_token_ids),
    }
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if not params.greedy:
        # The random numbers of a server begin anew with each request, so a continuation needs another seed.
        body["seed"] = (params.seed * 1_000_003 + position) % MAX_SEED
    if params.logprobs is not None:
        body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
    return body


def prefill_body(model: str, prompt: Sequence[int]) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0}


def verification_body(
    model: str, prompts: Sequence[Sequence[int]], token_ids: Sequence[int], *, by_token_id: bool
) -> dict[str, Any]:
    """Asks for the log-probabilities of some tokens after each prompt.

    Some servers return them `by_token_id`. Others return only those of the most likely tokens.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": [list(prompt) for prompt in prompts],
        "max_tokens": 1,
        "temperature": 0.0,
        "return_tokens_as_token_ids": True,
    }
    if by_token_id:
        return body | {"logprobs": 0, "logprob_token_ids": list(token_ids)}
    return body | {"logprobs": MAX_TOP_LOGPROBS}


def prompt_logprobs_body(model: str, prompt: Sequence[int], num_logprobs: int) -> dict[str, Any]:
    return prefill_body(model, prompt) | {"prompt_logprobs": num_logprobs}


def read_chunk(event: Any, num_logprobs: int | None) -> Chunk | None:
    """Returns None for an event without tokens, for example with the usage."""
    if not isinstance(event, Mapping):
        raise _unreadable("an event of the stream is not an object")
    cached = read_num_cached_tokens(event)
    if event.get("choices") == []:
        return Chunk((), (), None, cached) if cached else None
    choice = read_choices(event, 1)[0]
    token_ids = choice.get("token_ids")
    if not isinstance(token_ids, list) or not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise _unreadable("an event of the stream has no token ids")
    finish_reason = choice.get("finish_reason")
    if finish_reason not in (None, "stop", "length"):
        raise ServerUnavailable(f"the server ended the answer with {finish_reason!r}", deterministic=True)
    logprobs: tuple[Logprob, ...] = ()
    if num_logprobs is not None and token_ids:
        entries = choice.get("logprobs") or {}
        values, tops = entries.get("token_logprobs") or [], entries.get("top_logprobs") or []
        if len(values) != len(token_ids) or len(tops) != len(token_ids):
            raise _unreadable("the log-probabilities do not match the tokens")
        logprobs = tuple(
            Logprob(_number(value), _rank(_by_token_id(top or {}), num_logprobs))
            for value, top in zip(values, tops, strict=True)
        )
    return Chunk(tuple(token_ids), logprobs, finish_reason, cached)


def read_num_cached_tokens(response: Any) -> int:
    """Returns how many tokens of the prompt were cached, or 0 if the server does not say so."""
    usage = response.get("usage") if isinstance(response, Mapping) else None
    details = (usage or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def read_choices(response: Any, num_prompts: int) -> list[Mapping[str, Any]]:
    """Returns the choices in the order of the prompts."""
    choices = response.get("choices") if isinstance(response, Mapping) else None
    if not isinstance(choices, list) or len(choices) != num_prompts:
        raise _unreadable(f"expected {num_prompts} choices")
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, Mapping)}
    if set(by_index) != set(range(num_prompts)):
        raise _unreadable(f"the choices have the indices {sorted(map(str, by_index))}")
    return [by_index[index] for index in range(num_prompts)]


def read_verification(response: Any, num_prompts: int) -> list[Mapping[int, float]]:
    """Returns the log-probabilities after each prompt, by token id, in the order of the prompts."""
    results: list[Mapping[int, float]] = []
    for choice in read_choices(response, num_prompts):
        tops = (choice.get("logprobs") or {}).get("top_logprobs")
        if not isinstance(tops, list) or len(tops) != 1 or not isinstance(tops[0], Mapping):
            raise _unreadable("a choice has no log-probabilities")
        results.append(_by_token_id(tops[0]))
    return results


def read_prompt_logprobs(response: Any, prompt: Sequence[int], start: int, num_logprobs: int) -> list[PromptLogprob]:
    """Returns what the server says about the tokens of the prompt from `start` on."""
    entries = read_choices(response, 1)[0].get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(prompt):
        raise _unreadable("the prompt has no log-probabilities")
    results = []
    for token, entry in zip(prompt[start:], entries[start:], strict=True):
        own = entry.get(str(token)) if isinstance(entry, Mapping) else None
        if not isinstance(own, Mapping) or not isinstance(own.get("rank"), int):
            raise _unreadable(f"the log-probability of token {token} is missing")
        top = {int(other): _number(value["logprob"]) for other, value in entry.items()}
        results.append(PromptLogprob(Logprob(_number(own["logprob"]), _rank(top, num_logprobs)), own["rank"]))
    return results


def read_model_card(response: Any, name: str | None) -> Mapping[str, Any]:
    """Returns the entry of the model in the answer of /v1/models.

    Without a name, the server must serve a single model and may serve adapters of it.
    """
    data = response.get("data") if isinstance(response, Mapping) else None
    cards = [card for card in data or () if isinstance(card, Mapping) and isinstance(card.get("id"), str)]
    if name is None:
        cards = [card for card in cards if not card.get("parent")]
    else:
        cards = [card for card in cards if card["id"] == name]
    if len(cards) != 1:
        served = ", ".join(sorted(card["id"] for card in cards)) or "no model"
        if name is None:
            raise ValueError(f"the server serves {served}; choose one with engine.model_name")
        raise ValueError(f"the server does not serve {name!r}")
    return cards[0]


def counters(metrics: str) -> str:
    """Returns the lines of the metrics that only grow."""
    return "\n".join(
        line for line in metrics.splitlines() if line.partition("{")[0].endswith(("_total", "_count", "_sum"))
    )


def read_stats(metrics_texts: Sequence[str]) -> EngineStats:
    """Returns what the metrics of one or several servers say about their engines."""
    sums: dict[str, float] = defaultdict(float)
    blocks_used = blocks_total = 0
    for metrics in metrics_texts:
        usages: list[float] = []  # of the KV cache of each engine of the server
        num_blocks = 0  # of all engines of the server, which it reports for each of them
        for line in metrics.splitlines():
            if not line.startswith("vllm:"):
                continue
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0].removeprefix("vllm:")
            sums[name] += float(value)
            if name == "kv_cache_usage_perc":
                usages.append(float(value))
            if (blocks := _NUM_BLOCKS.search(line)) is not None:
                num_blocks = max(num_blocks, int(blocks[1]))
        blocks_total += num_blocks
        blocks_used += round(num_blocks * fmean(usages)) if usages else 0
    return EngineStats(
        num_running=int(sums["num_requests_running"]),
        num_waiting=int(sums["num_requests_waiting"]),
        num_steps=int(sums["iteration_tokens_total_count"]),
        num_tokens=int(sums["iteration_tokens_total_sum"]),
        prefix_queries=int(sums["prefix_cache_queries_total"]),
        prefix_hits=int(sums["prefix_cache_hits_total"]),
        blocks_used=blocks_used,
        blocks_total=blocks_total,
        num_proposed_tokens=int(sums["spec_decode_num_draft_tokens_total"]),
        num_accepted_tokens=int(sums["spec_decode_num_accepted_tokens_total"]),
    )


def _by_token_id(top: Mapping[str, Any]) -> dict[int, float]:
    try:
        return {int(key.removeprefix(TOKEN_PREFIX)): _number(value) for key, value in top.items()}
    except ValueError:
        raise _unreadable(f"log-probabilities without token ids: {list(top)[:3]}") from None


def _rank(by_token_id: Mapping[int, float], count: int) -> tuple[tuple[int, float], ...]:
    ranked: Iterable[tuple[int, float]] = sorted(by_token_id.items(), key=lambda item: -item[1])
    return tuple(ranked)[:count]


def _number(value: Any) -> float:
    """Returns a log-probability. vLLM sends -9999.0 for a probability of 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise _unreadable(f"{value!r} is not a log-probability")
    return float(value)


def _unreadable(reason: str) -> ServerUnavailable:
    return ServerUnavailable(f"the response is not as expected: {reason}", deterministic=True)
