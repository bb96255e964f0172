import pytest
import torch
from torch import nn

from parse.engines.native import projections
from parse.engines.native.projections import group_linears
from tests.parse.engines.native.tiny import build, plain


@pytest.fixture(autouse=True)
def join_small_layers(monkeypatch):
    monkeypatch.setattr(projections, "MIN_JOINED_ELEMENTS", 0)


def names(network, group):
    return {name.rpartition(".")[2] for name, module in network.named_modules() if module in group.modules}


def test_projections_of_one_input_are_joined():
    network = build("llama")
    groups = group_linears(network)
    joined = [names(network, group) for group in groups if len(group.modules) > 1]
    assert joined == [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}] * 2
    modules = [module for group in groups for module in group.modules]
    assert set(modules) == {module for module in network.modules() if type(module) is nn.Linear}
    assert len(modules) == len(set(modules))


def test_joined_weights_keep_their_values_and_their_order():
    network = build("qwen2")  # its projections have biases
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = plain(network, [5, 3, 99])
    for group in group_linears(network):
        torch.testing.assert_close(group.weight, torch.cat([module.weight for module in group.modules]))
        if group.bias is not None:
            torch.testing.assert_close(group.bias, torch.cat([module.bias for module in group.modules]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    torch.testing.assert_close(plain(network, [5, 3, 99]), expected)


def test_layers_of_one_parent_are_not_joined_if_the_input_changes_in_between():
    network = build("llama")
    for layer in network.model.layers:

        def change_input(module, inputs):
            inputs[0].add_(1.0)

        layer.mlp.up_proj.register_forward_pre_hook(change_input)
    joined = [names(network, group) for group in group_linears(network) if len(group.modules) > 1]
    assert joined == [{"q_proj", "k_proj", "v_proj"}] * 2


def test_a_layer_that_is_called_twice_is_not_joined():
    network = build("llama")
    mlp = network.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + mlp.up_proj(x).sum() * 0
    joined = [names(network, group) for group in group_linears(network) if len(group.modules) > 1]
    assert joined.count({"gate_proj", "up_proj"}) == 1


def test_shared_outputs_belong_to_the_input_of_the_call():
    network = build("llama")
    (group,) = [g for g in group_linears(network) if network.model.layers[0].mlp.up_proj in g.modules]
    weight = group.weight.clone()
    first, second = group.modules
    num_calls = 0

    def forward(x):
        nonlocal num_calls
        num_calls += 1
        return x @ weight.T

    group.set_forward(forward, keep_weight=True)
    one, other = torch.randn(1, 4, 32), torch.randn(1, 4, 32)
    outputs = weight.split([first.out_features, second.out_features])
    for x, module, part in (
        *((one, first, outputs[0]), (one, second, outputs[1])),  # one computation for both
        *(
            (other, second, outputs[1]),
            (one, first, outputs[0]),
        ),  # the first is dropped, because its input was replaced
        *((other, first, outputs[0]), (other, first, outputs[0])),  # the same layer again
    ):
        torch.testing.assert_close(module(x), x @ part.T)
    assert num_calls == 5


def test_small_layers_are_not_joined(monkeypatch):
    monkeypatch.setattr(projections, "MIN_JOINED_ELEMENTS", 64 * 32 + 1)
    joined = [names(network, group) for network in [build("llama")] for group in group_linears(network)]
    assert {"q_proj", "k_proj", "v_proj"} not in joined and {"gate_proj", "up_proj"} in joined
