"""Shapes of real models with random weights, the least work they take, and the speed of plain operations."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    model_type: str
    hidden_size: int
    intermediate_size: int  # of the feed-forward layers
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 128
    tie_word_embeddings: bool = False


SHAPES = {
    "qwen3-0.6b": ModelShape("qwen3", 1024, 3072, 28, 16, 8, 151936, tie_word_embeddings=True),
    "qwen3-1.7b": ModelShape("qwen3", 2048, 6144, 28, 16, 8, 151936, tie_word_embeddings=True),
    "qwen3-8b": ModelShape("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "qwen3-32b": ModelShape("qwen3", 5120, 25600, 64, 64, 8, 151936),
    "llama-3.1-8b": ModelShape("llama", 4096, 14336, 32, 32, 8, 128256),
    "tiny": ModelShape("llama", 64, 128, 2, 4, 2, 8192, head_dim=16),  # to try bench.gpu without a GPU
}


@dataclass(frozen=True)
class RooflineCosts:
    """The least work of any program, computed from the shape alone."""

    step_bytes: int  # of weights that every step reads
    token_bytes: int  # of keys and values, for each token of context
    token_flops: int  # for each token of a prompt, attention not counted


def roofline_costs(shape: ModelShape, size: int) -> RooflineCosts:
    """Returns the costs of a model whose numbers take `size` bytes each."""
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    layers = shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    return RooflineCosts(
        step_bytes=size * (layers + shape.hidden_size * shape.vocab_size),
        token_bytes=size * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim,
        token_flops=2 * layers,  # logits are computed for the last one only
    )


def build_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tie_word_embeddings,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return network.eval()


def copy_bytes_per_s(device: torch.device) -> float:
    """Returns how many bytes a plain copy reads and writes per second."""
    source = torch.empty(2**32 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_s(lambda: target.copy_(source), device)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the floating-point operations per second of a product of random matrices."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / time_s(lambda: left @ right, device)


def time_s(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    for _ in range(3):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
