"""What requests do, as small programs: each asks for a tree to be run on its context and decides on the answer.

A program is a generator. It yields what it wants run next and which of the nodes run before stay in its context; it is
sent the logits it asked for. It knows nothing of batches, memory or threads, so it may be stopped anywhere and run
again elsewhere.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parse.detokenizer import IncrementalDetokenizer
from parse.engines.native.sampler import Sampler, SamplingState, token_logprobs
from parse.prompts import VerificationSuffix
from parse.speculative.policy import ProposalCall, SequenceSpeculation
from parse.speculative.proposal import NO_PROPOSAL, MaskPrediction, Proposal, chain_proposal
from parse.tree import MASK, TokenTree, child, suffix_forest, tree_from_parents
from parse.types import FinishReason, Logprob, SamplingParams, SpeculationStats, TokenDelta, VerifyResult


@dataclass(frozen=True, slots=True)
class TreeInput:
    """Nodes to run on the end of the context, and those whose logits are wanted (None: all)."""

    nodes: TokenTree | Sequence[int]
    logits_nodes: Sequence[int] | None = None
    accepted_path: Sequence[
        int
    ] = ()  # of the nodes run before, the path from a root on that now belongs to the context
    sampling: Sequence[SamplingState] = ()  # how a token is chosen at each of those read; (): the likeliest
    context_length: int | None = None  # the context is cut to so many tokens before the nodes run


@dataclass(frozen=True, slots=True)
class TreeOutput:
    logits: Tensor  # [wanted, vocabulary], until the program asks again
    token_ids: Sequence[int]  # the token at each
    aux_hidden_states: Callable[[Sequence[int]], Tensor] | None = (
        None  # of entries: the context's tokens, and then the nodes
    )


TreeProgram = Generator[TreeInput, TreeOutput, None]
Program = Generator[TreeInput | ProposalCall, Any, None]
"""Is sent an Answer for an Ask, and a Proposal for a wish."""


def prefill() -> TreeProgram:
    """Only its context is wanted, and that is computed before anything is asked."""
    yield TreeInput((), logits_nodes=())


def generate(
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    *,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    emit: Callable[[TokenDelta], None],
    detokenizer: IncrementalDetokenizer | None = None,
    draft: Sequence[int] = (),
    speculation: SequenceSpeculation | None = None,
    stream_interval: int = 1,
) -> Program:
    """Writes on after `prompt` and `output`, of which all but the last token are the context.

    At most `room` tokens, the end token not among them, handed to `emit` in pieces of at least `piece`. `text` watches
    for stop strings. Tokens of `given`, and then whatever speculation has to offer, are run together and taken as long
    as they are what would have been chosen anyway.
    """
    sampler = Sampler(params, prompt, output)
    stop_token_ids = () if params.ignore_eos else stop_token_ids
    last, context_length = (output or prompt)[-1], len(prompt) + len(output) - 1
    proposal = chain_proposal(draft[: max(0, max_new_tokens - 1)])
    unseen: Sequence[int] = (*prompt, *output)  # to the proposer
    entries: Sequence[int] = range(context_length)
    if speculation is not None and not speculation.needs_hidden_states:
        speculation.extend(unseen, None, None)
        unseen = ()
        if not draft and (proposal_call := speculation.proposal_call(max_new_tokens - 1)):
            proposal = yield proposal_call
    accepted_path: Sequence[int] = ()
    output_ids: list[int] = []
    output_logprobs: list[Logprob] = []
    stats: SpeculationStats | None = None
    remaining, accepted = max_new_tokens, 0
    while True:
        nodes = _attach(last, proposal)
        tree_output: TreeOutput = yield TreeInput(nodes, accepted_path=accepted_path, sampling=sampler.states(nodes))
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
        matched = len(new_tokens) - (node is None)  # of the proposal
        if draft:
            accepted += matched
        if speculation is not None:
            step_stats = speculation.observe(NO_PROPOSAL if draft else proposal, matched)
            stats = step_stats if stats is None else stats + step_stats
        if finish or len(output_ids) >= stream_interval:
            emit(TokenDelta(tuple(output_ids), tuple(output_logprobs), finish, accepted, speculation=stats))
            output_ids, output_logprobs, accepted, stats = [], [], 0, None
        if finish:
            yield TreeInput((), logits_nodes=(), accepted_path=path)  # the next turn will begin with it
            return
        last, draft, accepted_path, proposal = new_tokens[-1], (), path, NO_PROPOSAL
        if speculation is not None:
            features = None
            if speculation.needs_hidden_states and tree_output.aux_hidden_states is not None:
                features = tree_output.aux_hidden_states([*entries, *(context_length + node for node in path)])
            speculation.extend((*unseen, *new_tokens), features, _mask_prediction(nodes, path[-1], tree_output))
            context_length, unseen, entries = context_length + len(path), (), ()
            if proposal_call := speculation.proposal_call(remaining - 1):
                proposal = yield proposal_call


def _mask_prediction(nodes: TokenTree | Sequence[int], node: int, tree_output: TreeOutput) -> MaskPrediction | None:
    """What the masks behind that node say."""
    masks = []
    mask = child(nodes, node, MASK)
    while mask is not None and tree_output.token_ids[mask] != -1:  # what is no number foresees nothing
        masks.append(mask)
        mask = child(nodes, mask, MASK)
    if not masks:
        return None
    tokens = [tree_output.token_ids[mask] for mask in masks]
    probabilities = tree_output.logits[masks].softmax(-1)[range(len(masks)), tokens]
    return MaskPrediction(tokens, probabilities.tolist())


def _attach(token: int, proposal: Proposal) -> TokenTree | Sequence[int]:
    """The proposal below the last token of the text."""
    if list(proposal.parents) == list(range(-1, len(proposal.parents) - 1)):
        return [token, *proposal.token_ids]
    tree, _ = tree_from_parents([token, *proposal.token_ids], [-1, *(parent + 1 for parent in proposal.parents)])
    return tree


def verify(
    prompt_length: int,
    prefix_lengths: Sequence[int],
    suffix: VerificationSuffix,
    *,
    full_threshold: float | None,
    prefix_threshold: float | None,
    in_one_pass: bool,
    max_nodes: int,
    trunk: Sequence[int],
    num_logprobs: int,
    done: Callable[[VerifyResult], None],
) -> TreeProgram:
    """P(correct) at each cut; the context is a prompt of that length and the draft, up to the last cut.

    If the last cut passes at `full` (None: it is no full answer), or a prefix fails at `prefix` (None: never mind),
    the rest need not be known. `at_once` asks them all the same, as far as `most` nodes go in one pass: what another
    pass costs beyond its tokens decides. Where `trunk`, the prompt's last token and the draft, is given, the context
    lacks it, and the draft's log-probabilities are wanted as well, with those of the `top` likeliest beside them.
    """
    draft_logprobs: list[Logprob] = []
    accepted_path: Sequence[int] = ()
    if trunk:
        tree_output = yield TreeInput(trunk)
        accepted_path = range(len(trunk))
        draft_logprobs = token_logprobs(tree_output.logits[:-1], trunk[1:], num_logprobs)
    width = len(suffix.token_ids)
    group = size = max(1, max_nodes // width)
    pending = list(range(len(prefix_lengths)))
    p_correct: dict[int, float] = {}
    if full_threshold is not None:  # a full answer that passes settles everything
        pending.insert(0, pending.pop())
        size = group if in_one_pass else 1
    while pending:
        batch, pending, size = sorted(pending[:size]), pending[size:], group
        tree = suffix_forest([prompt_length + prefix_lengths[place] for place in batch], suffix.token_ids)
        tree_output = yield TreeInput(
            tree, logits_nodes=range(width - 1, len(tree), width), accepted_path=accepted_path
        )
        accepted_path = ()
        answer_logits = [
            tree_output.logits[:, list(ids)].logsumexp(-1)
            for ids in (suffix.correct_token_ids, suffix.incorrect_token_ids)
        ]
        p_correct.update(zip(batch, torch.stack(answer_logits).softmax(0)[0].tolist(), strict=True))
        if full_threshold is not None and p_correct[len(prefix_lengths) - 1] >= full_threshold:
            break
        prefixes = [p_correct[place] for place in batch if full_threshold is None or place < len(prefix_lengths) - 1]
        if prefix_threshold is not None and any(p < prefix_threshold for p in prefixes):
            break
    done(VerifyResult(tuple(p_correct.get(place) for place in range(len(prefix_lengths))), tuple(draft_logprobs)))
