"""Several servers with the same model: which one gets a call, and what happens to a call that is lost."""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from parse.engines.remote.errors import ServerUnavailable, WrongModel
from parse.engines.remote.transport import Transport
from parse.errors import EngineStopped, RequestError, ServerError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
MAX_DETERMINISTIC_FAILURES = 3  # of one call
MAX_INTERRUPTIONS = 5  # of one call; such a call may be the reason why servers end
RECHECK_AFTER_S = 5.0  # no server restarts and loads a model in a shorter time
HEALTH_TIMEOUT_S = 4.0


class Member:
    """A server of the pool, and whether it may be called."""

    def __init__(self, server: Transport, check: Callable[[Transport], Awaitable[None]]) -> None:
        self.server = server
        self._check = check
        self._checking = asyncio.Lock()
        self._last_success = -RECHECK_AFTER_S
        self.failure: str | None = None
        """Why the last call was lost, until one succeeds."""
        self.wrong_model = False
        self.num_calls = 0
        """Those that run now."""
        self._num_failures = 0
        self._open_until = 0.0

    @property
    def available(self) -> bool:
        """Whether the circuit breaker is closed, or it is time for another attempt."""
        return time.monotonic() >= self._open_until

    async def ensure_same_model(self) -> None:
        """Checks the server if it may have restarted since the last successful call.

        One call checks it, and the others wait for the result.
        """
        if self._is_fresh():
            return
        async with self._checking:
            if not self._is_fresh():
                await self._check(self.server)
                self.record_success()

    async def check_available(self) -> None:
        """Raises ServerUnavailable or ServerError if the server cannot be used.

        If calls have just succeeded, the server is not asked, because it may be too busy to reply in time.
        """
        if self._is_fresh():
            return
        try:
            if self.failure is None:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    await self.server.get_text("/health")
            else:  # it may have restarted with another model
                await self.ensure_same_model()
        except TimeoutError:
            error = ServerUnavailable(f"it does not respond within {HEALTH_TIMEOUT_S:g} s")
            self.record_failure(error)
            raise error from None
        except ServerUnavailable as error:
            self.record_failure(error)
            raise

    def record_success(self) -> None:
        if self.failure is not None:
            logger.warning("%s responds again", self.server.url)
        self.failure, self.wrong_model, self._num_failures, self._open_until = None, False, 0, 0.0
        self._last_success = time.monotonic()

    def record_failure(self, error: ServerUnavailable) -> None:
        if self.failure is None:
            logger.warning("%s: %s", self.server.url, error)
        self.failure, self.wrong_model = str(error), isinstance(error, WrongModel)
        self._num_failures += 1
        self._last_success = -RECHECK_AFTER_S
        self._open_until = time.monotonic() + _backoff_s(self._num_failures)

    def _is_fresh(self) -> bool:
        return self.failure is None and time.monotonic() - self._last_success < RECHECK_AFTER_S


class ServerPool:
    """Sends each call to a server. Calls with the same key go to the same one, as long as it responds."""

    def __init__(
        self, servers: Sequence[Transport], check: Callable[[Transport], Awaitable[None]], *, retry_timeout_s: float
    ) -> None:
        """`check` raises WrongModel or ServerUnavailable if a server cannot serve the model."""
        self.members = [Member(server, check) for server in servers]
        self._retry_timeout_s = retry_timeout_s

    @property
    def servers(self) -> list[Transport]:
        return [member.server for member in self.members]

    def is_busy(self, key: str) -> bool:
        """Returns whether the server that gets calls with this key runs another one."""
        return self._choose(key).num_calls > 0

    async def call(self, key: str, function: Callable[[Transport], Awaitable[T]]) -> T:
        """Returns the result of `function`, which is called again if the call is lost."""

        async def results(server: Transport) -> AsyncGenerator[T]:
            yield await function(server)

        async with aclosing(self.stream(key, results)) as items:
            return await anext(items)

    async def stream(self, key: str, function: Callable[[Transport], AsyncGenerator[T]]) -> AsyncGenerator[T]:
        """Yields the items of `function`.

        If the stream is lost, `function` is called again. It then has to yield the items that are still missing.
        """
        give_up_at = time.monotonic() + self._retry_timeout_s
        num_attempts = num_deterministic = num_interruptions = 0
        while True:
            member = self._choose(key)
            member.num_calls += 1
            try:
                items = _checked(member, function(member.server.for_session(key)))
                async with aclosing(items):
                    async for item in items:
                        member.record_success()
                        give_up_at, num_attempts = time.monotonic() + self._retry_timeout_s, 0
                        yield item
                return
            except ServerUnavailable as error:
                member.record_failure(error)
                num_attempts += 1
                num_deterministic += error.deterministic
                num_interruptions += error.interrupted
                all_wrong = all(each.wrong_model for each in self.members)
                if all_wrong or num_deterministic >= MAX_DETERMINISTIC_FAILURES:
                    raise ServerError(f"the server that runs the model: {error}") from error
                if num_interruptions >= MAX_INTERRUPTIONS:
                    raise ServerError(f"the call was interrupted {num_interruptions} times: {error}") from error
                pause_s = max(error.retry_after_s, random.uniform(0.5, 1.0) * _backoff_s(num_attempts))
                if time.monotonic() + pause_s > give_up_at:
                    raise EngineStopped(f"no server that runs the model responds: {error}") from error
            finally:
                member.num_calls -= 1
            if not any(each.available for each in self.members):
                await asyncio.sleep(pause_s)

    async def check_available(self) -> None:
        """Raises EngineStopped, with the reasons, if no server can be used."""
        checks = await asyncio.gather(*(member.check_available() for member in self.members), return_exceptions=True)
        if all(isinstance(result, ServerUnavailable | ServerError | RequestError) for result in checks):
            reasons = (f"{member.server.url}: {result}" for member, result in zip(self.members, checks, strict=True))
            raise EngineStopped(f"no server that runs the model can be used: {'; '.join(reasons)}")

    def close(self) -> None:
        for member in self.members:
            member.server.close()

    def _choose(self, key: str) -> Member:
        """Returns the first available server in an order that depends on the key only.

        If a server is lost, only its own keys move (rendezvous hashing).
        """
        ranked = sorted(
            self.members,
            key=lambda member: hashlib.blake2b(f"{key} {member.server.url}".encode(), digest_size=8).digest(),
        )
        return next((member for member in ranked if member.available), ranked[0])


async def _checked(member: Member, items: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yields the items once it is known that the server still serves the same model.

    The check runs at the same time as the call, so that it costs hardly any time.
    """
    checking = asyncio.create_task(member.ensure_same_model())
    try:
        async with aclosing(items):
            async for item in items:
                await checking
                yield item
    finally:
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)


def _backoff_s(num_failures: int) -> float:
    doublings = min(num_failures - 1, 16)  # a server may be down for days
    return float(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**doublings))
