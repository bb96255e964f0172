"""Settings, each documented, none accepted that is not known."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from parse.acceptance import AcceptanceRule, Thresholds
from parse.prefixes import DEFAULT_STRIDE, PrefixBoundary
from parse.prompts import VERIFICATION_PROMPT
from parse.types import MethodName

METHOD_FILE = "parse.json"  # beside a model's weights: settings of the method that it was made for


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculationSettings(Settings):
    """How several tokens are proposed at once. The text stays the model's own; only the number of passes changes."""

    method: MethodName = Field(
        description='"eagle3" and "parallel": a trained head; "space": the model itself, by masks; "draft_model": a '
        'small model beside it; "ngram": what followed the same words before.'
    )
    head: str | None = Field(
        None,
        min_length=1,
        description="A directory, or an id on the Hugging Face hub: of the head, of the adapters for space (null: the "
        "model itself was tuned to read its tokenizer's mask token), of the small model. ngram takes none.",
    )
    tokens: int | None = Field(
        None, ge=1, le=64, description="Most tokens proposed at once; null: as many as the method is good for."
    )
    beam: int = Field(
        1, ge=1, le=16, description="eagle3, parallel: 1 proposes a chain; more, a tree that is as wide at each place."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "ngram" and self.head is not None:
            raise ValueError("ngram takes no head")
        if self.method in ("eagle3", "parallel", "draft_model") and self.head is None:
            raise ValueError(f"{self.method} needs a head")
        if self.beam > 1 and self.method not in ("eagle3", "parallel"):
            raise ValueError(f"{self.method} proposes chains only, beam must be 1")
        return self


class EngineSettings(Settings):
    """How one model is run."""

    model: str = Field(description="A directory, or an id on the Hugging Face hub.")
    device: str = Field(
        "auto",
        description='"cpu", "cuda", "cuda:1", or "balanced": layers spread over all GPUs; "auto" takes the first GPU, '
        "if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Arithmetic. Auto: float32 on a CPU, elsewhere what the checkpoint says."
    )
    int8: bool = Field(False, description="Quantise the linear layers to 8 bits while loading; CPUs only.")
    threads: int | None = Field(None, ge=1, description="CPU threads for arithmetic; null leaves it to torch.")
    max_context: int = Field(
        4096, ge=16, description="Longest prompt and answer together, in tokens; less if the model's own limit is less."
    )
    memory_mb: int = Field(2048, ge=1, description="Upper bound of the memory for keys and values, in MiB.")
    max_running: int = Field(32, ge=1, description="Requests computed at the same time; the rest wait.")
    step_tokens: int = Field(
        512,
        ge=1,
        description="Most tokens computed in one pass: more is faster in all, and stalls streams longer.",
    )
    speculation: tuple[SpeculationSettings, ...] = Field(
        (), description="Ways to write several tokens in a pass. The first is taken where a request names none."
    )

    @field_validator("speculation")
    @classmethod
    def _once_each(cls, ways: tuple[SpeculationSettings, ...]) -> tuple[SpeculationSettings, ...]:
        methods = [way.method for way in ways]
        if len(set(methods)) < len(methods):
            raise ValueError(f"each method may be named once, got {', '.join(methods)}")
        return ways


class VerificationSettings(Settings):
    """How drafts are judged, and what is made of them."""

    auto_mode: Literal["full", "progressive", "rounds", "exact"] = Field(
        "rounds", description='What mode "auto" does while drafting pays.'
    )
    prompt: str = Field(VERIFICATION_PROMPT, min_length=1, description="What the target is asked about each prefix.")
    correct: str = Field("Correct", min_length=1, description="The answer that accepts.")
    incorrect: str = Field("Incorrect", min_length=1, description="The answer that rejects.")
    full: float = Field(Thresholds.full, ge=0, le=1, description="P(correct) from which a whole draft is accepted.")
    prefix: float = Field(Thresholds.prefix, ge=0, le=1, description="P(correct) from which a prefix passes.")
    rule: AcceptanceRule = Field(
        "first_failure",
        description="Which prefix is kept: the last before the first that fails, or the longest that passes.",
    )
    prefix_boundaries: tuple[PrefixBoundary, ...] = Field(
        ("tokens",), min_length=1, description="Where a draft is cut: every `stride` tokens, at sentence or line ends."
    )
    stride: int = Field(DEFAULT_STRIDE, ge=1, description="Tokens between two cuts.")
    window: int = Field(
        16, ge=1, description="Tokens of draft first judged in mode progressive; twice as many each time after."
    )
    draft_timeout_s: float = Field(
        60.0, gt=0, description="The target does without a draft that takes longer than that many seconds."
    )
    max_rounds: int = Field(3, ge=1, description="Drafts of one answer at most, in mode rounds.")
    correction_tokens: int = Field(
        16, ge=1, description="Tokens the target writes past an error before the drafter goes on, in mode rounds."
    )

    @classmethod
    def for_model(cls, model: str, **changes: Any) -> Self:
        """What the folder of the target says, where it says anything, and changes of one's own."""
        beside = Path(model) / METHOD_FILE
        if not beside.is_file():
            return cls(**changes)
        try:
            return cls(**json.loads(beside.read_text()) | changes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{beside}: {error}") from error

    def thresholds(self) -> Thresholds:
        return Thresholds(self.full, self.prefix)


