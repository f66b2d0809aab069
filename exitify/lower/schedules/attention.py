"""Attention (`exitify.lower.attention`): each strip of rows through both products and the softmax between them."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule

from exitify.lower.attention import COLUMNS, ROW_AXIS
from exitify.lower.linear import ROWS
from exitify.lower.schedules.blocks import child_blocks, extent, in_registers, share
from exitify.lower.schedules.normalization import in_vectors
from exitify.lower.schedules.product import sum_in_registers
from exitify.lower.vectors import Vectors

PRODUCTS = ("packed_keys", "similarities", "weighted", "attention")


def schedule(func: tirx.PrimFunc, vectors: Vectors) -> Schedule | None:
    """Tiles of both products in registers, the softmax in vectors of columns; strips shared among the threads."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "similarities" not in blocks:
        return None
    rows = {name: block for name, block in blocks.items() if name.startswith("row_")}
    for name, block in blocks.items():
        if name not in (*PRODUCTS, *rows):
            sch.compute_inline(block)
    notes = sch.get(blocks["similarities"]).annotations
    tile_rows, tile_columns = int(notes[ROWS]), int(notes[COLUMNS])
    *lead, channel = sch.get_loops(blocks["attention"])
    row = lead.pop(int(sch.get(blocks["attention"]).annotations[ROW_AXIS]))
    strip, row = sch.split(row, [None, tile_rows])
    width = math.gcd(extent(sch, channel), vectors.lanes * max(1, vectors.accumulators // tile_rows))
    block, channel = sch.split(channel, [None, width])
    sch.reorder(*lead, strip, block, row, channel)
    share(sch, [*lead, strip])
    *_, strip, block, row, channel = sch.get_loops(blocks["attention"])
    in_registers(sch, row, channel, vectors.lanes)
    sch.compute_at(blocks["weighted"], block, preserve_unit_loops=True)
    for name in reversed(rows):
        sch.compute_at(rows[name], strip, preserve_unit_loops=True)
    sum_in_registers(sch, blocks["weighted"], vectors)
    for name in rows.keys() - {"row_logits"}:
        in_vectors(sch, name, rows[name], vectors)
    *_, row, column = sch.get_loops(blocks["row_logits"])
    block, column = sch.split(column, [None, tile_columns])
    sch.reorder(block, row, column)
    in_registers(sch, row, column, vectors.lanes)
    sch.compute_at(blocks["similarities"], block, preserve_unit_loops=True)
    sum_in_registers(sch, blocks["similarities"], vectors)
    group, block, *_ = sch.get_loops(blocks["packed_keys"])
    share(sch, [group, block])
    return sch
