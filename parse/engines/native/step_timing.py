"""Measures how long steps of a few sizes take, before the engine serves requests."""

import statistics
import time

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import attention_for
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk

SIZES = 1, 2, 4, 8, 16, 32, 64
REPETITIONS = 3
TIME_LIMIT_S = 0.1  # for each size
CONTEXT_LENGTH = 64  # computed tokens before those of the step


def planned_step_seconds(model: Model) -> list[tuple[int, float]]:
    """Returns the measurements in the plan of a model. If it has none yet, they are made.

    They decide how drafts are searched, so all replicas use the same ones.
    """
    assert model.plan is not None
    return [(size, seconds) for size, seconds in model.plan.get_or_create("steps", lambda: measure_step_seconds(model))]


def measure_step_seconds(model: Model) -> list[tuple[int, float]]:
    """Returns pairs: a number of tokens, and the seconds that such a step takes.

    Each step follows a short context.
    """
    length = min(CONTEXT_LENGTH + SIZES[-1], model.max_model_len)
    kv_cache = KVCache(num_blocks=1, block_size=CONTEXT_LENGTH + SIZES[-1])
    sequence = SequenceState([token % model.vocab_size for token in range(length)])
    sequence.block_ids = [0]
    make_attention = attention_for(model.device)
    measurements = []
    for size in (size for size in SIZES if size < length):
        chunk = ScheduledChunk(sequence, (), length - size, length)
        seconds: list[float] = []
        while len(seconds) <= REPETITIONS and sum(seconds) < TIME_LIMIT_S:
            began = time.perf_counter()
            logits, _ = model.forward(chunk.token_ids(), chunk.positions(), make_attention(kv_cache, [chunk]), None)
            logits.argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - began)
        # The first step does work that is done only once, so it counts only if there was no time for another one.
        measurements.append((size, statistics.median(seconds[1:] or seconds)))
    return measurements
