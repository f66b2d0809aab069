"""What the schedules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from exitify.lower.vectors import Vectors

SMALLEST_SHARED = 16384
"""Iterations of a loop nest below which handing a part to another thread costs more than it saves."""


def child_blocks(sch: Schedule) -> dict[str, SBlockRV]:
    """The blocks of a PrimFunc by name, in the order in which they run."""
    return {sch.get(block).name_hint: block for block in sch.get_child_blocks(sch.get_sblock("root"))}


def inline_between(sch: Schedule, name: str) -> SBlockRV:
    """Inline the blocks behind the one of this name into the last, and return that one."""
    blocks = list(child_blocks(sch).items())
    at = [known for known, _ in blocks].index(name)
    for _, block in blocks[at + 1 : -1]:
        sch.compute_inline(block)
    return blocks[-1][1]


def extent(sch: Schedule, loop: LoopRV) -> int:
    """How often a loop runs."""
    return int(sch.get(loop).extent)


def share(sch: Schedule, loops: Sequence[LoopRV]) -> None:
    """Share out what these loops do, one within the other, among the threads."""
    sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])


def vectorise(sch: Schedule, loop: LoopRV, vectors: Vectors) -> None:
    """Vectorise a loop, or an even part of it: vectors of a thousand values keep LLVM busy for minutes."""
    size, most = extent(sch, loop), 4 * vectors.lanes
    width = size if size <= most else max(n for n in range(1, most + 1) if size % n == 0)
    if width < size:
        if 2 * width < vectors.lanes:
            return  # LLVM finds what there is to find
        _, loop = sch.split(loop, [None, width])
    sch.vectorize(loop)


def in_registers(sch: Schedule, outer: LoopRV, inner: LoopRV, lanes: int) -> None:
    """A tile in registers: its inner loop in vectors, what is round them unrolled."""
    sch.unroll(outer)
    if extent(sch, inner) > lanes and extent(sch, inner) % lanes == 0:
        several, inner = sch.split(inner, [None, lanes])
        sch.unroll(several)
    sch.vectorize(inner)


def parallel_rows(sch: Schedule, block: SBlockRV, vectors: Vectors) -> None:
    """Vectorise a block's last loop and, if there is enough to do, share out the others among the threads."""
    *outer, last = sch.get_loops(block)
    if outer and math.prod(extent(sch, loop) for loop in (*outer, last)) >= SMALLEST_SHARED:
        share(sch, outer)
    vectorise(sch, last, vectors)
