import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parse.engines.native.attention import ContiguousAttention, UnsupportedModelError, step_attention
from parse.engines.native.kv_cache import KVCache
from parse.engines.native.prefix_cache import SequenceState
from parse.engines.native.scheduled_chunk import ScheduledChunk
from parse.tree import chain, suffix_forest, trunk_with_suffixes

LAYER = 3


def reference_attention(query, keys, values, visible, scale):
    """One query after another, in double precision: query [heads, width], keys and values [T, key heads, width]."""
    groups = query.shape[0] // keys.shape[1]
    out = []
    for head in range(query.shape[0]):
        key, value = (tensor[visible, head // groups].double() for tensor in (keys, values))
        weights = (key @ query[head].double() * scale).softmax(0)
        out.append(weights @ value)
    return torch.stack(out).float()


@st.composite
def requests(draw):
    """A prompt, the nodes attached to it, and the ends of the chunks that compute both."""
    prompt = list(range(draw(st.integers(0, 18))))
    nodes = list(range(draw(st.integers(1, 6))))
    prefix_lengths = draw(st.sets(st.integers(1, len(nodes)), max_size=3))
    tree = draw(
        st.sampled_from(
            [
                nodes,
                chain(nodes),
                trunk_with_suffixes(nodes, list(prefix_lengths), [1, 2]),
                suffix_forest([0, len(prompt)], nodes),
            ]
        )
    )
    size = len(prompt) + len(tree)
    chunk_ends = draw(st.sets(st.integers(1, size), max_size=3)) | {size}
    single_tokens = draw(st.booleans())  # the last entries one by one, as in decoding
    return prompt, tree, sorted(chunk_ends | set(range(max(1, size - 3), size)) if single_tokens else chunk_ends)


@given(
    st.lists(requests(), min_size=1, max_size=4),
    st.sampled_from([(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 8, 12)]),
    st.sampled_from([None, 1, 5, 100]),
    st.sampled_from([None, 0.7]),
    st.permutations(range(5)),
    st.integers(0, 1000),
)
def test_packed_requests_get_the_output_of_separate_ones(requests, shape, window, scale, block_ids, seed):
    heads, key_heads, width, value_width = shape
    draw = torch.Generator().manual_seed(seed)
    kv_cache = KVCache(num_blocks=5, block_size=50)
    requests_in_progress: list[tuple] = []
    for (tokens, tree, chunk_ends), block_id in zip(requests, block_ids, strict=False):
        sequence = SequenceState(tokens)
        sequence.block_ids = [block_id]
        size = chunk_ends[-1]
        tensors = [torch.randn(size, *s, generator=draw) for s in ((heads, width), (key_heads, width))]
        values = torch.randn(size, key_heads, value_width, generator=draw)
        requests_in_progress.append((sequence, tree, list(chunk_ends), [*tensors, values], []))
    while any(chunk_ends for _, _, chunk_ends, *_ in requests_in_progress):
        due = [row for row in requests_in_progress if row[2]]
        starts = [sum(map(len, row[4])) for row in due]
        chunks = [ScheduledChunk(row[0], row[1], start, row[2].pop(0)) for row, start in zip(due, starts, strict=True)]
        both = sorted(zip(due, chunks, strict=True), key=lambda pair: (len(pair[1]) > 1, pair[1].sequence.block_ids[0]))
        chunks = [chunk for _, chunk in both]
        query, key, value = (
            torch.cat([row[3][which][chunk.start : chunk.end] for row, chunk in both]).transpose(0, 1)[None]
            for which in range(3)
        )
        slots = torch.tensor(
            [50 * chunk.sequence.block_ids[0] + place for chunk in chunks for place in range(chunk.start, chunk.end)]
        )
        before = kv_cache.keys[LAYER].clone() if kv_cache.keys else None
        out = ContiguousAttention(kv_cache, chunks, slots).attend(LAYER, query, key, value, scale, window)
        assert out.shape == (1, len(slots), heads, value_width)
        for (row, _), part in zip(both, out[0].split([len(chunk) for chunk in chunks]), strict=True):
            row[4].append(part)
        if before is not None:
            others = torch.ones(len(before), dtype=torch.bool).index_fill(0, slots, False)
            assert torch.equal(kv_cache.keys[LAYER][others], before[others])
    for sequence, tree, _, (query, key, value), parts in requests_in_progress:
        visible = torch.from_numpy(ScheduledChunk(sequence, tree, 0, len(query)).visibility(window))
        expected = [
            reference_attention(query[i], key, value, visible[i], scale or width**-0.5) for i in range(len(query))
        ]
        torch.testing.assert_close(torch.cat(parts), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_layers_of_a_model_may_differ_in_their_heads():
    """One step attention serves all layers, whatever it caches between them."""
    sequence, size = SequenceState(list(range(5))), 9
    sequence.block_ids = [0]
    kv_cache = KVCache(num_blocks=1, block_size=20)
    chunk = ScheduledChunk(sequence, suffix_forest([2, 5], [1, 2]), 0, size)
    attention = ContiguousAttention(kv_cache, [chunk], torch.arange(size))
    for layer, (heads, key_heads, window) in enumerate([(4, 4, None), (4, 2, 50), (8, 1, 3), (4, 4, 3), (6, 3, None)]):
        query, key, value = (torch.randn(1, n, size, 8) for n in (heads, key_heads, key_heads))
        module = torch.nn.Module()
        module.layer_idx = layer  # type: ignore[assignment]
        out, _ = step_attention(module, query, key, value, None, step=attention, sliding_window=window)
        assert out.is_contiguous()
        visible = torch.from_numpy(chunk.visibility(window))
        by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        expected = [
            reference_attention(by_token[0][i], by_token[1], by_token[2], visible[i], 8**-0.5) for i in range(size)
        ]
        torch.testing.assert_close(out[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("argument", [dict(softcap=30.0), dict(s_aux=torch.zeros(4))])
def test_capped_scores_and_sinks_are_refused(argument):
    with pytest.raises(UnsupportedModelError, match="softcapped attention scores and attention sinks"):
        zeros = torch.zeros(1, 1, 1, 4)
        step = ContiguousAttention(KVCache(num_blocks=1, block_size=1), [], torch.tensor([]))
        step_attention(torch.nn.Module(), zeros, zeros, zeros, None, step=step, **argument)
