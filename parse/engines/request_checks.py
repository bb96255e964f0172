"""The checks that every engine makes before it serves a request."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from parse.detokenizer import IncrementalDetokenizer
from parse.errors import RequestError
from parse.requests import GenerateRequest, VerifyRequest
from parse.types import validate_token_ids


@dataclass(frozen=True)
class RequestChecks:
    """The limits of an engine. Requests beyond them raise RequestError."""

    vocab_size: int
    max_model_len: int

    def token_ids(self, field: str, token_ids: Sequence[int]) -> list[int]:
        return validate_token_ids(field, token_ids, self.vocab_size)

    def prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        prompt = self.token_ids("prompt", prompt_token_ids)
        self._check_length("prompt", len(prompt))
        return prompt

    def generation(self, request: GenerateRequest) -> GenerateRequest:
        """Returns the request with plain token ids."""
        self.token_ids("logit_bias", list(request.sampling_params.logit_bias))
        self.token_ids("stop_token_ids", request.sampling_params.stop_token_ids)
        return replace(
            request,
            prompt_token_ids=self.token_ids("prompt", request.prompt_token_ids),
            output_token_ids=self.token_ids("output", request.output_token_ids),
            draft_token_ids=self.token_ids("draft", request.draft_token_ids),
        )

    def verification(self, request: VerifyRequest) -> VerifyRequest:
        """Returns the request with plain token ids."""
        suffix, lengths = request.suffix, request.prefix_lengths
        request = replace(
            request,
            prompt_token_ids=self.token_ids("prompt", request.prompt_token_ids),
            output_token_ids=self.token_ids("output", request.output_token_ids),
            draft_token_ids=self.token_ids("draft", request.draft_token_ids),
        )
        self.token_ids("suffix", (*suffix.token_ids, *suffix.correct_token_ids, *suffix.incorrect_token_ids))
        if not (suffix.token_ids and suffix.correct_token_ids and suffix.incorrect_token_ids):
            raise RequestError("suffix", "must hold a verification prompt and both its answers")
        start = len(request.prompt_token_ids) + len(request.output_token_ids)
        num_draft = len(request.draft_token_ids)
        self._check_length("prompt", start)
        self._check_length("draft", start + num_draft)
        ascending = list(lengths) == sorted(set(lengths))
        if not ascending or (lengths and not 0 < lengths[0] <= lengths[-1] <= num_draft):
            message = f"must ascend within 1..{num_draft}, the length of the draft, got {list(lengths)}"
            raise RequestError("prefix_lengths", message)
        return request

    def max_new_tokens(self, request: GenerateRequest) -> int:
        """Returns how many tokens may still be generated, which is at least one."""
        num_prompt, num_output = len(request.prompt_token_ids), len(request.output_token_ids)
        self._check_length("prompt", num_prompt + num_output, spare=1)
        max_tokens, limit = request.sampling_params.max_tokens, self.max_model_len - num_prompt - num_output
        if max_tokens is None:
            return limit
        if max_tokens <= num_output:
            raise RequestError("output", f"already has max_tokens, {max_tokens}, or more tokens")
        return min(limit, max_tokens - num_output)

    def _check_length(self, field: str, length: int, spare: int = 0) -> None:
        if not length:
            raise RequestError(field, "must not be empty")
        if length + spare > self.max_model_len:
            message = f"makes the sequence {length} tokens long, and the limit is {self.max_model_len}"
            raise RequestError(field, message)


def stop_detokenizer(request: GenerateRequest, tokenizer: PreTrainedTokenizerBase) -> IncrementalDetokenizer | None:
    """Returns a detokenizer that finds the request's stop strings after its output, or None if it has none."""
    if not request.sampling_params.stop:
        return None
    detokenizer = IncrementalDetokenizer.for_params(tokenizer, request.sampling_params)
    detokenizer.add(request.output_token_ids)
    if detokenizer.matched_stop is not None:
        raise RequestError("output", f"already contains the stop string {detokenizer.matched_stop!r}")
    return detokenizer
