"""Packed convolution against torch in float64, over shapes that no tile divides, for every vector unit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from exitify.lower import library
from exitify.lower.convolution import Shape, channels_together, pack_weight
from exitify.lower.schedules import convolution, default_schedule
from exitify.lower.vectors import Vectors
from tests.lower.kernels import UNITS, Array, assert_rounded, lowered, machine_with, module_of, run, stages


@dataclass(frozen=True)
class Case:
    """A convolution and what is fused behind it. padding: Top, left, bottom, right."""

    channels: int
    filters: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1
    bias: bool = False
    residual: bool = False
    relu: bool = False

    @property
    def is_possible(self) -> bool:
        """Whether the padded image holds the kernel once."""
        top, left, bottom, right = self.padding
        sides = zip((self.height + top + bottom, self.width + left + right), self.kernel, self.dilation)
        return all(size > dilation * (kernel - 1) for size, kernel, dilation in sides)


CHANNELS, FILTERS, WIDTHS, HEIGHTS = (1, 3, 16, 17, 30), (1, 7, 16, 30, 33), (1, 5, 7, 8, 13, 16, 28), (1, 2, 5, 8)
KERNELS, STRIDES, DILATIONS = ((1, 1), (3, 3), (1, 7), (5, 5)), ((1, 1), (2, 2), (2, 1)), ((1, 1), (2, 2))
PADDINGS = ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (0, 3, 0, 3), (0, 1, 1, 0), (1, 0, 2, 3))


def drawn(count: int, seed: int) -> list[Case]:
    """Cases from all over the grid, the same for the same seed."""
    draw = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        sizes = (draw.choice(values) for values in (CHANNELS, FILTERS, HEIGHTS, WIDTHS, KERNELS, STRIDES, PADDINGS, DILATIONS))
        case = Case(*sizes, bias=draw.random() < 0.5, residual=draw.random() < 0.5, relu=draw.random() < 0.5)
        cases += [case] if case.is_possible else []
    return cases


def convolve(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    top, left, bottom, right = case.padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    return torch.nn.functional.conv2d(padded, weight, None, case.stride, 0, case.dilation, case.groups)


class Network:
    """Convolutions side by side, one output each: compiled at once, which is quicker than one by one."""

    def __init__(self, cases: Sequence[Case], seed: int = 0) -> None:
        self.cases = cases
        random_ = np.random.default_rng(seed)
        self.inputs: list[Array] = []
        self.weights: list[Array] = []
        self.biases: list[Array] = []
        self.expected: list[Array] = []
        self.magnitude: list[Array] = []
        for case in cases:
            x = random_.standard_normal((case.batch, case.channels, case.height, case.width)).astype(np.float32)
            weight = random_.standard_normal((case.filters, case.channels // case.groups, *case.kernel)).astype(np.float32)
            bias = random_.standard_normal((1, case.filters, 1, 1)).astype(np.float32)
            x64, weight64 = torch.from_numpy(x).double(), torch.from_numpy(weight).double()
            expected, magnitude = convolve(case, x64, weight64).numpy(), convolve(case, x64.abs(), weight64.abs()).numpy()
            residual = random_.standard_normal(expected.shape).astype(np.float32)
            for term in ([bias] if case.bias else []) + ([residual] if case.residual else []):
                expected, magnitude = expected + term, magnitude + abs(term)
            self.inputs += [x, residual] if case.residual else [x]
            self.weights.append(weight)
            self.biases.append(bias)
            self.expected.append(np.maximum(expected, 0) if case.relu else expected)
            self.magnitude.append(magnitude)
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, *inputs):
        given_ = iter(inputs)
        for case, weight, bias in zip(self.cases, self.weights, self.biases):
            value = emit(relax.op.nn.conv2d(next(given_), relax.const(weight), case.stride, case.padding, case.dilation, case.groups))
            if case.bias:
                value = emit(relax.op.add(value, relax.const(bias)))
            if case.residual:
                value = emit(relax.op.add(value, next(given_)))
            if case.relu:
                value = emit(relax.op.nn.relu(value))
            yield value

    def check(self, found: Sequence[Array]) -> None:
        assert len(found) == len(self.cases)
        for case, *arrays in zip(self.cases, found, self.expected, self.magnitude):
            try:
                assert_rounded(*arrays, terms=case.channels // case.groups * case.kernel[0] * case.kernel[1] + 3)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error


def is_packed(kernel: tvm.tirx.PrimFunc) -> bool:
    """Whether the kernel is a packed convolution."""
    return "convolution" in stages(kernel)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_convolutions_of_odd_shapes_are_torchs(vectors, seed):
    network, machine = Network(drawn(24, seed)), machine_with(vectors)
    network.check(run(lowered(network.module, machine), network.inputs, machine))


@pytest.mark.slow
@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_many_convolutions_of_odd_shapes_are_torchs(vectors, seed):
    for n in range(4):
        network, machine = Network(drawn(300, seed + n)), machine_with(vectors)
        network.check(run(lowered(network.module, machine), network.inputs, machine))


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_pointwise_convolutions_cross_rows(vectors):
    """Their pixels are counted in one row: tiles begin and end in the middle of an image's row, and filters are missing from the last block."""
    sizes = itertools.product((1, 7, 12, 30, 33), ((1, 1), (2, 3), (5, 13), (7, 7)))
    cases = [Case(5, filters, *size, (1, 1), bias=True, relu=size[0] > 2) for filters, size in sizes]
    network, machine = Network(cases), machine_with(vectors)
    kernels = lowered(network.module, machine)
    assert all(Shape(5, *size, 1, (1, 1), (1, 1), (0,) * 4, (1, 1)).is_pointwise for size in ((1, 1), (5, 13)))
    network.check(run(kernels, network.inputs, machine))


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_every_choice_of_the_tuner_computes_the_same(vectors, seed):
    cases = [
        Case(3, 16, 8, 16, (3, 3), padding=(1, 1, 1, 1), bias=True, relu=True),
        Case(16, 30, 5, 13, (1, 1), bias=True, residual=True),
        Case(17, 33, 8, 28, (1, 7), (2, 1), (0, 3, 0, 3), relu=True),
        Case(5, 7, 6, 7, (5, 5), (2, 2), (1, 0, 2, 3), (2, 1), residual=True),
        Case(16, 16, 7, 7, (1, 1), (2, 2)),
    ]
    network, machine, draw = Network(cases), machine_with(vectors), random.Random(seed)
    kernels = lowered(network.module, machine)
    packed = {name: kernel for name, kernel in kernels.kernels.items() if is_packed(kernel)}
    tried = {name: convolution.choices(kernel, vectors) for name, kernel in packed.items()}
    assert sum(len(choices) > 3 for choices in tried.values()) >= 2
    for _ in range(3):
        chosen = {name: draw.choice(choices[1:] or choices) for name, choices in tried.items()}
        scheduled = {name: convolution.schedule(kernel, vectors, chosen[name]).mod["main"] for name, kernel in packed.items()}
        network.check(run(kernels, network.inputs, machine, {**library.scheduled_by_default(kernels, machine), **scheduled}))


@st.composite
def possible_cases(draw: st.DrawFn) -> Case:
    small, padding = st.integers(1, 40), st.integers(0, 3)
    pairs = [draw(st.tuples(size, size)) for size in (st.integers(1, 30), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2))]
    (height, width), kernel, stride, dilation = pairs
    made = Case(draw(small), draw(small), height, width, kernel, stride, draw(st.tuples(*[padding] * 4)), dilation)
    made = replace(made, bias=draw(st.booleans()), residual=draw(st.booleans()), relu=draw(st.booleans()))
    wider = [max(0, d * (k - 1) + 1 - size) for size, k, d in zip((height, width), kernel, dilation)]
    return replace(made, height=height + wider[0], width=width + wider[1])


@settings(max_examples=20)
@given(case=possible_cases(), vectors=st.sampled_from(UNITS))
def test_any_convolution_is_torchs(case: Case, vectors: Vectors):
    network, machine = Network([case]), machine_with(vectors)
    network.check(run(lowered(network.module, machine), network.inputs, machine))


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_windows_of_an_image_are_convolved_each(vectors):
    cases = [
        Case(3, 8, 8, 8, (3, 3), padding=(1, 1, 1, 1), batch=4, bias=True, relu=True),
        Case(3, 20, 4, 5, (1, 1), batch=3, residual=True),
        Case(7, 5, 5, 13, (3, 3), (2, 2), (0, 1, 1, 0), batch=2),
    ]
    network, machine = Network(cases), machine_with(vectors)
    kernels = lowered(network.module, machine)
    assert sum(is_packed(kernel) for kernel in kernels.kernels.values()) == len(cases)
    network.check(run(kernels, network.inputs, machine))


def test_a_convolution_and_what_follows_it_are_one_kernel_of_the_convolution_schedule():
    cases = [replace(case, bias=True, residual=True, relu=True) for case in drawn(12, seed=1)]
    for vectors in UNITS:
        kernels = lowered(Network(cases).module, machine_with(vectors)).kernels
        packed = [kernel for kernel in kernels.values() if is_packed(kernel)]
        assert len(packed) == len(set(cases))
        assert all(stages(kernel) in (["into_blocks"], ["out_of_blocks"]) for kernel in kernels.values() if not is_packed(kernel))
        for kernel in packed:
            tvm.ir.assert_structural_equal(default_schedule(kernel, vectors).mod, convolution.schedule(kernel, vectors).mod)


def test_equal_convolutions_share_a_kernel_and_not_their_weights():
    network = Network([Case(3, 8, 5, 5, (3, 3))] * 3)
    kernels = lowered(network.module)
    assert sorted(kernels.kernels) == ["convolution", "out_of_blocks"]
    network.check(run(kernels, network.inputs))


def test_a_value_that_is_read_again_behind_its_convolution_is_computed_once():
    """SiLU: y * sigmoid(y)."""
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((1, 3, 9, 11), (20, 3, 3, 3)))

    def write(emit, image):
        y = emit(relax.op.nn.conv2d(image, relax.const(weight), padding=1))
        return [emit(relax.op.multiply(y, emit(relax.op.sigmoid(y))))]

    kernels = lowered(module_of([x], write))
    assert sum(stages(kernel).count("convolution") for kernel in kernels.kernels.values()) == 1
    y = convolve(Case(3, 20, 9, 11, (3, 3), padding=(1, 1, 1, 1)), torch.from_numpy(x).double(), torch.from_numpy(weight).double())
    np.testing.assert_allclose(run(kernels, [x])[0], torch.nn.functional.silu(y).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_a_gate_of_one_pixel_scales_a_whole_image(vectors):
    """Squeeze-and-excitation: the convolution's result is smaller than what is computed behind it."""
    random_ = np.random.default_rng(0)
    image, gate = random_.standard_normal((1, 12, 7, 9)).astype(np.float32), random_.standard_normal((1, 5, 1, 1)).astype(np.float32)
    weight = random_.standard_normal((12, 5, 1, 1)).astype(np.float32)

    def write(emit, image, gate):
        scale = emit(relax.op.sigmoid(emit(relax.op.nn.conv2d(gate, relax.const(weight)))))
        return [emit(relax.op.multiply(image, scale))]

    machine = machine_with(vectors)
    (found,) = run(lowered(module_of([image, gate], write), machine), [image, gate], machine)
    expected = image / (1 + np.exp(-np.einsum("oi,i->o", weight[:, :, 0, 0].astype(np.float64), gate[0, :, 0, 0])))[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


DEPTHWISE = [
    Case(16, 16, 8, 13, (3, 3), padding=(1, 1, 1, 1), groups=16, bias=True, relu=True),
    Case(30, 30, 7, 7, (3, 3), (2, 1), (1, 0, 1, 2), groups=30, relu=True),
    Case(3, 3, 9, 5, (5, 5), (1, 1), (2, 2, 2, 2), (2, 2), groups=3, residual=True),
    Case(17, 17, 12, 12, (7, 7), padding=(3, 3, 3, 3), groups=17, bias=True, batch=2),
    Case(5, 5, 1, 1, (1, 1), groups=5, relu=True),
]
GROUPED = [
    Case(17, 34, 5, 28, (5, 5), (2, 2), (2, 2, 2, 2), groups=17, residual=True),
    Case(12, 33, 6, 7, (3, 3), padding=(1, 1, 1, 1), groups=3, bias=True),
    Case(8, 4, 1, 5, (1, 1), groups=4),
    Case(64, 64, 6, 7, (3, 3), (2, 2), (1, 1, 1, 1), groups=2, bias=True, relu=True),
    Case(48, 96, 5, 7, (3, 3), padding=(1, 1, 1, 1), groups=12, residual=True),
    Case(24, 24, 7, 7, (3, 3), padding=(1, 1, 1, 1), groups=3, batch=2),
]


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_depthwise_convolutions_of_odd_shapes_are_torchs(vectors):
    network, machine = Network(DEPTHWISE), machine_with(vectors)
    kernels = lowered(network.module, machine)
    assert sum("window" in stages(kernel) for kernel in kernels.kernels.values()) == len(DEPTHWISE)
    network.check(run(kernels, network.inputs, machine))


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_grouped_convolutions_of_odd_shapes_are_torchs(vectors):
    """Packed where the filters of a tile are of whole groups, or all of one; in TVM's form elsewhere."""
    network, machine = Network(GROUPED), machine_with(vectors)
    kernels = lowered(network.module, machine)
    assert sum(is_packed(kernel) for kernel in kernels.kernels.values()) >= len(GROUPED) // 2
    network.check(run(kernels, network.inputs, machine))


def test_a_weight_that_is_computed_has_tvms_form():
    x, weight = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((1, 3, 9, 11), (20, 3, 3, 3)))
    kernels = lowered(module_of([x, weight], lambda emit, x, weight: [emit(relax.op.nn.conv2d(x, weight))]))
    assert not any(is_packed(kernel) for kernel in kernels.kernels.values())
    expected = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weight).double()).numpy()
    np.testing.assert_allclose(run(kernels, [x, weight])[0], expected, rtol=1e-5, atol=1e-5)


def unpacked(packed: Array, filters: int) -> Array:
    """What `pack_weight` packed, of one group."""
    blocks, outer, height, width, inner, block = packed.shape
    return packed.transpose(0, 5, 1, 4, 2, 3).reshape(blocks * block, outer * inner, height, width)[:filters]


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    block=st.sampled_from([4, 8, 12, 16]),
)
def test_packing_loses_nothing_and_adds_zeros(shape: tuple[int, int, int, int], block: int):
    weight = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    filters, channels, *kernel = shape
    whole = Shape(channels, 9, 9, filters, tuple(kernel), (1, 1), (0,) * 4, (1, 1))
    inner = channels_together(channels, 4)
    packed = pack_weight(weight, whole, block, inner)
    assert packed.shape == (-(-filters // block), channels // inner, *kernel, inner, block)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(unpacked(packed, filters), weight)
    assert np.count_nonzero(packed) == weight.size
