"""From logits to tokens, all of a step at once, and each the same whatever else is in the step.

Everything follows from the logits, the tokens so far, and one uniform number drawn for (seed, position): no generator
is advanced, so a text that is continued elsewhere, or proposed beforehand by a draft, comes out the same. Nothing here
waits for the device but what hands the result over.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from parse.tree import MASK, TokenTree, chain
from parse.types import Logprob, Sampling

COLDEST = 1e-30  # a temperature as good as zero; divided by much less, logits are no numbers any more
AT_ONCE = 1 << 23  # logits; what is computed from them on the way takes several times their memory
AT_ONCE_ON_CPU = 1 << 16  # more than its caches hold would take twice as long

Setting = TypeVar("Setting", int, float)


@dataclass(frozen=True, slots=True)
class Draw:
    """All that decides on a token beside its logits."""

    sampling: Sampling
    drawn: float  # in [0, 1)
    read: Collection[int]  # of the prompt; both only as far as penalties ask for them
    written: Mapping[int, int]  # how often each token


class Sampler:
    """Keeps count of the tokens so far, as far as penalties need it."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], output: Sequence[int]) -> None:
        self.sampling = sampling
        self.position = len(output)
        self._written = Counter(output) if sampling.adjusts else Counter()
        self._read = frozenset(prompt) if sampling.repetition_penalty != 1.0 else frozenset()

    def take(self, token: int) -> None:
        self.position += 1
        if self.sampling.adjusts:
            self._written[token] += 1

    def draws(self, nodes: TokenTree | Sequence[int] = (0,)) -> list[Draw]:
        """For the token behind each node: the root is the last token of the text, the others might follow it.

        None at all where simply the likeliest is to be taken.
        """
        s = self.sampling
        if s.greedy and not s.adjusts:
            return []
        tree = nodes if isinstance(nodes, TokenTree) else chain(nodes)
        draws: list[Draw] = []
        above: list[Counter[int]] = []  # of the nodes on the way to this one, what was written with each
        for token, depth in zip(tree.tokens.tolist(), tree.depth.tolist(), strict=True):
            del above[depth:]
            written = above[-1] if above else self._written
            if s.adjusts:  # a copy each: they are for different moments
                written = written + Counter((token,) if depth and token != MASK else ())
            above.append(written)
            drawn = 0.0 if s.greedy else uniform(s.seed, self.position + depth)
            draws.append(Draw(s, drawn, self._read, written))
        return draws


def choose(logits: Tensor, draws: Sequence[Draw | None] = ()) -> list[int]:
    """The token at each row of [n, vocabulary]: as its draw says, the likeliest without one; -1 for what is no number.

    The only moment in a step at which the device is waited for.
    """
    if not len(logits):
        return []
    highest, tokens = logits.max(-1)
    drawn = [row for row, draw in enumerate(draws) if draw is not None]
    together = max(1, (AT_ONCE_ON_CPU if logits.is_cpu else AT_ONCE) // logits.shape[-1])
    for start in range(0, len(drawn), together):
        rows = drawn[start : start + together]
        some = [draw for row in rows if (draw := draws[row]) is not None]
        if len(rows) == len(logits):
            tokens = _drawn(logits, some)
        else:
            at = torch.tensor(rows, device=logits.device)
            tokens.index_copy_(0, at, _drawn(logits[at], some))
    chosen: list[int] = torch.where(highest.isfinite(), tokens, -1).tolist()
    return chosen


def _drawn(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[n]"""
    adjusted = _adjusted(logits, draws)
    greedy = [draw.sampling.greedy for draw in draws]
    if all(greedy):
        return adjusted.argmax(-1)
    likely = _probabilities(adjusted, [draw.sampling for draw in draws])
    # Float64: with many tokens, single precision would lose the rare ones' shares.
    reached = likely.double().cumsum(-1)
    whole = reached[:, -1:].contiguous()
    wanted = _column([draw.drawn for draw in draws], reached) * whole
    last = torch.searchsorted(reached, whole)  # of those that can come; rounding must not lead beyond
    tokens = torch.searchsorted(reached, wanted, right=True).minimum(last)[:, 0]
    return (
        torch.where(torch.tensor(greedy, device=logits.device), adjusted.argmax(-1), tokens) if any(greedy) else tokens
    )


def _adjusted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """After the repetition penalty, then those for presence and frequency, then the bias."""
    if not any(draw.sampling.adjusts for draw in draws):
        return logits
    flat = logits.flatten().clone()
    repeated: dict[int, float] = {}
    added: dict[int, float] = {}
    biased: dict[int, float] = {}
    for row, draw in enumerate(draws):
        s, start = draw.sampling, row * logits.shape[-1]
        if s.repetition_penalty != 1.0:
            repeated |= {start + token: s.repetition_penalty for token in {*draw.read, *draw.written}}
        if s.presence_penalty or s.frequency_penalty:
            added |= {
                start + token: -s.presence_penalty - s.frequency_penalty * count
                for token, count in draw.written.items()
            }
        biased |= {start + token: bias for token, bias in s.logit_bias.items()}
    if repeated:
        at, penalty = _at(repeated, flat)
        values = flat[at]
        flat[at] = torch.where(values > 0, values / penalty, values * penalty)
    for terms in (added, biased):
        if terms:
            at, term = _at(terms, flat)
            flat[at] += term
    return flat.view(logits.shape)


def _probabilities(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """After temperature, then top-k, then top-p, then min-p."""
    # Always by a tensor: a division by a number may be rounded otherwise, and what the others want must not show.
    logits = logits / _column([max(s.temperature, COLDEST) for s in samplings], logits)
    logits = _where([s.top_k if s.top_k < logits.shape[-1] else 0 for s in samplings], 0, logits, _top_k)
    likely = logits.softmax(-1)
    likely = _where([s.top_p for s in samplings], 1.0, likely, _top_p)
    return _where([s.min_p for s in samplings], 0.0, likely, _min_p)


def _top_k(logits: Tensor, limits: Sequence[int]) -> Tensor:
    most = logits.topk(max(limits)).values
    least = most.gather(-1, torch.tensor(limits, device=logits.device)[:, None] - 1)
    return logits.masked_fill(logits < least, -torch.inf)


def _top_p(likely: Tensor, shares: Sequence[float]) -> Tensor:
    ordered, ids = likely.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # the token that crosses the border is kept
    beyond = (before >= _column(shares, likely)) & (before > 0)  # the likeliest always stays
    return likely.scatter(-1, ids, ordered.masked_fill_(beyond, 0.0))


def _min_p(likely: Tensor, shares: Sequence[float]) -> Tensor:
    return likely.masked_fill(likely < _column(shares, likely) * likely.amax(-1, keepdim=True), 0.0)


def _where(
    settings: Sequence[Setting], unset: Setting, rows: Tensor, change: Callable[[Tensor, Sequence[Setting]], Tensor]
) -> Tensor:
    """The change made to those of the rows for which it is set."""
    which = [row for row, setting in enumerate(settings) if setting != unset]
    if not which:
        return rows
    if len(which) == len(rows):
        return change(rows, settings)
    at = torch.tensor(which, device=rows.device)
    return rows.index_copy(0, at, change(rows[at], [settings[row] for row in which]))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[n, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _at(terms: Mapping[int, float], flat: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.tensor(list(terms), device=flat.device)
    return places, torch.tensor(list(terms.values()), dtype=flat.dtype, device=flat.device)


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """The model's own at each row, before temperature, penalties and bias, with the `top` likeliest beside it."""
    whole = logits.logsumexp(-1, keepdim=True)
    at = torch.tensor(tokens, device=logits.device)[:, None]
    own: list[float] = (logits.gather(-1, at) - whole)[:, 0].tolist()
    if not top:
        return [Logprob(logprob) for logprob in own]
    likeliest = logits.topk(top)
    others = zip(likeliest.indices.tolist(), (likeliest.values - whole).tolist(), strict=True)
    return [
        Logprob(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(own, others, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from the two numbers alone."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) / (1 << 53)
