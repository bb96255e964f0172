"""From logits to a token, the same whatever else is in the batch.

Everything follows from the logits, the tokens so far, and one uniform number drawn for (seed, position): no generator
is advanced, so a text that is continued elsewhere, or proposed beforehand by a draft, comes out the same.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from parse.types import Logprob, Sampling

COLDEST = 1e-30  # a temperature as good as zero; divided by much less, logits are no numbers any more


class Sampler:
    """Keeps count of the tokens so far, as far as penalties need it."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], output: Sequence[int]) -> None:
        self.sampling = sampling
        self.position = len(output)
        self._written = Counter(output)
        self._read = set(prompt) if sampling.repetition_penalty != 1.0 else set()

    def take(self, token: int) -> None:
        self.position += 1
        if self.sampling.adjusts:
            self._written[token] += 1

    @property
    def plain(self) -> bool:
        """Is the token to take simply the likeliest?"""
        return self.sampling.greedy and not self.sampling.adjusts

    def choose(self, logits: Tensor) -> int:
        """`logits`: [vocabulary]"""
        adjusted = self._adjusted(logits) if self.sampling.adjusts else logits
        if self.sampling.greedy:
            return int(adjusted.argmax())
        likely = self._probabilities(adjusted)
        # Float64: with many tokens, single precision would lose the rare ones' shares.
        reached = likely.double().cumsum(0)
        drawn = uniform(self.sampling.seed, self.position) * float(reached[-1])
        return min(int(torch.searchsorted(reached, drawn, right=True)), int(likely.nonzero()[-1]))

    def _adjusted(self, logits: Tensor) -> Tensor:
        s, logits = self.sampling, logits.clone()
        if s.repetition_penalty != 1.0 and (seen := self._read | self._written.keys()):
            at = torch.tensor(sorted(seen), device=logits.device)
            values = logits[at]
            logits[at] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and self._written:
            at = torch.tensor(list(self._written), device=logits.device)
            counts = torch.tensor(list(self._written.values()), device=logits.device)
            logits[at] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            at = torch.tensor(list(s.logit_bias), device=logits.device)
            logits[at] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
        return logits

    def _probabilities(self, logits: Tensor) -> Tensor:
        """After temperature, then top-k, then top-p, then min-p."""
        s = self.sampling
        logits = logits / max(s.temperature, COLDEST)
        if 0 < s.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
        likely = logits.softmax(-1)
        if s.top_p < 1.0:
            ordered, ids = likely.sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered  # the token that crosses the border is kept
            likely[ids[(before >= s.top_p) & (before > 0)]] = 0.0  # the likeliest always stays
        if s.min_p > 0.0:
            likely = likely.masked_fill(likely < s.min_p * likely.max(), 0.0)
        return likely


def logprob(logits: Tensor, token: int, top: int) -> Logprob:
    """The model's own, before temperature, penalties and bias, with the `top` likeliest beside it."""
    logprobs = logits.log_softmax(-1)
    likeliest = logprobs.topk(top) if top else None
    others = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True) if likeliest else ()
    return Logprob(float(logprobs[token]), tuple(others))


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from the two numbers alone."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) >> 3) / (1 << 53)
