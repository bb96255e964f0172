import pytest
import torch
from torch.nn.functional import linear

from parse.engines.native.linear_kernels import KERNELS, available_kernels, padded_num_tokens

SHAPES = (1,), (1, 1), (3,), (1, 40), (2, 17), (0,), (1, 0), (1, 500)
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 1e-1)}  # relative, absolute


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name, dtype", [(name, dtype) for dtype in TOLERANCE for name in available_kernels(dtype)])
def test_a_kernel_gives_what_linear_gives(name, dtype, with_bias):
    torch.manual_seed(1)
    weight, bias = torch.randn(193, 48).to(dtype), torch.randn(193).to(dtype) if with_bias else None
    relative, absolute = TOLERANCE[dtype]
    forward = KERNELS[name].build(weight, bias)
    for shape in SHAPES:
        x = torch.randn(*shape, 48).to(dtype)
        torch.testing.assert_close(forward(x), linear(x, weight, bias), rtol=relative, atol=absolute)
    strided = torch.randn(1, 5, 96).to(dtype)[..., ::2]
    torch.testing.assert_close(forward(strided), linear(strided, weight, bias), rtol=relative, atol=absolute)


def test_padding_gives_few_sizes_and_adds_few_tokens():
    sizes = {tokens: padded_num_tokens(tokens) for tokens in range(1, 513)}
    assert len(set(sizes.values())) < 50
    assert all(tokens <= size <= 1.42 * tokens for tokens, size in sizes.items())
    assert all(size <= 1.25 * tokens for tokens, size in sizes.items() if tokens > 30)
