"""What requests do, as small programs: each asks for a tree to be run on its context and decides on the answer.

A program is a generator. It yields what it wants run next and which of the nodes run before stay in its context; it is
sent the logits it asked for. It knows nothing of batches, memory or threads, so it may be stopped anywhere and run
again elsewhere.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parse.engine.sampler import Sampler
from parse.engine.text import TextStream
from parse.prompts import Check
from parse.tree import TokenTree, probes
from parse.types import Finish, Judged, Logprob, Sampling, Tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """Nodes to run on the end of the context, and those whose logits are wanted (None: all)."""

    nodes: TokenTree | Sequence[int]
    read: Sequence[int] | None = None
    keep: int = 0  # of the nodes run before, how many from the first on now belong to the context


@dataclass(frozen=True, slots=True)
class Answer:
    logits: Tensor  # [wanted, vocabulary]
    best: list[int]  # the likeliest token at each


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

    At most `room` tokens, handed to `emit` in pieces of at least `piece`. `text` watches for stop strings. Tokens of
    `proposal` are run together and taken as long as they are what would have been chosen anyway.
    """
    sampler = Sampler(sampling, prompt, output)
    ends = () if sampling.ignore_eos else ends
    run = [(output or prompt)[-1], *proposal[: max(0, room - 1)]]
    keep = 0
    written: list[int] = []
    logprobs: list[Logprob] = []
    left, accepted = room, 0
    while True:
        answer = yield Ask(run, keep=keep)
        finish: Finish | None = None
        for place, best in enumerate(answer.best):
            token = best if sampler.plain else sampler.choose(answer.logits[place])
            if sampling.logprobs is not None:
                logprobs.append(sampler.logprob(answer.logits[place], token))
            sampler.take(token)
            written.append(token)
            left -= 1
            proposed = place + 1 < len(run) and run[place + 1] == token
            accepted += proposed
            if text is not None:
                text.add((token,))
            if token in ends or (text is not None and text.stopped is not None):
                finish = "stop"
            elif not left:
                finish = "length"
            if finish or not proposed:
                break
        if finish or len(written) >= piece:
            emit(Tokens(tuple(written), tuple(logprobs), finish, accepted))
            written, logprobs, accepted = [], [], 0
        if finish:
            return
        keep, run = place + 1, [token]


def judge(
    prompt: int,
    cuts: Sequence[int],
    check: Check,
    *,
    most: int,
    enough: Callable[[Sequence[float]], bool],
    done: Callable[[Judged], None],
) -> Program:
    """P(correct) at each cut, in the order given; the context is a prompt of that length and the draft.

    Probes are run in groups of at most `most` nodes; `enough` is asked of the answers so far whether more are needed.
    """
    correct: list[float] = []
    group = max(1, most // len(check.suffix))
    words = torch.tensor([check.correct, check.incorrect])
    while len(correct) < len(cuts) and not enough(correct):
        at = [prompt + cut for cut in cuts[len(correct) : len(correct) + group]]
        last = len(check.suffix) - 1
        tree = probes(at, check.suffix)
        answer = yield Ask(tree, read=range(last, len(tree), last + 1))
        correct += answer.logits[:, words.to(answer.logits.device)].softmax(-1)[:, 0].tolist()
    done(Judged(tuple(correct)))
