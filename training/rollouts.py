"""Attention of many rollouts over one text: each sees the text up to its anchor and its own drafted elements."""

import math

import torch
from torch import Tensor


def rollout_attention(
    query: Tensor,  # [B, A, Q, heads, d]: Q elements of each of A rollouts
    key: Tensor,  # [B, T, key heads, d], of the text
    value: Tensor,
    visible: Tensor,  # [B, A, T] bool: which elements of the text each rollout sees
    drafted_key: Tensor,  # [B, A, J, key heads, d], drafted
    drafted_value: Tensor,
    drafted_visible: Tensor,  # [Q, J] bool
) -> Tensor:
    """Returns the attention output, [B, A, Q, heads * d]."""
    size, anchors, queries, heads, width = query.shape
    groups = heads // key.shape[2]
    key, value, drafted_key, drafted_value = (
        t.repeat_interleave(groups, -2) for t in (key, value, drafted_key, drafted_value)
    )
    by_head = (query * (1 / math.sqrt(width))).permute(0, 3, 1, 2, 4)  # [B, heads, A, Q, d]
    over_text = torch.matmul(by_head.flatten(2, 3), key.permute(0, 2, 3, 1)).unflatten(2, (anchors, queries))
    over_drafted = torch.matmul(by_head, drafted_key.permute(0, 3, 1, 4, 2))  # [B, heads, A, Q, J]
    lowest = torch.finfo(query.dtype).min
    over_text = over_text + torch.where(visible, 0.0, lowest)[:, None, :, None]
    over_drafted = over_drafted + torch.where(drafted_visible, 0.0, lowest)
    weights = torch.cat([over_text, over_drafted], -1).softmax(-1)
    text_weights, drafted_weights = weights.split([key.shape[1], drafted_key.shape[2]], -1)
    out = torch.matmul(text_weights.flatten(2, 3), value.transpose(1, 2)).unflatten(2, (anchors, queries))
    out = out + torch.matmul(drafted_weights, drafted_value.permute(0, 3, 1, 2, 4))
    return out.permute(0, 2, 3, 1, 4).reshape(size, anchors, queries, heads * width)


def visible_up_to(anchors: Tensor, size: int) -> Tensor:
    """Returns a [B, A, T] bool mask: an anchor sees the elements of the text up to itself."""
    return torch.arange(size, device=anchors.device) <= anchors[..., None]
