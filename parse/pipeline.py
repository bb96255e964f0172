"""The pipeline of PARSE: draft, verify, accept, generate.

A drafter writes a draft, and the target verifies prefixes of it in parallel. The acceptance rule decides which prefix
is kept, and the target generates the rest.

The pipeline uses a drafter and a verifier through two small protocols, so the same code runs in one process and across
machines. Each call is independent of earlier ones. If a drafter fails, the target generates the whole answer,
which takes longer. The service runs each answer as a task of its own (`CompletionHandler._generate` in
`deployments/api/handlers.py`), so the drafter writes for one request while the verifier works on another.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from parse.acceptance import AcceptancePolicy
from parse.config import VerificationSettings
from parse.controller import DraftingController, DraftingOutcome
from parse.engines.protocol import Capabilities, Drafter, Verifier
from parse.errors import FallbackCause
from parse.events import Event, Fallback, Finished, PromptLogprobs, Usage
from parse.modes.run import Run
from parse.modes.state import GenerationState
from parse.prefixes import DEFAULT_STRIDE
from parse.prompts import VerificationSuffix, visible_reasoning_tags
from parse.reasoning import ReasoningParser
from parse.registry import LOSSY_MODES, MODES, resolve
from parse.requests import GenerationRequest, VerifyRequest, session_key
from parse.types import Logprob, validate_token_ids


@dataclass(frozen=True)
class _ModeChoice:
    """The mode that answers a request."""

    mode: str
    fallback: Fallback | None = None
    """Why the target answers alone, if another mode was requested."""
    is_trial: bool = False
    """Whether this request is a trial, whose outcome decides whether drafting resumes."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Answers requests with a verifier and, if there is one, a drafter."""

    verifier: Verifier
    capabilities: Capabilities
    """The capabilities of the verifier."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the target."""
    suffix: VerificationSuffix
    settings: VerificationSettings
    drafter: Drafter | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the target's chat template, which a request can replace."""
    prefill_while_drafting: bool = True
    """Whether the target prefills the prompt while the drafter writes. If both share a processor, it is faster to
    compute the prompt and the draft in one pass."""
    controller: DraftingController = field(default_factory=DraftingController)

    def __post_init__(self) -> None:
        auto_mode, modes = self.settings.auto_mode, self.capabilities.modes
        if auto_mode is not None and auto_mode not in modes:
            raise ValueError(f"verification.auto_mode: this engine supports {', '.join(modes)}, got {auto_mode}")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Answers one request and yields its events.

        The events are the text as it is generated, the verification of each draft, and finally the usage of the answer.
        """
        self.capabilities.check(request)
        if not request.session_key:
            request = replace(request, session_key=session_key(request.prompt_token_ids))
        if request.prediction is not None:
            prediction = validate_token_ids("prediction", request.prediction, len(self.tokenizer))
            request = replace(request, prediction=prediction)
        if request.num_prompt_logprobs is not None:
            yield PromptLogprobs(await self._prompt_logprobs(request, request.num_prompt_logprobs))
        if request.sampling_params.max_tokens == 0:
            yield Finished("length", Usage("off"))
            return
        choice = self._choose_mode(request)
        run = self._start(request, choice)
        working = asyncio.create_task(_work(run))
        try:
            while (event := await run.state.events.get()) is not None:
                yield event
            await working  # raises the exception of the mode
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        usage = run.state.usage()
        # An answer without a draft counts only if the controller decided so. After a failed drafter it says little.
        answered_alone = choice.fallback is not None and choice.fallback.cause == "does_not_pay"
        if (usage.draft_tokens or answered_alone) and _informs_controller(request):
            self.controller.record(
                DraftingOutcome(
                    draft_tokens=usage.draft_tokens,
                    accepted_tokens=usage.accepted_tokens,
                    target_tokens=usage.target_tokens,
                    total_s=usage.total_s,
                    target_s=usage.seconds("write"),
                ),
                is_trial=choice.is_trial,
            )
        yield Finished(run.state.finish_reason or "length", usage)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer of the target."""
        return self.capabilities.eos_token_ids or frozenset((self.tokenizer.eos_token_id,))

    async def _prompt_logprobs(self, request: GenerationRequest, num_logprobs: int) -> tuple[Logprob, ...]:
        prompt = request.prompt_token_ids
        if len(prompt) < 2:
            return ()
        result = await self.verifier.verify(
            VerifyRequest(
                prompt_token_ids=prompt[:1],
                draft_token_ids=prompt[1:],
                prefix_lengths=(),
                suffix=self.suffix,
                num_logprobs=num_logprobs,
                session_key=request.session_key,
            )
        )
        return result.logprobs

    def _choose_mode(self, request: GenerationRequest) -> _ModeChoice:
        is_auto = request.mode == "auto"
        mode = self._auto_mode(request) if is_auto else request.mode
        is_trial = False
        if is_auto and mode == "off":
            return _fallback("unreliable", "this target does not verify drafts")
        if mode in LOSSY_MODES and request.reasoning in ("open", "expected"):
            return _fallback("reasoning", "the answer begins with reasoning, which is not drafted")
        obstacle = self.capabilities.draft_obstacle(mode, request.sampling_params)
        if MODES[mode].uses_draft and obstacle is not None:
            return _fallback("unsupported", obstacle)
        if is_auto and request.prediction is None:  # a prediction costs no drafting
            decision = self.controller.decide(may_be_trial=_informs_controller(request))
            if not decision.draft:
                return _fallback("does_not_pay", decision.reason)
            is_trial = decision.is_trial
        if MODES[mode].uses_draft and self.drafter is None and request.prediction is None:
            return _fallback("none_there", "there is no drafter")
        return _ModeChoice(mode, is_trial=is_trial)

    def _auto_mode(self, request: GenerationRequest) -> str:
        """Returns the mode in which `auto` drafts.

        With a speculative method, the tokens of the target are so cheap that another draft after a correction costs
        more than it saves. The choice depends on the request and the settings only, not on other requests.
        """
        if self.settings.auto_mode is not None:
            return self.settings.auto_mode
        has_method = (request.speculative_method or self.capabilities.default_method) != "none"
        preferred = ("full", "rounds", "progressive") if has_method else ("rounds", "full", "progressive")
        return next((mode for mode in preferred if mode in self.capabilities.modes), "off")

    def _start(self, request: GenerationRequest, choice: _ModeChoice) -> Run:
        params = request.sampling_params
        context_limit = self.capabilities.max_model_len - len(request.prompt_token_ids)
        max_tokens = context_limit if params.max_tokens is None else min(params.max_tokens, context_limit)
        return Run(
            request=request,
            sampling_params=replace(params, max_tokens=max_tokens) if max_tokens > 0 else params,
            state=GenerationState(
                choice.mode,
                choice.fallback,
                self.tokenizer,
                params,
                len(request.prompt_token_ids),
                ReasoningParser(
                    visible_reasoning_tags(self.tokenizer) if request.reasoning else None, request.reasoning
                ),
            ),
            verifier=self.verifier,
            drafter=self.drafter,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            suffix=self.suffix,
            policy=AcceptancePolicy(
                request.thresholds or self.settings.thresholds(),
                self.settings.rule,
                self.settings.min_answer_mass,
                self.settings.exhaustive,
            ),
            settings=self.settings,
            prefill_while_drafting=self.prefill_while_drafting,
            stride=self.settings.stride or self.capabilities.stride or DEFAULT_STRIDE,
            prefill_interval=self.capabilities.prefill_interval,
        )


def _informs_controller(request: GenerationRequest) -> bool:
    """Whether the controller learns from the answer to a request.

    It decides for all clients, so one client's own choices of a mode, of thresholds, of a speculative method or of a
    draft must not influence it.
    """
    own_choices = (request.thresholds, request.speculative_method, request.prediction)
    return request.mode == "auto" and all(choice is None for choice in own_choices)


def _fallback(cause: FallbackCause, message: str) -> _ModeChoice:
    return _ModeChoice("off", Fallback(cause, message))


async def _work(run: Run) -> None:
    """Runs the mode, and then puts None after the last event.

    It does so even if the mode raises an exception.
    """
    function = MODES[run.state.mode].function
    assert function is not None
    try:
        await resolve(function)(run)
        run.state.close()
    finally:
        run.state.events.put_nowait(None)
