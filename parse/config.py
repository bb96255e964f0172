"""Settings, each documented, none accepted that is not known."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from parse.probes import DEFAULT_STRIDE, Places
from parse.prompts import QUESTION
from parse.verdict import Rule, Thresholds

METHOD_FILE = "parse.json"  # beside a model's weights: settings of the method that it was made for


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class MethodSettings(Settings):
    """How drafts are judged, and what is made of them."""

    auto: Literal["full", "progressive", "rounds", "exact"] = Field(
        "rounds", description='What mode "auto" does while drafting pays.'
    )
    check_question: str = Field(QUESTION, min_length=1, description="What the target is asked about each prefix.")
    correct: str = Field("Correct", min_length=1, description="The answer that accepts.")
    incorrect: str = Field("Incorrect", min_length=1, description="The answer that rejects.")
    full: float = Field(Thresholds.full, ge=0, le=1, description="P(correct) from which a whole draft is accepted.")
    prefix: float = Field(Thresholds.prefix, ge=0, le=1, description="P(correct) from which a prefix passes.")
    rule: Rule = Field(
        "first_failure",
        description="Which prefix is kept: the last before the first that fails, or the longest that passes.",
    )
    places: tuple[Places, ...] = Field(
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
