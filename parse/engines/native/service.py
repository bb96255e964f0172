"""A model as the rest of the system calls it: warm, generate and judge, from coroutines, over an engine of its own."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType

from parse.config import EngineSettings
from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.engine import EngineCore, EngineStats, Request
from parse.engines.native.model import Model
from parse.engines.native.programs import Program, generate, prefill, verify
from parse.prompts import VerificationSuffix
from parse.speculative.cost_model import StepCostModel
from parse.speculative.policy import SpeculativeMethod, bytes_per_token
from parse.types import (
    MethodChoice,
    MethodName,
    RequestError,
    SamplingParams,
    TokenDelta,
    VerifyResult,
    merge_deltas,
    validate_token_ids,
)

DEFAULT_PARAMS = SamplingParams()
NO_METHODS: Mapping[MethodName, SpeculativeMethod] = MappingProxyType({})
WAKE_INTERVAL_S = 0.02  # nobody reads faster
MAX_SUFFIX_TOKENS = 1024  # tokens beyond the longest context, for the probes hung on it


class NativeEngine:
    """One model, many callers. Every call stands alone: what calls share they find in the cache."""

    def __init__(
        self,
        settings: EngineSettings,
        model: Model,
        methods: Mapping[MethodName, SpeculativeMethod] = NO_METHODS,
        cost_model: StepCostModel | None = None,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        """Allocates memory for the model and the methods, and starts the engine's thread.

        `parse.engines.loader` loads all of them from settings. The cost model is the one that the methods use.
        """
        self.model, self._methods = model, dict(methods)
        self.max_model_len = min(settings.max_context, self.model.max_model_len)
        capacity = self.max_model_len + MAX_SUFFIX_TOKENS
        hidden_state_bytes = model.network.config.get_text_config().hidden_size * model.network.dtype.itemsize
        bytes_each = model.bytes_per_token + bytes_per_token(methods.values(), hidden_state_bytes)
        tokens = settings.memory_mb * 2**20 // bytes_each
        contexts = tokens // capacity
        if contexts < 1:
            needed = -(-capacity * bytes_each // 2**20)
            raise RequestError(
                "memory_mb", f"{settings.memory_mb} hold no context of {self.max_model_len} tokens, that takes {needed}"
            )
        for method in self._methods.values():
            method.proposer.reserve(contexts, tokens // contexts)
        self._waker = _Waker()
        self.core = EngineCore(
            self.model,
            max_sequences=contexts,
            sequence_capacity=tokens // contexts,  # small pages make use of the odd rest
            max_num_seqs=settings.max_running,
            max_num_batched_tokens=settings.step_tokens,
            cuda_graphs=cuda_graphs,
            cost_model=cost_model,
            after_step=self._waker.ring,
        )

    @property
    def methods(self) -> tuple[MethodName, ...]:
        """Of speculation, the usual one first."""
        return tuple(self._methods)

    @property
    def stats(self) -> EngineStats:
        return self.core.stats

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far serves later requests."""
        self.core.reset_prefix_cache()
        for way in self._methods.values():
            way.proposer.reset()

    def reset_acceptance_history(self) -> None:
        """Nothing that came of proposals so far is expected of later ones. While nobody is served."""
        for way in self._methods.values():
            way.reset()

    def shutdown(self) -> None:
        self.core.shutdown()

    async def warm(self, prompt: Sequence[int]) -> int:
        """Computes a prompt ahead of time; says how many of its tokens were known."""
        prompt = validate_token_ids("prompt", prompt, self.model.vocab_size)
        self._check_length("prompt", len(prompt))
        return await self._run(prompt, prefill(), room=0)

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: VerificationSuffix,
        *,
        full: float | None = None,
        prefix: float | None = None,
        logprobs: int | None = None,
    ) -> VerifyResult:
        """P(correct) of the first c tokens of the draft as an answer to the prompt, for each cut c.

        With `full`, the last cut asks about a full answer, and if that passes nothing else is asked; with `prefix`,
        nothing beyond a prefix that does not pass; nor where the question would reach beyond the positions the model
        knows.
        """
        prompt = validate_token_ids("prompt", prompt, self.model.vocab_size)
        draft = validate_token_ids("draft", draft, self.model.vocab_size)
        validate_token_ids(
            "check", (*check.token_ids, *check.correct_token_ids, *check.incorrect_token_ids), self.model.vocab_size
        )
        if not (check.token_ids and check.correct_token_ids and check.incorrect_token_ids):
            raise RequestError("check", "must hold a question and both its answers")
        self._check_length("prompt", len(prompt))
        self._check_length("draft", len(prompt) + len(draft))
        if list(cuts) != sorted(set(cuts)) or (cuts and not 0 < cuts[0] <= cuts[-1] <= len(draft)):
            raise RequestError("cuts", f"must ascend within 1..{len(draft)}, the length of the draft, got {list(cuts)}")
        fitting = [cut for cut in cuts if len(prompt) + cut + len(check.token_ids) <= self.model.max_model_len]
        judged: list[VerifyResult] = []
        tokens = [*prompt, *draft[: cuts[-1] if cuts else 0]]
        # With log-probabilities the draft is run as a tree, whose logits can be asked for, else as context.
        trunk = tokens[len(prompt) - 1 :] if logprobs is not None else ()
        program = verify(
            len(prompt),
            fitting,
            check,
            full_threshold=full if fitting and fitting[-1] == cuts[-1] else None,
            prefix_threshold=prefix,
            in_one_pass=self.model.device.type != "cpu",
            max_nodes=MAX_SUFFIX_TOKENS,
            trunk=trunk,
            num_logprobs=logprobs or 0,
            done=judged.append,
        )
        context = tokens[: len(tokens) - len(trunk)]
        nodes = max(len(check.token_ids), min(MAX_SUFFIX_TOKENS, len(cuts) * len(check.token_ids)))
        cached = await self._run(context, program, room=len(trunk) + nodes)
        (verdict,) = judged
        return replace(
            verdict, p_correct=(*verdict.p_correct, *[None] * (len(cuts) - len(fitting))), num_cached_tokens=cached
        )

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: SamplingParams = DEFAULT_PARAMS,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
        speculation: MethodChoice | None = None,
    ) -> AsyncGenerator[TokenDelta]:
        """Writes on after `output`; what has been written since the last time it was asked comes in one piece.

        How fast depends on `speculation` (None: the usual method), what never does. The token limit, penalties, stop
        strings and seed regard the output as a whole. Leaving the iteration cancels.
        """
        prompt = validate_token_ids("prompt", prompt, self.model.vocab_size)
        output = validate_token_ids("output", output, self.model.vocab_size)
        proposal = validate_token_ids("proposal", proposal, self.model.vocab_size)
        validate_token_ids("logit_bias", list(sampling.logit_bias), self.model.vocab_size)
        self._check_length("prompt", len(prompt) + len(output), spare=1)
        room = self.max_model_len - len(prompt) - len(output)
        if sampling.max_tokens is not None:
            room = min(room, sampling.max_tokens - len(output))
        if room < 1:
            raise RequestError("output", f"leaves nothing of max_tokens, {sampling.max_tokens}")
        way = self._method(speculation)
        text = None
        if sampling.stop:
            text = IncrementalDetokenizer(self.model.tokenizer, sampling.stop)
            text.add(output)
            if text.matched_stop is not None:
                raise RequestError("output", f"holds the stop string {text.matched_stop!r} already")
        mailbox = _OutputStream(self._waker, patient=piece == 1)  # who asks for larger pieces waits for each of them
        program = generate(
            prompt,
            output,
            sampling,
            stop_token_ids=self.model.eos_token_ids,
            max_new_tokens=room,
            emit=mailbox.put,
            detokenizer=text,
            draft=proposal,
            speculation=way.start_sequence() if way else None,
            stream_interval=piece,
        )
        job = Request([*prompt, *output][:-1], program, room + 1, mailbox)
        self.core.add_request(job)
        try:
            cached = None
            async for tokens in mailbox:
                if cached is None:
                    cached = job.num_cached_tokens
                    tokens = replace(tokens, num_cached_tokens=cached)
                yield tokens
        finally:
            self.core.abort(job)

    async def _run(self, tokens: Sequence[int], program: Program, room: int) -> int:
        """Runs it to its end; says how many of the tokens were known."""
        mailbox = _OutputStream(self._waker)
        job = self.core.add_request(Request(list(tokens), program, room, mailbox))
        try:
            async for _ in mailbox:
                pass
            return job.num_cached_tokens
        finally:
            self.core.abort(job)

    def _method(self, choice: MethodChoice | None) -> SpeculativeMethod | None:
        if choice is None:
            return next(iter(self._methods.values()), None)
        if choice == "none":
            return None
        if choice not in self._methods:
            offered = ", ".join(("none", *self._methods))
            raise RequestError("speculation", f"must be one of {offered}, got {choice!r}")
        return self._methods[choice]

    def _check_length(self, field: str, length: int, spare: int = 0) -> None:
        if not length:
            raise RequestError(field, "must not be empty")
        if length + spare > self.max_model_len:
            raise RequestError(
                field, f"is {length} tokens long with what it follows, the limit is {self.max_model_len}"
            )


class _Waker:
    """Wakes the coroutines that wait for one engine, all of them at once.

    To wake an event loop costs the engine's thread a good part of a small model's step, so it is done between steps,
    and where nothing is urgent at most every `QUIET_S`.
    """

    def __init__(self) -> None:
        self._waiting: deque[_OutputStream] = deque()
        self._urgent = False
        self._last = 0.0

    def ask(self, mailbox: "_OutputStream", *, urgent: bool) -> None:
        self._waiting.append(mailbox)
        if urgent:
            self._urgent = True

    def hurry(self) -> None:
        self._urgent = True

    def ring(self) -> None:
        if not self._waiting or not (self._urgent or time.monotonic() - self._last >= WAKE_INTERVAL_S):
            return
        self._urgent, self._last = False, time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[_OutputStream]] = {}
        with suppress(IndexError):
            while True:
                mailbox = self._waiting.popleft()
                by_loop.setdefault(mailbox.loop, []).append(mailbox)
        for loop, mailboxes in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_open_all, mailboxes)


def _open_all(mailboxes: "Sequence[_OutputStream]") -> None:
    for mailbox in mailboxes:
        mailbox.open()


class _OutputStream:
    """Takes pieces in the engine's thread, and hands them over to a coroutine, all that have gathered at once.

    Its first piece and its end are urgent; with `patient=False` every piece is.
    """

    def __init__(self, bell: _Waker, *, patient: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self._bell, self._urgent, self._patient = bell, True, patient
        self._pieces: deque[TokenDelta] = deque()
        self._arrived = asyncio.Event()
        self._asked = self._ended = False
        self._error: BaseException | None = None

    def put(self, tokens: TokenDelta) -> None:
        self._pieces.append(tokens)
        self._ask()
        self._urgent = not self._patient

    def on_finished(self, error: BaseException | None) -> None:
        self._error, self._ended, self._urgent = error, True, True
        self._ask()

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._bell.ask(self, urgent=self._urgent)
        elif self._urgent:
            self._bell.hurry()

    def open(self) -> None:
        self._asked = False
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            ended = self._ended
            pieces = []
            while self._pieces:
                pieces.append(self._pieces.popleft())
            if pieces:
                yield merge_deltas(pieces)
            if ended:
                if self._error is not None:
                    raise self._error
                return
