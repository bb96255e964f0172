"""Programs: what a request does, written as a generator of trees to run on its context.

A program yields the next tree, together with the nodes of the previous tree that now belong to its context. It
receives the logits. It does not depend on batches, memory or threads, so it can be preempted at any point.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parse.acceptance import next_batch
from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.sampler import Sampler, SamplingState, sample, token_logprobs
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, chain_proposal
from parse.speculative.proposal_policy import ProposalCall, SequenceSpeculation
from parse.tree import MASK, TokenTree, child, suffix_forest, tree_from_parents, trunk_with_suffixes
from parse.types import FinishReason, Logprob, SpeculationStats, TokenDelta, VerifyResult


@dataclass(frozen=True, slots=True)
class TreeInput:
    """A tree to run on the end of the context."""

    nodes: TokenTree | Sequence[int]
    logits_nodes: Sequence[int] | None = None
    """The nodes whose logits the program reads. None means all."""
    accepted_path: Sequence[int] = ()
    """The path from a root, in the tree that was run before, that now belongs to the context."""
    sampling_states: Sequence[SamplingState] = ()
    """How a token is chosen at each of `logits_nodes`. If empty, the most likely token is chosen."""
    context_length: int | None = None
    """Truncate the context to this many tokens before the nodes are run."""


@dataclass(frozen=True, slots=True)
class TreeOutput:
    logits: Tensor
    """[logits_nodes, vocabulary], valid until the program yields again."""
    token_ids: Sequence[int]
    """The token chosen at each of them."""
    aux_hidden_states: Callable[[Sequence[int]], Tensor] | None = None
    """Returns the hidden states of entries: the tokens of the context, followed by the nodes."""


TreeProgram = Generator[TreeInput, TreeOutput, None]
Program = Generator[TreeInput | ProposalCall, Any, None]
"""Receives a TreeOutput for each TreeInput, and a Proposal for each ProposalCall."""


def prefill() -> TreeProgram:
    """Computes its context and nothing else: the engine computes the context of a program before its first tree."""
    yield TreeInput((), logits_nodes=())


def generate(
    request: GenerateRequest,
    *,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    emit: Callable[[TokenDelta], None],
    detokenizer: IncrementalDetokenizer | None = None,
    speculation: SequenceSpeculation | None = None,
    last_output: TreeOutput | None = None,
) -> Program:
    """Generates after the request's prompt and output, of which all but the last token are the context.

    At most `max_new_tokens` tokens, not counting the end token, are passed to `emit`, at least `stream_interval` at a
    time. `detokenizer` finds stop strings. The request's draft, and then the proposals of the speculative method, are
    run in the same pass and accepted as long as the target chooses the same tokens. If the last token is in the context
    as well, `last_output` is what an earlier pass computed there, and the first token follows without a pass.
    """
    prompt, output, params = request.prompt_token_ids, request.output_token_ids, request.sampling_params
    sampler = Sampler(params, prompt, output)
    stop_token_ids = () if params.ignore_eos else stop_token_ids
    last, context_length = (output or prompt)[-1], len(prompt) + len(output) - 1
    draft = request.draft_token_ids
    proposal = chain_proposal(draft[: max(0, max_new_tokens - 1)])
    unseen: Sequence[int] = (*prompt, *output)  # tokens that the proposer has not received yet
    entries: Sequence[int] = range(context_length)
    if speculation is not None and not speculation.needs_hidden_states:
        speculation.extend(unseen, None, None)
        unseen = ()
        if not draft and last_output is None and (proposal_call := speculation.proposal_call(max_new_tokens - 1)):
            proposal = yield proposal_call
    accepted_path: Sequence[int] = ()
    output_ids: list[int] = []
    output_logprobs: list[Logprob] = []
    stats: SpeculationStats | None = None
    remaining, num_accepted = max_new_tokens, 0
    while True:
        nodes = _attach(last, proposal)
        if last_output is None:
            tree_output: TreeOutput = yield TreeInput(
                nodes, accepted_path=accepted_path, sampling_states=sampler.states(nodes)
            )
        else:
            tree_output = replace(last_output, token_ids=sample(last_output.logits, sampler.states(nodes)))
        finish: FinishReason | None = None
        node: int | None = 0
        path, new_tokens = [], []
        while node is not None:
            path.append(node)
            token = tree_output.token_ids[node]
            if token in stop_token_ids:
                finish = "stop"
                break
            if params.logprobs is not None:
                output_logprobs += token_logprobs(tree_output.logits[node : node + 1], [token], params.logprobs)
            sampler.append(token)
            new_tokens.append(token)
            remaining -= 1
            node = child(nodes, node, token)
            if detokenizer is not None:
                detokenizer.add((token,))
                finish = "stop" if detokenizer.matched_stop is not None else None
            if finish is None and not remaining:
                finish = "length"
            if finish:
                break
        output_ids += new_tokens
        num_matched = len(new_tokens) - (node is None)  # tokens of the proposal
        if draft:
            num_accepted += num_matched
        if speculation is not None and last_output is None:
            step_stats = speculation.observe(NO_PROPOSAL if draft else proposal, num_matched)
            stats = step_stats if stats is None else stats + step_stats
        accepted_path, last_output = path if last_output is None else (), None
        if finish or len(output_ids) >= request.stream_interval:
            emit(TokenDelta(tuple(output_ids), tuple(output_logprobs), finish, num_accepted, speculation=stats))
            output_ids, output_logprobs, num_accepted, stats = [], [], 0, None
        if finish:
            yield TreeInput((), logits_nodes=(), accepted_path=accepted_path)  # a following message can reuse it
            return
        last, draft, proposal = new_tokens[-1], (), NO_PROPOSAL
        if speculation is not None:
            hidden_states = None
            if speculation.needs_hidden_states and tree_output.aux_hidden_states is not None:
                hidden_states = tree_output.aux_hidden_states([*entries, *(context_length + node for node in path)])
            speculation.extend((*unseen, *new_tokens), hidden_states, _mask_prediction(nodes, path[-1], tree_output))
            context_length, unseen, entries = context_length + len(path), (), ()
            if proposal_call := speculation.proposal_call(remaining - 1):
                proposal = yield proposal_call


def _mask_prediction(nodes: TokenTree | Sequence[int], node: int, tree_output: TreeOutput) -> MaskPrediction | None:
    """Returns the predictions at the masks that follow that node."""
    masks = []
    mask = child(nodes, node, MASK)
    while mask is not None and tree_output.token_ids[mask] != -1:  # logits that are not finite predict nothing
        masks.append(mask)
        mask = child(nodes, mask, MASK)
    if not masks:
        return None
    tokens = [tree_output.token_ids[mask] for mask in masks]
    probabilities = tree_output.logits[masks].softmax(-1)[range(len(masks)), tokens]
    return MaskPrediction(tokens, probabilities.tolist())


def _attach(token: int, proposal: Proposal) -> TokenTree | Sequence[int]:
    """Returns the tree of the last token of the sequence with the proposal below it."""
    if list(proposal.parents) == list(range(-1, len(proposal.parents) - 1)):
        return [token, *proposal.token_ids]
    tree, _ = tree_from_parents([token, *proposal.token_ids], [-1, *(parent + 1 for parent in proposal.parents)])
    return tree


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How an engine runs verifications."""

    max_nodes: int
    """Suffix tokens in one forward pass."""
    max_model_len: int
    """Prefixes whose suffix would reach beyond it are not evaluated."""
    answer_first: bool
    """Evaluate a complete answer alone before its prefixes. Where a further pass costs more than its tokens, all are
    evaluated together."""


@dataclass(frozen=True, slots=True)
class VerifyOutput:
    """The result of a verification, and what its passes have computed for the program that follows."""

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
    """Evaluates P(correct) of those prefixes of the request that can matter under its policy.

    The context is prompt, output and draft up to the last prefix, or all of this before `trunk`: the tokens whose
    logits the caller needs, from the last token before the draft (or before an accepted part of it) to the last prefix.
    The first pass runs the trunk and the first suffixes as one tree, because logits are returned for nodes only.
    """
    suffix, lengths = request.suffix, request.prefix_lengths
    width = len(suffix.token_ids)
    start = len(request.prompt_token_ids) + len(request.output_token_ids)
    context_length = start + max(lengths, default=0) - len(trunk)
    num_evaluable = sum(1 for length in lengths if start + length + width <= options.max_model_len)
    complete = request.draft_complete and num_evaluable == len(lengths)
    p_correct: dict[int, float] = {}
    draft_logprobs: list[Logprob] = []
    next_token_logits: dict[int, Tensor] = {}
    accepted_path: Sequence[int] = ()
    tree_output: TreeOutput | None = None
    while True:
        batch = next_batch(
            num_evaluable,
            p_correct,
            request.policy,
            complete=complete,
            max_batch=max(1, options.max_nodes // width),
            answer_first=options.answer_first,
        )
        runs_trunk = bool(trunk) and tree_output is None
        if not batch and not runs_trunk:
            break
        batch.reverse()  # `trunk_with_suffixes` starts with the suffix of the longest prefix
        ends = [start + lengths[index] for index in batch]
        trunk_nodes: list[int] = []
        if not runs_trunk:
            nodes: TokenTree | Sequence[int] = suffix_forest(ends, suffix.token_ids)
        else:
            nodes = _trunk_with_suffixes(trunk, [end - context_length for end in ends], suffix.token_ids)
            prefix_ends = {0, *(start + length - context_length - 1 for length in lengths)}
            trunk_nodes = sorted(prefix_ends) if request.num_logprobs is None else list(range(len(trunk)))
        answer_nodes = range((len(trunk) if runs_trunk else 0) + width - 1, len(nodes), width)
        tree_output = yield TreeInput(nodes, logits_nodes=[*trunk_nodes, *answer_nodes], accepted_path=accepted_path)
        accepted_path = range(len(trunk)) if runs_trunk else ()
        trunk_logits, logits = tree_output.logits.split([len(trunk_nodes), len(answer_nodes)])
        if runs_trunk:
            kept = trunk_logits.clone()  # further passes may follow
            next_token_logits = {
                context_length + node + 1 - start: kept[row : row + 1] for row, node in enumerate(trunk_nodes)
            }
            if request.num_logprobs is not None:
                draft_logprobs = token_logprobs(trunk_logits[:-1], trunk[1:], request.num_logprobs)
        answer_logits = [
            logits[:, list(token_ids)].logsumexp(-1)
            for token_ids in (suffix.correct_token_ids, suffix.incorrect_token_ids)
        ]
        p_correct.update(zip(batch, torch.stack(answer_logits).softmax(0)[0].tolist(), strict=True))
    return VerifyOutput(
        VerifyResult(tuple(p_correct.get(index) for index in range(len(lengths))), tuple(draft_logprobs)),
        next_token_logits,
        accepted_path,
        tree_output.aux_hidden_states if tree_output is not None else None,
    )


def _trunk_with_suffixes(
    trunk: Sequence[int], prefix_lengths: Sequence[int], suffix: Sequence[int]
) -> TokenTree | Sequence[int]:
    """Returns the tree of `trunk_with_suffixes`, as plain token ids if it is a chain, which attention computes faster."""
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
    """Passes the result of the verification to `emit`, then generates after the accepted prefix.

    The verification has computed the first token of the continuation as well. `start_generation` returns the program
    that generates, given the output at the last token of the accepted prefix.
    """
    output = yield from verify(request.verify, options, trunk)
    emit(output.result)
    num_accepted = request.accepted_prefix_length(output.result.p_correct)
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
