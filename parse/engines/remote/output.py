"""Collects the output of one request from the parts that a server streams."""

from collections.abc import Sequence

from parse.detokenizer import IncrementalDetokenizer
from parse.requests import GenerateRequest
from parse.types import FinishReason, Logprob, TokenDelta


class OutputBuilder:
    """Collects tokens into deltas, and ends the output at a stop string or at the token limit.

    Stop strings are found here and not on the server, because a stop string can begin in tokens that the server
    received as a part of the prompt.
    """

    def __init__(
        self, request: GenerateRequest, max_new_tokens: int, detokenizer: IncrementalDetokenizer | None
    ) -> None:
        self.token_ids = list(request.output_token_ids)
        """The whole output, including the tokens of the request."""
        self.finish_reason: FinishReason | None = None
        self.num_new_tokens = 0
        self._max_new_tokens, self._stream_interval = max_new_tokens, request.stream_interval
        self._detokenizer = detokenizer
        self._pending_token_ids: list[int] = []
        self._pending_logprobs: list[Logprob] = []
        self._num_accepted = 0
        self._num_cached_tokens = 0

    @property
    def num_remaining(self) -> int:
        return self._max_new_tokens - self.num_new_tokens

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob],
        finish_reason: FinishReason | None = None,
        *,
        num_cached_tokens: int = 0,
        accepted: bool = False,
    ) -> TokenDelta | None:
        """Returns a delta if the output has ended or enough tokens are there.

        The tokens are `accepted` if they come from the draft of the request.
        """
        self._num_cached_tokens = max(self._num_cached_tokens, num_cached_tokens)
        for index, token in enumerate(token_ids):
            self.token_ids.append(token)
            self._pending_token_ids.append(token)
            self._pending_logprobs += logprobs[index : index + 1]
            self._num_accepted += accepted
            self.num_new_tokens += 1
            if self._detokenizer is not None:
                self._detokenizer.add((token,))
                if self._detokenizer.matched_stop is not None:
                    self.finish_reason = "stop"
                    break
            if not self.num_remaining:
                ends_itself = finish_reason == "stop" and index == len(token_ids) - 1
                self.finish_reason = "stop" if ends_itself else "length"
                break
        self.finish_reason = self.finish_reason or finish_reason
        if self.finish_reason is None and len(self._pending_token_ids) < max(1, self._stream_interval):
            return None
        delta = TokenDelta(
            tuple(self._pending_token_ids),
            tuple(self._pending_logprobs),
            self.finish_reason,
            self._num_accepted,
            self._num_cached_tokens,
        )
        self._pending_token_ids, self._pending_logprobs, self._num_accepted = [], [], 0
        return delta
