"""Checks models before anything is loaded, so that a deployment that cannot work replaces nothing.

The checks read configs, tokenizers, chat templates, heads and the headers of the weights. They need neither a GPU nor
the memory of the models. Loading can still fail, for example if a GPU has too little free memory: the process that
checks usually sees no GPU, and the replicas of an earlier version still use theirs.
"""

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parse.config import EngineSettings, VerificationSettings
from parse.engine_config import RemoteEngineConfig, VLLMEngineConfig
from parse.engines.drafter import shares_vocabulary
from parse.engines.native.checkpoint import load_skeleton, readable_bytes, weight_bytes
from parse.engines.native.model import check_supported
from parse.engines.remote.loader import check_remote_model
from parse.engines.remote.transport import FindDeployment
from parse.engines.vllm.loader import check_vllm
from parse.errors import ModelLoadError
from parse.pair_settings import check_model_folder, model_load_error
from parse.prompts import build_verification_suffix, chat_prompt_token_ids, validate_template_kwargs
from parse.registry import METHODS, is_built_in, resolve
from parse.speculative.proposers.base import LoadContext
from parse.speculative.proposers.draft_model import check_same_tokenizer


def check_models(
    target: EngineSettings,
    draft: EngineSettings | None,
    verification: VerificationSettings,
    *,
    memory_bytes: int | None = None,
    on_this_node: bool = False,
    find_deployment: FindDeployment | None = None,
) -> None:
    """Raises ModelLoadError, which names the setting, the model and what is wrong with it in one line.

    `memory_bytes` is the machine's memory if all models run on the CPUs of one machine, and otherwise None.
    `on_this_node` says that the replicas cannot be on another node. `find_deployment` finds the deployments that
    engines call.
    """
    network, tokenizer = _check_model("target", target, on_this_node=on_this_node, find_deployment=find_deployment)
    needed_bytes = _weight_bytes(network, target)
    _check_methods("target", target, network, tokenizer)
    try:
        settings = VerificationSettings.for_model(target.model, **verification.model_dump(exclude_unset=True))
        build_verification_suffix(
            tokenizer,
            settings.prompt,
            settings.correct,
            settings.incorrect,
            template_kwargs=validate_template_kwargs(tokenizer, target.chat_template_kwargs),
        )
    except ValueError as error:
        raise model_load_error("target", target.model, error) from error
    if draft is not None:
        draft_network, draft_tokenizer = _check_model(
            "draft", draft, on_this_node=on_this_node, find_deployment=find_deployment
        )
        needed_bytes += _weight_bytes(draft_network, draft)
        _check_methods("draft", draft, draft_network, draft_tokenizer)
        if not shares_vocabulary(draft_tokenizer, tokenizer):
            try:
                kwargs = validate_template_kwargs(draft_tokenizer, draft.chat_template_kwargs)
                chat_prompt_token_ids(draft_tokenizer, [{"role": "user", "content": "Hello."}], kwargs)
            except ValueError as error:
                raise model_load_error("draft", draft.model, error) from error
    if memory_bytes is not None and needed_bytes > memory_bytes:
        message = f"its weights{' and those of the draft model' if draft else ''} need {readable_bytes(needed_bytes)}"
        raise model_load_error(
            "target", target.model, ValueError(f"{message}, and this machine has {readable_bytes(memory_bytes)}")
        )


def _check_methods(
    argument: str, settings: EngineSettings, network: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks the token-level methods of a model."""
    for index, config in enumerate(settings.speculative_configs):
        name = f"{argument}.speculative_configs[{index}]"
        if not is_built_in(config.method):  # a method of the operator may need the weights of the model
            continue
        try:
            assert network is not None  # a remote engine has no methods
            if METHODS[config.method].loads_language_model and config.model:
                other, other_tokenizer = _check_model(name, EngineSettings(model=config.model))
                assert other is not None
                vocab_size = other.config.get_text_config().vocab_size
                check_same_tokenizer(config.model, other_tokenizer, vocab_size, tokenizer)
            else:
                resolve(METHODS[config.method].loader)(config, LoadContext(network, tokenizer, "cpu", settings.dtype))
        except ModelLoadError:
            raise
        except Exception as error:  # damaged files raise many kinds of errors in the libraries
            raise model_load_error(name, config.model or config.method, _as_value_error(error)) from error


def _weight_bytes(network: PreTrainedModel | None, settings: EngineSettings) -> int:
    """Returns the size of the weights on a CPU, where the dtype "auto" means float32, or 0 if it is not known."""
    if network is None:
        return 0
    return weight_bytes(network.config, "float32" if settings.dtype == "auto" else settings.dtype) or 0


def _check_model(
    argument: str,
    settings: EngineSettings,
    *,
    on_this_node: bool = False,
    find_deployment: FindDeployment | None = None,
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Returns the network without its weights, unless it runs on a server, and the tokenizer."""
    is_remote = isinstance(settings.engine, RemoteEngineConfig)
    check_model_folder(argument, settings.model, has_weights=not is_remote)
    try:
        if isinstance(settings.engine, VLLMEngineConfig):
            target_tokenizer = AutoTokenizer.from_pretrained(settings.model)
            check_vllm(settings, settings.engine, on_this_node=on_this_node)
            return None, target_tokenizer
        if isinstance(settings.engine, RemoteEngineConfig):
            target_tokenizer = AutoTokenizer.from_pretrained(settings.model)
            check_remote_model(settings, settings.engine, find_deployment)
            return None, target_tokenizer
        network, tokenizer = load_skeleton(settings.model)
        check_supported(network)
    except Exception as error:  # damaged files raise many kinds of errors in the libraries
        raise model_load_error(argument, settings.model, _as_value_error(error)) from error
    return network, tokenizer


def _as_value_error(error: Exception) -> ValueError:
    return error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")
