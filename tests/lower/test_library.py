"""Segments as functions over shared kernels, their weights as arguments; and what TVM cannot take, named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tvm
from onnx import GraphProto, helper
from tvm import relax
from tvm_ffi import structural_hash

from exitify.artifact.artifact import Artifact, graph_path
from exitify.lower import library
from exitify.lower.from_onnx import NotLowered
from exitify.lower.library import Kernels, lower_segments
from exitify.lower.lift_constants import lift_constants
from exitify.lower.vectors import Vectors
from exitify.lower.verify import segment_errors
from exitify.plan import Segment
from tests.artifacts import exported
from tests.lower.kernels import HERE, lowered, machine_with, module_of
from tests.skipping import skipping

# --- constants ------------------------------------------------------------------------------------------------------


def with_constants(*arrays: np.ndarray) -> relax.Function:
    """`x` plus each of them, one after the other; the same array twice is one constant."""
    constants = {id(array): relax.const(array) for array in arrays}

    def write(emit, x):
        for array in arrays:
            x = emit(relax.op.add(x, constants[id(array)]))
        return [x]

    return module_of([np.zeros((2, 3), np.float32)], write)["main"]


def test_constants_become_arguments_in_the_order_in_which_they_are_read():
    first, second = np.full((2, 3), 1, np.float32), np.full((3,), 2, np.float32)
    function = with_constants(first, second)
    lifted, constants = lift_constants(function)
    assert [param.name for param in lifted.params] == ["x0", "weight0", "weight1"]
    assert [tuple(map(int, param.ty.shape)) for param in lifted.params] == [(2, 3), (2, 3), (3,)]
    np.testing.assert_array_equal(constants[0], first)
    np.testing.assert_array_equal(constants[1], second)
    assert "metadata" not in str(lifted)  # no constant stands in it any more
    assert "metadata" in str(function)


def test_a_constant_that_is_read_twice_is_one_argument():
    array = np.ones((2, 3), np.float32)
    lifted, constants = lift_constants(with_constants(array, array))
    assert len(lifted.params) == 2
    assert len(constants) == 1


def test_a_scalar_stays_where_it_is():
    lifted, constants = lift_constants(with_constants(np.array(2, np.float32)))
    assert len(lifted.params) == 1
    assert constants == []


# --- segments -------------------------------------------------------------------------------------------------------


def functions(kernels: Kernels) -> dict[str, relax.Function]:
    return {var.name_hint: function for var, function in kernels.module.functions_items() if isinstance(function, relax.Function)}


@pytest.mark.parametrize("network", ["identity", "shared"])
def test_equal_kernels_of_different_segments_are_one(network):
    _, artifact = exported(network)
    segments = artifact.plan.segments
    together = lower_segments(artifact, segments, HERE)
    called = {name: str(function).count("call_tir(") for name, function in functions(together).items()}
    assert len({structural_hash(kernel) for kernel in together.kernels.values()}) == len(together.kernels) < sum(called.values())
    assert list(together.weights) == [segment.name for segment in segments]
    assert functions(together).keys() == together.weights.keys()


def test_a_segments_function_takes_what_the_plan_says_and_then_its_weights():
    _, artifact = exported("depthwise")
    kernels = lower_segments(artifact, artifact.plan.segments, machine_with(Vectors(16, 32)))
    values = artifact.plan.values
    for segment in artifact.plan.segments:
        function, weights = functions(kernels)[segment.name], kernels.weights[segment.name]
        assert len(function.params) == len(segment.inputs) + len(segment.parameters) + len(weights)
        shapes = [tuple(map(int, param.ty.shape)) for param in function.params]
        blocked = {name: (1, -(-values[name].shape[0] // 16), *values[name].shape[1:], 16) for name in kernels.in_blocks}
        assert shapes[: len(segment.inputs)] == [blocked.get(name, (1, *values[name].shape)) for name in segment.inputs]
        assert shapes[len(function.params) - len(weights) :] == [weight.shape for weight in weights]


def test_segments_that_share_kernels_do_not_share_weights():
    """Each against the reference: the two blocks of this network have the same kernels and other numbers."""
    _, artifact = exported("identity")
    kernels = lower_segments(artifact, artifact.plan.segments, HERE)
    errors = dict(segment_errors(artifact, kernels, library.build(kernels, library.scheduled_by_default(kernels, HERE), HERE)))
    assert list(errors) == [segment.name for segment in artifact.plan.segments]
    assert max(errors.values()) < 1e-5


# --- what TVM cannot take -------------------------------------------------------------------------------------------

EDIT = Callable[[GraphProto], None]


def with_graph(artifact: Artifact, segment: Segment, edit: EDIT, *, second: bool = False) -> Artifact:
    """The artifact, one segment's graph changed; its manifest still lists the old one."""
    path = graph_path(segment.name, second=second)
    model = onnx.load_model_from_string(bytes(artifact.files[path]))
    edit(model.graph)
    return replace(artifact, files={**artifact.files, path: model.SerializeToString()})


def behind_an_output(*nodes: tuple[str, dict[str, object]]) -> EDIT:
    """An edit that computes the segment's first output by these operators in a row from what it was."""

    def edit(graph: GraphProto) -> None:
        name = graph.output[0].name
        for node in graph.node:
            for i, output in enumerate(node.output):
                if output == name:
                    node.output[i] = "before0"
        for i, (operator, attributes) in enumerate(nodes):
            graph.node.append(helper.make_node(operator, [f"before{i}"], [f"before{i + 1}"], **attributes))
        graph.node[-1].output[0] = name

    return edit


UNKNOWN = behind_an_output(("Celu", {"alpha": 2.0}))
"""An operator that TVM's importer lacks."""

NO_KERNEL = behind_an_output(("NonZero", {}), ("Cast", {"to": 1}))
"""An operator that the importer knows and that becomes no kernel: its shape depends on the data."""


def test_an_operator_that_tvms_importer_lacks_is_named_with_its_segment():
    _, artifact = exported("identity")
    segment = artifact.plan.segments[2]
    with pytest.raises(NotLowered, match=rf"TVM cannot take the segment '{segment.name}': .*Celu") as refusal:
        lower_segments(with_graph(artifact, segment, UNKNOWN), artifact.plan.segments, HERE)
    assert refusal.value.hint == "leave such segments to ONNX Runtime: --fallback onnxruntime"


def test_an_operator_without_a_kernel_is_named_with_its_segment():
    _, artifact = exported("identity")
    segment = artifact.plan.segments[-1]
    with pytest.raises(NotLowered, match=rf"TVM cannot take the segment '{segment.name}': it has no kernel for .*nonzero"):
        lower_segments(with_graph(artifact, segment, NO_KERNEL), artifact.plan.segments, HERE)


@pytest.mark.parametrize("edit", [UNKNOWN, NO_KERNEL], ids=["unknown", "no kernel"])
def test_what_tvm_cannot_take_can_be_left_out_and_the_rest_is_as_it_was(edit):
    _, artifact = exported("identity")
    segments = artifact.plan.segments
    left = lower_segments(with_graph(artifact, segments[2], edit), segments, HERE, leave=True)
    whole = lower_segments(artifact, [segment for segment in segments if segment is not segments[2]], HERE)
    assert list(left.weights) == list(whole.weights)
    assert segments[2].name not in functions(left)
    tvm.ir.assert_structural_equal(left.module, whole.module)


def test_a_segment_of_which_tvm_cannot_take_the_second_set_of_norms_alone_is_left_out_too():
    _, artifact = skipping()
    segment = artifact.plan.segment("trunk_skip1")
    edited = with_graph(artifact, segment, UNKNOWN, second=True)
    with pytest.raises(NotLowered, match=r"TVM cannot take the segment 'trunk_skip1': .*Celu"):
        lower_segments(edited, [segment], HERE)
    left = lower_segments(edited, [segment, artifact.plan.segment("block_skip1")], HERE, leave=True)
    assert list(left.weights) == ["block_skip1"]
    assert left.second_weights == {}


def test_an_operator_that_tvm_knows_in_another_form_only_is_refused_in_words():
    """Of any error in TVM's passes."""
    _, artifact = exported("identity")
    segment = artifact.plan.segments[-1]
    edit = behind_an_output(("Resize", {"mode": "cubic"}))  # without sizes and scales
    with pytest.raises(NotLowered, match=rf"TVM cannot take the segment '{segment.name}': \S+"):
        lower_segments(with_graph(artifact, segment, edit), [segment], HERE)


def test_lowering_leaves_the_artifact_as_it_was():
    _, artifact = exported("identity")
    before = {path: bytes(data) for path, data in artifact.files.items()}
    lower_segments(artifact, artifact.plan.segments, HERE)
    assert {path: bytes(data) for path, data in artifact.files.items()} == before


def test_a_kernel_is_named_for_what_it_computes():
    x = np.zeros((1, 3, 8, 8), np.float32)
    weight = relax.const(np.ones((4, 3, 3, 3), np.float32))
    names = lowered(module_of([x], lambda emit, x: [emit(relax.op.nn.relu(emit(relax.op.nn.conv2d(x, weight))))])).kernels
    assert sorted(names) == ["fused_convolution_relu", "out_of_blocks"]
