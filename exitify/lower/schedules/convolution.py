"""Packed convolution (`exitify.lower.convolution`) with whatever was fused behind it as its epilogue."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.s_tir import Schedule

from exitify.lower.convolution import PIXELS
from exitify.lower.schedules.blocks import child_blocks, extent, in_registers, inline_between, parallel_rows, share
from exitify.lower.vectors import Vectors

SMALLEST_SHARED = 400_000
"""Multiply-adds of a convolution below which one thread is done before another has begun."""


@dataclass(frozen=True)
class Choice:
    """How a convolution is scheduled; the filters of its tile are fixed by its packed weight.

    pixels: See `Tile`. unrolled: How many of the kernel's two loops are unrolled.
    first: Which is walked first for each block of filters or for each row of the image.
    """

    pixels: int
    unrolled: int = 0
    first: Literal["rows", "filters"] = "rows"


def choices(func: tirx.PrimFunc, vectors: Vectors) -> list[Choice]:
    """Every way of scheduling the function that is worth a measurement, the default first; none when it is no packed convolution."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "convolution" not in blocks:
        return []
    notes = sch.get(blocks["convolution"]).annotations
    total = blocks.get("sum_of_parts", blocks["convolution"])
    _, _, rows, columns, filters, *_ = (extent(sch, loop) for loop in sch.get_loops(total))
    *_, height, width, _ = (extent(sch, loop) for loop in sch.get_loops(blocks["convolution"]))
    vectors = vectors.of("float16") if "sum_of_parts" in blocks else vectors
    default = Choice(int(notes[PIXELS]))
    fitting = (n for n in range(1, columns + 1) if columns % n == 0)
    tiles = [n for n in fitting if 4 * vectors.lanes <= n * filters <= (vectors.registers - 4) * vectors.lanes]
    rest = itertools.product(sorted({0, int(width > 1), 2 * int(height * width > 1 and height > 1)}), ("rows", "filters") if rows > 1 else ("rows",))
    found = [Choice(pixels, *others) for others in rest for pixels in tiles]  # type: ignore[arg-type]
    return [default, *(choice for choice in found if choice != default)]


def schedule(func: tirx.PrimFunc, vectors: Vectors, choice: Choice | None = None) -> Schedule | None:
    """The tile in registers, one tile of a row after the other; the epilogue reads it from there."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "convolution" not in blocks:
        return None
    choice = choice or choices(func, vectors)[0]
    convolution = blocks["convolution"]
    is_half = "sum_of_parts" in blocks
    total = blocks["sum_of_parts"] if is_half else convolution
    lanes = vectors.of("float16").lanes if is_half else vectors.lanes
    epilogue = inline_between(sch, "sum_of_parts" if is_half else "convolution")
    _, _, computed_rows, _, filters, *_ = (extent(sch, loop) for loop in sch.get_loops(total))
    _, _, rows, columns, block = (extent(sch, loop) for loop in sch.get_loops(epilogue))
    terms = math.prod(extent(sch, loop) for loop in sch.get_loops(convolution)[5:])
    if computed_rows != rows:  # pointwise: all pixels in one row
        sch.transform_block_layout(epilogue, lambda n, o, y, x, v: (n, o, y * columns + x, v))
        # The layout stays, and what the epilogue reads is simplified: p // columns * columns + p % columns is p.
        sch.transform_layout(total, ("write", 0), lambda n, o, y, x, v: (n, o, y, x, v))
    if is_half:
        sch.transform_layout(convolution, ("write", 0), lambda n, o, y, x, v, p: (p, n, o, y, x, v))
    n, o, *y, x, lane = sch.get_loops(epilogue)
    several, o = sch.split(o, [None, filters // block])
    strip, pixel = sch.split(x, [None, choice.pixels])
    walked = [several, *y] if choice.first == "filters" else [*y, several]
    sch.reorder(n, *walked, strip, pixel, o, lane)
    sch.compute_at(total, strip, preserve_unit_loops=True)
    whole = terms * filters * choice.pixels * math.prod(extent(sch, loop) for loop in (n, *walked, strip))
    if whole >= SMALLEST_SHARED:
        share(sch, [n, *walked])
    if is_half:
        *_, column, filter_, part = sch.get_loops(total)
        sch.reorder(part, column, filter_)
        sch.compute_at(convolution, part, preserve_unit_loops=True)
        *_, column, filter_, _, i, ry, rx, inner = sch.get_loops(convolution)
    else:
        *_, column, filter_, i, ry, rx, inner = sch.get_loops(convolution)
    sch.reorder(i, ry, rx, inner, column, filter_)
    for loop in (ry, rx)[2 - choice.unrolled :]:
        sch.unroll(loop)
    in_registers(sch, column, filter_, lanes)
    sch.unroll(pixel)
    sch.unroll(o)
    sch.vectorize(lane)
    begins = [sch.decompose_reduction(convolution, i)]
    if is_half:
        *_, column, filter_ = sch.get_loops(total)
        in_registers(sch, column, filter_, lanes)
        begins.append(sch.decompose_reduction(total, part))
    for begin in begins:
        *_, column, filter_ = sch.get_loops(begin)
        in_registers(sch, column, filter_, lanes)
    if "padded" in blocks:
        parallel_rows(sch, blocks["padded"], vectors)
    return sch
