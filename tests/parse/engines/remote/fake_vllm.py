"""A server that speaks vLLM's API over a model that transformers runs token by token, and that can misbehave on demand.

It exists for failures that a real server does not produce on request. tests/parse/engines/remote/test_real_vllm.py runs
the same engine over a real vLLM.
"""

import asyncio
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Misbehaviour = Callable[[dict[str, Any]], Any]
"""Receives the body of a completion. Returns None, or what the server does instead of answering."""


class FakeVLLM:
    def __init__(
        self,
        model: str,
        *,
        name: str = "served",
        max_model_len: int = 512,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        socket_path: str | None = None,
    ) -> None:
        """With `socket_path`, it listens on a Unix socket instead of a port."""
        self.network = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.name, self.root, self.max_model_len, self.api_key = name, model, max_model_len, api_key
        self.misbehave: Misbehaviour = lambda body: None
        self.lacks: set[str] = set()
        """Fields of a completion that this version does not know."""
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.num_aborted = 0
        self.has_speculation = False
        self.version = "0.32.0"
        self._port, self._tls, self._socket_path = 0, tls, socket_path
        self._runner: web.AppRunner | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listens, after a stop on the same port as before."""
        self._run(self._start())

    def stop(self) -> None:
        """Closes all connections at once, as if the process had been killed."""
        self._run(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        self._tokens: list[int] = []  # of the last forward pass, with their cache and the log-probabilities after each
        self._cache, self._rows = DynamicCache(), torch.empty(0, self.network.config.vocab_size)
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        self._add_routes(app.router)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        if self._socket_path is not None:
            await web.UnixSite(self._runner, self._socket_path).start()
            return
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True, ssl_context=self._tls)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    def _add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/version", self._version)
        router.add_post("/v1/completions", self._completions)

    async def _stop(self) -> None:
        if self._runner is None:
            return
        for connection in list(self._runner.server.connections):  # type: ignore[union-attr]
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()
        self._runner = None

    async def _models(self, request: web.Request) -> web.Response:
        self.calls["models"] += 1
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        card = {"id": self.name, "root": self.root, "parent": None, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            'vllm:cache_config_info{block_size="16"} 1.0',
            'vllm:num_requests_running{engine="0"} 2.0',
            'vllm:iteration_tokens_total_count{engine="0"} 7.0',
        ]
        if self.has_speculation:
            lines += [
                'vllm:spec_decode_num_drafts_total{engine="0"} 10.0',
                'vllm:spec_decode_num_draft_tokens_total{engine="0"} 30.0',
                'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 12.0',
            ]
        return web.Response(text="".join(f"{line}\n" for line in lines))

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = {key: value for key, value in (await request.json()).items() if key not in self.lacks}
        self.calls["completions"] += 1
        self.bodies.append(body)
        instead = self.misbehave(body)
        if asyncio.iscoroutine(instead):
            instead = await instead
        if isinstance(instead, web.StreamResponse):
            return instead
        if instead == "cut":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        prompts = self._prompts(body)
        if body.get("stream"):
            return await self._stream(request, prompts, body, cut_after=instead)
        choices = [self._choice(index, prompt, body) for index, prompt in enumerate(prompts)]
        if instead == "reversed":
            choices.reverse()
        elif callable(instead):
            choices = instead(choices)
        return web.json_response({"choices": choices, "usage": {"prompt_tokens_details": {"cached_tokens": 3}}})

    def _choice(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(prompt)
        last = logprobs[-1]
        token = int(last.argmax())
        choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "length"}
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": prompt, "token_ids": [token]}
        if body.get("logprobs") is not None:
            returned = {
                token,
                *body.get("logprob_token_ids", []),
                *last.topk(max(1, body["logprobs"])).indices.tolist(),
            }
            choice["logprobs"] = {
                "token_logprobs": [float(last[token])],
                "top_logprobs": [{f"token_id:{other}": float(last[other]) for other in returned}],
            }
        if body.get("prompt_logprobs") is not None:
            entries: list[Any] = [None]
            for row, following in zip(logprobs[:-1], prompt[1:], strict=True):
                others = {following, *row.topk(max(1, body["prompt_logprobs"])).indices.tolist()}
                entries.append(
                    {
                        str(other): {"logprob": float(row[other]), "rank": int((row >= row[other]).sum())}
                        for other in others
                    }
                )
            choice["prompt_logprobs"] = entries
        return choice

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        prompts = body["prompt"]
        if isinstance(prompts, str):
            return [self.tokenizer.encode(prompts, add_special_tokens=False)]
        return [prompts] if prompts and isinstance(prompts[0], int) else prompts

    async def _stream(
        self, request: web.Request, prompts: list[list[int]], body: dict[str, Any], cut_after: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        generated = 0
        try:
            for index, prompt in enumerate(prompts):
                for number, choice in enumerate(self._streamed_choices(prompt, body)):
                    await asyncio.sleep(0)
                    if cut_after is not None and number == cut_after:
                        assert request.transport is not None
                        request.transport.abort()
                        return response
                    await self._send(response, {"model": self.name, "choices": [choice | {"index": index}]})
                    generated += 1
            usage = {"completion_tokens": generated, "prompt_tokens_details": {"cached_tokens": 3}}
            await self._send(response, {"model": self.name, "choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.num_aborted += 1
            raise
        return response

    def _streamed_choices(self, prompt: list[int], body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields one choice for each generated token. The first one also has what belongs to the prompt."""
        tokens, finish = list(prompt), None
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        stop_token_ids = body.get("stop_token_ids", [])
        end_token_ids = {*([] if body.get("ignore_eos") else [self.tokenizer.eos_token_id]), *stop_token_ids}
        while finish is None:
            is_first, rows = len(tokens) == len(prompt), self._logprobs(tokens)
            logprobs = rows[-1]
            logits = logprobs.clone()
            for token, bias in ({} if self.has_speculation else body.get("logit_bias") or {}).items():
                logits[int(token)] += bias
            if len(tokens) - len(prompt) < body.get("min_tokens", 0):
                logits[list(end_token_ids)] = -torch.inf
            if body["temperature"]:
                scaled = (logits / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(scaled, 1, generator=generator))
            else:
                token = int(logits.argmax())
            tokens.append(token)
            if token in end_token_ids:
                finish = "stop"
            elif len(tokens) - len(prompt) == body["max_tokens"]:
                finish = "length"
            choice: dict[str, Any] = {"text": "", "finish_reason": finish}
            if body.get("return_token_ids"):
                choice |= {"token_ids": [token]} | ({"prompt_token_ids": prompt} if is_first else {})
            if body.get("logprobs") is not None:
                echoed = [(row, tokens[number + 1]) for number, row in enumerate(rows[:-1])]
                shown = [None, *echoed] if is_first and body.get("echo") else []
                choice["logprobs"] = self._streamed_logprobs([*shown, (logprobs, token)], tokens, body)
            yield choice

    def _streamed_logprobs(
        self, entries: list[tuple[torch.Tensor, int] | None], tokens: list[int], body: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns the log-probabilities of the last tokens. The entry of a first token of a prompt is None."""
        tops: list[dict[int, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            row, token = entry
            top = row.topk(max(1, body["logprobs"])).indices.tolist()
            returned = {token, *body.get("logprob_token_ids", []), *top}
            tops.append({other: float(row[other]) for other in returned})
        ids = tokens[-len(entries) :]
        return {
            "tokens": [f"token_id:{token}" for token in ids],
            "token_logprobs": [None if top is None else top[token] for token, top in zip(ids, tops, strict=True)],
            "top_logprobs": [top and {f"token_id:{other}": value for other, value in top.items()} for top in tops],
        }

    async def _send(self, response: web.StreamResponse, event: Any) -> None:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    @torch.inference_mode()
    def _logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Computes only the tokens after the longest beginning that the last call had too."""
        differs = (index for index, pair in enumerate(zip(tokens, self._tokens, strict=False)) if pair[0] != pair[1])
        num_cached = min(next(differs, len(self._tokens)), len(self._tokens), len(tokens) - 1)
        self._cache.crop(num_cached - len(self._tokens))
        new = torch.tensor([tokens[num_cached:]])
        logits = self.network(new, past_key_values=self._cache, use_cache=True).logits[0]
        self._rows = torch.cat([self._rows[:num_cached], logits.log_softmax(-1)])
        self._tokens = list(tokens)
        return self._rows
