"""Costs against formulas worked out by hand: multiply-adds, weights, bytes written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exitify.passes.cost import example_input, node_costs, value_cost
from exitify.plan import Cost, Value
from exitify.tracing import capture
from tests.helpers import captured, images, state
from tests.models import CLASSES, ZOO


class Pooled(nn.Module):
    """One layer, and classes from its mean."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.fc = layer, nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer(x).mean((2, 3)))


def test_every_node_of_a_plain_network():
    costs = node_costs(captured("plain"))
    assert costs == {
        "stem": Cost(8 * 3 * 9 * 256, 8 * 3 * 9 + 8, 4 * 8 * 256),
        "norm": Cost(0, 16, 4 * 8 * 256),
        "relu": Cost(0, 0, 4 * 8 * 256),
        "body": Cost(16 * 8 * 9 * 64, 16 * 8 * 9 + 16, 4 * 16 * 64),
        "relu_1": Cost(0, 0, 4 * 16 * 64),
        "mean": Cost(0, 0, 4 * 16),
        "fc": Cost(16 * 5, 16 * 5 + 5, 4 * 5),
    }


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.integers(1, 2), st.booleans())
def test_a_convolution_costs_its_outputs_times_its_window(channels_in, channels_out, groups, size, stride, bias):
    channels_in, channels_out = channels_in * groups, channels_out * groups
    layer = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, groups=groups, bias=bias)
    program = capture(Pooled(layer, channels_out).eval(), torch.randn(1, channels_in, 9, 7))
    height, width = -(-9 // stride), -(-7 // stride)
    weights = channels_out * (channels_in // groups) * size * size
    outputs = height * width
    assert node_costs(program)["layer"] == Cost(weights * outputs, weights + channels_out * bias, 4 * channels_out * outputs)


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(2, 20), st.booleans())
def test_a_linear_layer_costs_its_inputs_times_its_outputs(features, classes, bias):
    program = capture(nn.Sequential(nn.Flatten(), nn.Linear(features, classes, bias)), torch.randn(1, features))
    (cost,) = [cost for name, cost in node_costs(program).items() if cost.macs]
    assert cost == Cost(features * classes, features * classes + classes * bias, 4 * classes)


def test_attention_counts_its_two_products():
    program = captured("transformer")
    tokens, width, heads = 17, 16, 2
    patches = 16 * width * (3 * 4 * 4)
    attention = 2 * heads * tokens * tokens * (width // heads)
    block = tokens * (width * 3 * width + width * width + 2 * width * 2 * width) + attention
    assert value_cost(program, node_costs(program), "fc").macs == patches + 2 * block + width * CLASSES


@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(16, 2, batch_first=True), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)], ids=["attention", "encoder"]
)
def test_torchs_own_attention_modules_count_their_products_too(layer):
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fc = layer, nn.Linear(16, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x, x, x, need_weights=False)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
            return self.fc(y.mean(1))

    tokens, width, hidden = 9, 16, 32
    macs = tokens * 4 * width * width + 2 * tokens * tokens * width  # heads share the width
    if isinstance(layer, nn.TransformerEncoderLayer):
        macs += tokens * 2 * width * hidden
    assert torch.backends.mha.get_fastpath_enabled()
    assert node_costs(capture(Attends().eval(), torch.randn(1, tokens, width)))["layer"].macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_weights_of_a_block_called_twice_are_read_twice():
    program = captured("shared")
    costs = node_costs(program)
    calls = [node.name for node in program.graph.nodes if node.target == "block.conv1.0"]
    assert [costs[name] for name in calls] == [Cost(8 * 8 * 9 * 256, 8 * 8 * 9, 4 * 8 * 256)] * 2


def test_a_parameter_of_the_root_is_counted_where_it_is_read():
    costs = node_costs(captured("transformer"))
    assert costs["add"].parameters == 17 * 16  # + positions
    assert costs["expand"].parameters == 16  # the class token


def test_sizes_cost_nothing():
    costs = node_costs(captured("transformer"))
    assert costs["getattr_1"] == Cost()


def test_the_cost_of_a_value_is_that_of_what_it_needs():
    program = captured("identity")
    costs = node_costs(program)
    convolution = 8 * 8 * 9 * 256
    assert value_cost(program, costs, "x") == Cost()
    assert value_cost(program, costs, "relu").macs == 8 * 3 * 9 * 256
    assert value_cost(program, costs, "relu_2").macs == 8 * 3 * 9 * 256 + 2 * convolution
    assert value_cost(program, costs, "block1_conv1_1").macs == 8 * 3 * 9 * 256 + convolution


def test_measuring_changes_neither_mode_nor_statistics():
    program = captured("dropout").train()
    before = state(program)
    node_costs(program)
    assert all(module.training for module in program.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in program.state_dict().items())


def test_costs_in_train_are_those_in_eval():
    program = captured("stochastic")
    assert node_costs(program.train()) == node_costs(program.eval())


def test_an_example_input_looks_like_the_value():
    made = example_input(Value((2, 3), "int64"), batch=4)
    assert (made.shape, made.dtype) == ((4, 2, 3), torch.int64)


def test_costs_are_for_one_sample_whatever_the_example_was():
    model = ZOO["plain"]()
    assert node_costs(capture(model, images(1))) == node_costs(capture(model, images(3)))
