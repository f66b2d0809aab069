"""Which tile of a convolution takes least time, without a measurement: a sum of a few physical terms, fitted to recorded ones.

`ranking.json` holds the coefficients and where they come from; `python -m benchmarks.tiles` records measurements and fits.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exitify.lower.convolution import Shape

FILE = Path(__file__).with_name("ranking.json")
NEAREST, NEAR = 32 << 10, 512 << 10
"""Bytes that lie in the nearest cache, and in a core's own."""
IN_FLIGHT = 8
"""Multiply-adds that a processor has under way: with fewer sums each waits for the one before."""


def price(shape: Shape, width: int, pixels: int, lanes: int, registers: int) -> float:
    """The estimated time of a tile, in a unit that is the same for all tiles of a convolution.

    Args:
        width: Vectors of filters. pixels: Of a row of the result. lanes, registers: The vector unit's.
    """
    known = coefficients(lanes)
    return sum(known[name] * value for name, value in terms(shape, width, pixels, lanes, registers).items())


def terms(shape: Shape, width: int, pixels: int, lanes: int, registers: int) -> dict[str, float]:
    """What a tile's time is made of, by name, each in vectors that are multiplied, read or written.

    multiplications: As if there were as many as are under way; what is computed beyond the image and its channels counts. loads: Operands.
    spills: Sums and operands past the registers. tiles: How often one begins. results: Sums that are begun and written.
    copied: The image, where whole tiles or a border need a copy of it.
    far_weights, far_image, farther_image: What the nearest cache does not hold, or not even the core's own.
    """
    channels = shape.channels_read(width * lanes)
    depth = channels * math.prod(shape.kernel)
    rows = shape.out_height * shape.out_width // shape.columns
    tiles = rows * math.ceil(shape.columns / pixels) * math.ceil(shape.filters / lanes / width)
    steps = tiles * depth
    kernel_rows, kernel_columns = shape.kernel
    vectors_read = channels * kernel_rows * ((pixels - 1) * shape.stride[1] + kernel_columns) / lanes
    image_bytes = 4 * channels * shape.columns * shape.stride[1] * (1 if shape.is_pointwise else kernel_rows)
    return {
        "multiplications": steps * max(width * pixels, IN_FLIGHT),
        "loads": steps * (width + pixels),
        "spills": steps * max(0, width * pixels + width + 1 - registers),
        "tiles": tiles,
        "results": tiles * width * pixels,
        "copied": shape.channels * shape.height * shape.width / lanes if _is_copied(shape, pixels) else 0.0,
        "far_weights": steps * width * _beyond(4 * depth * width * lanes, NEAREST),
        "far_image": tiles * vectors_read * _beyond(image_bytes, NEAREST),
        "farther_image": tiles * vectors_read * _beyond(image_bytes, NEAR),
    }


def coefficients(lanes: int) -> dict[str, float]:
    """By term: those of the widest vector unit measured that is not wider, or of the narrowest."""
    known = _data()["coefficients"]
    measured = sorted(int(width) for width in known)
    return known[str(max((width for width in measured if width <= lanes), default=measured[0]))]


def _is_copied(shape: Shape, pixels: int) -> bool:
    computed = math.ceil(shape.columns / pixels) * pixels
    if shape.is_pointwise:
        return computed > shape.columns
    return any(shape.padding) or (computed - 1) * shape.stride[1] + shape.dilation[1] * (shape.kernel[1] - 1) >= shape.width


def _beyond(size: float, held: int) -> float:
    """The share of so many bytes, read in turn, that a cache misses: none up to half of what it holds."""
    return min(1.0, max(0.0, size / held - 0.5))


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
