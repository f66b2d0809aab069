"""Softmax and layer norm over the last axis, a row at a time: its sums and its maximum in vectors first, and those by halves."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx

from exitify.lower.expressions import OUT_ELEMENTWISE_FUSABLE
from exitify.lower.vectors import Vectors

OF_LANES = "_of_lanes"
"""How the name of a sum in vectors ends."""


def layer_norm(data: te.Tensor, gamma: te.Tensor, beta: te.Tensor, epsilon: float, lanes: int) -> te.Tensor:
    """Return `(..., C)` with each row's mean 0 and variance 1, times gamma plus beta, `(C,)`."""
    columns = int(data.shape[-1])
    sums = over_columns("sum", lambda *at: data[at], data.shape, lanes)
    means = te.compute((*data.shape[:-1], 1), lambda *at: sums[at] / columns, name="row_mean")

    def square(*at: Any) -> Any:
        distance = data[at] - means[(*at[:-1], 0)]
        return distance * distance

    squares = over_columns("square", square, data.shape, lanes)
    factors = te.compute(
        (*data.shape[:-1], 1), lambda *at: 1.0 / tirx.sqrt(squares[at] / columns + tirx.const(epsilon, "float32")), name="row_factor"
    )

    def normalized(*at: Any) -> Any:
        row = (*at[:-1], 0)
        return (data[at] - means[row]) * factors[row] * gamma[at[-1]] + beta[at[-1]]

    return te.compute(data.shape, normalized, name="normalized")


def softmax(data: te.Tensor, lanes: int) -> te.Tensor:
    """Return `(..., C)` with each row's exponentials as shares of their sum."""
    largest = over_columns("largest", lambda *at: data[at], data.shape, lanes)
    powers = te.compute(data.shape, lambda *at: tirx.exp(data[at] - largest[(*at[:-1], 0)]), name="row_powers")
    sums = over_columns("sum", lambda *at: powers[at], data.shape, lanes)
    factors = te.compute((*data.shape[:-1], 1), lambda *at: 1.0 / sums[at], name="row_factor")
    return te.compute(data.shape, lambda *at: powers[at] * factors[(*at[:-1], 0)], name="normalized")


def over_columns(name: str, value: Callable[..., Any], shape: Any, lanes: int) -> te.Tensor:
    """Return the largest or the sum of a row's values as `(..., 1)`.

    Args:
        name: The largest if it is `largest`, else the sum; stages are called `row_<name>_...`.
        value: Of an element of an array of this shape.
        lanes: How many sums run side by side, as far as the columns allow.
    """
    reduce, two = (te.max, tirx.max) if name == "largest" else (te.sum, operator.add)
    *rows, columns = (int(size) for size in shape)
    lanes = math.gcd(columns, lanes)
    part = te.reduce_axis((0, columns // lanes), name="part")
    found = te.compute((*rows, lanes), lambda *at: reduce(value(*at[:-1], part * lanes + at[-1]), axis=part), name=f"row_{name}_{lanes}{OF_LANES}")
    while lanes > 1:
        lanes //= 2
        found = _halved(two, found, lanes, f"row_{name}_{lanes}")
    return found


def _halved(two: Callable[[Any, Any], Any], tensor: te.Tensor, lanes: int, name: str) -> te.Tensor:
    return te.compute((*tensor.shape[:-1], lanes), lambda *at: two(tensor[at], tensor[(*at[:-1], at[-1] + lanes)]), name=name)


def legalize(vectors: Vectors) -> dict[str, Any]:
    """What `LegalizeOps` is given: the forms above for the last axis of several and float32, TVM's own elsewhere."""
    attributes = {"op_pattern": OUT_ELEMENTWISE_FUSABLE}
    lanes = 4 * vectors.lanes

    def is_last(call: relax.Call, *axes: int) -> bool:
        rank = len(call.ty.shape)
        return rank > 1 and [axis % rank for axis in axes] == [rank - 1] and str(call.ty.dtype) == "float32"

    def norm(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not (is_last(call, *map(int, call.attrs.axes)) and call.attrs.center and call.attrs.scale):
            return tvm.ir.Op.get("relax.nn.layer_norm").get_attr("FLegalize")(builder, call)
        epsilon = float(call.attrs.epsilon)
        return builder.call_te(
            lambda data, gamma, beta: layer_norm(data, gamma, beta, epsilon, lanes),
            *call.args,
            primfunc_name_hint="layer_norm",
            primfunc_attrs=attributes,
        )

    def shares(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not is_last(call, int(call.attrs.axis)):
            return tvm.ir.Op.get("relax.nn.softmax").get_attr("FLegalize")(builder, call)
        return builder.call_te(lambda data: softmax(data, lanes), *call.args, primfunc_name_hint="softmax", primfunc_attrs=attributes)

    return {"relax.nn.layer_norm": norm, "relax.nn.softmax": shares}
