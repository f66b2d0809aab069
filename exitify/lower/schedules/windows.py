"""Windows that slide over blocks of channels, and means over whole images (`exitify.lower.windows`), with what was fused behind them."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule

from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, inline_between, share
from exitify.lower.vectors import Vectors

STRIP_BYTES = 64 * 1024
"""Of the image with its border that is copied at once: it is read again from a cache near the core."""
UNROLLED = 25
"""Most positions of a window whose code is written out; of larger ones a row's is."""


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """Some pixels of a row at once, their window unrolled, over a strip of rows that was given its border just before."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "channel_sums" in blocks:
        return _means(sch)
    if "window" not in blocks:
        return None
    window = blocks["window"]
    is_alone = list(blocks)[-1] == "window"
    last = window if is_alone else inline_between(sch, "window")
    *_, kernel_height, kernel_width = sizes = [extent(sch, loop) for loop in sch.get_loops(window)]
    n, c, y, x, lane = sch.get_loops(last)[:5]
    rows, columns, block = (extent(sch, loop) for loop in (y, x, lane))
    strip, pixel = sch.split(x, [None, max(p for p in range(1, vectors.accumulators + 1) if columns % p == 0)])
    if "padded" in blocks:
        *_, padded_rows, padded_columns, _ = (extent(sch, loop) for loop in sch.get_loops(blocks["padded"]))
        row_bytes = 4 * block * padded_columns * padded_rows / rows
        y, _ = sch.split(y, [None, max(r for r in range(1, rows + 1) if rows % r == 0 and (r == 1 or r * row_bytes <= STRIP_BYTES))])
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
    if kernel_height * kernel_width <= UNROLLED:
        sch.unroll(ry)
    sch.unroll(rx)
    for pixel, lane in tiles:
        sch.unroll(pixel)
        sch.vectorize(lane)
    *_, pixel, lane = sch.get_loops(sch.decompose_reduction(window, ry))
    sch.unroll(pixel)
    sch.vectorize(lane)
    return sch


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
