"""What a segment computes in blocks of channels is what it computes in rows, for every vector unit and channels that no block divides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import tvm
from torch.nn import functional
from tvm import relax

from exitify.lower import library
from exitify.lower.blocked import Borders
from exitify.lower.library import Kernels
from exitify.runtime.engines.blocks import in_blocks, in_rows
from tests.lower.kernels import SEGMENT, UNITS, Array, lowered, machine_with, module_of, run, stages

RANDOM = np.random.default_rng(0)


def image(channels: int, height: int, width: int, batch: int = 1) -> Array:
    return RANDOM.standard_normal((batch, channels, height, width)).astype(np.float32)


class Pointwise:
    """A convolution that brings a value into blocks, in Relax and in torch."""

    def __init__(self, channels: int, filters: int) -> None:
        self.weight = RANDOM.standard_normal((filters, channels, 1, 1)).astype(np.float32) / channels

    def relax(self, emit, x):
        return emit(relax.op.nn.conv2d(x, relax.const(self.weight)))

    def torch(self, x: Array) -> torch.Tensor:
        return functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(self.weight).double())


def check(module: tvm.IRModule, inputs: Sequence[Array], expected: Sequence[torch.Tensor], vectors, *, kinds: Sequence[str] = ()) -> None:
    """Hold what the module gives against torch, and let it have kernels of these kinds."""
    machine = machine_with(vectors)
    kernels = lowered(module, machine)
    found = {stage for kernel in kernels.kernels.values() for stage in stages(kernel)}
    assert set(kinds) <= found
    for got, wanted in zip(run(kernels, inputs, machine), expected, strict=True):
        assert got.shape == tuple(wanted.shape)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-5)


POOLS = [
    {"pool_size": (2, 2), "strides": (2, 2)},
    {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)},
    {"pool_size": (3, 3), "strides": (1, 1), "padding": (1, 1, 1, 1)},
    {"pool_size": (2, 3), "strides": (2, 1), "padding": (1, 0, 1, 0)},
]


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_pooling_is_torchs(vectors):
    x, first = image(5, 9, 13), Pointwise(5, 19)
    y = first.torch(x)

    def write(emit, x):
        value = first.relax(emit, x)
        for pool in POOLS:
            yield emit(relax.op.nn.max_pool2d(value, **pool))
            for counts in (False, True):
                yield emit(relax.op.nn.avg_pool2d(value, **pool, count_include_pad=counts))

    expected = []
    for pool in POOLS:
        size, stride, padding = pool["pool_size"], pool["strides"], pool.get("padding", (0, 0))[:2]
        expected.append(functional.max_pool2d(y, size, stride, padding))
        expected += [functional.avg_pool2d(y, size, stride, padding, count_include_pad=counts) for counts in (False, True)]
    check(module_of([x], write), [x], expected, vectors, kinds=["window"])


RESIZES = {
    "nearest_neighbor": ("asymmetric", {"mode": "nearest"}),
    "linear": ("half_pixel", {"mode": "bilinear", "align_corners": False}),
    "linear, corners": ("align_corners", {"mode": "bilinear", "align_corners": True}),
}


@pytest.mark.parametrize("vectors", UNITS, ids=str)
@pytest.mark.parametrize("way", RESIZES)
def test_maps_are_resized_in_blocks(way, vectors):
    x, pointwise, sizes = image(5, 7, 9, batch=2), Pointwise(5, 21), [(14, 18), (3, 4), (7, 20)]
    mode, options = RESIZES[way]

    def write(emit, x):
        y = pointwise.relax(emit, x)
        for size in sizes:
            rounded = "floor" if way == "nearest_neighbor" else ""
            yield emit(relax.op.image.resize2d(y, size, None, "NCHW", way.split(",")[0], mode, rounded))

    y = pointwise.torch(x)
    module = module_of([x], write)
    check(module, [x], [functional.interpolate(y, size, **options) for size in sizes], vectors, kinds=["resize"])
    resized = [kernel for kernel in lowered(module, machine_with(vectors)).kernels.values() if "resize" in stages(kernel)]
    assert len(resized) == len(sizes)
    assert all(len(kernel.params[0].shape) == 5 for kernel in resized)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_pools_that_round_up_are_right_too(vectors):
    x, first = image(3, 6, 8), Pointwise(3, 7)
    pool = {"pool_size": (3, 3), "strides": (2, 2), "ceil_mode": True}
    module = module_of([x], lambda emit, x: [emit(relax.op.nn.max_pool2d(first.relax(emit, x), **pool))])
    check(module, [x], [functional.max_pool2d(first.torch(x), 3, 2, ceil_mode=True)], vectors)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 12), (5, 13)], ids=str)
def test_means_over_images_are_torchs_and_gate_them(vectors, size):
    x, first, squeeze = image(5, *size), Pointwise(5, 24), Pointwise(24, 24)

    def write(emit, x):
        value = first.relax(emit, x)
        means = emit(relax.op.mean(value, [2, 3], keepdims=True))
        gate = emit(relax.op.sigmoid(squeeze.relax(emit, means)))
        return [emit(relax.op.multiply(gate, value)), emit(relax.op.mean(value, [-1, -2], keepdims=False)), means]

    y = first.torch(x)
    means = y.mean((2, 3), keepdim=True)
    gate = torch.sigmoid(functional.conv2d(means, torch.from_numpy(squeeze.weight).double()))
    check(module_of([x], write), [x], [gate * y, means[:, :, 0, 0], means], vectors, kinds=["channel_sums"])


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_operators_on_values_stay_in_blocks(vectors):
    x, other, first = image(4, 5, 6), image(21, 5, 6), Pointwise(4, 21)
    scale, whole = RANDOM.standard_normal((21, 1, 1)).astype(np.float32), image(21, 5, 6)
    everywhere, places = np.float32(0.7), image(1, 5, 6)

    def write(emit, x, other):
        value = emit(relax.op.add(first.relax(emit, x), relax.const(scale)))
        value = emit(relax.op.multiply(value, relax.const(whole)))
        value = emit(relax.op.subtract(value, other))
        value = emit(relax.op.divide(value, relax.const(everywhere)))
        value = emit(relax.op.add(value, relax.const(places)))
        return [emit(relax.op.nn.relu(value)), emit(relax.op.clip(value, -1, 1)), emit(relax.op.tanh(value)), emit(relax.op.nn.gelu(value))]

    y = ((first.torch(x) + torch.from_numpy(scale)) * torch.from_numpy(whole) - torch.from_numpy(other)) / 0.7 + torch.from_numpy(places)
    expected = [y.relu(), y.clamp(-1, 1), y.tanh(), functional.gelu(y)]
    check(module_of([x, other], write), [x, other], expected, vectors, kinds=["out_of_blocks", "into_blocks"])


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_a_quotient_by_values_is_not_computed_past_the_last_channel(vectors):
    """There it would be 0 / 0, and the next convolution would spread it."""
    x, first, second, third = image(3, 4, 4), Pointwise(3, 5), Pointwise(3, 5), Pointwise(5, 6)

    def write(emit, x):
        quotient = emit(relax.op.divide(first.relax(emit, x), second.relax(emit, x)))
        return [third.relax(emit, quotient)]

    quotient = first.torch(x) / second.torch(x)
    expected = functional.conv2d(quotient, torch.from_numpy(third.weight).double())
    found = run(lowered(module_of([x], write), machine_with(vectors)), [x], machine_with(vectors))[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
@pytest.mark.parametrize("filters", [(16, 32), (16, 7), (5, 3)], ids=str)
def test_maps_are_joined_by_channels(vectors, filters):
    x, first, second = image(4, 5, 6), *(Pointwise(4, count) for count in filters)
    third = Pointwise(sum(filters) + 4, 9)

    def write(emit, x):
        joined = emit(relax.op.concat([first.relax(emit, x), second.relax(emit, x), x], axis=1))
        return [third.relax(emit, joined), joined]

    joined = torch.cat([first.torch(x), second.torch(x), torch.from_numpy(x).double()], 1)
    check(module_of([x], write), [x], [functional.conv2d(joined, torch.from_numpy(third.weight).double()), joined], vectors)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
@pytest.mark.parametrize("filters", [1, 13, 32])
def test_channels_go_last_and_back(vectors, filters):
    x, first, second = image(4, 5, 6), Pointwise(4, filters), Pointwise(filters, 3)

    def write(emit, x):
        last = emit(relax.op.permute_dims(first.relax(emit, x), [0, 2, 3, 1]))
        back = emit(relax.op.permute_dims(emit(relax.op.exp(last)), [0, 3, 1, 2]))
        return [last, second.relax(emit, back), back]

    y = first.torch(x)
    expected = [y.permute(0, 2, 3, 1), functional.conv2d(y.exp(), torch.from_numpy(second.weight).double()), y.exp()]
    check(module_of([x], write), [x], expected, vectors, kinds=["channels_last", "into_blocks"])


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_values_of_several_images(vectors):
    x, first = image(3, 6, 6, batch=3), Pointwise(3, 18)
    module = module_of([x], lambda emit, x: [emit(relax.op.nn.max_pool2d(first.relax(emit, x), (2, 2), (2, 2)))])
    check(module, [x], [functional.max_pool2d(first.torch(x), 2)], vectors)


def test_a_constant_in_blocks_has_its_numbers_where_channels_are():
    for channels, block in itertools.product((1, 4, 5, 16, 17), (4, 16)):
        whole = image(channels, 3, 2)
        made = in_blocks(whole, block)
        assert made.shape == (1, -(-channels // block), 3, 2, block)
        for c in range(channels):
            np.testing.assert_array_equal(made[0, c // block, ..., c % block], whole[0, c])
        assert np.count_nonzero(made) == whole.size
        np.testing.assert_array_equal(in_rows(made, channels), whole)
    assert in_blocks(np.ones((5, 1, 1), np.float32), 4).shape == (1, 2, 1, 1, 4)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_rows_and_columns_some_apart_and_pixels_in_a_row(vectors):
    x, first = image(4, 9, 8), Pointwise(4, 19)

    def write(emit, x):
        value = first.relax(emit, x)
        every = emit(relax.op.strided_slice(value, [2, 3], [0, 1], [9, 8], [2, 3]))
        whole = emit(relax.op.strided_slice(value, [0, 1], [0, 0], [1, 19], [1, 1]))
        some = emit(relax.op.strided_slice(value, [1], [3], [17], [2]))
        means = emit(relax.op.mean(value, [2, 3], keepdims=True))
        return [every, whole, some, emit(relax.op.reshape(means, (1, 19))), emit(relax.op.squeeze(means, [2, 3]))]

    y = first.torch(x)
    means = y.mean((2, 3))
    check(module_of([x], write), [x], [y[:, :, ::2, 1::3], y, y[:, 3:17:2], means, means], vectors)


@pytest.mark.parametrize("vectors", UNITS, ids=str)
@pytest.mark.parametrize("filters", [16, 21])
def test_a_function_takes_and_gives_blocks_where_both_sides_keep_them(vectors, filters):
    """And what is in rows when it is given stays in rows, unless it must not."""
    x, first, machine = image(filters, 5, 6), Pointwise(filters, 9), machine_with(vectors)

    def write(emit, x):
        return [first.relax(emit, x), emit(relax.op.permute_dims(x, [0, 1, 3, 2])), emit(relax.op.negative(x))]

    borders = Borders(taken=[0], given=[1], may=[0, 2])
    fused, given = library._fused(module_of([x], write), SEGMENT, machine, borders=borders)
    assert given == {0, 1, 2}
    found = run(Kernels(fused, {}, {}), [in_blocks(x, vectors.lanes)], machine)
    expected = [first.torch(x).numpy(), x.transpose(0, 1, 3, 2), -x]
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(in_rows(got, wanted.shape[1]), wanted, rtol=1e-5, atol=1e-5)
    assert (
        library._fused(module_of([x], lambda emit, x: [emit(relax.op.permute_dims(x, [0, 1, 3, 2]))]), SEGMENT, machine, borders=Borders(may=[0]))[1]
        == set()
    )
