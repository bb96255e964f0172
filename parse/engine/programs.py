"""What requests do, as small programs: each asks for a tree to be run on its context and decides on the answer.

A program is a generator. It yields what it wants run next and which of the nodes run before stay in its context; it is
sent the logits it asked for. It knows nothing of batches, memory or threads, so it may be stopped anywhere and run
again elsewhere.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parse.engine.sampler import Draw, Sampler, logprobs
from parse.engine.text import TextStream
from parse.prompts import Check
from parse.tree import TokenTree, probes
from parse.types import Finish, Judged, Logprob, Sampling, Tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """Nodes to run on the end of the context, and those whose logits are wanted (None: all)."""

    nodes: TokenTree | Sequence[int]
    read: Sequence[int] | None = None
    keep: Sequence[int] = ()  # of the nodes run before, the path from a root on that now belongs to the context
    draws: Sequence[Draw] = ()  # how a token is chosen at each of those read; (): the likeliest


@dataclass(frozen=True, slots=True)
class Answer:
    logits: Tensor  # [wanted, vocabulary], until the program asks again
    chosen: Sequence[int]  # the token at each


Program = Generator[Ask, Answer, None]


def warm() -> Program:
    """Only its context is wanted, and that is computed before anything is asked."""
    yield Ask((), read=())


def generate(
    prompt: Sequence[int],
    output: Sequence[int],
    sampling: Sampling,
    *,
    ends: Collection[int],
    room: int,
    emit: Callable[[Tokens], None],
    text: TextStream | None = None,
    proposal: Sequence[int] = (),
    piece: int = 1,
) -> Program:
    """Writes on after `prompt` and `output`, of which all but the last token are the context.

    At most `room` tokens, the end token not among them, handed to `emit` in pieces of at least `piece`. `text` watches
    for stop strings. Tokens of `proposal` are run together and taken as long as they are what would have been chosen
    anyway.
    """
    sampler = Sampler(sampling, prompt, output)
    ends = () if sampling.ignore_eos else ends
    run = [(output or prompt)[-1], *proposal[: max(0, room - 1)]]
    keep: Sequence[int] = ()
    written: list[int] = []
    likely: list[Logprob] = []
    left, accepted = room, 0
    while True:
        answer = yield Ask(run, keep=keep, draws=sampler.draws(run[1:]))
        finish: Finish | None = None
        for place, token in enumerate(answer.chosen):
            if token in ends:
                finish = "stop"
                break
            if sampling.logprobs is not None:
                likely += logprobs(answer.logits[place : place + 1], [token], sampling.logprobs)
            sampler.take(token)
            written.append(token)
            left -= 1
            proposed = place + 1 < len(run) and run[place + 1] == token
            accepted += proposed
            if text is not None:
                text.add((token,))
                finish = "stop" if text.stopped is not None else None
            if finish is None and not left:
                finish = "length"
            if finish or not proposed:
                break
        if finish or len(written) >= piece:
            emit(Tokens(tuple(written), tuple(likely), finish, accepted))
            written, likely, accepted = [], [], 0
        if finish:
            yield Ask((), read=(), keep=range(place + 1))  # the next turn will begin with it
            return
        keep, run = range(place + 1), [token]


def judge(
    prompt: int,
    cuts: Sequence[int],
    check: Check,
    *,
    full: float | None,
    prefix: float | None,
    at_once: bool,
    most: int,
    trunk: Sequence[int],
    top: int,
    done: Callable[[Judged], None],
) -> Program:
    """P(correct) at each cut; the context is a prompt of that length and the draft, up to the last cut.

    If the last cut passes at `full` (None: it is no full answer), or a prefix fails at `prefix` (None: never mind),
    the rest need not be known. `at_once` asks them all the same, as far as `most` nodes go in one pass: what another
    pass costs beyond its tokens decides. Where `trunk`, the prompt's last token and the draft, is given, the context
    lacks it, and the draft's log-probabilities are wanted as well, with those of the `top` likeliest beside them.
    """
    likely: list[Logprob] = []
    keep: Sequence[int] = ()
    if trunk:
        answer = yield Ask(trunk)
        keep = range(len(trunk))
        likely = logprobs(answer.logits[:-1], trunk[1:], top)
    width = len(check.suffix)
    group = size = max(1, most // width)
    order = list(range(len(cuts)))
    answered: dict[int, float] = {}
    if full is not None:  # a full answer that passes settles everything
        order.insert(0, order.pop())
        size = group if at_once else 1
    while order:
        asked, order, size = sorted(order[:size]), order[size:], group
        tree = probes([prompt + cuts[place] for place in asked], check.suffix)
        answer = yield Ask(tree, read=range(width - 1, len(tree), width), keep=keep)
        keep = ()
        words = [answer.logits[:, list(ids)].logsumexp(-1) for ids in (check.correct, check.incorrect)]
        answered.update(zip(asked, torch.stack(words).softmax(0)[0].tolist(), strict=True))
        if full is not None and answered[len(cuts) - 1] >= full:
            break
        prefixes = [answered[place] for place in asked if full is None or place < len(cuts) - 1]
        if prefix is not None and any(p < prefix for p in prefixes):
            break
    done(Judged(tuple(answered.get(place) for place in range(len(cuts))), tuple(likely)))
