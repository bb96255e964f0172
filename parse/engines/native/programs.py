"""What requests do, as small programs: each asks for a tree to be run on its context and decides on the answer.

A program is a generator. It yields what it wants run next and which of the nodes run before stay in its context; it is
sent the logits it asked for. It knows nothing of batches, memory or threads, so it may be stopped anywhere and run
again elsewhere.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parse.detokenizer import TextStream
from parse.engines.native.sampler import Draw, Sampler, logprobs
from parse.prompts import Check
from parse.speculative.policy import Speculation, Wished
from parse.speculative.proposal import NOTHING, Foreseen, Proposal, chained
from parse.tree import MASK, TokenTree, child, probes, proposals
from parse.types import Finish, Judged, Logprob, Sampling, Speculated, Tokens


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


Asking = Generator[Ask, Answer, None]
Program = Generator[Ask | Wished, Any, None]
"""Is sent an Answer for an Ask, and a Proposal for a wish."""


def warm() -> Asking:
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
    given: Sequence[int] = (),
    speculation: Speculation | None = None,
    piece: int = 1,
) -> Program:
    """Writes on after `prompt` and `output`, of which all but the last token are the context.

    At most `room` tokens, the end token not among them, handed to `emit` in pieces of at least `piece`. `text` watches
    for stop strings. Tokens of `given`, and then whatever speculation has to offer, are run together and taken as long
    as they are what would have been chosen anyway.
    """
    sampler = Sampler(sampling, prompt, output)
    ends = () if sampling.ignore_eos else ends
    last, context = (output or prompt)[-1], len(prompt) + len(output) - 1
    proposal = chained(given[: max(0, room - 1)])
    untold: Sequence[int] = (*prompt, *output)  # to the proposer
    entries: Sequence[int] = range(context)
    if speculation is not None and not speculation.featured:
        speculation.take(untold, None, None)
        untold = ()
        if not given and (wished := speculation.wish(room - 1)):
            proposal = yield wished
    keep: Sequence[int] = ()
    written: list[int] = []
    likely: list[Logprob] = []
    speculated: Speculated | None = None
    left, accepted = room, 0
    while True:
        nodes = _hung(last, proposal)
        answer: Answer = yield Ask(nodes, keep=keep, draws=sampler.draws(nodes))
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
            if text is not None:
                text.add((token,))
                finish = "stop" if text.stopped is not None else None
            if finish is None and not left:
                finish = "length"
            if finish:
                break
        written += taken
        matched = len(taken) - (node is None)  # of the proposal
        if given:
            accepted += matched
        if speculation is not None:
            came = speculation.came(NOTHING if given else proposal, matched)
            speculated = came if speculated is None else speculated + came
        if finish or len(written) >= piece:
            emit(Tokens(tuple(written), tuple(likely), finish, accepted, speculated=speculated))
            written, likely, accepted, speculated = [], [], 0, None
        if finish:
            yield Ask((), read=(), keep=path)  # the next turn will begin with it
            return
        last, given, keep, proposal = taken[-1], (), path, NOTHING
        if speculation is not None:
            features = None
            if speculation.featured and answer.features is not None:
                features = answer.features([*entries, *(context + node for node in path)])
            speculation.take((*untold, *taken), features, _foreseen(nodes, path[-1], answer))
            context, untold, entries = context + len(path), (), ()
            if wished := speculation.wish(left - 1):
                proposal = yield wished


def _foreseen(nodes: TokenTree | Sequence[int], node: int, answer: Answer) -> Foreseen | None:
    """What the masks behind that node say."""
    masks = []
    mask = child(nodes, node, MASK)
    while mask is not None and answer.chosen[mask] != -1:  # what is no number foresees nothing
        masks.append(mask)
        mask = child(nodes, mask, MASK)
    if not masks:
        return None
    tokens = [answer.chosen[mask] for mask in masks]
    chances = answer.logits[masks].softmax(-1)[range(len(masks)), tokens]
    return Foreseen(tokens, chances.tolist())


def _hung(token: int, proposal: Proposal) -> TokenTree | Sequence[int]:
    """The proposal below the last token of the text."""
    if list(proposal.parents) == list(range(-1, len(proposal.parents) - 1)):
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
) -> Asking:
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
