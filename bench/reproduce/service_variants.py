"""Variants of a configuration: with another port, without keys and audits, and with vLLM's own speculation."""

import copy
from collections.abc import Mapping
from typing import Any

from deployments.launch import BUILDER_IMPORT_PATH

CHANGES = (
    "Changes to your configuration for all PARSE servers: another port on 127.0.0.1 without TLS and keys, no audits, "
    "because they use the target between requests, and all modes can be chosen. The changed files are in configs/.",
)


def service_config(
    config: Mapping[str, Any], port: int, speculative_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the configuration of a service whose target speculates with this method, or not at all."""
    variant = copy.deepcopy(dict(config))
    application = next(app for app in variant["applications"] if app["import_path"] == BUILDER_IMPORT_PATH)
    variant["applications"] = [application | {"route_prefix": "/"}]
    variant["http_options"] = {"host": "127.0.0.1", "port": port}
    args = application["args"]
    args.pop("audit", None)
    api = args.get("api") or {}
    for name in ("api_keys_file", "modes"):
        api.pop(name, None)
    engine = args["target"]["engine"]
    engine_args = {
        name: value
        for name, value in (engine.get("engine_args") or {}).items()
        if name.replace("-", "_") != "speculative_config"
    }
    if speculative_config is not None:
        engine_args["speculative_config"] = copy.deepcopy(dict(speculative_config))
    engine["engine_args"] = engine_args
    return variant
