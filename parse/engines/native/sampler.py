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
from parse.types import Logprob, SamplingParams

MIN_TEMPERATURE = 1e-30  # a temperature as good as zero; divided by much less, logits are no numbers any more
MAX_LOGITS_PER_PASS = 1 << 23  # logits; what is computed from them on the way takes several times their memory
MAX_LOGITS_PER_PASS_ON_CPU = 1 << 16  # more than its caches hold would take twice as long

Setting = TypeVar("Setting", int, float)


@dataclass(frozen=True, slots=True)
class SamplingState:
    """All that decides on a token beside its logits."""

    params: SamplingParams
    noise: float  # in [0, 1)
    prompt_tokens: Collection[int]  # of the prompt; both only as far as penalties ask for them
    output_counts: Mapping[int, int]  # how often each token


class Sampler:
    """Keeps count of the tokens so far, as far as penalties need it."""

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int], output: Sequence[int]) -> None:
        self.params = sampling
        self.position = len(output)
        self._output_counts = Counter(output) if sampling.modifies_logits else Counter()
        self._prompt_tokens = frozenset(prompt) if sampling.repetition_penalty != 1.0 else frozenset()

    def append(self, token: int) -> None:
        self.position += 1
        if self.params.modifies_logits:
            self._output_counts[token] += 1

    def states(self, nodes: TokenTree | Sequence[int] = (0,)) -> list[SamplingState]:
        """For the token behind each node: the root is the last token of the text, the others might follow it.

        None at all where simply the likeliest is to be taken.
        """
        s = self.params
        if s.greedy and not s.modifies_logits:
            return []
        tree = nodes if isinstance(nodes, TokenTree) else chain(nodes)
        states: list[SamplingState] = []
        counts_above: list[Counter[int]] = []  # of the nodes on the way to this one, what was written with each
        for token, depth in zip(tree.tokens.tolist(), tree.depth.tolist(), strict=True):
            del counts_above[depth:]
            counts = counts_above[-1] if counts_above else self._output_counts
            if s.modifies_logits:  # a copy each: they are for different moments
                counts = counts + Counter((token,) if depth and token != MASK else ())
            counts_above.append(counts)
            noise = 0.0 if s.greedy else uniform_noise(s.seed, self.position + depth)
            states.append(SamplingState(s, noise, self._prompt_tokens, counts))
        return states


def sample(logits: Tensor, states: Sequence[SamplingState | None] = ()) -> list[int]:
    """The token at each row of [n, vocabulary]: as its draw says, the likeliest without one; -1 for what is no number.

    The only moment in a step at which the device is waited for.
    """
    if not len(logits):
        return []
    highest, tokens = logits.max(-1)
    sampled_rows = [row for row, draw in enumerate(states) if draw is not None]
    batch_size = max(1, (MAX_LOGITS_PER_PASS_ON_CPU if logits.is_cpu else MAX_LOGITS_PER_PASS) // logits.shape[-1])
    for start in range(0, len(sampled_rows), batch_size):
        rows = sampled_rows[start : start + batch_size]
        batch = [draw for row in rows if (draw := states[row]) is not None]
        if len(rows) == len(logits):
            tokens = _sample_rows(logits, batch)
        else:
            indices = torch.tensor(rows, device=logits.device)
            tokens.index_copy_(0, indices, _sample_rows(logits[indices], batch))
    sampled: list[int] = torch.where(highest.isfinite(), tokens, -1).tolist()
    return sampled


def _sample_rows(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """[n]"""
    adjusted = _apply_penalties(logits, states)
    greedy = [draw.params.greedy for draw in states]
    if all(greedy):
        return adjusted.argmax(-1)
    probabilities = _probabilities(adjusted, [draw.params for draw in states])
    # Float64: with many tokens, single precision would lose the rare ones' shares.
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    target = _column([draw.noise for draw in states], cumulative) * total
    last_possible = torch.searchsorted(cumulative, total)  # of those that can come; rounding must not lead beyond
    tokens = torch.searchsorted(cumulative, target, right=True).minimum(last_possible)[:, 0]
    return (
        torch.where(torch.tensor(greedy, device=logits.device), adjusted.argmax(-1), tokens) if any(greedy) else tokens
    )


def _apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """After the repetition penalty, then those for presence and frequency, then the bias."""
    if not any(draw.params.modifies_logits for draw in states):
        return logits
    flat = logits.flatten().clone()
    repeated: dict[int, float] = {}
    added: dict[int, float] = {}
    biased: dict[int, float] = {}
    for row, draw in enumerate(states):
        params, start = draw.params, row * logits.shape[-1]
        if params.repetition_penalty != 1.0:
            repeated |= {
                start + token: params.repetition_penalty for token in {*draw.prompt_tokens, *draw.output_counts}
            }
        if params.presence_penalty or params.frequency_penalty:
            added |= {
                start + token: -params.presence_penalty - params.frequency_penalty * count
                for token, count in draw.output_counts.items()
            }
        biased |= {start + token: bias for token, bias in params.logit_bias.items()}
    if repeated:
        at, penalty = _indices_and_values(repeated, flat)
        values = flat[at]
        flat[at] = torch.where(values > 0, values / penalty, values * penalty)
    for terms in (added, biased):
        if terms:
            at, term = _indices_and_values(terms, flat)
            flat[at] += term
    return flat.view(logits.shape)


def _probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """After temperature, then top-k, then top-p, then min-p."""
    # Always by a tensor: a division by a number may be rounded otherwise, and what the others want must not show.
    logits = logits / _column([max(s.temperature, MIN_TEMPERATURE) for s in params], logits)
    logits = _apply_where_set([s.top_k if s.top_k < logits.shape[-1] else 0 for s in params], 0, logits, _top_k)
    probabilities = logits.softmax(-1)
    probabilities = _apply_where_set([s.top_p for s in params], 1.0, probabilities, _top_p)
    return _apply_where_set([s.min_p for s in params], 0.0, probabilities, _min_p)


def _top_k(logits: Tensor, limits: Sequence[int]) -> Tensor:
    highest = logits.topk(max(limits)).values
    lowest_kept = highest.gather(-1, torch.tensor(limits, device=logits.device)[:, None] - 1)
    return logits.masked_fill(logits < lowest_kept, -torch.inf)


def _top_p(probabilities: Tensor, limits: Sequence[float]) -> Tensor:
    ordered, ids = probabilities.sort(descending=True, stable=True)
    mass_before = ordered.cumsum(-1) - ordered  # the token that crosses the border is kept
    beyond = (mass_before >= _column(limits, probabilities)) & (mass_before > 0)  # the likeliest always stays
    return probabilities.scatter(-1, ids, ordered.masked_fill_(beyond, 0.0))


def _min_p(probabilities: Tensor, limits: Sequence[float]) -> Tensor:
    return probabilities.masked_fill(
        probabilities < _column(limits, probabilities) * probabilities.amax(-1, keepdim=True), 0.0
    )


def _apply_where_set(
    settings: Sequence[Setting], unset: Setting, rows: Tensor, change: Callable[[Tensor, Sequence[Setting]], Tensor]
) -> Tensor:
    """The change made to those of the rows for which it is set."""
    indices = [row for row, setting in enumerate(settings) if setting != unset]
    if not indices:
        return rows
    if len(indices) == len(rows):
        return change(rows, settings)
    index = torch.tensor(indices, device=rows.device)
    return rows.index_copy(0, index, change(rows[index], [settings[row] for row in indices]))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[n, 1]"""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _indices_and_values(terms: Mapping[int, float], flat: Tensor) -> tuple[Tensor, Tensor]:
    indices = torch.tensor(list(terms), device=flat.device)
    return indices, torch.tensor(list(terms.values()), dtype=flat.dtype, device=flat.device)


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """The model's own at each row, before temperature, penalties and bias, with the `top` likeliest beside it."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    indices = torch.tensor(tokens, device=logits.device)[:, None]
    own: list[float] = (logits.gather(-1, indices) - normalizer)[:, 0].tolist()
    if not top:
        return [Logprob(logprob) for logprob in own]
    top_tokens = logits.topk(top)
    others = zip(top_tokens.indices.tolist(), (top_tokens.values - normalizer).tolist(), strict=True)
    return [
        Logprob(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(own, others, strict=True)
    ]


def uniform_noise(seed: int, position: int) -> float:
    """In [0, 1), from the two numbers alone."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) / (1 << 53)
