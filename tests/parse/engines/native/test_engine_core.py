import random
import threading
import time
from copy import deepcopy

import pytest
import torch

from parse.engines.native.model import Model
from parse.engines.native.programs import TreeInput, prefill
from parse.tree import tree_from_parents
from parse.types import EngineStopped, NumericalError, RequestCancelled
from tests.parse.engines.native.tiny import VOCABULARY, alone, ask, build, paused, plain, serving, submit

ROWS: dict[str, int] = {}
PAGES = dict(page_size=8)
POISON = VOCABULARY - 1


def text(seed, size):
    rng = random.Random(seed)
    return [rng.randrange(POISON) for _ in range(size)]


@pytest.fixture(scope="module")
def reference():
    return build("llama")


@pytest.fixture
def model(reference, tokenizer):
    return Model(deepcopy(reference), tokenizer)


@pytest.fixture(params=[ROWS, PAGES], ids=["rows", "pages"])
def memory(request):
    return request.param


def one_by_one(tokens):
    return [TreeInput([token], accepted_path=range(bool(place))) for place, token in enumerate(tokens)]


def right(reference, context, tokens, logits):
    """Are these the logits of one text after another, where it follows the context?"""
    wanted = plain(reference, [*context, *tokens])[len(context) :]
    torch.testing.assert_close(torch.cat(logits), wanted, atol=1e-4, rtol=0)
    return True


def settled(engine):
    """What the engine holds once nothing runs or waits, seen twice: on the way a request is nowhere for a moment."""
    quiet = 0
    for _ in range(2000):
        quiet = 0 if engine.load.running or engine.load.waiting else quiet + 1
        if quiet == 2:
            return engine.load
        time.sleep(0.01)
    raise AssertionError("the engine does not come to rest")


class Stream:
    """A request that goes on for ever, and how far it has come."""

    def __init__(self, engine, context, room=90):
        self.steps = 0
        self._moved = threading.Condition()
        self.reply = submit(engine, context, self._program(), room)

    def _program(self):
        for step in range(10**6):
            yield TreeInput([step % POISON], logits_nodes=())
            with self._moved:
                self.steps += 1
                self._moved.notify_all()

    def moves(self, steps):
        """Waits until it has come that much further."""
        with self._moved:
            upto = self.steps + steps
            assert self._moved.wait_for(lambda: self.steps >= upto, 60)

    def running(self):
        self.moves(1)
        return self


def test_a_long_prompt_does_not_hold_up_those_who_write(model, memory):
    with serving(model, step_tokens=9, **memory) as engine:
        stream = Stream(engine, text(1, 5)).running()
        before = stream.steps
        ask(engine, text(2, 80), TreeInput([1])).result()
        # 81 tokens in steps of 9, of which the stream takes one
        assert stream.steps - before >= 10
        engine.abort(stream.reply.job)


def test_no_step_computes_more_than_it_may(model, memory):
    sizes = []
    forward = model.forward

    def recording(tokens, *rest):
        sizes.append(len(tokens))
        return forward(tokens, *rest)

    model.forward = recording
    with serving(model, step_tokens=9, **memory) as engine:
        with paused(engine):
            replies = [
                ask(engine, text(seed, 10 * seed), TreeInput(text(0, 12)), *one_by_one([1, 2])) for seed in range(1, 5)
            ]
        for reply in replies:
            reply.result()
    assert max(sizes) == 9
    assert sum(sizes) == engine.stats.num_tokens
    assert len(sizes) == engine.stats.num_steps


def test_what_is_asked_for_may_lie_anywhere_in_a_request_that_takes_many_steps(model, reference, memory):
    context, nodes = text(1, 13), text(2, 20)
    wanted = plain(reference, [*context, *nodes])[len(context) :]
    reads = [[0], [19], [3, 4, 5], [0, 7, 19], [], None]
    with serving(model, step_tokens=5, **memory) as engine:
        answers = ask(engine, context, *(TreeInput(nodes, logits_nodes=read) for read in reads)).result()
    for read, got in zip(reads, answers, strict=True):
        torch.testing.assert_close(got, wanted[range(20) if read is None else read], atol=1e-4, rtol=0)


def test_those_who_come_later_wait_for_their_turn(model, memory):
    begun = []

    def late():
        begun.append(True)
        yield TreeInput([1])

    with serving(model, max_running=2, **memory) as engine:
        streams = [Stream(engine, text(seed, 5)).running() for seed in range(2)]
        reply = submit(engine, text(3, 5), late(), 1)
        for stream in streams:
            stream.moves(5)
        assert not begun
        assert (engine.stats.num_running, engine.stats.num_waiting) == (2, 1)
        engine.abort(streams[0].reply.job)
        reply.result()
        engine.abort(streams[1].reply.job)


def test_whose_text_holds_what_the_model_cannot_compute_fails_alone(model, reference, memory):
    with torch.no_grad():
        model.network.get_input_embeddings().weight[POISON] = torch.nan
    contexts = [text(seed, 12 + 7 * seed) for seed in range(5)]
    said = text(9, 8)
    with serving(model, contexts=8, **memory) as engine:
        for _ in range(2):  # the second time in memory where the others have been
            with paused(engine):
                good = [ask(engine, context, *one_by_one(said)) for context in contexts]
                bad = [
                    ask(engine, [*text(7, 30), POISON, *text(8, 9)], TreeInput([1])),
                    ask(engine, text(6, 11), *one_by_one([1, 2, POISON, 3])),
                    ask(engine, text(5, 20), TreeInput([1, POISON, 2])),
                ]
            for context, reply in zip(contexts, good, strict=True):
                assert right(reference, context, said, reply.result())
            for reply in bad:
                assert isinstance(reply.wait().error, NumericalError)
            contexts = [text(seed, 12 + 7 * seed) for seed in range(10, 15)]
        assert settled(engine).num_running == 0


def test_whose_program_fails_fails_alone(model, reference, memory, caplog):
    def failing(steps):
        for _ in range(steps):
            yield TreeInput([1])
        raise ZeroDivisionError

    with serving(model, **memory) as engine:
        with paused(engine):
            good = [ask(engine, text(seed, 20), *one_by_one(text(seed, 5))) for seed in range(3)]
            bad = [submit(engine, text(4, 20), failing(steps), 5) for steps in range(3)]
        for seed, reply in enumerate(good):
            assert right(reference, text(seed, 20), text(seed, 5), reply.result())
        for reply in bad:
            assert isinstance(reply.wait().error, ZeroDivisionError)
        assert settled(engine).num_running == 0
        assert ask(engine, text(4, 20), TreeInput([1])).result()


def test_what_the_model_cannot_take_fails_alone(model, reference, memory, caplog):
    with serving(model, **memory) as engine:
        with paused(engine):
            good = ask(engine, text(1, 20), *one_by_one(text(1, 5)))
            bad = ask(engine, text(2, 20), TreeInput([1, VOCABULARY, 2]))
        assert right(reference, text(1, 20), text(1, 5), good.result())
        assert isinstance(bad.wait().error, IndexError)


def test_a_cancelled_request_ends_and_leaves_its_memory(model, memory):
    with serving(model, contexts=2, max_running=2, **memory) as engine:
        streams = [Stream(engine, text(seed, 20)).running() for seed in range(2)]
        late = submit(engine, text(2, 20), prefill())
        for request in (*streams, late):
            assert not (request.reply if isinstance(request, Stream) else request).ended
        engine.abort(late.job)
        assert isinstance(late.wait().error, RequestCancelled)
        for stream in streams:
            engine.abort(stream.reply.job)
            assert isinstance(stream.reply.wait().error, RequestCancelled)
        at_rest = settled(engine)
        assert at_rest.blocks_used == at_rest.blocks_cached <= at_rest.blocks_total
        # All the memory is there for others.
        again = [Stream(engine, text(seed, 30)).running() for seed in range(5, 7)]
        for stream in again:
            engine.abort(stream.reply.job)
            stream.reply.wait()
        engine.reset_prefix_cache()
        ask(engine, text(0, 20), TreeInput([1])).result()
        assert settled(engine).prefix_hits == 0


def test_a_request_cancelled_before_it_is_seen_never_runs(model):
    ran = []

    def program():
        ran.append(True)
        yield TreeInput([1])

    with serving(model) as engine:
        with paused(engine):
            reply = submit(engine, text(1, 20), program(), 1)
            engine.abort(reply.job)
        assert isinstance(reply.wait().error, RequestCancelled)
    assert not ran


def test_to_cancel_what_is_done_changes_nothing(model):
    with serving(model) as engine:
        reply = ask(engine, text(1, 20), TreeInput([1]))
        reply.result()
        engine.abort(reply.job)
        assert ask(engine, text(1, 20), TreeInput([1])).result()
        assert reply.error is None


def test_to_stop_ends_all_who_run_wait_or_come(model, memory):
    with serving(model, contexts=2, max_running=2, **memory) as engine:
        streams = [Stream(engine, text(seed, 20)).running() for seed in range(2)]
        waiting = [submit(engine, text(seed, 20), prefill()) for seed in range(5)]
        streams[0].moves(2)  # so that they have been taken in
        waiting += [submit(engine, text(seed, 20), prefill()) for seed in range(5)]
        engine.shutdown()
        for reply in (*(stream.reply for stream in streams), *waiting):
            assert reply.ended
            assert isinstance(reply.error, EngineStopped)
        with pytest.raises(EngineStopped):
            submit(engine, [1], prefill())
        engine.shutdown()


def test_who_comes_while_it_is_stopped_is_told(model, monkeypatch):
    with serving(model) as engine:
        inbox = engine._inbox

        class Late:
            """Delivers when the engine has already gone."""

            def __getattr__(self, name):
                return getattr(inbox, name)

            def put(self, job):
                if job is not None:
                    engine.shutdown()
                inbox.put(job)

        monkeypatch.setattr(engine, "_inbox", Late())
        assert isinstance(submit(engine, [1, 2], prefill()).wait().error, EngineStopped)


def test_if_the_engine_itself_breaks_down_everyone_hears_of_it(model, monkeypatch, caplog):
    with serving(model) as engine:
        stream = Stream(engine, text(1, 20)).running()
        with paused(engine):
            waiting = ask(engine, text(2, 20), TreeInput([1]))
            monkeypatch.setattr(engine, "_plan", lambda: 1 // 0)
        for reply in (stream.reply, waiting):
            assert isinstance(reply.wait().error, EngineStopped)
        assert "ZeroDivisionError" in str(stream.reply.error)
        engine._thread.join()
        with pytest.raises(EngineStopped):
            submit(engine, [1], prefill())


def test_what_many_want_at_the_same_time_is_computed_once(model, reference, memory):
    prompt = text(1, 70)
    with serving(model, contexts=8, **memory) as engine:
        with paused(engine):
            replies = [ask(engine, prompt, *one_by_one(text(seed, 3))) for seed in range(6)]
        for seed, reply in enumerate(replies):
            assert right(reference, prompt, text(seed, 3), reply.result())
        # The last tokens of a prompt may be computed by each: less than a block of 16.
        assert engine.stats.num_tokens - 6 * 3 <= 70 + 5 * 16


def test_a_stranger_is_not_held_up_by_those_who_wait_for_another(model):
    prompt = text(1, 100)
    order = []

    def noting(name):
        yield TreeInput([1])
        order.append(name)

    with serving(model, step_tokens=4) as engine:
        with paused(engine):
            replies = [submit(engine, prompt, noting(name), 1) for name in ("first", "second")]
            replies.append(submit(engine, [], noting("stranger"), 1))
        for reply in replies:
            reply.result()
    assert order == ["stranger", "first", "second"]


def test_when_memory_is_full_who_was_used_longest_ago_makes_room(model, reference):
    with serving(model, contexts=3) as engine:
        for seed in (1, 2, 3, 1, 4):  # the fourth hits, the fifth takes the place of the second
            ask(engine, text(seed, 40), TreeInput([1])).result()
        seen = settled(engine)
        assert (seen.blocks_used, seen.evictions, seen.prefix_hits) == (3, 1, 40)
        for seed in (1, 3, 4):
            ask(engine, text(seed, 40), TreeInput([1])).result()
        assert settled(engine).prefix_hits - seen.prefix_hits == 120
        assert right(reference, text(2, 40), [1], ask(engine, text(2, 40), TreeInput([1])).result())
        assert settled(engine).prefix_hits - seen.prefix_hits == 120


def test_many_requests_leave_no_more_memory_taken_than_there_is(model, reference, memory):
    with serving(model, contexts=4, capacity=48, max_running=6, **memory) as engine:
        replies = []
        for number in range(300):
            rng = random.Random(number)
            context, said = text(rng.randrange(20), rng.randrange(40)), text(number, rng.randrange(1, 6))
            context = context or [3]
            reply = ask(engine, context, *one_by_one(said))
            if rng.random() < 0.2:
                engine.abort(reply.job)
            replies.append((context, said, reply))
        for context, said, reply in replies[::15]:
            if reply.wait().error is None:
                assert right(reference, context, said, reply.result())
        for *_, reply in replies:
            assert reply.wait().error is None or isinstance(reply.error, RequestCancelled)
        seen = settled(engine)
        assert seen.blocks_used == seen.blocks_cached <= seen.blocks_total
        engine.reset_prefix_cache()
        submit(engine, [1], prefill()).result()
        assert settled(engine).blocks_used == 0


def test_speculation_leaves_no_trace_of_what_was_not_kept(model, reference, memory):
    """Wrong guesses are run between all tokens of a text, which then go on as if they had never been."""
    said = text(1, 12)
    asks = []
    for place, token in enumerate(said):
        asks.append(TreeInput([token, *text(100 + place, 5)], logits_nodes=[0], accepted_path=range(bool(place))))
    with serving(model, **memory) as engine:
        assert right(reference, text(2, 20), said, ask(engine, text(2, 20), *asks).result())
        seen = settled(engine)
        ask(engine, [*text(2, 20), *said], TreeInput([1])).result()
        assert engine.stats.prefix_hits - seen.prefix_hits == 20 + len(said) - 1


@pytest.mark.parametrize("seed", range(4))
def test_a_path_through_a_tree_becomes_part_of_the_context_wherever_its_nodes_stood(model, reference, memory, seed):
    """Others beside it do the same, and what is asked next sees the path and nothing of its neighbours."""
    rng = random.Random(seed)
    requests = []
    for number in range(3):
        context, asks, said = text(seed + 10 * number, 9 + number), [], []
        keep: tuple[int, ...] = ()
        for _ in range(4):
            tokens = text(rng.random(), 9)
            parents = [-1, *(rng.randrange(node) for node in range(1, 9))]
            tree, place = tree_from_parents(tokens, parents)
            asks.append(TreeInput(tree, accepted_path=keep))
            path = [rng.randrange(9)]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            keep = tuple(int(place[node]) for node in path)
            said.append((context, tree))
            context = [*context, *(tokens[node] for node in path)]
        requests.append((said, context, [*asks, TreeInput(text(99, 3), accepted_path=keep)]))
    with serving(model, **memory) as engine:
        with paused(engine):
            replies = [ask(engine, said[0][0], *asks) for said, _, asks in requests]
        answers = [reply.result() for reply in replies]
    for (said, context, _), (*trees, last) in zip(requests, answers, strict=True):
        for (before, tree), logits in zip(said, trees, strict=True):
            torch.testing.assert_close(logits, alone(reference, before, tree), atol=1e-4, rtol=0)
        assert right(reference, context, text(99, 3), [last])
