"""The drafter deployment: the draft model writes drafts."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from transformers import AutoTokenizer

from deployments.serving.replica import ModelReplica
from parse.config import EngineSettings
from parse.engines.drafter import drafter_for
from parse.requests import DraftRequest
from parse.types import TokenDelta, merge_deltas


class Drafter(ModelReplica):
    """Implements `parse.engines.protocol.Drafter` in Ray Serve replicas."""

    async def __init__(self, settings: EngineSettings, target: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        super().__init__(settings)
        self._drafter = drafter_for(self.engine, AutoTokenizer.from_pretrained(target), settings.chat_template_kwargs)
        await self.warm_up()

    async def draft_complete(self, request: DraftRequest) -> TokenDelta:
        """Returns the whole draft at once, because such a call costs less than a stream."""
        async with aclosing(self._drafter.draft(request)) as deltas:
            return merge_deltas([delta async for delta in deltas])

    async def draft(self, request: DraftRequest) -> AsyncGenerator[TokenDelta]:
        async with aclosing(self._drafter.draft(request)) as deltas:
            async for delta in deltas:
                yield delta
