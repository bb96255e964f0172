"""What a server can do, found out by calling it before any client does."""

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from parse.engines.remote import vllm
from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.server import Server
from parse.errors import RequestError, ServerError

logger = logging.getLogger(__name__)

# Words, digits, code, accents, another script and an emoji, so that different tokenizers give different tokens.
SAMPLE_TEXT = "The 3 quick brown foxes: def f(x):\n    return x ** 2  # naïve 東京 🦊 12,345.67"
NUM_SAMPLES = 8  # beginnings of the text after which the next token is compared
MAX_GAP = 0.1  # nats per token; other kernels and batches change log-probabilities by much less
OLDEST_TESTED, NEWEST_TESTED = (0, 27), (0, 32)  # versions of vLLM
DEFAULT_BLOCK_SIZE = 16
NUM_ATTEMPTS = 3  # of a call at start-up that is lost


@dataclass(frozen=True)
class ModelIdentity:
    """Tells whether two servers, or one server before and after a restart, serve the same model."""

    name: str
    root: str
    """Where the server loaded the model from."""
    max_model_len: int
    logprobs: tuple[float, ...]
    """Of the most likely token after some beginnings of a fixed text. Other weights give other values."""

    def check(self, other: "ModelIdentity") -> None:
        """Raises WrongModel if the other model is not this one."""
        if (self.root, self.max_model_len) != (other.root, other.max_model_len):
            raise WrongModel(
                f"it serves {other.root} with a context of {other.max_model_len} tokens instead of {self.root} with "
                f"{self.max_model_len}"
            )
        gap = fmean(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))
        if gap > MAX_GAP:
            raise WrongModel(f"it serves {other.root} with other weights than before")


@dataclass(frozen=True)
class ServerFeatures:
    """The calls of a server that work, and its settings that matter here."""

    version: str
    block_size: int
    verifies: bool
    """Whether it returns the log-probabilities of the answer words."""
    verifies_by_token_id: bool
    """Whether it returns those of any tokens, and not only of the most likely ones."""
    has_prompt_logprobs: bool
    has_speculation: bool
    """Whether it generates with a speculative method of its own."""


async def identify_model(server: Server, model_name: str | None, tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """Raises WrongModel if the server serves no such model, or one with another tokenizer."""
    try:
        card = vllm.read_model_card(await server.get_json("/v1/models"), model_name)
    except ValueError as error:
        raise WrongModel(str(error)) from error
    name = str(card["id"])
    tokens = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
    body = vllm.prefill_body(name, []) | {
        "prompt": SAMPLE_TEXT,
        "add_special_tokens": False,
        "return_token_ids": True,
        "logprobs": 0,
    }
    choices = vllm.read_choices(await server.post(vllm.COMPLETIONS, body), 1)
    if choices[0].get("prompt_token_ids") != tokens:
        raise WrongModel(f"the tokenizer of {card.get('root')} on the server differs from the one of the settings")
    beginnings = [tokens[: -(-len(tokens) * number // NUM_SAMPLES)] for number in range(1, NUM_SAMPLES + 1)]
    body = vllm.prefill_body(name, []) | {
        "prompt": beginnings,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
    }
    tops = vllm.read_verification(await server.post(vllm.COMPLETIONS, body), len(beginnings))
    return ModelIdentity(
        name=name,
        root=str(card.get("root") or name),
        max_model_len=int(card.get("max_model_len") or 0),
        logprobs=tuple(max(top.values()) for top in tops),
    )


async def find_features(server: Server, model: ModelIdentity, tokenizer: PreTrainedTokenizerBase) -> ServerFeatures:
    """Tries the calls that some versions of vLLM lack."""
    prompt = tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)
    by_token_id = await _works(partial(_verifies, server, model.name, prompt, by_token_id=True))
    verifies = by_token_id or await _works(partial(_verifies, server, model.name, prompt, by_token_id=False))
    has_prompt_logprobs = await _works(partial(_returns_prompt_logprobs, server, model.name, prompt))
    try:
        version = str((await server.get_json("/version"))["version"])
    except (ServerUnavailable, ServerError, RequestError, LookupError, TypeError):
        version = "unknown"
    try:
        metrics = await server.get_text("/metrics")
    except (ServerUnavailable, ServerError, RequestError):
        metrics = ""
    block_size = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', metrics)
    features = ServerFeatures(
        version=version,
        block_size=int(block_size[1]) if block_size else DEFAULT_BLOCK_SIZE,
        verifies=verifies,
        verifies_by_token_id=by_token_id,
        has_prompt_logprobs=has_prompt_logprobs,
        has_speculation="vllm:spec_decode_num_drafts" in metrics,
    )
    _report(server, features)
    return features


async def _works(trial: Callable[[], Awaitable[bool]]) -> bool:
    """Returns whether a trial succeeds.

    A lost call says nothing about it and is repeated: vLLM closes the connection after an error of an earlier trial.
    """
    for attempt in range(NUM_ATTEMPTS):
        try:
            return await trial()
        except ServerUnavailable as error:
            if error.deterministic:
                return False
            if attempt == NUM_ATTEMPTS - 1:
                raise
        except (ServerError, RequestError):
            return False
    raise AssertionError("unreachable")


async def _verifies(server: Server, name: str, prompt: Sequence[int], *, by_token_id: bool) -> bool:
    token_ids = sorted({prompt[0], prompt[-1]})
    body = vllm.verification_body(name, [prompt, prompt[:-1]], token_ids, by_token_id=by_token_id)
    tops = vllm.read_verification(await server.post(vllm.COMPLETIONS, body), 2)
    if by_token_id:
        return all(set(token_ids) <= set(top) for top in tops)  # an old server ignores unknown fields
    return all(len(top) >= vllm.MAX_TOP_LOGPROBS for top in tops)


async def _returns_prompt_logprobs(server: Server, name: str, prompt: Sequence[int]) -> bool:
    response = await server.post(vllm.COMPLETIONS, vllm.prompt_logprobs_body(name, prompt, 0))
    return len(vllm.read_prompt_logprobs(response, prompt, 1, 0)) == len(prompt) - 1


def _report(server: Server, features: ServerFeatures) -> None:
    missing = []
    if not features.verifies:
        missing.append("log-probabilities (so drafts cannot be verified)")
    elif not features.verifies_by_token_id:
        missing.append("log-probabilities of chosen tokens (verification uses the most likely tokens instead)")
    if not features.has_prompt_logprobs:
        missing.append("log-probabilities of the prompt (so mode exact is not offered)")
    if missing:
        logger.warning("%s, vLLM %s: it lacks %s", server.url, features.version, "; ".join(missing))
    numbers = re.match(r"(\d+)\.(\d+)", features.version)
    if numbers is None or not OLDEST_TESTED <= (int(numbers[1]), int(numbers[2])) <= NEWEST_TESTED:
        versions = sorted({".".join(map(str, version)) for version in (OLDEST_TESTED, NEWEST_TESTED)})
        logger.warning("%s: vLLM %s was not tested; tested: %s", server.url, features.version, " to ".join(versions))
