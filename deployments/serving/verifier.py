"""The target in replicas of its own: judges drafts and writes."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.serving.replica import ModelReplica
from parse.config import EngineSettings
from parse.prompts import VerificationSuffix
from parse.types import MethodChoice, SamplingParams, TokenDelta, VerifyResult


class Verifier(ModelReplica):
    """`parse.protocol.Verifier`, a call at a time."""

    async def __init__(self, settings: EngineSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        super().__init__(settings)
        await self.warm_up()

    async def warm(self, prompt: Sequence[int]) -> int:
        return await self.engine.warm(prompt)

    async def judge(
        self,
        prompt: Sequence[int],
        draft: Sequence[int],
        cuts: Sequence[int],
        check: VerificationSuffix,
        full: float | None,
        prefix: float | None,
        logprobs: int | None,
    ) -> VerifyResult:
        return await self.engine.judge(prompt, draft, cuts, check, full=full, prefix=prefix, logprobs=logprobs)

    async def generate(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        sampling: SamplingParams,
        proposal: Sequence[int],
        piece: int,
        speculation: MethodChoice | None,
    ) -> AsyncGenerator[TokenDelta]:
        stream = self.engine.generate(prompt, output, sampling, proposal=proposal, piece=piece, speculation=speculation)
        async with aclosing(stream) as deltas:
            async for tokens in deltas:
                yield tokens
