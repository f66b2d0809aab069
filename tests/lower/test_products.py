"""Products with a weight against NumPy in float64: packed where the weight is known, as it is where it is an argument."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from exitify.artifact.artifact import graph_path
from exitify.lower.library import lower_segments
from exitify.lower.linear import pack_matrix
from exitify.lower.schedules import default_schedule, product
from exitify.lower.vectors import Vectors
from tests.artifacts import exported
from tests.lower.kernels import HERE, UNITS, Array, assert_rounded, lowered, machine_with, module_of, run, stages

Sizes = tuple[tuple[int, ...], int, int]
"""Leading sizes of the data, how many values are summed up, columns of the result."""


class Products:
    """Products side by side, each with what is fused behind it: a bias and ReLU."""

    def __init__(self, sizes: list[Sizes], *, is_known: bool) -> None:
        self.sizes, self.is_known = sizes, is_known
        draw = np.random.default_rng(0).standard_normal
        self.data = [draw((*lead, depth)).astype(np.float32) for lead, depth, _ in sizes]
        self.weights = [draw((columns, depth)).astype(np.float32) for _, depth, columns in sizes]  # as torch stores them
        self.biases = [draw(columns).astype(np.float32) for *_, columns in sizes]
        self.inputs = self.data if is_known else [*self.data, *self.weights, *self.biases]
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, *inputs):
        count = len(self.sizes)
        weights, biases = (map(relax.const, self.weights), map(relax.const, self.biases)) if self.is_known else (inputs[count:], inputs[2 * count :])
        for x, weight, bias in zip(inputs, weights, biases):
            found = emit(relax.op.matmul(x, emit(relax.op.permute_dims(weight))))
            yield emit(relax.op.nn.relu(emit(relax.op.add(found, bias))))

    def check(self, found: list[Array]) -> None:
        assert len(found) == len(self.sizes)
        for array, x, weight, bias in zip(found, self.data, self.weights, self.biases):
            expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
            magnitude = abs(x).astype(np.float64) @ abs(weight).T.astype(np.float64) + abs(bias)
            assert_rounded(array, np.maximum(expected, 0), magnitude, terms=x.shape[-1] + 2)


LEADS = ((1,), (33,), (1, 1), (1, 17), (2, 3), (1, 3, 5), (2, 1, 2, 3))
KNOWN = [(lead, depth, columns) for lead, (depth, columns) in itertools.product(LEADS, ((1, 1), (33, 65), (48, 30)))]


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_products_with_a_known_weight_are_numpys(vectors):
    products, machine = Products(KNOWN, is_known=True), machine_with(vectors)
    kernels = lowered(products.module, machine)
    assert {tuple(stages(kernel)[:1]) for kernel in kernels.kernels.values()} == {("product",)}
    products.check(run(kernels, products.inputs, machine))


ROWS = [(lead, depth, columns) for lead, (depth, columns) in itertools.product(((1,), (1, 1)), ((1, 1), (7, 5), (33, 65), (48, 30), (512, 10)))]


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_products_of_one_row_with_an_argument_are_numpys(vectors):
    products, machine = Products(ROWS, is_known=False), machine_with(vectors)
    kernels = lowered(products.module, machine)
    assert {tuple(stages(kernel)[:2]) for kernel in kernels.kernels.values()} == {("partial_sums", "dot_products")}
    products.check(run(kernels, products.inputs, machine))


@settings(max_examples=15)
@given(
    lead=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    depth=st.integers(1, 70),
    columns=st.integers(1, 70),
    vectors=st.sampled_from(UNITS),
    is_known=st.booleans(),
)
def test_any_product_is_numpys(lead: tuple[int, ...], depth: int, columns: int, vectors: Vectors, is_known: bool):
    products, machine = Products([(lead, depth, columns)], is_known=is_known), machine_with(vectors)
    products.check(run(lowered(products.module, machine), products.inputs, machine))


def test_a_product_and_what_follows_it_are_one_kernel_of_the_product_schedule():
    for vectors, is_known in itertools.product(UNITS, (True, False)):
        sizes = KNOWN[2::7] if is_known else ROWS[:3]
        kernels = lowered(Products(sizes, is_known=is_known).module, machine_with(vectors)).kernels
        assert len(kernels) == len(sizes)
        for kernel in kernels.values():
            tvm.ir.assert_structural_equal(default_schedule(kernel, vectors).mod, product.schedule(kernel, vectors).mod)


def test_a_vector_times_a_known_weight_is_numpys():
    """A token that was learned, without any batch."""
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((9,), (9, 20)))
    found = run(lowered(module_of([x], lambda emit, x: [emit(relax.op.matmul(x, relax.const(weight)))])), [x])
    np.testing.assert_allclose(found[0], x @ weight, rtol=1e-5, atol=1e-5)


def test_a_product_with_an_argument_that_nothing_follows_is_numpys():
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((1, 48), (30, 48)))
    kernels = lowered(module_of([x, weight], lambda emit, x, weight: [emit(relax.op.matmul(x, emit(relax.op.permute_dims(weight))))]))
    assert [stages(kernel) for kernel in kernels.kernels.values()] == [["partial_sums", "dot_products"]]
    np.testing.assert_allclose(run(kernels, [x, weight])[0], x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_square_argument_is_transposed_only_if_the_graph_says_so(is_transposed):
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((1, 8), (8, 8)))

    def write(emit, x, weight):
        return [emit(relax.op.matmul(x, emit(relax.op.permute_dims(weight)) if is_transposed else weight))]

    found = run(lowered(module_of([x, weight], write)), [x, weight])
    np.testing.assert_allclose(found[0], x @ (weight.T if is_transposed else weight), rtol=1e-5, atol=1e-5)


TWO = [
    ((2, 3, 5, 7), (2, 3, 7, 4)),
    ((2, 5, 7), (7, 4)),
    ((5, 7), (7, 4)),
    ((5, 7), (2, 7, 33)),
    ((3, 1, 49, 32), (1, 2, 32, 49)),
    ((1, 6, 17, 24), (1, 6, 24, 48)),
    ((4, 1, 13), (4, 13, 1)),
]
"""Shapes of two activations; leading sizes are spread."""


def test_products_of_two_activations_and_what_follows_are_numpys():
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw(shape).astype(np.float32) for shapes in TWO for shape in shapes]
    pairs = list(zip(arrays[::2], arrays[1::2]))
    others = [draw((a @ b).shape).astype(np.float32) for a, b in pairs]

    def write(emit, *inputs):
        for a, b, other in zip(inputs[::2], inputs[1::2], others):
            yield emit(relax.op.nn.relu(emit(relax.op.add(emit(relax.op.matmul(a, b)), relax.const(other)))))

    for vectors in UNITS:
        machine = machine_with(vectors)
        kernels = lowered(module_of(arrays, write), machine)
        assert len(kernels.kernels) == len(TWO)
        assert sum("products" in stages(kernel) for kernel in kernels.kernels.values()) == sum(len(right) > 2 for _, right in TWO)
        for found, (a, b), other in zip(run(kernels, arrays, machine), pairs, others):
            np.testing.assert_allclose(found, np.maximum(a.astype(np.float64) @ b + other, 0), rtol=1e-5, atol=1e-5)


def stages_of_segment(network: str, segment: str) -> list[list[str]]:
    _, artifact = exported(network)
    return [stages(kernel) for kernel in lower_segments(artifact, [artifact.plan.segment(segment)], HERE).kernels.values()]


@pytest.mark.parametrize(("network", "exit_name"), [("plain", "final"), ("identity", "exit1"), ("depthwise", "exit2"), ("transformer", "exit1")])
def test_a_heads_classifier_is_read_as_it_is_and_the_networks_is_packed(network, exit_name):
    _, artifact = exported(network)
    if exit_name == "final":
        segment = artifact.plan.segments[-1]
        assert any("product" in names for names in stages_of_segment(network, segment.name))
    else:
        point = artifact.plan.exit(exit_name)
        segment = next(segment for segment in artifact.plan.segments if point.logits in segment.outputs)
        assert point.weight in segment.parameters
        assert sum("dot_products" in names for names in stages_of_segment(network, segment.name)) == 1
    assert any(node.op_type in ("Gemm", "MatMul") for node in onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)])).graph.node)


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), block=st.sampled_from([4, 8, 16, 64]))
def test_packing_loses_nothing_and_adds_zeros(shape: tuple[int, int], block: int):
    weight = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    packed = pack_matrix(weight, block)
    assert packed.shape == (-(-shape[1] // block), shape[0], block)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed.transpose(1, 0, 2).reshape(shape[0], -1)[:, : shape[1]], weight)
    assert np.count_nonzero(packed) == weight.size
