"""Attention of many rollouts over one text: each sees the text up to its anchor, and what itself has drafted."""

import math

import torch
from torch import Tensor


def rollout_attention(
    query: Tensor,  # [B, A, Q, heads, d]: Q elements of each of A rollouts
    key: Tensor,  # [B, T, key heads, d], of the text
    value: Tensor,
    seen: Tensor,  # [B, A, T] bool: which of the text each rollout sees
    own_key: Tensor,  # [B, A, J, key heads, d], drafted
    own_value: Tensor,
    own_seen: Tensor,  # [Q, J] bool
) -> Tensor:
    """[B, A, Q, heads * d]"""
    size, anchors, queries, heads, width = query.shape
    groups = heads // key.shape[2]
    key, value, own_key, own_value = (t.repeat_interleave(groups, -2) for t in (key, value, own_key, own_value))
    by_head = (query * (1 / math.sqrt(width))).permute(0, 3, 1, 2, 4)  # [B, heads, A, Q, d]
    over_text = torch.matmul(by_head.flatten(2, 3), key.permute(0, 2, 3, 1)).unflatten(2, (anchors, queries))
    over_own = torch.matmul(by_head, own_key.permute(0, 3, 1, 4, 2))  # [B, heads, A, Q, J]
    unseen = torch.finfo(query.dtype).min
    over_text = over_text + torch.where(seen, 0.0, unseen)[:, None, :, None]
    over_own = over_own + torch.where(own_seen, 0.0, unseen)
    weights = torch.cat([over_text, over_own], -1).softmax(-1)
    text, own = weights.split([key.shape[1], own_key.shape[2]], -1)
    out = torch.matmul(text.flatten(2, 3), value.transpose(1, 2)).unflatten(2, (anchors, queries))
    out = out + torch.matmul(own, own_value.permute(0, 3, 1, 2, 4))
    return out.permute(0, 2, 3, 1, 4).reshape(size, anchors, queries, heads * width)


def up_to(anchors: Tensor, size: int) -> Tensor:
    """[B, A, T] bool: an anchor sees the elements of the text up to itself."""
    return torch.arange(size, device=anchors.device) <= anchors[..., None]
