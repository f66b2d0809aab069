"""Any kernel without a schedule of its own: element-wise chains inlined, rows shared among the threads, the last axis vectorised."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV, ScheduleError

from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, share
from exitify.lower.vectors import Vectors


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """Inline what nothing forbids, then treat each block that is left alone."""
    sch = Schedule(func)
    *first, _ = child_blocks(sch).values()
    for block in first:
        try:
            sch.compute_inline(block)
        except ScheduleError:  # it sums up, or several read it
            continue
    for block in child_blocks(sch).values():
        _treat(sch, block, vectors)
    return sch


def _treat(sch: Schedule, block: SBlockRV, vectors: Vectors) -> None:
    """Rows in parallel; a window's positions outside of a row of results, so that the row can be vectorised."""
    loops = sch.get_loops(block)
    kinds = [variable.iter_type for variable in sch.get(block).iter_vars]
    if len(loops) != len(kinds) or not all(isinstance(sch.get(loop).extent, tirx.IntImm) for loop in loops):
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == tirx.IterVar.DataPar]
    reduced = [loop for loop, kind in zip(loops, kinds) if kind == tirx.IterVar.CommReduce]
    if not spatial or len(spatial) + len(reduced) != len(loops):
        return
    work = math.prod(extent(sch, loop) for loop in loops)
    *rows, last = spatial
    if reduced and extent(sch, last) >= vectors.lanes // 2:
        sch.reorder(*rows, *reduced, last)
        if rows and work >= SMALLEST_SHARED:
            share(sch, rows)
        sch.vectorize(last)
        sch.vectorize(sch.get_loops(sch.decompose_reduction(block, reduced[0]))[-1])
    elif work >= SMALLEST_SHARED:
        share(sch, rows or [last])
