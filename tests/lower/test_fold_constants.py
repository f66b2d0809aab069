"""What is computed from constants alone is computed before the graph is lowered."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from exitify.lower.fold_constants import fold_constants


def model_of(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", *outputs)]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 20)])


def test_chains_of_constants_become_what_others_read():
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Add", ["t", "t"], ["twice"]),
        helper.make_node("Slice", ["twice", "one", "two", "one"], ["cut"]),
        helper.make_node("Mul", ["x", "cut"], ["scaled"]),
        helper.make_node("Add", ["scaled", "t"], ["y"]),
    ]
    model = model_of(nodes, ["y"])
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"w": weight, "one": np.array([1]), "two": np.array([2])}
    fold_constants(model, tensors)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Add"]
    np.testing.assert_array_equal(tensors["t"], weight.T)
    np.testing.assert_array_equal(tensors["cut"], 2 * weight.T[:, 1:2])
    assert "twice" not in tensors


def test_what_the_graph_gives_out_and_what_is_random_stay():
    nodes = [
        helper.make_node("Neg", ["w"], ["y"]),
        helper.make_node("RandomNormalLike", ["w"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["z"]),
    ]
    model = model_of(nodes, ["y", "z"])
    fold_constants(model, {"w": np.ones(3, np.float32)})
    assert [node.op_type for node in model.graph.node] == ["Neg", "RandomNormalLike", "Add"]


def test_absent_inputs_are_no_inputs():
    model = model_of([helper.make_node("Clip", ["w", "", "top"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])], ["y"])
    tensors = {"w": np.array([1, 5], np.float32), "top": np.array(3, np.float32)}
    fold_constants(model, tensors)
    np.testing.assert_array_equal(tensors["c"], [1, 3])
