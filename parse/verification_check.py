"""Checks at start-up whether a target replies to the verification prompt with one of the two answer words.

P(correct) compares the two words with each other. If the target would reply with something else, for example with
reasoning, both are improbable, and P(correct) is an arbitrary number.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from parse.config import VerificationSettings
from parse.engines.protocol import Capabilities, Verifier
from parse.prompts import VerificationSuffix, chat_prompt_token_ids
from parse.reasoning import WITHOUT_REASONING
from parse.registry import LOSSY_MODES
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams

logger = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 32


async def measure_answer_mass(
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    suffix: VerificationSuffix,
    prompts: Sequence[str],
    max_model_len: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> float | None:
    """Returns the mean probability of both answer words together.

    The target begins to answer each prompt, and the probability is measured after that beginning. Returns None if none
    of them fits into the context.
    """
    masses: list[float] = []
    for text in prompts:
        messages = [{"role": "user", "content": text}]
        prompt = chat_prompt_token_ids(tokenizer, messages, {**(template_kwargs or {}), **WITHOUT_REASONING})
        if len(prompt) + MAX_ANSWER_TOKENS + len(suffix.token_ids) > max_model_len:
            continue
        params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
        generate = GenerateRequest(prompt_token_ids=prompt, sampling_params=params)
        async with aclosing(verifier.generate(generate)) as deltas:
            answer = [token async for delta in deltas for token in delta.token_ids]
        verify = VerifyRequest(
            prompt_token_ids=prompt,
            draft_token_ids=answer,
            prefix_lengths=[len(answer)] if answer else [],
            suffix=suffix,
            policy=None,
        )
        result = await verifier.verify(verify)
        masses += [mass for mass in result.answer_mass if mass is not None]
    return fmean(masses) if masses else None


def without_unreliable_modes(
    capabilities: Capabilities, answer_mass: float | None, settings: VerificationSettings, model: str
) -> Capabilities:
    """Returns the capabilities. If the target cannot verify drafts, they lack the modes that do so."""
    if answer_mass is None:
        logger.warning("%s: no message of verification.self_check_prompts fits into its context", model)
        return capabilities
    if answer_mass >= settings.min_answer_mass:
        return capabilities
    logger.warning(
        "%s does not reply to the verification prompt with %r or %r: the two words have a probability of %.2g, and at "
        "least %g is needed (verification.min_answer_mass). The modes %s are not offered. Change verification.prompt, "
        "correct and incorrect, or target.chat_template_kwargs.",
        model,
        settings.correct,
        settings.incorrect,
        answer_mass,
        settings.min_answer_mass,
        ", ".join(LOSSY_MODES),
    )
    return replace(capabilities, modes=tuple(mode for mode in capabilities.modes if mode not in LOSSY_MODES))
