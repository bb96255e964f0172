"""The calls of a deployment of Ray Serve LLM, which runs vLLM, through its deployment handle.

UNTESTED with a real Ray Serve LLM in the automated tests: it is written from the source code of Ray 2.60 and vLLM 0.32,
and tested with a stand-in for the deployment, and with the streams of a real vLLM. It has been tried once by hand with
Ray Serve LLM 2.60 on vLLM's build for CPUs, 0.32.

All completions are streamed. Ray Serve LLM streams text, which everybody can read. Other responses are objects of
vLLM's classes, which cannot be unpickled without vLLM, and the replicas of this project need no vLLM.
"""

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from transformers import PreTrainedTokenizerBase

from parse.engines.remote.dialect import (
    ModelIdentity,
    PromptLogprob,
    ServerFeatures,
    ranked,
    read_logprob,
    unreadable,
)
from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.startup import SAMPLE_TEXT, returns_prompt_logprobs, verifies, works
from parse.engines.remote.transport import Transport
from parse.engines.remote.vllm import (
    COMPLETIONS,
    DEFAULT_BLOCK_SIZE,
    TOKEN_PREFIX,
    VLLM,
    prefill_body,
    read_choices,
    read_top_logprobs,
)
from parse.errors import RequestError, ServerError
from parse.types import Logprob

LLM_CONFIG = "/llm_config"
"""The path under which a transport returns the settings of the deployment: the method `llm_config` of `LLMServer`."""
FORCING_BIAS = 100.0  # of a token that is then the most likely one


class RayServeLLM(VLLM):
    """Implements `Dialect`."""

    kind = "Ray Serve LLM"
    tested_versions = None

    async def model_card(self, server: Transport, name: str | None) -> Mapping[str, Any]:
        config = await read_llm_config(server)
        if config is None:  # the name is a part of every response
            response = await self.complete(server, prefill_body(None, []) | {"prompt": SAMPLE_TEXT})
            config = {"model_id": response.get("model")}
        served = config.get("model_id")
        if not isinstance(served, str) or name not in (None, served):
            raise WrongModel(f"the deployment serves {served!r}, and not {name!r}")
        engine_kwargs = config.get("engine_kwargs") or {}
        return {
            "id": served,
            "root": config.get("model_source") or served,
            "max_model_len": engine_kwargs.get("max_model_len"),
        }

    async def find_features(
        self, server: Transport, model: ModelIdentity, tokenizer: PreTrainedTokenizerBase
    ) -> ServerFeatures:
        prompt = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
        by_token_id = await verifies(self, server, model.name, prompt, by_token_id=True)
        config = await read_llm_config(server)
        missing = ["metrics of vLLM (Ray Serve LLM exports them itself)"]
        if config is None:
            missing.append("settings that can be read without vLLM (so its context length is not known)")
        version = await server.get_json("/version")
        return ServerFeatures(
            version=str(version["version"]),
            block_size=int((config or {}).get("engine_kwargs", {}).get("block_size") or DEFAULT_BLOCK_SIZE),
            verifies=by_token_id or await verifies(self, server, model.name, prompt, by_token_id=False),
            verifies_by_token_id=by_token_id,
            has_prompt_logprobs=await returns_prompt_logprobs(self, server, model.name, prompt),
            # vLLM ignores or rejects a bias if it has a speculative method.
            has_speculation=not await self._applies_bias(server, model.name, prompt),
            missing=tuple(missing),
        )

    async def complete(self, server: Transport, body: Mapping[str, Any]) -> Any:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        async with aclosing(server.stream(COMPLETIONS, body)) as events:
            return merged_response([event async for event in events])

    async def prompt_logprobs(
        self, server: Transport, model: str, prompt: Sequence[int], start: int, num_logprobs: int
    ) -> list[PromptLogprob]:
        """Lets vLLM echo the prompt, because it does not stream `prompt_logprobs`."""
        body = prefill_body(model, prompt) | {
            "echo": True,
            "logprobs": max(1, num_logprobs),  # the most likely token is needed to compare
            "return_tokens_as_token_ids": True,
        }
        return read_echo(await self.complete(server, body), prompt, start, num_logprobs)

    async def _applies_bias(self, server: Transport, model: str, prompt: Sequence[int]) -> bool:
        async def first_token(bias: Mapping[str, float]) -> int:
            body = prefill_body(model, prompt) | {"logit_bias": bias, "ignore_eos": True}
            token_ids = read_choices(await self.complete(server, body), 1)[0]["token_ids"]
            if not token_ids:
                raise unreadable("the response has no token")
            return int(token_ids[0])

        async def trial() -> bool:
            usual = await first_token({})
            other = next(token for token in prompt if token != usual)
            return await first_token({str(other): FORCING_BIAS}) == other

        return await works(trial)


async def read_llm_config(server: Transport) -> Mapping[str, Any] | None:
    """Returns the settings of the deployment, or None if they cannot be read."""
    try:
        config = await server.get_json(LLM_CONFIG)
    except (ServerError, RequestError):
        return None
    except ServerUnavailable as error:
        if error.deterministic:
            return None
        raise
    if not isinstance(config, Mapping):
        raise unreadable("the settings of the deployment are not a mapping")
    return config


def merged_response(events: Sequence[Any]) -> dict[str, Any]:
    """Returns the response that vLLM would have sent without a stream."""
    response: dict[str, Any] = {"choices": []}
    choices: dict[Any, dict[str, Any]] = {}
    for event in events:
        if not isinstance(event, Mapping) or not isinstance(event.get("choices"), list):
            raise unreadable("an event of the stream has no choices")
        response |= {key: event[key] for key in ("model", "usage") if event.get(key) is not None}
        for part in event["choices"]:
            if not isinstance(part, Mapping) or not isinstance(part.get("token_ids"), list):
                raise unreadable("a choice has no token ids, which only the vLLM engine of Ray Serve LLM returns")
            choice = choices.setdefault(part.get("index"), {"index": part.get("index"), "token_ids": []})
            choice["token_ids"] += part["token_ids"]
            for key in ("prompt_token_ids", "finish_reason"):
                if part.get(key) is not None:
                    choice[key] = part[key]
            for key, values in (part.get("logprobs") or {}).items():
                choice.setdefault("logprobs", {}).setdefault(key, []).extend(values or [])
    if not choices:
        raise ServerUnavailable("the stream ended before the answer")
    return response | {"choices": list(choices.values())}


def read_echo(response: Any, prompt: Sequence[int], start: int, num_logprobs: int) -> list[PromptLogprob]:
    """Returns what the server says about the tokens of the prompt from `start` on, which it has repeated."""
    logprobs = read_choices(response, 1)[0].get("logprobs") or {}
    tokens, tops, values = (logprobs.get(name) or [] for name in ("tokens", "top_logprobs", "token_logprobs"))
    has_all = len(tops) == len(values) == len(tokens)
    if tokens[: len(prompt)] != [f"{TOKEN_PREFIX}{token}" for token in prompt] or not has_all:
        raise unreadable("the prompt has no log-probabilities")
    results = []
    evaluated = slice(start, len(prompt))
    for token, top, value in zip(prompt[start:], tops[evaluated], values[evaluated], strict=True):
        if not isinstance(top, Mapping):
            raise unreadable(f"the log-probability of token {token} is missing")
        own, others = read_logprob(value), read_top_logprobs(top)
        is_argmax = all(own > other for other_token, other in others.items() if other_token != token)
        results.append(PromptLogprob(Logprob(own, ranked(others, num_logprobs)), is_argmax))
    return results
