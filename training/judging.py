"""The target's verdict on every prefix of a draft, in one plain forward under the tree's mask."""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from parse.prompts import VerificationSuffix
from parse.tree import TokenTree, suffix_end_nodes, trunk_with_suffixes


@torch.inference_mode()
def probabilities(
    model: PreTrainedModel, prompt: Sequence[int], draft: Sequence[int], cuts: Sequence[int], check: VerificationSuffix
) -> list[float]:
    """P(correct) at each cut of the draft."""
    if not cuts:
        return []
    tree = trunk_with_suffixes([*prompt, *draft], [len(prompt) + cut for cut in cuts], check.token_ids)
    at = torch.from_numpy(suffix_end_nodes(len(prompt) + len(draft), cuts, len(check.token_ids)))
    logits = run(model, tree, at)
    words = [logits[:, list(ids)].logsumexp(-1) for ids in (check.correct_token_ids, check.incorrect_token_ids)]
    return [float(p) for p in torch.stack(words).softmax(0)[0]]


@torch.inference_mode()
def run(model: PreTrainedModel, tree: TokenTree, at: torch.Tensor, context: Cache | None = None) -> torch.Tensor:
    """Logits at the chosen nodes of a tree that hangs on `context`; [len(at), vocabulary]."""
    before = context.get_seq_length() if context else 0
    lowest = torch.finfo(model.dtype).min
    # 0 and the lowest number, never booleans: eager attention adds the mask and would be wrong without a word.
    hidden = torch.from_numpy(~tree.visible()).to(model.device)
    mask = torch.zeros(len(tree), before + len(tree), dtype=model.dtype, device=model.device)
    mask[:, before:].masked_fill_(hidden, lowest)
    seen = torch.from_numpy(tree.visible_context(before)).to(model.device)
    mask[:, :before].masked_fill_(torch.arange(before, device=model.device) >= seen[:, None], lowest)
    out = model(
        input_ids=torch.from_numpy(tree.tokens)[None].to(model.device),
        position_ids=seen[None] + torch.from_numpy(tree.depth).to(model.device),
        attention_mask=mask[None, None],
        past_key_values=context,
        use_cache=context is not None,
        logits_to_keep=at.to(model.device),
    )
    logits: torch.Tensor = out.logits[0].float()
    return logits


def cached(model: PreTrainedModel, prompt: Sequence[int]) -> Cache:
    context = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(prompt)], device=model.device), past_key_values=context, use_cache=True)
    return context
