"""Batched generation with the library's own `generate`, for drafting training data and for measuring accuracy."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 240  # tokens; no right answer is longer


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    batch: int = 128,
) -> list[list[int]]:
    """What the model writes after each prompt, with the end token where it ended by itself."""
    assert isinstance(tokenizer.eos_token_id, int) and isinstance(tokenizer.pad_token_id, int)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    written: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    for first in range(0, len(prompts), batch):
        chosen = by_length[first : first + batch]
        width = max(len(prompts[k]) for k in chosen)
        tokens = torch.full((len(chosen), width), tokenizer.pad_token_id)
        for row, k in enumerate(chosen):
            tokens[row, width - len(prompts[k]) :] = torch.tensor(prompts[k])
        out = model.generate(  # type: ignore[operator]
            tokens.to(model.device),
            attention_mask=(tokens != tokenizer.pad_token_id).long().to(model.device),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=None,
            top_p=None,
            max_new_tokens=LONGEST,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for k, row in zip(chosen, out[:, width:].tolist(), strict=True):
            written[k] = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
    model.set_attn_implementation(implementation)
    return [written[k] for k in range(len(prompts))]
