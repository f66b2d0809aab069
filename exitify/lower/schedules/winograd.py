"""Winograd convolution (`exitify.lower.winograd`) with whatever was fused behind it as its epilogue."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from exitify.lower.schedules.blocks import child_blocks, extent, in_registers, inline_between, share
from exitify.lower.schedules.tiles import AHEAD, LINE, product_of_tile
from exitify.lower.vectors import Vectors
from exitify.lower.winograd import STRIPS


@dataclass(frozen=True)
class Choice:
    """How Winograd convolution is scheduled; its tiles and strips are fixed by its packed weight. ahead, unrolled: See `product_of_tile`."""

    ahead: int = AHEAD
    unrolled: int = 1


def choices(func: tirx.PrimFunc, vectors: Vectors) -> list[Choice]:
    """Every way of scheduling the function that is worth a measurement, the default first; none when it is no Winograd convolution."""
    if "winograd" not in child_blocks(Schedule(func)):
        return []
    steps = [n for n in (1, 2, 4) if vectors.lanes % n == 0]
    found = [Choice(*one) for one in itertools.product((0, AHEAD // 4, AHEAD, 4 * AHEAD), steps)]
    return [Choice(), *(choice for choice in found if choice != Choice())]


def schedule(func: tirx.PrimFunc, vectors: Vectors, choice: Choice | None = None) -> Schedule | None:
    """A strip of tiles at a time, from the image to the result."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "winograd" not in blocks:
        return None
    choice = choice or Choice()
    pixels, rows, columns, product = (blocks[name] for name in ("image_pixels", "image_rows", "image_columns", "winograd"))
    halves, sums = blocks["output_rows"], blocks["output_columns"]
    epilogue = inline_between(sch, "output_columns")
    *_, tiles, filters, _, channels = (extent(sch, loop) for loop in sch.get_loops(product))
    _, _, _, tile_rows, tile, *_ = (extent(sch, loop) for loop in sch.get_loops(sums))
    n, o, y, x, v = sch.get_loops(epilogue)
    block, part = sch.split(o, [None, filters // vectors.lanes])
    strip, row = sch.split(y, [None, tile_rows * tile])
    sch.reorder(n, strip, block, part, row, x, v)
    sch.vectorize(v)

    sch.compute_at(sums, block, preserve_unit_loops=True)
    r, i, across, j, w = sch.get_loops(sums)[-5:]
    several, lane = sch.split(w, [None, vectors.lanes])
    sch.reorder(r, across, several, i, j, lane)
    sch.compute_at(halves, several, preserve_unit_loops=True)
    _unrolled(sch, i, j, lane)
    _unrolled(sch, *sch.get_loops(halves)[-3:])

    sch.compute_at(product, block, preserve_unit_loops=True)
    k, j, group, t, w, channel_block, channel = sch.get_loops(product)[-7:]
    sch.reorder(k, j, group, channel_block, channel, t, w)

    sch.compute_at(columns, strip, preserve_unit_loops=True)
    k, j, c, t, lane = sch.get_loops(columns)[-5:]
    sch.reorder(c, t, k, j, lane)
    _unrolled(sch, j, lane)
    sch.compute_at(rows, c, preserve_unit_loops=True)
    r, k, x, lane = sch.get_loops(rows)[-4:]
    sch.reorder(r, x, k, lane)
    sch.compute_at(pixels, x, preserve_unit_loops=True)
    _unrolled(sch, *sch.get_loops(pixels)[-3:])
    _unrolled(sch, k, lane)
    for transformed, position in ((columns, 3), (product, 4)):
        sch.storage_align(transformed, 0, position, 2 * LINE, LINE)
    if extent(sch, n) * extent(sch, strip) >= STRIPS:
        share(sch, [n, strip])
    else:
        for loop in (c, block):
            if extent(sch, loop) > 1:
                share(sch, [loop])
    begin = sch.decompose_reduction(product, channel_block)
    *_, t, w = sch.get_loops(begin)
    in_registers(sch, t, w, vectors.lanes)
    sch.tensorize(channel, product_of_tile(tiles, filters, channels, vectors.lanes, ahead=choice.ahead, unrolled=choice.unrolled))
    return sch


def _unrolled(sch: Schedule, *loops: LoopRV) -> None:
    """Vectorise the last loop and unroll those round it."""
    *outer, lane = loops
    for loop in outer:
        sch.unroll(loop)
    sch.vectorize(lane)
