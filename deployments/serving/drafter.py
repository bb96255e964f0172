"""The draft model in replicas of its own: writes whole answers, or windows of them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from transformers import AutoTokenizer

from deployments.serving.replica import ModelReplica
from parse.config import EngineSettings
from parse.engines.native.drafter import drafter_for
from parse.protocol import NO_STREAMING, GenerationRequest
from parse.types import TokenDelta, merge_deltas


class Drafter(ModelReplica):
    async def __init__(self, settings: EngineSettings, target: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        super().__init__(settings)
        self._drafter = drafter_for(self.engine, AutoTokenizer.from_pretrained(target))
        await self.warm_up()

    async def draft_complete(self, request: GenerationRequest, output: Sequence[int]) -> TokenDelta:
        """In one piece: a single call costs less than a stream."""
        async with aclosing(self._drafter.draft(request, output, stream_interval=NO_STREAMING)) as deltas:
            return merge_deltas([tokens async for tokens in deltas])

    async def draft(
        self, request: GenerationRequest, output: Sequence[int], stream_interval: int
    ) -> AsyncGenerator[TokenDelta]:
        async with aclosing(self._drafter.draft(request, output, stream_interval=stream_interval)) as deltas:
            async for tokens in deltas:
                yield tokens
