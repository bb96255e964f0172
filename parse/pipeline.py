"""PARSE: a draft is written, every prefix of it is judged, the longest valid one kept, and the target writes the rest.

Over two small protocols, a drafter and a verifier, so that the same lines run in one process or across machines. Calls
do not depend on one another; whatever happens to the drafter costs only speed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from parse.acceptance import accepted_prefix_length
from parse.config import VerificationSettings
from parse.controller import DraftingController, DraftingOutcome
from parse.detokenizer import IncrementalDetokenizer
from parse.prefixes import prefix_lengths_at, prefix_lengths_every
from parse.prompts import VerificationSuffix
from parse.protocol import (
    NO_STREAMING,
    Drafter,
    Event,
    Fallback,
    Finished,
    GenerationRequest,
    Mode,
    Origin,
    Stage,
    StageName,
    TextDelta,
    Usage,
    Verification,
    Verifier,
)
from parse.types import (
    DraftUnavailable,
    FinishReason,
    Logprob,
    MethodName,
    RequestError,
    SpeculationStats,
    VerificationError,
    VerifyResult,
    sum_stats,
    validate_token_ids,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Answers questions with a verifier and, where there is one, a drafter."""

    verifier: Verifier
    tokenizer: PreTrainedTokenizerBase  # the target's
    check: VerificationSuffix
    settings: VerificationSettings
    drafter: Drafter | None = None
    longest: int | None = None
    """Tokens of prompt and answer together that the verifier takes."""
    methods: tuple[MethodName, ...] = ()
    """By which the verifier can write several tokens in a pass; the first, where a question names none."""
    warms: bool = True
    """Does the target read the prompt while the drafter writes? Else with the draft, in one pass: that saves a pass
    where both share a processor and nothing is gained by being early."""
    control: DraftingController = field(default_factory=DraftingController)

    async def answer(self, question: GenerationRequest) -> AsyncGenerator[Event]:
        """The answer, piece by piece, with what was made of each draft, and at last what it took."""
        if question.prediction is not None:
            prediction = validate_token_ids("prediction", question.prediction, len(self.tokenizer))
            question = replace(question, prediction=prediction)
        mode: Mode = question.mode
        fallback: Fallback | None = None
        if mode == "auto" and question.prediction is not None:
            mode = self.settings.auto_mode  # it costs nothing to have
        elif mode == "auto":
            decision = self.control.decide()
            if decision.draft:
                mode = self.settings.auto_mode
            else:
                mode, fallback = "off", Fallback("does_not_pay", decision.reason)
        if mode != "off" and self.drafter is None and question.prediction is None:
            mode, fallback = "off", Fallback("none_there", "there is no drafter")
        answer = _Answer(self, question, mode, fallback)
        working = asyncio.create_task(answer.work())
        try:
            while (event := await answer.events.get()) is not None:
                yield event
            await working  # raises what went wrong
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        usage = answer.usage()
        if usage.draft_tokens and question.prediction is None:
            self.control.record(
                DraftingOutcome(
                    usage.draft_tokens,
                    usage.accepted_tokens,
                    usage.target_tokens,
                    usage.total_s,
                    usage.seconds("write"),
                )
            )
        yield Finished(answer.finish or "length", usage)


class _Draft:
    """Grows while it is written."""

    def __init__(self, before: Sequence[int]) -> None:
        self.before = tuple(before)  # the answer when it was begun
        self.ids: list[int] = []
        self.text: str | None = None  # of the whole answer, where it came to a stop string: not all its tokens' text
        self.ended = False  # by itself, or at a stop string
        self.done = False
        self._grown = asyncio.Event()

    def grow(self, ids: Sequence[int], *, done: bool = False) -> None:
        self.ids += ids
        self.done |= done
        self._grown.set()

    async def reaches(self, length: int) -> None:
        while not self.done and len(self.ids) < length:
            self._grown.clear()
            await self._grown.wait()


class _Answer:
    """One answer on its way, and the ways to it."""

    def __init__(self, pipeline: Pipeline, question: GenerationRequest, mode: Mode, fallback: Fallback | None) -> None:
        self.question, self.mode, self.fallback = question, mode, fallback
        self.events: asyncio.Queue[TextDelta | Verification | None] = asyncio.Queue()
        self.settings, self.verifier, self.drafter = pipeline.settings, pipeline.verifier, pipeline.drafter
        self.warms = pipeline.warms
        limits = [
            question.sampling_params.max_tokens,
            pipeline.longest and pipeline.longest - len(question.prompt_token_ids),
        ]
        self.most = min((limit for limit in limits if limit is not None), default=None)  # tokens of the answer
        self.special = frozenset(pipeline.tokenizer.all_special_ids)
        self.tokenizer, self.check, self.control = pipeline.tokenizer, pipeline.check, pipeline.control
        self.thresholds = question.thresholds or pipeline.settings.thresholds()
        self.sampling = question.sampling_params
        self.text = IncrementalDetokenizer(self.tokenizer, self.sampling.stop)
        self._shown = 0  # characters
        self.output: list[int] = []
        self.finish: FinishReason | None = None
        self._last_origin: Origin = "target"
        self._drafted = self._accepted = self._written = self._rounds = 0
        self._boundary: int | None = None
        self._cached: int | None = None
        self._speculated: SpeculationStats | None = None
        self._stages: list[Stage] = []
        self._started = time.perf_counter()
        self._first: float | None = None

    def usage(self) -> Usage:
        now = time.perf_counter()
        return Usage(
            self.mode,
            self._drafted,
            self._accepted,
            self._written,
            self._rounds,
            self._boundary,
            self._cached or 0,
            tuple(self._stages),
            (self._first or now) - self._started,
            now - self._started,
            self.fallback,
            self._speculated,
        )

    async def work(self) -> None:
        """Puts what happens into `events`, and None behind the last of it."""
        ways = {
            "off": self._write,
            "full": self._full,
            "rounds": self._in_rounds,
            "progressive": self._progressive,
            "exact": self._exact,
        }
        try:
            await ways[self.mode]()
            if rest := self.text.finish():
                self.events.put_nowait(TextDelta(rest, (), self._last_origin))
        finally:
            self.events.put_nowait(None)

    @contextmanager
    def _stage(self, name: StageName) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages.append(Stage(name, start - self._started, time.perf_counter() - self._started))

    def _found(self, cached: int) -> None:
        """The first to read the prompt tells how much of it was known."""
        if self._cached is None:
            self._cached = min(cached, len(self.question.prompt_token_ids))

    # The ways to an answer.

    async def _full(self) -> None:
        """The whole draft, judged at once."""
        await self._round()
        await self._rest()

    async def _in_rounds(self) -> None:
        """After a correction the drafter goes on, as long as that is expected to gain."""
        while self._rounds < self.settings.max_rounds:
            before, drafted = len(self.output), self._drafted
            await self._round()
            # What the draft still had to say is the best guess at how much is missing.
            missing = before + self._drafted - drafted - len(self.output) - self.settings.correction_tokens
            if self.finish is not None or not self.control.another_round_pays(missing):
                break
            await self._write(upto=len(self.output) + self.settings.correction_tokens)
            if self.finish is not None:
                break
        await self._rest()

    async def _exact(self) -> None:
        """The draft as a proposal, taken token by token: the target's own output, whatever was drafted."""
        draft = await self._whole_draft()
        self._drafted += len(draft.ids)
        self._rounds += bool(draft.ids)
        await self._write(proposal=draft.ids)
        self._boundary = self._accepted

    async def _progressive(self) -> None:
        """Windows of the draft are judged while the next one is written; the first that fails ends the draft."""
        warming = asyncio.create_task(self._warm())
        draft = _Draft(self.output)
        drafting = asyncio.create_task(self._write_draft(draft, piece=self.settings.stride))
        asked, window = 0, self.settings.window
        try:
            while self.finish is None:
                # One token more, to know whether the draft ends here. What is judged together depends on the draft
                # alone, never on who was faster, so the same request gets the same answer.
                await draft.reaches(asked + window + 1)
                await warming
                last = len(draft.ids) <= asked + window
                ids, ended = tuple(draft.ids[: asked + window + 1]), last and draft.ended
                cuts = [cut for cut in self._cuts(ids, ended=ended) if cut > asked]
                if cuts:
                    known = ids if last else ids[: cuts[-1]]
                    await self._judge(known, cuts, start=asked, ended=ended, text=draft.text)
                    if len(self.output) < cuts[-1]:
                        break
                    asked = cuts[-1]
                if last:
                    break
                window *= 2  # soon the first words, then few passes
        finally:
            drafting.cancel()
            warming.cancel()
            await asyncio.gather(drafting, warming, return_exceptions=True)
            self._drafted += len(draft.ids)
            self._rounds += bool(draft.ids)
            self._boundary = len(self.output)
        await self._rest()

    # Their parts.

    async def _rest(self) -> None:
        if self.finish is None:
            await self._write()

    async def _round(self) -> None:
        """A draft, judged, and what stands of it."""
        draft = await self._whole_draft()
        if not draft.ids:
            return
        before, ids = len(self.output), tuple(draft.ids)
        self._drafted += len(ids)
        self._rounds += 1
        await self._judge(ids, self._cuts(ids, ended=draft.ended), start=0, ended=draft.ended, text=draft.text)
        if self._boundary is None:
            self._boundary = len(self.output) - before

    async def _write(self, proposal: Sequence[int] = (), upto: int | None = None) -> None:
        """The target writes, to the end or up to that many tokens of output."""
        sampling = self.sampling
        if upto is not None and upto < (self.most or upto + 1):
            sampling = replace(sampling, max_tokens=upto)
        else:
            upto = None
        writing = self.verifier.generate(
            self.question.prompt_token_ids,
            self.output,
            sampling,
            proposal=proposal,
            piece=self.question.stream_interval,
            speculation=self.question.speculative_method,
        )
        with self._stage("write"):
            async with aclosing(writing) as pieces:
                async for tokens in pieces:
                    self._found(tokens.num_cached_tokens)
                    self._speculated = sum_stats((self._speculated, tokens.speculation))
                    taken = tokens.num_accepted
                    self._accepted += taken
                    self._written += len(tokens.token_ids) - taken
                    self._say(tokens.token_ids[:taken], "draft", tokens.logprobs[:taken])
                    self._say(tokens.token_ids[taken:], "target", tokens.logprobs[taken:])
                    self.finish = (
                        None if tokens.finish_reason == "length" and upto is not None else tokens.finish_reason
                    )

    async def _warm(self) -> None:
        if self.warms and not self.output:
            with self._stage("warm"):
                self._found(await self.verifier.warm(self.question.prompt_token_ids))

    async def _whole_draft(self) -> _Draft:
        """Meanwhile the target reads the prompt."""
        draft = _Draft(self.output)
        warming = asyncio.create_task(self._warm())
        try:
            await self._write_draft(draft, piece=NO_STREAMING)
            await warming
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
        return draft

    async def _write_draft(self, draft: _Draft, *, piece: int) -> None:
        """Whatever goes wrong with the drafter, the target can do without."""
        with self._stage("draft"):
            await self._take_draft(draft, piece=piece)
        draft.grow((), done=True)

    async def _take_draft(self, draft: _Draft, *, piece: int) -> None:
        try:
            if self.question.prediction is not None:
                draft.ended = not self.output
                self._cut_short(draft, self.question.prediction[len(self.output) :])
                return
            assert self.drafter is not None
            drafting = self.drafter.draft(self.question, self.output, stream_interval=piece)
            async with asyncio.timeout(self.settings.draft_timeout_s), aclosing(drafting) as pieces:
                async for tokens in pieces:
                    draft.ended = tokens.finish_reason == "stop"
                    if self._cut_short(draft, tokens.token_ids):
                        break
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self.fallback = Fallback("lost", "the drafter was cancelled")  # by somebody else
        except DraftUnavailable as error:
            self.fallback = Fallback(error.cause, f"no draft: {error}")
        except RequestError as error:  # too long for the drafter
            self.fallback = Fallback("refused", f"no draft: {error}")
        except TimeoutError:
            self.fallback = Fallback("slow", f"the drafter took longer than {self.settings.draft_timeout_s:g} s")
        except Exception as error:
            logger.warning("the drafter failed", exc_info=True)
            self.fallback = Fallback("failed", f"the drafter failed: {error}")

    def _cut_short(self, draft: _Draft, ids: Sequence[int]) -> bool:
        """Lets the draft grow, up to its end, a stop string and the token limit; says whether it came to one."""
        ids, cut = validate_token_ids("draft", ids, len(self.tokenizer)), False
        if (end := next((place for place, token in enumerate(ids) if token in self.special), None)) is not None:
            ids, cut, draft.ended = ids[:end], True, True
        if self.sampling.stop:
            sofar = [*draft.before, *draft.ids]
            text = IncrementalDetokenizer(self.tokenizer, self.sampling.stop)
            said = text.add([*sofar, *ids]) + text.finish()
            if text.matched_stop is not None:
                draft.ended = cut = True
                draft.text = said
                while ids and self._length([*sofar, *ids]) > len(said):
                    ids = ids[:-1]
        if self.most is not None:
            room = max(0, self.most - len(draft.before) - len(draft.ids))
            if len(ids) > room:
                ids, cut, draft.ended, draft.text = ids[:room], True, False, None
        draft.grow(ids)
        return cut

    def _length(self, ids: Sequence[int]) -> int:
        return len(self._decoded(ids))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _cuts(self, ids: Sequence[int], *, ended: bool) -> list[int]:
        pieces = [] if self.settings.prefix_boundaries == ("tokens",) else [self._decoded([token]) for token in ids]
        if not pieces:
            return prefix_lengths_every(self.settings.stride, len(ids), ended=ended)
        return prefix_lengths_at(self.settings.prefix_boundaries, pieces, stride=self.settings.stride, ended=ended)

    async def _judge(
        self, ids: tuple[int, ...], cuts: Sequence[int], *, start: int, ended: bool, text: str | None
    ) -> None:
        """What stands of the draft beyond its first `start` tokens, which are in the output already."""
        before = self.output[: len(self.output) - start]
        with self._stage("judge"):
            judged = await self.verifier.judge(
                (*self.question.prompt_token_ids, *before),
                ids,
                cuts,
                self.check,
                full=self.thresholds.full if ended else None,
                prefix=self.thresholds.prefix if self.settings.rule == "first_failure" else None,
                logprobs=self.sampling.logprobs,
            )
        self._found(judged.num_cached_tokens)
        _check_verdict(judged, cuts, logprobs=self.sampling.logprobs is not None)
        kept = max(
            start, accepted_prefix_length(cuts, judged.p_correct, self.thresholds, ended=ended, rule=self.settings.rule)
        )
        self._accepted += kept - start
        if ended and kept == len(ids):
            self.finish = "stop"
        elif self.most is not None and len(before) + kept >= self.most:
            self.finish = "length"
        whole = self.finish == "stop"
        self._say(ids[start:kept], "draft", judged.logprobs[start:kept], ends=whole, whole=text)
        rejected = "" if whole else self._decoded(ids[kept:])
        self.events.put_nowait(
            Verification(
                len(before) + start,
                ids[start:],
                tuple(cut - start for cut in cuts),
                judged.p_correct,
                kept - start,
                rejected,
            )
        )

    def _say(
        self,
        ids: Sequence[int],
        origin: Origin,
        logprobs: Sequence[Logprob],
        *,
        ends: bool = False,
        whole: str | None = None,
    ) -> None:
        """Where the answer ends, nothing is held back any more; `whole`: its text, if not that of all its tokens."""
        if not ids and not ends:
            return
        self._first = self._first or time.perf_counter()
        self._last_origin = origin
        self.output += ids
        text = self.text.add(ids)
        if ends:
            text += self.text.finish()
            text = text if whole is None else whole[self._shown :]
        self._shown += len(text)
        self.events.put_nowait(TextDelta(text, tuple(ids), origin, tuple(logprobs)))


def _check_verdict(judged: VerifyResult, cuts: Sequence[int], *, logprobs: bool) -> None:
    """A draft must not be accepted by a slip."""
    if len(judged.p_correct) != len(cuts):
        raise VerificationError(
            f"the verifier judged {len(judged.p_correct)} prefixes where it was asked about {len(cuts)}"
        )
    if not all(chance is None or 0.0 <= chance <= 1.0 for chance in judged.p_correct):
        raise VerificationError(f"the verifier gave what is no probability: {judged.p_correct}")
    if logprobs and cuts and len(judged.logprobs) < cuts[-1]:
        raise VerificationError(f"the verifier gave {len(judged.logprobs)} log-probabilities for {cuts[-1]} tokens")
