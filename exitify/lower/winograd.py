"""3x3 convolution by Winograd's minimal filtering, in the blocked layout.

A tile of m x m outputs is computed from (m + 2) x (m + 2) inputs with as many multiplications a channel, where it would be
9 m x m: inputs, weights and products go through small matrices before and after (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2016). Strips of tiles are computed one after the other, so that what lies between stays in a cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from exitify.lower.convolution import Shape
from exitify.lower.expressions import OUT_ELEMENTWISE_FUSABLE
from exitify.lower.vectors import Vectors

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}
"""Where the polynomials are evaluated, by output tile, and at infinity.

With 0.75 and 1.5 the error is a quarter of that with the usual 1 and 2; all coefficients are exact in float32.
"""


INPUT, OUTPUT, STRIP = 9.0, 6.5, 1000.0
"""Times in multiply-adds of a vector (0.125 ns on the Zen 5 core where they were fitted): to transform a vector of inputs, one of products, and
for a strip besides."""
MEMORY, AGAIN, MISS = 0.24, 0.08, 0.03
"""The same for a byte of weights from memory, of weights from the second cache in place of the first, and of inputs that the second does not hold."""
FIRST, SECOND, LAST = 24 << 10, 384 << 10, 20 << 20
"""Bytes that stay in each cache beside all else."""
STRIPS = 4
"""So many strips are shared out among the threads; of fewer, the channels and filters of each are."""
UNSHARED = 1.05
"""What is taken for the time of a convolution that makes fewer parts than that, in either way."""
GAIN = 0.95
"""What Winograd may take of direct convolution's time at most: its rounding errors are larger, so it has to pay."""


@dataclass(frozen=True)
class Blocking:
    """How a convolution is divided up.

    tile: Rows and columns of an output tile. rows: Rows of tiles in a strip. tiles, filters: What is in registers at once.
    """

    tile: int
    rows: int
    tiles: int
    filters: int


def matrices(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return Winograd's A^T, G and B^T (m x n, n x 3, n x n, n = m + 2): the outputs of d * g are A^T [(G g) (B^T d)]."""
    points = POINTS[tile]
    size = tile + 2
    output, kernel, image = np.zeros((tile, size)), np.zeros((size, 3)), np.zeros((size, size))
    for k, point in enumerate(points):
        others = points[:k] + points[k + 1 :]
        output[:, k] = [point**i for i in range(tile)]
        kernel[k] = [point**i / math.prod(point - other for other in others) for i in range(3)]
        image[k, :-1] = np.polynomial.polynomial.polyfromroots(others)
    output[-1, -1] = kernel[-1, -1] = 1
    image[-1] = np.polynomial.polynomial.polyfromroots(points)
    return output, kernel, image


def pack_weight(weight: NDArray[Any], tile: int, block: int, lanes: int) -> NDArray[Any]:
    """Return `(O, I, 3, 3)`, transformed in float64, as `(ceil(O / block), n, n, channels, block)`; what is missing is zero.

    channels: I filled up to whole vectors.
    """
    filters, channels = weight.shape[:2]
    kernel = matrices(tile)[1]
    transformed = np.einsum("ka,oiab,lb->okli", kernel, weight.astype(np.float64), kernel, optimize=True)
    blocks = -(-filters // block)
    padded = np.zeros((blocks * block, *transformed.shape[1:3], -(-channels // lanes) * lanes), np.float32)
    padded[:filters, ..., :channels] = transformed
    return np.ascontiguousarray(padded.reshape(blocks, block, *padded.shape[1:]).transpose(0, 2, 3, 4, 1))


def packed_convolution(data: te.Tensor, weight: te.Tensor, shape: Shape, blocking: Blocking) -> te.Tensor:
    """Return the convolution of `(N, ceil(C / b), H, W, b)` with weights by `pack_weight` as `(N, ceil(O / b), OH, OW, b)`."""
    images, channel_blocks, _, _, lanes = (int(size) for size in data.shape)
    filter_blocks, size, *_, filters = (int(length) for length in weight.shape)
    m = blocking.tile
    output, _, image = matrices(m)
    top, left = shape.padding[:2]
    down, across = -(-shape.out_height // m), -(-shape.out_width // m)
    strips, tiles = -(-down // blocking.rows), blocking.rows * across
    groups, group = -(-tiles // blocking.tiles), blocking.tiles

    def pixel(n: Any, s: Any, c: Any, r: Any, k: Any, x: Any, v: Any) -> Any:
        y, x = (s * blocking.rows + r) * m + k - top, x - left
        inside = tirx.all(y >= 0, y < shape.height, x >= 0, x < shape.width)
        return tirx.if_then_else(inside, data[n, c, y, x, v], tirx.const(0, data.dtype))

    bordered = (images, strips, channel_blocks, blocking.rows, size, across * m + 2, lanes)
    pixels = te.compute(bordered, pixel, name="image_pixels")
    rows = te.compute(bordered, lambda n, s, c, r, k, x, v: _transformed(image, k, lambda i: pixels[n, s, c, r, i, x, v]), name="image_rows")

    def patch(n: Any, s: Any, k: Any, j: Any, c: Any, t: Any, v: Any) -> Any:
        known = tirx.min(t, tiles - 1) if groups * group > tiles else t
        return _transformed(image, j, lambda i: rows[n, s, c, known // across, k, known % across * m + i, v])

    patches = te.compute((images, strips, size, size, channel_blocks, groups * group, lanes), patch, name="image_columns")
    block, lane = te.reduce_axis((0, channel_blocks), name="block"), te.reduce_axis((0, lanes), name="lane")

    def term(n: Any, s: Any, o: Any, k: Any, j: Any, g: Any, t: Any, v: Any) -> Any:
        return patches[n, s, k, j, block, g * group + t, lane] * weight[o, k, j, block * lanes + lane, v]

    computed = (images, strips, filter_blocks, size, size, groups, group, filters)
    product = te.compute(computed, lambda *at: te.sum(term(*at), axis=[block, lane]), name="winograd")
    halves = te.compute(
        (images, strips, filter_blocks, tiles, m, size, filters),
        lambda n, s, o, t, i, j, v: _transformed(output, i, lambda k: product[n, s, o, k, j, t // group, t % group, v]),
        name="output_rows",
    )
    sums = te.compute(
        (images, strips, filter_blocks, blocking.rows, m, across, m, filters),
        lambda n, s, o, r, i, x, j, v: _transformed(output, j, lambda k: halves[n, s, o, r * across + x, i, k, v]),
        name="output_columns",
    )

    def cut(n: Any, o: Any, y: Any, x: Any, v: Any) -> Any:
        at = y % (blocking.rows * m)
        return sums[n, y // (blocking.rows * m), o // (filters // lanes), at // m, at % m, x // m, x % m, o % (filters // lanes) * lanes + v]

    return te.compute((images, -(-shape.filters // lanes), shape.out_height, shape.out_width, lanes), cut, name="cut")


def _transformed(matrix: NDArray[np.float64], row: Any, value: Any) -> Any:
    """The row-th of a matrix's products with values: a choice among formulas that is made when the loop over rows is unrolled.

    What the rows for a point and its negative share is written alike, so that LLVM computes it once.
    """
    is_square = matrix.shape[0] == matrix.shape[1]
    formulas = [_by_parity(coefficients, value) if is_square else _by_pairs(coefficients, value) for coefficients in matrix]
    chosen = formulas[-1]
    for i, formula in reversed(list(enumerate(formulas[:-1]))):
        chosen = tirx.Select(row == i, formula, chosen)
    return chosen


def _by_parity(coefficients: NDArray[np.float64], value: Any) -> Any:
    """A row of B^T: the row for -p has the same even terms as that for p, and its odd ones negated."""
    even, odd = ([(float(coefficients[k]), value(k)) for k in range(start, len(coefficients), 2) if coefficients[k]] for start in (0, 1))
    if not even or not odd:
        return _total(even or odd)
    last = odd[-1][0]
    return _total(even) + _scaled(last, _total([(c / last, v) for c, v in odd]))


def _by_pairs(coefficients: NDArray[np.float64], value: Any) -> Any:
    """A row of A^T: the columns for p and -p, side by side behind that for 0, are the same or each other's negative."""
    terms = [(float(coefficients[0]), value(0))]
    for k in range(1, len(coefficients) - 1, 2):
        ratio = coefficients[k + 1] / coefficients[k]
        terms.append((float(coefficients[k]), value(k) + value(k + 1) if ratio > 0 else value(k) - value(k + 1)))
    terms.append((float(coefficients[-1]), value(len(coefficients) - 1)))
    return _total([(c, v) for c, v in terms if c])


def _total(terms: list[tuple[float, Any]]) -> Any:
    found = None
    for coefficient, term in terms:
        scaled = _scaled(coefficient, term)
        found = scaled if found is None else found + scaled
    return found


def _scaled(coefficient: float, term: Any) -> Any:
    return term if coefficient == 1 else term * tirx.const(coefficient, "float32")


def tile_of(shape: Shape, vectors: Vectors) -> int:
    """The output tile that takes least time, by estimate; 0 where direct convolution does, or no other is possible."""
    if shape.kernel != (3, 3) or shape.stride != (1, 1) or shape.dilation != (1, 1):
        return 0
    prices = {tile: _price(shape, vectors, blocking_of(shape, vectors, tile)) for tile in POINTS if max(shape.out_height, shape.out_width) > tile}
    best = min(prices, key=prices.__getitem__, default=0)
    return best if best and prices[best] < _price_of_direct(shape, vectors) * GAIN else 0


def blocking_of(shape: Shape, vectors: Vectors, tile: int) -> Blocking:
    """How to divide a convolution up, by the same estimate; the output has to be larger than one tile."""
    across, down = -(-shape.out_width // tile), -(-shape.out_height // tile)
    found = [
        Blocking(tile, rows, tiles, several * vectors.lanes)
        for rows in sorted({-(-down // strips) for strips in range(1, down + 1)})
        for several in (1, 2, 4)
        for tiles in range(2, min(vectors.accumulators // several, rows * across) + 1)
        if several * (tiles + 1) < vectors.registers and (several == 1 or (several - 1) * vectors.lanes < shape.filters)
    ]
    return min(found, key=lambda blocking: _price(shape, vectors, blocking))


def _price(shape: Shape, vectors: Vectors, blocking: Blocking) -> float:
    """Estimated time, in multiply-adds of a vector."""
    across, down = -(-shape.out_width // blocking.tile), -(-shape.out_height // blocking.tile)
    strips, several = -(-down // blocking.rows), blocking.filters // vectors.lanes
    tiles = -(-blocking.rows * across // blocking.tiles) * blocking.tiles
    positions, blocks = (blocking.tile + 2) ** 2, -(-shape.filters // blocking.filters)
    channels = -(-shape.channels // vectors.lanes) * vectors.lanes
    products = strips * tiles * positions * channels * blocks * several
    loads = 0.25 * (2 * several + blocking.tiles) / (several * blocking.tiles)  # weights are asked for, then loaded
    waiting = 0.5 * max(0.0, 1 - several * blocking.tiles / 8)
    transforms = strips * tiles * positions * (INPUT * channels / vectors.lanes + OUTPUT * blocks * several)
    patches, weights = 4 * positions * tiles * channels, 4 * positions * channels * blocks * blocking.filters
    missed = strips * blocks * max(0, patches - SECOND)
    again = strips * (tiles // blocking.tiles - 1) * weights if 4 * channels * blocking.filters > FIRST else 0
    computing = products * (1 + loads + waiting) + transforms + MISS * missed + AGAIN * again + STRIP * strips
    computing *= 1.0 if strips >= STRIPS or blocks >= STRIPS else UNSHARED
    return _together(computing + MEMORY * (strips - 1) * weights * min(1.0, weights / LAST), MEMORY * weights)


def _price_of_direct(shape: Shape, vectors: Vectors) -> float:
    """Estimated time of direct convolution with well-filled tiles."""
    weights = 9 * shape.channels * -(-shape.filters // vectors.lanes) * vectors.lanes
    return _together(1.1 * weights * shape.out_height * shape.out_width / vectors.lanes, MEMORY * 4 * weights)


def _together(computing: float, waiting: float) -> float:
    """The time of two things at once, of which each is in the other's way a little."""
    return max(computing, waiting) + 0.2 * min(computing, waiting)


def convolution(builder: relax.BlockBuilder, data: relax.Var, weight: NDArray[Any], shape: Shape, vectors: Vectors, tile: int) -> relax.Expr:
    """Emit the convolution of `(N, ceil(C / b), H, W, b)` with `(O, I, 3, 3)`."""
    blocking = blocking_of(shape, vectors, tile)
    packed = relax.const(pack_weight(weight, tile, blocking.filters, vectors.lanes))
    return builder.call_te(
        lambda image, kernel: packed_convolution(image, kernel, shape, blocking),
        data,
        packed,
        primfunc_name_hint="winograd",
        primfunc_attrs={"op_pattern": OUT_ELEMENTWISE_FUSABLE},
    )
