"""The calls of SGLang's own HTTP API, with token ids in and out.

UNTESTED with a real SGLang: it is written from its source code and documentation, and tested with a server that follows
them.
"""

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
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
from parse.engines.remote.startup import SAMPLE_TEXT, returns_prompt_logprobs, sample_prompts, verifies, works
from parse.engines.remote.transport import Transport
from parse.errors import RequestError, ServerError
from parse.types import FinishReason, Logprob, SamplingParams

GENERATE = "/generate"
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**31
RESERVED_TOKENS = 6  # of the context, which SGLang does not give to a request
REJECTED_REQUEST = 400
_METRIC = re.compile(r"^sglang:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class SGLang:
    """Implements `Dialect`."""

    kind = "SGLang"
    tested_versions = None
    max_logprobs = MAX_TOP_LOGPROBS
    # Some versions count the tokens of the prompt and others do not, so a continuation could differ.
    unsupported_sampling_params = frozenset(("repetition_penalty",))
    ignored_with_speculation = frozenset(("min_p", "logit_bias"))

    @staticmethod
    async def matches(server: Transport) -> bool:
        """Returns whether the server is an SGLang server."""
        return await works(partial(_has_model_path, server))

    async def identify(self, server: Transport, name: str | None, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
        root = str((await _model_info(server))["model_path"])
        models = await server.get_json("/v1/models")
        cards = models.get("data") if isinstance(models, Mapping) else None
        served = [card for card in cards or () if isinstance(card, Mapping) and not card.get("parent")]
        if name is not None and name not in [card.get("id") for card in served]:
            raise WrongModel(f"the server does not serve {name!r}")
        body = _body([], max_new_tokens=1, logprob_start_len=0)
        del body["input_ids"]
        (result,) = _results(await server.post(GENERATE, body | {"text": SAMPLE_TEXT}), [None])
        if [entry[1] for entry in _entries(result, "input_token_logprobs")] != tokenizer.encode(SAMPLE_TEXT):
            raise WrongModel(f"the tokenizer of {root} on the server differs from the one of the settings")
        prompts = sample_prompts(tokenizer.encode(SAMPLE_TEXT))
        body = _body(prompts, max_new_tokens=1, top_logprobs_num=1)
        results = _results(await server.post(GENERATE, body), prompts)
        return ModelIdentity(
            name=name or str(served[0]["id"] if served else root),
            root=root,
            max_model_len=max(0, int(served[0].get("max_model_len") or 0) - RESERVED_TOKENS) if served else 0,
            logprobs=tuple(max(_row(result, "output_top_logprobs").values()) for result in results),
        )

    async def find_features(
        self, server: Transport, model: ModelIdentity, tokenizer: PreTrainedTokenizerBase
    ) -> ServerFeatures:
        prompt = tokenizer.encode(SAMPLE_TEXT)
        by_token_id = await verifies(self, server, model.name, prompt, by_token_id=True)
        info = await _server_info(server)
        return ServerFeatures(
            version=str(info.get("version", "unknown")),
            block_size=int(info.get("page_size") or 1),
            verifies=by_token_id or await verifies(self, server, model.name, prompt, by_token_id=False),
            verifies_by_token_id=by_token_id,
            has_prompt_logprobs=await returns_prompt_logprobs(self, server, model.name, prompt),
            has_speculation=bool(info.get("speculative_algorithm")),
        )

    async def prefill(self, server: Transport, model: str, prompt: Sequence[int]) -> int:
        (result,) = _results(await server.post(GENERATE, _body(prompt, max_new_tokens=1)), [prompt])
        return _num_cached_tokens(result)

    async def next_token_logprobs(
        self,
        server: Transport,
        model: str,
        prompts: Sequence[Sequence[int]],
        token_ids: Sequence[int],
        *,
        by_token_id: bool,
    ) -> list[Mapping[int, float]]:
        if by_token_id:
            body = _body(prompts, max_new_tokens=1, token_ids_logprob=list(token_ids))
            field = "output_token_ids_logprobs"
        else:
            body, field = _body(prompts, max_new_tokens=1, top_logprobs_num=MAX_TOP_LOGPROBS), "output_top_logprobs"
        results = _results(await server.post(GENERATE, body), prompts)
        return [_row(result, field) for result in results]

    async def prompt_logprobs(
        self, server: Transport, model: str, prompt: Sequence[int], start: int, num_logprobs: int
    ) -> list[PromptLogprob]:
        # The first entry is always empty, so the token before `start` is requested too.
        body = _body(prompt, max_new_tokens=1, logprob_start_len=start - 1, top_logprobs_num=max(1, num_logprobs))
        (result,) = _results(await server.post(GENERATE, body), [prompt])
        entries = _entries(result, "input_token_logprobs")
        tops = result.get("input_top_logprobs")
        if not isinstance(tops, list) or len(tops) != len(entries) or len(entries) != len(prompt) - start + 1:
            raise unreadable("the prompt has no log-probabilities")
        logprobs = []
        for token, entry, top in zip(prompt[start:], entries[1:], tops[1:], strict=True):
            if entry[1] != token:
                raise unreadable(f"the log-probability of token {token} is missing")
            by_token_id = _by_token_id(top)
            argmax = max(by_token_id, key=by_token_id.__getitem__)
            logprob = Logprob(read_logprob(entry[0]), ranked(by_token_id, num_logprobs))
            logprobs.append(PromptLogprob(logprob, argmax == token))
        return logprobs

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
        if params.logprobs is not None and params.temperature not in (0, 1):
            raise RequestError("logprobs", "SGLang divides them by the temperature, so it must be 0 or 1")
        logprobs: dict[str, Any] = {}
        if params.logprobs is not None:
            logprobs = {"top_logprobs_num": max(1, params.logprobs)}
        body = _body(prompt, max_new_tokens=max_new_tokens, **logprobs) | {
            "sampling_params": _sampling_params(params, max_new_tokens=max_new_tokens, position=position),
            "stream": True,
            "return_logprob": params.logprobs is not None,
        }
        # With ignore_eos, SGLang ignores these tokens too.
        end_tokens = frozenset(params.stop_token_ids)
        num_tokens = 0
        async with aclosing(server.stream(GENERATE, body)) as events:
            async for event in events:
                (result,) = _results(event, [prompt])
                chunk = _read_chunk(event, result, num_tokens, params.logprobs)
                num_tokens += len(chunk.token_ids)
                end = next((index for index, token in enumerate(chunk.token_ids, 1) if token in end_tokens), None)
                if end is not None:
                    yield Chunk(chunk.token_ids[:end], chunk.logprobs[:end], "stop", chunk.num_cached_tokens)
                    return
                yield chunk
                if chunk.finish_reason is not None:
                    return
        raise ServerUnavailable("the stream ended before the answer")

    def counters(self, metrics: str) -> str:
        return "\n".join(line for line in metrics.splitlines() if line.partition("{")[0].endswith("_total"))

    def read_stats(self, metrics_texts: Sequence[str]) -> EngineStats:
        sums: dict[str, float] = defaultdict(float)
        for metrics in metrics_texts:
            for name, value in _METRIC.findall(metrics):
                sums[name] += float(value)
        return EngineStats(
            num_running=int(sums["num_running_reqs"]),
            num_waiting=int(sums["num_queue_reqs"]),
            num_tokens=int(sums["prompt_tokens_total"] - sums["cached_tokens_total"] + sums["generation_tokens_total"]),
            prefix_queries=int(sums["prompt_tokens_total"]),
            prefix_hits=int(sums["cached_tokens_total"]),
        )


def _body(prompts: Sequence[Any], *, max_new_tokens: int, **logprobs: Any) -> dict[str, Any]:
    """Returns a request for one prompt or for several ones, with greedy decoding.

    The prefix cache is used up to `logprob_start_len`, so it is not set unless the prompt's own log-probabilities are
    needed.
    """
    return {
        "input_ids": list(map(list, prompts)) if prompts and isinstance(prompts[0], Sequence) else list(prompts),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": max_new_tokens},
        "return_logprob": bool(logprobs),
        **logprobs,
    }


def _sampling_params(params: SamplingParams, *, max_new_tokens: int, position: int) -> dict[str, Any]:
    """All parameters are sent, because a server can have other defaults."""
    body: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min(max_new_tokens, max(0, params.min_tokens - position)),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": list(params.stop_token_ids),
        "skip_special_tokens": False,
    }
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if not params.greedy:
        # It has an effect only on a server with --enable-deterministic-inference.
        body["sampling_seed"] = (params.seed * 1_000_003 + position) % MAX_SEED
    return body


def _results(response: Any, prompts: Sequence[Sequence[int] | None]) -> list[Mapping[str, Any]]:
    """Returns the information about each result, in the order of the prompts.

    A server can be set up to truncate long prompts without an error, so the number of tokens is compared.
    """
    responses = response if isinstance(response, list) else [response]
    if len(responses) != len(prompts):
        raise unreadable(f"expected {len(prompts)} results")
    results = []
    for each, prompt in zip(responses, prompts, strict=True):
        result = each.get("meta_info") if isinstance(each, Mapping) else None
        if not isinstance(result, Mapping):
            raise unreadable("a result has no meta_info")
        _check_not_aborted(result)
        if prompt is not None and result.get("prompt_tokens") != len(prompt):
            raise unreadable(f"the server has read {result.get('prompt_tokens')} of {len(prompt)} tokens")
        results.append(result)
    return results


def _check_not_aborted(result: Mapping[str, Any]) -> None:
    """SGLang reports some errors as a result with status 200."""
    reason = result.get("finish_reason")
    if not isinstance(reason, Mapping):
        return
    if reason.get("type") == "abort":
        message = str(reason.get("message") or "the server has aborted the request")
        if reason.get("status_code") == REJECTED_REQUEST:
            raise RequestError("request", message)
        raise ServerUnavailable(message)
    if reason.get("matched") == "NaN happened":
        raise ServerUnavailable("the server computed probabilities that are no numbers", deterministic=True)


def _read_chunk(event: Any, result: Mapping[str, Any], num_read: int, num_logprobs: int | None) -> Chunk:
    """Returns the new tokens of an event.

    By default, each event has all tokens of the answer. A server can be set up to send only the new ones.
    """
    token_ids, total = event.get("output_ids"), result.get("completion_tokens")
    if not isinstance(token_ids, list) or not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise unreadable("an event of the stream has no token ids")
    first = num_read if len(token_ids) == total else 0
    token_ids = token_ids[first:]
    if num_read + len(token_ids) != total:
        raise unreadable(f"{num_read} and {len(token_ids)} tokens are not {total}")
    logprobs: tuple[Logprob, ...] = ()
    if num_logprobs is not None and token_ids:
        # Some versions repeat all log-probabilities although they send only the new tokens.
        entries = _entries(result, "output_token_logprobs")[-len(token_ids) :]
        tops = (result.get("output_top_logprobs") or [])[-len(token_ids) :]
        if [entry[1] for entry in entries] != token_ids or len(tops) != len(token_ids):
            raise unreadable("the log-probabilities do not match the tokens")
        logprobs = tuple(
            Logprob(read_logprob(entry[0]), ranked(_by_token_id(top), num_logprobs))
            for entry, top in zip(entries, tops, strict=True)
        )
    return Chunk(tuple(token_ids), logprobs, _finish_reason(result), _num_cached_tokens(result))


def _finish_reason(result: Mapping[str, Any]) -> FinishReason | None:
    reason = result.get("finish_reason")
    if reason is None:
        return None
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    if kind not in ("stop", "length"):
        raise ServerUnavailable(f"the server ended the answer with {kind!r}", deterministic=True)
    return "stop" if kind == "stop" else "length"


def _num_cached_tokens(result: Mapping[str, Any]) -> int:
    return int(result.get("cached_tokens") or 0)


def _row(result: Mapping[str, Any], field: str) -> dict[int, float]:
    """Returns the log-probabilities of the single new token of a result."""
    rows = result.get(field)
    if not isinstance(rows, list) or len(rows) != 1:
        raise unreadable("a result has no log-probabilities")
    return _by_token_id(rows[0])


def _entries(result: Mapping[str, Any], field: str) -> list[Sequence[Any]]:
    """Returns entries of the form [log-probability, token id, text]."""
    entries = result.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
        raise unreadable(f"a result has no {field}")
    return entries


def _by_token_id(entries: Any) -> dict[int, float]:
    if not isinstance(entries, list) or not entries:
        raise unreadable("log-probabilities are missing")
    if not all(isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[1], int) for entry in entries):
        raise unreadable("log-probabilities without token ids")
    return {entry[1]: read_logprob(entry[0]) for entry in entries}


async def _has_model_path(server: Transport) -> bool:
    return "model_path" in await _model_info(server)


async def _model_info(server: Transport) -> Mapping[str, Any]:
    return await _first_of(server, "/model_info", "/get_model_info")


async def _server_info(server: Transport) -> Mapping[str, Any]:
    try:
        return await _first_of(server, "/server_info", "/get_server_info")
    except (ServerUnavailable, ServerError, RequestError):
        return {}


async def _first_of(server: Transport, path: str, old_path: str) -> Mapping[str, Any]:
    """Returns the information at a path, or at the one that older versions have."""
    try:
        info = await server.get_json(path)
    except ServerError:
        info = await server.get_json(old_path)
    if not isinstance(info, Mapping):
        raise unreadable(f"{path} is not an object")
    return info
