"""The engine: one thread that packs what all requests ask for into one forward pass after another."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from parse.engines.native.attention import MakeAttention
from parse.engines.native.cuda_graphs import graphs_for
from parse.engines.native.fair_lock import CPU_TURNS
from parse.engines.native.kv_cache import Memory
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import PAGE, PagedAttention, attention_on
from parse.engines.native.prefix_cache import Cache, Context
from parse.engines.native.programs import Answer, Ask, Program
from parse.engines.native.sampler import Draw, choose
from parse.engines.native.scheduled_chunk import Span
from parse.speculative.cost_model import Costs
from parse.speculative.policy import Wished
from parse.speculative.proposal import Proposal
from parse.tree import MASK, TokenTree
from parse.types import Cancelled, EngineStopped, NumericalError, RequestError

logger = logging.getLogger(__name__)

NOTHING = Answer(torch.empty(0), [])


class Listener(Protocol):
    """Told of a job's end, from the engine's thread."""

    def end(self, error: BaseException | None) -> None: ...


@dataclass(eq=False)
class Job:
    """A request on its way: its program, and how far the row of its context and asked nodes is computed."""

    tokens: list[int]  # of the context it starts with, or goes on with when it was set back
    program: Program
    room: int  # tokens it may add
    listener: Listener
    context: Context | None = None
    begun: bool = False
    cached: int = 0  # tokens that were found computed when it began
    ask: Ask = field(default_factory=lambda: Ask((), ()))
    progress: int = 0
    answers: list[Tensor] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # a token at each of what the answers hold
    cancelled: bool = False

    @property
    def missing(self) -> int:
        assert self.context is not None
        return len(self.context.tokens) + len(self.ask.nodes) - self.progress


@dataclass(frozen=True)
class Load:
    """What the engine does at this moment, and has done since its start."""

    running: int
    waiting: int
    steps: int
    step_calls: int  # requests in them, added up: over the steps, the mean batch
    busy_s: float  # spent in them
    tokens: int  # computed
    prefix_tokens: int  # looked for in the cache
    prefix_hits: int  # and found there
    evictions: int
    pages_used: int
    pages_idle: int  # of them, those that are kept only because somebody may come with the same beginning
    pages: int
    replayed: int = 0  # of the steps


class Engine:
    """Serves one model. `submit` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        *,
        contexts: int,
        capacity: int,
        max_running: int,
        step_tokens: int,
        page_size: int | None = None,
        graphs: bool = False,
        costs: Costs | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Memory for `contexts` rows of `capacity` tokens; at most `step_tokens` are computed in one pass.

        On a CPU a row lies in one piece. On other devices, or given a `page_size`, rows lie in small pages and take no
        more of them than they need, so that there may be more rows.

        With `graphs`, steps of single tokens are recorded and replayed where the device can do that. `costs` are told
        what passes take.
        """
        self.model, self.max_running, self.step_tokens, self.costs = model, max_running, step_tokens, costs
        self._after_step = after_step  # called whenever listeners may have been told something
        self._make_attention: MakeAttention
        if page_size is None:
            page_size = capacity if model.device.type == "cpu" else PAGE
            self._make_attention = attention_on(model.device)
        else:
            self._make_attention = PagedAttention
        pages = contexts * capacity // page_size
        self._turns = CPU_TURNS if model.device.type == "cpu" else nullcontext()
        self.longest = min(capacity, pages * page_size)
        self._memory = Memory(pages + graphs, page_size)  # one that is nobody's
        self._graphs = graphs_for(model, self._memory, pages, self.longest) if graphs else None
        self._cache = Cache(pages, page_size, self._memory.copy)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._steps = self._step_calls = self._tokens = self._replayed = 0
        self._busy_s = 0.0
        self._written = self._noted = 0  # tokens that were kept, and how many of them the costs know
        self._wishes: list[tuple[Job, Wished]] = []
        self._stopped = self._forgetful = False
        self._thread = threading.Thread(target=self._work, name=f"engine {model.name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        if len(job.tokens) + job.room > self.longest:
            needed = f"takes memory for {len(job.tokens) + job.room} tokens with what may follow it"
            raise RequestError("prompt", f"{needed}, the limit is {self.longest}")
        if self._stopped:
            raise EngineStopped("the engine was shut down")
        self._inbox.put(job)
        if self._stopped:  # it may have come too late to be seen
            self._refuse_rest()
        return job

    def cancel(self, job: Job) -> None:
        """Its work ends within a step."""
        job.cancelled = True

    def forget(self) -> None:
        """Nothing computed so far serves later requests."""
        self._forgetful = True
        self._inbox.put(None)

    def stop(self) -> None:
        """Ends all requests and the thread."""
        self._stopped = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return not self._stopped and self._thread.is_alive()

    @property
    def load(self) -> Load:
        cache = self._cache
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + self._inbox.qsize(),
            steps=self._steps,
            step_calls=self._step_calls,
            busy_s=self._busy_s,
            tokens=self._tokens,
            prefix_tokens=cache.lookups,
            prefix_hits=cache.hits,
            evictions=cache.evictions,
            pages_used=cache.pages - cache.free_pages,
            pages_idle=cache.idle_pages,
            pages=cache.pages,
            replayed=self._replayed,
        )

    def _work(self) -> None:
        error = EngineStopped("the engine was shut down")
        try:
            with torch.inference_mode():
                while not self._stopped:
                    self._take_in()
                    self._admit()
                    began = time.perf_counter()
                    self._foresee()
                    if plan := self._granted(self._plan()):
                        self._run(plan)
                        self._step_calls += len(plan)
                        self._busy_s += time.perf_counter() - began
                    self._after_step()
        except BaseException as fault:
            logger.exception("the engine's thread died")
            self._stopped = True
            error = EngineStopped(f"the engine broke down: {fault!r}")
        for job in [*self._running, *self._waiting]:
            self._finish(job, error)
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        with suppress(queue.Empty):
            while True:
                if job := self._inbox.get_nowait():
                    self._finish(job, EngineStopped("the engine was shut down"))
        self._after_step()

    def _take_in(self) -> None:
        """New requests; waits for one if there is nothing else to do."""
        while not self._inbox.empty() or not (self._running or self._waiting):
            arrived = self._inbox.get()
            if arrived is None:  # only to be woken
                break
            self._waiting.append(arrived)
        if self._forgetful:
            self._forgetful = False
            self._cache.forget()
        for job in [job for job in (*self._waiting, *self._running) if job.cancelled]:
            self._finish(job, Cancelled("the request was cancelled"))

    def _admit(self) -> None:
        """First come, first served, but who could share what is being computed now waits for that."""
        for job in list(self._waiting):
            if len(self._running) >= self.max_running:
                break
            if self._cache.in_the_making(job.tokens):
                continue
            context = self._cache.open(job.tokens, len(job.ask.nodes))
            if context is None:
                break
            self._waiting.remove(job)
            self._running.append(job)
            job.context, job.progress = context, context.computed
            if not job.begun:
                job.begun, job.cached = True, context.computed
                self._advance(job, None)
            elif not job.missing:  # while it was set back, others have computed all it wanted
                self._advance(job, NOTHING)

    def _foresee(self) -> None:
        """What programs wish to have foreseen, for all of them at once."""
        while self._wishes:
            wishes = [(job, wished) for job, wished in self._wishes if job.context is not None]
            self._wishes = []
            for way in {id(wished.way): wished.way for _, wished in wishes}.values():
                asking = [(job, wished.wish) for job, wished in wishes if wished.way is way]
                proposals = way.propose([wish for _, wish in asking])
                for (job, _), proposal in zip(asking, proposals, strict=True):
                    self._advance(job, proposal)

    def _plan(self) -> list[tuple[Job, Span]]:
        """Requests that need a single token first, in the order of their pages; the rest shares what is left."""
        singles = [job for job in self._running if job.missing == 1]
        if len(singles) > 1:
            singles.sort(key=_page)
        budget = max(1, self.step_tokens - len(singles))
        plan = [self._span(job, 1) for job in singles]
        for job in self._running:
            if job.missing > 1:
                if not budget:
                    break
                count = min(job.missing, budget)
                budget -= count
                plan.append(self._span(job, count))
        plan.sort(key=lambda part: not part[1].causal)  # texts first, trees last
        return plan

    def _granted(self, plan: list[tuple[Job, Span]]) -> list[tuple[Job, Span]]:
        """What of the plan there is memory for; where it falls short, the youngest give theirs up."""
        for job, span in plan:
            if span.last > self.longest:
                self._finish(job, RequestError("prompt", f"with what follows it outgrew {self.longest} tokens"))
            while job.context is not None and not self._cache.reserve(job.context, span.last):
                self._set_back(self._running[-1])
        return [(job, span) for job, span in plan if job.context is span.context]

    def _set_back(self, job: Job) -> None:
        """It waits again, before all others, with what it has committed and what it asked last."""
        assert job.context is not None
        job.tokens = list(job.context.tokens)
        self._cache.close(job.context)
        job.context, job.progress, job.answers, job.chosen = None, 0, [], []
        self._running.remove(job)
        self._waiting.appendleft(job)

    @staticmethod
    def _span(job: Job, count: int) -> tuple[Job, Span]:
        assert job.context is not None
        return job, Span(job.context, job.ask.nodes, job.progress, job.progress + count)

    def _run(self, plan: list[tuple[Job, Span]]) -> None:
        writing = all(job.ask.read is None and span.first >= len(span.context.tokens) for job, span in plan)
        began = time.perf_counter()
        try:
            chosen, logits, reads = self._forward(plan)
        except Exception as error:
            if len(plan) == 1:
                logger.exception("a request failed in the model")
                self._finish(plan[0][0], error)
                return
            for part in plan:  # whoever is at fault fails alone
                self._run([part])
            return
        for (job, span), (first, last) in zip(plan, reads, strict=True):
            assert job.context is not None
            job.progress = span.last
            job.context.computed = min(span.last, len(job.context.tokens))
            if last > first:
                answer = logits[first:last]
                job.answers.append(answer.clone() if job.missing else answer)  # the next step may write there
                job.chosen += chosen[first:last]
            if not job.missing:
                answers = job.answers or [logits[:0]]
                whole = answers[0] if len(answers) == 1 else torch.cat(answers)
                self._advance(job, Answer(whole, job.chosen, partial(self._features, job.context)))
        if self.costs is not None and writing:
            entries, tokens = sum(len(span) for _, span in plan), self._written - self._noted
            self.costs.passed(len(plan), entries, tokens, time.perf_counter() - began)
        self._noted = self._written

    def _forward(self, plan: Sequence[tuple[Job, Span]]) -> tuple[list[int], Tensor, list[tuple[int, int]]]:
        """The tokens chosen and the logits at the wanted places of all spans, and where in them each span's lie."""
        read: list[int] = []
        reads: list[tuple[int, int]] = []
        draws: list[Draw | None] = []
        size = 0
        for job, span in plan:
            places = _wanted(job, span)
            reads.append((len(read), len(read) + len(places)))
            read += [size + place for place in places]
            size += len(span)
            known = len(job.chosen)
            draws += job.ask.draws[known : known + len(places)] or [None] * len(places)
        logits = self._logits([span for _, span in plan], None if len(read) == size else read)
        self._steps += 1
        self._tokens += size
        chosen = choose(logits, draws)
        if -1 in chosen:
            tokens = [token for _, span in plan for token in span.tokens()]
            if any(token == -1 and tokens[entry] != MASK for token, entry in zip(chosen, read, strict=True)):
                raise NumericalError("the model returned logits that are not finite")
        return chosen, logits, reads

    def _logits(self, spans: Sequence[Span], read: Sequence[int] | None) -> Tensor:
        """[entries, vocabulary], at the entries in `read`, or all."""
        alike = read is None and all(len(span) == 1 and span.causal for span in spans)
        if alike and self._graphs and not self.model.taps and (known := self._graphs.replay(spans)) is not None:
            self._replayed += 1
            return known
        tokens = [token for span in spans for token in span.tokens()]
        positions = [position for span in spans for position in span.positions()]
        attention = self._make_attention(self._memory, spans)
        with self._turns:
            logits, features = self.model.forward(tokens, positions, attention, read)
        if features is not None:
            at = [slot for span in spans for slot in self._slots(span.context, range(span.first, span.last))]
            self._memory.note(at, features)
        elif alike and self._graphs:
            self._graphs.record(spans, logits)
        return logits

    def _advance(self, job: Job, said: Answer | Proposal | None) -> None:
        """Lets the program decide on what it asked for (None: start it), and takes what it asks next."""
        try:
            asked = job.program.send(said)
        except StopIteration:
            self._finish(job, None)
            return
        except Exception as error:
            logger.exception("a request failed on its answer")
            self._finish(job, error)
            return
        if isinstance(asked, Wished):
            self._wishes.append((job, asked))
            return
        context, nodes, job.ask = job.context, job.ask.nodes, asked
        assert context is not None
        if asked.keep and len(nodes):  # a first ask has none before it
            self._keep(context, nodes, asked.keep)
        job.progress = context.computed
        job.answers, job.chosen = [], []
        if not job.missing:
            self._advance(job, NOTHING)

    def _keep(self, context: Context, nodes: TokenTree | Sequence[int], path: Sequence[int]) -> None:
        """Keys and values of the path close up behind the context: what stood between them is given up."""
        known = len(context.tokens)
        moves = [(known + node, known + place) for place, node in enumerate(path) if node != place]
        if moves:
            sources, targets = zip(*moves, strict=True)
            self._memory.move(self._slots(context, sources), self._slots(context, targets))
        tokens = nodes.tokens if isinstance(nodes, TokenTree) else nodes
        self._cache.commit(context, [int(tokens[node]) for node in path])
        self._written += len(path)

    def _slots(self, context: Context, entries: Sequence[int]) -> list[int]:
        size = self._cache.page_size
        return [context.pages[entry // size] * size + entry % size for entry in entries]

    def _features(self, context: Context, entries: Sequence[int]) -> Tensor:
        """[entries, width], of the row: the context and the nodes behind it."""
        features = self._memory.features
        assert features is not None, "asked of a model without taps"
        return features[torch.tensor(self._slots(context, entries), device=features.device)]

    def _finish(self, job: Job, error: BaseException | None) -> None:
        if job in self._running:
            self._running.remove(job)
        elif job in self._waiting:
            self._waiting.remove(job)
        if job.context is not None:
            self._cache.close(job.context)
            job.context = None
        job.program.close()
        job.listener.end(error)


def _page(job: Job) -> int:
    assert job.context is not None
    return job.context.pages[0] if job.context.pages else 0  # none yet: nothing is computed


def _wanted(job: Job, span: Span) -> list[int]:
    """Which entries of the span the program wants the logits of."""
    known = len(span.context.tokens)
    read = range(len(job.ask.nodes)) if job.ask.read is None else job.ask.read
    return [known + node - span.first for node in read if span.first <= known + node < span.last]
