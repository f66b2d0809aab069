"""Matrix products with a weight: packed where it is known, read as it is where it is an argument (a head's classifier)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx

from exitify.lower.expressions import OUT_ELEMENTWISE_FUSABLE, is_known, operator_of
from exitify.lower.vectors import Tile, Vectors

ROWS = "exitify.rows"
"""The product's note on how many rows its tile has; the columns are the last size of the packed weight."""


def pack_matrix(weight: NDArray[Any], block: int) -> NDArray[Any]:
    """Return `(K, O)` as `(ceil(O / block), K, block)`, columns that are missing zero."""
    depth, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((depth, blocks * block), weight.dtype)
    padded[:, :columns] = weight
    return np.ascontiguousarray(padded.reshape(depth, blocks, block).transpose(1, 0, 2))


def packed_product(data: te.Tensor, weight: te.Tensor, columns: int, tile_rows: int) -> te.Tensor:
    """Return `(..., K)` times a packed weight as `(..., O)`, summed in float32; rows are computed for whole tiles, the last row repeated."""
    *lead, depth = (int(size) for size in data.shape)
    rows = math.prod(lead)
    block = int(weight.shape[-1])
    k = te.reduce_axis((0, depth), name="k")

    def term(o: Any, m: Any, v: Any) -> Any:
        return data[(*unravel(tirx.min(m, rows - 1), lead), k)].astype("float32") * weight[o, k, v].astype("float32")

    sums = te.compute(
        (weight.shape[0], -(-rows // tile_rows) * tile_rows, block),
        lambda o, m, v: te.sum(term(o, m, v), axis=k),
        name="product",
        attrs={ROWS: tile_rows},
    )
    return te.compute((*lead, columns), lambda *at: sums[at[-1] // block, ravel(at[:-1], lead), at[-1] % block], name="unpacked")


def product_of_two(left: te.Tensor, right: te.Tensor, tile: Tile) -> te.Tensor:
    """Return `(..., M, K)` times `(..., K, N)` as `(..., M, N)`, neither known, summed in float32; leading sizes are spread as NumPy does.

    The second factor is packed first. Rows and columns are computed for whole tiles, the last ones repeated.
    """
    rows, depth, columns, width = int(left.shape[-2]), int(left.shape[-1]), int(right.shape[-1]), tile.filters
    lead = [max(int(a), int(b)) for a, b in itertools.zip_longest(left.shape[-3::-1], right.shape[-3::-1], fillvalue=1)][::-1]
    groups, k = math.prod(lead), te.reduce_axis((0, depth), name="k")

    def at(tensor: te.Tensor, g: Any, *index: Any) -> Any:
        own = unravel(g, lead)[len(lead) + 2 - len(tensor.shape) :]
        return tensor[(*(0 if int(size) == 1 else i for size, i in zip(tensor.shape, own)), *index)]

    packed = te.compute(
        (groups, -(-columns // width), depth, width),
        lambda g, o, k, v: at(right, g, k, tirx.min(o * width + v, columns - 1)),
        name="packed_right",
    )
    sums = te.compute(
        (groups, -(-columns // width), -(-rows // tile.pixels) * tile.pixels, width),
        lambda g, o, m, v: te.sum(at(left, g, tirx.min(m, rows - 1), k).astype("float32") * packed[g, o, k, v].astype("float32"), axis=k),
        name="products",
        attrs={ROWS: tile.pixels},
    )
    return te.compute((*lead, rows, columns), lambda *at: sums[ravel(at[:-2], lead), at[-1] // width, at[-2], at[-1] % width], name="unpacked")


def dot_products(data: te.Tensor, weight: te.Tensor, lanes: int) -> te.Tensor:
    """Return `(..., K)` times the transpose of `(O, K)`, as partial sums over every `lanes`-th value and their sum."""
    *lead, depth = (int(size) for size in data.shape)
    several = math.gcd(depth, lanes)
    step = te.reduce_axis((0, depth // several), name="step")
    partial = te.compute(
        (*lead, weight.shape[0], several),
        lambda *at: te.sum(data[(*at[:-2], step * several + at[-1])] * weight[at[-2], step * several + at[-1]], axis=step),
        name="partial_sums",
    )
    lane = te.reduce_axis((0, several), name="lane")
    return te.compute((*lead, weight.shape[0]), lambda *at: te.sum(partial[(*at, lane)], axis=lane), name="dot_products")


def legalize(vectors: Vectors, samples: int = 1) -> Any:
    """What `LegalizeOps` is given for `relax.matmul`: the forms above; TVM's own for vectors and for many rows times an argument of rank 2.

    Args:
        samples: How many are computed together.
    """

    def product(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        data, weight = call.args
        attributes = {"op_pattern": OUT_ELEMENTWISE_FUSABLE}
        if call.ty.dtype != "float32" or min(len(data.ty.shape), len(weight.ty.shape)) < 2:
            return tvm.ir.Op.get("relax.matmul").get_attr("FLegalize")(builder, call)
        if len(weight.ty.shape) > 2:
            tile = vectors.product_tile(int(data.ty.shape[-2]), int(weight.ty.shape[-1]))
            return builder.call_te(lambda x, y: product_of_two(x, y, tile), data, weight, primfunc_name_hint="product", primfunc_attrs=attributes)
        rows_first = _before_transposing(builder, weight)
        if is_known(weight):
            array = weight.value.numpy()
            rows = math.prod(int(size) for size in data.ty.shape) // array.shape[0]
            tile = vectors.product_tile(rows, array.shape[1], samples)
            packed = relax.const(pack_matrix(array, tile.filters))
            return builder.call_te(
                lambda x, w: packed_product(x, w, array.shape[1], tile.pixels), data, packed, primfunc_name_hint="product", primfunc_attrs=attributes
            )
        if rows_first is not None and math.prod(int(size) for size in list(data.ty.shape)[:-1]) <= samples:
            return builder.call_te(
                lambda x, w: dot_products(x, w, vectors.lanes), data, rows_first, primfunc_name_hint="dot_products", primfunc_attrs=attributes
            )
        return tvm.ir.Op.get("relax.matmul").get_attr("FLegalize")(builder, call)

    return product


def _before_transposing(builder: relax.BlockBuilder, weight: Any) -> Any:
    """The matrix that this one is the transpose of; None if it is none. Operators before the product are kernels already."""
    made_by: Any = builder.lookup_binding(weight) if isinstance(weight, relax.Var) and len(weight.ty.shape) == 2 else None
    if operator_of(made_by) == "relax.call_tir":
        kernel, arguments = made_by.args[0], made_by.args[1].fields
        if kernel.name_hint.rstrip("0123456789") == "transpose" and len(arguments) == 1:
            return arguments[0]
    return None


def unravel(index: Any, sizes: list[int]) -> list[Any]:
    """The position of the index-th element in an array of these sizes."""
    at: list[Any] = []
    for size in reversed(sizes):
        at.insert(0, index % size if len(at) < len(sizes) - 1 else index)
        index = index // size
    return at


def ravel(at: Any, sizes: list[int]) -> Any:
    """The number of the element at this position."""
    index = tirx.const(0, "int64")
    for i, size in zip(at, sizes):
        index = index * size + i
    return index
