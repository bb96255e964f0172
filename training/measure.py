"""The figures of a pair: the accuracy of each model, the cost of a token, and the quality of the verification."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.acceptance import AcceptancePolicy, Thresholds, accepted_prefix_length
from parse.prefixes import prefix_lengths_every
from parse.tree import suffix_forest, trunk_with_suffixes
from training.examples import ExampleBuilder
from training.generation import generate_batch
from training.prefix_verification import prefill, prefix_probabilities, tree_logits
from training.task import Problem, check_answer, draw_problem
from training.wording import TARGET


@dataclass(frozen=True)
class ModelPair:
    draft: PreTrainedModel
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def example_builder(self) -> ExampleBuilder:
        return ExampleBuilder(self.tokenizer, own=TARGET)


@dataclass(frozen=True)
class VerifiedDraft:
    """A real draft with the results of the checker and of the verifier."""

    problem: Problem
    tokens: tuple[int, ...]  # without the end token
    ended: bool
    first_wrong: int | None
    complete: bool
    prefix_lengths: tuple[int, ...]
    correct: tuple[float, ...]  # P(correct) of each prefix

    @property
    def is_correct(self) -> bool:
        return self.complete and self.ended

    def is_prefix_correct(self, prefix_length: int) -> bool:
        """Is the prefix correct? The last prefix of a complete draft is the complete answer."""
        if prefix_length == len(self.tokens) and self.ended:
            return self.is_correct
        return self.first_wrong is None or prefix_length <= self.first_wrong

    def accepted_prefix_length(self, thresholds: Thresholds) -> int:
        policy = AcceptancePolicy(thresholds)
        return accepted_prefix_length(self.prefix_lengths, self.correct, policy, complete=self.ended)


def draw_problems(seed: int, count: int, split: str = "evaluation") -> list[Problem]:
    return [draw_problem(split, seed, index) for index in range(count)]


def is_correct(builder: ExampleBuilder, problem: Problem, answer: Sequence[int]) -> bool:
    """Is the answer complete and every step of it right?"""
    if not answer or answer[-1] != builder.eos_token_id:
        return False
    return check_answer(problem, [builder.token_text(token) for token in answer[:-1]]).complete


def accuracy(builder: ExampleBuilder, problems: Sequence[Problem], answers: Sequence[Sequence[int]]) -> float:
    return statistics.mean(is_correct(builder, g, answer) for g, answer in zip(problems, answers, strict=True))


def generate_answers(model: PreTrainedModel, builder: ExampleBuilder, problems: Sequence[Problem]) -> list[list[int]]:
    return generate_batch(model, builder.tokenizer, [builder.prompt(g) for g in problems])


def verify_drafts(
    pair: ModelPair, problems: Sequence[Problem], drafts: Sequence[Sequence[int]], stride: int
) -> list[VerifiedDraft]:
    builder = pair.example_builder
    verified = []
    for g, draft in zip(problems, drafts, strict=True):
        ended = draft[-1] == builder.eos_token_id
        tokens = tuple(draft[:-1] if ended else draft)
        result = check_answer(g, [builder.token_text(token) for token in tokens])
        prefix_lengths = prefix_lengths_every(stride, len(tokens), complete=ended)
        correct = prefix_probabilities(
            pair.target, builder.prompt(g), tokens, prefix_lengths, builder.verification_suffix
        )
        verified.append(
            VerifiedDraft(g, tokens, ended, result.first_wrong, result.complete, tuple(prefix_lengths), tuple(correct))
        )
    return verified


def verifier_metrics(drafts: Sequence[VerifiedDraft], thresholds: Thresholds) -> dict[str, float]:
    """Returns the verifier's figures on real drafts, with the acceptance rule of the service."""
    accepted = [draft.accepted_prefix_length(thresholds) for draft in drafts]
    correct_accepted_whole = [k == len(d.tokens) for d, k in zip(drafts, accepted, strict=True) if d.is_correct]
    incorrect = [(d, k) for d, k in zip(drafts, accepted, strict=True) if not d.is_correct]
    prefixes = [
        (length <= k, d.is_prefix_correct(length))
        for d, k in zip(drafts, accepted, strict=True)
        for length in d.prefix_lengths
    ]
    both = sum(is_accepted and is_correct for is_accepted, is_correct in prefixes)
    return {
        "right_accepted_whole": _mean(correct_accepted_whole),
        "wrong_accepted_whole": _mean([k == len(d.tokens) for d, k in incorrect]),
        "kept_past_error": _mean([d.first_wrong is not None and k > d.first_wrong for d, k in incorrect]),
        "prefix_precision": both / max(1, sum(is_accepted for is_accepted, _ in prefixes)),
        "prefix_recall": both / max(1, sum(is_correct for _, is_correct in prefixes)),
        "accepted_share": _mean([k / len(d.tokens) for d, k in zip(drafts, accepted, strict=True)]),
        "oracle_share": _mean([_oracle_prefix_length(d) / len(d.tokens) for d in drafts]),
    }


def _oracle_prefix_length(draft: VerifiedDraft) -> int:
    """Returns the length that a perfect verifier would accept, at any token."""
    return len(draft.tokens) if draft.first_wrong is None else draft.first_wrong


def reliability(drafts: Sequence[VerifiedDraft], bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error, and per bin of P(correct): mean P, share right, count."""
    points = [
        (p, d.is_prefix_correct(length)) for d in drafts for length, p in zip(d.prefix_lengths, d.correct, strict=True)
    ]
    curve = []
    for k in range(bins):
        in_bin = [
            (p, is_correct)
            for p, is_correct in points
            if k / bins <= p < (k + 1) / bins or (k == bins - 1 and p == 1.0)
        ]
        if in_bin:
            curve.append((_mean([p for p, _ in in_bin]), _mean([is_correct for _, is_correct in in_bin]), len(in_bin)))
    return sum(abs(p - share) * count for p, share, count in curve) / max(1, len(points)), curve


def continuation_accuracy(pair: ModelPair, drafts: Sequence[VerifiedDraft], seed: int) -> float:
    """Returns the target's accuracy when it continues a random correct prefix of a real draft."""
    builder, rng = pair.example_builder, random.Random(seed)
    prefixes = []
    for draft in drafts:
        correct_lengths = [
            length for length in draft.prefix_lengths if length < len(draft.tokens) and draft.is_prefix_correct(length)
        ]
        if correct_lengths:
            prefixes.append((draft.problem, draft.tokens[: rng.choice(correct_lengths)]))
    prompts = [[*builder.prompt(problem), *prefix] for problem, prefix in prefixes]
    rests = generate_batch(pair.target, pair.tokenizer, prompts)
    return _mean(
        [
            is_correct(builder, problem, [*prefix, *rest])
            for (problem, prefix), rest in zip(prefixes, rests, strict=True)
        ]
    )


@torch.inference_mode()
def token_agreement(pair: ModelPair, drafts: Sequence[VerifiedDraft]) -> float:
    """Returns how often the target would choose the next token of the draft."""
    builder = pair.example_builder
    num_equal = total = 0
    for draft in drafts:
        prompt = builder.prompt(draft.problem)
        tokens = torch.tensor([[*prompt, *draft.tokens]], device=pair.target.device)
        choice = pair.target(input_ids=tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        num_equal += int((choice == tokens[0, len(prompt) :]).sum())
        total += len(draft.tokens)
    return num_equal / max(1, total)


@dataclass(frozen=True)
class ForwardCosts:
    """Milliseconds of bare forwards on one thread, medians."""

    draft_token: float
    target_token: float
    draft_prompt: float
    target_prompt: float
    judge_whole: float  # verification of a complete draft with a cached prompt: the last prefix alone
    judge_prefixes: float  # and all other prefixes, if that one did not pass


def measure_costs(pair: ModelPair, drafts: Sequence[VerifiedDraft], repeats: int = 25) -> ForwardCosts:
    return median_costs([measure_draft_costs(pair, draft) for draft in drafts[:repeats]])


def measure_draft_costs(pair: ModelPair, draft: VerifiedDraft) -> ForwardCosts:
    """Measures both models alternately, so that changes of the machine's speed affect both."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ForwardCosts(
            _token_ms(pair.draft, pair, draft),
            _token_ms(pair.target, pair, draft),
            _prompt_ms(pair.draft, pair, draft),
            _prompt_ms(pair.target, pair, draft),
            *_verify_ms(pair, draft),
        )
    finally:
        torch.set_num_threads(num_threads)


def median_costs(rounds: Sequence[ForwardCosts]) -> ForwardCosts:
    return ForwardCosts(*(statistics.median(column) for column in zip(*map(astuple, rounds), strict=True)))


@torch.inference_mode()
def _token_ms(model: PreTrainedModel, pair: ModelPair, draft: VerifiedDraft, tokens: int = 32) -> float:
    past_key_values = prefill(model, pair.example_builder.prompt(draft.problem))
    step = torch.tensor([[draft.tokens[0]]], device=model.device)
    model(input_ids=step, past_key_values=past_key_values, use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        model(input_ids=step, past_key_values=past_key_values, use_cache=True).logits[0, -1].argmax().item()
    return (time.perf_counter() - started) / tokens * 1e3


def _prompt_ms(model: PreTrainedModel, pair: ModelPair, draft: VerifiedDraft) -> float:
    prompt = pair.example_builder.prompt(draft.problem)
    started = time.perf_counter()
    prefill(model, prompt)
    return (time.perf_counter() - started) * 1e3


def _verify_ms(pair: ModelPair, draft: VerifiedDraft) -> tuple[float, float]:
    """Returns the time to verify the complete draft, and then, with the draft cached, all shorter prefixes."""
    builder = pair.example_builder
    suffix, size, prompt_length = (
        builder.verification_suffix.token_ids,
        len(draft.tokens),
        len(builder.prompt(draft.problem)),
    )
    full_answer = trunk_with_suffixes(draft.tokens, [size], suffix)
    prefixes = suffix_forest([prompt_length + length for length in draft.prefix_lengths[:-1]], suffix)
    seconds = []
    for _ in range(3):
        past_key_values = prefill(pair.target, builder.prompt(draft.problem))
        started = time.perf_counter()
        tree_logits(pair.target, full_answer, torch.tensor([len(full_answer) - 1]), past_key_values).softmax(
            -1
        ).tolist()
        full_answer_done = time.perf_counter()
        past_key_values.crop(-len(suffix))
        resumed = time.perf_counter()
        tree_logits(
            pair.target, prefixes, torch.arange(len(suffix) - 1, len(prefixes), len(suffix)), past_key_values
        ).softmax(-1).tolist()
        seconds.append((full_answer_done - started, time.perf_counter() - resumed))
    full_answer_s, prefixes_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return full_answer_s * 1e3, prefixes_s * 1e3


def ideal_speedup(
    cost: ForwardCosts,
    drafts: Sequence[VerifiedDraft],
    target_answers: Sequence[Sequence[int]],
    accepted_share: float,
    full_answer_share: float,
) -> float:
    """Returns the target's time alone over the time with drafts, computed from the costs of forward passes."""
    target_only = _mean([len(answer) for answer in target_answers]) * cost.target_token
    drafting = _mean([len(draft.tokens) for draft in drafts]) * cost.draft_token
    verification = cost.judge_whole + (1 - full_answer_share) * cost.judge_prefixes
    return 1 / (drafting / target_only + verification / target_only + 1 - accepted_share)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
