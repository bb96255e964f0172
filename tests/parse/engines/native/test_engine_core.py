import random
import threading
import time
import weakref
from copy import deepcopy

import pytest
import torch

from parse.device_errors import is_device_error, is_out_of_memory
from parse.engines.native.generation import TreeInput, prefill
from parse.engines.native.model import Model
from parse.errors import EngineFailed, EngineStopped, NumericalError, RequestCancelled
from parse.tree import tree_from_parents
from tests.parse.engines.native.tiny import VOCABULARY, alone, build, paused, plain, run_trees, serving, submit

CONTIGUOUS: dict[str, int] = {}
PAGED = dict(block_size=8)
POISON = VOCABULARY - 1


def random_tokens(seed, size):
    rng = random.Random(seed)
    return [rng.randrange(POISON) for _ in range(size)]


@pytest.fixture(scope="module")
def reference():
    return build("llama")


@pytest.fixture
def model(reference, tokenizer):
    return Model(deepcopy(reference), tokenizer)


@pytest.fixture(params=[CONTIGUOUS, PAGED], ids=["contiguous", "paged"])
def layout(request):
    return request.param


def single_tokens(tokens):
    return [TreeInput([token], accepted_path=range(bool(place))) for place, token in enumerate(tokens)]


def match(reference, prompt, tokens, logits):
    """Are these the logits at tokens that follow the context?"""
    expected = plain(reference, [*prompt, *tokens])[len(prompt) :]
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)
    return True


def idle_stats(engine):
    """Returns the stats once nothing runs or waits, seen twice: between two queues a request is briefly in neither."""
    quiet = 0
    for _ in range(2000):
        quiet = 0 if engine.stats.num_running or engine.stats.num_waiting else quiet + 1
        if quiet == 2:
            return engine.stats
        time.sleep(0.01)
    raise AssertionError("the engine does not become idle")


class Stream:
    """A request that runs until it is aborted, and the number of its steps."""

    def __init__(self, engine, prompt, max_new_tokens=90):
        self.steps = 0
        self._stepped = threading.Condition()
        self.response = submit(engine, prompt, self._program(), max_new_tokens)

    def _program(self):
        for step in range(10**6):
            yield TreeInput([step % POISON], logits_nodes=())
            with self._stepped:
                self.steps += 1
                self._stepped.notify_all()

    def wait_for_steps(self, steps):
        """Waits for that many more steps."""
        with self._stepped:
            target = self.steps + steps
            assert self._stepped.wait_for(lambda: self.steps >= target, 60)

    def started(self):
        self.wait_for_steps(1)
        return self


def test_a_long_prompt_does_not_hold_up_requests_that_decode(model, layout):
    with serving(model, max_num_batched_tokens=9, **layout) as engine:
        stream = Stream(engine, random_tokens(1, 5)).started()
        before = stream.steps
        run_trees(engine, random_tokens(2, 80), TreeInput([1])).result()
        # 81 tokens in steps of 9, of which the stream takes one
        assert stream.steps - before >= 10
        engine.abort(stream.response.request)


def test_no_step_computes_more_than_it_may(model, layout):
    sizes = []
    forward = model.forward

    def recording(tokens, *rest):
        sizes.append(len(tokens))
        return forward(tokens, *rest)

    model.forward = recording
    with serving(model, max_num_batched_tokens=9, **layout) as engine:
        with paused(engine):
            responses = [
                run_trees(
                    engine, random_tokens(seed, 10 * seed), TreeInput(random_tokens(0, 12)), *single_tokens([1, 2])
                )
                for seed in range(1, 5)
            ]
        for response in responses:
            response.result()
    assert max(sizes) == 9
    assert sum(sizes) == engine.stats.num_tokens
    assert len(sizes) == engine.stats.num_steps


def test_logits_may_be_read_anywhere_in_a_tree_that_takes_many_steps(model, reference, layout):
    prompt, nodes = random_tokens(1, 13), random_tokens(2, 20)
    expected = plain(reference, [*prompt, *nodes])[len(prompt) :]
    logits_nodes = [[0], [19], [3, 4, 5], [0, 7, 19], [], None]
    with serving(model, max_num_batched_tokens=5, **layout) as engine:
        outputs = run_trees(engine, prompt, *(TreeInput(nodes, logits_nodes=each) for each in logits_nodes)).result()
    for each, logits in zip(logits_nodes, outputs, strict=True):
        torch.testing.assert_close(logits, expected[range(20) if each is None else each], atol=1e-4, rtol=0)


def test_later_requests_wait_for_their_turn(model, layout):
    begun = []

    def late():
        begun.append(True)
        yield TreeInput([1])

    with serving(model, max_num_seqs=2, **layout) as engine:
        streams = [Stream(engine, random_tokens(seed, 5)).started() for seed in range(2)]
        response = submit(engine, random_tokens(3, 5), late(), 1)
        for stream in streams:
            stream.wait_for_steps(5)
        assert not begun
        assert (engine.stats.num_running, engine.stats.num_waiting) == (2, 1)
        engine.abort(streams[0].response.request)
        response.result()
        engine.abort(streams[1].response.request)


def test_a_request_whose_logits_are_not_finite_fails_alone(model, reference, layout):
    with torch.no_grad():
        model.network.get_input_embeddings().weight[POISON] = torch.nan
    prompts = [random_tokens(seed, 12 + 7 * seed) for seed in range(5)]
    tokens = random_tokens(9, 8)
    with serving(model, max_sequences=8, **layout) as engine:
        for _ in range(2):  # the second time in blocks that the first requests have used
            with paused(engine):
                good = [run_trees(engine, prompt, *single_tokens(tokens)) for prompt in prompts]
                bad = [
                    run_trees(engine, [*random_tokens(7, 30), POISON, *random_tokens(8, 9)], TreeInput([1])),
                    run_trees(engine, random_tokens(6, 11), *single_tokens([1, 2, POISON, 3])),
                    run_trees(engine, random_tokens(5, 20), TreeInput([1, POISON, 2])),
                ]
            for prompt, response in zip(prompts, good, strict=True):
                assert match(reference, prompt, tokens, response.result())
            for response in bad:
                assert isinstance(response.wait().error, NumericalError)
            prompts = [random_tokens(seed, 12 + 7 * seed) for seed in range(10, 15)]
        assert idle_stats(engine).num_running == 0


def test_a_request_whose_program_fails_fails_alone(model, reference, layout, caplog):
    def failing(steps):
        for _ in range(steps):
            yield TreeInput([1])
        raise ZeroDivisionError

    with serving(model, **layout) as engine:
        with paused(engine):
            good = [
                run_trees(engine, random_tokens(seed, 20), *single_tokens(random_tokens(seed, 5))) for seed in range(3)
            ]
            bad = [submit(engine, random_tokens(4, 20), failing(steps), 5) for steps in range(3)]
        for seed, response in enumerate(good):
            assert match(reference, random_tokens(seed, 20), random_tokens(seed, 5), response.result())
        for response in bad:
            assert isinstance(response.wait().error, ZeroDivisionError)
        assert idle_stats(engine).num_running == 0
        assert run_trees(engine, random_tokens(4, 20), TreeInput([1])).result()


def test_a_request_that_the_model_rejects_fails_alone(model, reference, layout, caplog):
    with serving(model, **layout) as engine:
        with paused(engine):
            good = run_trees(engine, random_tokens(1, 20), *single_tokens(random_tokens(1, 5)))
            bad = run_trees(engine, random_tokens(2, 20), TreeInput([1, VOCABULARY, 2]))
        assert match(reference, random_tokens(1, 20), random_tokens(1, 5), good.result())
        assert isinstance(bad.wait().error, IndexError)


def test_a_cancelled_request_ends_and_frees_its_blocks(model, layout):
    with serving(model, max_sequences=2, max_num_seqs=2, **layout) as engine:
        streams = [Stream(engine, random_tokens(seed, 20)).started() for seed in range(2)]
        late = submit(engine, random_tokens(2, 20), prefill())
        for request in (*streams, late):
            assert not (request.response if isinstance(request, Stream) else request).ended
        engine.abort(late.request)
        assert isinstance(late.wait().error, RequestCancelled)
        for stream in streams:
            engine.abort(stream.response.request)
            assert isinstance(stream.response.wait().error, RequestCancelled)
        idle = idle_stats(engine)
        assert idle.blocks_used == idle.blocks_cached <= idle.blocks_total
        # All the blocks are there for others.
        again = [Stream(engine, random_tokens(seed, 30)).started() for seed in range(5, 7)]
        for stream in again:
            engine.abort(stream.response.request)
            stream.response.wait()
        engine.reset_prefix_cache()
        run_trees(engine, random_tokens(0, 20), TreeInput([1])).result()
        assert idle_stats(engine).prefix_hits == 0


def test_a_request_cancelled_before_it_is_seen_never_runs(model):
    ran = []

    def program():
        ran.append(True)
        yield TreeInput([1])

    with serving(model) as engine:
        with paused(engine):
            response = submit(engine, random_tokens(1, 20), program(), 1)
            engine.abort(response.request)
        assert isinstance(response.wait().error, RequestCancelled)
    assert not ran


def test_aborting_a_finished_request_changes_nothing(model):
    with serving(model) as engine:
        response = run_trees(engine, random_tokens(1, 20), TreeInput([1]))
        response.result()
        engine.abort(response.request)
        assert run_trees(engine, random_tokens(1, 20), TreeInput([1])).result()
        assert response.error is None


def test_shutdown_ends_all_running_waiting_and_later_requests(model, layout):
    with serving(model, max_sequences=2, max_num_seqs=2, **layout) as engine:
        streams = [Stream(engine, random_tokens(seed, 20)).started() for seed in range(2)]
        waiting = [submit(engine, random_tokens(seed, 20), prefill()) for seed in range(5)]
        streams[0].wait_for_steps(2)  # so that the engine has received them
        waiting += [submit(engine, random_tokens(seed, 20), prefill()) for seed in range(5)]
        engine.shutdown()
        for response in (*(stream.response for stream in streams), *waiting):
            assert response.ended
            assert isinstance(response.error, EngineStopped)
        with pytest.raises(EngineStopped):
            submit(engine, [1], prefill())
        engine.shutdown()


def test_a_request_that_arrives_during_shutdown_is_rejected(model, monkeypatch):
    with serving(model) as engine:
        inbox = engine._inbox

        class Late:
            """Delivers a request after the engine has stopped."""

            def __getattr__(self, name):
                return getattr(inbox, name)

            def put(self, request):
                if request is not None:
                    engine.shutdown()
                inbox.put(request)

        monkeypatch.setattr(engine, "_inbox", Late())
        assert isinstance(submit(engine, [1, 2], prefill()).wait().error, EngineStopped)


def test_if_the_engine_thread_fails_all_requests_end_with_its_error(model, monkeypatch, caplog):
    with serving(model) as engine:
        stream = Stream(engine, random_tokens(1, 20)).started()
        with paused(engine):
            waiting = run_trees(engine, random_tokens(2, 20), TreeInput([1]))
            monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 // 0)
        for response in (stream.response, waiting):
            assert isinstance(response.wait().error, EngineFailed)
        assert "ZeroDivisionError" in str(stream.response.error)
        engine._thread.join()
        with pytest.raises(EngineFailed, match="ZeroDivisionError"):
            submit(engine, [1], prefill())


def test_a_step_that_needs_too_much_memory_is_split(model, reference, layout, monkeypatch):
    """Also, nothing of the failed step is in memory at the next attempt."""
    compute = model.forward
    leftovers: list[weakref.ref] = []
    sizes: list[int] = []

    def forward(tokens, *args):
        assert not [reference for reference in leftovers if reference() is not None]
        sizes.append(len(tokens))
        if len(tokens) > 6:
            hidden = torch.zeros(1000)
            leftovers.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(tokens, *args)

    monkeypatch.setattr(model, "forward", forward)
    forest, _ = tree_from_parents(random_tokens(5, 9), [-1, 0, 0, -1, 3, 1, 4, 0, 7])
    with serving(model, **layout) as engine:
        with paused(engine):
            chains = [run_trees(engine, random_tokens(n, 17 + n), *single_tokens(random_tokens(n, 5))) for n in (1, 2)]
            tree = run_trees(engine, random_tokens(3, 11), TreeInput(forest))
        for number, response in enumerate(chains, 1):
            assert match(reference, random_tokens(number, 17 + number), random_tokens(number, 5), response.result())
        expected = alone(reference, random_tokens(3, 11), forest)
        torch.testing.assert_close(tree.result()[0], expected, atol=1e-4, rtol=0)
    assert max(sizes) > 12 and leftovers


def test_a_request_that_needs_too_much_memory_for_a_single_token_fails_alone(model, reference, layout, monkeypatch):
    compute = model.forward

    def forward(tokens, *args):
        if POISON in tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(tokens, *args)

    monkeypatch.setattr(model, "forward", forward)
    with serving(model, **layout) as engine:
        with paused(engine):
            good = run_trees(engine, random_tokens(1, 20), *single_tokens(random_tokens(1, 5)))
            bad = run_trees(engine, [*random_tokens(2, 10), POISON, *random_tokens(3, 10)], TreeInput([1]))
        assert match(reference, random_tokens(1, 20), random_tokens(1, 5), good.result())
        assert isinstance(bad.wait().error, torch.OutOfMemoryError)
        assert engine.alive


@pytest.mark.parametrize(
    ("error", "out_of_memory", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True, False),
        (MemoryError(), True, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, True),
        (RuntimeError("shapes cannot be multiplied"), False, False),
        (ValueError("CUDA error"), False, False),
    ],
    ids=str,
)
def test_errors_are_of_the_memory_of_the_device_or_of_the_request(error, out_of_memory, device):
    assert (is_out_of_memory(error), is_device_error(error)) == (out_of_memory, device)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_after_an_error_of_the_device_the_engine_serves_no_more_requests(model, error, monkeypatch, caplog):
    """No later step could succeed. The replica reports itself as unhealthy and is replaced."""

    def forward(*args):
        raise error

    with serving(model) as engine:
        streams = [Stream(engine, random_tokens(seed, 20)).started() for seed in (1, 2)]
        monkeypatch.setattr(model, "forward", forward)
        for stream in streams:
            assert isinstance(stream.response.wait().error, EngineFailed)
            assert str(error) in str(stream.response.error)
        engine._thread.join()
        assert not engine.alive


def test_a_prompt_that_many_requests_share_is_computed_once(model, reference, layout):
    prompt = random_tokens(1, 70)
    with serving(model, max_sequences=8, **layout) as engine:
        with paused(engine):
            responses = [run_trees(engine, prompt, *single_tokens(random_tokens(seed, 3))) for seed in range(6)]
        for seed, response in enumerate(responses):
            assert match(reference, prompt, random_tokens(seed, 3), response.result())
        # Each request may compute the last tokens of the prompt: fewer than a hash block of 16.
        assert engine.stats.num_tokens - 6 * 3 <= 70 + 5 * 16


def test_requests_that_wait_for_a_shared_prompt_do_not_hold_up_others(model):
    prompt = random_tokens(1, 100)
    order = []

    def program(name):
        yield TreeInput([1])
        order.append(name)

    with serving(model, max_num_batched_tokens=4) as engine:
        with paused(engine):
            responses = [submit(engine, prompt, program(name), 1) for name in ("first", "second")]
            responses.append(submit(engine, [], program("other"), 1))
        for response in responses:
            response.result()
    assert order == ["other", "first", "second"]


def test_when_no_block_is_free_the_least_recently_used_sequence_is_evicted(model, reference):
    with serving(model, max_sequences=3) as engine:
        for seed in (1, 2, 3, 1, 4):  # the fourth hits the cache, the fifth evicts the second
            run_trees(engine, random_tokens(seed, 40), TreeInput([1])).result()
        stats = idle_stats(engine)
        assert (stats.blocks_used, stats.evictions, stats.prefix_hits) == (3, 1, 40)
        for seed in (1, 3, 4):
            run_trees(engine, random_tokens(seed, 40), TreeInput([1])).result()
        assert idle_stats(engine).prefix_hits - stats.prefix_hits == 120
        assert match(
            reference, random_tokens(2, 40), [1], run_trees(engine, random_tokens(2, 40), TreeInput([1])).result()
        )
        assert idle_stats(engine).prefix_hits - stats.prefix_hits == 120


def test_many_requests_leave_no_block_in_use(model, reference, layout):
    with serving(model, max_sequences=4, sequence_capacity=48, max_num_seqs=6, **layout) as engine:
        responses = []
        for number in range(300):
            rng = random.Random(number)
            prompt, tokens = (
                random_tokens(rng.randrange(20), rng.randrange(40)),
                random_tokens(number, rng.randrange(1, 6)),
            )
            prompt = prompt or [3]
            response = run_trees(engine, prompt, *single_tokens(tokens))
            if rng.random() < 0.2:
                engine.abort(response.request)
            responses.append((prompt, tokens, response))
        for prompt, tokens, response in responses[::15]:
            if response.wait().error is None:
                assert match(reference, prompt, tokens, response.result())
        for *_, response in responses:
            assert response.wait().error is None or isinstance(response.error, RequestCancelled)
        stats = idle_stats(engine)
        assert stats.blocks_used == stats.blocks_cached <= stats.blocks_total
        engine.reset_prefix_cache()
        submit(engine, [1], prefill()).result()
        assert idle_stats(engine).blocks_used == 0


def test_rejected_proposals_leave_no_trace(model, reference, layout):
    """Wrong proposals run after each token, and the sequence continues as if they had never been there."""
    tokens = random_tokens(1, 12)
    tree_inputs = []
    for place, token in enumerate(tokens):
        tree_inputs.append(
            TreeInput([token, *random_tokens(100 + place, 5)], logits_nodes=[0], accepted_path=range(bool(place)))
        )
    with serving(model, **layout) as engine:
        assert match(
            reference, random_tokens(2, 20), tokens, run_trees(engine, random_tokens(2, 20), *tree_inputs).result()
        )
        stats = idle_stats(engine)
        run_trees(engine, [*random_tokens(2, 20), *tokens], TreeInput([1])).result()
        assert engine.stats.prefix_hits - stats.prefix_hits == 20 + len(tokens) - 1


@pytest.mark.parametrize("seed", range(4))
def test_a_path_through_a_tree_becomes_part_of_the_context_wherever_its_nodes_stood(model, reference, layout, seed):
    """Several requests do this side by side, and the next tree sees the path and nothing of its neighbours."""
    rng = random.Random(seed)
    requests = []
    for number in range(3):
        prompt, tree_inputs, trees = random_tokens(seed + 10 * number, 9 + number), [], []
        accepted_path: tuple[int, ...] = ()
        for _ in range(4):
            tokens = random_tokens(rng.random(), 9)
            parents = [-1, *(rng.randrange(node) for node in range(1, 9))]
            tree, preorder = tree_from_parents(tokens, parents)
            tree_inputs.append(TreeInput(tree, accepted_path=accepted_path))
            path = [rng.randrange(9)]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            accepted_path = tuple(int(preorder[node]) for node in path)
            trees.append((prompt, tree))
            prompt = [*prompt, *(tokens[node] for node in path)]
        requests.append((trees, prompt, [*tree_inputs, TreeInput(random_tokens(99, 3), accepted_path=accepted_path)]))
    with serving(model, **layout) as engine:
        with paused(engine):
            responses = [run_trees(engine, trees[0][0], *tree_inputs) for trees, _, tree_inputs in requests]
        outputs = [response.result() for response in responses]
    for (trees, prompt, _), (*tree_logits, last) in zip(requests, outputs, strict=True):
        for (before, tree), logits in zip(trees, tree_logits, strict=True):
            torch.testing.assert_close(logits, alone(reference, before, tree), atol=1e-4, rtol=0)
        assert match(reference, prompt, random_tokens(99, 3), [last])


@pytest.mark.parametrize("accepted", [0, 2])
@pytest.mark.parametrize("length", [0, 16, 19, 39])
def test_a_context_cut_within_a_shared_prefix_continues_as_if_it_had_never_been_longer(
    model, reference, layout, length, accepted
):
    """The other request that shares the prefix continues as well, and later requests find what it has computed."""
    prompt, tokens, rejected, rest = (random_tokens(seed, size) for seed, size in enumerate((40, 12, 5, 9)))
    with serving(model, **layout) as engine:
        with paused(engine):
            uncut_response = run_trees(engine, prompt, *single_tokens(tokens))
            cut_response = run_trees(
                engine,
                prompt,
                TreeInput(rejected),
                TreeInput(rest[:4], accepted_path=range(accepted), context_length=length),
                *(TreeInput([token], accepted_path=range(1 if i else 4)) for i, token in enumerate(rest[4:])),
            )
        assert match(reference, prompt, tokens, uncut_response.result())
        first, *others = cut_response.result()
        assert match(reference, prompt, rejected, [first])
        assert match(reference, prompt[:length], rest, others)
        hits = idle_stats(engine).prefix_hits
        assert match(reference, prompt, tokens[:1], run_trees(engine, prompt, TreeInput(tokens[:1])).result())
        assert engine.stats.prefix_hits - hits == len(prompt)


def test_a_context_may_be_cut_before_its_first_tree(model, reference, layout):
    prompt, tokens = random_tokens(1, 40), random_tokens(2, 6)
    with serving(model, **layout) as engine:
        assert match(
            reference, prompt[:21], tokens, run_trees(engine, prompt, TreeInput(tokens, context_length=21)).result()
        )


def test_contexts_are_cut_and_continue_where_blocks_are_scarce_and_requests_are_preempted(model, reference):
    prompt = random_tokens(0, 40)
    requests = []
    for seed in range(1, 5):
        length = 11 + 7 * seed
        inputs, rest = single_tokens(random_tokens(seed, 8)), random_tokens(10 + seed, 10)
        inputs.append(TreeInput(rest[:1], accepted_path=(0,), context_length=length))
        inputs += [TreeInput([token], accepted_path=(0,)) for token in rest[1:]]
        requests.append((length, rest, inputs))
    with serving(model, max_sequences=1, sequence_capacity=64, block_size=8) as engine:
        with paused(engine):
            responses = [run_trees(engine, prompt, *inputs) for *_, inputs in requests]
        for seed, ((length, rest, _), response) in enumerate(zip(requests, responses, strict=True), 1):
            logits = response.result()
            assert match(reference, prompt, random_tokens(seed, 8), logits[:8])
            assert match(reference, prompt[:length], rest, logits[8:])
        stats = idle_stats(engine)
        assert stats.blocks_used == stats.blocks_cached
