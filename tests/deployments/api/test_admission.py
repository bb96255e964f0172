import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.api.admission import MAX_RETRY_AFTER_S, AdmissionQueue, Overloaded
from tests.deployments import virtual_time


class Visitor:
    """A request that holds slots until it is told to leave, and records its progress."""

    def __init__(self, admission_queue: AdmissionQueue, count: int) -> None:
        self.admission_queue, self.count = admission_queue, count
        self.state = "waiting"
        self._may_leave = asyncio.Event()
        self.task = asyncio.ensure_future(self._visit())

    async def _visit(self) -> None:
        try:
            async with self.admission_queue.hold_slots(self.count):
                self.state = "inside"
                await self._may_leave.wait()
            self.state = "left"
        except Overloaded:
            self.state = "turned away"
        except asyncio.CancelledError:
            self.state = "left"
            raise

    def leave(self) -> None:
        self._may_leave.set()

    def give_up(self) -> None:
        self.task.cancel()


async def settled() -> None:
    """Lets the event loop run until no task can continue."""
    for _ in range(5):
        await asyncio.sleep(0)


async def gone(visitors: list[Visitor]) -> None:
    for visitor in visitors:
        visitor.leave()
    for visitor in visitors:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(visitor.task, 10)


def is_unused(admission_queue: AdmissionQueue) -> bool:
    return admission_queue.num_free_slots == admission_queue.num_slots and admission_queue.num_waiting == 0


def test_requests_are_admitted_in_order_even_if_a_later_one_would_fit():
    async def check() -> None:
        admission_queue = AdmissionQueue(3, 10)
        first, large, small = (Visitor(admission_queue, count) for count in (2, 3, 1))
        await settled()
        assert [v.state for v in (first, large, small)] == ["inside", "waiting", "waiting"]
        first.leave()
        await settled()
        assert [v.state for v in (large, small)] == ["inside", "waiting"]
        large.leave()
        await settled()
        assert small.state == "inside"
        await gone([small])
        assert is_unused(admission_queue)

    asyncio.run(check())


def test_a_cancelled_request_lets_the_next_one_in():
    async def check() -> None:
        admission_queue = AdmissionQueue(2, 10)
        inside, large, small = Visitor(admission_queue, 1), Visitor(admission_queue, 2), Visitor(admission_queue, 1)
        await settled()
        large.give_up()
        await settled()
        assert small.state == "inside" and admission_queue.num_waiting == 0
        await gone([inside, large, small])
        assert is_unused(admission_queue)

    asyncio.run(check())


@pytest.mark.parametrize("give_up_first", [False, True])
def test_no_slot_is_lost_if_a_request_is_cancelled_when_its_slot_becomes_free(give_up_first):
    async def check() -> None:
        admission_queue = AdmissionQueue(1, 10)
        inside, successor, next_one = (Visitor(admission_queue, 1) for _ in range(3))
        await settled()
        steps = [inside.leave, successor.give_up]
        for step in reversed(steps) if give_up_first else steps:
            step()
        await settled()
        assert inside.task.exception() is None and successor.task.cancelled()
        assert next_one.state == "inside"
        await gone([next_one])
        assert is_unused(admission_queue)

    asyncio.run(check())


def test_no_slot_is_lost_if_an_admitted_request_is_cancelled_before_it_runs():
    async def check() -> None:
        admission_queue = AdmissionQueue(1, 10)
        inside, successor, next_one = (Visitor(admission_queue, 1) for _ in range(3))
        await settled()
        inside.leave()
        while admission_queue.num_waiting > 1:  # until the next request is admitted; its task has not run yet
            await asyncio.sleep(0)
        assert successor.state == "waiting"
        successor.give_up()
        await settled()
        assert successor.task.cancelled() and next_one.state == "inside"
        await gone([next_one])
        assert is_unused(admission_queue)

    asyncio.run(check())


def test_a_full_queue_rejects_with_the_time_to_retry_after():
    async def check() -> None:
        admission_queue = AdmissionQueue(1, 1)
        inside, waiting = Visitor(admission_queue, 1), Visitor(admission_queue, 1)
        await settled()
        with pytest.raises(Overloaded) as refused:
            async with admission_queue.hold_slots(1):
                raise AssertionError("let in")
        assert 1 <= refused.value.retry_after_s <= MAX_RETRY_AFTER_S
        assert str(refused.value.retry_after_s) in str(refused.value)
        assert refused.value.headers["Retry-After"] == str(refused.value.retry_after_s)
        assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
        await gone([inside, waiting])
        assert is_unused(admission_queue)

    asyncio.run(check())


def test_without_a_queue_requests_are_served_while_there_are_slots():
    async def check() -> None:
        admission_queue = AdmissionQueue(1, 0)
        for _ in range(3):
            async with admission_queue.hold_slots(1):
                with pytest.raises(Overloaded):
                    async with admission_queue.hold_slots(1):
                        raise AssertionError("let in")
        assert is_unused(admission_queue)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("visit_s", "min_retry_after_s", "max_retry_after_s"), [(0.0, 1, 1), (30.0, 2, 30), (1e6, 60, 60)]
)
def test_retry_after_grows_with_the_service_time(visit_s, min_retry_after_s, max_retry_after_s, monkeypatch):
    async def check() -> None:
        now = [0.0]
        monkeypatch.setattr("deployments.api.admission.time.monotonic", lambda: now[0])
        admission_queue = AdmissionQueue(1, 0)
        for _ in range(5):
            async with admission_queue.hold_slots(1):
                now[0] += visit_s
        async with admission_queue.hold_slots(1):
            with pytest.raises(Overloaded) as refused:
                async with admission_queue.hold_slots(1):
                    raise AssertionError("let in")
        assert min_retry_after_s <= refused.value.retry_after_s <= max_retry_after_s

    asyncio.run(check())


def test_a_failed_request_releases_its_slots():
    async def check() -> None:
        admission_queue = AdmissionQueue(2, 0)
        with pytest.raises(ZeroDivisionError):
            async with admission_queue.hold_slots(2):
                raise ZeroDivisionError
        assert is_unused(admission_queue)

    asyncio.run(check())


class ReferenceQueue:
    """The expected behaviour of the admission queue, implemented with lists."""

    def __init__(self, slots: int, max_waiting: int) -> None:
        self.places, self.max_waiting = slots, max_waiting
        self.inside: dict[int, int] = {}
        self.line: list[tuple[int, int]] = []

    def come(self, visitor_id: int, count: int) -> bool:
        if (self.line or count > self.free) and len(self.line) >= self.max_waiting:
            return False
        self.line.append((visitor_id, count))
        self.move_up()
        return True

    def go(self, visitor_id: int) -> None:
        self.inside.pop(visitor_id, None)
        self.line = [entry for entry in self.line if entry[0] != visitor_id]
        self.move_up()

    def move_up(self) -> None:
        while self.line and self.line[0][1] <= self.free:
            visitor_id, count = self.line.pop(0)
            self.inside[visitor_id] = count

    @property
    def free(self) -> int:
        return self.places - sum(self.inside.values())


ACTIONS = st.lists(st.tuples(st.sampled_from(["come", "leave", "give up"]), st.integers(0, 30)), max_size=40)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(slots=st.integers(1, 4), max_waiting=st.integers(0, 4), actions=ACTIONS)
def test_the_queue_admits_like_the_reference_queue(slots, max_waiting, actions):
    async def check() -> None:
        admission_queue, reference_queue = AdmissionQueue(slots, max_waiting), ReferenceQueue(slots, max_waiting)
        visitors: list[Visitor] = []
        for action, number in actions:
            if action == "come":
                visitors.append(Visitor(admission_queue, 1 + number % slots))
                accepted = reference_queue.come(len(visitors) - 1, 1 + number % slots)
                await settled()
                assert (visitors[-1].state != "turned away") == accepted
            elif visitors:
                visitor_id = number % len(visitors)
                if action == "leave" and visitors[visitor_id].state != "inside":
                    continue
                visitors[visitor_id].leave() if action == "leave" else visitors[visitor_id].give_up()
                reference_queue.go(visitor_id)
                await settled()
            inside = {visitor_id for visitor_id, visitor in enumerate(visitors) if visitor.state == "inside"}
            assert inside == reference_queue.inside.keys()
            assert (admission_queue.num_free_slots, admission_queue.num_waiting) == (
                reference_queue.free,
                len(reference_queue.line),
            )
        await gone(visitors)
        assert is_unused(admission_queue)

    asyncio.run(check())


@settings(derandomize=True, deadline=None, max_examples=150)
@given(slots=st.integers(1, 3), actions=ACTIONS, pauses=st.lists(st.integers(0, 2), min_size=40, max_size=40))
def test_no_slot_leaks_with_random_arrivals_and_cancellations(slots, actions, pauses):
    async def check() -> None:
        admission_queue = AdmissionQueue(slots, 3)
        visitors: list[Visitor] = []
        for (action, number), pause in zip(actions, pauses, strict=False):
            if action == "come":
                visitors.append(Visitor(admission_queue, 1 + number % slots))
            elif visitors:
                visitor = visitors[number % len(visitors)]
                visitor.leave() if action == "leave" else visitor.give_up()
            for _ in range(pause):
                await asyncio.sleep(0)
            assert 0 <= admission_queue.num_free_slots <= slots and admission_queue.num_waiting <= 3
            assert sum(v.count for v in visitors if v.state == "inside") <= slots
        await gone(visitors)
        assert is_unused(admission_queue)
        assert all(v.task.cancelled() or v.task.exception() is None for v in visitors)

    asyncio.run(check())


@pytest.mark.parametrize("count", [1, 2])
def test_the_queue_is_idle_only_if_no_slot_was_held_for_a_while(count):
    async def seen():
        admission_queue = AdmissionQueue(2, 5)
        resting = asyncio.ensure_future(admission_queue.wait_until_idle(0.05))
        visitors = [Visitor(admission_queue, count) for _ in range(3)]  # some of these requests wait
        await settled()
        busy = asyncio.ensure_future(admission_queue.wait_until_busy())
        await asyncio.wait_for(busy, 1)
        for visitor in visitors:
            await asyncio.sleep(0.06)
            assert not resting.done()
            visitor.leave()
            await settled()
        await asyncio.wait_for(resting, 5)
        assert admission_queue.num_free_slots == 2
        later = asyncio.ensure_future(admission_queue.wait_until_busy())
        await settled()
        assert not later.done()
        later.cancel()

    virtual_time.run(seen())


def test_the_queue_becomes_idle_if_an_admitted_request_is_cancelled_at_once():
    async def seen():
        admission_queue = AdmissionQueue(1, 5)
        first, successor = Visitor(admission_queue, 1), Visitor(admission_queue, 1)
        await settled()
        first.leave()
        while admission_queue.num_waiting:  # until the next request is admitted; its task has not run yet
            await asyncio.sleep(0)
        successor.give_up()
        await settled()
        assert admission_queue.num_free_slots == 1
        await asyncio.wait_for(admission_queue.wait_until_idle(0.01), 5)

    virtual_time.run(seen())


def test_a_request_during_the_wait_keeps_the_queue_busy():
    async def seen():
        admission_queue = AdmissionQueue(1, 5)
        resting = asyncio.ensure_future(admission_queue.wait_until_idle(0.1))
        for _ in range(10):
            await asyncio.sleep(0.09)
            async with admission_queue.hold_slots(1):
                pass
            assert not resting.done()
        await asyncio.sleep(0.09)
        assert not resting.done()
        await asyncio.sleep(0.02)
        assert resting.done()
        await resting

    virtual_time.run(seen())
