"""Training examples: a question, an answer, and verification suffixes for its prefixes, under the tree's mask.

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
from parse.tree import trunk_with_suffixes
from training.mistakes import MISTAKE_KINDS, Voice, compose_answer, scramble_words
from training.task import WORD, Problem, check_answer
from training.tokenizer import CORRECT, INCORRECT, SYSTEM_PROMPTS, VERIFICATION_PROMPT
from training.verification_tree import suffix_end_nodes
from training.wording import LINES

IGNORE_INDEX = -100  # cross_entropy's own mark


@dataclass(frozen=True)
class TrainingExample:
    prompt: Sequence[int]
    answer: Sequence[int]  # with the end token if the answer is complete
    trainable: Sequence[bool]  # per answer token: does the model learn to generate it?
    first_wrong: int | None  # index into the answer
    prefix_lengths: Sequence[int]

    def num_tokens(self, verification_suffix: VerificationSuffix) -> int:
        return len(self.prompt) + len(self.answer) + len(self.prefix_lengths) * len(verification_suffix.token_ids)

    def is_correct_up_to(self, prefix_length: int) -> bool:
        return self.first_wrong is None or prefix_length <= self.first_wrong


@dataclass(frozen=True)
class TrainingBatch:
    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    visible: Tensor  # [B, 1, T, T] bool
    next_token: Tensor  # [B, T], IGNORED where nothing is to be learnt
    slip: Tensor  # [B, T], 1 at the first wrong token, 0 before it, IGNORED elsewhere
    astray: Tensor  # [B, T], 1 from the first wrong token on, 0 before it, IGNORED outside answers
    verification_nodes: Tensor  # [V, 2], (example, node) of the end of each suffix
    verification_labels: Tensor  # [V], the correct answer token

    def to(self, device: torch.device) -> "TrainingBatch":
        return TrainingBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class ExampleBuilder:
    """Turns problems into examples. `own` is the wording that the trained model uses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: int) -> None:
        self.tokenizer, self.wording = tokenizer, own
        self.verification_suffix: VerificationSuffix = build_verification_suffix(
            tokenizer, VERIFICATION_PROMPT, CORRECT, INCORRECT
        )
        assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None
        self.eos_token_id, self.pad_token_id = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
        self.token_ids = cache(self._encode)
        self.token_text = cache(self._decode)

    def prompt(self, problem: Problem, rng: random.Random | None = None) -> list[int]:
        messages = [{"role": "user", "content": problem.question}]
        if rng and rng.random() < 0.15:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        return chat_prompt_token_ids(self.tokenizer, messages)

    def build_synthetic(
        self, problem: Problem, rng: random.Random, *, foreign: float, mistaken: float, num_prefixes: int
    ) -> TrainingExample:
        """Returns a synthetic answer. `foreign` is the share of answers not entirely in the model's own wording."""
        kind = rng.choice(MISTAKE_KINDS) if rng.random() < mistaken else None
        phrases = compose_answer(problem, rng, self._draw_voice(problem, rng, foreign), kind)
        answer: list[int] = []
        trainable: list[bool] = []
        for phrase in phrases:
            phrase_ids = self.token_ids(phrase.text)
            answer += phrase_ids
            # Where another wording begins, the model would have used its own. After that it has to continue it.
            trainable += [phrase.wording in (None, self.wording)] + [True] * (len(phrase_ids) - 1)
        if kind and rng.random() < 0.06:  # and sometimes a word that does not fit at all
            answer[rng.randrange(len(answer))] = rng.choice(answer + list(self.token_ids(problem.question)))
        return self._build(problem, rng, [*answer, self.eos_token_id], [*trainable, True], num_prefixes)

    def build_scrambled(self, problem: Problem, rng: random.Random, *, foreign: float, share: float) -> TrainingExample:
        """Returns an answer with many words replaced, which only trains the detection of wrong tokens."""
        text = "".join(phrase.text for phrase in compose_answer(problem, rng, self._draw_voice(problem, rng, foreign)))
        words = scramble_words(problem, WORD.findall(text), rng, share)
        answer = [token for word in words for token in self.token_ids(word)]
        return self._build(problem, rng, answer, [False] * len(answer), 0)

    def build_from_draft(
        self, problem: Problem, answer: Sequence[int], rng: random.Random, num_prefixes: int
    ) -> TrainingExample:
        """Returns a draft of the draft model, which is verified but not learned from."""
        return self._build(problem, rng, answer, [False] * len(answer), num_prefixes)

    def _build(
        self, problem: Problem, rng: random.Random, answer: Sequence[int], trainable: Sequence[bool], num_prefixes: int
    ) -> TrainingExample:
        ended = answer[-1] == self.eos_token_id
        text = answer[:-1] if ended else answer
        result = check_answer(problem, [self.token_text(token) for token in text])
        first_wrong = result.first_wrong
        if first_wrong is None and ended and not result.complete:
            first_wrong = len(text)  # correct so far, but it ends too early
        prefix_lengths = {len(text)} if num_prefixes else set()
        if num_prefixes and first_wrong is not None and first_wrong < len(text):
            prefix_lengths |= {first_wrong + 1, max(first_wrong, 1)}  # the hardest two
        while len(prefix_lengths) < min(num_prefixes, len(text)):
            prefix_lengths.add(rng.randint(1, len(text)))
        num_trainable = len(answer) if first_wrong is None else first_wrong
        trainable_until_error = [flag and k < num_trainable for k, flag in enumerate(trainable)]
        return TrainingExample(
            self.prompt(problem, rng), answer, trainable_until_error, first_wrong, sorted(prefix_lengths)
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _draw_voice(self, problem: Problem, rng: random.Random, foreign: float) -> Voice:
        """Draws the own wording, the other model's wording up to some part, or a wording for each part."""
        if rng.random() >= foreign:
            return lambda line, part: self.wording
        if rng.random() < 0.3:
            return lambda line, part: None
        other = 1 - self.wording
        parts = len(LINES[problem.family])
        until = (problem.steps + 1, 0) if rng.random() < 0.3 else (rng.randint(0, problem.steps), rng.randrange(parts))
        return lambda line, part: other if (line, part) < until else self.wording


def collate(
    examples: Sequence[TrainingExample], verification_suffix: VerificationSuffix, pad: int, multiple: int = 8
) -> TrainingBatch:
    trees = [
        trunk_with_suffixes(
            [*example.prompt, *example.answer],
            [len(example.prompt) + prefix_length for prefix_length in example.prefix_lengths],
            verification_suffix.token_ids,
        )
        for example in examples
    ]
    width = -(-max(map(len, trees)) // multiple) * multiple
    shape = len(examples), width
    tokens, depth = np.full(shape, pad), np.zeros(shape, np.int64)
    # A padding node sees itself alone (its end is one past it), so that its softmax is defined.
    end = np.tile(np.arange(width) + 1, (len(examples), 1))
    next_token, slip, astray = (np.full(shape, IGNORE_INDEX) for _ in range(3))
    verification_nodes: list[tuple[int, int]] = []
    verification_labels: list[int] = []
    for b, (example, tree) in enumerate(zip(examples, trees, strict=True)):
        tokens[b, : len(tree)], depth[b, : len(tree)], end[b, : len(tree)] = tree.tokens, tree.depth, tree.end
        start, size = len(example.prompt), len(example.answer)
        trainable = np.asarray(example.trainable, bool)
        next_token[b, start - 1 : start + size - 1][trainable] = np.asarray(example.answer)[trainable]
        first_wrong = size if example.first_wrong is None else example.first_wrong
        slip[b, start : start + first_wrong] = 0
        slip[b, start + first_wrong : start + min(first_wrong + 1, size)] = 1
        astray[b, start : start + size] = np.arange(size) >= first_wrong
        answer_nodes = suffix_end_nodes(start + size, example.prefix_lengths, len(verification_suffix.token_ids))
        verification_nodes += [(b, int(node)) for node in answer_nodes]
        verification_labels += [
            verification_suffix.correct_token_ids[0]
            if example.is_correct_up_to(prefix_length)
            else verification_suffix.incorrect_token_ids[0]
            for prefix_length in example.prefix_lengths
        ]
    node = torch.arange(width)
    subtree_ends = torch.from_numpy(end)
    visible = (node <= node[:, None]) & (node[None, :, None] < subtree_ends[:, None, :])
    return TrainingBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(depth),
        visible[:, None],
        torch.from_numpy(next_token),
        torch.from_numpy(slip),
        torch.from_numpy(astray),
        torch.tensor(verification_nodes, dtype=torch.long).reshape(-1, 2),
        torch.tensor(verification_labels, dtype=torch.long),
    )
