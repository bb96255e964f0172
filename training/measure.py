"""The figures of a pair: how often each model is right, what each token costs, and how well the target judges."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parse.acceptance import Thresholds, accepted_prefix_length
from parse.prefixes import prefix_lengths_every
from parse.tree import suffix_forest, trunk_with_suffixes
from training.judging import cached, probabilities, run
from training.rows import Writer
from training.task import Problem, check, problem
from training.wording import TARGET
from training.writing import write


@dataclass(frozen=True)
class Pair:
    draft: PreTrainedModel
    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def writer(self) -> Writer:
        return Writer(self.tokenizer, own=TARGET)


@dataclass(frozen=True)
class Judged:
    """A real draft, the checker's word on it, and the verifier's."""

    given: Problem
    tokens: tuple[int, ...]  # without the end token
    ended: bool
    first_wrong: int | None
    complete: bool
    cuts: tuple[int, ...]
    correct: tuple[float, ...]  # P at each cut

    @property
    def right(self) -> bool:
        return self.complete and self.ended

    def prefix_right(self, cut: int) -> bool:
        """The cut at the end asks about the full answer."""
        if cut == len(self.tokens) and self.ended:
            return self.right
        return self.first_wrong is None or cut <= self.first_wrong

    def kept(self, thresholds: Thresholds) -> int:
        return accepted_prefix_length(self.cuts, self.correct, thresholds, ended=self.ended)


def problems(seed: int, count: int, split: str = "evaluation") -> list[Problem]:
    return [problem(split, seed, index) for index in range(count)]


def whole(writer: Writer, given: Problem, answer: Sequence[int]) -> bool:
    """The answer ended by itself and every step of it is right."""
    if not answer or answer[-1] != writer.end:
        return False
    return check(given, [writer.piece(token) for token in answer[:-1]]).complete


def accuracy(writer: Writer, given: Sequence[Problem], answers: Sequence[Sequence[int]]) -> float:
    return statistics.mean(whole(writer, g, answer) for g, answer in zip(given, answers, strict=True))


def answers(model: PreTrainedModel, writer: Writer, given: Sequence[Problem]) -> list[list[int]]:
    return write(model, writer.tokenizer, [writer.prompt(g) for g in given])


def judged(pair: Pair, given: Sequence[Problem], drafts: Sequence[Sequence[int]], stride: int) -> list[Judged]:
    writer = pair.writer
    out = []
    for g, draft in zip(given, drafts, strict=True):
        ended = draft[-1] == writer.end
        tokens = tuple(draft[:-1] if ended else draft)
        found = check(g, [writer.piece(token) for token in tokens])
        cuts = prefix_lengths_every(stride, len(tokens), ended=ended)
        correct = probabilities(pair.target, writer.prompt(g), tokens, cuts, writer.check)
        out.append(Judged(g, tokens, ended, found.first_wrong, found.complete, tuple(cuts), tuple(correct)))
    return out


def verifier(drafts: Sequence[Judged], thresholds: Thresholds) -> dict[str, float]:
    """The verifier's figures on real drafts, under the rule that decides what is kept."""
    kept = [draft.kept(thresholds) for draft in drafts]
    right = [k == len(d.tokens) for d, k in zip(drafts, kept, strict=True) if d.right]
    wrong = [(d, k) for d, k in zip(drafts, kept, strict=True) if not d.right]
    prefixes = [(cut <= k, d.prefix_right(cut)) for d, k in zip(drafts, kept, strict=True) for cut in d.cuts]
    both = sum(kept_ and right_ for kept_, right_ in prefixes)
    return {
        "right_accepted_whole": _mean(right),
        "wrong_accepted_whole": _mean([k == len(d.tokens) for d, k in wrong]),
        "kept_past_error": _mean([d.first_wrong is not None and k > d.first_wrong for d, k in wrong]),
        "prefix_precision": both / max(1, sum(kept_ for kept_, _ in prefixes)),
        "prefix_recall": both / max(1, sum(right_ for _, right_ in prefixes)),
        "accepted_share": _mean([k / len(d.tokens) for d, k in zip(drafts, kept, strict=True)]),
        "oracle_share": _mean([_oracle(d) / len(d.tokens) for d in drafts]),
    }


def _oracle(draft: Judged) -> int:
    """What a checker that is never wrong would keep, at any token."""
    return len(draft.tokens) if draft.first_wrong is None else draft.first_wrong


def reliability(drafts: Sequence[Judged], bins: int = 10) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error, and per bin of P(correct): mean P, share right, count."""
    points = [(p, d.prefix_right(cut)) for d in drafts for cut, p in zip(d.cuts, d.correct, strict=True)]
    curve = []
    for k in range(bins):
        inside = [(p, right) for p, right in points if k / bins <= p < (k + 1) / bins or (k == bins - 1 and p == 1.0)]
        if inside:
            curve.append((_mean([p for p, _ in inside]), _mean([right for _, right in inside]), len(inside)))
    return sum(abs(p - share) * count for p, share, count in curve) / max(1, len(points)), curve


def continuation_accuracy(pair: Pair, drafts: Sequence[Judged], seed: int) -> float:
    """The target going on from a right prefix of a real draft, cut at random."""
    writer, rng = pair.writer, random.Random(seed)
    prefixes = []
    for draft in drafts:
        rights = [cut for cut in draft.cuts if cut < len(draft.tokens) and draft.prefix_right(cut)]
        if rights:
            prefixes.append((draft.given, draft.tokens[: rng.choice(rights)]))
    prompts = [[*writer.prompt(given), *prefix] for given, prefix in prefixes]
    rests = write(pair.target, pair.tokenizer, prompts)
    return _mean(
        [whole(writer, given, [*prefix, *rest]) for (given, prefix), rest in zip(prefixes, rests, strict=True)]
    )


@torch.inference_mode()
def token_agreement(pair: Pair, drafts: Sequence[Judged]) -> float:
    """How often the target's own next token is the draft's, the draft's text given."""
    writer = pair.writer
    same = total = 0
    for draft in drafts:
        prompt = writer.prompt(draft.given)
        tokens = torch.tensor([[*prompt, *draft.tokens]], device=pair.target.device)
        choice = pair.target(input_ids=tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        same += int((choice == tokens[0, len(prompt) :]).sum())
        total += len(draft.tokens)
    return same / max(1, total)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of bare forwards on one thread, medians."""

    draft_token: float
    target_token: float
    draft_prompt: float
    target_prompt: float
    judge_whole: float  # of one draft, the question cached: the full answer alone
    judge_prefixes: float  # and all its prefixes, when that did not pass


def costs(pair: Pair, drafts: Sequence[Judged], repeats: int = 25) -> Costs:
    return median([costs_of(pair, draft) for draft in drafts[:repeats]])


def costs_of(pair: Pair, draft: Judged) -> Costs:
    """Models take turns, so that a change of the machine's pace falls on both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Costs(
            _token_ms(pair.draft, pair, draft),
            _token_ms(pair.target, pair, draft),
            _prompt_ms(pair.draft, pair, draft),
            _prompt_ms(pair.target, pair, draft),
            *_judge_ms(pair, draft),
        )
    finally:
        torch.set_num_threads(threads)


def median(rounds: Sequence[Costs]) -> Costs:
    return Costs(*(statistics.median(column) for column in zip(*map(astuple, rounds), strict=True)))


@torch.inference_mode()
def _token_ms(model: PreTrainedModel, pair: Pair, draft: Judged, tokens: int = 32) -> float:
    context = cached(model, pair.writer.prompt(draft.given))
    step = torch.tensor([[draft.tokens[0]]], device=model.device)
    model(input_ids=step, past_key_values=context, use_cache=True)
    started = time.perf_counter()
    for _ in range(tokens):
        model(input_ids=step, past_key_values=context, use_cache=True).logits[0, -1].argmax().item()
    return (time.perf_counter() - started) / tokens * 1e3


def _prompt_ms(model: PreTrainedModel, pair: Pair, draft: Judged) -> float:
    prompt = pair.writer.prompt(draft.given)
    started = time.perf_counter()
    cached(model, prompt)
    return (time.perf_counter() - started) * 1e3


def _judge_ms(pair: Pair, draft: Judged) -> tuple[float, float]:
    """The draft with a probe at its end; then, on what is cached by now, the probes at all cuts before it."""
    writer = pair.writer
    suffix, size, before = writer.check.token_ids, len(draft.tokens), len(writer.prompt(draft.given))
    whole = trunk_with_suffixes(draft.tokens, [size], suffix)
    prefixes = suffix_forest([before + cut for cut in draft.cuts[:-1]], suffix)
    seconds = []
    for _ in range(3):
        context = cached(pair.target, writer.prompt(draft.given))
        started = time.perf_counter()
        run(pair.target, whole, torch.tensor([len(whole) - 1]), context).softmax(-1).tolist()
        passed = time.perf_counter()
        context.crop(-len(suffix))
        resumed = time.perf_counter()
        run(pair.target, prefixes, torch.arange(len(suffix) - 1, len(prefixes), len(suffix)), context).softmax(
            -1
        ).tolist()
        seconds.append((passed - started, time.perf_counter() - resumed))
    whole_s, prefixes_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return whole_s * 1e3, prefixes_s * 1e3


def ideal_speedup(
    cost: Costs, drafts: Sequence[Judged], own: Sequence[Sequence[int]], accepted_share: float, whole_share: float
) -> float:
    """The target's own time for its answers over draft, verification and the rest, from bare forward costs."""
    alone = _mean([len(answer) for answer in own]) * cost.target_token
    drafting = _mean([len(draft.tokens) for draft in drafts]) * cost.draft_token
    judging = cost.judge_whole + (1 - whole_share) * cost.judge_prefixes
    return 1 / (drafting / alone + judging / alone + 1 - accepted_share)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
