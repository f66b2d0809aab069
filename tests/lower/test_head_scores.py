"""A head's scores as one kernel, against the formulas in float64 and against the operators that say them in ONNX."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scipy.special import log_softmax, softmax

from exitify.artifact.artifact import HEADS_FILE, graph_path
from exitify.lower.head_scores import cut_output, with_scores
from exitify.plan import SCORES, Stretch
from exitify.runtime.engines import make_engine
from tests.artifacts import exported
from tests.compiled import compiled
from tests.lower.kernels import Array, function, lowered, module_of

ABSOLUTE = 1e-5
"""Entropies are below 10, and float32 has seven digits."""

TEMPERATURES = (0.05, 0.3, 1.0, 3.7, 20.0)


@functools.cache
def scoring(classes: int):
    """Logits `(1, classes)` and a temperature to scores `(1, 4)`."""
    arrays = [np.zeros((1, classes), np.float32), np.ones((), np.float32)]
    module = with_scores(module_of(arrays, lambda emit, logits, temperature: [emit(logits)]), 0, 1)
    kernels = lowered(module)
    assert len(kernels.kernels) == 1
    return function(kernels)


def scores(logits: Array, temperature: float) -> Array:
    passed, found = scoring(logits.shape[1])(logits, np.array(temperature, np.float32))
    np.testing.assert_array_equal(passed, logits)
    assert found.shape == (1, len(SCORES))
    return found[0]


def expected_scores(logits: Array, temperature: float) -> Array:
    """In float64, from the quotient as float32 has it, which every engine rounds alike."""
    scaled = (logits / np.float32(temperature)).astype(np.float64)[0]
    p, q = softmax(scaled), softmax(2 * scaled)
    second, first = np.sort(p)[-2:]
    return np.array([first, -np.sum(p * log_softmax(scaled)), first - second, -np.sum(q * log_softmax(2 * scaled))])


LOGITS = {
    "two classes": lambda draw: draw((1, 2)),
    "five classes": lambda draw: draw((1, 5)) * 3,
    "a thousand classes": lambda draw: draw((1, 1000)) * 2,
    "all equal": lambda draw: np.full((1, 10), 0.7),
    "two at the top": lambda draw: np.array([[3, -1, 3, 0, 2.5]]),
    "nearly equal": lambda draw: np.array([[1, 1 + 1e-6, 0.5]]),
    "huge": lambda draw: np.array([[1e4, -1e4, 1e4 - 3, 0]]),
    "huge and equal": lambda draw: np.full((1, 3), -1e4),
    "far apart": lambda draw: np.array([[-1e4, 1e4]]),
    "zeros": lambda draw: np.zeros((1, 17)),
}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", LOGITS)
def test_scores_are_what_the_format_says(name, temperature):
    logits = LOGITS[name](np.random.default_rng(0).standard_normal).astype(np.float32)
    found = scores(logits, temperature)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected_scores(logits, temperature), atol=ABSOLUTE, rtol=0)


@settings(max_examples=30)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=7, max_size=7),
    temperature=st.floats(0.05, 20),
)
def test_scores_of_any_logits_are_what_the_format_says(logits: list[float], temperature: float):
    array = np.array([logits], np.float32)
    np.testing.assert_allclose(scores(array, temperature), expected_scores(array, temperature), atol=ABSOLUTE, rtol=0)


def test_a_margin_between_equals_is_zero_and_a_sure_answer_has_no_entropy():
    top1, _, margin, _ = scores(np.array([[2, 2, -5]], np.float32), 0.7)
    assert margin == 0.0
    assert top1 == pytest.approx(0.5, abs=1e-4)
    np.testing.assert_array_equal(scores(np.array([[-1e4, 1e4]], np.float32), 1.0), [1, 0, 1, 0])


@pytest.mark.parametrize(("network", "engine"), [("identity", "onnxruntime"), ("depthwise", "onnxruntime"), ("transformer", "reference")])
def test_scores_of_a_compiled_head_are_those_of_its_own_graph(network, engine):
    artifact = compiled(network)
    heads = artifact.tensors(HEADS_FILE)
    for point in artifact.plan.exits:
        segment = next(segment for segment in artifact.plan.segments if point.scores in segment.outputs)
        stretch = Stretch((segment.name,), segment.inputs, segment.outputs, segment.parameters, "", segment.cost)
        theirs, ours = (make_engine(name, artifact, 1).prepare(stretch) for name in (engine, "tvm"))
        draw = np.random.default_rng(0).standard_normal
        values = {name: draw((1, *artifact.plan.values[name].shape)).astype(np.float32) for name in segment.inputs}
        for temperature in TEMPERATURES:
            for scale in (0.0, 1.0, 100.0):
                weights = {point.weight: heads[point.weight] * np.float32(scale), point.bias: heads[point.bias]}
                given_ = {**values, **weights, point.temperature: np.array(temperature, np.float32)}
                found, expected = ours(given_), theirs(given_)
                logits = found[point.logits]
                np.testing.assert_allclose(logits, expected[point.logits], rtol=1e-5, atol=1e-5 * scale)
                np.testing.assert_allclose(found[point.features], expected[point.features], rtol=1e-5, atol=1e-6)
                if scale < 100:  # beyond that, logits apart by one rounding have other scores
                    np.testing.assert_allclose(found[point.scores], expected[point.scores], rtol=0, atol=ABSOLUTE)
                np.testing.assert_allclose(found[point.scores][0], expected_scores(logits, temperature), rtol=0, atol=ABSOLUTE)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_a_compiled_head_computes_no_score_twice():
    _, artifact = exported("identity")
    point = artifact.plan.exits[0]
    segment = next(segment for segment in artifact.plan.segments if point.scores in segment.outputs)
    model = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)]))
    assert {"TopK", "LogSoftmax"} <= set(operators(model))
    cut_output(model, point.scores)
    assert not {"TopK", "LogSoftmax", "Exp", "Concat"} & set(operators(model))
    assert [value.name for value in model.graph.output] == [point.logits, point.features]


def test_cutting_an_output_leaves_what_others_read():
    """`a` feeds both outputs, `b` only the one that goes."""
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["a"], ["b"]), helper.make_node("Exp", ["b"], ["gone"]),
             helper.make_node("Relu", ["a"], ["kept"])]  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "gone", "kept")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))
    cut_output(model, "gone")
    assert operators(model) == ["Neg", "Relu"]
    assert [value.name for value in model.graph.output] == ["kept"]
    onnx.checker.check_model(model)
