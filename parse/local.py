"""Drafter and verifier in this process: a pipeline made of two models."""

from typing import Self

from parse.config import EngineSettings, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET
from parse.demo import DEMO_MODELS as DEMO
from parse.engines.loader import load_native_engine
from parse.engines.native.drafter import drafter_for
from parse.engines.native.engine import NativeEngine
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix

__all__ = ["DEMO", "DEMO_DRAFT", "DEMO_TARGET", "LocalPair"]


class LocalPair:
    """Both models in this process, and the pipeline over them."""

    def __init__(
        self,
        target: EngineSettings,
        draft: EngineSettings | None = None,
        verification: VerificationSettings | None = None,
    ) -> None:
        verification = verification or VerificationSettings.for_model(target.model)
        self.draft: NativeEngine | None = None
        self.target = load_native_engine(target)
        try:
            self.draft = load_native_engine(draft) if draft else None
            self.tokenizer = self.target.model.tokenizer
            suffix = build_verification_suffix(
                self.tokenizer, verification.prompt, verification.correct, verification.incorrect
            )
            drafter = drafter_for(self.draft, self.tokenizer) if self.draft else None
            self.pipeline = Pipeline(
                verifier=self.target,
                capabilities=self.target.capabilities(),
                tokenizer=self.tokenizer,
                suffix=suffix,
                settings=verification,
                drafter=drafter,
                prefill_while_drafting=self.target.model.device.type != "cpu",
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for engine in (self.target, self.draft):
            if engine is not None:
                engine.shutdown()
