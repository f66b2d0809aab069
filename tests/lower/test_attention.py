"""Attention against NumPy in float64: one kernel where the graph is one, whatever moves its queries, keys and values; other graphs as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from exitify.lower.processors import machine_of
from exitify.lower.schedules import attention, default_schedule
from exitify.lower.vectors import Vectors
from exitify.targets import load_target
from tests.lower.kernels import UNITS, Array, lowered, machine_with, module_of, run, stages


@dataclass(frozen=True)
class Case:
    """Self-attention over tokens whose queries, keys and values lie side by side.

    depth: Of a head. biases: Shapes of what is added to the similarities, `(batch, heads, tokens, tokens)`. split: How the three are parted.
    """

    batch: int
    tokens: int
    heads: int
    depth: int
    biases: tuple[tuple[int, ...], ...] = ()
    scale: float = 1.0
    split: str = "take"
    merged: bool = True

    @property
    def size(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, 3 * self.heads * self.depth


class Network:
    """Attentions side by side, one output each."""

    def __init__(self, cases: list[Case]) -> None:
        draw = np.random.default_rng(0).standard_normal
        self.cases = cases
        self.inputs: list[Array] = [draw(case.size).astype(np.float32) for case in cases]
        self.biases = [[draw(shape).astype(np.float32) for shape in case.biases] for case in cases]
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, *inputs):
        op = relax.op
        for x, biases, case in zip(inputs, self.biases, self.cases):
            b, t, h, d = case.batch, case.tokens, case.heads, case.depth
            if case.split == "split":
                three = emit(op.split(x, 3, axis=-1))
                parts = [emit(op.permute_dims(emit(op.reshape(emit(relax.TupleGetItem(three, i)), (b, t, h, d))), [0, 2, 1, 3])) for i in range(3)]
            else:
                apart = emit(op.permute_dims(emit(op.reshape(x, (b, t, 3, h, d))), [2, 0, 3, 1, 4]))
                if case.split == "take":
                    parts = [emit(op.take(apart, relax.const(i, "int64"), axis=0, mode="fast")) for i in range(3)]
                else:
                    parts = [emit(op.squeeze(emit(op.strided_slice(apart, [0], [i], [i + 1])), [0])) for i in range(3)]
            queries = emit(op.multiply(parts[0], relax.const(np.array([case.scale], np.float32))))
            found = emit(op.matmul(queries, emit(op.permute_dims(parts[1], [0, 1, 3, 2]))))
            for bias in biases:
                if bias.ndim == 5:
                    found = emit(op.add(emit(op.reshape(found, (1, b, h, t, t))), relax.const(bias)))
                    found = emit(op.reshape(found, (b, h, t, t)))
                else:
                    found = emit(op.add(found, relax.const(bias)))
            found = emit(op.matmul(emit(op.nn.softmax(found, axis=-1)), parts[2]))
            yield emit(op.reshape(emit(op.permute_dims(found, [0, 2, 1, 3])), (b, t, h * d))) if case.merged else found

    def check(self, found: list[Array]) -> None:
        assert len(found) == len(self.cases)
        for array, x, biases, case in zip(found, self.inputs, self.biases, self.cases):
            parts = x.reshape(case.batch, case.tokens, 3, case.heads, case.depth).transpose(2, 0, 3, 1, 4)
            expected = attended(*parts, case.scale, [bias[0] if bias.ndim == 5 else bias for bias in biases])
            if case.merged:
                expected = expected.transpose(0, 2, 1, 3).reshape(case.batch, case.tokens, -1)
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def attended(queries: Array, keys: Array, values: Array, scale: float = 1.0, biases: list[Array] = []) -> Array:  # noqa: B006
    """In float64."""
    queries, keys, values = (array.astype(np.float64) for array in (queries, keys, values))
    logits = sum(biases, scale * queries @ np.swapaxes(keys, -1, -2))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ values


CASES = [
    Case(1, 197, 3, 64, scale=0.125),
    Case(4, 49, 3, 32, ((1, 3, 49, 49),), 0.2),
    Case(4, 49, 2, 32, ((1, 2, 49, 49), (1, 4, 1, 49, 49)), 0.2, "slice"),
    Case(2, 16, 5, 7, ((16, 16),), split="split"),
    Case(1, 5, 1, 3, scale=-2.0, merged=False),
    Case(3, 1, 2, 24),
    Case(2, 33, 2, 5, ((2, 1, 1, 33),), merged=False),
]


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_attention_is_one_kernel_and_numpys(vectors):
    network, machine = Network(CASES), machine_with(vectors)
    kernels = lowered(network.module, machine)
    found = [kernel for kernel in kernels.kernels.values() if "similarities" in stages(kernel)]
    assert len(found) == len(CASES)
    assert not [name for name in kernels.kernels if name.startswith(("matmul", "softmax", "transpose", "strided_slice", "take"))]
    for kernel in found:
        tvm.ir.assert_structural_equal(default_schedule(kernel, vectors).mod, attention.schedule(kernel, vectors).mod)
    network.check(run(kernels, network.inputs, machine))


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 40)),
    has_bias=st.booleans(),
    split=st.sampled_from(["take", "slice", "split"]),
    merged=st.booleans(),
    vectors=st.sampled_from(UNITS),
)
def test_any_attention_is_numpys(sizes: tuple[int, int, int, int], has_bias: bool, split: str, merged: bool, vectors: Vectors):
    biases = ((1, sizes[2], sizes[1], sizes[1]),) if has_bias else ()
    network, machine = Network([Case(*sizes, biases, 0.3, split, merged)]), machine_with(vectors)
    network.check(run(lowered(network.module, machine), network.inputs, machine))


SHAPES = [((2, 7, 20), (2, 33, 20), (2, 33, 16)), ((2, 3, 1, 8), (2, 3, 50, 8), (2, 3, 50, 24))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_attention_to_other_tokens_is_one_kernel_and_numpys(shapes, vectors):
    arrays = [np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in shapes]
    axes = [*range(len(shapes[0]) - 2), len(shapes[0]) - 1, len(shapes[0]) - 2]

    def write(emit, q, k, v):
        product = emit(relax.op.multiply(emit(relax.op.matmul(q, emit(relax.op.permute_dims(k, axes)))), relax.const(0.5, "float32")))
        return [emit(relax.op.matmul(emit(relax.op.nn.softmax(product)), v))]

    machine = machine_with(vectors)
    kernels = lowered(module_of(arrays, write), machine)
    assert list(kernels.kernels) == ["attention"]
    np.testing.assert_allclose(run(kernels, arrays, machine)[0], attended(*arrays, 0.5), rtol=1e-5, atol=1e-5)


def test_similarities_far_apart_are_no_nan():
    arrays = [np.full((1, 3, 4), 300, np.float32), np.full((1, 20, 4), 300, np.float32), np.ones((1, 20, 5), np.float32)]
    arrays[1][0, 7] = -300

    def write(emit, q, k, v):
        return [emit(relax.op.matmul(emit(relax.op.nn.softmax(emit(relax.op.matmul(q, emit(relax.op.permute_dims(k, [0, 2, 1])))))), v))]

    np.testing.assert_allclose(run(lowered(module_of(arrays, write)), arrays)[0], attended(*arrays), rtol=1e-6)


@pytest.mark.parametrize("why", ["softmax is read again", "similarities are read again", "bias is computed", "softmax over rows", "one head for all"])
def test_what_is_no_attention_is_left_as_it_is_and_right(why):
    q, k, v, bias = (np.random.default_rng(i).standard_normal((2, 3, 9, 9)).astype(np.float32) for i in range(4))
    k = k[:1] if why == "one head for all" else k
    arrays = [q, k, v, bias]

    def write(emit, q, k, v, bias):
        logits = emit(relax.op.matmul(q, emit(relax.op.permute_dims(k, [0, 1, 3, 2]))))
        if why == "bias is computed":
            logits = emit(relax.op.add(logits, bias))
        shares = emit(relax.op.nn.softmax(logits, axis=-2 if why == "softmax over rows" else -1))
        return [
            emit(relax.op.matmul(shares, v)),
            *([shares] if why == "softmax is read again" else [logits] if why == "similarities are read again" else []),
        ]

    kernels = lowered(module_of(arrays, write))
    assert "attention" not in kernels.kernels
    found = run(kernels, arrays)
    logits = q.astype(np.float64) @ np.swapaxes(k, -1, -2) + (bias if why == "bias is computed" else 0)
    axis = -2 if why == "softmax over rows" else -1
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    np.testing.assert_allclose(found[0], powers / powers.sum(axis, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


def test_attention_compiles_for_another_architecture():
    machine = machine_of(load_target("aarch64-cpu"))
    kernels = lowered(Network(CASES[:2]).module, machine)
    for kernel in kernels.kernels.values():
        made = default_schedule(kernel, machine.vectors).mod["main"]
        tvm.compile(made.with_attr("global_symbol", "kernel"), target=machine.target)
