"""The event loop of a pair: results, errors and cancellation across threads and event loops."""

import asyncio
import os
import signal
import threading
import time

import pytest

from parse.errors import EngineStopped
from parse.event_loop import EventLoopThread

PATIENCE_S = 300


@pytest.fixture
def event_loop():
    event_loop = EventLoopThread("test")
    yield event_loop
    event_loop.close()
    assert not event_loop._thread.is_alive()


class Counter:
    """Counts up, and records how its generator ended."""

    def __init__(self, error=None):
        self.error, self.closed, self.started = error, threading.Event(), threading.Event()

    async def count(self):
        self.started.set()
        try:
            for number in range(3):
                yield number
            if self.error:
                raise self.error
            while True:
                await asyncio.sleep(60)
        finally:
            self.closed.set()


async def fail():
    raise KeyError("reason")


async def thread_name():
    return threading.current_thread().name


async def wait_forever(started=None):
    if started:
        started.set()
    await asyncio.sleep(60)


def test_all_coroutines_run_in_the_thread_of_the_loop(event_loop):
    assert event_loop.run(thread_name()) == "test"

    async def call():
        assert event_loop.run(thread_name()) == "test"  # a synchronous call where a loop runs, as in Jupyter
        return await event_loop.run_async(thread_name())

    assert asyncio.run(call()) == "test"


def test_errors_reach_the_caller(event_loop):
    with pytest.raises(KeyError, match="reason"):
        event_loop.run(fail())
    with pytest.raises(KeyError, match="reason"):
        asyncio.run(event_loop.run_async(fail()))
    items = []
    with pytest.raises(KeyError, match="late"):
        for item in event_loop.iterate(Counter(KeyError("late")).count):
            items.append(item)  # noqa: PERF402
    assert items == [0, 1, 2]


def test_closing_a_stream_closes_the_generator_in_the_loop(event_loop):
    counter = Counter()
    stream = event_loop.iterate(counter.count)
    assert [next(stream), next(stream)] == [0, 1] and not counter.closed.is_set()
    stream.close()
    assert counter.closed.wait(PATIENCE_S)


def test_dropping_a_stream_closes_the_generator_in_the_loop(event_loop):
    counter = Counter()
    for _ in event_loop.iterate(counter.count):
        break
    assert counter.closed.wait(PATIENCE_S)


def test_a_stream_that_nobody_reads_is_not_started(event_loop):
    counter = Counter()
    event_loop.iterate(counter.count).close()
    event_loop.run(asyncio.sleep(0))
    assert not counter.started.is_set()


def test_an_asynchronous_stream_can_be_closed_and_cancelled(event_loop):
    counters = Counter(), Counter()

    async def close():
        stream = event_loop.iterate_async(counters[0].count)
        items = [await anext(stream), await anext(stream)]
        await stream.aclose()
        return items

    async def read_all():
        async for _ in event_loop.iterate_async(counters[1].count):
            pass

    async def cancel():
        reading = asyncio.create_task(read_all())
        while not counters[1].started.is_set():
            await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert reading.cancelled()

    assert asyncio.run(close()) == [0, 1]
    asyncio.run(cancel())
    assert all(counter.closed.wait(PATIENCE_S) for counter in counters)


def test_cancelling_the_caller_cancels_the_coroutine(event_loop):
    ended = threading.Event()

    async def work():
        try:
            await wait_forever()
        finally:
            ended.set()

    async def cancel():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(event_loop.run_async(work()), 0.05)

    asyncio.run(cancel())
    assert ended.wait(PATIENCE_S)


def test_closing_ends_the_calls_in_progress():
    event_loop = EventLoopThread("test")
    errors, started = [], threading.Event()
    counter = Counter()

    def call():
        try:
            event_loop.run(wait_forever(started))
        except EngineStopped as error:
            errors.append(error)

    def read():
        try:
            list(event_loop.iterate(counter.count))
        except EngineStopped as error:
            errors.append(error)

    callers = [threading.Thread(target=function) for function in (call, read)]
    for caller in callers:
        caller.start()
    assert started.wait(PATIENCE_S) and counter.started.wait(PATIENCE_S)
    event_loop.close()
    event_loop.close()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert len(errors) == 2 and counter.closed.is_set()
    with pytest.raises(EngineStopped):
        event_loop.run(thread_name())
    with pytest.raises(EngineStopped):
        next(event_loop.iterate(counter.count))


def test_a_call_that_would_wait_for_itself_is_rejected(event_loop):
    async def call():
        return event_loop.run(thread_name())

    async def read():
        return list(event_loop.iterate(Counter().count))

    for waiting in (call(), read()):
        with pytest.raises(RuntimeError, match="would wait for itself"):
            event_loop.run(waiting)


def test_a_loop_that_cannot_be_created_is_an_error_of_the_caller(monkeypatch):
    def fail():
        raise OSError("too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", fail)
    monkeypatch.setattr(asyncio.events, "new_event_loop", fail)
    errors = []

    def create():
        try:
            EventLoopThread("test")
        except OSError as error:
            errors.append(str(error))

    caller = threading.Thread(target=create, daemon=True)
    caller.start()
    caller.join(30)
    assert errors == ["too many open files"]


def test_calls_in_a_forked_process_are_rejected(event_loop):
    """A fork has no copy of the thread, so a call would wait forever."""
    process_id = os.fork()
    if process_id == 0:  # nothing of pytest may run here
        signal.alarm(30)
        outcomes = []
        for call in (
            lambda: event_loop.run(thread_name()),
            lambda: next(event_loop.iterate(Counter().count)),
            lambda: asyncio.run(event_loop.run_async(thread_name())),
        ):
            try:
                call()
            except EngineStopped as error:
                outcomes.append("create a new Pair in this one" in str(error))
        os._exit(0 if outcomes == [True, True, True] else 1)
    assert os.waitpid(process_id, 0)[1] == 0
    assert event_loop.run(thread_name()) == "test"  # the original process is not affected


def test_calls_after_the_thread_has_ended_by_itself_are_rejected(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def exit_thread():
        raise SystemExit

    event_loop = EventLoopThread("test")
    with pytest.raises(SystemExit):
        event_loop.run(exit_thread())
    event_loop._thread.join(PATIENCE_S)
    with pytest.raises(EngineStopped):
        event_loop.run(thread_name())
    event_loop.close()


def test_calls_of_several_threads_run_at_the_same_time(event_loop):
    async def wait():
        await asyncio.sleep(0.2)

    start = time.monotonic()
    callers = [threading.Thread(target=lambda: event_loop.run(wait())) for _ in range(10)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert time.monotonic() - start < 10 * 0.2
