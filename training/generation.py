"""Batched generation with `generate()` of the library, for training data and for measuring accuracy."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 240  # no correct answer is longer


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float = 0.0,
    batch_size: int = 128,
) -> list[list[int]]:
    """Returns what the model generates after each prompt, with the end token if it generated one."""
    assert isinstance(tokenizer.eos_token_id, int) and isinstance(tokenizer.pad_token_id, int)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    outputs: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    for first in range(0, len(prompts), batch_size):
        indices = by_length[first : first + batch_size]
        width = max(len(prompts[k]) for k in indices)
        tokens = torch.full((len(indices), width), tokenizer.pad_token_id)
        for row, k in enumerate(indices):
            tokens[row, width - len(prompts[k]) :] = torch.tensor(prompts[k])
        out = model.generate(  # type: ignore[operator]
            tokens.to(model.device),
            attention_mask=(tokens != tokenizer.pad_token_id).long().to(model.device),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=None,
            top_p=None,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for k, row in zip(indices, out[:, width:].tolist(), strict=True):
            outputs[k] = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
    model.set_attn_implementation(implementation)
    return [outputs[k] for k in range(len(prompts))]
