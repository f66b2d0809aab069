"""A smaller network from a file of somebody's: what is looked at before anything runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exitify.artifact.manifest import InputContract
from exitify.benchmark.smaller import smaller_network
from exitify.errors import ModelError

CONTRACT = InputContract(shape=(4,))
CLASSES = 3


def network(
    *,
    shape: tuple[object, ...] = ("N", 4),
    classes: int = CLASSES,
    elem: int = TensorProto.FLOAT,
    domain: str = "",
    outside: str = "",
    inputs: int = 1,
) -> onnx.ModelProto:
    """A linear layer, as one wants it."""
    weight = numpy_helper.from_array(np.arange(4 * classes, dtype=np.float32).reshape(4, classes), "w")
    if outside:
        weight = _outside("w", (4, classes), outside)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], domain=domain)]
    given = [helper.make_tensor_value_info(name, elem, shape) for name in ("x", "more")[:inputs]]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", classes))], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])], ir_version=10)


def _outside(name: str, shape: tuple[int, ...], location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "small.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("first", ["N", 1])
def test_a_network_of_the_same_input_and_classes_answers(tmp_path: Path, first: object) -> None:
    found = smaller_network(saved(tmp_path, network(shape=(first, 4))), CONTRACT, CLASSES)
    assert (found.name, found.role) == ("small.onnx", "smaller")
    loaded = found.load(1)
    assert loaded.run(np.array([[1, 0, 0, 1]], np.float32)).tolist() == [[9, 11, 13]]


def test_weights_in_a_file_beside_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(12, "<f4").tobytes())
    loaded = smaller_network(saved(tmp_path, network(outside="w.bin")), CONTRACT, CLASSES).load(1)
    assert loaded.run(np.array([[1, 2, 3, 4]], np.float32)).tolist() == [[10, 10, 10]]


@pytest.mark.parametrize("location", ["../w.bin", "{outer}/w.bin", "/etc/passwd", "linked.bin", "", "missing.bin", "."])
def test_data_from_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(12, "<f4").tobytes())
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "linked.bin").symlink_to(tmp_path / "w.bin")
    path = saved(folder, network(outside=location.format(outer=tmp_path) or " "))
    if not location:
        path = saved(folder, network())
        model = onnx.load(path)
        model.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=1, dims=(4, 3), data_location=TensorProto.EXTERNAL))
        path = saved(folder, model)
    with pytest.raises(ModelError, match=r"keeps 'w' in '.*', which is no file in its folder"):
        smaller_network(path, CONTRACT, CLASSES)


def test_data_from_elsewhere_is_found_in_inner_graphs_too(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=_outside("hidden", (1,), "/etc/passwd"))
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, (1,))])
    model = network()
    model.graph.node.append(helper.make_node("If", ["cond"], ["z"], then_branch=branch, else_branch=branch))
    with pytest.raises(ModelError, match="keeps 'hidden' in '/etc/passwd'"):
        smaller_network(saved(tmp_path, model), CONTRACT, CLASSES)


@pytest.mark.parametrize("domain", ["com.microsoft", "evil.ops"])
def test_operators_that_are_not_onnxs_own_are_refused(tmp_path: Path, domain: str) -> None:
    with pytest.raises(ModelError, match=f"has the operator {domain}.MatMul, which is not ONNX's own"):
        smaller_network(saved(tmp_path, network(domain=domain)), CONTRACT, CLASSES)


def test_operators_in_functions_are_looked_at_too(tmp_path: Path) -> None:
    model = network()
    inner = helper.make_node("Do", ["a"], ["b"], domain="evil.ops")
    model.functions.append(helper.make_function("ai.onnx", "F", ["a"], ["b"], [inner], [helper.make_opsetid("evil.ops", 1)]))
    with pytest.raises(ModelError, match=r"the operator evil\.ops\.Do"):
        smaller_network(saved(tmp_path, model), CONTRACT, CLASSES)


REFUSED = {
    "another shape": ({"shape": ("N", 5)}, r"reads float32 \(N, 5\), and the artifact float32 \(N, 4\)"),
    "a batch of its own": ({"shape": (8, 4)}, r"reads float32 \(8, 4\)"),
    "another type": ({"elem": TensorProto.DOUBLE}, r"reads float64 \(N, 4\)"),
    "other classes": ({"classes": 5}, r"the first output of .* is \(N, 5\), and the artifact gives \(N, 3\)"),
    "two inputs": ({"inputs": 2}, "has 2 inputs and 1 outputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_for_something_else_is_refused(tmp_path: Path, case: str) -> None:
    options, problem = REFUSED[case]
    with pytest.raises(ModelError, match=problem):
        smaller_network(saved(tmp_path, network(**options)), CONTRACT, CLASSES)  # type: ignore[arg-type]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.onnx").write_bytes(b"\xffno network")
    with pytest.raises(ModelError, match=r"small\.onnx is no ONNX file"):
        smaller_network(tmp_path / "small.onnx", CONTRACT, CLASSES)
    with pytest.raises(ModelError, match="there is no file"):
        smaller_network(tmp_path / "none.onnx", CONTRACT, CLASSES)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="has 0 inputs and 0 outputs"):
        smaller_network(tmp_path / "small.onnx", CONTRACT, CLASSES)
