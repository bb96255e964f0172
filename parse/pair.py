"""Two models in this process: the pipeline as a library."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self, Unpack

from parse.config import EngineSettings, VerificationSettings
from parse.engines.drafter import drafter_for
from parse.engines.protocol import Engine
from parse.errors import EngineStopped, RequestError
from parse.event_loop import EventLoopThread
from parse.events import Event
from parse.generation_output import GenerationOutput
from parse.options import GenerateOptions, Prompt, build_request
from parse.pair_settings import (
    ModelChoice,
    engine_settings,
    load_engine,
    model_load_error,
    read_pair_settings,
    verification_settings,
)
from parse.pipeline import Pipeline
from parse.prompts import TemplateError, build_verification_suffix, validate_template_kwargs
from parse.requests import GenerationRequest
from parse.verification_check import measure_answer_mass, without_unreliable_modes


class Pair:
    """A target and a draft model in this process.

        with Pair("path/to/target", "path/to/draft") as pair:
            print(pair.generate("What is 7 times 8?", mode="full", temperature=0))

    Synchronous calls can be made from several threads at once, and even where an event loop runs, as in Jupyter. The
    asynchronous ones can be awaited in any event loop. Calls that run at the same time share the forward passes of the
    models.
    """

    def __init__(
        self, target: ModelChoice, draft: ModelChoice | None = None, *, verification: VerificationSettings | None = None
    ) -> None:
        """Loads the models, each from a folder or by its Hugging Face id.

        The tokenizers of the models may differ. Pass `EngineSettings` instead to set the device, the memory or
        token-level methods. Without a draft model, the target answers alone or verifies your predictions.
        `verification` replaces the settings in the target's folder. To change some of them, pass
        `VerificationSettings.for_model(target, stride=4)`.
        """
        target_settings = engine_settings("target", target)
        draft_settings = None if draft is None else engine_settings("draft", draft)
        if verification is not None:
            verification = verification_settings(verification, target_settings.model)
        self._names = (target_settings.model, draft_settings and draft_settings.model)
        resources = ExitStack()
        # The finalizer closes the pair only once: in `close`, on garbage collection, or when the interpreter exits.
        self._finalizer = weakref.finalize(self, resources.close)
        try:
            self.target = load_engine("target", target_settings)
            resources.callback(_shut_down, self.target)
            self.draft = None if draft_settings is None else load_engine("draft", draft_settings)
            if self.draft is not None:
                resources.callback(_shut_down, self.draft)
            self.tokenizer = self.target.tokenizer
            verification = verification_settings(verification, target_settings.model)
            # Resources are closed in reverse order. The event loop is therefore closed first, and no request sees an
            # engine that has ended.
            self._event_loop = EventLoopThread(f"pair {target_settings.model}")
            resources.callback(self._event_loop.close)
            self.pipeline = self._build_pipeline(verification, target_settings, draft_settings)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, path: str | Path) -> Self:
        """Loads the pair that a YAML file describes.

        The file has the sections `target`, `draft` and `verification`. It can also be the configuration of a service,
        such as serve_config.yaml. Its sections `api` and `audit` are about the service and have no effect here.
        Relative paths of models refer to the folder of the file.
        """
        settings = read_pair_settings(path)
        return cls(settings.target, settings.draft, verification=settings.verification_for_target())

    def generate(self, prompt: Prompt, *, mode: str = "auto", **options: Unpack[GenerateOptions]) -> GenerationOutput:
        """Answers a prompt: the text of a user message, or a list of messages.

        `mode` says how drafts are used (`parse.registry.MODES`). The other options are the fields of `SamplingParams`,
        such as `temperature`, `max_tokens` and `seed`, and those of `GenerateOptions`. As in the HTTP API, the default
        temperature is 1. The seed is 0 unless you set it. The same call gives the same text in the modes `off` and
        `exact`, and in other modes if the same drafts are accepted.
        """
        return self._event_loop.run(self._collect(self._request(prompt, mode, options)))

    def stream(self, prompt: Prompt, *, mode: str = "auto", **options: Unpack[GenerateOptions]) -> Generator[Event]:
        """Yields the events of an answer while it is written.

        These are `TextDelta` and `Verification`, and finally `Finished`. The arguments are those of `generate`. The
        answer is aborted if you close the generator or drop it.
        """
        return self._stream(self._request(prompt, mode, options))

    async def agenerate(
        self, prompt: Prompt, *, mode: str = "auto", **options: Unpack[GenerateOptions]
    ) -> GenerationOutput:
        """Answers a prompt as `generate` does.

        The answer is aborted if the calling task is cancelled.
        """
        return await self._event_loop.run_async(self._collect(self._request(prompt, mode, options)))

    def astream(
        self, prompt: Prompt, *, mode: str = "auto", **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """Yields the events of `stream` asynchronously. `aclose` aborts the answer."""
        return self._astream(self._request(prompt, mode, options))

    def close(self) -> None:
        """Aborts all calls and ends the engines. Further calls raise `EngineStopped`."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        target, draft = self._names
        return f"Pair({target!r}, {draft!r}{'' if self._finalizer.alive else ', closed'})"

    def _build_pipeline(
        self, verification: VerificationSettings, target: EngineSettings, draft: EngineSettings | None
    ) -> Pipeline:
        capabilities = self.target.capabilities()
        try:
            template_kwargs = validate_template_kwargs(self.tokenizer, target.chat_template_kwargs)
            suffix = build_verification_suffix(
                self.tokenizer,
                verification.prompt,
                verification.correct,
                verification.incorrect,
                template_kwargs=template_kwargs,
            )
        except (TemplateError, RequestError) as error:
            raise model_load_error("target", target.model, error) from error
        drafter = None
        if self.draft is not None and draft is not None:
            try:
                drafter = drafter_for(self.draft, self.tokenizer, draft.chat_template_kwargs)
            except TemplateError as error:
                raise model_load_error("draft", draft.model, error) from error
        answer_mass = self._event_loop.run(
            measure_answer_mass(
                self.target,
                self.tokenizer,
                suffix,
                verification.self_check_prompts,
                capabilities.max_model_len,
                template_kwargs,
            )
        )
        return Pipeline(
            verifier=self.target,
            capabilities=without_unreliable_modes(capabilities, answer_mass, verification, target.model),
            chat_template_kwargs=template_kwargs,
            tokenizer=self.tokenizer,
            suffix=suffix,
            settings=verification,
            drafter=drafter,
            prefill_while_drafting=self.target.device != "cpu",
        )

    def _request(self, prompt: Prompt, mode: str, options: GenerateOptions) -> GenerationRequest:
        if not self._finalizer.alive:
            raise EngineStopped("the pair is closed; create a new Pair, or make the call inside its `with` block")
        return build_request(
            prompt,
            mode,
            options,
            tokenizer=self.tokenizer,
            chat_template_kwargs=self.pipeline.chat_template_kwargs,
            capabilities=self.pipeline.capabilities,
            has_drafter=self.pipeline.drafter is not None,
        )

    async def _collect(self, request: GenerationRequest) -> GenerationOutput:
        events = [event async for event in self.pipeline.generate(request)]
        has_logprobs = request.sampling_params.logprobs is not None
        return GenerationOutput.from_events(events, request.prompt_token_ids, has_logprobs=has_logprobs)

    def _stream(self, request: GenerationRequest) -> Generator[Event]:
        yield from self._event_loop.iterate(lambda: self.pipeline.generate(request))

    async def _astream(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        events = self._event_loop.iterate_async(lambda: self.pipeline.generate(request))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


def _shut_down(engine: Engine) -> None:
    # The error is raised if garbage collection runs this in the engine's own thread, which then ends by itself.
    with suppress(RuntimeError):
        engine.shutdown()
