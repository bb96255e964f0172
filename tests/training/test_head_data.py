import random

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from training.head_data import FeatureStore, batch_indices, most_frequent_tokens, sample_anchors, trainable_texts
from training.outputs import TargetOutput

VOCABULARY, WIDTH = 40, 16


def target():
    """Returns a target with random weights and enough layers for the default auxiliary hidden states."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def texts(count=5, seed=0):
    draw = random.Random(seed)

    def tokens(low, high):
        return [draw.randrange(25) for _ in range(draw.randint(low, high))]

    outputs = [TargetOutput(tokens(2, 4), tokens(4, 6), 0) for _ in range(count)]
    return [TargetOutput(text.prompt, text.output, k % 2 * 2) for k, text in enumerate(outputs)]


@pytest.fixture(scope="module")
def network():
    return target()


def test_a_batch_holds_the_labels_of_each_anchor(network):
    outputs, layers, steps = texts(), (2, 3, 3), 3
    batch = FeatureStore(network, layers, outputs, memory_mb=10).batch(range(5), steps)
    for index, text in enumerate(outputs):
        with torch.no_grad():
            out = network(torch.tensor([text.tokens]), output_hidden_states=True)
        size, first = len(text.tokens), len(text.prompt) + text.begun - 2
        expected = torch.cat([out.hidden_states[layer][0, : size - 1] for layer in layers], -1)
        torch.testing.assert_close(batch.features[index, : size - 1], expected, atol=1e-2, rtol=1e-2)
        assert batch.tokens[index, : size - 1].tolist() == text.tokens[1:]
        anchors = list(range(first, size - 2))  # the last anchor predicts the last token
        assert batch.anchors[index, : len(anchors)].tolist() == anchors
        assert int(batch.valid[index, :, 0].sum()) == len(anchors)
        for place, anchor in enumerate(anchors):
            for step in range(steps):
                assert bool(batch.valid[index, place, step]) == (anchor + 2 + step < size)
                if batch.valid[index, place, step]:
                    assert int(batch.next_tokens[index, place, step]) == text.tokens[anchor + 1 + step]
                    logits = network.lm_head(batch.last_hidden_states[index, place, step])
                    torch.testing.assert_close(logits, out.logits[0, anchor + 1 + step], atol=2e-2, rtol=2e-2)


def test_cached_features_equal_those_extracted_again(network):
    outputs = texts(8)
    unlimited, uncached = (FeatureStore(network, (2, 3, 3), outputs, memory_mb=size) for size in (10, 0))
    for chosen in ([0, 1, 2], [2, 5, 0], [0, 1, 2]):
        one, other = unlimited.batch(chosen, 2), uncached.batch(chosen, 2)
        for name in ("features", "tokens", "anchors", "valid", "next_tokens", "last_hidden_states"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-3, rtol=1e-3)


def test_the_same_anchors_are_sampled_in_all_tensors(network):
    full_batch = FeatureStore(network, (2, 3, 3), texts(), memory_mb=10).batch(range(5), 3)
    part = sample_anchors(full_batch, 0.5, seed=4)
    wide = full_batch.anchors.shape[1]
    assert part.anchors.shape[1] == round(wide / 2)
    indices = [int((full_batch.anchors[0] == anchor).nonzero()[0, 0]) for anchor in part.anchors[0] if anchor]
    assert torch.equal(part.valid[:, : len(indices)], full_batch.valid[:, indices])
    assert torch.equal(part.last_hidden_states[:, : len(indices)], full_batch.last_hidden_states[:, indices])
    assert torch.equal(sample_anchors(full_batch, 0.5, seed=4).anchors, part.anchors)


def test_every_text_is_used_once_per_round():
    seen = [k for step in range(7) for k in batch_indices(14, 4, seed=1, step=step)]
    assert sorted(seen[:14]) == sorted(seen[14:]) == list(range(14))
    assert seen[:14] != seen[14:]
    assert batch_indices(3, 8, seed=1, step=0) == [
        k for step in range(8) for k in batch_indices(3, 1, seed=1, step=step)
    ]


def test_the_most_frequent_tokens_are_chosen():
    outputs = [TargetOutput([9, 9, 9, 9], [3, 3, 7, 5], 0), TargetOutput([9], [7, 3, 1], 0)]
    assert most_frequent_tokens(outputs, 10, None).tolist() == [1, 3, 5, 7]
    assert most_frequent_tokens(outputs, 10, 2).tolist() == [3, 7]
    assert most_frequent_tokens(outputs, 10, 99).tolist() == list(range(10))


def test_texts_without_tokens_of_the_target_are_left_out():
    outputs = [TargetOutput([1, 2], [3, 4], 2), TargetOutput([1, 2], [3, 4], 1), TargetOutput([1], [2], 0)]
    assert list(trainable_texts(outputs)) == outputs[1:2]
