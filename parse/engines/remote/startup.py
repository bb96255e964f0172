"""What a server can do, found out by calling it before any client does."""

import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence

from transformers import PreTrainedTokenizerBase

from parse.engines.remote.dialect import Dialect, ServerFeatures
from parse.engines.remote.errors import ServerUnavailable
from parse.engines.remote.transport import Transport
from parse.errors import RequestError, ServerError

logger = logging.getLogger(__name__)

# Words, digits, code, accents, another script and an emoji, so that different tokenizers give different tokens.
SAMPLE_TEXT = "The 3 quick brown foxes: def f(x):\n    return x ** 2  # naïve 東京 🦊 12,345.67"
NUM_SAMPLES = 8  # sample_prompts of the text after which the next token is compared
NUM_ATTEMPTS = 3  # of a call at start-up that is lost
NUM_PREFIX_TOKENS = 24  # of a verification suffix and a part of a block
NUM_TIMED_PROMPTS = 9
NUM_TIMINGS = 3
MIN_PROMPT_S = 1e-5


def sample_prompts(tokens: Sequence[int]) -> list[list[int]]:
    """Returns prompts after which the next token is compared, to tell models apart."""
    return [list(tokens[: -(-len(tokens) * number // NUM_SAMPLES)]) for number in range(1, NUM_SAMPLES + 1)]


async def verifies(
    dialect: Dialect, server: Transport, model: str, prompt: Sequence[int], *, by_token_id: bool
) -> bool:
    """Returns whether the server returns the log-probabilities that a verification needs."""
    token_ids = sorted({prompt[0], prompt[-1]})

    async def trial() -> bool:
        tops = await dialect.next_token_logprobs(
            server, model, [prompt, prompt[:-1]], token_ids, by_token_id=by_token_id
        )
        if by_token_id:
            return all(set(token_ids) <= set(top) for top in tops)  # an old server ignores unknown fields
        return all(len(top) >= dialect.max_logprobs for top in tops)

    return await works(trial)


async def returns_prompt_logprobs(dialect: Dialect, server: Transport, model: str, prompt: Sequence[int]) -> bool:
    async def trial() -> bool:
        return len(await dialect.prompt_logprobs(server, model, prompt, 1, 0)) == len(prompt) - 1

    return await works(trial)


async def measure_call_cost(
    dialect: Dialect, server: Transport, model: str, tokenizer: PreTrainedTokenizerBase, features: ServerFeatures
) -> float:
    """Returns the cost of a verification apart from its prompts, in prompts.

    The prompts are as long as what a prefix adds to its context. They are random, so that none of them is cached.
    """
    generator, tokens = random.Random(), tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False)

    async def seconds(num_prompts: int) -> float:
        prompts = [generator.choices(tokens, k=NUM_PREFIX_TOKENS) for _ in range(num_prompts)]
        answers, by_token_id = prompts[0][:2], features.verifies_by_token_id
        started = time.perf_counter()
        await dialect.next_token_logprobs(server, model, prompts, answers, by_token_id=by_token_id)
        return time.perf_counter() - started

    try:
        one_s = min([await seconds(1) for _ in range(NUM_TIMINGS)])
        all_s = min([await seconds(NUM_TIMED_PROMPTS) for _ in range(NUM_TIMINGS)])
    except (ServerUnavailable, ServerError, RequestError) as error:
        logger.warning("%s: the cost of a call cannot be measured: %s", server.url, error)
        return 0.0
    prompt_s = max(MIN_PROMPT_S, (all_s - one_s) / (NUM_TIMED_PROMPTS - 1))
    return max(0.0, one_s / prompt_s - 1)


async def works(trial: Callable[[], Awaitable[bool]]) -> bool:
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


def report_features(server: Transport, dialect: Dialect, features: ServerFeatures) -> None:
    """Logs what the server lacks, and whether this version was tested."""
    missing = list(features.missing)
    if not features.verifies:
        missing.append("log-probabilities (so drafts cannot be verified)")
    elif not features.verifies_by_token_id:
        missing.append("log-probabilities of chosen tokens (verification uses the most likely tokens instead)")
    if not features.has_prompt_logprobs:
        missing.append("log-probabilities of the prompt (so mode exact is not offered)")
    if missing:
        logger.warning("%s, %s %s: it lacks %s", server.url, dialect.kind, features.version, "; ".join(missing))
    if dialect.tested_versions is None:
        logger.warning("%s: no version of %s was tested", server.url, dialect.kind)
        return
    oldest, newest = dialect.tested_versions
    numbers = re.match(r"(\d+)\.(\d+)", features.version)
    if numbers is None or not oldest <= (int(numbers[1]), int(numbers[2])) <= newest:
        versions = " to ".join(".".join(map(str, version)) for version in (oldest, newest))
        logger.warning("%s: %s %s was not tested; tested: %s", server.url, dialect.kind, features.version, versions)
