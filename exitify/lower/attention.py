"""Attention as one kernel: softmax(scale Q K + biases) V, with the operators before it that only move numbers: heads split, keys transposed.

A strip of rows goes through all of it while its similarities are in the cache, and nothing that was only moved is ever written out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx, topi
from tvm.relax.expr_functor import PyExprMutator, mutator

from exitify.lower.expressions import OPAQUE, is_known, operator_of
from exitify.lower.linear import ROWS, ravel, unravel
from exitify.lower.normalization import over_columns
from exitify.lower.vectors import Tile, Vectors

COLUMNS, ROW_AXIS = "exitify.columns", "exitify.row_axis"
"""Notes: of the similarities on how many columns their tile has, beside `ROWS`; of the result on which of its axes the rows are."""


@dataclass(frozen=True)
class Moved:
    """A value of the function, and what moves its numbers, the first move first, to an array of this shape."""

    source: Any
    moves: tuple[Callable[[te.Tensor], te.Tensor], ...]
    shape: tuple[int, ...]

    def of(self, tensor: te.Tensor) -> te.Tensor:
        """What becomes of the source."""
        return functools.reduce(lambda moved, move: move(moved), self.moves, tensor)


@dataclass(frozen=True)
class Attention:
    """One attention of a function.

    queries: `(..., M, D)`. keys: `(..., D, N)`. values: `(..., N, C)`. biases: `(..., M, N)`; sizes but N may be 1, and leading ones be missing.
    result: The variable that it is bound to. is_merged: Whether that is `(B, M, heads, C)` in place of `(B, heads, M, C)`.
    """

    queries: Moved
    keys: Moved
    values: Moved
    scale: float
    biases: tuple[NDArray[np.float32], ...]
    result: Any
    is_merged: bool = False


def fuse_attention(module: tvm.IRModule, vectors: Vectors) -> tvm.IRModule:
    """Return the module with each attention in `main` as a call of one kernel; what led to it stays, for dead code elimination."""
    found = attentions(module["main"])
    if not found:
        return module
    fuse = _Fuse(module, {attention.result: attention for attention in found}, vectors)
    fuse.builder_.update_func(module.get_global_var("main"), fuse.visit_expr(module["main"]))
    return fuse.builder_.get()


@mutator
class _Fuse(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: tvm.IRModule, found: Mapping[Any, Attention], vectors: Vectors) -> None:
        super().__init__(module)
        self.found, self.vectors = found, vectors

    def visit_var_binding_(self, binding: Any) -> None:
        attention = self.found.get(binding.var)
        if attention is None:
            super().visit_var_binding_(binding)
            return
        parts = (attention.queries, attention.keys, attention.values)
        sources = list(dict.fromkeys(part.source for part in parts))
        rows, columns = parts[0].shape[-2], parts[1].shape[-1]
        tile = self.vectors.product_tile(rows, columns)
        missing = -columns % tile.filters
        biases = [np.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(0, missing)]) for bias in attention.biases]

        def compute(*tensors: te.Tensor) -> te.Tensor:
            known = dict(zip(sources, tensors))
            queries, keys, values = (part.of(known[part.source]) for part in parts)
            return scaled_attention(
                queries, keys, values, attention.scale, tensors[len(sources) :], tile, self.vectors.lanes, is_merged=attention.is_merged
            )

        arguments = [*(self.visit_expr(source) for source in sources), *(relax.const(bias) for bias in biases)]
        call = self.builder_.call_te(compute, *arguments, primfunc_name_hint="attention", primfunc_attrs={"op_pattern": OPAQUE})
        emit = self.builder_.emit if isinstance(binding.var, relax.DataflowVar) else self.builder_.emit_output
        self.set_var_remap(binding.var, emit(call))


def scaled_attention(
    queries: te.Tensor, keys: te.Tensor, values: te.Tensor, scale: float, biases: Sequence[te.Tensor], tile: Tile, lanes: int, *, is_merged: bool
) -> te.Tensor:
    """Return softmax(scale · queries · keys + biases) · values.

    Args:
        queries: `(..., M, D)`. keys: `(..., D, N)`. values: `(..., N, C)`.
        biases: As `Attention` has them, their rows made whole tiles with any finite numbers.
        tile: Of the similarities, `pixels` rows and `filters` columns. lanes: Of a vector.
        is_merged: Whether `(B, heads, M, C)` is wanted as `(B, M, heads, C)`.
    """
    *lead, rows, depth = (int(size) for size in queries.shape)
    columns, channels, groups, width = int(keys.shape[-1]), int(values.shape[-1]), math.prod(lead), tile.filters
    rows_computed, columns_computed = -(-rows // tile.pixels) * tile.pixels, -(-columns // width) * width

    def row(m: Any) -> Any:
        return tirx.min(m, rows - 1) if rows_computed > rows else m

    def bias(tensor: te.Tensor, g: Any, m: Any, c: Any) -> Any:
        index = [*unravel(g, lead), row(m), c][len(lead) + 2 - len(tensor.shape) :]
        return tensor[tuple(0 if int(size) == 1 else i for size, i in zip(tensor.shape, index))]

    packed = te.compute(
        (groups, columns_computed // width, depth, width),
        lambda g, o, d, v: keys[(*unravel(g, lead), d, tirx.min(o * width + v, columns - 1))],
        name="packed_keys",
    )
    d, n = te.reduce_axis((0, depth), name="d"), te.reduce_axis((0, columns), name="n")
    computed = (groups, rows_computed, columns_computed)
    similarities = te.compute(
        computed,
        lambda g, m, c: te.sum(queries[(*unravel(g, lead), row(m), d)] * packed[g, c // width, d, c % width], axis=d),
        name="similarities",
        attrs={ROWS: tile.pixels, COLUMNS: width},
    )

    def logit(g: Any, m: Any, c: Any) -> Any:
        value = sum((bias(tensor, g, m, c) for tensor in biases), similarities[g, m, c] * tirx.const(scale, "float32"))
        return tirx.Select(c < columns, value, tirx.min_value("float32")) if columns_computed > columns else value

    logits = te.compute(computed, logit, name="row_logits")
    largest = over_columns("largest", lambda *at: logits[at], computed, lanes)
    powers = te.compute(computed, lambda g, m, c: tirx.exp(logits[g, m, c] - largest[g, m, 0]), name="row_powers")
    sums = over_columns("sum", lambda *at: powers[at], computed, lanes)
    weighted = te.compute(
        (groups, rows_computed, channels),
        lambda g, m, c: te.sum(powers[g, m, n] * values[(*unravel(g, lead), n, c)], axis=n),
        name="weighted",
    )

    def result(g: Any, m: Any, c: Any) -> Any:
        return weighted[g, m, c] / sums[g, m, 0]

    if is_merged:
        merged = (lead[0], rows, lead[1], channels)
        return te.compute(merged, lambda b, m, h, c: result(b * lead[1] + h, m, c), name="attention", attrs={ROW_AXIS: 1})
    return te.compute((*lead, rows, channels), lambda *at: result(ravel(at[:-2], lead), *at[-2:]), name="attention", attrs={ROW_AXIS: len(lead)})


def attentions(function: relax.Function) -> list[Attention]:
    """Every attention in a function whose sizes are known."""
    search = _Search(function)
    return [attention for binding in search.bindings if (attention := search.ending_in(binding)) is not None]


class _Search:
    """A function's bindings, what they are bound to and how often they are read."""

    def __init__(self, function: relax.Function) -> None:
        self.bindings = [binding for block in function.body.blocks for binding in block.bindings]
        self.values = {binding.var: binding.value for binding in self.bindings}
        self.readers: dict[Any, list[Any]] = {}
        for binding in self.bindings:
            self._note(binding.value, binding)
        self._note(function.body.body, None)

    def _note(self, expression: Any, reader: Any) -> None:
        relax.analysis.post_order_visit(expression, lambda e: self.readers.setdefault(e, []).append(reader) if isinstance(e, relax.Var) else None)

    def call_of(self, value: Any, name: str) -> Any:
        """The call of this operator that a variable is bound to, if it is."""
        call = self.values.get(value)
        return call if operator_of(call) == name else None

    def only_reader(self, variable: Any) -> Any:
        """The binding that reads a variable, if only one does."""
        readers = self.readers.get(variable, [])
        return readers[0] if len(readers) == 1 else None

    def ending_in(self, binding: Any) -> Attention | None:
        """The attention that ends in this product; None if it is another or none."""
        if operator_of(binding.value) != "relax.matmul" or not self.only_reader(binding.value.args[0]):
            return None
        softmax = self.call_of(binding.value.args[0], "relax.nn.softmax")
        if softmax is None or int(softmax.attrs.axis) not in (-1, len(softmax.ty.shape) - 1):
            return None
        linear = self._scale_and_biases(softmax.args[0])
        if linear is None:
            return None
        product, scale, biases = linear
        if any(str(value.ty.dtype) != "float32" for value in (*product.args, *binding.value.args)):
            return None
        (queries, first), (keys, second), (values, third) = (self.moved(value) for value in (*product.args, binding.value.args[1]))
        lead = queries.shape[:-2]
        is_plain = third == 1.0 and lead and all(part.shape[:-2] == lead for part in (keys, values))
        if not is_plain or _sizes(softmax) != (*lead, queries.shape[-2], keys.shape[-1]) or any(bias.ndim > len(lead) + 2 for bias in biases):
            return None
        found = Attention(queries, keys, values, scale * first * second, tuple(bias.astype(np.float32) for bias in biases), binding.var)
        reader = self.only_reader(binding.var)
        move: Any = reader.value if reader is not None else None
        if operator_of(move) == "relax.permute_dims" and tuple(map(int, move.attrs.axes or ())) == (0, 2, 1, 3):
            return dataclasses.replace(found, result=reader.var, is_merged=True)
        return found

    def _scale_and_biases(self, value: Any) -> tuple[Any, float, list[NDArray[Any]]] | None:
        """The product behind a value, and what it is multiplied with and what is added to it before it is that value."""
        scale = 1.0
        biases: list[NDArray[Any]] = []
        columns = int(value.ty.shape.values[-1])
        while self.only_reader(value) is not None:
            call: Any = self.values.get(value)
            kind = operator_of(call)
            if kind == "relax.matmul":
                return call, scale, biases
            if kind == "relax.reshape" and _core(_sizes(call)) == _core(_sizes(call.args[0])):
                value = call.args[0]
                continue
            split = _with_constant(call) if kind in ("relax.add", "relax.multiply") else None
            if split is None:
                return None
            value, array = split
            if kind == "relax.add" and array.ndim >= 2 and array.shape[-1] == columns:
                biases.append(scale * array.reshape(_core(array.shape)))
            elif kind == "relax.multiply" and array.size == 1:
                scale *= float(array.reshape(()))
            else:
                return None
        return None

    def moved(self, value: Any) -> tuple[Moved, float]:
        """A value as its source, moved, and a factor."""
        shape, factor, moves = _sizes(value), 1.0, []
        while isinstance(value, relax.Var) and value in self.values:
            call = self.values[value]
            if isinstance(call, relax.TupleGetItem) and (split := self.call_of(call.tuple_value, "relax.split")) is not None:
                moves.append(functools.partial(_part, split, call.index))
                value = split.args[0]
            elif (kind := operator_of(call)) in MOVES and all(not isinstance(argument, relax.Var) for argument in call.args[1:]):
                moves.append(functools.partial(MOVES[kind], call))
                value = call.args[0]
            elif kind == "relax.multiply" and (split := _with_constant(call)) is not None and split[1].size == 1:
                factor *= float(split[1].reshape(()))
                value = split[0]
            else:
                break
        return Moved(value, tuple(reversed(moves)), shape), factor


def _sizes(expression: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in expression.ty.shape.values)


def _core(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes without the ones before the first that is larger; the last two at least."""
    first = next((i for i, size in enumerate(sizes[:-2]) if size > 1), max(len(sizes) - 2, 0))
    return tuple(sizes[first:])


def _with_constant(call: Any) -> tuple[Any, NDArray[Any]] | None:
    """The operand that is computed, and the one that is known; None if they are not one each, or the first is spread over the second."""
    known = [is_known(argument) for argument in call.args]
    if sum(known) != 1:
        return None
    value, constant = call.args if known[1] else reversed(call.args)
    return (value, constant.value.numpy()) if _sizes(value) == _sizes(call) else None


def _reshaped(call: Any, tensor: te.Tensor) -> te.Tensor:
    return topi.reshape(tensor, _sizes(call))


def _transposed(call: Any, tensor: te.Tensor) -> te.Tensor:
    return topi.transpose(tensor, [int(axis) for axis in call.attrs.axes] if call.attrs.axes else None)


def _sliced(call: Any, tensor: te.Tensor) -> te.Tensor:
    axes, begin, _, *strides = ([int(item.value) for item in argument.fields] for argument in call.args[1:])
    first, step = [0] * len(tensor.shape), [1] * len(tensor.shape)
    for i, axis in enumerate(axes):
        size = int(tensor.shape[axis])
        step[axis] = strides[0][i] if strides else 1
        first[axis] = min(max(begin[i] + size if begin[i] < 0 else begin[i], 0), size)
    return te.compute(_sizes(call), lambda *at: tensor[tuple(i * by + start for i, by, start in zip(at, step, first))], name="sliced")


def _taken(call: Any, tensor: te.Tensor) -> te.Tensor:
    index = call.args[1].value.numpy()
    axis = int(call.attrs.axis) % len(tensor.shape)
    at = int(index.reshape(())) % int(tensor.shape[axis])
    return te.compute(_sizes(call), lambda *rest: tensor[(*rest[:axis], at, *rest[axis + index.ndim :])], name="taken")


def _part(split: Any, index: int, tensor: te.Tensor) -> te.Tensor:
    """One of the parts of `relax.split`."""
    axis, parts = int(split.attrs.axis) % len(tensor.shape), split.ty.fields
    start = sum(_sizes_of(part)[axis] for part in list(parts)[:index])
    shape = _sizes_of(parts[index])
    return te.compute(shape, lambda *at: tensor[(*at[:axis], at[axis] + start, *at[axis + 1 :])], name="part")


def _sizes_of(tensor_type: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor_type.shape.values)


MOVES: dict[str, Callable[[Any, te.Tensor], te.Tensor]] = {
    "relax.reshape": _reshaped,
    "relax.squeeze": _reshaped,
    "relax.expand_dims": _reshaped,
    "relax.permute_dims": _transposed,
    "relax.strided_slice": _sliced,
    "relax.take": _taken,
}
