"""Convolution over packed weights, its result in blocks of channels: what the default schedule needs to run at the machine's speed.

A tile of the result, some output channels for some pixels of a row, stays in registers while input channels and kernel
positions are summed up. Weights are packed so that those of a tile lie in the order in which they are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from exitify.lower.vectors import Tile

PIXELS = "exitify.pixels"
"""The convolution's note on the pixels of its `Tile`, whose filters are the last size of the packed weight."""
HALF_TERMS = 64
"""Most terms of a sum in float16."""


@dataclass(frozen=True)
class Shape:
    """One convolution, all sizes known.

    kernel, stride, dilation: Height and width. padding: Top, left, bottom, right.
    """

    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int = 1

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        return (self.height + self.padding[0] + self.padding[2] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        return (self.width + self.padding[1] + self.padding[3] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel depends on the same input pixel alone, so that pixels may be counted in one row."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved with one filter of its own."""
        return self.groups == self.channels == self.filters > 1

    @property
    def columns(self) -> int:
        """Pixels of the result that lie in one row of the computation."""
        return self.out_height * self.out_width if self.is_pointwise else self.out_width

    def channels_read(self, filters: int) -> int:
        """How many input channels so many filters in a row read, where they begin at a multiple of themselves; 0 where that is not one number."""
        per_group, filters_of = self.channels // self.groups, self.filters // self.groups
        if self.groups == 1:
            return self.channels
        if filters % filters_of == 0:
            return min(filters // filters_of, self.groups) * per_group
        return per_group if filters_of % filters == 0 else 0


def pack_weight(weight: NDArray[Any], shape: Shape, filters: int, channels: int) -> NDArray[Any]:
    """Return `(O, I / groups, KH, KW)` as `(ceil(O / filters), S / channels, KH, KW, channels, filters)`; filters that are missing are zero.

    S is how many channels a tile's filters read together: all of them, or those of their groups, the others' weights zero.
    """
    count, per_group, height, width = weight.shape
    blocks, read = -(-count // filters), shape.channels_read(filters)
    packed = np.zeros((blocks, filters, read, height, width), weight.dtype)
    filters_of = count // shape.groups
    for o in range(count if shape.groups > 1 else 0):
        first = o // filters_of * per_group - o // filters * filters // filters_of * per_group
        packed[o // filters, o % filters, first : first + per_group] = weight[o]
    if shape.groups == 1:
        packed.reshape(blocks * filters, read, height, width)[:count] = weight
    packed = packed.reshape(blocks, filters, read // channels, channels, height, width)
    return np.ascontiguousarray(packed.transpose(0, 2, 4, 5, 3, 1))


def packed_convolution(data: te.Tensor, weight: te.Tensor, shape: Shape, tile: Tile, block: int) -> te.Tensor:
    """Return the convolution with packed weights, `(N, ceil(O / block), OH, OW, block)`.

    Args:
        data: `(N, I, H, W)`, or `(N, ceil(I / block), H, W, block)`.
        tile: Rows are computed for whole tiles, so that a width they do not divide costs some pixels in place of a check a pixel.
    """
    images = data.shape[0]  # one, or the windows of one
    rows, columns = shape.out_height * shape.out_width // shape.columns, shape.columns
    columns_computed = -(-columns // tile.pixels) * tile.pixels
    (sy, sx), (dy, dx), (kh, kw) = shape.stride, shape.dilation, shape.kernel
    outer, several = (int(weight.shape[axis]) for axis in (1, 4))
    filters_of, per_group = shape.filters // shape.groups, shape.channels // shape.groups
    is_blocked = len(data.shape) == 5
    source = _bordered(data, shape, rows, columns_computed)

    def pixel(n: Any, o: Any, i: Any, inner: Any, y: Any, x: Any) -> Any:
        """Channel i + inner of those that block o of the filters reads, where i is a multiple of what inner counts."""
        first = o * tile.filters // filters_of * per_group if shape.groups > 1 else 0
        at = (y, x) if source is not data or not shape.is_pointwise else (x // shape.width, x % shape.width)
        channel = first + i
        return source[(n, channel // block, *at, channel % block + inner)] if is_blocked else source[(n, channel + inner, *at)]

    is_half = data.dtype == "float16"
    notes = {PIXELS: tile.pixels}
    computed = (images, weight.shape[0], rows, columns_computed, tile.filters)
    inner, ry, rx = (te.reduce_axis((0, size), name=name) for size, name in ((several, "inner"), (kh, "ry"), (kw, "rx")))

    def summed(at: tuple[Any, ...], i: Any, axes: list[Any]) -> Any:
        n, o, y, x, v = at
        return te.sum(pixel(n, o, i * several, inner, y * sy + ry * dy, x * sx + rx * dx) * weight[o, i, ry, rx, inner, v], axis=axes)

    if not is_half:
        i = te.reduce_axis((0, outer), name="i")
        sums = te.compute(computed, lambda *at: summed(at, i, [i, ry, rx, inner]), name="convolution", attrs=notes)
    else:
        at_once = channels_at_once(outer, kh * kw * several)
        i, part = te.reduce_axis((0, at_once), name="i"), te.reduce_axis((0, outer // at_once), name="part")
        parts = te.compute(
            (*computed, outer // at_once), lambda *at: summed(at[:-1], at[-1] * at_once + i, [i, ry, rx, inner]), name="convolution", attrs=notes
        )
        sums = te.compute(computed, lambda *at: te.sum(parts[(*at, part)].astype("float32"), axis=part), name="sum_of_parts")
    together = tile.filters // block

    def unpacked(n: Any, o: Any, y: Any, x: Any, v: Any) -> Any:
        row, column = (0, y * shape.out_width + x) if shape.is_pointwise else (y, x)
        return sums[n, o // together, row, column, o % together * block + v]

    return te.compute((images, -(-shape.filters // block), shape.out_height, shape.out_width, block), unpacked, name="unpacked")


def _bordered(data: te.Tensor, shape: Shape, rows: int, columns: int) -> te.Tensor:
    """The data with zeros round it and behind it, as far as they are read; itself where none is."""
    top, left = shape.padding[:2]
    (sy, sx), (dy, dx), (kh, kw) = shape.stride, shape.dilation, shape.kernel
    zero = tirx.const(0, data.dtype)
    if shape.is_pointwise:
        if columns == shape.columns:
            return data

        def at_pixel(n: Any, c: Any, _: Any, p: Any, *lane: Any) -> Any:
            return tirx.if_then_else(p < shape.columns, data[(n, c, p // shape.width, p % shape.width, *lane)], zero)

        return te.compute((*data.shape[:2], 1, columns, *data.shape[4:]), at_pixel, name="padded")
    height, width = (rows - 1) * sy + dy * (kh - 1) + 1, (columns - 1) * sx + dx * (kw - 1) + 1
    if not any(shape.padding) and width <= shape.width:
        return data

    def at_position(n: Any, c: Any, y: Any, x: Any, *lane: Any) -> Any:
        inside = tirx.all(y >= top, y < shape.height + top, x >= left, x < shape.width + left)
        return tirx.if_then_else(inside, data[(n, c, y - top, x - left, *lane)], zero)

    return te.compute((*data.shape[:2], height, width, *data.shape[4:]), at_position, name="padded")


def channels_at_once(channels: int, positions: int) -> int:
    """How many input channels a sum in float16 goes over, before it is added to one in float32.

    Of n terms such a sum is off by about the square root of n, times 2^-11 of a term's magnitude.
    """
    return max(n for n in range(1, channels + 1) if channels % n == 0 and (n == 1 or n * positions <= HALF_TERMS))


def channels_together(read: int, block: int) -> int:
    """How many channels one after the other lie in one block, wherever a count of them begins that divides what is read."""
    return math.gcd(read, block)
