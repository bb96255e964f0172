"""Tells errors of a device apart from errors of a request."""

import torch

DEVICE_ERROR_TEXTS = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "cuDNN error",
    "HIP error",
    "NCCL error",
    "NCCL Error",
)
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "not enough memory",  # PyTorch's allocator on CPUs; the next two are that of Linux
    "can't allocate memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "CUBLAS_STATUS_NOT_INITIALIZED",  # usual if no memory is left for the handle
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller computation may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def is_device_error(error: BaseException) -> bool:
    """Whether the process can no longer use its device. After such an error, every later computation fails too."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERROR_TEXTS)
