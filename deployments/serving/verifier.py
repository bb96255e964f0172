"""The verifier deployment: the target verifies drafts and generates."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.serving.replica import ModelReplica
from parse.config import EngineSettings
from parse.engines.protocol import Capabilities
from parse.requests import GenerateRequest, VerifyAndGenerateRequest, VerifyRequest
from parse.types import TokenDelta, VerifyResult


class Verifier(ModelReplica):
    """Implements `parse.engines.protocol.Verifier` in Ray Serve replicas."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        super().__init__(settings)
        await self.warm_up()

    async def capabilities(self) -> Capabilities:
        return self.engine.capabilities()

    async def prefill(self, prompt_token_ids: Sequence[int], session_key: str = "") -> int:
        return await self.engine.prefill(prompt_token_ids, session_key)

    async def verify(self, request: VerifyRequest) -> VerifyResult:
        return await self.engine.verify(request)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def verify_and_generate(self, request: VerifyAndGenerateRequest) -> AsyncGenerator[VerifyResult | TokenDelta]:
        async with aclosing(self.engine.verify_and_generate(request)) as items:
            async for item in items:
                yield item
