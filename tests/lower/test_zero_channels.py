"""Pads of channels as convolutions, held against ONNX's reference evaluator."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from exitify.lower.zero_channels import pads_as_convolutions


def padded(pads: list[int], *, value: float | None = None, mode: str = "constant") -> ModelProto:
    """One Pad of an image of five channels."""
    inputs = ["x", "pads", *([] if value is None else ["value"])]
    constants = [helper.make_tensor("pads", TensorProto.INT64, [8], pads)]
    constants += [] if value is None else [helper.make_tensor("value", TensorProto.FLOAT, [], [value])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph([helper.make_node("Pad", inputs, ["y"], mode=mode)], "pad", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def replaced(model: ModelProto) -> tuple[ModelProto, bool]:
    """The model after the rewrite, and whether there is a convolution in it now."""
    changed = ModelProto()
    changed.CopyFrom(model)
    tensors = {tensor.name: np.array(tensor.int64_data or tensor.float_data) for tensor in changed.graph.initializer}
    before = set(tensors)
    pads_as_convolutions(changed, tensors, {"x": 5})
    for name in tensors.keys() - before:
        changed.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, tensors[name].shape, tensors[name].ravel()))
    return changed, changed.graph.node[0].op_type == "Conv"


@pytest.mark.parametrize("pads", [[0, 2, 0, 0, 0, 3, 0, 0], [0, 0, 0, 0, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], ids=str)
def test_a_pad_of_channels_becomes_a_convolution_with_the_same_result(pads):
    x = np.random.default_rng(0).standard_normal((1, 5, 3, 4)).astype(np.float32)
    model = padded(pads)
    changed, is_convolution = replaced(model)
    assert is_convolution
    np.testing.assert_array_equal(ReferenceEvaluator(changed).run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0])


@pytest.mark.parametrize(
    "model",
    [
        padded([0, 1, 1, 0, 0, 1, 1, 0]),
        padded([0, -1, 0, 0, 0, 1, 0, 0]),
        padded([0, 1, 0, 0, 0, 1, 0, 0], value=2.0),
        padded([0, 1, 0, 0, 0, 1, 0, 0], mode="reflect"),
    ],
    ids=["rows too", "channels taken away", "not zeros", "reflected"],
)
def test_other_pads_stay(model):
    assert replaced(model) == (model, False)


def test_zeros_that_are_given_are_zeros():
    assert replaced(padded([0, 1, 0, 0, 0, 1, 0, 0], value=0.0))[1]
