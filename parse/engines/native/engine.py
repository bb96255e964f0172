"""The native engine as the pipeline calls it: coroutines over an engine core.

The engine core has a thread of its own.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace

from transformers import PreTrainedTokenizerBase

from parse.acceptance import cheapest_stride
from parse.config import EngineSettings
from parse.engines.native.engine_core import EngineCore, EngineCoreConfig
from parse.engines.native.generation import Program, TreeOutput, generate, prefill
from parse.engines.native.hang_detector import HangDetector
from parse.engines.native.kv_cache_size import kv_cache_bytes
from parse.engines.native.model import Model
from parse.engines.native.output_stream import OutputStream, Waker
from parse.engines.native.request import Request
from parse.engines.native.startup_requests import startup_requests
from parse.engines.native.verification import VerifyOptions, verify_and_generate, verify_only
from parse.engines.protocol import Capabilities, EngineStats
from parse.engines.request_checks import RequestChecks, stop_detokenizer
from parse.errors import RequestError
from parse.registry import MODES
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.speculative.cost_model import StepCostModel
from parse.speculative.proposal_policy import SpeculativeMethod
from parse.types import MAX_LOGPROBS, SamplingParams, TokenDelta, VerifyResult

TYPICAL_SUFFIX_TOKENS = 16  # of the default verification prompt with the tokens of a chat template
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
        step_seconds: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Serves the model. The first token-level method in `methods` is the default.

        `cost_model` is the one that the methods consult; the engine keeps it up to date. `step_seconds` are the
        durations of steps in the plan of the model, by their number of tokens. They decide how drafts are verified and
        never change, so that the same request always gets the same answer.
        """
        self.model, self._methods = model, dict(methods or {})
        planned_cost_model = StepCostModel()
        planned_cost_model.initialize(step_seconds)
        self._pass_seconds = planned_cost_model.step_seconds if step_seconds and model.device.type == "cpu" else None
        self._stride = _stride(planned_cost_model) if step_seconds else None
        self.max_model_len = min(settings.max_model_len, model.max_model_len)
        max_sequences, sequence_capacity = _divide_memory(
            kv_cache_bytes(settings, model.network), model, self._methods, self.max_model_len
        )
        for method in self._methods.values():
            method.proposer.reserve(max_sequences, sequence_capacity)
        self._checks = RequestChecks(model.vocab_size, self.max_model_len)
        self._hang_detector = HangDetector()
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
    def name(self) -> str:
        return self.model.name

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

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
            stride=self._stride,
        )

    async def read_stats(self) -> EngineStats:
        return self.stats

    async def check_available(self) -> None:
        self.check_health()

    def check_health(self) -> None:
        if not self.core.alive:
            raise RuntimeError("the engine's thread has ended")
        self._hang_detector.check(self.stats)

    async def warm_up(self) -> None:
        """Runs every kind of request once, so that kernels are compiled and memory is allocated."""
        verify, generations = startup_requests(self.model.vocab_size, self.max_model_len, self.methods)
        await self.verify(verify)
        for request in generations:
            async for _ in self.generate(request):
                pass
        self.reset_prefix_cache()
        self.reset_acceptance_history()

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

    async def prefill(self, prompt_token_ids: Sequence[int], session_key: str = "") -> int:
        """Computes a prompt ahead of time. Returns how many of its tokens were cached."""
        prompt = self._checks.prompt(prompt_token_ids)
        stream = OutputStream(self._waker)
        request = Request(prompt, prefill(), 0, stream)
        async with aclosing(self._run(request, stream)) as results:
            async for _ in results:
                pass
        return request.num_cached_tokens

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        """Returns P(correct) of the request's prefixes of a draft."""
        request = self._checks.verification(request)
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

        The speculative method changes the speed and not the tokens, unless a draft model uses proposed tokens unchecked
        (`drafting` in the settings). The token limit, penalties, stop strings and seed apply to the output as a whole.
        Closing the generator aborts the request.
        """
        request = self._checks.generation(request)
        self._method(request.speculative_method)
        # A caller that asked for larger deltas waits for each of them, so it is woken at once.
        stream = OutputStream(self._waker, patient=request.stream_interval == 1)
        program = self._generation(request, stream)
        token_ids = [*request.prompt_token_ids, *request.output_token_ids][:-1]
        running = Request(token_ids, program, self._checks.max_new_tokens(request) + 1, stream)
        async with aclosing(self._run(running, stream)) as results:
            async for result in results:
                assert isinstance(result, TokenDelta)
                yield result

    async def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        """Yields the result of the verification, then what follows the accepted prefix.

        Both are one request of the engine, so there is no round trip, queue or idle step between them. The first token
        after the accepted prefix comes from the pass that verifies.
        """
        request = replace(request, verify=self._checks.verification(request.verify))
        self._checks.token_ids("logit_bias", list(request.sampling_params.logit_bias))
        self._method(request.speculative_method)
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
        method, params = self._method(request.speculative_method), request.sampling_params
        return generate(
            request,
            eos_token_ids=self.model.eos_token_ids,
            max_new_tokens=self._checks.max_new_tokens(request),
            emit=stream.put,
            detokenizer=stop_detokenizer(request, self.tokenizer),
            speculation=method.start_sequence(check_all=params.modifies_logits or not params.greedy)
            if method
            else None,
            last_output=last_output,
        )

    def _verify_options(self) -> VerifyOptions:
        return VerifyOptions(
            max_nodes=MAX_SUFFIX_TOKENS,
            max_model_len=self.model.max_model_len,
            answer_first=self.model.device.type == "cpu",
            pass_seconds=self._pass_seconds,
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


def _stride(cost_model: StepCostModel) -> int:
    step_seconds = cost_model.step_seconds
    return cheapest_stride(lambda size: step_seconds(size * TYPICAL_SUFFIX_TOKENS), step_seconds(1))


def _divide_memory(
    num_bytes: int, model: Model, methods: Mapping[str, SpeculativeMethod], max_model_len: int
) -> tuple[int, int]:
    """Returns how many sequences fit into memory, and how many tokens each can hold, suffixes included."""
    config = model.network.config.get_text_config()
    hidden_states = len(model.aux_hidden_state_layers) * config.hidden_size * model.network.dtype.itemsize
    proposers = sum(method.proposer.bytes_per_token for method in methods.values())
    bytes_per_token = model.bytes_per_token + hidden_states + proposers
    capacity = max_model_len + MAX_SUFFIX_TOKENS
    num_tokens = num_bytes // bytes_per_token
    max_sequences = num_tokens // capacity
    if max_sequences < 1:
        needed = capacity * bytes_per_token
        message = f"a sequence of {max_model_len} tokens needs {needed} bytes, got {num_bytes}"
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
