"""Windows that slide over blocks of channels, and means over whole images (`exitify.lower.windows`), with what was fused behind them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import Schedule

from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, inline_between, share
from exitify.lower.vectors import Vectors

STRIP_BYTES = 64 * 1024
"""Of the image with its border that is copied at once: it is read again from a cache near the core."""
UNROLLED = 25
"""Most positions of a window whose code is written out; of larger ones a row's is."""


@dataclass(frozen=True)
class Choice:
    """How windows are scheduled.

    pixels: Of a row at once. rows: That are given their border together; 1 where there is none. unrolled: How many of the window's two loops are.
    """

    pixels: int
    rows: int
    unrolled: int


def choices(func: tirx.PrimFunc, vectors: Vectors) -> list[Choice]:
    """Every way of scheduling the function that is worth a measurement, the default first; none when it slides no window."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "window" not in blocks:
        return []
    _, _, rows, columns, block, kernel_height, kernel_width = (extent(sch, loop) for loop in sch.get_loops(blocks["window"]))
    pixels = [p for p in _divisors(columns) if p <= vectors.registers - 4]
    strips, rows_at_once = [1], 1
    if "padded" in blocks:
        *_, padded_rows, padded_columns, _ = (extent(sch, loop) for loop in sch.get_loops(blocks["padded"]))
        row_bytes = 4 * block * padded_columns * padded_rows / rows
        strips = _divisors(rows)
        rows_at_once = max(r for r in strips if r == 1 or r * row_bytes <= STRIP_BYTES)
    unrolled = sorted({0, int(kernel_width > 1), 2 * int(kernel_height > 1)})
    default = Choice(max(p for p in pixels if p <= vectors.accumulators), rows_at_once, 2 if kernel_height * kernel_width <= UNROLLED else 1)
    found = [Choice(*one) for one in itertools.product(pixels, strips, unrolled)]
    return [default, *(choice for choice in found if choice != default and 4 * choice.pixels >= default.pixels)]


def schedule(func: tirx.PrimFunc, vectors: Vectors, choice: Choice | None = None) -> Schedule | None:
    """Some pixels of a row at once, their window unrolled, over a strip of rows that was given its border just before."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "channel_sums" in blocks:
        return _means(sch)
    if "window" not in blocks:
        return None
    choice = choice or choices(func, vectors)[0]
    window = blocks["window"]
    is_alone = list(blocks)[-1] == "window"
    last = window if is_alone else inline_between(sch, "window")
    sizes = [extent(sch, loop) for loop in sch.get_loops(window)]
    n, c, y, x, lane = sch.get_loops(last)[:5]
    strip, pixel = sch.split(x, [None, choice.pixels])
    if "padded" in blocks:
        y, _ = sch.split(y, [None, choice.rows])
    tiles = [(pixel, lane)]
    if not is_alone:
        sch.compute_at(window, strip, preserve_unit_loops=True)
        tiles.append(tuple(sch.get_loops(window)[-4:-2]))
    *_, ry, rx = sch.get_loops(window)
    sch.reorder(ry, rx, *tiles[-1])
    if "padded" in blocks:
        sch.compute_at(blocks["padded"], y, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(blocks["padded"])[-1])
    if math.prod(sizes) >= SMALLEST_SHARED * vectors.lanes:
        share(sch, [n, c, y])
    for loop in (ry, rx)[2 - choice.unrolled :]:
        sch.unroll(loop)
    for pixel, lane in tiles:
        sch.unroll(pixel)
        sch.vectorize(lane)
    *_, pixel, lane = sch.get_loops(sch.decompose_reduction(window, ry))
    sch.unroll(pixel)
    sch.vectorize(lane)
    return sch


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _means(sch: Schedule) -> Schedule:
    """A block of channels after the other, in several sums at once."""
    blocks = child_blocks(sch)
    sums, parts = blocks["channel_sums"], blocks["partial_sums"]
    last = inline_between(sch, "channel_sums")
    n, c, *_, lane = sch.get_loops(last)
    sch.compute_at(sums, c, preserve_unit_loops=True)
    sch.compute_at(parts, c, preserve_unit_loops=True)
    *_, part, lane_of_parts, step = sch.get_loops(parts)
    size = math.prod(extent(sch, loop) for loop in sch.get_loops(parts))
    sch.reorder(step, part, lane_of_parts)
    *_, lane_of_sums, part_of_sums = sch.get_loops(sums)
    sch.reorder(part_of_sums, lane_of_sums)
    if size >= SMALLEST_SHARED * 4:
        share(sch, [n, c])
    sch.vectorize(lane)
    for block, first, vector in ((parts, step, lane_of_parts), (sums, part_of_sums, lane_of_sums)):
        sch.vectorize(vector)
        if block is parts:
            sch.unroll(part)
        begin = sch.decompose_reduction(block, first)
        *_, many, vector = sch.get_loops(begin)
        sch.vectorize(vector)
        if block is parts:
            sch.unroll(many)
    return sch
