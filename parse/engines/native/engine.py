"""The native engine as the pipeline calls it: coroutines over an engine core.

The engine core has a thread of its own.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace

from parse.config import EngineSettings
from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.engine_core import EngineCore, EngineCoreConfig, EngineStats
from parse.engines.native.kv_cache_size import kv_cache_bytes
from parse.engines.native.model import Model
from parse.engines.native.output_stream import OutputStream, Waker
from parse.engines.native.programs import Program, TreeOutput, generate, prefill
from parse.engines.native.request import Request
from parse.engines.native.verification import VerifyOptions, verify_and_generate, verify_only
from parse.engines.protocol import Capabilities
from parse.errors import RequestError
from parse.registry import MODES
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.types import MAX_LOGPROBS, SamplingParams, TokenDelta, VerifyResult, validate_token_ids

MAX_SUFFIX_TOKENS = 1024  # per forward pass; each sequence has memory for this many tokens beyond `max_model_len`


class NativeEngine:
    """Serves one model. Its calls share only the prefix cache and forward passes."""

    def __init__(
        self,
        settings: EngineSettings,
        model: Model,
        *,
        methods: Mapping[str, SpeculativeMethod] | None = None,
        cost_model: StepCostModel | None = None,
    ) -> None:
        """Serves the model. The first token-level method in `methods` is the default.

        `cost_model` is the one that the methods consult; the engine keeps it up to date.
        """
        self.model, self._methods = model, dict(methods or {})
        self.max_model_len = min(settings.max_model_len, model.max_model_len)
        max_sequences, sequence_capacity = self._divide_memory(kv_cache_bytes(settings, model.network))
        for method in self._methods.values():
            method.proposer.reserve(max_sequences, sequence_capacity)
        self._waker = Waker()
        self.core = EngineCore(
            model,
            EngineCoreConfig(
                max_sequences=max_sequences,
                sequence_capacity=sequence_capacity,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                cuda_graphs=settings.cuda_graphs,
            ),
            cost_model=cost_model if self._methods else None,
            after_step=self._waker.wake,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Token-level methods, the default one first."""
        return tuple(self._methods)

    @property
    def stats(self) -> EngineStats:
        return self.core.stats

    def capabilities(self) -> Capabilities:
        return Capabilities(
            modes=tuple(name for name, mode in MODES.items() if mode.function),
            speculative_methods=self.methods,
            sampling_params=frozenset(field.name for field in fields(SamplingParams)),
            max_logprobs=MAX_LOGPROBS,
            max_model_len=self.max_model_len,
            block_size=self.core.scheduler.prefix_cache.block_size,
            eos_token_ids=self.model.eos_token_ids,
        )

    def reset_prefix_cache(self) -> None:
        """Makes later requests compute everything themselves."""
        self.core.reset_prefix_cache()
        for method in self._methods.values():
            method.proposer.reset()

    def reset_acceptance_history(self) -> None:
        """Resets the statistics of past proposals. No request may be running."""
        for method in self._methods.values():
            method.reset()

    def shutdown(self) -> None:
        self.core.shutdown()

    async def prefill(self, prompt_token_ids: Sequence[int]) -> int:
        """Computes a prompt ahead of time. Returns how many of its tokens were cached."""
        prompt = self._validated("prompt", prompt_token_ids)
        self._check_length("prompt", len(prompt))
        stream = OutputStream(self._waker)
        request = Request(prompt, prefill(), 0, stream)
        async with aclosing(self._run(request, stream)) as results:
            async for _ in results:
                pass
        return request.num_cached_tokens

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        """Returns P(correct) of the request's prefixes of a draft."""
        request = self._validated_verification(request)
        tokens, trunk = _verification_context(request, trunk_start=None)
        stream = OutputStream(self._waker)
        program = verify_only(request, self._verify_options(), trunk, emit=stream.put)
        running = Request(tokens, program, len(trunk) + _num_suffix_tokens(request), stream)
        async with aclosing(self._run(running, stream)) as results:
            (result,) = [result async for result in results]
        assert isinstance(result, VerifyResult)
        return result

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        """Yields the generated tokens. A delta contains all tokens since the last one.

        The speculative method changes the speed, never the tokens. The token limit, penalties, stop strings and seed
        apply to the output as a whole. Closing the generator aborts the request.
        """
        request = self._validated_generation(request)
        # A caller that asked for larger deltas waits for each of them, so it is woken at once.
        stream = OutputStream(self._waker, patient=request.stream_interval == 1)
        program = self._generation(request, stream)
        token_ids = [*request.prompt_token_ids, *request.output_token_ids][:-1]
        running = Request(token_ids, program, self._max_new_tokens(request) + 1, stream)
        async with aclosing(self._run(running, stream)) as results:
            async for result in results:
                assert isinstance(result, TokenDelta)
                yield result

    async def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        """Yields the result of the verification, then what follows the accepted prefix.

        Both are one request of the engine, so there is no round trip, queue or idle step between them. The first token
        after the accepted prefix comes from the pass that verifies.
        """
        request = replace(request, verify=self._validated_verification(request.verify))
        self._check_options(request.sampling_params, request.speculative_method)
        tokens, trunk = _verification_context(request.verify, trunk_start=request.num_accepted)
        stream = OutputStream(self._waker, patient=request.stream_interval == 1)
        program = verify_and_generate(
            request,
            self._verify_options(),
            trunk,
            emit=stream.put,
            start_generation=lambda continuation, last_output: self._generation(continuation, stream, last_output),
        )
        max_new_tokens = max(len(trunk) + _num_suffix_tokens(request.verify), self.max_model_len + 1 - len(tokens))
        running = Request(tokens, program, max_new_tokens, stream)
        async with aclosing(self._run(running, stream)) as results:
            async for result in results:
                yield result

    async def _run(self, request: Request, stream: OutputStream) -> AsyncGenerator[VerifyResult | TokenDelta]:
        """Yields the results of a request. The first one has the number of cached tokens."""
        self.core.add_request(request)
        is_first = True
        try:
            async for result in stream:
                yield replace(result, num_cached_tokens=request.num_cached_tokens) if is_first else result
                is_first = False
        finally:
            self.core.abort(request)

    def _generation(
        self, request: GenerateRequest, stream: OutputStream, last_output: TreeOutput | None = None
    ) -> Program:
        self._check_remaining_tokens(request)
        method = self._method(request.speculative_method)
        detokenizer = None
        if request.sampling_params.stop:
            detokenizer = IncrementalDetokenizer(self.model.tokenizer, request.sampling_params.stop)
            detokenizer.add(request.output_token_ids)
            if detokenizer.matched_stop is not None:
                raise RequestError("output", f"already contains the stop string {detokenizer.matched_stop!r}")
        return generate(
            request,
            stop_token_ids=self.model.eos_token_ids,
            max_new_tokens=self._max_new_tokens(request),
            emit=stream.put,
            detokenizer=detokenizer,
            speculation=method.start_sequence() if method else None,
            last_output=last_output,
        )

    def _max_new_tokens(self, request: GenerateRequest) -> int:
        max_tokens, num_output = request.sampling_params.max_tokens, len(request.output_token_ids)
        limit = self.max_model_len - len(request.prompt_token_ids) - num_output
        return limit if max_tokens is None else min(limit, max_tokens - num_output)

    def _validated_generation(self, request: GenerateRequest) -> GenerateRequest:
        """Returns the request with plain token ids."""
        self._check_options(request.sampling_params, request.speculative_method)
        return replace(
            request,
            prompt_token_ids=self._validated("prompt", request.prompt_token_ids),
            output_token_ids=self._validated("output", request.output_token_ids),
            draft_token_ids=self._validated("draft", request.draft_token_ids),
        )

    def _check_remaining_tokens(self, request: GenerateRequest) -> None:
        self._check_length("prompt", len(request.prompt_token_ids) + len(request.output_token_ids), spare=1)
        if self._max_new_tokens(request) < 1:
            max_tokens = request.sampling_params.max_tokens
            raise RequestError("output", f"already has max_tokens, {max_tokens}, or more tokens")

    def _check_options(self, params: SamplingParams, speculative_method: str | None) -> None:
        self._validated("logit_bias", list(params.logit_bias))
        self._method(speculative_method)

    def _validated_verification(self, request: VerifyRequest) -> VerifyRequest:
        suffix, lengths = request.suffix, request.prefix_lengths
        request = replace(
            request,
            prompt_token_ids=self._validated("prompt", request.prompt_token_ids),
            output_token_ids=self._validated("output", request.output_token_ids),
            draft_token_ids=self._validated("draft", request.draft_token_ids),
        )
        self._validated("suffix", (*suffix.token_ids, *suffix.correct_token_ids, *suffix.incorrect_token_ids))
        if not (suffix.token_ids and suffix.correct_token_ids and suffix.incorrect_token_ids):
            raise RequestError("suffix", "must hold a verification prompt and both its answers")
        start = len(request.prompt_token_ids) + len(request.output_token_ids)
        num_draft = len(request.draft_token_ids)
        self._check_length("prompt", start)
        self._check_length("draft", start + num_draft)
        ascending = list(lengths) == sorted(set(lengths))
        if not ascending or (lengths and not 0 < lengths[0] <= lengths[-1] <= num_draft):
            message = f"must ascend within 1..{num_draft}, the length of the draft, got {list(lengths)}"
            raise RequestError("prefix_lengths", message)
        return request

    def _verify_options(self) -> VerifyOptions:
        return VerifyOptions(
            max_nodes=MAX_SUFFIX_TOKENS,
            max_model_len=self.model.max_model_len,
            answer_first=self.model.device.type == "cpu",
        )

    def _method(self, name: str | None) -> SpeculativeMethod | None:
        if name is None:
            return next(iter(self._methods.values()), None)
        if name == "none":
            return None
        if name not in self._methods:
            offered = ", ".join(("none", *self._methods))
            raise RequestError("speculation", f"must be one of {offered}, got {name!r}")
        return self._methods[name]

    def _validated(self, field: str, token_ids: Sequence[int]) -> list[int]:
        return validate_token_ids(field, token_ids, self.model.vocab_size)

    def _check_length(self, field: str, length: int, spare: int = 0) -> None:
        if not length:
            raise RequestError(field, "must not be empty")
        if length + spare > self.max_model_len:
            message = f"makes the sequence {length} tokens long, and the limit is {self.max_model_len}"
            raise RequestError(field, message)

    def _divide_memory(self, num_bytes: int) -> tuple[int, int]:
        """Returns how many sequences fit into memory, and how many tokens each can hold, suffixes included."""
        config = self.model.network.config.get_text_config()
        hidden_states = len(self.model.aux_hidden_state_layers) * config.hidden_size * self.model.network.dtype.itemsize
        proposers = sum(method.proposer.bytes_per_token for method in self._methods.values())
        bytes_per_token = self.model.bytes_per_token + hidden_states + proposers
        capacity = self.max_model_len + MAX_SUFFIX_TOKENS
        num_tokens = num_bytes // bytes_per_token
        max_sequences = num_tokens // capacity
        if max_sequences < 1:
            needed = capacity * bytes_per_token
            message = f"a sequence of {self.max_model_len} tokens needs {needed} bytes, got {num_bytes}"
            raise RequestError("kv_cache_memory_bytes", message)
        return max_sequences, num_tokens // max_sequences  # with small blocks the remainder is used too


def _verification_context(request: VerifyRequest, trunk_start: int | None) -> tuple[list[int], list[int]]:
    """Returns the context of a verification, and its trunk.

    The trunk consists of the tokens after the context, which are run as nodes. It starts with the token before
    `trunk_start`, an index of the draft, and ends with the last prefix. If log-probabilities are requested, the trunk
    always starts with the token before the draft. Otherwise, `trunk_start=None` means that there is no trunk.
    """
    if request.num_logprobs is not None:
        trunk_start = 0
    before = [*request.prompt_token_ids, *request.output_token_ids]
    tokens = [*before, *request.draft_token_ids[: request.num_computed_draft_tokens]]
    split = len(tokens) if trunk_start is None else len(before) + trunk_start - 1
    return tokens[:split], tokens[split:]


def _num_suffix_tokens(request: VerifyRequest) -> int:
    """Returns the maximum number of suffix tokens in one pass of a verification."""
    width = len(request.suffix.token_ids)
    return max(width, min(MAX_SUFFIX_TOKENS, len(request.prefix_lengths) * width))
