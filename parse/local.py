"""Drafter and verifier in this process: a pipeline from two models, ready to answer."""

from pathlib import Path
from typing import Self

from parse.config import EngineSettings, MethodSettings
from parse.engines.loader import load_native_engine
from parse.engines.native.drafter import drafter_for
from parse.engines.native.service import NativeEngine
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix

DEMO = Path(__file__).parents[1] / "models"
DEMO_TARGET, DEMO_DRAFT = str(DEMO / "demo-target"), str(DEMO / "demo-draft")


class LocalPair:
    """Both models in this process, and the pipeline over them."""

    def __init__(
        self, target: EngineSettings, draft: EngineSettings | None = None, method: MethodSettings | None = None
    ) -> None:
        method = method or MethodSettings.for_model(target.model)
        self.draft: NativeEngine | None = None
        self.target = load_native_engine(target)
        try:
            self.draft = load_native_engine(draft) if draft else None
            self.tokenizer = self.target.model.tokenizer
            check = build_verification_suffix(self.tokenizer, method.check_question, method.correct, method.incorrect)
            drafter = drafter_for(self.draft, self.tokenizer) if self.draft else None
        except BaseException:
            self.close()
            raise
        self.pipeline = Pipeline(
            verifier=self.target,
            tokenizer=self.tokenizer,
            check=check,
            settings=method,
            drafter=drafter,
            longest=self.target.max_model_len,
            methods=self.target.methods,
            warms=self.target.model.device.type != "cpu",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for service in (self.target, self.draft):
            if service is not None:
                service.shutdown()
