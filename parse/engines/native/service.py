"""A model as the rest of the system calls it: warm, generate and judge, from coroutines, over an engine of its own."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from parse.config import EngineSettings
from parse.detokenizer import TextStream
from parse.engines.native.engine import Engine, Job, Load
from parse.engines.native.model import Model
from parse.engines.native.programs import Program, generate, judge, warm
from parse.engines.native.step_timing import pass_seconds
from parse.prompts import Check
from parse.speculative.cost_model import Costs
from parse.speculative.loading import bytes_per_token, ways
from parse.speculative.policy import Way
from parse.types import Judged, Method, MethodChoice, RequestError, Sampling, Tokens, joined, token_ids

PLAIN = Sampling()
QUIET_S = 0.02  # nobody reads faster
PROBE_ROOM = 1024  # tokens beyond the longest context, for the probes hung on it


class ModelService:
    """One model, many callers. Every call stands alone: what calls share they find in the cache."""

    def __init__(
        self,
        settings: EngineSettings,
        model: Model | None = None,
        *,
        graphs: bool = False,
    ) -> None:
        """Loads the model that the settings name, unless it is given, and what proposes its tokens."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.model = model or Model.load(
            settings.model, device=settings.device, dtype=settings.dtype, int8=settings.int8
        )
        costs = Costs()
        self._ways = ways(settings, self.model, costs)
        self.max_context = min(settings.max_context, self.model.longest)
        capacity = self.max_context + PROBE_ROOM
        if self._ways:
            costs.begin(pass_seconds(self.model))
        bytes_each = self.model.bytes_per_token + bytes_per_token(list(self._ways.values()), self.model)
        tokens = settings.memory_mb * 2**20 // bytes_each
        contexts = tokens // capacity
        if contexts < 1:
            needed = -(-capacity * bytes_each // 2**20)
            raise RequestError(
                "memory_mb", f"{settings.memory_mb} hold no context of {self.max_context} tokens, that takes {needed}"
            )
        for way in self._ways.values():
            way.foresight.reserve(contexts, tokens // contexts)
        self._bell = _Bell()
        self.engine = Engine(
            self.model,
            contexts=contexts,
            capacity=tokens // contexts,  # small pages make use of the odd rest
            max_running=settings.max_running,
            step_tokens=settings.step_tokens,
            graphs=graphs,
            costs=costs if self._ways else None,
            after_step=self._bell.ring,
        )

    @property
    def methods(self) -> tuple[Method, ...]:
        """Of speculation, the usual one first."""
        return tuple(self._ways)

    @property
    def load(self) -> Load:
        return self.engine.load

    def forget(self) -> None:
        """Nothing computed so far serves later requests."""
        self.engine.forget()
        for way in self._ways.values():
            way.foresight.forget()

    def unlearn(self) -> None:
        """Nothing that came of proposals so far is expected of later ones. While nobody is served."""
        for way in self._ways.values():
            way.forget()

    def close(self) -> None:
        self.engine.stop()

    async def warm(self, prompt: Sequence[int]) -> int:
        """Computes a prompt ahead of time; says how many of its tokens were known."""
        prompt = token_ids("prompt", prompt, self.model.vocabulary)
        self._check_length("prompt", len(prompt))
        return await self._run(prompt, warm(), room=0)

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: Check,
        *,
        full: float | None = None,
        prefix: float | None = None,
        logprobs: int | None = None,
    ) -> Judged:
        """P(correct) of the first c tokens of the draft as an answer to the prompt, for each cut c.

        With `full`, the last cut asks about a full answer, and if that passes nothing else is asked; with `prefix`,
        nothing beyond a prefix that does not pass; nor where the question would reach beyond the positions the model
        knows.
        """
        prompt = token_ids("prompt", prompt, self.model.vocabulary)
        draft = token_ids("draft", draft, self.model.vocabulary)
        token_ids("check", (*check.suffix, *check.correct, *check.incorrect), self.model.vocabulary)
        if not (check.suffix and check.correct and check.incorrect):
            raise RequestError("check", "must hold a question and both its answers")
        self._check_length("prompt", len(prompt))
        self._check_length("draft", len(prompt) + len(draft))
        if list(cuts) != sorted(set(cuts)) or (cuts and not 0 < cuts[0] <= cuts[-1] <= len(draft)):
            raise RequestError("cuts", f"must ascend within 1..{len(draft)}, the length of the draft, got {list(cuts)}")
        fitting = [cut for cut in cuts if len(prompt) + cut + len(check.suffix) <= self.model.longest]
        judged: list[Judged] = []
        tokens = [*prompt, *draft[: cuts[-1] if cuts else 0]]
        # With log-probabilities the draft is run as a tree, whose logits can be asked for, else as context.
        trunk = tokens[len(prompt) - 1 :] if logprobs is not None else ()
        program = judge(
            len(prompt),
            fitting,
            check,
            full=full if fitting and fitting[-1] == cuts[-1] else None,
            prefix=prefix,
            at_once=self.model.device.type != "cpu",
            most=PROBE_ROOM,
            trunk=trunk,
            top=logprobs or 0,
            done=judged.append,
        )
        context = tokens[: len(tokens) - len(trunk)]
        nodes = max(len(check.suffix), min(PROBE_ROOM, len(cuts) * len(check.suffix)))
        cached = await self._run(context, program, room=len(trunk) + nodes)
        (verdict,) = judged
        return replace(verdict, correct=(*verdict.correct, *[None] * (len(cuts) - len(fitting))), cached=cached)

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        sampling: Sampling = PLAIN,
        *,
        proposal: Sequence[int] = (),
        piece: int = 1,
        speculation: MethodChoice | None = None,
    ) -> AsyncGenerator[Tokens]:
        """Writes on after `output`; what has been written since the last time it was asked comes in one piece.

        How fast depends on `speculation` (None: the usual method), what never does. The token limit, penalties, stop
        strings and seed regard the output as a whole. Leaving the iteration cancels.
        """
        prompt = token_ids("prompt", prompt, self.model.vocabulary)
        output = token_ids("output", output, self.model.vocabulary)
        proposal = token_ids("proposal", proposal, self.model.vocabulary)
        token_ids("logit_bias", list(sampling.logit_bias), self.model.vocabulary)
        self._check_length("prompt", len(prompt) + len(output), spare=1)
        room = self.max_context - len(prompt) - len(output)
        if sampling.max_tokens is not None:
            room = min(room, sampling.max_tokens - len(output))
        if room < 1:
            raise RequestError("output", f"leaves nothing of max_tokens, {sampling.max_tokens}")
        way = self._way(speculation)
        text = None
        if sampling.stop:
            text = TextStream(self.model.tokenizer, sampling.stop)
            text.add(output)
            if text.stopped is not None:
                raise RequestError("output", f"holds the stop string {text.stopped!r} already")
        mailbox = _Mailbox(self._bell, patient=piece == 1)  # who asks for larger pieces waits for each of them
        program = generate(
            prompt,
            output,
            sampling,
            ends=self.model.ends,
            room=room,
            emit=mailbox.put,
            text=text,
            given=proposal,
            speculation=way.begin() if way else None,
            piece=piece,
        )
        job = Job([*prompt, *output][:-1], program, room + 1, mailbox)
        self.engine.submit(job)
        try:
            cached = None
            async for tokens in mailbox:
                if cached is None:
                    cached = job.cached
                    tokens = replace(tokens, cached=cached)
                yield tokens
        finally:
            self.engine.cancel(job)

    async def _run(self, tokens: Sequence[int], program: Program, room: int) -> int:
        """Runs it to its end; says how many of the tokens were known."""
        mailbox = _Mailbox(self._bell)
        job = self.engine.submit(Job(list(tokens), program, room, mailbox))
        try:
            async for _ in mailbox:
                pass
            return job.cached
        finally:
            self.engine.cancel(job)

    def _way(self, choice: MethodChoice | None) -> Way | None:
        if choice is None:
            return next(iter(self._ways.values()), None)
        if choice == "none":
            return None
        if choice not in self._ways:
            offered = ", ".join(("none", *self._ways))
            raise RequestError("speculation", f"must be one of {offered}, got {choice!r}")
        return self._ways[choice]

    def _check_length(self, field: str, length: int, spare: int = 0) -> None:
        if not length:
            raise RequestError(field, "must not be empty")
        if length + spare > self.max_context:
            raise RequestError(field, f"is {length} tokens long with what it follows, the limit is {self.max_context}")


class _Bell:
    """Wakes the coroutines that wait for one engine, all of them at once.

    To wake an event loop costs the engine's thread a good part of a small model's step, so it is done between steps,
    and where nothing is urgent at most every `QUIET_S`.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Mailbox] = deque()
        self._urgent = False
        self._last = 0.0

    def ask(self, mailbox: "_Mailbox", *, urgent: bool) -> None:
        self._waiting.append(mailbox)
        if urgent:
            self._urgent = True

    def hurry(self) -> None:
        self._urgent = True

    def ring(self) -> None:
        if not self._waiting or not (self._urgent or time.monotonic() - self._last >= QUIET_S):
            return
        self._urgent, self._last = False, time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[_Mailbox]] = {}
        with suppress(IndexError):
            while True:
                mailbox = self._waiting.popleft()
                by_loop.setdefault(mailbox.loop, []).append(mailbox)
        for loop, mailboxes in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_open_all, mailboxes)


def _open_all(mailboxes: "Sequence[_Mailbox]") -> None:
    for mailbox in mailboxes:
        mailbox.open()


class _Mailbox:
    """Takes pieces in the engine's thread, and hands them over to a coroutine, all that have gathered at once.

    Its first piece and its end are urgent; with `patient=False` every piece is.
    """

    def __init__(self, bell: _Bell, *, patient: bool = True) -> None:
        self.loop = asyncio.get_running_loop()
        self._bell, self._urgent, self._patient = bell, True, patient
        self._pieces: deque[Tokens] = deque()
        self._arrived = asyncio.Event()
        self._asked = self._ended = False
        self._error: BaseException | None = None

    def put(self, tokens: Tokens) -> None:
        self._pieces.append(tokens)
        self._ask()
        self._urgent = not self._patient

    def end(self, error: BaseException | None) -> None:
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

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            ended = self._ended
            pieces = []
            while self._pieces:
                pieces.append(self._pieces.popleft())
            if pieces:
                yield joined(pieces)
            if ended:
                if self._error is not None:
                    raise self._error
                return
