"""Writes docs/engines.md, with a table of what the engines of this project declare.

python -m deployments.engine_reference > docs/engines.md
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields

from transformers import AutoTokenizer

from deployments.app import assemble
from deployments.config import PROJECT_ROOT
from deployments.launch import read_config
from deployments.reference import render_table
from parse.config import EngineSettings
from parse.demo import DEMO_TARGET
from parse.engines.native_loader import load_native_engine
from parse.engines.protocol import Capabilities
from parse.engines.remote.dialect import Dialect, ModelIdentity, ServerFeatures
from parse.engines.remote.loader import server_capabilities
from parse.engines.remote.ray_serve_llm import RayServeLLM
from parse.engines.remote.sglang import SGLang
from parse.engines.remote.vllm import VLLM
from parse.types import SamplingParams

INTRODUCTION = """\
<!-- `make docs` writes this file. Change deployments/engine_reference.py instead. -->

# Engines

An engine runs a model. The target and the draft model choose theirs independently, with `engine` in the
[configuration](configuration.md#engine-of-a-model).

| `kind` | what runs the model | choose it if |
| --- | --- | --- |
| `native` (default) | the engine of this project, in the replica | you want the methods of `speculative_configs` (EAGLE-3, ParallelSpec, SPACE, n-gram, draft model) and answers that a seed fixes; on CPUs it is faster than vLLM ([measured](../bench/RESULTS.md)). It has not run on a GPU yet. |
| `vllm` | a vLLM server that the replica starts on its GPUs and supervises | you have GPUs, and one deployment should place and restart everything: tensor parallelism, FP8, AWQ or GPTQ weights, CUDA graphs, vLLM's own speculation |
| `remote` with `url` | a vLLM or SGLang server that runs already, by its address | you operate the server yourself and want to put PARSE in front of it, see [vllm.md](vllm.md) |
| `remote` with `deployment` | a deployment of Ray Serve LLM in the same Ray cluster, through its handle | Ray Serve LLM runs your model already, see [below](#ray-serve-llm). The automated tests use a stand-in for it. |

A draft model can use another engine than its target: in [serve_vllm_demo.yaml](../serve_vllm_demo.yaml), the target runs in vLLM
and the draft model in the native engine.

## What an engine can do

Each engine declares this when it starts. A request that needs more gets a 400 that names the field. The table shows the demo target
of `serve_config.yaml` in the native engine, vLLM 0.32, SGLang, and Ray Serve LLM. The clients for SGLang and Ray Serve LLM follow their
source code and documentation. The one for SGLang has never called a real SGLang, and the one for Ray Serve LLM has called a real one
only [once by hand](#ray-serve-llm).

"""

VLLM_NOTES = """
## vLLM in the replica

```yaml
target:
  model: Qwen/Qwen3-32B
  engine:
    kind: vllm
    executable: /opt/vllm/bin/python # the Python interpreter of an environment with vLLM
    engine_args: {tensor_parallel_size: 4, quantization: fp8}
```

[cluster/serve_vllm.yaml](../cluster/serve_vllm.yaml) is a whole configuration for five GPUs, with one variant in
[FP8](../cluster/serve_vllm_fp8.yaml), one with [EAGLE-3](../cluster/serve_vllm_eagle3.yaml), and one for
[KubeRay](../cluster/rayservice_vllm.yaml). None of them has been tried on hardware.
On a machine without GPUs, this command runs the demo target in vLLM. It installs vLLM's build for CPUs first:

```
.venv/bin/python -m deployments serve_vllm_demo.yaml
```

- **The environment.** vLLM needs other versions of some packages than this project, so install it in an environment of its own, at the
  same path on all nodes that run such replicas, and name its interpreter in `executable`. Tested versions: 0.27 to 0.32.
- **Arguments.** `engine_args` takes the arguments of `vllm serve`, with underscores or hyphens. Mappings are passed as JSON, `true` and
  `false` become `--name` and `--no-name`, and null leaves an argument out. The replica sets the model, `max_model_len` (from the setting beside `engine`) and the address
  itself. vLLM listens on a Unix socket that only the replica's user can open, so there is no port that could be in use.
- **GPUs.** A replica gets as many GPUs as `tensor_parallel_size`, `pipeline_parallel_size` and `data_parallel_size` need together. If
  you set `num_gpus` yourself, it must be that number.
- **CPUs.** For an `executable` with vLLM's build for CPUs, set `num_gpus: 0` in the `ray_actor_options` of the deployment.
- **Wrong arguments** are reported when you deploy, in vLLM's words, before anything is replaced. On a cluster with several nodes, only
  the names and the types of the arguments can be checked then, because the GPUs and vLLM may be on another node.
- **A vLLM that cannot start.** If an earlier version serves, and the cluster has enough free GPUs for one more vLLM, the new one is
  started once before the deployment. If it does not start, the deployment fails with the errors in its log, and the earlier version
  keeps serving. In this trial, it gets the environment and the resources of a replica of the earlier version. On CPUs, it also needs as much memory.
  Without free GPUs, Ray Serve has to stop a replica of the earlier version first. With several replicas, the others keep
  serving. With a single one, nothing serves until you deploy the earlier version again.
- **Failures.** If vLLM ends, or its `/health` does not respond for `stall_timeout_s`, the replica kills what is left of it and starts it
  again. Calls wait meanwhile, for up to `retry_timeout_s`, and are then repeated or continued. An answer with `presence_penalty` or
  `frequency_penalty` that has begun cannot be continued, and a call that is interrupted five times fails, because it may be the cause.
  After three failed starts, the replica reports itself as broken, and Ray Serve replaces it. If the replica ends, all processes of its
  vLLM end too.
- **Logs and metrics.** vLLM's log is part of the replica's log. Its metrics (`vllm:...`) are on the service's `/metrics`, with the labels
  of the replica. `parse_engine_server_restarts_total` counts the restarts.
- **Several nodes for one model.** Pipeline parallelism over nodes needs vLLM's Ray backend: set
  `distributed_executor_backend: ray` and `pipeline_parallel_size`, and install the same version of Ray in vLLM's environment. vLLM then
  reserves the GPUs of all nodes in a placement group of its own, so the replica itself gets none. This has not been tried.
"""

RAY_SERVE_LLM_NOTES = """
## Ray Serve LLM

**No automated test uses a real Ray Serve LLM.** The client follows the source code of Ray 2.60, and the tests use a deployment with the
same methods, and a real vLLM 0.32 for the streams that Ray Serve LLM passes on. The log says so at start-up. A configuration like the following one has been
tried once by hand, with the demo pair on CPUs: Ray 2.60, vLLM's build for CPUs 0.32 in an environment of its own, and one replica. All
modes answered, and no request was lost when that replica was killed. It has not been tried on GPUs, and not with vLLM 0.29, which `ray[llm]`
installs.

```yaml
applications:
  - name: llm
    route_prefix: /llm
    import_path: ray.serve.llm:build_openai_app
    args:
      llm_configs:
        - model_loading_config: {model_id: qwen3-32b, model_source: Qwen/Qwen3-32B}
          engine_kwargs: {max_model_len: 8192, enable_prompt_tokens_details: true}
          deployment_config:
            num_replicas: 2
            request_router_config: # the calls of one conversation go to the same replica
              request_router_class: ray.serve.experimental.consistent_hash_router.ConsistentHashRouter
  - name: parse
    route_prefix: /
    import_path: deployments.app:build
    args:
      target:
        model: Qwen/Qwen3-32B # the tokenizer and the chat template are read from here
        max_model_len: 8192
        engine: {kind: remote, deployment: "llm/LLMServer:qwen3-32b"}
      draft: {model: Qwen/Qwen3-0.6B}
```

- **The name** is that of the application and that of its deployment, with a slash in between. Ray Serve LLM calls a deployment `LLMServer:` and
  the `model_id`, with `--` for a slash and `_` for a dot. `serve status` shows it. If it is still being deployed, the replicas of this service wait for it
  for up to `retry_timeout_s`. If it does not exist, nothing is deployed or replaced.
- **The environment.** The replicas of this service need no vLLM, because they read only text: all completions are streamed. If they have none,
  they cannot read two other things. One is the settings of the deployment, so the context length is not known: set `max_model_len` to
  the same value on both sides. The other one is the message of an error, for example about a prompt that is too long: the client gets a 502, and the log of
  Ray Serve LLM has the message.
- **Affinity.** The calls of one conversation have the same session id, so with the `ConsistentHashRouter` they go to the same replica, whose prefix
  cache they share. Ray Serve LLM's `PrefixCacheAffinityRouter` works too: it gets the token ids of the prompt as a text. With another router, for
  example the default one, several replicas do not share a cache, and verifications are slower.
- **What a handle does not have.** There are no metrics of vLLM, because Ray Serve LLM exports them itself. LoRA adapters and models on
  SGLang are not supported. A bias that has no effect tells that vLLM speculates: see the table above.
- **`api_key_env`, `tls_ca_file` and `connect_timeout_s`** are about HTTP, and are rejected together with `deployment`.
- **Failures.** A call is repeated, and a stream continues after its last token, if its replica is lost. [vllm.md](vllm.md#failures) describes the rest, which is the
  same as over HTTP.
- **Latency.** Ray Serve LLM collects the chunks of a stream for 50 ms. Set `stream_batching_interval_ms` in its `experimental_configs` to
  change that. Calls that generate one token, such as verifications, do not wait for it.
"""

IDENTITY = ModelIdentity(name="demo-target", root=DEMO_TARGET, max_model_len=1024, logprobs=())
SETTINGS = EngineSettings(model=DEMO_TARGET, max_model_len=1024)
EXACT_SAMPLING = {
    "any": "with all sampling parameters",
    "unmodified": "with temperature 0, and with temperature 1 without truncation, penalties or bias",
    "greedy": "with temperature 0",
}

ROWS: Mapping[str, Callable[[Capabilities], str]] = {
    "modes": lambda capabilities: _codes(capabilities.modes),
    "`parse.speculation` of a request": lambda capabilities: (
        "the server chooses" if capabilities.always_speculates else _codes(capabilities.method_choices)
    ),
    "rejected sampling parameters": lambda capabilities: _codes(
        field.name for field in fields(SamplingParams) if field.name not in capabilities.sampling_params
    ),
    "`exact` uses drafts": lambda capabilities: EXACT_SAMPLING[capabilities.exact_sampling],
    "drafts with `presence_penalty` or `frequency_penalty`": lambda capabilities: (
        "used" if capabilities.continues_with_penalties else "not used"
    ),
    "log-probabilities per token": lambda capabilities: f"up to {capabilities.max_logprobs}",
    "log-probabilities of the prompt": lambda capabilities: "yes" if capabilities.returns_prompt_logprobs else "no",
    "prefill of a draft while it is written": lambda capabilities: (
        "yes" if capabilities.prefill_interval else "not needed" if capabilities.speculative_methods else "no"
    ),
}


def declared_capabilities() -> dict[str, Capabilities]:
    """Returns the capabilities of each engine, by the title of its column."""
    _, served = read_config(PROJECT_ROOT / "serve_config.yaml")
    native = load_native_engine(assemble(served)[1].target)
    try:
        capabilities = {"`native`": native.capabilities()}
    finally:
        native.shutdown()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TARGET)
    servers: list[tuple[str, Dialect, bool]] = [
        ("vLLM (`vllm`, `remote`)", VLLM(), False),
        ("vLLM with `speculative_config`", VLLM(), True),
        ("SGLang (`remote`), untested", SGLang(), False),
        ("Ray Serve LLM (`remote`), untested", RayServeLLM(), False),
    ]
    for title, dialect, speculates in servers:
        features = ServerFeatures(
            version="",
            block_size=16,
            verifies=True,
            verifies_by_token_id=not speculates,
            has_prompt_logprobs=True,
            has_speculation=speculates,
        )
        capabilities[title] = server_capabilities(SETTINGS, dialect, IDENTITY, features, tokenizer)
    return capabilities


def render_engines_page() -> str:
    declared = declared_capabilities()
    rows = [(title, *(describe(each) for each in declared.values())) for title, describe in ROWS.items()]
    return INTRODUCTION + render_table(("", *declared), rows) + VLLM_NOTES + RAY_SERVE_LLM_NOTES


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


if __name__ == "__main__":
    print(render_engines_page(), end="")
