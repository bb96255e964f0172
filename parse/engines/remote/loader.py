"""Connects to the servers that the settings name."""

import logging
import os
import ssl
from collections.abc import Sequence
from dataclasses import fields

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from parse.config import EngineSettings
from parse.engine_config import RemoteEngineConfig
from parse.engines.protocol import Capabilities
from parse.engines.remote.dialect import Dialect, ModelIdentity, ServerFeatures
from parse.engines.remote.engine import Connection, RemoteEngine
from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.ray_serve_llm import RayServeLLM
from parse.engines.remote.server import ServerAddress
from parse.engines.remote.server_pool import ServerPool
from parse.engines.remote.sglang import SGLang
from parse.engines.remote.startup import measure_call_cost, report_features
from parse.engines.remote.transport import Address, FindDeployment, Transport
from parse.engines.remote.vllm import VLLM
from parse.errors import RequestError, ServerError
from parse.event_loop import EventLoopThread
from parse.registry import LOSSY_MODES, MODES
from parse.types import SamplingParams

logger = logging.getLogger(__name__)

MIN_PREFILL_INTERVAL = 128
"""The draft tokens after which a draft is prefilled while it is written.

For a shorter draft, these calls take more time from the server than they save in the verification. For a long one they
matter, because the prefixes that are verified at the same time cannot share tokens that have not been computed yet."""


def load_remote_engine(
    settings: EngineSettings, config: RemoteEngineConfig, find_deployment: FindDeployment | None = None
) -> RemoteEngine:
    """Raises ValueError, in one line, if a server cannot be used."""
    addresses = find_servers(config, find_deployment)
    if addresses is None:
        raise ValueError(f"engine.deployment: {config.deployment} is still being deployed")
    return RemoteEngine(
        connect(
            settings,
            addresses,
            model_name=config.model_name,
            retry_timeout_s=config.retry_timeout_s,
            dialect=_dialect_of(config),
        )
    )


def check_remote_model(
    settings: EngineSettings, config: RemoteEngineConfig, find_deployment: FindDeployment | None = None
) -> None:
    """Raises ValueError, in one line, if a server cannot be used.

    A deployment that is still being deployed is not checked. The engine does that when it is loaded.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    addresses = find_servers(config, find_deployment)
    if addresses is None:
        logger.warning("%s is still being deployed, so it is checked when the replicas start", config.deployment)
        return
    inspect_servers(addresses, config.model_name, tokenizer, _dialect_of(config))


def connect(
    settings: EngineSettings,
    addresses: Sequence[Address],
    *,
    model_name: str | None,
    retry_timeout_s: float,
    dialect: Dialect | None = None,
) -> Connection:
    """Raises ValueError, in one line, if a server cannot be used.

    Without a `dialect`, the servers are asked for it.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    dialect, identity, features = inspect_servers(addresses, model_name, tokenizer, dialect)

    async def check(server: Transport) -> None:
        identity.check(await dialect.identify(server, identity.name, tokenizer))

    return Connection(
        ServerPool([address.open() for address in addresses], check, retry_timeout_s=retry_timeout_s),
        dialect=dialect,
        model_name=identity.name,
        features=features,
        call_cost=_call_cost(addresses[0], dialect, identity.name, tokenizer, features),
        capabilities=server_capabilities(settings, dialect, identity, features, tokenizer),
        tokenizer=tokenizer,
    )


def find_servers(config: RemoteEngineConfig, find_deployment: FindDeployment | None) -> Sequence[Address] | None:
    """Returns the addresses of the servers, or None if they are still being deployed.

    Raises ValueError if an address is not valid.
    """
    if config.deployment is None:
        return server_addresses(config)
    if find_deployment is None:
        raise ValueError("engine.deployment: it can be called only by the service, which runs on Ray; set url instead")
    address = find_deployment(config)
    return None if address is None else [address]


def server_addresses(config: RemoteEngineConfig) -> list[ServerAddress]:
    """Raises ValueError if there is no key, or no valid file of certificates, where the settings say so."""
    api_key = None
    if config.api_key_env is not None:
        api_key = os.environ.get(config.api_key_env)
        if not api_key:
            raise ValueError(f"engine.api_key_env: the environment variable {config.api_key_env} is not set")
    if config.tls_ca_file is not None:
        try:
            ssl.create_default_context(cafile=config.tls_ca_file)
        except OSError as error:  # the errors of the library include ssl.SSLError, and do not name the file
            raise ValueError(f"engine.tls_ca_file: {config.tls_ca_file}: {error.strerror or error}") from error
    return [
        ServerAddress(
            url,
            connect_timeout_s=config.connect_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            api_key=api_key,
            tls_ca_file=config.tls_ca_file,
        )
        for url in config.urls
    ]


def inspect_servers(
    addresses: Sequence[Address],
    model_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    dialect: Dialect | None = None,
) -> tuple[Dialect, ModelIdentity, ServerFeatures]:
    """Calls all servers. Returns which kind they are, what the first one serves, and what all of them can do.

    The calls run in an event loop of their own, because the caller may run in one and still wants to wait.
    """
    event_loop = EventLoopThread("server check")
    try:
        return event_loop.run(_inspect(addresses, model_name, tokenizer, dialect))
    finally:
        event_loop.close()


def _call_cost(
    address: Address, dialect: Dialect, model: str, tokenizer: PreTrainedTokenizerBase, features: ServerFeatures
) -> float:
    """Returns the cost of a verification apart from its prompts, in prompts, or 0 if the server cannot verify."""

    async def measure() -> float:
        server = address.open()
        try:
            return await measure_call_cost(dialect, server, model, tokenizer, features)
        finally:
            await server.aclose()

    if not features.verifies:
        return 0.0
    event_loop = EventLoopThread("call cost")
    try:
        return event_loop.run(measure())
    finally:
        event_loop.close()


async def _inspect(
    addresses: Sequence[Address],
    model_name: str | None,
    tokenizer: PreTrainedTokenizerBase,
    dialect: Dialect | None,
) -> tuple[Dialect, ModelIdentity, ServerFeatures]:
    identities: list[ModelIdentity] = []
    all_features: list[ServerFeatures] = []
    for address in addresses:
        server = address.open()
        try:
            dialect = dialect or await find_dialect(server)
            name = identities[0].name if identities else model_name
            identities.append(await dialect.identify(server, name, tokenizer))
            identities[0].check(identities[-1])
            all_features.append(await dialect.find_features(server, identities[-1], tokenizer))
            report_features(server, dialect, all_features[-1])
        except (ServerUnavailable, WrongModel, ServerError, RequestError) as error:
            message = error.message if isinstance(error, RequestError) else str(error)
            raise ValueError(f"{server.url}: {message}") from error
        finally:
            await server.aclose()
    assert dialect is not None
    first = all_features[0]
    features = ServerFeatures(
        version=first.version,
        block_size=max(features.block_size for features in all_features),
        verifies=all(features.verifies for features in all_features),
        verifies_by_token_id=all(features.verifies_by_token_id for features in all_features),
        has_prompt_logprobs=all(features.has_prompt_logprobs for features in all_features),
        has_speculation=any(features.has_speculation for features in all_features),
    )
    return dialect, identities[0], features


def _dialect_of(config: RemoteEngineConfig) -> Dialect | None:
    """Returns the dialect that the settings imply, or None if the servers have to be asked for it."""
    return None if config.deployment is None else RayServeLLM()


async def find_dialect(server: Transport) -> Dialect:
    return SGLang() if await SGLang.matches(server) else VLLM()


def server_capabilities(
    settings: EngineSettings,
    dialect: Dialect,
    identity: ModelIdentity,
    features: ServerFeatures,
    tokenizer: PreTrainedTokenizerBase,
) -> Capabilities:
    missing = {*([] if features.verifies else LOSSY_MODES), *([] if features.has_prompt_logprobs else ["exact"])}
    ignored = dialect.ignored_with_speculation if features.has_speculation else frozenset()
    unsupported = dialect.unsupported_sampling_params | ignored
    limits = [settings.max_model_len, *([identity.max_model_len] if identity.max_model_len else [])]
    return Capabilities(
        modes=tuple(name for name, mode in MODES.items() if mode.function and name not in missing),
        speculative_methods=(),
        sampling_params=frozenset(field.name for field in fields(SamplingParams)) - unsupported,
        max_logprobs=dialect.max_logprobs,
        max_model_len=min(limits),
        block_size=features.block_size,
        eos_token_ids=_eos_token_ids(settings.model, tokenizer),
        continues_with_penalties=False,
        # A rejected token is replaced with the help of a bias.
        exact_sampling="greedy" if "logit_bias" in ignored else "unmodified",
        # A server with a method of its own proposes tokens after every prefill, which takes longer than it saves.
        prefill_interval=None if features.has_speculation else _prefill_interval(features.block_size),
        returns_prompt_logprobs=features.has_prompt_logprobs,
        always_speculates=features.has_speculation,
    )


def _prefill_interval(block_size: int) -> int:
    """Returns the smallest number of whole blocks, because only whole blocks are cached, with enough tokens."""
    return -(-MIN_PREFILL_INTERVAL // block_size) * block_size


def _eos_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens at which the server ends an answer: those of the generation config, or of the config."""
    try:
        configured = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        configured = getattr(AutoConfig.from_pretrained(model), "eos_token_id", None)
    token_ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*token_ids, tokenizer.eos_token_id) if isinstance(token, int))
