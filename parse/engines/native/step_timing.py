"""What passes of a few sizes take, tried before anybody comes."""

import statistics
import time

from parse.engines.native.kv_cache import Memory
from parse.engines.native.model import Model
from parse.engines.native.paged_attention import attention_on
from parse.engines.native.prefix_cache import Context
from parse.engines.native.scheduled_chunk import Span

SIZES = 1, 2, 4, 8, 16, 32, 64
TRIES = 3
PATIENCE_S = 0.5  # for each size
CONTEXT = 64  # tokens behind which they stand


def pass_seconds(model: Model) -> list[tuple[int, float]]:
    """Of so many tokens behind a short text, and how long the passes took."""
    length = min(CONTEXT + SIZES[-1], model.longest)
    memory = Memory(pages=1, page_size=CONTEXT + SIZES[-1])
    context = Context([token % model.vocabulary for token in range(length)])
    context.pages = [0]
    attend = attention_on(model.device)
    found = []
    for size in (size for size in SIZES if size < length):
        span = Span(context, (), length - size, length)
        seconds: list[float] = []
        while len(seconds) <= TRIES and sum(seconds) < PATIENCE_S:
            began = time.perf_counter()
            logits, _ = model.forward(span.tokens(), span.positions(), attend(memory, [span]), None)
            logits.argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - began)
        # The first is not counted, for whatever is done once, unless there is no time for more.
        found.append((size, statistics.median(seconds[1:] or seconds)))
    return found
