"""The result of `Pair.generate`.

It contains the text, the model that wrote each part, the token counts and the times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parse.events import Event, Finished, Origin, PromptLogprobs, StageName, TextDelta, Usage, Verification
from parse.notebook import MarkedText, render_html
from parse.types import FinishReason, Logprob

MAX_REPR_CHARS = 60


@dataclass(frozen=True)
class Segment:
    """A part of an answer that one model wrote."""

    text: str
    origin: Origin
    """"draft": written by the draft model or supplied as a prediction, and accepted. "target": written by the target"""
    token_ids: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class GenerationOutput:
    """An answer.

    `str()` returns its text. Notebooks show which model wrote which part of it.
    """

    text: str
    """The answer, without reasoning."""
    token_ids: tuple[int, ...]
    """In the target's vocabulary, without the end token unless `include_eos_token` is set."""
    finish_reason: FinishReason
    """"stop" at an end token or a stop string, "length" at a limit."""
    usage: Usage
    segments: tuple[Segment, ...]
    """The parts of the text in order. Their joined texts equal `text`, and their joined tokens equal `token_ids`."""
    verifications: tuple[Verification, ...]
    """The verified drafts, or windows of them, with P(correct) of each prefix and the text that was rejected."""
    logprobs: tuple[Logprob, ...] | None
    """The log-probability of each token, or None if `logprobs` was not requested."""
    prompt_token_ids: tuple[int, ...]
    reasoning: str = ""
    """What the target thought before the answer, if it is a reasoning model."""
    prompt_logprobs: tuple[Logprob, ...] | None = None
    """The log-probability of each prompt token except the first one, or None if `prompt_logprobs` was not requested."""

    @classmethod
    def from_events(
        cls, events: Iterable[Event], prompt_token_ids: Sequence[int], *, has_logprobs: bool
    ) -> "GenerationOutput":
        """Collects the events of one answer, the last of which is `Finished`."""
        deltas: list[TextDelta] = []
        segments: list[Segment] = []
        verifications: list[Verification] = []
        finished: Finished | None = None
        prompt_logprobs: tuple[Logprob, ...] | None = None
        is_new = True  # a verification ends a segment, so that rejected text lies between two segments
        for event in events:
            match event:
                case TextDelta():
                    deltas.append(event)
                    if is_new or segments[-1].origin != event.origin:
                        segments.append(Segment("", event.origin, ()))
                    last = segments[-1]
                    segments[-1] = Segment(last.text + event.text, last.origin, last.token_ids + event.token_ids)
                    is_new = False
                case PromptLogprobs():
                    prompt_logprobs = event.logprobs
                case Verification():
                    verifications.append(event)
                    is_new = is_new or bool(event.rejected_text)
                case Finished():
                    finished = event
        assert finished is not None, "the events end without `Finished`"
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            segments=tuple(segments),
            verifications=tuple(verifications),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs) if has_logprobs else None,
            prompt_token_ids=tuple(prompt_token_ids),
            reasoning="".join(delta.reasoning for delta in deltas),
            prompt_logprobs=prompt_logprobs,
        )

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= MAX_REPR_CHARS else self.text[: MAX_REPR_CHARS - 3] + "..."
        usage = self.usage
        return (
            f"GenerationOutput({text!r}, finish_reason={self.finish_reason!r}, mode={usage.mode!r}, "
            f"draft_tokens={usage.draft_tokens}, accepted_tokens={usage.accepted_tokens}, "
            f"target_tokens={usage.target_tokens})"
        )

    def _repr_html_(self) -> str:
        return render_html(self._marked_texts(), describe_usage(self.usage))

    def _marked_texts(self) -> list[MarkedText]:
        """Returns the texts of all segments.

        Rejected text is at the place where it was rejected.
        """
        rejected = [(item.start + item.accepted_prefix_length, item.rejected_text) for item in self.verifications]
        texts: list[MarkedText] = []
        position = 0
        for segment in self.segments:
            while rejected and rejected[0][0] <= position:
                texts.append((rejected.pop(0)[1], "rejected"))
            texts.append((segment.text, segment.origin))
            position += len(segment.token_ids)
        texts += [(text, "rejected") for _, text in rejected]
        return [(text, kind) for text, kind in texts if text]


def describe_usage(usage: Usage) -> str:
    """Returns the counts and times of an answer in one line."""
    parts = [f"mode {usage.mode}"]
    if usage.draft_tokens:
        parts.append(
            f"accepted {usage.accepted_tokens} of {usage.draft_tokens} draft tokens in {usage.rounds} round(s)"
        )
    parts.append(f"the target generated {usage.target_tokens}")
    if usage.speculation:
        parts[-1] += f" in {usage.speculation.passes} passes by {usage.speculation.method}"
    stages: list[StageName] = ["draft", "judge", "write"]
    times = [f"{name} {usage.seconds(name) * 1e3:.0f} ms" for name in stages]
    parts.append(", ".join([*times, f"total {usage.total_s * 1e3:.0f} ms"]))
    if usage.fallback:
        parts.append(usage.fallback.message)
    return "; ".join(parts)
