"""Any kernel without a schedule of its own: element-wise chains inlined, rows shared among the threads, the rest as LLVM finds it."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV, ScheduleError

from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, share, vectorise
from exitify.lower.vectors import Vectors


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """Inline what one element-wise block reads, and share out what is left.

    What a sum or a window reads stays: an inlined exponential would be computed once a reader, an inlined border checked
    once a position (a max pooling took 1.9 times as long), and vectors across windows that are strides apart are gathered (3.6 times).
    """
    sch = Schedule(func)
    *first, _ = child_blocks(sch).values()
    for block in first:
        readers = sch.get_consumers(block)
        if len(readers) == 1 and not _sums_up(sch, readers[0]):
            try:
                sch.compute_inline(block)
            except ScheduleError:  # it sums up itself
                continue
    for block in child_blocks(sch).values():
        _share_rows(sch, block, vectors)
    return sch


def _sums_up(sch: Schedule, block: SBlockRV) -> bool:
    return any(variable.iter_type == tirx.IterVar.CommReduce for variable in sch.get(block).iter_vars)


def _share_rows(sch: Schedule, block: SBlockRV, vectors: Vectors) -> None:
    """Results to the threads by rows, if there is enough to do; a row in vectors, where what it reads lies side by side."""
    loops = sch.get_loops(block)
    kinds = [variable.iter_type for variable in sch.get(block).iter_vars]
    if len(loops) != len(kinds) or not all(isinstance(sch.get(loop).extent, tirx.IntImm) for loop in loops):
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == tirx.IterVar.DataPar]
    in_vectors = len(spatial) == len(loops) > 0 and _reads_side_by_side(sch, block)
    if spatial and loops[: len(spatial)] == spatial and math.prod(extent(sch, loop) for loop in loops) >= SMALLEST_SHARED:
        share(sch, spatial[:-1] or spatial)
        if len(spatial) == 1:
            return
    if in_vectors:
        vectorise(sch, loops[-1], vectors)


def _reads_side_by_side(sch: Schedule, block: SBlockRV) -> bool:
    """Whether neighbours in a row read neighbours, or all the same."""
    found = sch.get(block)
    last = found.iter_vars[-1].var
    for region in found.reads:
        *outer, inner = [axis.min for axis in region.region] or [last]
        if any(_has(index, last) for index in outer) or (_has(inner, last) and not inner.same_as(last)):
            return False
    return True


def _has(index: tirx.PrimExpr, variable: tirx.Var) -> bool:
    return any(used.same_as(variable) for used in tirx.analysis.undefined_vars(index, []))
