"""Packed convolution (`exitify.lower.convolution`) with whatever was fused behind it as its epilogue."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from exitify.lower.convolution import ALONG, PIXELS, STRIDE
from exitify.lower.schedules.blocks import child_blocks, extent, parallel_rows
from exitify.lower.vectors import Vectors


@dataclass(frozen=True)
class Choice:
    """How a convolution is scheduled; the filters of its tile are fixed by its packed weight.

    pixels, along: See `Tile`. unrolled: How many of the kernel's two loops are unrolled.
    channels: Whether input channels are summed up outside of the kernel's positions or inside.
    first: Which is walked first for each block of filters or for each row of the image.
    """

    pixels: int
    along: Literal["pixels", "filters"]
    unrolled: int = 0
    channels: Literal["outside", "inside"] = "outside"
    first: Literal["rows", "filters"] = "rows"


def choices(func: tirx.PrimFunc, vectors: Vectors) -> list[Choice]:
    """Every way of scheduling the function that is worth a measurement, the default first; none when it is no packed convolution."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "convolution" not in blocks:
        return []
    notes = sch.get(blocks["convolution"]).annotations
    _, _, rows, columns, filters, *_, height, width = (extent(sch, loop) for loop in sch.get_loops(blocks["convolution"]))
    vectors = vectors.of("float16") if "sum_of_parts" in blocks else vectors
    default = Choice(int(notes[PIXELS]), "pixels" if notes[ALONG] == "pixels" else "filters")
    tiles: list[tuple[int, Literal["pixels", "filters"]]] = []
    for pixels in (n for n in range(1, columns + 1) if columns % n == 0 and n * filters <= (vectors.registers - 4) * vectors.lanes):
        if pixels % vectors.lanes == 0 and int(notes[STRIDE]) == 1:
            tiles.append((pixels, "pixels"))
        if filters % vectors.lanes == 0 and pixels * filters >= 4 * vectors.lanes:
            tiles.append((pixels, "filters"))
    rest = itertools.product(
        sorted({0, int(width > 1), 2 * int(height * width > 1 and height > 1)}),
        ("outside", "inside") if height * width > 1 else ("outside",),
        ("rows", "filters") if rows > 1 else ("rows",),
    )
    found = [Choice(*tile, *others) for others in rest for tile in tiles]  # type: ignore[arg-type]
    return [default, *(choice for choice in found if choice != default)]


def schedule(func: tirx.PrimFunc, vectors: Vectors, choice: Choice | None = None) -> Schedule | None:
    """The tile in registers, one tile of a row after the other; the epilogue reads it from there and writes NCHW."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "convolution" not in blocks:
        return None
    choice = choice or choices(func, vectors)[0]
    names = list(blocks)
    convolution, epilogue = blocks["convolution"], blocks[names[-1]]
    is_half = "sum_of_parts" in names
    total = blocks["sum_of_parts"] if is_half else convolution
    vectors = vectors.of("float16") if is_half else vectors
    for name in names:
        if name not in ("padded", "convolution", "sum_of_parts", names[-1]):
            sch.compute_inline(blocks[name])
    _, _, computed_rows, _, filters, *_ = (extent(sch, loop) for loop in sch.get_loops(total))
    _, _, rows, columns = (extent(sch, loop) for loop in sch.get_loops(epilogue))
    if computed_rows != rows:  # pointwise: all pixels in one row
        sch.transform_block_layout(epilogue, lambda n, o, y, x: (n, o, y * columns + x))
    along_pixels = choice.along == "pixels"
    # Along filters the layout stays, and what the epilogue reads is simplified: p // columns * columns + p % columns is p.
    sch.transform_layout(total, ("write", 0), lambda n, o, y, x, v: (n, o, y, v, x) if along_pixels else (n, o, y, x, v))
    if is_half:
        sch.transform_layout(convolution, ("write", 0), lambda n, o, y, x, v, p: (p, n, o, y, v, x) if along_pixels else (p, n, o, y, x, v))
    n, o, *y, x = sch.get_loops(epilogue)
    block, channel = sch.split(o, [None, filters])
    strip, pixel = sch.split(x, [None, choice.pixels])
    walked = [block, *y] if choice.first == "rows" else [*y, block]
    sch.reorder(n, *walked, strip, channel, pixel)
    sch.compute_at(total, strip, preserve_unit_loops=True)
    sch.parallel(sch.fuse(n, *walked))
    if is_half:
        *_, column, lane, part = sch.get_loops(total)
        sch.reorder(part, *([lane, column] if along_pixels else [column, lane]))
        sch.compute_at(convolution, part, preserve_unit_loops=True)
        *_, column, lane, _, i, ry, rx = sch.get_loops(convolution)
    else:
        *_, column, lane, i, ry, rx = sch.get_loops(convolution)
    sums = [i, ry, rx] if choice.channels == "outside" else [ry, rx, i]
    tile = [lane, column] if along_pixels else [column, lane]
    sch.reorder(*sums, *tile)
    for loop in (ry, rx)[2 - choice.unrolled :]:
        sch.unroll(loop)
    *_, outer, inner = sch.get_loops(convolution)
    for loops in ((outer, inner), (channel, pixel)):
        _in_registers(sch, *loops, vectors)
    begins = [sch.decompose_reduction(convolution, sums[0])]
    if is_half:
        *_, outer, inner = sch.get_loops(total)
        _in_registers(sch, outer, inner, vectors)
        begins.append(sch.decompose_reduction(total, part))
    for begin in begins:
        *_, outer, inner = sch.get_loops(begin)
        _in_registers(sch, outer, inner, vectors)
    if "padded" in names:
        parallel_rows(sch, blocks["padded"], vectors)
    return sch


def _in_registers(sch: Schedule, outer: LoopRV, inner: LoopRV, vectors: Vectors) -> None:
    """Vectorise the inner loop and unroll what is round it."""
    width = extent(sch, inner)
    sch.unroll(outer)
    if width > vectors.lanes and width % vectors.lanes == 0:
        several, inner = sch.split(inner, [None, vectors.lanes])
        sch.unroll(several)
    sch.vectorize(inner)
