import pytest
import torch
from torch.nn.functional import linear

from parse.engines.native.int8 import int8_forward, quantize_linears
from tests.parse.engines.native.tiny import build, plain


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (1, 40), (2, 17), (1, 0)])
def test_the_result_is_that_of_rounded_weights_and_inputs(shape, with_bias):
    """Compared with the same scheme in double precision."""
    torch.manual_seed(2)
    weight, bias = torch.randn(53, 48), torch.randn(53) if with_bias else None
    x = torch.randn(*shape, 48) * torch.rand(*shape, 1)

    def rounded(tensor):
        scales = tensor.double().abs().amax(-1, keepdim=True) / 127
        return (tensor.double() / scales).round() * scales

    expected = linear(rounded(x), rounded(weight), None if bias is None else bias.double())
    torch.testing.assert_close(int8_forward(weight, bias)(x).double(), expected, rtol=1e-3, atol=1e-3)


def test_the_error_is_small_and_zeros_stay_zeros():
    torch.manual_seed(2)
    weight, x = torch.randn(64, 256), torch.randn(1, 9, 256)
    expected = linear(x, weight)
    error = (int8_forward(weight, None)(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    weight[5], x[0, 3] = 0.0, 0.0
    output = int8_forward(weight, None)(x)
    assert not output[0, 3].any() and not output[..., 5].any() and output.isfinite().all()


def test_a_token_does_not_depend_on_the_others():
    torch.manual_seed(2)
    forward = int8_forward(torch.randn(64, 256), None)
    x = torch.randn(1, 9, 256)
    together = forward(x)
    for index in range(9):
        assert torch.equal(forward(x[:, index : index + 1]), together[:, index : index + 1])
    assert torch.equal(forward(torch.cat([x, 1000 * x], 1))[:, :9], together)


def test_values_that_are_not_finite_stay_visible():
    x = torch.randn(1, 2, 16)
    x[0, 1, 3] = torch.nan
    output = int8_forward(torch.randn(8, 16), None)(x)
    assert output[0, 0].isfinite().all() and not output[0, 1].isfinite().any()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "phi3"])
def test_a_network_keeps_nearly_the_same_logits(kind):
    network = build(kind)
    tokens = list(range(20, 60))
    expected = plain(network, tokens)
    quantize_linears(network)
    error = (plain(network, tokens) - expected).norm() / expected.norm()
    assert 0 < error < 0.2
