"""Programs that verify a draft, alone or followed by the generation of the rest."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parse.acceptance import next_batch
from parse.engines.native.generation import Program, TreeInput, TreeOutput, TreeProgram
from parse.engines.native.sampler import token_logprobs
from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.tree import TokenTree, suffix_forest, trunk_with_suffixes
from parse.types import Logprob, VerifyResult


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How an engine runs verifications."""

    max_nodes: int
    """Suffix tokens in one forward pass."""
    max_model_len: int
    """Prefixes whose suffix would reach beyond it are not evaluated."""
    pass_seconds: Callable[[int], float] | None
    """Returns how long a pass takes, by its number of tokens. If it is known, the first failure is searched."""
    answer_first: bool
    """Whether a complete answer is evaluated alone, before its prefixes.

    If False, the answer and its prefixes are evaluated together, which is cheaper where the number of passes dominates
    the cost."""


@dataclass(frozen=True, slots=True)
class VerifyOutput:
    """The result of a verification, and what its passes computed for later use."""

    result: VerifyResult
    next_token_logits: Mapping[int, Tensor]
    """[1, vocabulary] after each prefix, by its length. Empty without a trunk."""
    accepted_path: Sequence[int]
    """The nodes that the next tree input has to commit, so that the context holds the draft up to the last prefix."""
    aux_hidden_states: Callable[[Sequence[int]], Tensor] | None
    """As in `TreeOutput`, valid until the program yields again."""


def verify(
    request: VerifyRequest, options: VerifyOptions, trunk: Sequence[int]
) -> Generator[TreeInput, TreeOutput, VerifyOutput]:
    """Evaluates P(correct) of the prefixes that can change the result.

    Without a trunk, the context is prompt, output and draft up to the last prefix. With a trunk, it ends before the
    trunk. The trunk holds the tokens whose logits the caller needs. It starts with the last token before the draft, or
    with the last token that an earlier call accepted, and ends with the last prefix. The first pass runs the trunk and
    the first suffixes as one tree, because logits are returned for nodes only.
    """
    suffix, lengths = request.suffix, request.prefix_lengths
    width = len(suffix.token_ids)
    start = len(request.prompt_token_ids) + len(request.output_token_ids)
    context_length = start + request.num_computed_draft_tokens - len(trunk)
    num_evaluable = sum(1 for length in lengths if start + length + width <= options.max_model_len)
    complete = request.draft_complete and num_evaluable == len(lengths)
    p_correct: dict[int, float | None] = {}
    answer_mass: dict[int, float] = {}
    min_answer_mass = request.policy.min_answer_mass if request.policy else 0.0
    draft_logprobs: list[Logprob] = []
    next_token_logits: dict[int, Tensor] = {}
    accepted_path: Sequence[int] = ()
    tree_output: TreeOutput | None = None
    pass_seconds = options.pass_seconds
    batch_seconds = None if pass_seconds is None else lambda size: pass_seconds(size * width)
    while True:
        batch = next_batch(
            num_evaluable,
            p_correct,
            request.policy,
            complete=complete,
            max_batch=max(1, options.max_nodes // width),
            answer_first=options.answer_first,
            batch_seconds=batch_seconds,
        )
        runs_trunk = bool(trunk) and tree_output is None
        if not batch and not runs_trunk:
            break
        batch.reverse()  # after the trunk, `trunk_with_suffixes` puts the suffix of the longest prefix first
        positions = [start + lengths[index] for index in batch]
        trunk_nodes: list[int] = []
        if not runs_trunk:
            nodes: TokenTree | Sequence[int] = suffix_forest(positions, suffix.token_ids)
        else:
            nodes = _trunk_with_suffixes(trunk, [end - context_length for end in positions], suffix.token_ids)
            last_nodes = {0, *(start + length - context_length - 1 for length in lengths)}  # of each prefix
            trunk_nodes = sorted(last_nodes) if request.num_logprobs is None else list(range(len(trunk)))
        answer_nodes = range((len(trunk) if runs_trunk else 0) + width - 1, len(nodes), width)
        tree_output = yield TreeInput(nodes, logits_nodes=[*trunk_nodes, *answer_nodes], accepted_path=accepted_path)
        accepted_path = range(len(trunk)) if runs_trunk else ()
        trunk_logits, logits = tree_output.logits.split([len(trunk_nodes), len(answer_nodes)])
        if runs_trunk:
            trunk_logits = trunk_logits.clone()  # further passes may follow
            trunk_lengths = [context_length + node + 1 - start for node in trunk_nodes]
            next_token_logits = dict(zip(trunk_lengths, trunk_logits.split(1), strict=True))
            if request.num_logprobs is not None:
                draft_logprobs = token_logprobs(trunk_logits[:-1], trunk[1:], request.num_logprobs)
        answer_mass.update(zip(batch, _answer_mass(logits, suffix), strict=True))
        is_reliable = [answer_mass[index] >= min_answer_mass for index in batch]
        # None passes no threshold, not even 0.
        values = [p if reliable else None for p, reliable in zip(_p_correct(logits, suffix), is_reliable, strict=True)]
        p_correct.update(zip(batch, values, strict=True))
    return VerifyOutput(
        VerifyResult(
            tuple(p_correct.get(index) for index in range(len(lengths))),
            tuple(draft_logprobs),
            answer_mass=tuple(answer_mass.get(index) for index in range(len(lengths))),
        ),
        next_token_logits,
        accepted_path,
        tree_output.aux_hidden_states if tree_output is not None else None,
    )


def _p_correct(logits: Tensor, suffix: VerificationSuffix) -> list[float]:
    """Returns P(correct) for each row of logits [n, vocabulary]."""
    answers = (suffix.correct_token_ids, suffix.incorrect_token_ids)
    answer_logits = torch.stack([logits[:, list(token_ids)].logsumexp(-1) for token_ids in answers])
    p_correct: list[float] = answer_logits.softmax(0)[0].tolist()
    return p_correct


def _answer_mass(logits: Tensor, suffix: VerificationSuffix) -> list[float]:
    """Returns the probability of all answer tokens together, for each row of logits [n, vocabulary]."""
    token_ids = list({*suffix.correct_token_ids, *suffix.incorrect_token_ids})
    log_mass = logits[:, token_ids].logsumexp(-1) - logits.logsumexp(-1)
    mass: list[float] = log_mass.exp().tolist()
    return mass


def _trunk_with_suffixes(
    trunk: Sequence[int], prefix_lengths: Sequence[int], suffix: Sequence[int]
) -> TokenTree | Sequence[int]:
    """Returns the tree of `trunk_with_suffixes`.

    A chain is returned as token ids, which attention computes faster.
    """
    if not prefix_lengths:
        return trunk
    if prefix_lengths == [len(trunk)]:
        return [*trunk, *suffix]
    return trunk_with_suffixes(trunk, prefix_lengths, suffix)


def verify_only(
    request: VerifyRequest, options: VerifyOptions, trunk: Sequence[int], *, emit: Callable[[VerifyResult], None]
) -> TreeProgram:
    """Passes the result of the verification to `emit`."""
    output = yield from verify(request, options, trunk)
    emit(output.result)
    if output.accepted_path:
        yield TreeInput((), logits_nodes=(), accepted_path=output.accepted_path)  # a later call can reuse it


def verify_and_generate(
    request: VerifyAndGenerateRequest,
    options: VerifyOptions,
    trunk: Sequence[int],
    *,
    emit: Callable[[VerifyResult], None],
    start_generation: Callable[[GenerateRequest, TreeOutput], Program],
) -> Program:
    """Passes the result of the verification to `emit`, then generates the rest.

    The verification has computed the first token of the continuation as well. `start_generation` returns the program
    that generates, given the output at the last token of the accepted prefix.
    """
    output = yield from verify(request.verify, options, trunk)
    emit(output.result)
    num_accepted = request.accepted_prefix_length(output.result)
    continuation = request.continuation(num_accepted)
    context_length = len(request.verify.prompt_token_ids) + len(request.verify.output_token_ids) + num_accepted
    yield TreeInput(
        (),
        logits_nodes=(),
        accepted_path=output.accepted_path,
        context_length=None if continuation is None else context_length,
    )
    if continuation is not None:
        last_output = TreeOutput(output.next_token_logits[num_accepted], (), output.aux_hidden_states)
        yield from start_generation(continuation, last_output)
