"""The requests that an engine runs before clients wait."""

from collections.abc import Sequence

from parse.prompts import VerificationSuffix
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import SamplingParams


def startup_requests(
    vocab_size: int, max_model_len: int, methods: Sequence[str]
) -> tuple[VerifyRequest, list[GenerateRequest]]:
    """Returns a verification, and generations with each token-level method and without one."""
    num_tokens = min(64, max_model_len // 4)
    prompt = [token % vocab_size for token in range(num_tokens)]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    verify = VerifyRequest(
        prompt_token_ids=prompt,
        draft_token_ids=prompt,
        prefix_lengths=range(8, num_tokens + 1, 8),
        suffix=VerificationSuffix(token_ids=(0,), correct_token_ids=(0,), incorrect_token_ids=(1,)),
        policy=None,
        num_logprobs=0,
    )
    return verify, [
        GenerateRequest(prompt_token_ids=prompt, sampling_params=params, speculative_method=method)
        for method in (*methods, "none")
    ]
