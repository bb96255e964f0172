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
from parse.speculate.proposal import Proposal, Proposer
from parse.tree import TokenTree, child, probes, proposals
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
    features: Callable[[Sequence[int]], Tensor] | None = None  # of entries: the context's tokens, and then the nodes


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
    proposer: Proposer | None = None,
    featured: bool = False,
    piece: int = 1,
) -> Program:
    """Writes on after `prompt` and `output`, of which all but the last token are the context.

    At most `room` tokens, the end token not among them, handed to `emit` in pieces of at least `piece`. `text` watches
    for stop strings. Tokens of `proposal`, and then whatever the proposer has to offer, are run together and taken as
    long as they are what would have been chosen anyway. A proposer that is `featured` foresees the model by its
    features, and so begins behind the first token.
    """
    sampler = Sampler(sampling, prompt, output)
    ends = () if sampling.ignore_eos else ends
    last, given = (output or prompt)[-1], len(proposal) > 0
    nodes: TokenTree | Sequence[int] = [last, *proposal[: max(0, room - 1)]]
    context = len(prompt) + len(output) - 1
    untold: Sequence[int] = (*prompt, *output)  # to the proposer
    entries: Sequence[int] = range(context)
    if proposer is not None and not featured:
        proposer.take(untold, None)
        untold = ()
        if not given:
            nodes = _hung(last, proposer.propose(room - 1))
    keep: Sequence[int] = ()
    written: list[int] = []
    likely: list[Logprob] = []
    left, accepted = room, 0
    while True:
        answer = yield Ask(nodes, keep=keep, draws=sampler.draws(nodes))
        finish: Finish | None = None
        node: int | None = 0
        path, taken = [], []
        while node is not None:
            path.append(node)
            token = answer.chosen[node]
            if token in ends:
                finish = "stop"
                break
            if sampling.logprobs is not None:
                likely += logprobs(answer.logits[node : node + 1], [token], sampling.logprobs)
            sampler.take(token)
            taken.append(token)
            left -= 1
            node = child(nodes, node, token)
            accepted += given and node is not None
            if text is not None:
                text.add((token,))
                finish = "stop" if text.stopped is not None else None
            if finish is None and not left:
                finish = "length"
            if finish:
                break
        written += taken
        if finish or len(written) >= piece:
            emit(Tokens(tuple(written), tuple(likely), finish, accepted))
            written, likely, accepted = [], [], 0
        if finish:
            yield Ask((), read=(), keep=path)  # the next turn will begin with it
            return
        given, keep, nodes = False, path, taken[-1:]
        if proposer is not None:
            features = None
            if featured and answer.features is not None:
                features = answer.features([*entries, *(context + node for node in path)])
            proposer.take((*untold, *taken), features)
            nodes = _hung(taken[-1], proposer.propose(left - 1))
            context, untold, entries = context + len(path), (), ()


def _hung(token: int, proposal: Proposal) -> TokenTree | Sequence[int]:
    """The proposal below the last token of the text."""
    if list(proposal.parents) == list(range(-1, len(proposal.tokens) - 1)):
        return [token, *proposal.tokens]
    tree, _ = proposals([token, *proposal.tokens], [-1, *(parent + 1 for parent in proposal.parents)])
    return tree


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
