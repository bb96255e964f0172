"""The draft model in replicas of its own: writes whole answers, or windows of them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from transformers import AutoTokenizer

from deployments.serving.replica import Host
from parse.config import EngineSettings
from parse.engines.native.drafter import drafter_for
from parse.protocol import NO_STREAMING, GenerationRequest
from parse.types import TokenDelta, merge_deltas


class Drafter(Host):
    async def __init__(self, settings: EngineSettings, target: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        super().__init__(settings)
        self._drafter = drafter_for(self.service, AutoTokenizer.from_pretrained(target))
        await self.warm_up()

    async def draft_whole(self, question: GenerationRequest, output: Sequence[int]) -> TokenDelta:
        """In one piece: a single call costs less than a stream."""
        async with aclosing(self._drafter.draft(question, output, stream_interval=NO_STREAMING)) as pieces:
            return merge_deltas([tokens async for tokens in pieces])

    async def draft(self, question: GenerationRequest, output: Sequence[int], piece: int) -> AsyncGenerator[TokenDelta]:
        async with aclosing(self._drafter.draft(question, output, stream_interval=piece)) as pieces:
            async for tokens in pieces:
                yield tokens
