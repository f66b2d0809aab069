"""Convolution over packed weights: what the default schedule needs to run at the machine's speed without any measurement.

A tile of the result, some output channels for some pixels of a row, stays in registers while input channels and kernel
positions are summed up. Weights are packed so that those of a tile lie in the order in which they are read,
`(O / filters, I, KH, KW, filters)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx

from exitify.lower.vectors import Tile, Vectors

PIXELS, ALONG, STRIDE = "exitify.pixels", "exitify.along", "exitify.stride"
"""The convolution's notes on its `Tile`, whose filters are the last size of the packed weight, and on the columns between two pixels."""
HALF_TERMS = 64
"""Most terms of a sum in float16."""
OUT_ELEMENTWISE_FUSABLE = 4
"""TVM's OpPatternKind: element-wise operators behind it may join it."""


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
    def columns(self) -> int:
        """Pixels of the result that lie in one row of the computation."""
        return self.out_height * self.out_width if self.is_pointwise else self.out_width


def pack_weight(weight: NDArray[Any], block: int) -> NDArray[Any]:
    """Return `(O, I, KH, KW)` as `(ceil(O / block), I, KH, KW, block)`, filters that are missing zero."""
    filters, channels, height, width = weight.shape
    blocks = -(-filters // block)
    padded = np.zeros((blocks * block, channels, height, width), weight.dtype)
    padded[:filters] = weight
    return np.ascontiguousarray(padded.reshape(blocks, block, channels, height, width).transpose(0, 2, 3, 4, 1))


def packed_convolution(data: te.Tensor, weight: te.Tensor, shape: Shape, tile: Tile) -> te.Tensor:
    """Return the convolution of `(N, I, H, W)` with packed weights as `(N, O, OH, OW)`.

    Args:
        tile: Rows are computed for whole tiles, so that a width they do not divide costs some pixels in place of a check a pixel.
    """
    images = data.shape[0]  # one, or the windows of one
    rows, columns = shape.out_height * shape.out_width // shape.columns, shape.columns
    columns_computed = -(-columns // tile.pixels) * tile.pixels
    top, left = shape.padding[:2]
    (sy, sx), (dy, dx), (kh, kw) = shape.stride, shape.dilation, shape.kernel
    source: Any = data
    if shape.is_pointwise:
        if columns_computed > columns:
            source = te.compute(
                (images, shape.channels, 1, columns_computed),
                lambda n, i, _, p: tirx.if_then_else(p < columns, data[n, i, p // shape.width, p % shape.width], tirx.const(0, data.dtype)),
                name="padded",
            )
    else:
        height = (rows - 1) * sy + dy * (kh - 1) + 1
        width = (columns_computed - 1) * sx + dx * (kw - 1) + 1
        if any(shape.padding) or width > shape.width:
            source = te.compute(
                (images, shape.channels, height, width),
                lambda n, i, y, x: tirx.if_then_else(
                    tirx.all(y >= top, y < shape.height + top, x >= left, x < shape.width + left),
                    data[n, i, y - top, x - left],
                    tirx.const(0, data.dtype),
                ),
                name="padded",
            )

    def pixel(n: Any, i: Any, y: Any, x: Any) -> Any:
        if shape.is_pointwise and source is data:
            return data[n, i, x // shape.width, x % shape.width]
        return source[n, i, y, x]

    several = channels_at_once(shape.channels, kh * kw) if data.dtype == "float16" else shape.channels
    i, ry, rx = (te.reduce_axis((0, size), name=name) for size, name in ((several, "i"), (kh, "ry"), (kw, "rx")))
    notes = {PIXELS: tile.pixels, ALONG: tile.along, STRIDE: sx}
    computed = (images, weight.shape[0], rows, columns_computed, tile.filters)

    def summed(at: tuple[Any, ...], first: Any) -> Any:
        n, o, y, x, v = at
        return te.sum(pixel(n, first + i, y * sy + ry * dy, x * sx + rx * dx) * weight[o, first + i, ry, rx, v], axis=[i, ry, rx])

    if data.dtype == "float32":
        sums = te.compute(computed, lambda *at: summed(at, 0), name="convolution", attrs=notes)
    else:
        part = te.reduce_axis((0, shape.channels // several), name="part")
        parts = te.compute((*computed, shape.channels // several), lambda *at: summed(at[:-1], at[-1] * several), name="convolution", attrs=notes)
        sums = te.compute(computed, lambda *at: te.sum(parts[(*at, part)].astype("float32"), axis=part), name="sum_of_parts")

    def unpacked(n: Any, o: Any, y: Any, x: Any) -> Any:
        row, column = (0, y * shape.out_width + x) if shape.is_pointwise else (y, x)
        return sums[n, o // tile.filters, row, column, o % tile.filters]

    return te.compute((images, shape.filters, shape.out_height, shape.out_width), unpacked, name="unpacked")


def channels_at_once(channels: int, positions: int) -> int:
    """How many input channels a sum in float16 goes over, before it is added to one in float32.

    Of n terms such a sum is off by about the square root of n, times 2^-11 of a term's magnitude.
    """
    return max(n for n in range(1, channels + 1) if channels % n == 0 and (n == 1 or n * positions <= HALF_TERMS))


def legalize(vectors: Vectors) -> Any:
    """What `LegalizeOps` is given for `relax.nn.conv2d`: packed convolution where the weight is known, TVM's own elsewhere."""

    def convolution(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        data, weight = call.args
        attributes = call.attrs
        stride, padding, dilation = (tuple(int(n) for n in field) for field in (attributes.strides, attributes.padding, attributes.dilation))
        is_plain = (attributes.data_layout, attributes.kernel_layout, attributes.out_layout, attributes.groups) == ("NCHW", "OIHW", "NCHW", 1)
        if not (is_plain and isinstance(weight, tvm.ir.GenericConst) and call.ty.dtype == "float32"):
            return tvm.ir.Op.get("relax.nn.conv2d").get_attr("FLegalize")(builder, call)
        _, channels, height, width = (int(n) for n in data.ty.shape)
        array = weight.value.numpy()
        shape = Shape(channels, height, width, array.shape[0], array.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
        tile = vectors.of(str(data.ty.dtype)).tile(shape.columns, shape.filters, stride[1])
        packed = relax.const(pack_weight(array, tile.filters))

        def compute(image: te.Tensor, kernel: te.Tensor) -> te.Tensor:
            return packed_convolution(image, kernel, shape, tile)

        attributes = {"op_pattern": OUT_ELEMENTWISE_FUSABLE}
        return builder.call_te(compute, data, packed, primfunc_name_hint="convolution", primfunc_attrs=attributes)

    return convolution
