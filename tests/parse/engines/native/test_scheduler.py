import pytest

from parse.engines.native.generation import TreeInput, prefill
from parse.engines.native.prefix_cache import PrefixCache
from parse.engines.native.request import Request
from parse.engines.native.scheduler import Scheduler
from parse.tree import suffix_forest
from tests.parse.engines.native.tiny import Response


@pytest.fixture
def scheduler():
    return Scheduler(PrefixCache(8, 16, lambda *_: None), max_num_seqs=4, max_num_batched_tokens=20)


def add(scheduler, tokens, nodes=()):
    request = Request(tokens, prefill(), 0, Response())
    request.tree_input = TreeInput(nodes)
    scheduler.add(request)
    return request


def prompt(number, size):
    return [1000 * number + place for place in range(size)]


def step(scheduler):
    """Runs one step; returns the scheduled requests, with the range of entries of each."""
    scheduled = scheduler.schedule()
    for each in scheduled:
        scheduler.mark_computed(each)
    return [(each.request, each.chunk.start, each.chunk.end) for each in scheduled]


def test_requests_are_admitted_in_their_order_up_to_the_limit(scheduler):
    requests = [add(scheduler, prompt(number, 5)) for number in range(6)]
    assert list(scheduler.admit()) == requests[:4] == scheduler.running
    assert list(scheduler.waiting) == requests[4:]
    scheduler.finish(requests[1])
    scheduler.finish(requests[4])
    assert list(scheduler.admit()) == [requests[5]]


def test_a_request_that_ends_at_once_leaves_its_place_to_the_next(scheduler):
    requests = [add(scheduler, prompt(number, 5)) for number in range(6)]
    admitted = []
    for request in scheduler.admit():
        admitted.append(request)
        scheduler.finish(request)
    assert admitted == requests
    assert not scheduler.has_requests


def test_a_request_waits_for_a_shared_prefix_and_others_pass_it(scheduler):
    first, second, other = (add(scheduler, prompt(number, 40)) for number in (1, 1, 2))
    assert list(scheduler.admit()) == [first, other]
    step(scheduler)
    assert list(scheduler.admit()) == []
    step(scheduler)
    assert list(scheduler.admit()) == [second]  # less than a hash block is missing
    assert second.num_computed == first.num_computed == 40


def test_requests_without_free_blocks_wait_and_no_later_one_passes_them(scheduler):
    first, second, _ = add(scheduler, prompt(1, 100)), add(scheduler, prompt(2, 30)), add(scheduler, prompt(3, 3))
    assert list(scheduler.admit()) == [first]
    scheduler.finish(first)
    assert next(scheduler.admit()) is second


def test_single_tokens_always_run_and_the_others_share_the_rest_of_the_budget(scheduler):
    prefills = [add(scheduler, prompt(1, 12)), add(scheduler, prompt(2, 30))]
    decodes = [add(scheduler, prompt(3, 1)), add(scheduler, [], [7])]
    list(scheduler.admit())
    assert step(scheduler) == [(decodes[0], 0, 1), (decodes[1], 0, 1), (prefills[0], 0, 12), (prefills[1], 0, 6)]
    assert step(scheduler) == [(prefills[1], 6, 26)]
    assert step(scheduler) == [(prefills[1], 26, 30)]
    assert step(scheduler) == []


def test_single_tokens_are_ordered_by_their_blocks(scheduler):
    requests = [add(scheduler, prompt(number, 1)) for number in range(3)]
    list(scheduler.admit())
    for request, block_id in zip(requests, (5, 3, 4), strict=True):
        assert request.sequence is not None
        request.sequence.block_ids = [block_id]
    assert [request for request, *_ in step(scheduler)] == [requests[1], requests[2], requests[0]]


def test_trees_stand_after_causal_chunks(scheduler):
    tree = add(scheduler, prompt(1, 3), suffix_forest([1, 2], [7, 8]))
    causal = add(scheduler, prompt(2, 4))
    list(scheduler.admit())
    assert step(scheduler) == [(causal, 0, 4), (tree, 0, 7)]


def test_the_youngest_request_is_preempted_when_blocks_run_out(scheduler):
    requests = [add(scheduler, prompt(number, 32)) for number in range(4)]
    list(scheduler.admit())
    for request in requests:
        assert request.sequence is not None
        request.num_computed = request.sequence.num_computed_tokens = 32
        request.tree_input = TreeInput([7])
    assert step(scheduler) == [(request, 32, 33) for request in requests[:2]]
    assert scheduler.running == requests[:2]
    assert list(scheduler.waiting) == requests[2:]
    assert [request.sequence for request in requests[2:]] == [None, None]
    assert list(scheduler.admit()) == []
    scheduler.finish(requests[0])
    [again] = scheduler.admit()
    assert again is requests[2]
    assert (again.num_computed, again.num_uncomputed) == (32, 1)  # its blocks were still in the cache


def test_a_preempted_request_waits_before_all_others_with_what_it_has_committed(scheduler):
    request, late = add(scheduler, prompt(1, 10)), add(scheduler, prompt(2, 3))
    next(scheduler.admit())
    step(scheduler)
    assert request.sequence is not None
    scheduler.prefix_cache.commit(request.sequence, [7, 8])
    scheduler.preempt(request)
    assert list(scheduler.waiting) == [request, late]
    assert request.token_ids == [*prompt(1, 10), 7, 8]
    assert (request.sequence, request.num_computed, scheduler.running) == (None, 0, [])


def test_what_a_finished_request_has_computed_stays_in_the_cache(scheduler):
    request = add(scheduler, prompt(1, 20))
    list(scheduler.admit())
    step(scheduler)
    scheduler.finish(request)
    scheduler.finish(request)  # a second time changes nothing
    assert not scheduler.has_requests
    again = add(scheduler, prompt(1, 30))
    list(scheduler.admit())
    assert again.num_computed == 20
