"""Compiled segments held against the reference: what is wrong is found, in the segment where it is."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exitify.artifact.artifact import HEADS_FILE, Artifact
from exitify.artifact.tensors import write_tensors
from exitify.errors import EngineError
from exitify.lower import library, pipeline, verify
from exitify.lower.library import Kernels, lower_segments
from exitify.lower.pipeline import TOLERANCE, compile_artifact
from exitify.lower.verify import segment_errors
from exitify.runtime.engines import reference
from exitify.targets import load_target
from tests.artifacts import exported
from tests.lower.kernels import HERE


@functools.cache
def built():
    _, artifact = exported("identity")
    kernels = lower_segments(artifact, artifact.plan.segments, HERE)
    return artifact, kernels, library.build(kernels, library.scheduled_by_default(kernels, HERE), HERE)


def with_weights(kernels: Kernels, segment: str, change) -> Kernels:
    """The kernels with other numbers in one segment's first weight."""
    first, *others = kernels.weights[segment]
    changed = first.copy()
    change(changed)
    return replace(kernels, weights={**kernels.weights, segment: (changed, *others)})


def stretch(array: np.ndarray) -> None:
    array *= 1.01


def lose_a_number(array: np.ndarray) -> None:
    """ReLU makes a 0 of it, as TVM writes it."""
    array.flat[np.abs(array).argmax()] = np.nan


def test_what_is_right_is_within_rounding():
    artifact, kernels, executable = built()
    errors = dict(segment_errors(artifact, kernels, executable))
    assert list(errors) == [segment.name for segment in artifact.plan.segments]
    assert 0 < max(errors.values()) < 1e-5


def test_for_another_machine_the_schedules_that_were_chosen_are_checked(monkeypatch):
    """Not the default ones: what tuning put into the library may be wrong where those are right."""
    built_with = []
    build = pipeline.build

    def note(kernels, scheduled, machine):
        built_with.append((scheduled, machine.triple))
        return build(kernels, scheduled, machine)

    monkeypatch.setattr(pipeline, "build", note)
    compile_artifact(exported("identity")[1], load_target("aarch64-cpu"))
    (library, there), (checked, here) = built_with
    assert checked is library
    assert (there, here) == ("aarch64-linux-gnu", HERE.triple)


@pytest.mark.parametrize("change", [stretch, lose_a_number])
def test_a_wrong_weight_is_found_in_its_segment_alone(change):
    """Each segment reads what the reference computed, so that an error does not travel."""
    artifact, kernels, executable = built()
    for segment in ("trunk_exit1", "head_exit1", "trunk_final"):
        errors = dict(segment_errors(artifact, with_weights(kernels, segment, change), executable))
        assert [name for name, error in errors.items() if not error <= TOLERANCE["fp32"]] == [segment]


def test_one_output_that_is_no_number_is_found_whichever_it_is(monkeypatch):
    artifact, kernels, executable = built()
    difference = verify._difference

    def without_scores(found, expected):
        return float("nan") if expected.shape == (1, 4) else difference(found, expected)

    monkeypatch.setattr(verify, "_difference", without_scores)
    errors = dict(segment_errors(artifact, kernels, executable))
    heads = [segment.name for segment in artifact.plan.segments if segment.kind == "head"]
    assert [name for name, error in errors.items() if np.isnan(error)] == heads


def test_a_compiled_segment_that_is_wrong_is_refused_by_name(monkeypatch):
    artifact, kernels, executable = built()
    monkeypatch.setattr(pipeline, "lower_segments", lambda *_, **__: with_weights(kernels, "trunk_exit2", stretch))
    monkeypatch.setattr(pipeline, "build", lambda *_: executable)
    said = r"the compiled segment 'trunk_exit2' differs from the reference by 0\.0\d+ of its magnitude, more than 0\.0001"
    with pytest.raises(EngineError, match=said):
        compile_artifact(artifact, load_target("host"))


@pytest.mark.parametrize("error", [1.1e-4, float("nan"), float("inf")])
def test_an_error_that_is_over_the_tolerance_or_no_number_is_refused(monkeypatch, error):
    artifact, kernels, executable = built()
    monkeypatch.setattr(pipeline, "lower_segments", lambda *_, **__: kernels)
    monkeypatch.setattr(pipeline, "build", lambda *_: executable)
    monkeypatch.setattr(pipeline, "segment_errors", lambda *_: iter([("trunk_exit1", 9e-5), ("head_exit1", error)]))
    with pytest.raises(EngineError, match=f"'head_exit1' differs from the reference by {error:.2g} "):
        compile_artifact(artifact, load_target("host"))


def with_heads(artifact: Artifact, scale: float) -> Artifact:
    """The artifact, its classifiers' weights multiplied."""
    heads = {name: array * np.float32(scale) if name.endswith("classifier.weight") else array for name, array in artifact.tensors(HEADS_FILE).items()}
    return replace(artifact, files={**artifact.files, HEADS_FILE: write_tensors(heads)})


def test_a_head_that_is_surer_than_float32_can_say_is_compiled_all_the_same():
    """The logarithm of a probability that is 0 in float32 is a number all the same."""
    artifact, kernels, executable = built()
    errors = dict(segment_errors(with_heads(artifact, 1e4), kernels, executable))
    assert max(errors.values()) < 1e-4


def reference_of(node: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    reference._drop_ceil_mode(graph.node[0])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return reference.ReferenceEvaluator(model, new_ops=[reference.LogSoftmax]).run(None, {"x": x})[0]


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_the_references_log_softmax_is_never_minus_infinity(axis):
    x = np.array([[1e4, 0, -1e4], [1, 2, 3]], np.float32)
    node = helper.make_node("LogSoftmax", ["x"], ["y"], axis=axis)
    below = x.astype(np.float64) - x.max(axis=axis, keepdims=True)
    np.testing.assert_allclose(reference_of(node, x), below - np.log(np.exp(below).sum(axis=axis, keepdims=True)), rtol=1e-6)


@pytest.mark.parametrize("attributes", [{}, {"strides": [1, 1]}])
def test_the_references_pool_with_stride_one_is_as_large_as_it_should_be(attributes):
    x = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    found = reference_of(helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1, **attributes), x)
    expected = np.lib.stride_tricks.sliding_window_view(np.pad(x[0, 0], 1, constant_values=-1), (3, 3)).max(axis=(2, 3))
    np.testing.assert_array_equal(found[0, 0], expected)
