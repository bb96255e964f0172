"""The sizes of the measurements on a GPU, and an estimate of the time that they take."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.roofline import ModelShape, roofline_costs
from parse.engines.native.engine import MAX_SUFFIX_TOKENS
from parse.prefixes import DEFAULT_STRIDE, prefix_lengths_every

# Assumptions of the estimate. An H200 copies about 4 TB/s, and multiplies large matrices at about 700 TFLOP/s. Prompts
# are assumed to reach half of that, and attention with a mask a tenth. Without CUDA graphs, the host needs about half a
# millisecond to launch the operations of a layer, which is longer than the layer computes at small batches.
BYTES_PER_S, FLOPS, MASKED_FLOPS = 4e12, 3.5e14, 0.7e14
HOST_S_PER_LAYER = 5e-4
STARTUP_S = 40.0  # imports, the copy and the product that are timed first, random weights, the self-check of the model
PROFILE_S = 30.0  # the profiler itself; most of it processes the trace
BYTES_PER_NUMBER = 2  # bfloat16


@dataclass(frozen=True)
class BenchmarkPlan:
    """The sizes of the measurements of a model, and how often they are repeated."""

    prompt_tokens: int = 1024
    batch_sizes: Sequence[int] = (1, 8, 32)
    draft_lengths: Sequence[int] = (250, 1000, 4000)
    """Tokens of the drafts that are verified. The shortest one is also used for the fused call."""
    max_num_batched_tokens: int = 2048
    rounds: int = 3
    """The result is the median of this many rounds, after one that does not count."""
    decode_tokens: int = 32
    suffix_tokens: int = 16
    continuation_tokens: int = 8
    """Tokens that are generated after the accepted prefix of a draft."""
    num_decoding: int = 8
    """Requests that decode while a draft is verified."""
    num_prefills: int = 4
    """Prompts at the same time."""
    profiled_tokens: int = 8

    @property
    def max_model_len(self) -> int:
        return self.prompt_tokens + max(*self.draft_lengths, self.decode_tokens) + self.suffix_tokens + 16

    @property
    def max_num_seqs(self) -> int:
        return max(*self.batch_sizes, self.num_decoding + 1, self.num_prefills)

    def kv_cache_tokens(self, *, contiguous: bool) -> int:
        """Returns the size of the KV cache, in tokens.

        With `contiguous` blocks, as on a CPU, each sequence takes the memory of the longest one.
        """
        capacity = self.max_model_len + MAX_SUFFIX_TOKENS
        num_seqs = max(self.batch_sizes) + self.num_decoding + self.num_prefills
        if contiguous:
            return (num_seqs + 2) * capacity
        partly_filled = 512  # tokens: the answer, and two blocks that are partly filled
        tokens = num_seqs * (self.prompt_tokens + partly_filled) + 2 * capacity
        return -(-tokens // capacity) * capacity


def estimated_seconds(shape: ModelShape, plan: BenchmarkPlan) -> float:
    """Returns how long all measurements of a model take on an H200.

    Decode steps read the weights and the KV cache once, and all other work is the multiplications of its tokens. The
    host delays a step without CUDA graphs. Everything is measured once more than `rounds`.
    """
    costs, runs = roofline_costs(shape, BYTES_PER_NUMBER), plan.rounds + 1

    def step_s(batch: int, cuda_graphs: bool) -> float:
        read_bytes = costs.step_bytes + batch * plan.prompt_tokens * costs.token_bytes
        return max(read_bytes / BYTES_PER_S, 0.0 if cuda_graphs else shape.num_layers * HOST_S_PER_LAYER)

    def prefill_s(tokens: int) -> float:
        num_passes = -(-tokens // plan.max_num_batched_tokens)
        return tokens * costs.token_flops / FLOPS + num_passes * shape.num_layers * HOST_S_PER_LAYER

    def verify_s(draft_tokens: int, num_prefixes: int) -> float:
        tokens = num_prefixes * plan.suffix_tokens
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * (plan.prompt_tokens + draft_tokens)
        return prefill_s(tokens) + tokens * attention / MASKED_FLOPS

    def prefixes(draft_tokens: int) -> list[int]:
        return prefix_lengths_every(DEFAULT_STRIDE, draft_tokens, complete=True)

    first_pass = MAX_SUFFIX_TOKENS // plan.suffix_tokens
    short = min(plan.draft_lengths)
    short_s = verify_s(short, len(prefixes(short)))

    def mode_s(cuda_graphs: bool) -> float:
        batches = [*plan.batch_sizes, max(plan.batch_sizes)]  # the largest one again, with sampling
        decode = runs * plan.decode_tokens * sum(step_s(batch, cuda_graphs) for batch in batches)
        cached = sum(prefill_s(batch * plan.prompt_tokens) for batch in (*plan.batch_sizes, plan.num_decoding))
        verification = sum(
            prefill_s(plan.prompt_tokens + length)
            + runs * verify_s(length, len(prefixes(length)))
            + runs * verify_s(length, min(first_pass, len(prefixes(length))))
            for length in plan.draft_lengths
        )
        continuation = plan.continuation_tokens * step_s(1, cuda_graphs)
        fused = 2 * runs * (prefill_s(plan.prompt_tokens + short) + short_s + continuation)
        beside = runs * (plan.decode_tokens * step_s(plan.num_decoding, cuda_graphs) + short_s)
        return decode + cached + verification + fused + beside

    prompts = runs * prefill_s(plan.num_prefills * plan.prompt_tokens)
    generate = 2 * sum(
        prefill_s(batch * plan.prompt_tokens) + plan.decode_tokens * step_s(batch, False) for batch in plan.batch_sizes
    )
    one_by_one = sum(prefill_s(plan.prompt_tokens + length) for length in prefixes(short))
    profile = PROFILE_S + 2 * prefill_s(max(plan.batch_sizes) * plan.prompt_tokens)
    return STARTUP_S + mode_s(False) + mode_s(True) + prompts + generate + one_by_one + profile
