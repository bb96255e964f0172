"""Uses the method, mode and endpoint that CONTRIBUTING.md adds, and prints what they do as JSON.

`tests/test_contributing.py` runs this program in a copy of the project with the additions.
"""

import asyncio
import json
from typing import Any

from fastapi.testclient import TestClient

from deployments.api.routes import create_app
from deployments.config import ApiSettings
from deployments.observability.metrics import ROUTER_METRICS, MetricsRecorder
from parse.config import EngineSettings, SpeculativeConfig, VerificationSettings
from parse.demo import DEMO_DRAFT, DEMO_TARGET, EXAMPLE_PROMPT
from parse.engines.drafter import drafter_for
from parse.engines.native_loader import load_native_engine
from parse.events import Finished, TextDelta
from parse.pipeline import Pipeline
from parse.prompts import build_verification_suffix, chat_prompt_token_ids
from parse.requests import GenerationRequest
from parse.types import SamplingParams

SETTINGS: dict[str, Any] = dict(num_threads=1, max_model_len=512, kv_cache_memory_bytes=64 * 2**20)
TEXT = "top Uma 73"
OTHER_MACHINE = "192.0.2.1"


class Backend:
    """The parts of `deployments.api.backend.Backend` that a request for tokens uses."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.recorder = MetricsRecorder(ROUTER_METRICS, deployment="Router")


async def answer(
    pipeline: Pipeline, mode: str, *, method: str = "none", prediction: list[int] | None = None
) -> dict[str, Any]:
    request = GenerationRequest(
        chat_prompt_token_ids(pipeline.tokenizer, [{"role": "user", "content": EXAMPLE_PROMPT}]),
        sampling_params=SamplingParams(temperature=0, max_tokens=200),
        mode=mode,
        speculative_method=method,
        prediction=prediction,
    )
    text, result = "", {}
    async for event in pipeline.generate(request):
        match event:
            case TextDelta():
                text += event.text
            case Finished(usage=usage):
                proposed = usage.speculation.proposed_per_position if usage.speculation else ()
                result = {"mode": usage.mode, "drafted": usage.draft_tokens, "accepted": usage.accepted_tokens}
                result["proposed"] = sum(proposed)
    return {"text": text} | result


async def answers(pipeline: Pipeline) -> dict[str, Any]:
    off = await answer(pipeline, "off")
    long_draft = pipeline.tokenizer.encode(off["text"] + " More." * 60, add_special_tokens=False)
    return {
        "off": off,
        "method": await answer(pipeline, "off", method="repeat"),
        "mode": await answer(pipeline, "cautious"),
        "long": await answer(pipeline, "cautious", prediction=long_draft),
        "auto": await answer(pipeline, "auto"),
    }


def post(pipeline: Pipeline, body: dict[str, Any], client_address: str = "127.0.0.1") -> dict[str, Any]:
    app = create_app(Backend(pipeline), ApiSettings(), "demo-target")  # type: ignore[arg-type]
    response = TestClient(app, base_url="http://localhost", client=(client_address, 1)).post("/count_tokens", json=body)
    return {"status": response.status_code} | response.json()


def main() -> None:
    configs = (SpeculativeConfig(method="repeat"),)
    target = load_native_engine(EngineSettings(model=DEMO_TARGET, speculative_configs=configs, **SETTINGS))
    draft = load_native_engine(EngineSettings(model=DEMO_DRAFT, **SETTINGS))
    tokenizer = target.model.tokenizer
    verification = VerificationSettings.for_model(DEMO_TARGET, auto_mode="cautious")
    suffix = build_verification_suffix(tokenizer, verification.prompt, verification.correct, verification.incorrect)
    pipeline = Pipeline(
        verifier=target,
        capabilities=target.capabilities(),
        tokenizer=tokenizer,
        suffix=suffix,
        settings=verification,
        drafter=drafter_for(draft, tokenizer),
    )
    results = asyncio.run(answers(pipeline)) | {
        "tokens": tokenizer.encode(TEXT, add_special_tokens=False),
        "endpoint": post(pipeline, {"prompt": TEXT}),
        "invalid": post(pipeline, {"prompt": 5}),
        "without key": post(pipeline, {"prompt": TEXT}, OTHER_MACHINE),
    }
    print(json.dumps(results))
    target.shutdown()
    draft.shutdown()


if __name__ == "__main__":
    main()
