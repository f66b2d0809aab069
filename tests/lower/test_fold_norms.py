"""Norms folded into convolutions: the same function, and nothing folded that something else needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from exitify.artifact.artifact import graph_path
from exitify.lower.fold_norms import fold_norms
from exitify.lower.from_onnx import segment_module
from tests.artifacts import exported
from tests.lower.kernels import Array

CHANNELS, FILTERS = 3, 5


def norm(name: str, value: str, result: str, **attributes: float) -> NodeProto:
    parameters = [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    return helper.make_node("BatchNormalization", [value, *parameters], [result], **attributes)


def parameters(name: str, channels: int = FILTERS) -> dict[str, Array]:
    """Of a norm; no two numbers alike."""
    random = np.random.default_rng(len(name) + ord(name[-1]))
    return {
        f"{name}.weight": random.uniform(0.5, 2, channels).astype(np.float32),
        f"{name}.bias": random.standard_normal(channels).astype(np.float32),
        f"{name}.running_mean": random.standard_normal(channels).astype(np.float32),
        f"{name}.running_var": random.uniform(0.1, 3, channels).astype(np.float32),
    }


def weight(*shape: int) -> Array:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def model(nodes: Sequence[NodeProto], outputs: Sequence[str] = ("y",), dimensions: int = 2) -> ModelProto:
    """The nodes from an input `x` to the outputs."""
    sizes = (1, CHANNELS, *(9, 8)[:dimensions])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "g", [given], made), opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def outputs(graph: ModelProto, tensors: Mapping[str, Array]) -> list[Array]:
    """What ONNX Runtime computes, its own optimisations off."""
    whole = ModelProto()
    whole.CopyFrom(graph)
    whole.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # tensors that nothing reads any more
    session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal(session.get_inputs()[0].shape).astype(np.float32)
    return session.run(None, {"x": x})


def operators(graph: ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


CASES = {
    "a convolution with a bias": (
        [helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"]), norm("bn", "c", "y")],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), "conv.bias": weight(FILTERS), **parameters("bn")},
        ["Conv"],
    ),
    "a convolution without": (
        [helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 0, 1, 2], strides=[2, 1]), norm("bn", "c", "y")],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn")},
        ["Conv"],
    ),
    "a grouped convolution": (
        [helper.make_node("Conv", ["x", "conv.weight"], ["c"], group=3), norm("bn", "c", "y", epsilon=0.1)],
        {"conv.weight": weight(6, 1, 3, 3), **parameters("bn", 6)},
        ["Conv"],
    ),
    "a norm with something behind it": (
        [helper.make_node("Conv", ["x", "conv.weight"], ["c"]), norm("bn", "c", "n"), helper.make_node("Relu", ["n"], ["y"])],
        {"conv.weight": weight(FILTERS, CHANNELS, 1, 1), **parameters("bn")},
        ["Conv", "Relu"],
    ),
    "two norms in a row": (
        [helper.make_node("Conv", ["x", "conv.weight"], ["c"]), norm("bn1", "c", "n"), norm("bn2", "n", "y")],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn1"), **parameters("bn2")},
        ["Conv"],
    ),
    "two convolutions with one weight": (
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c1"]),
            helper.make_node("Conv", ["x", "conv.weight"], ["c2"]),
            norm("bn1", "c1", "n1"),
            norm("bn2", "c2", "n2"),
            helper.make_node("Conv", ["x", "conv.weight"], ["c3"]),
            helper.make_node("Sum", ["n1", "n2", "c3"], ["y"]),
        ],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn1"), **parameters("bn2")},
        ["Conv", "Conv", "Conv", "Sum"],
    ),
    "a norm whose result has the norm's own name, used again": (
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c1"]),
            norm("bn", "c1", "bn"),
            helper.make_node("Relu", ["bn"], ["r"]),
            helper.make_node("Conv", ["r", "second.weight"], ["c2"]),
            norm("bn", "c2", "bn_1"),
            helper.make_node("Conv", ["bn_1", "second.weight"], ["c3"]),
            norm("bn", "c3", "y"),
        ],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), "second.weight": weight(FILTERS, FILTERS, 1, 1), **parameters("bn")},
        ["Conv", "Relu", "Conv", "Conv"],
    ),
    "a convolution that two read": (
        [helper.make_node("Conv", ["x", "conv.weight"], ["c"]), norm("bn", "c", "n"), helper.make_node("Add", ["n", "c"], ["y"])],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn")},
        ["Conv", "BatchNormalization", "Add"],
    ),
    "a norm that stands behind an addition": (
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"]),
            helper.make_node("Add", ["c", "c"], ["a"]),
            norm("bn", "a", "y"),
        ],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn")},
        ["Conv", "Add", "BatchNormalization"],
    ),
    "a norm that reads the input": (
        [norm("bn", "x", "n"), helper.make_node("Conv", ["n", "conv.weight"], ["y"])],
        {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn", CHANNELS)},
        ["BatchNormalization", "Conv"],
    ),
    "a transposed convolution": (
        [helper.make_node("ConvTranspose", ["x", "conv.weight"], ["c"]), norm("bn", "c", "y")],
        {"conv.weight": weight(CHANNELS, FILTERS, 3, 3), **parameters("bn")},
        ["ConvTranspose", "BatchNormalization"],
    ),
    "a weight that is computed": (
        [helper.make_node("Neg", ["raw"], ["w"]), helper.make_node("Conv", ["x", "w"], ["c"]), norm("bn", "c", "y")],
        {"raw": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn")},
        ["Neg", "Conv", "BatchNormalization"],
    ),
}
"""Nodes, tensors, and the operators that are left."""


@pytest.mark.parametrize("name", CASES)
def test_folding_changes_no_result_and_leaves_what_it_must(name):
    nodes, given, left = CASES[name]
    graph, tensors = model(nodes), dict(given)
    expected = outputs(graph, tensors)
    fold_norms(graph, tensors)
    assert operators(graph) == left
    np.testing.assert_allclose(outputs(graph, tensors)[0], expected[0], rtol=1e-5, atol=1e-5)
    for tensor, array in given.items():
        assert tensors[tensor] is array, tensor  # what was there is as it was


def test_a_convolution_in_one_dimension_is_folded():
    graph = model([helper.make_node("Conv", ["x", "w"], ["c"]), norm("bn", "c", "y")], dimensions=1)
    tensors = {"w": weight(FILTERS, CHANNELS, 3), **parameters("bn")}
    (expected,) = outputs(graph, tensors)
    fold_norms(graph, tensors)
    assert operators(graph) == ["Conv"]
    np.testing.assert_allclose(outputs(graph, tensors)[0], expected, rtol=1e-5, atol=1e-5)


def test_an_output_keeps_its_name_whether_it_is_a_norms_or_a_convolutions():
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), norm("bn", "c", "n"), helper.make_node("Relu", ["n"], ["y"])]
    tensors = {"w": weight(FILTERS, CHANNELS, 3, 3), **parameters("bn")}
    for names, left in ((["n", "y"], ["Conv", "Relu"]), (["c", "y"], ["Conv", "BatchNormalization", "Relu"])):
        graph, known = model(nodes, names), dict(tensors)
        expected = outputs(graph, known)
        fold_norms(graph, known)
        assert operators(graph) == left
        assert [value.name for value in graph.graph.output] == names
        for found, array in zip(outputs(graph, known), expected, strict=True):
            np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-5)


def test_folded_weights_are_rounded_once():
    graph = model([helper.make_node("Conv", ["x", "w", "b"], ["c"]), norm("bn", "c", "y", epsilon=1e-3)])
    tensors = {"w": weight(FILTERS, CHANNELS, 3, 3), "b": weight(FILTERS), **parameters("bn")}
    fold_norms(graph, tensors)
    gamma, beta, mean, variance = (tensors[f"bn.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var"))
    scale = gamma / np.sqrt(variance + np.float64(np.float32(1e-3)))
    (convolution,) = graph.graph.node
    folded, bias = (tensors[name] for name in convolution.input[1:])
    assert folded.dtype == bias.dtype == np.float32
    np.testing.assert_array_equal(folded, (tensors["w"] * scale[:, None, None, None]).astype(np.float32))
    np.testing.assert_array_equal(bias, ((tensors["b"] - mean) * scale + beta).astype(np.float32))


@pytest.mark.parametrize("part", ["weight", "bias", "running_mean", "running_var"])
def test_a_norm_with_anything_that_switches_stays_beside_its_convolution(part):
    graph = model([helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"]), norm("bn", "c", "y")])
    tensors: dict[str, Array] = {"conv.weight": weight(FILTERS, CHANNELS, 3, 3), "conv.bias": weight(FILTERS), **parameters("bn")}
    (expected,), convolution = outputs(graph, tensors), tensors["conv.weight"]
    fold_norms(graph, tensors, {f"bn.{part}"})
    assert operators(graph) == ["Conv", "Mul", "Add"]
    assert list(graph.graph.node[0].input) == ["x", "conv.weight"]  # its bias is in the summand: another addition a value took 1 % of a ResNet-50
    assert tensors["conv.weight"] is convolution
    np.testing.assert_allclose(outputs(graph, tensors)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["identity", "shared", "depthwise", "dropout"])
def test_no_norm_of_a_network_costs_a_kernel(network):
    _, artifact = exported(network)
    norms = 0
    for segment in artifact.plan.segments:
        norms += operators(onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)]))).count("BatchNormalization")
        assert "batch_norm" not in str(segment_module(artifact, segment))
    assert norms >= 2
