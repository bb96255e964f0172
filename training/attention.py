"""Attention for training under the tree's mask: matrix products on a CPU, the fused kernel elsewhere.

At the sizes of the demo pair, two matrix products in bfloat16 are faster than the CPU's fused kernel, which gains
nothing from bfloat16. The mask is the argument `visible` of the forward pass, because the library passes no mask to an
attention function that is registered only here.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

TREE_ATTENTION = "tree"


def tree_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visible: Tensor,  # [B, 1, T, T] additive: 0 or the lowest number
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    if query.device.type == "cpu":
        scores = torch.matmul(query * scaling, key.transpose(-1, -2)) + visible
        out = torch.matmul(scores.softmax(-1), value)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible.to(query.dtype), scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
