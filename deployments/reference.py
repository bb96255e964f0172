"""Writes docs/configuration.md from the settings.

python -m deployments.reference > docs/configuration.md
"""

import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ray.serve import Application, Deployment

from deployments.app import assemble
from deployments.config import ApiSettings, AppSettings, AuditSettings
from parse.config import DraftingSettings, EngineSettings, SpeculativeConfig, VerificationSettings
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.renamed_settings import RENAMED_SETTINGS
from parse.settings import OneOf

TYPE_NAMES: Mapping[object, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}

HEADER = """\
<!-- `make docs` writes this file. Change the descriptions of the settings instead. -->

# Configuration

One YAML file holds the whole configuration. [serve_config.yaml](../serve_config.yaml) is for the demo pair, and
[cluster/serve_gpu.yaml](../cluster/serve_gpu.yaml) for two models on GPUs. The file is a
[Ray Serve config](https://docs.ray.io/en/latest/serve/production-guide/config.html). The settings of this project are
under `args`. An unknown key is rejected, and the error suggests the most similar known key. If a key was
[renamed](#renamed-settings), the error names the new key.

```yaml
http_options:
  host: 127.0.0.1 # the default is 0.0.0.0, which opens the API to the network; set bearer keys first (see `api` below)
  port: 8000
applications:
  - name: parse
    route_prefix: /
    import_path: deployments.app:build
    args: # the tables below
      target: {model: models/demo-target, num_threads: 1}
      draft: {model: models/demo-draft, num_threads: 1}
      verification: {stride: 6}
      api: {model_name: sums, max_queued_requests: 32}
    deployments: # see "deployments" below
      - name: Verifier
        num_replicas: 2
        ray_actor_options: {num_cpus: 0.5}
```
"""

DEPLOYMENTS_INTRODUCTION = """\
## `deployments`: replicas, autoscaling, resources

The application has three deployments. If you do not set a key under `deployments`, it gets the value in this table.
The limits on requests depend on `api.max_answers`, `api.max_queued_requests` and the `max_num_seqs` of each
model. The table shows the values for the defaults of these settings.

"""

DEPLOYMENTS_NOTES = """\

`Drafter` exists only with a `draft`.

- **GPUs.** By default, each model gets its own GPU if there are enough GPUs, and an equal share of them if there are
  not. It gets no GPU with `device: cpu`, or on a cluster without GPUs. Set `num_gpus` if you run several replicas or
  nodes.
- **`ray_actor_options` is replaced as a whole.** If you set it without `num_cpus` or `num_gpus`, these become 1 and 0.
  A model with `num_gpus: 0` runs on the CPU, even if the machine has GPUs.
- **One model on several GPUs.** Set `device: balanced`, and set `num_gpus` to the number of GPUs.
- **vLLM.** With `engine: {kind: vllm}`, a model gets as many GPUs as the parallel sizes in `engine_args` need.
- **Cores.** Ray uses `num_cpus` to decide where it places a replica. The number of cores that a model actually uses is
  its `num_threads`.
- **Autoscaling.** Set `autoscaling_config` instead of `num_replicas`:

```yaml
    deployments:
      - name: Verifier
        ray_actor_options: {num_cpus: 2, num_gpus: 1}
        autoscaling_config:
          min_replicas: 1
          max_replicas: 4
          target_ongoing_requests: 24 # concurrent calls per replica; keep it below its max_num_seqs
          downscale_delay_s: 600 # a new replica takes a long time to load its weights
```

[Ray Serve's schema](https://docs.ray.io/en/latest/serve/api/index.html#serve-config) describes all other keys.
[deploying.md](deploying.md) says how many replicas you need, and what happens when a replica is lost.

"""

RENAMED_SETTINGS_INTRODUCTION = """\
## Renamed settings

These keys had other names in earlier versions. A configuration that still has an old name is rejected.

"""


def render_configuration_page() -> str:
    parts = [
        HEADER,
        render_section("`args`", AppSettings),
        render_section("`target` and `draft`", EngineSettings),
        render_section(
            "`engine` of a model",
            VLLMEngineConfig,
            "The default is `{kind: native}`, which has no other keys. This table is for `kind: vllm`. "
            "[engines.md](engines.md) helps to choose an engine.",
        ),
        render_section(
            "`engine` with `kind: remote`",
            RemoteEngineConfig,
            "[vllm.md](vllm.md) describes what a server can do, and [engines.md](engines.md#ray-serve-llm) what is "
            "different with Ray Serve LLM.",
        ),
        render_section(
            "`speculative_configs` of a model",
            SpeculativeConfig,
            "The value is a list, for example `[{method: parallel, model: models/demo-parallel}, {method: ngram}]`. A "
            "request can choose one of the target's methods or `none` with "
            "[`parse.speculation`](api.md#several-tokens-in-a-pass).",
        ),
        render_section(
            "`drafting` of the draft model",
            DraftingSettings,
            "For example `draft: {model: ..., speculative_configs: [{method: parallel, model: ...}], drafting: {check: "
            "unsure}}`.",
        ),
        render_section(
            "`verification`",
            VerificationSettings,
            "The target's folder can contain some of these keys in a file `parse.json`. They replace the defaults. "
            "Keys in your configuration replace both.",
        ),
        render_section("`api`", ApiSettings),
        render_section("`audit`", AuditSettings),
        DEPLOYMENTS_INTRODUCTION
        + render_table(
            ("", *DEPLOYMENT_COLUMNS), [render_deployment_row(deployment) for deployment in default_deployments()]
        )
        + DEPLOYMENTS_NOTES
        + RENAMED_SETTINGS_INTRODUCTION
        + render_renamed_settings(),
    ]
    return "\n".join(parts)


def render_section(title: str, model: type[BaseModel], notes: str = "") -> str:
    rows = [
        (f"`{name}`", describe_type(field), describe_default(field), describe_meaning(field).replace("|", "\\|"))
        for name, field in model.model_fields.items()
    ]
    text = " ".join(filter(None, (" ".join((model.__doc__ or "").split()), notes)))
    return f"## {title}\n\n{text}\n\n" + render_table(("key", "value", "default", "meaning"), rows)


def render_renamed_settings() -> str:
    rows = [
        (f"`{setting.section}`", f"`{setting.old_name}`", f"`{setting.new_name}`", setting.conversion)
        for setting in RENAMED_SETTINGS
    ]
    return render_table(("section", "old name", "new name", "change of the value"), rows)


def render_table(column_names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [column_names, ["---"] * len(column_names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def describe_type(field: FieldInfo) -> str:
    """Returns the type and the bounds of a setting in words."""
    types = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    choices = [item for item in field.metadata if isinstance(item, OneOf)]
    bounds = [item for item in field.metadata if not isinstance(item, OneOf)]
    names = [_choice_name(choice.names) for choice in choices] or [
        _type_name(item) for item in types if item is not NoneType
    ]
    description = ", ".join([*names, *_describe_bounds(bounds)])
    return f"{description}, or null" if NoneType in types else description


def describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value)}`"


def describe_meaning(field: FieldInfo) -> str:
    """Returns the description of a setting.

    For a section this is the docstring of its class.
    """
    annotation = field.annotation
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    section_description = annotation.__doc__ if is_section else None
    return field.description or " ".join((section_description or "").split())


def _type_name(annotation: Any) -> str:
    if names := _choices(annotation):
        return _choice_name(names)
    if get_origin(annotation) is tuple:
        item_type = get_args(annotation)[0]
        if isinstance(item_type, type) and issubclass(item_type, BaseModel):
            return "list of sections"
        names = _choices(item_type)
        return "list of " + (_quote_words(names) if names else _type_name(item_type))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if get_origin(annotation) is dict:
        return "mapping"
    return TYPE_NAMES[annotation]


def _choices(annotation: Any) -> Sequence[str]:
    """Returns the values that an annotation allows, or an empty sequence.

    The annotation is a Literal, or refers to a registry of names.
    """
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is Annotated:
        return [name for item in annotation.__metadata__ if isinstance(item, OneOf) for name in item.names]
    return ()


def _choice_name(names: Sequence[str]) -> str:
    return f"one of {_quote_words(names)}" if len(names) > 1 else _quote_words(names)


def _quote_words(words: Sequence[str]) -> str:
    return ", ".join(f'`"{word}"`' for word in words)


def _describe_bounds(bounds: Sequence[object]) -> list[str]:
    match bounds:
        case []:
            return []
        case [Ge(ge=low), Le(le=high)]:
            return [f"{low} to {high}"]
        case [Gt(gt=low), Le(le=high)]:
            return [f"above {low}, at most {high}"]
        case [Ge(ge=low)]:
            return [f"at least {low}"]
        case [Gt(gt=low)]:
            return [f"above {low}"]
        case [MinLen(min_length=1)]:
            return ["not empty"]
        case others:
            raise TypeError(f"no description for {others}")


DEPLOYMENT_COLUMNS = (
    "`num_replicas`",
    "`ray_actor_options`",
    "`max_ongoing_requests`",
    "`max_queued_requests`",
    "`graceful_shutdown_timeout_s`",
)


def render_deployment_row(deployment: Deployment) -> list[str]:
    config = deployment._deployment_config
    cpus = (deployment.ray_actor_options or {})["num_cpus"]
    gpus = "" if deployment.name == "Router" else ", num_gpus: see below"
    queued = deployment.max_queued_requests
    return [
        f"`{deployment.name}`",
        str(deployment.num_replicas),
        f"num_cpus: {cpus:g}{gpus}",
        str(deployment.max_ongoing_requests),
        "no limit" if queued < 0 else str(queued),
        f"{config.graceful_shutdown_timeout_s:g}",
    ]


def default_deployments() -> list[Deployment]:
    settings = AppSettings(target=EngineSettings(model="target"), draft=EngineSettings(model="draft"))
    return list_deployments(assemble(settings)[0])


def list_deployments(application: Application) -> list[Deployment]:
    """Returns all deployments of an application.

    The first one answers HTTP.
    """
    root = application._bound_deployment
    nested = [argument for argument in root.init_args if isinstance(argument, Application)]
    return [root, *(deployment for child in nested for deployment in list_deployments(child))]


if __name__ == "__main__":
    print(render_configuration_page(), end="")
