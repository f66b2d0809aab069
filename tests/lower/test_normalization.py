"""Softmax and layer norm over the last axis against NumPy in float64, with what is fused behind them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from exitify.lower.processors import machine_of
from exitify.lower.schedules import default_schedule, normalization
from exitify.lower.vectors import Vectors
from exitify.targets import load_target
from tests.lower.kernels import UNITS, Array, lowered, machine_with, module_of, run, stages

SHAPES = ((1, 197, 384), (2, 7, 5, 96), (1, 24), (5, 17), (3, 1), (200, 197), (1, 1, 1, 48))
EPSILON = 1e-6


class Rows:
    """Norms and softmaxes side by side, two outputs a shape: with and without something behind them."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        draw = np.random.default_rng(0).standard_normal
        self.inputs = [(draw(shape) * 3 + 1).astype(np.float32) for shape in shapes]
        self.weights = [draw((2, shape[-1])).astype(np.float32) for shape in shapes]
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, *inputs):
        for x, (gamma, beta) in zip(inputs, self.weights):
            norm = emit(relax.op.nn.layer_norm(x, relax.const(gamma), relax.const(beta), axes=[-1], epsilon=EPSILON))
            shares = emit(relax.op.nn.softmax(x, axis=-1))
            yield from (norm, emit(relax.op.nn.relu(emit(relax.op.add(shares, x)))))

    def check(self, found: list[Array]) -> None:
        for i, (x, (gamma, beta)) in enumerate(zip((x.astype(np.float64) for x in self.inputs), self.weights)):
            norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * gamma + beta
            np.testing.assert_allclose(found[2 * i], norm, rtol=1e-5, atol=1e-5)
            powers = np.exp(x - x.max(-1, keepdims=True))
            np.testing.assert_allclose(found[2 * i + 1], np.maximum(powers / powers.sum(-1, keepdims=True) + x, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_norms_and_softmaxes_are_numpys_and_one_kernel_each(vectors):
    rows, machine = Rows(SHAPES), machine_with(vectors)
    kernels = lowered(rows.module, machine)
    assert len(kernels.kernels) == 2 * len(SHAPES)
    for kernel in kernels.kernels.values():
        assert "normalized" in stages(kernel)
        tvm.ir.assert_structural_equal(default_schedule(kernel, vectors).mod, normalization.schedule(kernel, vectors).mod)
    rows.check(run(kernels, rows.inputs, machine))


@settings(max_examples=10)
@given(shape=st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple), vectors=st.sampled_from(UNITS))
def test_any_rows_are_numpys(shape: tuple[int, ...], vectors: Vectors):
    rows, machine = Rows((shape,)), machine_with(vectors)
    rows.check(run(lowered(rows.module, machine), rows.inputs, machine))


def test_other_axes_have_tvms_form_and_are_right():
    x = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
    ones = relax.const(np.ones((8, 5), np.float32))

    def write(emit, x):
        return [emit(relax.op.nn.softmax(x, axis=1)), emit(relax.op.nn.layer_norm(x, ones, ones, axes=[1, 2]))]

    kernels = lowered(module_of([x], write))
    assert not any("normalized" in stages(kernel) for kernel in kernels.kernels.values())
    shares, norm = run(kernels, [x])
    np.testing.assert_allclose(shares, np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-5)
    flat = x.reshape(3, -1)
    expected = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5) + 1
    np.testing.assert_allclose(norm.reshape(3, -1), expected, rtol=1e-4, atol=1e-5)


def test_large_numbers_have_shares():
    x = np.array([[1e4, -1e4, 1e4, 0.0, -3e38]], np.float32)
    (found,) = run(lowered(module_of([x], lambda emit, x: [emit(relax.op.nn.softmax(x))])), [x])
    np.testing.assert_array_equal(found, [[0.5, 0, 0.5, 0, 0]])


def test_rows_compile_for_another_architecture():
    machine = machine_of(load_target("aarch64-cpu"))
    for kernel in lowered(Rows(SHAPES[:3]).module, machine).kernels.values():
        tvm.compile(default_schedule(kernel, machine.vectors).mod["main"].with_attr("global_symbol", "kernel"), target=machine.target)
