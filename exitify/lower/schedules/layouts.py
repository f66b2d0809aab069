"""Between rows of images and blocks of channels (`exitify.lower.blocked`)."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule

from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, share
from exitify.lower.vectors import Vectors


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """A row's pixels after the other, the channels of a block at once: these are what lies side by side on one of the two sides."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "into_blocks" in blocks and len(blocks) == 1:
        n, c, y, x, lane = sch.get_loops(blocks["into_blocks"])
        outer = [n, c, y]
        sch.vectorize(lane)
    elif "out_of_blocks" in blocks and len(blocks) == 1:
        n, c, y, x = sch.get_loops(blocks["out_of_blocks"])
        c, lane = sch.split(c, [None, vectors.lanes])
        sch.reorder(n, c, y, x, lane)
        outer = [n, c, y]
        sch.unroll(lane)
    elif "channels_last" in blocks and len(blocks) == 1:
        n, y, x, c = sch.get_loops(blocks["channels_last"])
        c, lane = sch.split(c, [None, vectors.lanes])
        outer = [n, y]
        x = sch.fuse(x, c)
        sch.vectorize(lane)
    else:
        return None
    if math.prod(extent(sch, loop) for loop in (*outer, x, lane)) >= SMALLEST_SHARED:
        share(sch, outer)
    return sch
