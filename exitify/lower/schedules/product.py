"""Matrix products with a weight (`exitify.lower.linear`), with what was fused behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from exitify.lower.linear import ROWS
from exitify.lower.schedules.blocks import child_blocks, extent, in_registers, inline_between, share
from exitify.lower.vectors import Vectors


@dataclass(frozen=True)
class Choice:
    """How a product with a packed weight is scheduled; the columns of its tile are fixed by that.

    rows: Of a tile. first: Which is walked first for each block of columns or for each tile of rows.
    """

    rows: int
    first: Literal["rows", "columns"] = "rows"


def choices(func: tirx.PrimFunc, vectors: Vectors) -> list[Choice]:
    """Every way of scheduling the function that is worth a measurement, the default first; none when it is no product with a packed weight."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "product" not in blocks:
        return []
    count, rows, width, _ = (extent(sch, loop) for loop in sch.get_loops(blocks["product"]))
    default = Choice(int(sch.get(blocks["product"]).annotations[ROWS]))
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * -(-width // vectors.lanes) <= vectors.registers - 4]
    several: tuple[Literal["rows", "columns"], ...] = ("rows", "columns") if count > 1 else ("rows",)
    found = [Choice(n, first) for first in several for n in fitting if 4 * n >= default.rows and (first == "rows" or n < rows)]
    return [default, *(choice for choice in found if choice != default)]


def schedule(func: tirx.PrimFunc, vectors: Vectors, choice: Choice | None = None) -> Schedule | None:
    """Products in register tiles; dot products a lane at a time."""
    sch = Schedule(func)
    blocks = child_blocks(sch)
    if "product" in blocks:
        return _packed(sch, choice or choices(func, vectors)[0])
    if "products" in blocks:
        return _of_two(sch, vectors)
    if "dot_products" in blocks:
        return _dots(sch)
    return None


def _packed(sch: Schedule, choice: Choice) -> Schedule:
    blocks = child_blocks(sch)
    epilogue = inline_between(sch, "product")
    product = blocks["product"]
    width = extent(sch, sch.get_loops(product)[2])
    lead = [extent(sch, loop) for loop in sch.get_loops(epilogue)[:-1]]

    def flat(*at: tirx.Var) -> tuple[tirx.PrimExpr, ...]:
        index = at[0]
        for i, size in zip(at[1:-1], lead[1:]):
            index = index * size + i
        return index, at[-1]

    if len(lead) > 1:
        sch.transform_block_layout(epilogue, tirx.IndexMap.from_func(flat, ndim=len(lead) + 1))
        # The layout stays, and what the epilogue reads is simplified: m // size * size + m % size is m.
        sch.transform_layout(product, ("write", 0), lambda o, m, v: (o, m, v))
    row, column = sch.get_loops(epilogue)
    block, lane = sch.split(column, [None, width])
    strip, row = sch.split(row, [None, choice.rows])
    walked = [block, strip] if choice.first == "rows" else [strip, block]
    sch.reorder(*walked, row, lane)
    sch.compute_at(product, walked[-1], preserve_unit_loops=True)
    *_, rows, lanes, k = sch.get_loops(product)
    sch.reorder(k, rows, lanes)
    share(sch, walked)
    sch.vectorize(lanes)
    sch.unroll(rows)
    sch.vectorize(lane)
    *_, rows, lanes = sch.get_loops(sch.decompose_reduction(product, k))
    sch.vectorize(lanes)
    sch.unroll(rows)
    return sch


def _of_two(sch: Schedule, vectors: Vectors) -> Schedule:
    blocks = child_blocks(sch)
    epilogue = inline_between(sch, "products")
    product = blocks["products"]
    tile_rows, width = int(sch.get(product).annotations[ROWS]), extent(sch, sch.get_loops(product)[3])
    *lead, row, column = sch.get_loops(epilogue)
    block, lane = sch.split(column, [None, width])
    strip, row = sch.split(row, [None, tile_rows])
    sch.reorder(*lead, strip, block, row, lane)
    sch.compute_at(product, block, preserve_unit_loops=True)
    share(sch, [*lead, strip])
    in_registers(sch, row, lane, vectors.lanes)
    sum_in_registers(sch, product, vectors)
    group, block, *_ = sch.get_loops(blocks["packed_right"])
    share(sch, [group, block])
    return sch


def sum_in_registers(sch: Schedule, product: SBlockRV, vectors: Vectors) -> None:
    """A tile of a product, its loops rows, columns and what is summed up: the sums stay in registers while that goes by."""
    *_, row, column, k = sch.get_loops(product)
    sch.reorder(k, row, column)
    in_registers(sch, row, column, vectors.lanes)
    *_, row, column = sch.get_loops(sch.decompose_reduction(product, k))
    in_registers(sch, row, column, vectors.lanes)


def _dots(sch: Schedule) -> Schedule:
    blocks = child_blocks(sch)
    is_alone = list(blocks)[-1] == "dot_products"
    total, partial = blocks["dot_products"], blocks["partial_sums"]
    if is_alone:
        *_, column, _ = sch.get_loops(total)
    else:
        *_, column = sch.get_loops(inline_between(sch, "dot_products"))
        sch.compute_at(total, column, preserve_unit_loops=True)
    sch.compute_at(partial, column, preserve_unit_loops=True)
    *_, lane, step = sch.get_loops(partial)
    sch.reorder(step, lane)
    sch.vectorize(lane)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(partial, step))[-1])
    return sch
