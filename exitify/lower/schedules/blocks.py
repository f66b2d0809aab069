"""What the schedules share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

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


def parallel_rows(sch: Schedule, block: SBlockRV) -> None:
    """Vectorise a block's last loop and, if there is enough to do, share out the others among the threads."""
    *outer, last = sch.get_loops(block)
    if outer and math.prod(extent(sch, loop) for loop in (*outer, last)) >= SMALLEST_SHARED:
        share(sch, outer)
    sch.vectorize(last)


def is_reduction(sch: Schedule, block: SBlockRV) -> bool:
    """Whether the block sums up, or finds a largest value."""
    return any(v.iter_type == tirx.IterVar.CommReduce for v in sch.get(block).iter_vars)
