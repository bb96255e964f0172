"""The calls of vLLM's OpenAI-compatible server, with token ids in and out."""

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from parse.engines.protocol import EngineStats
from parse.engines.remote.dialect import (
    Chunk,
    ModelIdentity,
    PromptLogprob,
    ServerFeatures,
    ranked,
    read_logprob,
    unreadable,
)
from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.startup import SAMPLE_TEXT, returns_prompt_logprobs, sample_prompts, verifies
from parse.engines.remote.transport import Transport
from parse.errors import RequestError, ServerError
from parse.types import Logprob, SamplingParams

COMPLETIONS = "/v1/completions"
TOKEN_PREFIX = "token_id:"  # of the keys in logprobs
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63
DEFAULT_BLOCK_SIZE = 16
_NUM_BLOCKS = re.compile(r'^vllm:cache_config_info\{[^}]*\bnum_gpu_blocks="(\d+)"')
_BLOCK_SIZE = re.compile(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"')


class VLLM:
    """Implements `Dialect`."""

    kind = "vLLM"
    tested_versions: tuple[tuple[int, int], tuple[int, int]] | None = (0, 27), (0, 32)
    max_logprobs = MAX_TOP_LOGPROBS
    unsupported_sampling_params: frozenset[str] = frozenset()
    ignored_with_speculation = frozenset(("min_p", "logit_bias"))

    async def identify(self, server: Transport, name: str | None, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
        card = await self.model_card(server, name)
        model = str(card["id"])
        tokens = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
        body = prefill_body(model, []) | {
            "prompt": SAMPLE_TEXT,
            "add_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
        }
        choices = read_choices(await self.complete(server, body), 1)
        if choices[0].get("prompt_token_ids") != tokens:
            raise WrongModel(f"the tokenizer of {card.get('root')} on the server differs from the one of the settings")
        prompts = sample_prompts(tokens)
        body = prefill_body(model, []) | {"prompt": prompts, "logprobs": 0, "return_tokens_as_token_ids": True}
        tops = read_verification(await self.complete(server, body), len(prompts))
        return ModelIdentity(
            name=model,
            root=str(card.get("root") or model),
            max_model_len=int(card.get("max_model_len") or 0),
            logprobs=tuple(max(top.values()) for top in tops),
        )

    async def model_card(self, server: Transport, name: str | None) -> Mapping[str, Any]:
        """Returns the name, the source and the context length of the model, as in the answer of /v1/models."""
        try:
            return read_model_card(await server.get_json("/v1/models"), name)
        except ValueError as error:
            raise WrongModel(str(error)) from error

    async def complete(self, server: Transport, body: Mapping[str, Any]) -> Any:
        """Returns the whole response to a completion."""
        return await server.post(COMPLETIONS, body)

    async def find_features(
        self, server: Transport, model: ModelIdentity, tokenizer: PreTrainedTokenizerBase
    ) -> ServerFeatures:
        prompt = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
        by_token_id = await verifies(self, server, model.name, prompt, by_token_id=True)
        try:
            version = str((await server.get_json("/version"))["version"])
        except (ServerUnavailable, ServerError, RequestError, LookupError, TypeError):
            version = "unknown"
        try:
            metrics = await server.get_text("/metrics")
        except (ServerUnavailable, ServerError, RequestError):
            metrics = ""
        block_size = _BLOCK_SIZE.search(metrics)
        return ServerFeatures(
            version=version,
            block_size=int(block_size[1]) if block_size else DEFAULT_BLOCK_SIZE,
            verifies=by_token_id or await verifies(self, server, model.name, prompt, by_token_id=False),
            verifies_by_token_id=by_token_id,
            has_prompt_logprobs=await returns_prompt_logprobs(self, server, model.name, prompt),
            has_speculation="vllm:spec_decode_num_drafts" in metrics,
        )

    async def prefill(self, server: Transport, model: str, prompt: Sequence[int]) -> int:
        return read_num_cached_tokens(await self.complete(server, prefill_body(model, prompt)))

    async def next_token_logprobs(
        self,
        server: Transport,
        model: str,
        prompts: Sequence[Sequence[int]],
        token_ids: Sequence[int],
        *,
        by_token_id: bool,
    ) -> list[Mapping[int, float]]:
        body = verification_body(model, prompts, token_ids, by_token_id=by_token_id)
        return read_verification(await self.complete(server, body), len(prompts))

    async def prompt_logprobs(
        self, server: Transport, model: str, prompt: Sequence[int], start: int, num_logprobs: int
    ) -> list[PromptLogprob]:
        response = await self.complete(server, prompt_logprobs_body(model, prompt, num_logprobs))
        return read_prompt_logprobs(response, prompt, start, num_logprobs)

    async def generate(
        self,
        server: Transport,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        position: int,
    ) -> AsyncGenerator[Chunk]:
        body = generation_body(model, prompt, params, max_new_tokens=max_new_tokens, position=position)
        last: Chunk | None = None
        async with aclosing(server.stream(COMPLETIONS, body)) as events:
            async for event in events:
                chunk = read_chunk(event, params.logprobs)
                if chunk is None:
                    continue
                if last is not None:
                    last = replace(last, num_cached_tokens=chunk.num_cached_tokens)
                elif chunk.finish_reason is not None:
                    last = chunk  # the number of cached tokens comes after it
                else:
                    yield chunk
        if last is None:
            raise ServerUnavailable("the stream ended before the answer")
        yield last

    def counters(self, metrics: str) -> str:
        return "\n".join(
            line for line in metrics.splitlines() if line.partition("{")[0].endswith(("_total", "_count", "_sum"))
        )

    def read_stats(self, metrics_texts: Sequence[str]) -> EngineStats:
        return read_stats(metrics_texts)


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


def prefill_body(model: str | None, prompt: Sequence[int]) -> dict[str, Any]:
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
        raise unreadable("an event of the stream is not an object")
    cached = read_num_cached_tokens(event)
    if event.get("choices") == []:
        return Chunk((), (), None, cached) if cached else None
    choice = read_choices(event, 1)[0]
    token_ids = choice.get("token_ids")
    if not isinstance(token_ids, list) or not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise unreadable("an event of the stream has no token ids")
    finish_reason = choice.get("finish_reason")
    if finish_reason not in (None, "stop", "length"):
        raise ServerUnavailable(f"the server ended the answer with {finish_reason!r}", deterministic=True)
    logprobs: tuple[Logprob, ...] = ()
    if num_logprobs is not None and token_ids:
        entries = choice.get("logprobs") or {}
        values, tops = entries.get("token_logprobs") or [], entries.get("top_logprobs") or []
        if len(values) != len(token_ids) or len(tops) != len(token_ids):
            raise unreadable("the log-probabilities do not match the tokens")
        logprobs = tuple(
            Logprob(read_logprob(value), ranked(read_top_logprobs(top or {}), num_logprobs))
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
        raise unreadable(f"expected {num_prompts} choices")
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, Mapping)}
    if set(by_index) != set(range(num_prompts)):
        raise unreadable(f"the choices have the indices {sorted(map(str, by_index))}")
    return [by_index[index] for index in range(num_prompts)]


def read_verification(response: Any, num_prompts: int) -> list[Mapping[int, float]]:
    """Returns the log-probabilities after each prompt, by token id, in the order of the prompts."""
    results: list[Mapping[int, float]] = []
    for choice in read_choices(response, num_prompts):
        tops = (choice.get("logprobs") or {}).get("top_logprobs")
        if not isinstance(tops, list) or len(tops) != 1 or not isinstance(tops[0], Mapping):
            raise unreadable("a choice has no log-probabilities")
        results.append(read_top_logprobs(tops[0]))
    return results


def read_prompt_logprobs(response: Any, prompt: Sequence[int], start: int, num_logprobs: int) -> list[PromptLogprob]:
    """Returns what the server says about the tokens of the prompt from `start` on."""
    entries = read_choices(response, 1)[0].get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(prompt):
        raise unreadable("the prompt has no log-probabilities")
    results = []
    for token, entry in zip(prompt[start:], entries[start:], strict=True):
        own = entry.get(str(token)) if isinstance(entry, Mapping) else None
        if not isinstance(own, Mapping) or not isinstance(own.get("rank"), int):
            raise unreadable(f"the log-probability of token {token} is missing")
        top = {int(other): read_logprob(value["logprob"]) for other, value in entry.items()}
        logprob = Logprob(read_logprob(own["logprob"]), ranked(top, num_logprobs))
        results.append(PromptLogprob(logprob, own["rank"] == 1))
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


def read_top_logprobs(top: Mapping[str, Any]) -> dict[int, float]:
    try:
        return {int(key.removeprefix(TOKEN_PREFIX)): read_logprob(value) for key, value in top.items()}
    except ValueError:
        raise unreadable(f"log-probabilities without token ids: {list(top)[:3]}") from None
