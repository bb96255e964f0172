"""The settings of engines."""

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from parse.settings import Settings

StallTimeout = Annotated[
    float,
    Field(
        gt=0,
        description="The maximum time in seconds during which a server that works on a call sends nothing. The call is "
        "then lost. It must be longer than the server needs for the prefill of a long prompt.",
    ),
]
RetryTimeout = Annotated[
    float,
    Field(
        ge=0,
        description="For how long a lost call is repeated while no server responds, in seconds. A server that restarts "
        "in this time loses no request.",
    ),
]


class NativeEngineConfig(Settings):
    """The engine of this project, which runs the model in the replica."""

    section = "engine"

    kind: Literal["native"] = "native"


HTTP_SETTINGS = ("api_key_env", "tls_ca_file", "connect_timeout_s")
"""Settings of a remote engine that only calls over HTTP use."""


class RemoteEngineConfig(Settings):
    """A running vLLM or SGLang server, or a deployment of Ray Serve LLM, which the replica calls.

    Set either `url` or `deployment`.
    """

    section = "engine"

    kind: Literal["remote"] = Field(description="A model that runs already.")
    url: str | tuple[str, ...] | None = Field(
        None,
        description="The address of the server, for example `http://10.0.0.7:8000`, or a list of servers with the same "
        "model. The requests of one conversation go to the same server, unless it does not respond.",
    )
    deployment: str | None = Field(
        None,
        description="The names of an application in the same Ray cluster and of its deployment of Ray Serve LLM, for "
        "example `llm/LLMServer:qwen3-32b`. It is called through its handle. This is tested only with a stand-in "
        "for Ray Serve LLM.",
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description="The name of the model on the server. With null, it is the only model that the server serves.",
    )
    api_key_env: str | None = Field(
        None,
        min_length=1,
        description="The name of an environment variable of the replica that holds the API key. Only with `url`.",
    )
    tls_ca_file: str | None = Field(
        None,
        min_length=1,
        description="The path of a file with the certificates of the authorities that sign the server's certificate. "
        "With null, those of the operating system are used. Only with `url`.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, description="The maximum time to connect, in seconds. Only with `url`.")
    stall_timeout_s: StallTimeout = 60.0
    retry_timeout_s: RetryTimeout = 300.0

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.url,) if isinstance(self.url, str) else self.url or ()

    @property
    def deployment_path(self) -> tuple[str, str]:
        """The names of the application and of the deployment."""
        application, _, name = (self.deployment or "").rpartition("/")
        return application, name

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.url is None) == (self.deployment is None):
            both = "not both" if self.url is not None else "neither is set"
            raise ValueError(f"needs either url or deployment; {both}")
        ignored = [name for name in HTTP_SETTINGS if name in self.model_fields_set]
        if self.deployment is not None and ignored:
            raise ValueError(f"{', '.join(ignored)}: calls to a deployment do not use this; remove it, or set url")
        return self

    @field_validator("deployment")
    @classmethod
    def _check_deployment(cls, deployment: str | None) -> str | None:
        if deployment is not None and not all(deployment.rpartition("/")):
            raise ValueError(
                f"must be the names of an application and its deployment, such as llm/LLMServer:qwen3-32b, got "
                f"{deployment!r}"
            )
        return deployment

    @field_validator("url")
    @classmethod
    def _check_urls(cls, url: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if url is None:
            return None
        urls = (url,) if isinstance(url, str) else url
        if not urls:
            raise ValueError("must name at least one server")
        for each in urls:
            parts = urlsplit(each)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"must begin with http:// or https:// and name a host, got {each!r}")
            _ = parts.port  # raises if it is no port
            if parts.query or parts.fragment or parts.username:
                raise ValueError(f"must not contain a query, a fragment or a user, got {each!r}")
        if len({each.rstrip("/") for each in urls}) < len(urls):
            raise ValueError("must name each server only once")
        return url


RESERVED_ENGINE_ARGS = {
    **dict.fromkeys(("model", "max_model_len"), "set it beside `engine`"),
    **dict.fromkeys(
        ("host", "port", "uds", "api_key", "served_model_name", "root_path", "ssl_keyfile", "ssl_certfile"),
        "only this replica calls the server, and it sets this itself",
    ),
    **dict.fromkeys(("config", "headless", "help"), "name the arguments one by one"),
}
"""Arguments of vLLM that an operator cannot set, and what to do instead."""

PARALLEL_SIZES = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    "prefill_context_parallel_size",
)


class VLLMEngineConfig(Settings):
    """A vLLM server that the replica starts and supervises on its GPUs."""

    section = "engine"

    kind: Literal["vllm"] = Field(description="A vLLM server that the replica starts on its GPUs.")
    executable: str | None = Field(
        None,
        min_length=1,
        description="The Python interpreter of an environment that has vLLM. With null, it is this environment, if it "
        "has vLLM. Otherwise, on a machine without GPUs, vLLM's build for CPUs is installed in the cache folder when "
        "it is first needed.",
    )
    engine_args: dict[str, Any] = Field(
        {},
        description="The arguments of `vllm serve`, for example `{tensor_parallel_size: 4, quantization: fp8}`. They "
        "are passed on unchanged.",
    )
    environment: dict[str, str] = Field({}, description="More environment variables of vLLM.")
    start_timeout_s: float = Field(
        1800.0, gt=0, description="The maximum time until vLLM is ready, in seconds. It loads and compiles the model."
    )
    stall_timeout_s: StallTimeout = 60.0
    retry_timeout_s: RetryTimeout = 300.0

    @property
    def reserves_gpus(self) -> bool:
        return self.engine_args.get("distributed_executor_backend") == "ray"

    @property
    def num_gpus(self) -> int:
        """The number of GPUs that the replica needs for the parallel sizes.

        With its Ray backend, vLLM reserves them itself, on any nodes.
        """
        if self.reserves_gpus:
            return 0
        product = 1
        for name in PARALLEL_SIZES:
            product *= int(self.engine_args.get(name) or 1)
        return product

    @field_validator("engine_args")
    @classmethod
    def _check_engine_args(cls, engine_args: dict[str, Any]) -> dict[str, Any]:
        engine_args = {name.replace("-", "_"): value for name, value in engine_args.items()}
        for name, value in engine_args.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"must be names of vLLM's arguments, got {name!r}")
            if name in RESERVED_ENGINE_ARGS:
                raise ValueError(f"must not contain {name}: {RESERVED_ENGINE_ARGS[name]}")
            if name in PARALLEL_SIZES and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        return engine_args
