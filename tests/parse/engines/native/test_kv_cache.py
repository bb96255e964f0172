import pytest
import torch

from parse.engines.native.kv_cache import CACHE_LINE, KVCache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_that_were_never_written_are_zero(dtype):
    kv_cache = KVCache(num_blocks=3, block_size=5)
    keys_and_values = torch.ones(1, 2, 2, 7, dtype=dtype)
    kv_cache.write(0, torch.tensor([4, 11]), keys_and_values, keys_and_values[..., :3])
    keys, values = kv_cache.as_blocks(0)
    assert keys.shape == (3, 5, 2, 7) and values.shape == (3, 5, 2, 3) and keys.dtype == dtype
    assert keys.flatten(0, 1).sum(dim=(1, 2)).nonzero().flatten().tolist() == [4, 11]
    assert values.data_ptr() % CACHE_LINE == keys.data_ptr() % CACHE_LINE == 0
    assert kv_cache.num_bytes == 15 * 2 * 10 * dtype.itemsize


def test_the_first_slots_of_a_block_are_copied_in_every_layer():
    kv_cache = KVCache(num_blocks=2, block_size=4)
    for layer in range(2):
        keys_and_values = torch.arange(4.0).add(10 * layer + 1).view(1, 1, 4, 1).expand(1, 1, 4, 2)
        kv_cache.write(layer, torch.arange(4), keys_and_values, -keys_and_values)
    kv_cache.copy_block(0, 1, 3)
    for layer in range(2):
        copied = [10 * layer + 1, 10 * layer + 2, 10 * layer + 3, 0]
        assert kv_cache.keys[layer][4:, 0, 0].tolist() == copied
        assert kv_cache.values[layer][4:, 0, 1].tolist() == [-each for each in copied]
