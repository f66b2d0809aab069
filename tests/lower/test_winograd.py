"""Winograd convolution in the blocked layout against torch in float64, over shapes that no tile divides, for every vector unit."""

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

from exitify.lower import library, winograd
from exitify.lower.convolution import Shape
from exitify.lower.library import Kernels
from exitify.lower.processors import machine_of
from exitify.lower.schedules import default_schedule
from exitify.lower.schedules import winograd as schedules
from exitify.lower.vectors import Vectors
from exitify.lower.winograd import POINTS, matrices, pack_weight, tile_of
from exitify.targets import load_target
from tests.lower.kernels import SEGMENT, UNITS, Array, lowered, machine_with, run, stages

ERROR = {2: 2e-6, 4: 2e-5}
"""Largest error as a share of the output's magnitude, by tile."""


@dataclass(frozen=True)
class Case:
    """A convolution and what is fused behind it. padding: Top, left, bottom, right."""

    channels: int
    filters: int
    height: int
    width: int
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    tile: int = 4
    batch: int = 1
    bias: bool = False
    residual: bool = False
    relu: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(self.channels, self.height, self.width, self.filters, (3, 3), (1, 1), self.padding, (1, 1))

    @property
    def is_possible(self) -> bool:
        """Whether there is an output, of more than one tile."""
        sizes = self.shape.out_height, self.shape.out_width
        return min(sizes) > 0 and max(sizes) > self.tile


def blocked(array: Array, lanes: int) -> Array:
    """`(N, C, H, W)` as `(N, ceil(C / b), H, W, b)`; channels past C hold numbers that must not matter."""
    images, channels, height, width = array.shape
    blocks = -(-channels // lanes)
    padded = np.full((images, blocks * lanes, height, width), 3, np.float32)
    padded[:, :channels] = array
    return np.ascontiguousarray(padded.reshape(images, blocks, lanes, height, width).transpose(0, 1, 3, 4, 2))


def unblocked(array: Array, channels: int) -> Array:
    """The opposite."""
    images, blocks, height, width, lanes = array.shape
    return array.transpose(0, 1, 4, 2, 3).reshape(images, blocks * lanes, height, width)[:, :channels]


class Network:
    """Convolutions side by side, one output each: compiled at once, which is quicker than one by one."""

    def __init__(self, cases: Sequence[Case], vectors: Vectors) -> None:
        self.cases, self.vectors = cases, vectors
        draw = np.random.default_rng(0).standard_normal
        self.inputs: list[Array] = []
        self.weights: list[Array] = []
        self.biases: list[Array] = []
        self.expected: list[Array] = []
        for case in cases:
            x = draw((case.batch, case.channels, case.height, case.width)).astype(np.float32)
            weight = (draw((case.filters, case.channels, 3, 3)) / np.sqrt(9 * case.channels)).astype(np.float32)
            bias = draw((1, case.filters, 1, 1)).astype(np.float32)
            top, left, bottom, right = case.padding
            padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
            expected = torch.nn.functional.conv2d(padded, torch.from_numpy(weight).double()).numpy()
            residual = draw(expected.shape).astype(np.float32)
            expected = expected + (bias if case.bias else 0) + (residual if case.residual else 0)
            self.inputs += [blocked(array, vectors.lanes) for array in ([x, residual] if case.residual else [x])]
            self.weights.append(weight)
            self.biases.append(blocked(bias, vectors.lanes))
            self.expected.append(np.maximum(expected, 0) if case.relu else expected)
        self.module = self._module()

    def _module(self) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        params = [relax.Var(f"x{i}", relax.TensorType(array.shape, "float32")) for i, array in enumerate(self.inputs)]
        with builder.function("main", params):
            with builder.dataflow():
                given_ = iter(params)
                values = []
                for case, weight, bias in zip(self.cases, self.weights, self.biases):
                    value = builder.emit(winograd.convolution(builder, next(given_), weight, case.shape, self.vectors, case.tile))
                    if case.bias:
                        value = builder.emit(relax.op.add(value, relax.const(bias)))
                    if case.residual:
                        value = builder.emit(relax.op.add(value, next(given_)))
                    values.append(builder.emit(relax.op.nn.relu(value)) if case.relu else value)
                found = builder.emit_output(relax.Tuple(values))
            builder.emit_func_output(found)
        return builder.get()

    def kernels(self) -> Kernels:
        return lowered(self.module, machine_with(self.vectors))

    def check_here(self) -> None:
        kernels = self.kernels()
        assert all("winograd" in stages(kernel) for kernel in kernels.kernels.values())
        self.check(run(kernels, self.inputs, machine_with(self.vectors)))

    def check(self, found: Sequence[Array]) -> None:
        assert len(found) == len(self.cases)
        for case, array, expected in zip(self.cases, found, self.expected):
            assert array.shape[-1] == self.vectors.lanes
            error = np.abs(unblocked(array, case.filters) - expected).max() / max(1, np.abs(expected).max())
            assert error < ERROR[case.tile], case


CHANNELS, SIZES = (1, 3, 5, 17, 24), (1, 2, 5, 7, 13, 16)
PADDINGS = ((1, 1, 1, 1), (0, 0, 0, 0), (2, 2, 2, 2), (0, 1, 3, 2))


def drawn(count: int, seed: int) -> list[Case]:
    """Cases from all over the grid, the same for the same seed."""
    draw = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        sizes = (draw.choice(values) for values in (CHANNELS, CHANNELS, SIZES, SIZES, PADDINGS, tuple(POINTS)))
        case = Case(*sizes, bias=draw.random() < 0.5, residual=draw.random() < 0.5, relu=draw.random() < 0.5)
        cases += [case] if case.is_possible else []
    return cases


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_convolutions_of_odd_shapes_are_torchs(vectors, seed):
    Network(drawn(6, seed), vectors).check_here()


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_strips_that_do_not_divide_the_image_are_torchs(vectors):
    """Tall images, whose strips are shared among threads, and wide ones; windows of one; whole tiles beyond the border."""
    cases = [
        Case(5, 24, 61, 7, tile=2, residual=True),
        Case(17, 3, 45, 30, bias=True, relu=True),
        Case(64, 64, 30, 9),
        Case(3, 5, 9, 50, batch=3, bias=True),
    ]
    Network(cases, vectors).check_here()


@settings(max_examples=10)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    padding=st.tuples(*[st.integers(1, 3)] * 4),
    tile=st.sampled_from(tuple(POINTS)),
    vectors=st.sampled_from(UNITS),
)
def test_any_convolution_is_torchs(channels, size, padding, tile, vectors):
    case = Case(*channels, *size, padding, tile, bias=True, relu=True)
    Network([case if case.is_possible else replace(case, height=8)], vectors).check_here()


@pytest.mark.parametrize("tile", POINTS)
def test_many_channels_keep_the_error_small(tile):
    Network([Case(512, 32, 9, 9, tile=tile)], Vectors(16, 32)).check_here()


def test_a_convolution_and_what_follows_it_are_one_kernel_of_its_schedule():
    cases = [replace(case, bias=True, residual=True, relu=True) for case in drawn(3, seed=1)]
    for vectors in UNITS:
        kernels = Network(cases, vectors).kernels().kernels
        assert len(kernels) == len(cases)
        for kernel in kernels.values():
            tvm.ir.assert_structural_equal(default_schedule(kernel, vectors).mod, schedules.schedule(kernel, vectors).mod)


def test_it_compiles_for_an_arm_processor():
    machine = machine_of(load_target("aarch64-cpu"))
    network = Network(drawn(2, seed=2), machine.vectors)
    kernels = Kernels(library._fused(network.module, SEGMENT, machine)[0], {}, {})
    library.build(kernels, library.scheduled_by_default(kernels, machine), machine)


@pytest.mark.parametrize("tile", POINTS)
def test_the_matrices_are_those_of_minimal_filtering(tile):
    output, kernel, image = matrices(tile)
    d, g = np.random.default_rng(0).standard_normal(tile + 2), np.random.default_rng(1).standard_normal(3)
    np.testing.assert_allclose(output @ ((kernel @ g) * (image @ d)), np.correlate(d, g), rtol=1e-10)
    assert (image.astype(np.float32) == image).all()
    assert (output.astype(np.float32) == output).all()


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), tile=st.sampled_from(tuple(POINTS)), lanes=st.sampled_from([4, 8, 16]))
def test_packing_adds_zeros(shape, tile, lanes):
    weight = np.random.default_rng(0).standard_normal((*shape, 3, 3)).astype(np.float32)
    packed = pack_weight(weight, tile, 2 * lanes, lanes)
    blocks, *_, channels, block = packed.shape
    assert (blocks, block) == (-(-shape[0] // (2 * lanes)), 2 * lanes)
    assert packed.flags.c_contiguous
    of_filters = packed.transpose(0, 4, 3, 1, 2).reshape(blocks * block, channels, tile + 2, tile + 2)
    kernel = matrices(tile)[1]
    np.testing.assert_allclose(of_filters[: shape[0], : shape[1]], kernel @ weight.astype(np.float64) @ kernel.T, rtol=1e-5, atol=1e-6)
    assert not of_filters[shape[0] :].any()
    assert not of_filters[:, shape[1] :].any()


RESNET = Shape(64, 56, 56, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_it_is_chosen_where_channels_are_many_and_for_3x3_alone(vectors):
    assert tile_of(RESNET, vectors) in POINTS
    others = [
        replace(RESNET, kernel=(1, 1)),
        replace(RESNET, kernel=(5, 5)),
        replace(RESNET, stride=(2, 2)),
        replace(RESNET, dilation=(2, 2)),
        replace(RESNET, channels=1),
        replace(RESNET, height=1, width=1),
    ]
    assert not any(tile_of(shape, vectors) for shape in others)


def test_weights_that_no_cache_holds_speak_for_the_smaller_tile():
    assert tile_of(replace(RESNET, channels=512, filters=512, height=7, width=7), Vectors(16, 32)) == 2


def test_what_is_in_registers_fits():
    shapes = [replace(RESNET, channels=c, filters=o, height=h, width=h) for c, o, h in itertools.product((1, 24, 512), (5, 64, 512), (5, 7, 32))]
    for vectors, shape, tile in itertools.product(UNITS, shapes, POINTS):
        blocking = winograd.blocking_of(shape, vectors, tile)
        assert blocking.filters % vectors.lanes == 0
        assert (blocking.tiles + 1) * blocking.filters // vectors.lanes < vectors.registers
