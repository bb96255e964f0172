"""A server that speaks SGLang's own API, as its source code describes it, over a model that transformers runs.

It is no SGLang: it shows that the client follows the description, and not that the description is right.
"""

import asyncio
from typing import Any

import torch
from aiohttp import web

from tests.parse.engines.remote.fake_vllm import FakeVLLM


class FakeSGLang(FakeVLLM):
    def __init__(self, model: str, **options: Any) -> None:
        self.is_incremental = False
        """Whether a stream sends only new tokens, which is a setting of a real server."""
        self.is_old = False
        """Whether the information is at the paths of old versions."""
        self.truncates_at: int | None = None
        super().__init__(model, **options)
        self.version = "0.5.6"

    def _add_routes(self, router: web.UrlDispatcher) -> None:
        for path in ("/model_info", "/get_model_info"):
            router.add_get(path, self._model_info)
        for path in ("/server_info", "/get_server_info"):
            router.add_get(path, self._server_info)
        router.add_post("/generate", self._generate)

    async def _model_info(self, request: web.Request) -> web.Response:
        return self._information(request, {"model_path": self.root, "is_generation": True})

    async def _server_info(self, request: web.Request) -> web.Response:
        algorithm = "EAGLE3" if self.has_speculation else None
        return self._information(request, {"version": self.version, "page_size": 1, "speculative_algorithm": algorithm})

    def _information(self, request: web.Request, content: dict[str, Any]) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.is_old and not request.path.startswith("/get_"):
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response(content)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text='sglang:num_running_reqs{model_name="m"} 2.0\nsglang:num_queue_reqs{model_name="m"} 1.0\n'
            'sglang:prompt_tokens_total{model_name="m"} 100.0\nsglang:cached_tokens_total{model_name="m"} 60.0\n'
            'sglang:generation_tokens_total{model_name="m"} 30.0\n'
        )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = {key: value for key, value in (await request.json()).items() if key not in self.lacks}
        self.bodies.append(body)
        instead = self.misbehave(body)
        if isinstance(instead, web.StreamResponse):
            return instead
        prompts = body.get("input_ids")
        if prompts is None:
            prompts = self.tokenizer.encode(body["text"])
        is_batch = isinstance(prompts[0], list)
        if body.get("stream"):
            return await self._stream_tokens(request, prompts, body, instead)
        results = [self._result(prompt, body) for prompt in (prompts if is_batch else [prompts])]
        if callable(instead):
            results = instead(results)
        return web.json_response(results if is_batch else results[0])

    def _result(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """The result of a request for one token with greedy decoding."""
        assert body["sampling_params"]["temperature"] == 0 and body["sampling_params"]["max_new_tokens"] == 1
        prompt = prompt[: self.truncates_at]
        logprobs = self._logprobs(prompt)
        token = int(logprobs[-1].argmax())
        info = self._info(prompt, [token], {"type": "length", "length": 1})
        if body["return_logprob"]:
            start, num_top = body.get("logprob_start_len", -1), body.get("top_logprobs_num", 0)
            info |= self._output_logprobs([logprobs[-1]], [token], num_top)
            if token_ids := body.get("token_ids_logprob"):
                info["output_token_ids_logprobs"] = [[[float(logprobs[-1][each]), each, None] for each in token_ids]]
            if start >= 0:
                rows = logprobs[start:-1]
                info["input_token_logprobs"] = [[None, prompt[start], None]] + [
                    [float(row[following]), following, None]
                    for row, following in zip(rows, prompt[start + 1 :], strict=True)
                ]
                info["input_top_logprobs"] = [None, *(self._top(row, num_top) for row in rows)]
        return {"text": "", "output_ids": [token], "meta_info": info}

    async def _stream_tokens(
        self, request: web.Request, prompt: list[int], body: dict[str, Any], cut_after: Any
    ) -> web.StreamResponse:
        params = body["sampling_params"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        generator = torch.Generator().manual_seed(params.get("sampling_seed", 0))
        end_tokens = set() if params["ignore_eos"] else {self.tokenizer.eos_token_id, *params["stop_token_ids"]}
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        finish: dict[str, Any] | None = None
        while finish is None:
            await asyncio.sleep(0)
            if cut_after is not None and len(tokens) == cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            logits = self._logprobs([*prompt, *tokens])[-1].clone()
            for token, bias in (params.get("logit_bias") or {}).items():
                logits[int(token)] += bias
            if len(tokens) < params["min_new_tokens"]:
                logits[list(end_tokens)] = -torch.inf
            scaled = (logits / (params["temperature"] or 1.0)).log_softmax(-1)
            is_greedy = not params["temperature"]
            tokens.append(
                int(scaled.argmax()) if is_greedy else int(torch.multinomial(scaled.exp(), 1, generator=generator))
            )
            rows.append(scaled)
            if len(tokens) == params["max_new_tokens"]:
                finish = {"type": "length", "length": len(tokens)}
            elif tokens[-1] in end_tokens:
                finish = {"type": "stop", "matched": tokens[-1]}
            if finish is None and len(tokens) % 2:
                continue  # a chunk can hold several tokens
            first = (len(tokens) - 1) // 2 * 2 if self.is_incremental else 0
            info = self._info(prompt, tokens, finish)
            if body["return_logprob"]:
                info |= self._output_logprobs(rows[first:], tokens[first:], body["top_logprobs_num"])
            event = {"text": "", "output_ids": tokens[first:], "meta_info": info}
            await self._send(response, event)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _info(self, prompt: list[int], tokens: list[int], finish: dict[str, Any] | None) -> dict[str, Any]:
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "cached_tokens": 3}
        return {"id": "1", "finish_reason": finish} | counts

    def _output_logprobs(self, rows: list[torch.Tensor], tokens: list[int], num_top: int) -> dict[str, Any]:
        entries = [[float(row[token]), token, None] for row, token in zip(rows, tokens, strict=True)]
        logprobs: dict[str, Any] = {"output_token_logprobs": entries}
        if num_top:
            logprobs["output_top_logprobs"] = [self._top(row, num_top) for row in rows]
        return logprobs

    def _top(self, row: torch.Tensor, count: int) -> list[list[Any]]:
        return [[float(row[token]), int(token), None] for token in row.topk(count).indices]
