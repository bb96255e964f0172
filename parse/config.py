"""Settings, each documented, none accepted that is not known."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(Settings):
    """How one model is run."""

    model: str = Field(description="A directory, or an id on the Hugging Face hub.")
    device: str = Field("auto", description='"cpu", "cuda", "cuda:1"; "auto" takes the first GPU if there is one.')
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
