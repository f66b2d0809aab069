"""Feature maps in blocks of channels: how a segment's convolutions hand each other what they computed.

Within a segment an image `(N, C, H, W)` becomes `(N, ceil(C / b), H, W, b)`, b the lanes of a vector register: channel c stands
at `[c // b, ..., c % b]`. Convolutions, pooling and what is done to each value keep it there; what knows rows of images alone is
given them, and what a segment takes and gives is rows of images too. Channels past C hold finite numbers, which
no weight but 0 multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from exitify.lower import windows, winograd
from exitify.lower.convolution import Shape, channels_together, pack_weight, packed_convolution
from exitify.lower.expressions import OPAQUE, OUT_ELEMENTWISE_FUSABLE, is_known, operator_of
from exitify.lower.resizing import resized
from exitify.lower.vectors import Vectors
from exitify.runtime.engines.blocks import in_blocks

ONE_BY_ONE = frozenset(
    f"relax.{name}"
    for name in (
        "nn.relu",
        "nn.leakyrelu",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.silu",
        "clip",
        "sigmoid",
        "tanh",
        "erf",
        "exp",
        "negative",
        "abs",
        "astype",
    )
)
"""Operators on each value alone that make no infinity of the numbers past the last channel."""

TWO_BY_TWO = frozenset(f"relax.{name}" for name in ("add", "subtract", "multiply", "maximum", "minimum", "divide"))
"""The same of two values; `divide` by numbers that are known alone."""


@dataclass(frozen=True)
class Borders:
    """How a function takes and gives feature maps.

    taken: Its inputs that come in blocks, by number. given: Its outputs that are given in blocks. may: Those that are, if they are in blocks anyway.
    """

    taken: Collection[int] = ()
    given: Collection[int] = ()
    may: Collection[int] = ()


IN_ROWS = Borders()


def to_blocks(module: tvm.IRModule, vectors: Vectors, borders: Borders = IN_ROWS) -> tuple[tvm.IRModule, frozenset[int]]:
    """Return the module with `main` computing in blocks of channels where it can, and which of its outputs are in blocks."""
    blocks = _Blocks(module, vectors, borders)
    main = module.get_global_var("main")
    blocks.builder_.update_func(main, blocks.function(module["main"]))
    return blocks.builder_.get(), frozenset(blocks.given)


def into_blocks(image: te.Tensor, block: int, *, channels_last: bool = False) -> te.Tensor:
    """Return `(N, C, H, W)`, or with the channels last `(N, H, W, C)`, in blocks, zeros past the last channel."""
    images, channels, height, width = (image.shape[axis] for axis in ((0, 3, 1, 2) if channels_last else (0, 1, 2, 3)))
    whole = int(channels) % block == 0

    def value(n: Any, c: Any, y: Any, x: Any, v: Any) -> Any:
        channel = c * block + v
        found = image[n, y, x, channel] if channels_last else image[n, channel, y, x]
        return found if whole else tirx.if_then_else(channel < channels, found, tirx.const(0, image.dtype))

    return te.compute((images, -(-int(channels) // block), height, width, block), value, name="into_blocks")


def out_of_blocks(blocks: te.Tensor, channels: int) -> te.Tensor:
    """Return what is in blocks as `(N, C, H, W)`."""
    images, _, height, width, block = blocks.shape
    return te.compute((images, channels, height, width), lambda n, c, y, x: blocks[n, c // block, y, x, c % block], name="out_of_blocks")


def channels_last(blocks: te.Tensor, channels: int) -> te.Tensor:
    """Return what is in blocks as `(N, H, W, C)`."""
    images, _, height, width, block = blocks.shape
    return te.compute((images, height, width, channels), lambda n, y, x, c: blocks[n, c // block, y, x, c % block], name="channels_last")


@mutator
class _Blocks(PyExprMutator):  # type: ignore[misc]
    """Goes through a function and keeps, for each value, the forms that there are of it.

    in_blocks: Values in blocks, by the variable they stand for. in_rows: What has this form too. given: Outputs in blocks, by number.
    """

    def __init__(self, module: tvm.IRModule, vectors: Vectors, borders: Borders) -> None:
        super().__init__(module)
        self.vectors, self.block, self.borders = vectors, vectors.lanes, borders
        self.given: set[int] = set()
        self.in_blocks: dict[Any, relax.Var] = {}
        self.in_rows: set[Any] = set()
        self.rules: dict[str, Callable[[relax.Call], relax.Expr | None]] = {
            "relax.nn.conv2d": self._convolution,
            "relax.nn.max_pool2d": self._pool,
            "relax.nn.avg_pool2d": self._pool,
            "relax.nn.adaptive_avg_pool2d": self._adaptive_pool,
            "relax.image.resize2d": self._resize,
            "relax.mean": self._mean,
            "relax.concat": self._concat,
            "relax.permute_dims": self._from_channels_last,
            "relax.strided_slice": self._slice,
            "relax.call_tir": self._limit,
            **dict.fromkeys(ONE_BY_ONE, self._one_by_one),
            **dict.fromkeys(TWO_BY_TWO, self._two_by_two),
        }

        self.leaving: dict[str, Callable[[relax.Call], relax.Expr | None]] = {
            "relax.permute_dims": self._channels_last,
            "relax.mean": self._mean_in_rows,
            "relax.reshape": self._flat,
            "relax.squeeze": self._flat,
        }

    def function(self, function: relax.Function) -> relax.Function:
        """The function with what it takes, computes and gives in blocks."""
        params = list(function.params)
        for number in self.borders.taken:
            images, channels, height, width = _sizes(params[number])
            shape = (images, -(-channels // self.block), height, width, self.block)
            given = relax.Var(params[number].name, relax.TensorType(shape, params[number].ty.dtype))
            self.in_blocks[function.params[number]] = params[number] = given
        body = self.visit_with_new_scope(function.body)
        return relax.Function(params, body, None, function.is_pure, function.attrs)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        call, is_output = binding.value, not isinstance(binding.var, relax.DataflowVar)
        if is_output and self._give(binding):
            return
        name = operator_of(call)
        rows = self.leaving[name](call) if name in self.leaving else None
        if rows is not None:
            self.set_var_remap(binding.var, self.builder_.emit_output(rows) if is_output else self.builder_.emit(rows))
            return
        made = self.rules[name](call) if name in self.rules else None
        if made is None:
            super().visit_var_binding_(binding)
            return
        self.in_blocks[binding.var] = self.builder_.emit(made)
        if is_output and 0 in {*self.borders.given, *self.borders.may}:
            self.given = {0}
            self.in_rows.add(binding.var)
            self.set_var_remap(binding.var, self.builder_.emit_output(self.in_blocks[binding.var]))
        elif is_output:
            self.in_rows.add(binding.var)
            self.set_var_remap(binding.var, self.builder_.emit_output(self._rows_of(binding.var)))

    def visit_dataflow_var_(self, var: relax.Var) -> relax.Expr:
        return self.visit_var_(var)

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        if var in self.in_blocks and var not in self.in_rows:
            self.in_rows.add(var)
            self.set_var_remap(var, self.builder_.emit(self._rows_of(var)))
        remapped = self.get_var_remap(var)
        return remapped if remapped is not None else var

    def _give(self, binding: relax.VarBinding) -> bool:
        """Emit the outputs, if this binding is of them and one is given in blocks."""
        several = isinstance(binding.value, relax.Tuple)
        values = list(binding.value.fields) if several else [binding.value]
        if not all(isinstance(value, relax.Var) for value in values):
            return False
        self.given = {
            number for number, value in enumerate(values) if number in self.borders.given or (number in self.borders.may and self._is_blocked(value))
        }
        if not self.given:
            return False
        found = [self._blocks_of(value) if number in self.given else self.visit_expr(value) for number, value in enumerate(values)]
        self.in_rows.add(binding.var)
        self.set_var_remap(binding.var, self.builder_.emit_output(relax.Tuple(found) if several else found[0]))
        return True

    # --- forms of a value

    def _rows_of(self, var: relax.Var) -> relax.Expr:
        channels = int(var.ty.shape[1])
        return self._call(lambda blocks: out_of_blocks(blocks, channels), self.in_blocks[var], name="out_of_blocks", pattern=OPAQUE)

    def _blocks_of(self, var: relax.Var) -> relax.Expr:
        if var not in self.in_blocks:
            rows = self.visit_expr(var)
            made = self._call(lambda image: into_blocks(image, self.block), rows, name="into_blocks", pattern=OPAQUE)
            self.in_blocks[var] = self.builder_.emit(made)
            self.in_rows.add(var)
        return self.in_blocks[var]

    def _is_blocked(self, value: relax.Expr) -> bool:
        return isinstance(value, relax.Var) and value in self.in_blocks

    def _call(self, compute: Callable[..., te.Tensor], *given: relax.Expr, name: str, pattern: int) -> relax.Expr:
        return self.builder_.call_te(compute, *given, primfunc_name_hint=name, primfunc_attrs={"op_pattern": pattern})

    # --- operators

    def _convolution(self, call: relax.Call) -> relax.Expr | None:
        data, weight = call.args
        attributes = call.attrs
        is_plain = (attributes.data_layout, attributes.kernel_layout, attributes.out_layout) == ("NCHW", "OIHW", "NCHW")
        if not (is_plain and is_known(weight) and call.ty.dtype == "float32" and isinstance(data, relax.Var) and _sizes(data) and _sizes(call)):
            return None
        array = weight.value.numpy()
        shape = _shape(data, attributes.strides, attributes.padding, attributes.dilation, array.shape[0], array.shape[2:], attributes.groups)
        if shape.is_depthwise and data.ty.dtype == "float32":
            packed = relax.const(windows.pack_depthwise(array, self.block))
            return self._call(
                lambda image, filters: windows.depthwise(image, filters, shape),
                self._blocks_of(data),
                packed,
                name="depthwise",
                pattern=OUT_ELEMENTWISE_FUSABLE,
            )
        by_winograd = winograd.tile_of(shape, self.vectors) if shape.groups == 1 and data.ty.dtype == "float32" else 0
        if by_winograd:
            return winograd.convolution(self.builder_, self._blocks_of(data), array, shape, self.vectors, by_winograd)
        tile = self.vectors.of(str(data.ty.dtype)).tile(shape)
        read = shape.channels_read(tile.filters)
        if not read:
            return None
        given = self._blocks_of(data) if self._is_blocked(data) else self.visit_expr(data)
        packed = relax.const(pack_weight(array, shape, tile.filters, channels_together(read, self.block)))
        return self._call(
            lambda image, filters: packed_convolution(image, filters, shape, tile, self.block),
            given,
            packed,
            name="convolution",
            pattern=OUT_ELEMENTWISE_FUSABLE,
        )

    def _one_by_one(self, call: relax.Call) -> relax.Expr | None:
        value, *rest = call.args
        if not self._is_blocked(value):
            return None
        return relax.Call(call.op, [self._blocks_of(value), *rest], call.attrs)

    def _two_by_two(self, call: relax.Call) -> relax.Expr | None:
        if not any(self._is_blocked(value) for value in call.args) or not _sizes(call) or len(call.ty.shape) != 4:
            return None
        if call.op.name == "relax.divide" and not (is_known(call.args[1]) and call.args[1].value.numpy().size == 1):
            return None
        channels = int(call.ty.shape[1])
        given = [self._operand(value, channels) for value in call.args]
        if any(value is None for value in given):
            return None
        pixels = [math.prod(_sizes(value)[2:4]) if isinstance(value, relax.Var) else 0 for value in call.args]
        if all(pixels) and pixels[0] != pixels[1]:  # a gate of one pixel is not computed again at each
            joined = {"relax.multiply": lambda a, b: a * b, "relax.add": lambda a, b: a + b}.get(call.op.name)
            if joined is None:
                return None
            return self._call(lambda a, b: _broadcast(a, b, joined), *given, name="gated", pattern=OPAQUE)
        return relax.Call(call.op, given, call.attrs)

    def _operand(self, value: relax.Expr, channels: int) -> relax.Expr | None:
        """What stands for it beside so many channels in blocks; None where nothing can."""
        if isinstance(value, relax.Var):
            return self._blocks_of(value) if _sizes(value) and int(value.ty.shape[1]) == channels else None
        if not is_known(value):
            return None
        array = value.value.numpy()
        if array.size == 1:
            return relax.const(array.reshape(()))
        if array.ndim not in (3, 4):
            return None
        return relax.const(in_blocks(array, self.block) if array.shape[-3] == channels else array.reshape(-1, 1, *array.shape[-2:], 1))

    def _pool(self, call: relax.Call) -> relax.Expr | None:
        (data,), attributes = call.args, call.attrs
        if not self._is_blocked(data) or attributes.layout != "NCHW" or attributes.out_layout != "NCHW":
            return None
        channels = int(call.ty.shape[1])
        shape = _shape(data, attributes.strides, attributes.padding, attributes.dilation, channels, attributes.pool_size, channels)
        out = tuple(int(size) for size in list(call.ty.shape)[2:])
        if (shape.out_height, shape.out_width) != out or call.ty.dtype != "float32":  # rounded up
            return None
        if call.op.name == "relax.nn.max_pool2d":
            return self._call(lambda image: windows.max_pool(image, shape), self._blocks_of(data), name="max_pool", pattern=OPAQUE)
        counts = bool(attributes.count_include_pad)
        return self._call(
            lambda image: windows.average_pool(image, shape, counts_border=counts), self._blocks_of(data), name="average_pool", pattern=OPAQUE
        )

    def _adaptive_pool(self, call: relax.Call) -> relax.Expr | None:
        (data,), attributes = call.args, call.attrs
        if not self._is_blocked(data) or attributes.layout != "NCHW" or [int(size) for size in list(call.ty.shape)[2:]] != [1, 1]:
            return None
        return self._call(windows.channel_means, self._blocks_of(data), name="channel_means", pattern=OPAQUE)

    def _resize(self, call: relax.Call) -> relax.Expr | None:
        (data, size), attributes = call.args, call.attrs
        if not self._is_blocked(data) or attributes.layout != "NCHW":
            return None
        height, width = (int(length) for length in size)
        return self._call(lambda image: resized(image, (height, width), attributes), self._blocks_of(data), name="resize", pattern=OPAQUE)

    def _mean(self, call: relax.Call) -> relax.Expr | None:
        (data,), attributes = call.args, call.attrs
        axes = sorted(int(axis) % 4 for axis in attributes.axis or ())
        if not self._is_blocked(data) or axes != [2, 3] or not attributes.keepdims:
            return None
        return self._call(windows.channel_means, self._blocks_of(data), name="channel_means", pattern=OPAQUE)

    def _concat(self, call: relax.Call) -> relax.Expr | None:
        parts = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else ()
        if not parts or not any(self._is_blocked(part) for part in parts) or int(call.attrs.axis) % 4 != 1:
            return None
        if not all(isinstance(part, relax.Var) and _sizes(part) and int(part.ty.shape[1]) % self.block == 0 for part in parts):
            return None
        return relax.Call(call.op, [relax.Tuple([self._blocks_of(part) for part in parts])], call.attrs)

    def _mean_in_rows(self, call: relax.Call) -> relax.Expr | None:
        (data,), axes = call.args, sorted(int(axis) % 4 for axis in call.attrs.axis or ())
        if not self._is_blocked(data) or axes != [2, 3] or call.attrs.keepdims:
            return None
        means = self.builder_.emit(self._call(windows.channel_means, self._blocks_of(data), name="channel_means", pattern=OPAQUE))
        return self._in_a_row(means, int(data.ty.shape[1]))

    def _flat(self, call: relax.Call) -> relax.Expr | None:
        """One pixel, `(N, C, 1, 1)`, as a row."""
        data = call.args[0]
        if not self._is_blocked(data) or _sizes(data) != [*map(int, call.ty.shape), 1, 1]:
            return None
        return self._in_a_row(self._blocks_of(data), _sizes(data)[1])

    def _in_a_row(self, pixel: relax.Var, channels: int) -> relax.Expr:
        """`(N, ceil(C / b), 1, 1, b)` as `(N, C)`."""
        images, blocks, *_, block = (int(size) for size in pixel.ty.shape)
        if blocks * block == channels:
            return relax.op.reshape(pixel, (images, channels))
        return self._call(
            lambda found: te.compute((images, channels), lambda n, c: found[n, c // block, 0, 0, c % block], name="in_a_row"),
            pixel,
            name="in_a_row",
            pattern=OPAQUE,
        )

    def _slice(self, call: relax.Call) -> relax.Expr | None:
        """Rows and columns of the image that are some apart; or all of one axis, which is the image itself."""
        data, *given = call.args
        if not self._is_blocked(data) or not all(isinstance(values, relax.Tuple) for values in given):
            return None
        axes, begins, ends, strides = ([int(value) for value in values.fields] for values in given)
        sizes, kept = _sizes(data), [i for i, axis in enumerate(axes) if axis % 4 in (2, 3)]
        if any((begins[i], strides[i]) != (0, 1) or ends[i] < sizes[axis] for i, axis in enumerate(axes) if i not in kept):
            return None
        if not kept:
            return self._blocks_of(data)
        picked = ([values[i] for i in kept] for values in (axes, begins, ends, strides))
        return relax.op.strided_slice(self._blocks_of(data), *picked)

    def _channels_last(self, call: relax.Call) -> relax.Expr | None:
        """Channels moved to the end, out of the blocks at once."""
        (data,), axes = call.args, [int(axis) for axis in call.attrs.axes or ()]
        if axes != [0, 2, 3, 1] or not self._is_blocked(data):
            return None
        channels = int(data.ty.shape[1])
        return self._call(lambda blocks: channels_last(blocks, channels), self._blocks_of(data), name="channels_last", pattern=OPAQUE)

    def _from_channels_last(self, call: relax.Call) -> relax.Expr | None:
        """Channels moved back from the end, into blocks at once."""
        (data,), axes = call.args, [int(axis) for axis in call.attrs.axes or ()]
        if axes != [0, 3, 1, 2] or not (isinstance(data, relax.Var) and _sizes(data) and data.ty.dtype == "float32"):
            return None
        rows = self.visit_expr(data)
        return self._call(lambda image: into_blocks(image, self.block, channels_last=True), rows, name="into_blocks", pattern=OPAQUE)

    def _limit(self, call: relax.Call) -> relax.Expr | None:
        """A clip, of which TVM's importer makes kernels at once."""
        operator = {"maximum": relax.op.maximum, "minimum": relax.op.minimum}.get(call.args[0].name_hint.rstrip("0123456789"))
        given = call.args[1].fields
        is_limit = len(given) == 2 and is_known(given[1]) and not given[1].value.shape
        return operator(self._blocks_of(given[0]), given[1]) if operator is not None and is_limit and self._is_blocked(given[0]) else None


def _broadcast(a: te.Tensor, b: te.Tensor, join: Callable[[Any, Any], Any]) -> te.Tensor:
    sizes = [max(int(one), int(other)) for one, other in zip(a.shape, b.shape)]

    def of(tensor: te.Tensor, at: tuple[Any, ...]) -> Any:
        return tensor[tuple(0 if int(size) == 1 else place for size, place in zip(tensor.shape, at))]

    return te.compute(sizes, lambda *at: join(of(a, at), of(b, at)), name="gated")


def _sizes(value: relax.Expr) -> list[int]:
    """The sizes of an image; none where they are not known, or it is none."""
    shape = getattr(value.ty, "shape", None)
    if shape is None or len(shape) != 4 or not all(isinstance(size, (int, tirx.IntImm)) for size in shape):
        return []
    return [int(size) for size in shape]


def _shape(data: relax.Var, strides: Any, padding: Any, dilation: Any, filters: int, kernel: Any, groups: int) -> Shape:
    _, channels, height, width = _sizes(data)
    first, second, third = (tuple(int(n) for n in field) for field in (strides, padding, dilation))
    return Shape(channels, height, width, filters, tuple(int(n) for n in kernel), first, second, third, int(groups))  # type: ignore[arg-type]
