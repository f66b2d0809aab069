"""Packed convolution (`exitify.lower.convolution`) with whatever was fused behind it as its epilogue."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from exitify.lower.convolution import ALONG, PIXELS
from exitify.lower.schedules.blocks import child_blocks, extent, parallel_rows
from exitify.lower.vectors import Tile, Vectors


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """The tile in registers, one tile of a row after the other; the epilogue reads it from there and writes NCHW."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "convolution" not in blocks:
        return None
    names = list(blocks)
    at = names.index("convolution")
    convolution, epilogue = blocks["convolution"], blocks[names[-1]]
    for name in names:
        if name not in ("padded", "convolution", names[-1]):
            sch.compute_inline(blocks[name])
    notes = sch.get(convolution).annotations
    _, _, computed_rows, _, filters, *_ = (extent(sch, loop) for loop in sch.get_loops(convolution))
    tile = Tile(filters, int(notes[PIXELS]), "pixels" if notes[ALONG] == "pixels" else "filters")
    _, _, rows, columns = (extent(sch, loop) for loop in sch.get_loops(epilogue))
    if computed_rows != rows:  # pointwise: all pixels in one row
        sch.transform_block_layout(epilogue, lambda n, o, y, x: (n, o, y * columns + x))
    if tile.along == "pixels":
        sch.transform_layout(convolution, ("write", 0), lambda n, o, y, x, v: (n, o, y, v, x))
    n, o, *y, x = sch.get_loops(epilogue)
    block, channel = sch.split(o, [None, tile.filters])
    strip, pixel = sch.split(x, [None, tile.pixels])
    sch.reorder(n, block, *y, strip, channel, pixel)
    sch.compute_at(convolution, strip, preserve_unit_loops=True)
    *_, column, lane, i, ry, rx = sch.get_loops(convolution)
    sch.parallel(sch.fuse(n, block, *y))
    sch.reorder(i, ry, rx, column, lane)
    if tile.along == "pixels":
        sch.reorder(lane, column)
    *_, outer, inner = sch.get_loops(convolution)
    for loops in ((outer, inner), (channel, pixel)):
        _in_registers(sch, *loops, vectors)
    *_, outer, inner = sch.get_loops(sch.decompose_reduction(convolution, i))
    _in_registers(sch, outer, inner, vectors)
    if at and names[at - 1] == "padded":
        parallel_rows(sch, blocks["padded"])
    return sch


def _in_registers(sch: Schedule, outer: LoopRV, inner: LoopRV, vectors: Vectors) -> None:
    """Vectorise the inner loop and unroll what is round it."""
    width = extent(sch, inner)
    sch.unroll(outer)
    if width > vectors.lanes and width % vectors.lanes == 0:
        several, inner = sch.split(inner, [None, vectors.lanes])
        sch.unroll(several)
    sch.vectorize(inner)
