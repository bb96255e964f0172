"""What a training step sees: a question, an answer, and probes that ask about its prefixes, under the tree's mask.

Three things are learnt from one row: the next token (where the answer is right and the wording the learner's own),
which token is wrong given the text before it, and whether the text up to a place is right, the last both from the
probes' answers and, densely, from every token on the way.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parse.prompts import VerificationSuffix, build_verification_suffix, chat_prompt_token_ids
from parse.tree import suffix_end_nodes, trunk_with_suffixes
from training.mistakes import KINDS, Voice, compose, scrambled
from training.task import WORD, Problem, check
from training.tokenizer import CHECK_QUESTION, CORRECT, INCORRECT, SYSTEM_PROMPTS
from training.wording import LINES

IGNORED = -100  # cross_entropy's own mark


@dataclass(frozen=True)
class Row:
    prompt: Sequence[int]
    answer: Sequence[int]  # with the end token when the answer ends by itself
    learnt: Sequence[bool]  # per answer token: is it a lesson in writing?
    first_wrong: int | None  # index into the answer
    cuts: Sequence[int]

    def width(self, ask: VerificationSuffix) -> int:
        return len(self.prompt) + len(self.answer) + len(self.cuts) * len(ask.token_ids)

    def right_up_to(self, cut: int) -> bool:
        return self.first_wrong is None or cut <= self.first_wrong


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    visible: Tensor  # [B, 1, T, T] bool
    next_token: Tensor  # [B, T], IGNORED where nothing is to be learnt
    slip: Tensor  # [B, T], 1 at the first wrong token, 0 before it, IGNORED elsewhere
    astray: Tensor  # [B, T], 1 from the first wrong token on, 0 before it, IGNORED outside answers
    verdict_at: Tensor  # [V, 2], (row, node) of each probe's end
    verdict: Tensor  # [V], the token that is the right verdict

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Writer:
    """Turns problems into rows, with one tokenizer. `own` is the wording that the learner is to write in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: int) -> None:
        self.tokenizer, self.own = tokenizer, own
        self.check: VerificationSuffix = build_verification_suffix(tokenizer, CHECK_QUESTION, CORRECT, INCORRECT)
        assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
        self.end, self.pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
        self.ids = cache(self._encode)
        self.piece = cache(self._decode)

    def prompt(self, given: Problem, rng: random.Random | None = None) -> list[int]:
        messages = [{"role": "user", "content": given.question}]
        if rng and rng.random() < 0.15:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        return chat_prompt_token_ids(self.tokenizer, messages)

    def written(self, given: Problem, rng: random.Random, *, foreign: float, mistaken: float, cuts: int) -> Row:
        """A made-up answer: `foreign` is the share that does not keep to the learner's own wording throughout."""
        kind = rng.choice(KINDS) if rng.random() < mistaken else None
        phrases = compose(given, rng, self._voice(given, rng, foreign), kind)
        answer: list[int] = []
        learnt: list[bool] = []
        for phrase in phrases:
            ids = self.ids(phrase.text)
            answer += ids
            # Where another wording sets in, the learner would have gone its own way; from there on it must cope.
            learnt += [phrase.wording in (None, self.own)] + [True] * (len(ids) - 1)
        if kind and rng.random() < 0.06:  # and now and then a word that has no business there at all
            answer[rng.randrange(len(answer))] = rng.choice(answer + list(self.ids(given.question)))
        return self._row(given, rng, [*answer, self.end], [*learnt, True], cuts)

    def scrambled(self, given: Problem, rng: random.Random, *, foreign: float, share: float) -> Row:
        """An answer with many words replaced: nothing to write or to judge, but every word a lesson in what is odd."""
        text = "".join(phrase.text for phrase in compose(given, rng, self._voice(given, rng, foreign)))
        words = scrambled(given, WORD.findall(text), rng, share)
        answer = [token for word in words for token in self.ids(word)]
        return self._row(given, rng, answer, [False] * len(answer), 0)

    def drafted(self, given: Problem, answer: Sequence[int], rng: random.Random, cuts: int) -> Row:
        """What a draft model wrote: judged, not learnt from."""
        return self._row(given, rng, answer, [False] * len(answer), cuts)

    def _row(self, given: Problem, rng: random.Random, answer: Sequence[int], learnt: Sequence[bool], cuts: int) -> Row:
        ended = answer[-1] == self.end
        text = answer[:-1] if ended else answer
        found = check(given, [self.piece(token) for token in text])
        wrong = found.first_wrong
        if wrong is None and ended and not found.complete:
            wrong = len(text)  # right as far as it goes, but the end came too early
        places = {len(text)} if cuts else set()
        if cuts and wrong is not None and wrong < len(text):
            places |= {wrong + 1, max(wrong, 1)}  # the hardest two
        while len(places) < min(cuts, len(text)):
            places.add(rng.randint(1, len(text)))
        keep = len(answer) if wrong is None else wrong
        lessons = [lesson and k < keep for k, lesson in enumerate(learnt)]
        return Row(self.prompt(given, rng), answer, lessons, wrong, sorted(places))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _voice(self, given: Problem, rng: random.Random, foreign: float) -> Voice:
        """One's own wording; or the other model's up to somewhere, also amid a line; or anybody's, part by part."""
        if rng.random() >= foreign:
            return lambda line, part: self.own
        if rng.random() < 0.3:
            return lambda line, part: None
        other = 1 - self.own
        parts = len(LINES[given.family])
        until = (given.steps + 1, 0) if rng.random() < 0.3 else (rng.randint(0, given.steps), rng.randrange(parts))
        return lambda line, part: other if (line, part) < until else self.own


def batch(rows: Sequence[Row], ask: VerificationSuffix, pad: int, multiple: int = 8) -> Batch:
    trees = [
        trunk_with_suffixes([*row.prompt, *row.answer], [len(row.prompt) + cut for cut in row.cuts], ask.token_ids)
        for row in rows
    ]
    width = -(-max(map(len, trees)) // multiple) * multiple
    shape = len(rows), width
    tokens, depth = np.full(shape, pad), np.zeros(shape, np.int64)
    # A padding node sees itself alone (its end is one past it), so that its softmax is defined.
    end = np.tile(np.arange(width) + 1, (len(rows), 1))
    next_token, slip, astray = (np.full(shape, IGNORED) for _ in range(3))
    at: list[tuple[int, int]] = []
    verdicts: list[int] = []
    for b, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        tokens[b, : len(tree)], depth[b, : len(tree)], end[b, : len(tree)] = tree.tokens, tree.depth, tree.end
        start, size = len(row.prompt), len(row.answer)
        learnt = np.asarray(row.learnt, bool)
        next_token[b, start - 1 : start + size - 1][learnt] = np.asarray(row.answer)[learnt]
        wrong = size if row.first_wrong is None else row.first_wrong
        slip[b, start : start + wrong] = 0
        slip[b, start + wrong : start + min(wrong + 1, size)] = 1
        astray[b, start : start + size] = np.arange(size) >= wrong
        ends = suffix_end_nodes(start + size, row.cuts, len(ask.token_ids))
        at += [(b, int(node)) for node in ends]
        verdicts += [
            ask.correct_token_ids[0] if row.right_up_to(cut) else ask.incorrect_token_ids[0] for cut in row.cuts
        ]
    node = torch.arange(width)
    ends_ = torch.from_numpy(end)
    visible = (node <= node[:, None]) & (node[None, :, None] < ends_[:, None, :])
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(depth),
        visible[:, None],
        torch.from_numpy(next_token),
        torch.from_numpy(slip),
        torch.from_numpy(astray),
        torch.tensor(at, dtype=torch.long).reshape(-1, 2),
        torch.tensor(verdicts, dtype=torch.long),
    )
