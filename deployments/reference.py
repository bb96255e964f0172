"""Writes docs/configuration.md from the settings themselves: python -m deployments.reference > docs/configuration.md"""

import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ray.serve import Application, Deployment

from deployments.app import build
from deployments.config import ApiSettings, AppSettings, AuditSettings
from parse.config import EngineSettings, MethodSettings, SpeculationSettings

TYPE_NAMES: Mapping[object, str] = {str: "text", int: "whole number", float: "number", bool: "true or false"}

HEADER = """\
<!-- Made by `make docs`: change the descriptions of the settings, not this file. -->

# Configuration

One YAML file says all: [serve_config.yaml](../serve_config.yaml) for the demo pair,
[cluster/serve_gpu.yaml](../cluster/serve_gpu.yaml) for a pair on GPUs. It is a
[Ray Serve config](https://docs.ray.io/en/latest/serve/production-guide/config.html); what is ours stands under `args`.
There a key that is not known is refused by its name.

```yaml
http_options:
  host: 127.0.0.1 # another one opens it to the network: have keys then, see api below
  port: 8000
applications:
  - name: parse
    route_prefix: /
    import_path: deployments.app:build
    args: # the tables below
      target: {model: models/demo-target, threads: 1}
      draft: {model: models/demo-draft, threads: 1}
      method: {stride: 6}
      api: {model_name: sums, max_waiting: 32}
    deployments: # the last section
      - name: Verifier
        num_replicas: 2
        ray_actor_options: {num_cpus: 0.5}
```
"""

DEPLOYMENTS_INTRODUCTION = """\
## `deployments`: replicas, autoscaling, resources

Three deployments make the application. What is not named under `deployments` keeps these values (here with the default
settings; the limits on requests follow `api.max_answers`, `api.max_waiting` and each model's `max_running`):

"""

DEPLOYMENTS_NOTES = """\

`Drafter` is there only with a `draft`.

- **GPUs.** Left alone, a model gets a GPU of its own where there are enough, and an even share where there are not;
  with `device: cpu`, or on a cluster without GPUs, none. With several replicas or nodes, write the numbers down.
- **`ray_actor_options` is replaced as a whole**: what you leave out of it is `num_cpus: 1` and `num_gpus: 0`. A model
  without `num_gpus` runs on the CPU, whatever the machine has.
- **One model over several GPUs**: `device: balanced`, and as many `num_gpus`.
- **Cores.** `num_cpus` is what Ray counts when it places a replica. What a model really uses is its `threads`.
- **Autoscaling** takes the place of `num_replicas`:

```yaml
    deployments:
      - name: Verifier
        ray_actor_options: {num_cpus: 2, num_gpus: 1}
        autoscaling_config:
          min_replicas: 1
          max_replicas: 4
          target_ongoing_requests: 24 # calls at the same time, of each replica: under its max_running
          downscale_delay_s: 600 # loading weights takes long
```

All further keys: [Ray Serve's schema](https://docs.ray.io/en/latest/serve/api/index.html#serve-config).
How many of each, and what happens when one is lost: [deploying.md](deploying.md).
"""


def render_configuration_page() -> str:
    parts = [
        HEADER,
        render_section("`args`", AppSettings),
        render_section("`target` and `draft`", EngineSettings),
        render_section(
            "`speculation` of a model",
            SpeculationSettings,
            "A list: `[{method: parallel, head: models/demo-parallel}, {method: ngram}]`. Requests choose among what "
            'stands in that of the target, with [`parse.speculation`](api.md#several-tokens-in-a-pass); "none" they '
            "may always choose.",
        ),
        render_section(
            "`method`",
            MethodSettings,
            "A target's folder may hold some of these keys in a `parse.json`. They go before the defaults, and what is "
            "set here goes before them.",
        ),
        render_section("`api`", ApiSettings),
        render_section("`audit`", AuditSettings),
        DEPLOYMENTS_INTRODUCTION
        + render_table(
            ("", *DEPLOYMENT_COLUMNS), [render_deployment_row(deployment) for deployment in default_deployments()]
        )
        + DEPLOYMENTS_NOTES,
    ]
    return "\n".join(parts)


def render_section(title: str, model: type[BaseModel], notes: str = "") -> str:
    rows = [
        (f"`{name}`", describe_type(field), describe_default(field), describe_meaning(field).replace("|", "\\|"))
        for name, field in model.model_fields.items()
    ]
    text = " ".join(filter(None, (" ".join((model.__doc__ or "").split()), notes)))
    return f"## {title}\n\n{text}\n\n" + render_table(("key", "value", "default", "meaning"), rows)


def render_table(column_names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [column_names, ["---"] * len(column_names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def describe_type(field: FieldInfo) -> str:
    """As one who writes YAML would say it."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    description = ", ".join([_type_name(kind) for kind in kinds if kind is not NoneType] + _describe_bounds(field))
    return f"{description}, or null" if NoneType in kinds else description


def describe_default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default()
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value)}`"


def describe_meaning(field: FieldInfo) -> str:
    """Of settings in a section of their own, what that says of itself."""
    kind = field.annotation
    inherited = kind.__doc__ if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return field.description or " ".join((inherited or "").split())


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + _quote_words(get_args(kind))
    if get_origin(kind) is tuple:
        item_type = get_args(kind)[0]
        if isinstance(item_type, type) and issubclass(item_type, BaseModel):
            return "list of sections"
        return "list of " + (
            _quote_words(get_args(item_type)) if get_origin(item_type) is Literal else _type_name(item_type)
        )
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return TYPE_NAMES[kind]


def _quote_words(words: Sequence[str]) -> str:
    return ", ".join(f'`"{word}"`' for word in words)


def _describe_bounds(field: FieldInfo) -> list[str]:
    match field.metadata:
        case []:
            return []
        case [Ge(ge=low), Le(le=high)]:
            return [f"{low} to {high}"]
        case [Ge(ge=low)]:
            return [f"at least {low}"]
        case [Gt(gt=low)]:
            return [f"above {low}"]
        case [MinLen(min_length=1)]:
            return ["not empty"]
        case others:
            raise TypeError(f"no words for {others}")


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
    return list_deployments(build(settings))


def list_deployments(application: Application) -> list[Deployment]:
    """All that an application consists of, the one that answers HTTP first."""
    root = application._bound_deployment
    nested = [argument for argument in root.init_args if isinstance(argument, Application)]
    return [root, *(deployment for one in nested for deployment in list_deployments(one))]


if __name__ == "__main__":
    print(render_configuration_page(), end="")
