"""The settings of a model and of the verification.

Every setting has a description, and unknown keys are rejected.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from huggingface_hub import try_to_load_from_cache
from pydantic import Field, ValidationError, field_validator, model_validator
from transformers.utils.hub import cached_file

from parse.acceptance import Thresholds
from parse.engine_config import NativeEngineConfig, RemoteEngineConfig, VLLMEngineConfig
from parse.prefixes import DEFAULT_STRIDE, PrefixBoundary
from parse.prompts import VERIFICATION_PROMPT
from parse.registry import DRAFTING_MODES, METHODS, MODES, RULES
from parse.renamed_settings import describe_errors
from parse.settings import OneOf, Settings

VERIFICATION_FILE = "parse.json"
"""A file in the target's folder with the verification settings that the model was trained for."""


ModeName = Annotated[str, OneOf(MODES)]
DraftingModeName = Annotated[str, OneOf(DRAFTING_MODES)]
MethodName = Annotated[str, OneOf(METHODS)]
MethodChoice = Annotated[str, OneOf(METHODS, more=("none",))]
RuleName = Annotated[str, OneOf(RULES)]


def _describe_methods(names: Iterable[str]) -> str:
    return "; ".join(f'"{name}": {METHODS[name].description}' for name in names)


class SpeculativeConfig(Settings):
    """One token-level method: how several tokens are proposed at once.

    It changes the speed and not the text, unless [`drafting`](#drafting-of-the-draft-model) leaves tokens unchecked.
    """

    section = "speculative_configs"

    method: MethodName = Field(description=f"{_describe_methods(METHODS)}.")
    model: str | None = Field(
        None,
        min_length=1,
        description="The checkpoint of the method, a local path or a Hugging Face id: a head for eagle3 and parallel, "
        "a small model for draft_model, adapters for space. Null for space means that the target itself was tuned to "
        "read its tokenizer's mask token. ngram takes no model.",
    )
    num_speculative_tokens: int | None = Field(
        None,
        ge=1,
        le=64,
        description="The maximum number of tokens proposed at once. With null, each method uses its own default.",
    )
    topk: int = Field(
        1,
        ge=1,
        le=16,
        description="eagle3, parallel: 1 proposes a chain. A higher value proposes a tree in which each node has "
        "at most this many children.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        spec = METHODS[self.method]
        if spec.model == "none" and self.model is not None:
            raise ValueError(f"{self.method} takes no model")
        if spec.model == "required" and self.model is None:
            raise ValueError(f"{self.method} needs a model")
        if self.topk > 1 and not spec.supports_trees:
            raise ValueError(f"{self.method} proposes chains only, so topk must be 1")
        return self


class DraftingSettings(Settings):
    """How a draft model uses the proposals of its own token-level method.

    A draft does not have to be what the draft model alone would write, because the target verifies it in any case.
    """

    section = "drafting"

    check: Literal["always", "unsure", "never"] = Field(
        "always",
        description='Which proposed tokens become part of the draft. "always": only those that the draft model itself '
        'would generate. "unsure": also those whose probability is at least `confidence`, without this check. "never": '
        "all of them. The more tokens are left unchecked, the fewer passes a draft takes, and the more drafts are "
        "wrong. Only greedy requests without penalties, `logit_bias` and `min_tokens` use unchecked tokens.",
    )
    confidence: float = Field(
        0.9,
        ge=0,
        le=1,
        description='With `check: "unsure"`, the minimum probability of a token that is not checked, as the method '
        "estimates it.",
    )

    @model_validator(mode="after")
    def _check_confidence(self) -> Self:
        if self.check != "unsure" and "confidence" in self.model_fields_set:
            raise ValueError(f'confidence is used only with check "unsure", got {self.check!r}')
        return self

    @property
    def min_confidence(self) -> float | None:
        """The probability from which on a token is not checked, or None if all tokens are checked."""
        return {"always": None, "unsure": self.confidence, "never": 0.0}[self.check]


NATIVE_SETTINGS = frozenset(
    (
        *("device", "dtype", "quantization", "num_threads", "kv_cache_memory_bytes", "gpu_memory_utilization"),
        *("max_num_batched_tokens", "cuda_graphs", "speculative_configs", "drafting"),
    )
)
"""Settings of the native engine. Another engine has its own settings for these things."""


class EngineSettings(Settings):
    """The settings of one model."""

    section = "target, draft"

    model: str = Field(
        description="A local path or a Hugging Face id. With a remote engine, the tokenizer is read from it."
    )
    engine: Annotated[NativeEngineConfig | VLLMEngineConfig | RemoteEngineConfig, Field(discriminator="kind")] = Field(
        NativeEngineConfig(),
        description="What runs the model. The default, `{kind: native}`, is the engine of this project. `{kind: vllm}` "
        "is a vLLM server that the replica starts. `{kind: remote, url: ...}` is a running vLLM or SGLang server, and "
        "`{kind: remote, deployment: ...}` a deployment of Ray Serve LLM. See [`engine`](#engine-of-a-model).",
    )
    device: str = Field(
        "auto",
        description='"cpu", "cuda", "cuda:1", or "balanced", which spreads the layers over all GPUs. "auto" takes the '
        "first GPU if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description='"auto" computes in float32 on a CPU, and in the dtype of the checkpoint on a GPU.'
    )
    quantization: Literal["int8"] | None = Field(
        None, description='"int8" quantizes the linear layers to 8 bits while the model loads. It works on CPUs only.'
    )
    num_threads: int | None = Field(
        None, ge=1, description="The number of CPU threads for arithmetic. With null, PyTorch chooses it."
    )
    max_model_len: int = Field(
        4096,
        ge=16,
        description="The maximum number of tokens of a prompt and its answer together. The model's own limit applies "
        "if it is lower.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Variables for the chat template, for example `enable_thinking: false`. A request can replace "
        "those of the target.",
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="The maximum size of the KV cache, in bytes. With null, it is 2 GiB on a CPU, and "
        "`gpu_memory_utilization` decides on a GPU.",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="The share of the GPU's memory for weights and KV cache together. It is used only on GPUs, and "
        "only if `kv_cache_memory_bytes` is null.",
    )
    max_num_seqs: int = Field(
        32, ge=1, description="The maximum number of requests computed at the same time. Further requests wait."
    )
    max_num_batched_tokens: int = Field(
        512,
        ge=1,
        description="The maximum number of tokens computed in one forward pass. A higher value raises the throughput, "
        "but long prompts then delay the streams of other requests for longer.",
    )
    cuda_graphs: bool = Field(
        False,
        description="Experimental. If true, decode steps are recorded as CUDA graphs and replayed. This works on a "
        "single GPU only.",
    )
    speculative_configs: tuple[SpeculativeConfig, ...] = Field(
        (),
        description="The token-level methods that a request can choose. If a request does not choose a method, the "
        "first one is used.",
    )
    drafting: DraftingSettings = Field(
        DraftingSettings(),
        description="How the draft model uses the proposals of its first method. Only a draft model has this setting.",
    )

    @model_validator(mode="after")
    def _check_drafting(self) -> Self:
        if self.drafting.min_confidence is None or not isinstance(self.engine, NativeEngineConfig):
            return self
        usable = [name for name, spec in METHODS.items() if spec.supports_unchecked_drafting]
        if not self.speculative_configs or self.speculative_configs[0].method not in usable:
            raise ValueError(
                f"drafting.check {self.drafting.check!r} needs one of {', '.join(usable)} as the first of "
                "speculative_configs"
            )
        if self.speculative_configs[0].topk > 1:
            raise ValueError(f"drafting.check {self.drafting.check!r} needs a chain, so topk must be 1")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        ignored = sorted(self.model_fields_set & NATIVE_SETTINGS)
        if ignored and not isinstance(self.engine, NativeEngineConfig):
            is_started_here = isinstance(self.engine, VLLMEngineConfig)
            place = "in engine.engine_args" if is_started_here else "where that server starts"
            raise ValueError(
                f"{', '.join(ignored)}: a {self.engine.kind} engine does not use this; set what it needs {place}"
            )
        return self

    @field_validator("speculative_configs")
    @classmethod
    def _check_methods_unique(cls, configs: tuple[SpeculativeConfig, ...]) -> tuple[SpeculativeConfig, ...]:
        methods = [config.method for config in configs]
        if len(set(methods)) < len(methods):
            raise ValueError(f"each method may be named only once, got {', '.join(methods)}")
        return configs


def check_target(settings: EngineSettings) -> EngineSettings:
    """Raises ValueError if the settings of a target contain any of a draft model."""
    if "drafting" in settings.model_fields_set:
        raise ValueError("drafting: only the draft model has this setting")
    return settings


class VerificationSettings(Settings):
    """How drafts are verified and which part of them is kept."""

    section = "verification"

    auto_mode: DraftingModeName | None = Field(
        None,
        description='The mode that "auto" uses while drafting pays. With null, it is full if the target uses a '
        "speculative method, and rounds otherwise.",
    )
    min_answer_mass: float = Field(
        0.2,
        ge=0,
        le=1,
        description="The minimum probability of the two answer words (`correct` and `incorrect`) together. If the "
        "target gives them less at start-up, no mode that verifies drafts is offered. If it is lower after a prefix of "
        "a draft, that prefix fails.",
    )
    self_check_prompts: tuple[str, ...] = Field(
        ("What is 7 times 8?", "Name the capital of France."),
        min_length=1,
        description="Messages that the target answers at start-up, to measure the probability of the answer words. "
        "A specialized model needs messages from its own domain.",
    )
    prompt: str = Field(VERIFICATION_PROMPT, min_length=1, description="The question to the target about each prefix.")
    correct: str = Field("Correct", min_length=1, description="The answer that accepts a prefix.")
    incorrect: str = Field("Incorrect", min_length=1, description="The answer that rejects a prefix.")
    full: float = Field(
        Thresholds.full, ge=0, le=1, description="The minimum P(correct) at which a complete draft is accepted."
    )
    prefix: float = Field(Thresholds.prefix, ge=0, le=1, description="The minimum P(correct) at which a prefix passes.")
    rule: RuleName = Field(
        "first_failure",
        description="Which prefix is kept: the last one before the first that fails, or the longest that passes.",
    )
    prefix_boundaries: tuple[PrefixBoundary, ...] = Field(
        ("tokens",),
        min_length=1,
        description='Where the verified prefixes end: "tokens" every `stride` tokens, "sentences" at the end of each '
        'sentence, "lines" at the end of each line.',
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="The number of tokens by which each verified prefix is longer than the one before it. With null, "
        f"the engine chooses it by the measured cost of its steps, or it is {DEFAULT_STRIDE}.",
    )
    exhaustive: bool = Field(
        False,
        description="Whether all prefixes up to the first failure are evaluated. If false, the native engine on CPUs "
        "and a server may search for it, and find another one only if a prefix fails and a longer one passes.",
    )
    window: int = Field(
        16,
        ge=1,
        description="The number of draft tokens in the first window of mode progressive. Each further window is twice "
        "as long as the one before it.",
    )
    draft_timeout_s: float = Field(
        60.0,
        gt=0,
        description="The maximum time to write a draft, in seconds. If it takes longer, the target continues alone.",
    )
    max_rounds: int = Field(3, ge=1, description="The maximum number of drafts for one answer in mode rounds.")
    correction_tokens: int = Field(
        16,
        ge=1,
        description="The number of tokens that the target generates after an error before the drafter continues, in "
        "mode rounds.",
    )

    @classmethod
    def for_model(cls, model: str, **changes: Any) -> Self:
        """Returns the settings that come with a target, with `changes` applied.

        Without a `parse.json`, these are the defaults. For a Hugging Face id, the file is looked up only if the
        tokenizer of the model is already in the local cache.
        """
        file = _verification_file(model)
        if file is None:
            return cls(**changes)
        try:
            return cls.model_validate(json.loads(file.read_text()) | changes)
        except (TypeError, ValueError) as error:
            reason = describe_errors(error) if isinstance(error, ValidationError) else error
            raise ValueError(f"{file}: {reason}") from error

    def thresholds(self) -> Thresholds:
        return Thresholds(self.full, self.prefix)


def _verification_file(model: str) -> Path | None:
    """Returns the path of the settings that come with a model, or None if there are none."""
    if Path(model).is_dir():
        file = Path(model) / VERIFICATION_FILE
        return file if file.is_file() else None
    try:
        if not isinstance(try_to_load_from_cache(model, "tokenizer_config.json"), str):
            return None  # no such repository has been loaded, and a search on the hub can take a minute
        cached = cached_file(model, VERIFICATION_FILE, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # not a name of a repository
        return None
    return Path(cached) if cached else None
