"""What slides a window over blocks of channels, each channel for itself: depthwise convolution and pooling; and means over whole images.

All take and return `(N, ceil(C / b), H, W, b)`, vectors along the channels of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from exitify.lower.convolution import Shape

SUMS_AT_ONCE = 8
"""Most partial sums of a mean: additions of one sum wait for each other."""


def pack_depthwise(weight: NDArray[Any], block: int) -> NDArray[Any]:
    """Return `(C, 1, KH, KW)` as `(ceil(C / block), KH, KW, block)`, channels that are missing zero."""
    channels, _, height, width = weight.shape
    blocks = -(-channels // block)
    padded = np.zeros((blocks * block, height, width), weight.dtype)
    padded[:channels] = weight[:, 0]
    return np.ascontiguousarray(padded.reshape(blocks, block, height, width).transpose(0, 2, 3, 1))


def depthwise(data: te.Tensor, weight: te.Tensor, shape: Shape) -> te.Tensor:
    """Return each channel convolved with its own filter."""
    return _slid(data, shape, 0.0, te.sum, lambda value, c, ry, rx, v: value * weight[c, ry, rx, v])


def max_pool(data: te.Tensor, shape: Shape) -> te.Tensor:
    """Return the largest value of each window; what lies outside of the image is never it."""
    return _slid(data, shape, float(np.finfo(np.float32).min), te.max, lambda value, *_: value)


def average_pool(data: te.Tensor, shape: Shape, *, counts_border: bool) -> te.Tensor:
    """Return the mean of each window, over all of it or over what of it lies in the image (and its border, where that counts)."""
    sums = _slid(data, shape, 0.0, te.sum, lambda value, *_: value)
    border = shape.padding if counts_border else (0, 0, 0, 0)

    def inside(at: Any, axis: int) -> Any:
        """How many positions of a window count, on one axis."""
        before, after, size = border[axis], border[axis + 2], (shape.height, shape.width)[axis]
        first = at * shape.stride[axis] - shape.padding[axis]
        most, least = tirx.min(first + shape.kernel[axis], size + after), tirx.max(first, -before)
        return most - least

    def mean(n: Any, c: Any, y: Any, x: Any, v: Any) -> Any:
        return sums[n, c, y, x, v] / (inside(y, 0) * inside(x, 1)).astype("float32")

    whole = math.prod(shape.kernel)
    if not any(shape.padding) and _fits(shape):
        return te.compute(sums.shape, lambda *at: sums[at] * (1.0 / whole), name="average")
    return te.compute(sums.shape, mean, name="average")


def channel_means(data: te.Tensor) -> te.Tensor:
    """Return the mean over each channel's image, `(N, ceil(C / b), 1, 1, b)`."""
    images, blocks, height, width, block = (int(size) for size in data.shape)
    pixels = height * width
    several = max(n for n in range(1, SUMS_AT_ONCE + 1) if pixels % n == 0)
    step = te.reduce_axis((0, pixels // several), name="step")

    def partial(n: Any, c: Any, part: Any, v: Any) -> Any:
        at = step * several + part
        return te.sum(data[n, c, at // width, at % width, v], axis=step)

    parts = te.compute((images, blocks, several, block), partial, name="partial_sums")
    part = te.reduce_axis((0, several), name="part")
    sums = te.compute((images, blocks, 1, 1, block), lambda n, c, y, x, v: te.sum(parts[n, c, part, v], axis=part), name="channel_sums")
    return te.compute(sums.shape, lambda *at: sums[at] * (1.0 / pixels), name="channel_means")


def _fits(shape: Shape) -> bool:
    """Whether the last window ends within the image."""
    ends = ((shape.out_height - 1) * shape.stride[0] + shape.kernel[0], (shape.out_width - 1) * shape.stride[1] + shape.kernel[1])
    return ends[0] <= shape.height and ends[1] <= shape.width


def _slid(data: te.Tensor, shape: Shape, outside: float, reduce: Any, term: Callable[..., Any]) -> te.Tensor:
    """Windows reduced to one value each, with this value outside of the image."""
    (sy, sx), (dy, dx), (kh, kw) = shape.stride, shape.dilation, shape.kernel
    top, left = shape.padding[:2]
    height, width = (shape.out_height - 1) * sy + dy * (kh - 1) + 1, (shape.out_width - 1) * sx + dx * (kw - 1) + 1
    source = data
    if any(shape.padding) or height > shape.height or width > shape.width:

        def at_position(n: Any, c: Any, y: Any, x: Any, v: Any) -> Any:
            inside = tirx.all(y >= top, y < shape.height + top, x >= left, x < shape.width + left)
            return tirx.if_then_else(inside, data[n, c, y - top, x - left, v], tirx.const(outside, data.dtype))

        source = te.compute((*data.shape[:2], height, width, data.shape[4]), at_position, name="padded")
    ry, rx = te.reduce_axis((0, kh), name="ry"), te.reduce_axis((0, kw), name="rx")
    return te.compute(
        (*data.shape[:2], shape.out_height, shape.out_width, data.shape[4]),
        lambda n, c, y, x, v: reduce(term(source[n, c, y * sy + ry * dy, x * sx + rx * dx, v], c, ry, rx, v), axis=[ry, rx]),
        name="window",
    )
