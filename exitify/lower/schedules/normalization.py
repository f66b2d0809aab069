"""Softmax and layer norm (`exitify.lower.normalization`): a row through all of it while it is in the cache, and what was fused behind it."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from exitify.lower.normalization import OF_LANES
from exitify.lower.schedules.blocks import SMALLEST_SHARED, child_blocks, extent, inline_between, share, vectorise
from exitify.lower.vectors import Vectors


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """Rows shared among the threads, columns in vectors."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "normalized" not in blocks:
        return None
    rows = {name: block for name, block in blocks.items() if name.startswith("row_")}
    last = blocks["normalized"]
    if list(blocks)[-1] != "normalized":
        last = inline_between(sch, "normalized")
        sch.compute_inline(blocks["normalized"])
    *outer, _ = sch.get_loops(last)
    is_shared = math.prod(extent(sch, loop) for loop in sch.get_loops(last)) >= SMALLEST_SHARED
    row = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    for name in reversed(rows):
        sch.compute_at(rows[name], row, preserve_unit_loops=True)
    if is_shared:
        share(sch, [row])
    for name, block in rows.items():
        in_vectors(sch, name, block, vectors)
    in_vectors(sch, "", last, vectors)
    return sch


def in_vectors(sch: Schedule, name: str, block: SBlockRV, vectors: Vectors) -> None:
    """Vectorise a stage of `over_columns`, or one that has a value for each column."""
    if name.endswith(OF_LANES):
        *_, lane, part = sch.get_loops(block)
        sch.reorder(part, lane)
        _vectorise(sch, lane, vectors)
        block = sch.decompose_reduction(block, part)
    _vectorise(sch, sch.get_loops(block)[-1], vectors)


def _vectorise(sch: Schedule, loop: LoopRV, vectors: Vectors) -> None:
    """In whole vectors, several at once, where they fit."""
    width = math.gcd(extent(sch, loop), 2 * vectors.lanes)
    if width >= vectors.lanes:
        _, loop = sch.split(loop, [None, width])
    vectorise(sch, loop, vectors)
