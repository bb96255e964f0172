"""What passes of a few sizes take, tried before anybody comes."""

import statistics
import time

from parse.engine.cache import Context
from parse.engine.memory import Memory
from parse.engine.model import Model
from parse.engine.paged import attention_on
from parse.engine.step import Span

SIZES = 1, 2, 4, 8, 16, 32, 64
TRIES = 3
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
        seconds = []
        for _ in range(TRIES + 1):  # the first is not counted, for whatever is done once
            began = time.perf_counter()
            logits, _ = model.forward(span.tokens(), span.positions(), attend(memory, [span]), None)
            logits.argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - began)
        found.append((size, statistics.median(seconds[1:])))
    return found
