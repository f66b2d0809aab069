"""A tile of a product in registers, its weights asked for before they are needed.

A processor asks ahead by itself, but not across pages and not far enough: products whose weights come from memory took 1.3 times as long.
"""

from __future__ import annotations

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812

AHEAD = 4096
"""float32 values between the weights that are read and those that are asked for."""
LINE = 16
"""float32 values in a line of a cache."""


def product_of_tile(rows: int, columns: int, depth: int, lanes: int, *, ahead: int = AHEAD, unrolled: int = 1) -> str:
    """The name of an intrinsic for `tensorize`: `(rows, depth)` times `(depth, columns)` added to `(rows, columns)`.

    The loops that it takes the place of go over depth, rows and columns, from outside. The columns are lanes of vectors; the tile is added up
    in registers, and the weights, the second factor, lie in memory in the order in which they are read.

    Args:
        ahead: See `AHEAD`; 0 asks for nothing. unrolled: How many steps over the depth, which they divide, are written out.
    """
    name = f"exitify.product_{rows}_{columns}_{depth}_{lanes}_{ahead}_{unrolled}"
    if TensorIntrin.get(name, allow_missing=True):
        return name
    line, vectors, weights = LINE, columns // lanes, columns * depth if ahead else 0

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def plain(x: T.handle, w: T.handle, y: T.handle) -> None:
        between, apart = T.int64(), T.int64()
        left = T.match_buffer(x, (rows, depth), "float32", strides=[between, 1], offset_factor=1)
        right = T.match_buffer(w, (depth, columns), "float32", offset_factor=1)
        sums = T.match_buffer(y, (rows, columns), "float32", strides=[apart, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns], left[0:rows, 0:depth], right[0:depth, 0:columns])
            T.writes(sums[0:rows, 0:columns])
            for k, i, j in T.grid(depth, rows, columns):
                with T.sblock("update"):
                    row, column, z = T.axis.remap("SSR", [i, j, k])
                    sums[row, column] = sums[row, column] + left[row, z] * right[z, column]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def in_registers(x: T.handle, w: T.handle, y: T.handle) -> None:
        between, apart = T.int64(), T.int64()
        left = T.match_buffer(x, (rows, depth), "float32", strides=[between, 1], offset_factor=1)
        right = T.match_buffer(w, (depth, columns), "float32", offset_factor=1)
        sums = T.match_buffer(y, (rows, columns), "float32", strides=[apart, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:rows, 0:columns], left[0:rows, 0:depth], right[0:depth, 0:columns])
            T.writes(sums[0:rows, 0:columns])
            for i in range((weights + line - 1) // line):
                T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(right[0, i * line + ahead]), T.int32(0), T.int32(3), T.int32(1)))
            for outer in range(depth // unrolled):
                for inner in T.unroll(unrolled):
                    for i in T.unroll(rows):
                        for j in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                sums[i, j * lanes + v] = (
                                    sums[i, j * lanes + v] + left[i, outer * unrolled + inner] * right[outer * unrolled + inner, j * lanes + v]
                                )

    TensorIntrin.register(name, plain, in_registers)
    return name
