"""Records decode steps as CUDA graphs and replays them.

If every request computes a single token, each step does the same work on different tokens and blocks. One small table
holds everything that differs. The work is therefore recorded for a few batch sizes. A step fills the table, copies it
to the device and replays the graph. Padding rows write to a spare block. The host makes one launch instead of about
twenty per layer.

A batch size is recorded when it first occurs, after an ordinary step of that size. A recording whose logits differ
from those of the ordinary step is never used. If steps of a size cannot be recorded, they remain ordinary steps.
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

TOKEN_COLUMN, LENGTH_COLUMN, FIRST_BLOCK_COLUMN = 0, 1, 2  # columns of the table; block ids take all others


class Recorder(Protocol):
    def warm_up(self, work: Callable[[], Tensor]) -> None:
        """Runs the work once, before it is recorded.

        Lazy initialization then does not happen during the recording.
        """
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Records the work.

        Returns its result, and a function that repeats the work into the same tensors.
        """
        ...


@dataclass(frozen=True)
class Recording:
    table: Tensor  # [batch size, 2 + blocks]
    logits: Tensor  # [batch size, vocabulary]
    replay: Callable[[], None]


def cuda_graphs_for(model: Model, kv_cache: KVCache, spare_block: int, max_model_len: int) -> "CudaGraphs | None":
    """Returns the graphs of a model, or None if it is not on a single GPU.

    A graph belongs to one GPU.
    """
    if model.device.type != "cuda" or model.is_multi_device:
        return None
    return CudaGraphs(model, kv_cache, spare_block, max_model_len, CudaRecorder(model.device))


class CudaGraphs:
    """The recorded steps of one model on one KV cache.

    The tensors of the cache never move once they are allocated.
    """

    def __init__(
        self, model: Model, kv_cache: KVCache, spare_block: int, max_model_len: int, recorder: Recorder
    ) -> None:
        """Prepares the table of steps, without recording any.

        `spare_block` is a block that no sequence gets. `max_model_len` bounds the length of sequences.
        """
        self._model, self._kv_cache, self._spare_block, self._recorder = model, kv_cache, spare_block, recorder
        self._width = FIRST_BLOCK_COLUMN + -(-max_model_len // kv_cache.block_size)
        self._recordings: dict[int, Recording | None] = {}  # by batch size; None if recording failed
        self._disabled = False
        self._host = torch.empty(0, self._width, dtype=torch.long)

    def replay(self, chunks: Sequence[ScheduledChunk]) -> Tensor | None:
        """Replays a step in which every chunk is one causal token, and returns its logits.

        The logits are valid until the next step. Returns None if the batch size is not recorded.
        """
        recording = self._recordings.get(padded_batch_size(len(chunks)))
        if recording is None:
            return None
        self._fill_table(recording.table, chunks)
        recording.replay()
        return recording.logits[: len(chunks)]

    def record(self, chunks: Sequence[ScheduledChunk], logits: Tensor) -> None:
        """Records a graph for the batch size of an ordinary step, which has computed these logits."""
        batch_size = padded_batch_size(len(chunks))
        if self._disabled or batch_size in self._recordings:
            return
        self._recordings[batch_size] = None
        try:
            recording = self._record(batch_size, chunks)
            recording.replay()  # writes again the keys and values that the step has written
            difference = float((recording.logits[: len(chunks)] - logits).abs().max())
            allowed = TOLERANCE[self._model.network.dtype] * float(logits.abs().max())
            if not difference <= allowed:
                raise CannotReplayError(f"the logits differ by {difference:.2g}, and {allowed:.2g} is allowed")
        except Exception as error:
            logger.warning("%s: steps of %d tokens are not recorded: %s", self._model.name, batch_size, error)
            self._disabled = isinstance(error, CannotReplayError)  # such an error does not depend on the batch size
            return
        self._recordings[batch_size] = recording
        logger.info("%s: steps of %d tokens are recorded and will be replayed", self._model.name, batch_size)

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
        """Fills the table through pinned memory.

        The buffer can be overwritten: the engine has already read the tokens of the previous step, so the copy of that
        step has finished.
        """
        host = self._host[: len(table)]
        host_table = host.numpy()
        for row, chunk in zip(host_table, chunks, strict=False):
            block_ids = chunk.sequence.block_ids
            row[TOKEN_COLUMN], row[LENGTH_COLUMN] = chunk.token_ids()[0], chunk.end
            row[FIRST_BLOCK_COLUMN : FIRST_BLOCK_COLUMN + len(block_ids)] = block_ids
        host_table[len(chunks) :, : FIRST_BLOCK_COLUMN + 1] = 0, 1, self._spare_block
        table.copy_(host, non_blocking=True)


def padded_batch_size(count: int) -> int:
    """Returns the next power of two.

    Up to a few hundred rows, reading the weights dominates the cost of a step, so padding costs little.
    """
    return 1 << (count - 1).bit_length()


class ForbidHostSync(TorchDispatchMode):
    """Rejects operations that cannot be recorded.

    These are operations that read a value from the device, or move data to or from it.

    The check runs before the recording, because a failed recording may leave the CUDA context in an undefined state.
    It affects only the calling thread.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode, composite operations arrive here undecomposed
            out = func.decompose(*args, **kwargs or {})
        if out is not NotImplemented:
            return out
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            reads_value = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            reads_value = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if reads_value:
            raise CannotReplayError(f"{func} reads a value from the device")
        out = func(*args, **kwargs or {})
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if isinstance(out, Tensor) and isinstance(source, Tensor) and source.dim() and source.device != out.device:
            raise CannotReplayError(f"{func} moves data from {source.device} to {out.device}")
        return out


class CudaRecorder:
    """Records CUDA graphs that share one memory pool.

    They can share it because no two of them are replayed at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        with torch.cuda.device(self._device):
            current_stream = torch.cuda.current_stream()
            self._stream.wait_stream(current_stream)
            with torch.cuda.stream(self._stream):
                work()
            current_stream.wait_stream(self._stream)

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other engines of the process continue meanwhile, but only one engine at a time can record.
        with (
            _RECORDING,
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),  # restores the stream even if the recording fails
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            logits = work()
        return logits, graph.replay


_RECORDING = threading.Lock()
