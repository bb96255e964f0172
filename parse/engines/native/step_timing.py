"""What passes of a few sizes take, tried before anybody comes."""

import statistics
import time

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import attention_for
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk

SIZES = 1, 2, 4, 8, 16, 32, 64
TRIES = 3
TIME_LIMIT_S = 0.5  # for each size
CONTEXT_LENGTH = 64  # tokens behind which they stand


def measure_step_seconds(model: Model) -> list[tuple[int, float]]:
    """Of so many tokens behind a short text, and how long the passes took."""
    length = min(CONTEXT_LENGTH + SIZES[-1], model.max_model_len)
    kv_cache = KVCache(num_blocks=1, block_size=CONTEXT_LENGTH + SIZES[-1])
    sequence = SequenceState([token % model.vocab_size for token in range(length)])
    sequence.block_ids = [0]
    make_attention = attention_for(model.device)
    measurements = []
    for size in (size for size in SIZES if size < length):
        chunk = ScheduledChunk(sequence, (), length - size, length)
        seconds: list[float] = []
        while len(seconds) <= TRIES and sum(seconds) < TIME_LIMIT_S:
            began = time.perf_counter()
            logits, _ = model.forward(chunk.token_ids(), chunk.positions(), make_attention(kv_cache, [chunk]), None)
            logits.argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - began)
        # The first is not counted, for whatever is done once, unless there is no time for more.
        measurements.append((size, statistics.median(seconds[1:] or seconds)))
    return measurements
