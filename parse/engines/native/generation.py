"""The programs that prefill and generate. A program is what a request does, written as a generator of trees.

A tree is run on the context of the request. A program yields the next tree, together with the nodes of the previous
tree that now belong to its context. It receives the logits. It does not depend on batches, memory or threads, so it can
be preempted at any point. `generate` accepts the proposed tokens that the target itself would have generated, and ends
at a stop string, a stop token or the length limit.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.sampler import Sampler, SamplingState, sample, token_logprobs
from parse.requests import GenerateRequest
from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, chain_proposal
from parse.speculative.proposal_policy import ProposalCall, SequenceSpeculation
from parse.tree import MASK, TokenTree, child, tree_from_parents
from parse.types import FinishReason, Logprob, SpeculationStats, TokenDelta


@dataclass(frozen=True, slots=True)
class TreeInput:
    """A tree to run after the context."""

    nodes: TokenTree | Sequence[int]
    logits_nodes: Sequence[int] | None = None
    """The nodes whose logits the program reads. None means all."""
    accepted_path: Sequence[int] = ()
    """The nodes of the previous tree, as a path from a root, that now belong to the context."""
    sampling_states: Sequence[SamplingState] = ()
    """How a token is chosen at each of `logits_nodes`. If empty, the most likely token is chosen."""
    context_length: int | None = None
    """Truncate the context to this many tokens before the nodes are run."""


@dataclass(frozen=True, slots=True)
class TreeOutput:
    logits: Tensor
    """[logits_nodes, vocabulary], valid until the program yields again."""
    token_ids: Sequence[int]
    """The token chosen at each of the `logits_nodes`."""
    aux_hidden_states: Callable[[Sequence[int]], Tensor] | None = None
    """Returns the hidden states of the given entries. Entries count the tokens of the context first, then the nodes."""


TreeProgram = Generator[TreeInput, TreeOutput, None]
Program = Generator[TreeInput | ProposalCall, Any, None]
"""Receives a TreeOutput for each TreeInput, and a Proposal for each ProposalCall."""


def prefill() -> TreeProgram:
    """Runs an empty tree.

    The engine prefills the context of a program before it computes the first tree, so nothing else is left to do.
    """
    yield TreeInput((), logits_nodes=())


def generate(
    request: GenerateRequest,
    *,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
    emit: Callable[[TokenDelta], None],
    detokenizer: IncrementalDetokenizer | None = None,
    speculation: SequenceSpeculation | None = None,
    last_output: TreeOutput | None = None,
) -> Program:
    """Generates the tokens that follow the request's prompt and output.

    The context is prompt and output without their last token. Passes at most `max_new_tokens` tokens to `emit`, and an
    end token only if the parameters include it. Each delta except the last has at least `stream_interval` tokens.
    `detokenizer` finds stop strings. A pass also runs the request's draft, and later the proposals of the speculative
    method. They are accepted as long as the target chooses the same tokens. A draft model may also accept proposed
    tokens without checking them. If the last token has already been computed, `last_output` is its output. The context
    then contains that token, and the first new token needs no pass.
    """
    prompt, output, params = request.prompt_token_ids, request.output_token_ids, request.sampling_params
    end_token_ids = params.end_token_ids(eos_token_ids)
    included_end_token_ids = params.included_end_token_ids(eos_token_ids)
    sampler = Sampler(params, prompt, output, end_token_ids)
    last, context_length = (output or prompt)[-1], len(prompt) + len(output) - 1
    draft = request.draft_token_ids
    proposal = chain_proposal(draft[: max(0, max_new_tokens - 1)])
    unseen: Sequence[int] = (*prompt, *output)  # tokens that the proposer has not received yet
    entries: Sequence[int] = range(context_length)
    if speculation is not None and not speculation.needs_hidden_states:
        speculation.extend(unseen, None, None)
        unseen = ()
        if not draft and last_output is None:
            proposal = yield from _propose(speculation, max_new_tokens - 1)
    accepted_path: Sequence[int] = ()
    output_ids: list[int] = []
    output_logprobs: list[Logprob] = []
    stats: SpeculationStats | None = None
    remaining, num_accepted = max_new_tokens, 0
    while True:
        nodes = _attach(last, proposal)
        unchecked = speculation.unchecked_tokens(proposal) if speculation is not None else ()
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
            if node < len(unchecked) and (proposed_token := unchecked[node]) is not None:
                token = proposed_token
            if token in end_token_ids:
                finish = "stop"
                if token not in included_end_token_ids:
                    break
            if params.logprobs is not None:
                output_logprobs += token_logprobs(tree_output.logits[node : node + 1], [token], params.logprobs)
            sampler.append(token)
            new_tokens.append(token)
            remaining -= 1
            node = child(nodes, node, token)
            if detokenizer is not None:
                detokenizer.add((token,))
                finish = "stop" if detokenizer.matched_stop is not None else finish
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
            yield TreeInput((), logits_nodes=(), accepted_path=accepted_path)  # a later request can reuse it
            return
        last, draft, proposal = new_tokens[-1], (), NO_PROPOSAL
        if speculation is not None:
            hidden_states = None
            if speculation.needs_hidden_states and tree_output.aux_hidden_states is not None:
                hidden_states = tree_output.aux_hidden_states([*entries, *(context_length + node for node in path)])
            speculation.extend((*unseen, *new_tokens), hidden_states, _mask_prediction(nodes, path[-1], tree_output))
            context_length, unseen, entries = context_length + len(path), (), ()
            proposal = yield from _propose(speculation, remaining - 1)


def _propose(speculation: SequenceSpeculation, max_tokens: int) -> Generator[ProposalCall, Proposal, Proposal]:
    """Returns the proposal for the next step.

    While a method still prefills, the step usually runs without a proposal. If proposals are used unchecked, it is
    called again until it has prefilled. Otherwise other requests, which delay the prefill, could change the draft. The
    loop ends, because each call computes a part of the prefill.
    """
    while proposal_call := speculation.proposal_call(max_tokens):
        proposal = yield proposal_call
        if proposal.ready or speculation.min_confidence is None:
            return proposal
    return NO_PROPOSAL


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
