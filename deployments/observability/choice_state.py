"""The state of one choice while it is generated.

Responses and metrics are made from it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.session import Session
from parse.events import Event, Finished, PromptLogprobs, TextDelta, Verification
from parse.tool_calls import ToolCallStream
from parse.types import Logprob


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that becomes the beginning of the choice's text."""

    text: str
    token_ids: Sequence[int]
    with_logprobs: bool


@dataclass
class ChoiceState:
    """One choice of a response, and its events so far."""

    index: int
    prompt_tokens: int
    session: Session
    arrival_time: float  # seconds since 1970
    stream: bool = False
    echo: EchoedPrompt | None = None
    tool_calls: ToolCallStream | None = None
    """Finds the tool calls in the text, if the request has tools."""
    queue_s: float = 0.0
    """The seconds from the arrival of the request until the pipeline started on it."""
    inter_token_s: list[float] = field(default_factory=list)
    """The seconds between two deltas of a stream, divided by the tokens of the later one."""
    num_tokens: int = 0
    num_chars: int = 0  # of the text without reasoning
    deltas: list[TextDelta] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    prompt_logprobs: Sequence[Logprob] = ()
    """Of the tokens of the prompt except the first one."""
    finished: Finished | None = None
    _last_delta_at: float | None = None

    def add_event(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.deltas.append(event)
                self.num_tokens += len(event.token_ids)
                self.num_chars += len(event.text)
                if self.stream and event.token_ids:
                    now = time.perf_counter()
                    if self._last_delta_at is not None:
                        self.inter_token_s.append((now - self._last_delta_at) / len(event.token_ids))
                    self._last_delta_at = now
            case PromptLogprobs():
                self.prompt_logprobs = event.logprobs
            case Verification():
                self.verifications.append(event)
            case Finished():
                self.finished = event

    @property
    def result(self) -> Finished:
        assert self.finished is not None, "the choice is not finished"
        return self.finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def reasoning(self) -> str | None:
        return "".join(delta.reasoning for delta in self.deltas) or None
