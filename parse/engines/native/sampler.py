"""Samples the tokens of a step from its logits.

The token of a row does not depend on the other rows of the step.

A token follows from its logits, the tokens so far, and one uniform number that is computed from the seed and the
position. There is no random generator with a state. A request that continues on another replica, or whose tokens were
proposed by a draft, therefore gets the same tokens. Only the transfer of the results waits for the device.
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

MIN_TEMPERATURE = 1e-30  # equivalent to zero; logits divided by much less are not finite
MAX_LOGITS_PER_PASS = 1 << 23  # the intermediate results take several times the memory of the logits
MAX_LOGITS_PER_PASS_ON_CPU = 1 << 16  # more logits do not fit into the CPU's caches and take twice as long

Setting = TypeVar("Setting", int, float)


@dataclass(frozen=True, slots=True)
class SamplingState:
    """Everything that determines a token except the logits."""

    params: SamplingParams
    noise: float  # in [0, 1)
    prompt_tokens: Collection[int]  # empty unless a penalty needs them
    output_counts: Mapping[int, int]  # occurrences of each token; empty unless a penalty needs them
    excluded_tokens: Collection[int] = ()  # end tokens before `min_tokens`


class Sampler:
    """The sampling state of one request.

    It counts tokens only if penalties or a bias are set. The `end_token_ids` are excluded before `min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Iterable[int],
        output: Sequence[int],
        end_token_ids: Collection[int] = (),
    ) -> None:
        self.params, self._end_token_ids = params, end_token_ids
        self.position = len(output)
        self._output_counts = Counter(output) if params.modifies_logits else Counter()
        self._prompt_tokens = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()

    def append(self, token: int) -> None:
        self.position += 1
        if self.params.modifies_logits:
            self._output_counts[token] += 1

    def states(self, nodes: TokenTree | Sequence[int] = (0,)) -> list[SamplingState]:
        """Returns the sampling state for the token after each node.

        The root is the last token of the sequence. The other nodes are tokens that may follow it.

        Returns an empty list if the most likely token is always taken.
        """
        params = self.params
        if params.greedy and not params.modifies_logits:
            return []
        tree = nodes if isinstance(nodes, TokenTree) else chain(nodes)
        states: list[SamplingState] = []
        counts_above: list[Counter[int]] = []  # for each node on the path to this one, the counts including it
        for token, depth in zip(tree.tokens.tolist(), tree.depth.tolist(), strict=True):
            del counts_above[depth:]
            counts = counts_above[-1] if counts_above else self._output_counts
            if params.modifies_logits:  # each node needs a copy of its own
                counts = counts + Counter((token,) if depth and token != MASK else ())
            counts_above.append(counts)
            noise = 0.0 if params.greedy else uniform_noise(params.seed, self.position + depth)
            excluded = self._end_token_ids if self.position + depth < params.min_tokens else ()
            states.append(SamplingState(params, noise, self._prompt_tokens, counts, excluded))
        return states


def sample(logits: Tensor, states: Sequence[SamplingState | None] = ()) -> list[int]:
    """Returns the token for each row of logits, [n, vocabulary].

    It is sampled as the state of the row says. Without a state it is the most likely token.

    The token of a row whose maximum is not finite is -1. The transfer of the tokens is the only point of a step that
    waits for the device.
    """
    if not len(logits):
        return []
    highest, tokens = logits.max(-1)
    sampled_rows = [row for row, state in enumerate(states) if state is not None]
    batch_size = max(1, (MAX_LOGITS_PER_PASS_ON_CPU if logits.is_cpu else MAX_LOGITS_PER_PASS) // logits.shape[-1])
    for start in range(0, len(sampled_rows), batch_size):
        rows = sampled_rows[start : start + batch_size]
        batch = [state for row in rows if (state := states[row]) is not None]
        if len(rows) == len(logits):
            tokens = _sample_rows(logits, batch)
        else:
            indices = torch.tensor(rows, device=logits.device)
            tokens.index_copy_(0, indices, _sample_rows(logits[indices], batch))
    sampled: list[int] = torch.where(highest.isfinite(), tokens, -1).tolist()
    return sampled


def _sample_rows(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Returns the token sampled for each row, [n]."""
    adjusted = _apply_penalties(logits, states)
    greedy = [state.params.greedy for state in states]
    if all(greedy):
        return adjusted.argmax(-1)
    probabilities = _probabilities(adjusted, [state.params for state in states])
    # In single precision, the sum over a large vocabulary would lose the shares of rare tokens.
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    target = _column([state.noise for state in states], cumulative) * total
    last_possible = torch.searchsorted(cumulative, total)  # rounding must not lead to a token of probability zero
    tokens = torch.searchsorted(cumulative, target, right=True).minimum(last_possible)[:, 0]
    return (
        torch.where(torch.tensor(greedy, device=logits.device), adjusted.argmax(-1), tokens) if any(greedy) else tokens
    )


def _apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Applies penalties and biases to the logits.

    The order is repetition penalty, presence and frequency penalties, bias. Excluded tokens get no probability.
    """
    if not any(state.params.modifies_logits for state in states):
        return logits
    flat = logits.flatten().clone()
    repeated: dict[int, float] = {}
    added: dict[int, float] = {}
    biased: dict[int, float] = {}
    excluded: list[int] = []
    for row, state in enumerate(states):
        params, start = state.params, row * logits.shape[-1]
        if params.repetition_penalty != 1.0:
            repeated |= {
                start + token: params.repetition_penalty for token in {*state.prompt_tokens, *state.output_counts}
            }
        if params.presence_penalty or params.frequency_penalty:
            added |= {
                start + token: -params.presence_penalty - params.frequency_penalty * count
                for token, count in state.output_counts.items()
            }
        biased |= {start + token: bias for token, bias in params.logit_bias.items()}
        excluded += (start + token for token in state.excluded_tokens)
    if repeated:
        indices, penalties = _indices_and_values(repeated, flat)
        values = flat[indices]
        flat[indices] = torch.where(values > 0, values / penalties, values * penalties)
    for terms in (added, biased):
        if terms:
            indices, addends = _indices_and_values(terms, flat)
            flat[indices] += addends
    if excluded:
        flat[torch.tensor(excluded, device=flat.device)] = -torch.inf
    return flat.view(logits.shape)


def _probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Applies the temperature, then top-k, then top-p, then min-p."""
    # The divisor is always a tensor, because a division by a scalar may round differently. The result of a request
    # would then depend on the other requests.
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
    beyond = (mass_before >= _column(limits, probabilities)) & (mass_before > 0)  # the most likely token always stays
    return probabilities.scatter(-1, ids, ordered.masked_fill_(beyond, 0.0))


def _min_p(probabilities: Tensor, limits: Sequence[float]) -> Tensor:
    return probabilities.masked_fill(
        probabilities < _column(limits, probabilities) * probabilities.amax(-1, keepdim=True), 0.0
    )


def _apply_where_set(
    settings: Sequence[Setting], unset: Setting, rows: Tensor, change: Callable[[Tensor, Sequence[Setting]], Tensor]
) -> Tensor:
    """Applies a change to the rows whose setting differs from `unset`."""
    indices = [row for row, setting in enumerate(settings) if setting != unset]
    if not indices:
        return rows
    if len(indices) == len(rows):
        return change(rows, settings)
    index = torch.tensor(indices, device=rows.device)
    return rows.index_copy(0, index, change(rows[index], [settings[row] for row in indices]))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns the values as a column, [n, 1], with the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _indices_and_values(terms: Mapping[int, float], flat: Tensor) -> tuple[Tensor, Tensor]:
    indices = torch.tensor(list(terms), device=flat.device)
    return indices, torch.tensor(list(terms.values()), dtype=flat.dtype, device=flat.device)


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """Returns the log-probability of each row's token, and the `top` likeliest ones.

    Temperature, penalties and bias are not applied.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)
    indices = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs: list[float] = (logits.gather(-1, indices) - normalizer)[:, 0].tolist()
    if not top:
        return [Logprob(logprob) for logprob in logprobs]
    top_tokens = logits.topk(top)
    others = zip(top_tokens.indices.tolist(), (top_tokens.values - normalizer).tolist(), strict=True)
    return [
        Logprob(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(logprobs, others, strict=True)
    ]


def uniform_noise(seed: int, position: int) -> float:
    """Returns a number in [0, 1) that depends on the seed and the position alone."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) / (1 << 53)
