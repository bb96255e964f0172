"""The engine of a model on a server, or on several servers with the same model."""

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from parse.acceptance import next_batch, passes
from parse.engines.protocol import Capabilities, EngineStats
from parse.engines.remote.dialect import Chunk, Dialect, PromptLogprob, ServerFeatures
from parse.engines.remote.errors import ServerUnavailable
from parse.engines.remote.output import OutputBuilder
from parse.engines.remote.server_pool import ServerPool
from parse.engines.remote.transport import Transport
from parse.engines.remote.verification import AnswerFirstPolicy, answer_probabilities, result_of, search_cost
from parse.engines.request_checks import RequestChecks, stop_detokenizer
from parse.errors import ServerError
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import Logprob, SamplingParams, TokenDelta, VerifyResult

MAX_PREFIXES_PER_CALL = 64
MIN_PREFILL_TOKENS = 256  # of a prompt that is prefilled while the server is busy
METRICS_TIMEOUT_S = 2.0
EXCLUDED = -100.0  # the bias of a token that must not be sampled


@dataclass(frozen=True)
class Connection:
    """Servers that were checked, and what they can do."""

    pool: ServerPool
    dialect: Dialect
    model_name: str
    features: ServerFeatures
    call_cost: float
    """The measured cost of a verification apart from its prompts, in prompts."""
    capabilities: Capabilities
    tokenizer: PreTrainedTokenizerBase


class RemoteEngine:
    """Sends each call to a server. Calls may be made at the same time, all of them in one event loop."""

    def __init__(self, connection: Connection) -> None:
        self.name, self.tokenizer = connection.model_name, connection.tokenizer
        self._pool, self._dialect, self._features = connection.pool, connection.dialect, connection.features
        self._capabilities = connection.capabilities
        self._checks = RequestChecks(len(self.tokenizer), self._capabilities.max_model_len)
        self._answer_first = AnswerFirstPolicy(connection.call_cost)
        self._metrics: dict[str, str] = {}  # of each server, as they were read last

    @property
    def device(self) -> str:
        return "remote"

    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def warm_up(self) -> None:
        """The server has done that when it started."""

    async def read_stats(self) -> EngineStats:
        """Returns the sums of the metrics of all servers.

        A server that does not respond keeps its counters, so that they do not seem to grow when it responds again.
        """
        failing = 0
        for member, metrics in zip(
            self._pool.members, await asyncio.gather(*map(_read_metrics, self._pool.servers)), strict=True
        ):
            url = member.server.url
            self._metrics[url] = self._dialect.counters(self._metrics.get(url, "")) if metrics is None else metrics
            failing += metrics is None or member.failure is not None
        stats = self._dialect.read_stats(list(self._metrics.values()))
        return replace(stats, servers_responding=len(self._metrics) - failing, servers_failing=failing)

    def check_health(self) -> None:
        """A replacement could not reach the server either."""

    async def check_available(self) -> None:
        await self._pool.check_available()

    def shutdown(self) -> None:
        self._pool.close()

    async def prefill(self, prompt_token_ids: Sequence[int], session_key: str = "") -> int:
        """Lets the server compute a prompt. Returns how many of its tokens were cached.

        It does nothing if the call would cost more time than it saves: the server keeps only whole blocks, and if it is
        busy, a call costs it more than the later computation of a short prompt.
        """
        prompt = self._checks.prompt(prompt_token_ids)
        is_short = len(prompt) < MIN_PREFILL_TOKENS
        if len(prompt) < self._features.block_size or (is_short and self._pool.is_busy(session_key)):
            return 0
        return await self._pool.call(session_key, lambda server: self._dialect.prefill(server, self.name, prompt))

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        """Evaluates each prefix as a prompt of its own. The prefix cache of the server keeps what they share."""
        request = self._checks.verification(request)
        tokens = [*request.prompt_token_ids, *request.output_token_ids, *request.draft_token_ids]
        start = len(tokens) - len(request.draft_token_ids)
        lengths, width = request.prefix_lengths, len(request.suffix.token_ids)
        num_evaluable = sum(1 for length in lengths if start + length + width < self._checks.max_model_len)
        complete = request.draft_complete and num_evaluable == len(lengths)
        min_answer_mass = request.policy.min_answer_mass if request.policy else 0.0
        p_correct: dict[int, float | None] = {}
        answer_mass: dict[int, float] = {}
        batch_after = partial(
            next_batch,
            num_evaluable,
            policy=request.policy,
            complete=complete,
            max_batch=MAX_PREFIXES_PER_CALL,
            batch_seconds=search_cost,
        )
        answer_first = complete and self._answer_first.decide(len(batch_after({}, answer_first=False)) - 1)
        while batch := batch_after(p_correct, answer_first=answer_first):
            prompts = [[*tokens[: start + lengths[index]], *request.suffix.token_ids] for index in batch]
            for index, (p, mass) in zip(batch, await self._evaluate(request, prompts), strict=True):
                answer_mass[index] = mass
                p_correct[index] = p if mass >= min_answer_mass else None  # None passes no threshold, not even 0
        if complete and request.policy is not None:
            self._answer_first.record(passes(p_correct.get(len(lengths) - 1), request.policy.thresholds.full))
        result = result_of(len(lengths), p_correct, answer_mass)
        if request.num_logprobs is None:
            return result
        entries = await self._prompt_logprobs(
            request.session_key, tokens[: start + request.num_computed_draft_tokens], start, request.num_logprobs
        )
        return replace(result, logprobs=tuple(entry.logprob for entry in entries))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        """Yields the generated tokens. Closing the generator ends the call on the server too."""
        request = self._checks.generation(request)
        output = OutputBuilder(request, self._checks.max_new_tokens(request), stop_detokenizer(request, self.tokenizer))
        if request.draft_token_ids:
            async with aclosing(self._accept_draft(request, output)) as deltas:
                async for delta in deltas:
                    yield delta
        if output.finish_reason is None:
            async with aclosing(self._continue(request, output)) as deltas:
                async for delta in deltas:
                    yield delta

    async def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        result = await self.verify(request.verify)
        yield result
        continuation = request.continuation(request.accepted_prefix_length(result))
        if continuation is not None:
            async with aclosing(self.generate(continuation)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _evaluate(self, request: VerifyRequest, prompts: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Returns P(correct) and the probability of both answers together, for each prompt."""
        suffix = request.suffix
        by_token_id = self._features.verifies_by_token_id
        answers = sorted({*suffix.correct_token_ids, *suffix.incorrect_token_ids})

        async def call(server: Transport) -> list[Mapping[int, float]]:
            return await self._dialect.next_token_logprobs(server, self.name, prompts, answers, by_token_id=by_token_id)

        tops = await self._pool.call(request.session_key, call)
        return [answer_probabilities(top, suffix, all_returned=by_token_id) for top in tops]

    async def _prompt_logprobs(
        self, session_key: str, prompt: Sequence[int], start: int, num_logprobs: int
    ) -> list[PromptLogprob]:
        async def call(server: Transport) -> list[PromptLogprob]:
            return await self._dialect.prompt_logprobs(server, self.name, prompt, start, num_logprobs)

        return await self._pool.call(session_key, call)

    async def _continue(
        self, request: GenerateRequest, output: OutputBuilder, *, one_token: bool = False
    ) -> AsyncGenerator[TokenDelta]:
        """Generates what follows the output, or only its next token."""
        params = request.sampling_params
        eos_token_ids = self._capabilities.eos_token_ids
        excluded_end_token_ids = eos_token_ids.union(params.stop_token_ids)
        end_token_ids = params.end_token_ids(eos_token_ids)
        excluded_end_token_ids -= params.included_end_token_ids(eos_token_ids)
        chunks = self._pool.stream(
            request.session_key,
            lambda server: self._chunks(server, request, output, 1 if one_token else output.num_remaining),
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                token_ids, finish_reason = chunk.token_ids, chunk.finish_reason
                if finish_reason == "length" and token_ids and token_ids[-1] in end_token_ids:
                    finish_reason = "stop"  # some servers check the limit first
                if finish_reason == "stop" and token_ids and token_ids[-1] in excluded_end_token_ids:
                    token_ids = token_ids[:-1]
                if finish_reason == "length" and one_token:
                    finish_reason = None
                delta = output.add(token_ids, chunk.logprobs, finish_reason, num_cached_tokens=chunk.num_cached_tokens)
                if delta is not None:
                    yield delta
                if output.finish_reason is not None:
                    return

    async def _chunks(
        self, server: Transport, request: GenerateRequest, output: OutputBuilder, max_new_tokens: int
    ) -> AsyncGenerator[Chunk]:
        """Streams what follows the output. If an earlier stream was lost, that is what follows its last token."""
        params = request.sampling_params
        if output.token_ids and (params.presence_penalty or params.frequency_penalty):
            raise ServerError("an answer with presence_penalty or frequency_penalty cannot be continued")
        chunks = self._dialect.generate(
            server,
            self.name,
            [*request.prompt_token_ids, *output.token_ids],
            params,
            max_new_tokens=max_new_tokens,
            position=len(output.token_ids),
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def _accept_draft(self, request: GenerateRequest, output: OutputBuilder) -> AsyncGenerator[TokenDelta]:
        """Accepts draft tokens without changing the distribution of the output.

        With greedy decoding, a token is accepted if it is the most likely one. Otherwise, it is accepted with its own
        probability, and the first rejected one is replaced by a token that is sampled among all others.
        """
        params = request.sampling_params
        end_tokens = params.end_token_ids(self._capabilities.eos_token_ids)
        draft = list(request.draft_token_ids[: max(0, output.num_remaining - 1)])
        draft = draft[: next((index for index, token in enumerate(draft) if token in end_tokens), len(draft))]
        if not draft:
            return
        context = [*request.prompt_token_ids, *request.output_token_ids]
        prompt, num_logprobs = [*context, *draft], params.logprobs or 0
        entries = await self._prompt_logprobs(request.session_key, prompt, len(context), num_logprobs)
        num_accepted = 0
        for position, entry in enumerate(entries, len(request.output_token_ids)):
            if not _accepts(entry, params, position):
                break
            num_accepted += 1
        logprobs: Sequence[Logprob] = ()
        if params.logprobs is not None:
            logprobs = [entry.logprob for entry in entries[:num_accepted]]
        if num_accepted and (delta := output.add(draft[:num_accepted], logprobs, accepted=True)) is not None:
            yield delta
        if output.finish_reason is not None or params.greedy or num_accepted == len(draft):
            return
        excluding = replace(request, sampling_params=replace(params, logit_bias={draft[num_accepted]: EXCLUDED}))
        async with aclosing(self._continue(excluding, output, one_token=True)) as deltas:
            async for delta in deltas:
                yield delta


def _accepts(entry: PromptLogprob, params: SamplingParams, position: int) -> bool:
    if params.greedy:
        return entry.is_argmax
    return random.Random(f"{params.seed}/{position}").random() < math.exp(entry.logprob.logprob)


async def _read_metrics(server: Transport) -> str | None:
    try:
        async with asyncio.timeout(METRICS_TIMEOUT_S):
            return await server.get_text("/metrics")
    except ServerError:  # it has none, as SGLang without --enable-metrics
        return ""
    except (TimeoutError, ServerUnavailable):
        return None
