"""Decode steps recorded once and replayed: what CUDA graphs are for.

Where every request adds a single token, a step does the same work each time, on other tokens and other pages: all that
changes stands in one small table. So that work is recorded for a few numbers of rows, and a step is to fill the table,
to copy it over and to replay; rows that nobody needs write to a page of their own. For the host it is one launch
instead of some twenty a layer.

A number of rows is recorded when it is first met, after its step has gone the ordinary way, and a recording that does
not give what that step gave is never used. What cannot be recorded goes the ordinary way for ever.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parse.engines.native.kv_cache import Memory
from parse.engines.native.model import TOLERANCE, Model
from parse.engines.native.paged_attention import CannotReplay, DecodingAttention
from parse.engines.native.scheduled_chunk import Span

logger = logging.getLogger(__name__)

TOKEN, LENGTH, PAGES = 0, 1, 2  # the table's columns; pages take all that are left


class Recorder(Protocol):
    def try_out(self, work: Callable[[], Tensor]) -> None:
        """Does it once: whatever is made at the first time is made now, and not while it is recorded."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What the work returns, and what does it again, into the same tensors."""
        ...


@dataclass(frozen=True)
class Recording:
    table: Tensor  # [rows, 2 + pages]
    logits: Tensor  # [rows, vocabulary]
    replay: Callable[[], None]


def graphs_for(model: Model, memory: Memory, spare: int, longest: int) -> "Graphs | None":
    """None on CPUs, where nothing is launched, and for models that lie on several GPUs: a graph is of one."""
    if model.device.type != "cuda" or model.spread:
        return None
    return Graphs(model, memory, spare, longest, CudaRecorder(model.device))


class Graphs:
    """Of one model over one memory, whose tensors stay where they are once they have been made."""

    def __init__(self, model: Model, memory: Memory, spare: int, longest: int, recorder: Recorder) -> None:
        """`spare` is a page that no context ever gets; `longest` bounds the contexts."""
        self._model, self._memory, self._spare, self._recorder = model, memory, spare, recorder
        self._width = PAGES + -(-longest // memory.page_size)
        self._recordings: dict[int, Recording | None] = {}  # by their rows; None: tried in vain
        self._given_up = False
        self._host = torch.empty(0, self._width, dtype=torch.long)

    def replay(self, spans: Sequence[Span]) -> Tensor | None:
        """The logits at single tokens that see all before them, valid until the next step; None: not recorded."""
        recording = self._recordings.get(rows_for(len(spans)))
        if recording is None:
            return None
        self._fill(recording.table, spans)
        recording.replay()
        return recording.logits[: len(spans)]

    def record(self, spans: Sequence[Span], logits: Tensor) -> None:
        """Records steps of as many rows as this one, which has gone the ordinary way and given these logits."""
        rows = rows_for(len(spans))
        if self._given_up or rows in self._recordings:
            return
        self._recordings[rows] = None
        try:
            recording = self._recorded(rows, spans)
            recording.replay()  # writes once more what the step has written already
            apart = float((recording.logits[: len(spans)] - logits).abs().max())
            allowed = TOLERANCE[self._model.network.dtype] * float(logits.abs().max())
            if not apart <= allowed:
                raise CannotReplay(f"logits differ by {apart:.2g}, {allowed:.2g} is allowed")
        except Exception as error:
            logger.warning("%s: steps of %d tokens are not recorded: %s", self._model.name, rows, error)
            self._given_up = isinstance(error, CannotReplay)  # that will not change with the number of rows
            return
        self._recordings[rows] = recording
        logger.info("%s: steps of %d tokens are replayed from now on", self._model.name, rows)

    def _recorded(self, rows: int, spans: Sequence[Span]) -> Recording:
        if rows > len(self._host):
            self._host = torch.zeros(rows, self._width, dtype=torch.long, pin_memory=self._model.device.type == "cuda")
        table = torch.zeros(rows, self._width, dtype=torch.long, device=self._model.device)
        self._fill(table, spans)

        def work() -> Tensor:
            step = DecodingAttention(self._memory, table[:, LENGTH], table[:, PAGES:])
            tokens, positions = table[None, :, TOKEN], table[None, :, LENGTH] - 1
            return self._model.run(tokens.contiguous(), positions, step, 0)[0]

        with NothingAskedBack():
            self._recorder.try_out(work)
        return Recording(table, *self._recorder.record(work))

    def _fill(self, table: Tensor, spans: Sequence[Span]) -> None:
        """What stood there before has been copied: whoever filled it has waited for its step's tokens since."""
        host = self._host[: len(table)]
        rows = host.numpy()
        for row, span in zip(rows, spans, strict=False):
            pages = span.context.pages
            row[TOKEN], row[LENGTH] = span.tokens()[0], span.last
            row[PAGES : PAGES + len(pages)] = pages
        rows[len(spans) :, : PAGES + 1] = 0, 1, self._spare
        table.copy_(host, non_blocking=True)


def rows_for(count: int) -> int:
    """The next power of two: up to some hundred rows a step costs what it takes to read the weights."""
    return 1 << (count - 1).bit_length()


class NothingAskedBack(TorchDispatchMode):
    """Refuses what cannot be recorded before it is: whatever asks the device for a value, or moves data to or from it.

    A recording that breaks off is said to leave things in disorder; and of all ways to find out beforehand, this one
    does not disturb other threads.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode operations come here whole: what they consist of counts
            out = func.decompose(*args, **kwargs or {})
        if out is not NotImplemented:
            return out
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            asks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            asks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if asks:
            raise CannotReplay(f"{func} asks the device for a value")
        out = func(*args, **kwargs or {})
        moved = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(out, Tensor) and isinstance(moved, Tensor) and moved.dim() and moved.device != out.device:
            raise CannotReplay(f"{func} moves data from {moved.device} to {out.device}")
        return out


class CudaRecorder:
    """The graphs share their memory: no two of them are ever replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def try_out(self, work: Callable[[], Tensor]) -> None:
        with torch.cuda.device(self._device):
            ordinary = torch.cuda.current_stream()
            self._stream.wait_stream(ordinary)
            with torch.cuda.stream(self._stream):
                work()
            ordinary.wait_stream(self._stream)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other engines of the process go on meanwhile, but may not record: only one at a time can.
        with (
            _RECORDING,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),  # and back, which a recording that breaks off forgets
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            logits = work()
        return logits, graph.replay


_RECORDING = threading.Lock()
