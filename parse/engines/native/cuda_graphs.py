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

from parse.engines.native.kv_cache import KVCache
from parse.engines.native.model import TOLERANCE, Model
from parse.engines.native.paged_attention import CannotReplayError, DecodeAttention
from parse.engines.native.scheduled_chunk import ScheduledChunk

logger = logging.getLogger(__name__)

TOKEN_COLUMN, LENGTH_COLUMN, FIRST_BLOCK_COLUMN = 0, 1, 2  # the table's columns; pages take all that are left


class Recorder(Protocol):
    def warm_up(self, work: Callable[[], Tensor]) -> None:
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


def cuda_graphs_for(model: Model, kv_cache: KVCache, spare_block: int, max_model_len: int) -> "CudaGraphs | None":
    """None on CPUs, where nothing is launched, and for models that lie on several GPUs: a graph is of one."""
    if model.device.type != "cuda" or model.is_multi_device:
        return None
    return CudaGraphs(model, kv_cache, spare_block, max_model_len, CudaRecorder(model.device))


class CudaGraphs:
    """Of one model over one memory, whose tensors stay where they are once they have been made."""

    def __init__(
        self, model: Model, kv_cache: KVCache, spare_block: int, max_model_len: int, recorder: Recorder
    ) -> None:
        """`spare` is a page that no context ever gets; `longest` bounds the contexts."""
        self._model, self._kv_cache, self._spare_block, self._recorder = model, kv_cache, spare_block, recorder
        self._width = FIRST_BLOCK_COLUMN + -(-max_model_len // kv_cache.block_size)
        self._recordings: dict[int, Recording | None] = {}  # by their rows; None: tried in vain
        self._disabled = False
        self._host = torch.empty(0, self._width, dtype=torch.long)

    def replay(self, chunks: Sequence[ScheduledChunk]) -> Tensor | None:
        """The logits at single tokens that see all before them, valid until the next step; None: not recorded."""
        recording = self._recordings.get(padded_batch_size(len(chunks)))
        if recording is None:
            return None
        self._fill_table(recording.table, chunks)
        recording.replay()
        return recording.logits[: len(chunks)]

    def record(self, chunks: Sequence[ScheduledChunk], logits: Tensor) -> None:
        """Records steps of as many rows as this one, which has gone the ordinary way and given these logits."""
        batch_size = padded_batch_size(len(chunks))
        if self._disabled or batch_size in self._recordings:
            return
        self._recordings[batch_size] = None
        try:
            recording = self._record(batch_size, chunks)
            recording.replay()  # writes once more what the step has written already
            difference = float((recording.logits[: len(chunks)] - logits).abs().max())
            allowed = TOLERANCE[self._model.network.dtype] * float(logits.abs().max())
            if not difference <= allowed:
                raise CannotReplayError(f"logits differ by {difference:.2g}, {allowed:.2g} is allowed")
        except Exception as error:
            logger.warning("%s: steps of %d tokens are not recorded: %s", self._model.name, batch_size, error)
            self._disabled = isinstance(error, CannotReplayError)  # that will not change with the number of rows
            return
        self._recordings[batch_size] = recording
        logger.info("%s: steps of %d tokens are replayed from now on", self._model.name, batch_size)

    def _record(self, batch_size: int, chunks: Sequence[ScheduledChunk]) -> Recording:
        if batch_size > len(self._host):
            self._host = torch.zeros(
                batch_size, self._width, dtype=torch.long, pin_memory=self._model.device.type == "cuda"
            )
        table = torch.zeros(batch_size, self._width, dtype=torch.long, device=self._model.device)
        self._fill_table(table, chunks)

        def work() -> Tensor:
            step = DecodeAttention(self._kv_cache, table[:, LENGTH_COLUMN], table[:, FIRST_BLOCK_COLUMN:])
            tokens, positions = table[None, :, TOKEN_COLUMN], table[None, :, LENGTH_COLUMN] - 1
            return self._model.forward_tensors(tokens.contiguous(), positions, step, 0)[0]

        with ForbidHostSync():
            self._recorder.warm_up(work)
        return Recording(table, *self._recorder.record(work))

    def _fill_table(self, table: Tensor, chunks: Sequence[ScheduledChunk]) -> None:
        """What stood there before has been copied: whoever filled it has waited for its step's tokens since."""
        host = self._host[: len(table)]
        rows = host.numpy()
        for row, chunk in zip(rows, chunks, strict=False):
            block_ids = chunk.sequence.block_ids
            row[TOKEN_COLUMN], row[LENGTH_COLUMN] = chunk.token_ids()[0], chunk.end
            row[FIRST_BLOCK_COLUMN : FIRST_BLOCK_COLUMN + len(block_ids)] = block_ids
        rows[len(chunks) :, : FIRST_BLOCK_COLUMN + 1] = 0, 1, self._spare_block
        table.copy_(host, non_blocking=True)


def padded_batch_size(count: int) -> int:
    """The next power of two: up to some hundred rows a step costs what it takes to read the weights."""
    return 1 << (count - 1).bit_length()


class ForbidHostSync(TorchDispatchMode):
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
            raise CannotReplayError(f"{func} asks the device for a value")
        out = func(*args, **kwargs or {})
        moved = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(out, Tensor) and isinstance(moved, Tensor) and moved.dim() and moved.device != out.device:
            raise CannotReplayError(f"{func} moves data from {moved.device} to {out.device}")
        return out


class CudaRecorder:
    """The graphs share their memory: no two of them are ever replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Tensor]) -> None:
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
