"""Verification of every prefix of a draft in one plain forward pass under the tree's mask."""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from parse.prompts import VerificationSuffix
from parse.tree import TokenTree, trunk_with_suffixes
from training.verification_tree import suffix_end_nodes


@torch.inference_mode()
def prefix_probabilities(
    model: PreTrainedModel,
    prompt: Sequence[int],
    draft: Sequence[int],
    prefix_lengths: Sequence[int],
    verification_suffix: VerificationSuffix,
) -> list[float]:
    """Returns P(correct) of each prefix of the draft."""
    if not prefix_lengths:
        return []
    tree = trunk_with_suffixes(
        [*prompt, *draft], [len(prompt) + length for length in prefix_lengths], verification_suffix.token_ids
    )
    answer_nodes = torch.from_numpy(
        suffix_end_nodes(len(prompt) + len(draft), prefix_lengths, len(verification_suffix.token_ids))
    )
    logits = tree_logits(model, tree, answer_nodes)
    answer_logits = [
        logits[:, list(ids)].logsumexp(-1)
        for ids in (verification_suffix.correct_token_ids, verification_suffix.incorrect_token_ids)
    ]
    return [float(p) for p in torch.stack(answer_logits).softmax(0)[0]]


@torch.inference_mode()
def tree_logits(
    model: PreTrainedModel, tree: TokenTree, nodes: torch.Tensor, past_key_values: Cache | None = None
) -> torch.Tensor:
    """Returns the logits [nodes, vocabulary] at some nodes of a tree after the cached context."""
    past_length = past_key_values.get_seq_length() if past_key_values else 0
    lowest = torch.finfo(model.dtype).min
    # The mask holds 0 and the lowest number, never booleans: eager attention adds it and would silently be wrong.
    hidden = torch.from_numpy(~tree.visible()).to(model.device)
    mask = torch.zeros(len(tree), past_length + len(tree), dtype=model.dtype, device=model.device)
    mask[:, past_length:].masked_fill_(hidden, lowest)
    visible_past = torch.from_numpy(tree.visible_context(past_length)).to(model.device)
    mask[:, :past_length].masked_fill_(torch.arange(past_length, device=model.device) >= visible_past[:, None], lowest)
    out = model(
        input_ids=torch.from_numpy(tree.tokens)[None].to(model.device),
        position_ids=visible_past[None] + torch.from_numpy(tree.depth).to(model.device),
        attention_mask=mask[None, None],
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
        logits_to_keep=nodes.to(model.device),
    )
    logits: torch.Tensor = out.logits[0].float()
    return logits


def prefill(model: PreTrainedModel, prompt: Sequence[int]) -> Cache:
    past_key_values = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(
            input_ids=torch.tensor([list(prompt)], device=model.device), past_key_values=past_key_values, use_cache=True
        )
    return past_key_values
