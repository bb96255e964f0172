"""An event loop in a thread of its own.

It runs coroutines for callers in any other thread or event loop.
"""

import asyncio
import os
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from contextlib import aclosing, suppress
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from parse.errors import EngineStopped

T = TypeVar("T")


class _End:
    """Follows the last item of a stream."""


END: Final = _End()


class EventLoopThread:
    """The event loop of a `Pair`, which runs all its requests.

    The thread is a daemon and holds no reference to the pair. Calls in progress when it is closed, and all later calls,
    raise `EngineStopped`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()  # reentrant, because garbage collection may call `close` at any point
        self._closed = False
        self._process_id = os.getpid()
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()  # in the caller's thread, which receives the error if this fails
        self._thread = threading.Thread(target=_run_until, args=(self._stop, self._loop), name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a coroutine. The calling thread waits for it."""
        try:
            self._check_caller()
        except RuntimeError:
            coroutine.close()
            raise
        future = self._submit(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise EngineStopped("the pair was closed during the call") from None
        finally:
            future.cancel()  # has an effect only if the wait was interrupted, for example by Ctrl-C

    async def run_async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of a coroutine. The caller's event loop continues meanwhile."""
        future = self._submit(coroutine)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineStopped("the pair was closed during the call") from None

    def iterate(self, start: Callable[[], AsyncGenerator[T]]) -> Generator[T]:
        """Yields the items of an asynchronous generator.

        Closing this generator closes the asynchronous one.
        """
        self._check_caller()
        items: SimpleQueue[T | _End] = SimpleQueue()
        future = self._submit(_pump(start, items.put))
        future.add_done_callback(lambda _: items.put(END))
        try:
            while not isinstance(item := items.get(), _End):
                yield item
            _raise_error(future)
        finally:
            future.cancel()

    async def iterate_async(self, start: Callable[[], AsyncGenerator[T]]) -> AsyncGenerator[T]:
        """Yields the items of an asynchronous generator in the caller's event loop."""
        items: asyncio.Queue[T | _End] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: T | _End) -> None:
            with suppress(RuntimeError):  # the caller's loop is closed, so nothing reads the items
                loop.call_soon_threadsafe(items.put_nowait, item)

        future = self._submit(_pump(start, put))
        future.add_done_callback(lambda _: put(END))
        try:
            while not isinstance(item := await items.get(), _End):
                yield item
            _raise_error(future)
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancels what is running and ends the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_caller(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"a synchronous call in the thread {self._name!r} would wait for itself")

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        if os.getpid() != self._process_id:  # a fork has no threads, so the coroutine would never run
            coroutine.close()
            raise EngineStopped("the pair belongs to another process; create a new Pair in this one")
        with self._lock:  # after `close` the loop would never run the coroutine
            if self._closed or not self._thread.is_alive():
                coroutine.close()
                raise EngineStopped("the pair is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


def _run_until(stop: asyncio.Event, loop: AbstractEventLoop) -> None:
    """Runs the loop until the event is set, then cancels all tasks and closes all asynchronous generators."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_wait(stop))


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _pump(start: Callable[[], AsyncGenerator[T]], put: Callable[[T], None]) -> None:
    async with aclosing(start()) as items:
        async for item in items:
            put(item)


def _raise_error(future: "Future[None]") -> None:
    """Raises the error with which a stream ended, if there is one."""
    try:
        future.result()
    except CancelledError:
        raise EngineStopped("the pair was closed during the call") from None
