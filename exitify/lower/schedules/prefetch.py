"""Weights asked for before they are needed: a processor does so by itself, but not across pages and not far enough ahead."""

from __future__ import annotations

import math

from tvm.s_tir import Schedule, TensorIntrin
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.script import tirx as T

from exitify.lower.schedules.blocks import extent

AHEAD = 4096
"""float32 values between what is read and what is asked for."""
LINE = 16
"""float32 values in a line of a cache."""


def prefetch(sch: Schedule, block: SBlockRV, buffer: int, loop: LoopRV) -> None:
    """Read an input of a block through registers, a loop's share at a time, and ask for what lies `AHEAD` of it.

    Args:
        buffer: Which of the block's inputs. It is read in the order in which it lies in memory, its last axis whole in each iteration.
    """
    copied = sch.cache_read(block, buffer, "global")
    sch.compute_at(copied, loop, preserve_unit_loops=True)
    last = sch.get_loops(copied)[-1]
    sch.tensorize(last, _copy(extent(sch, last)))


def _copy(size: int) -> str:
    """The name of a copy of so many values, which asks for those `AHEAD` of them."""
    lines, line, ahead, name = math.ceil(size / LINE), min(LINE, size), AHEAD, f"exitify.copy{size}"
    if TensorIntrin.get(name, allow_missing=True):
        return name

    @T.prim_func(s_tir=True)
    def plain(source: T.Buffer((size,), "float32", offset_factor=1), copy: T.Buffer((size,), "float32", offset_factor=1)) -> None:
        with T.sblock("root"):
            T.reads(source[0:size])
            T.writes(copy[0:size])
            for i in range(size):
                with T.sblock("copy"):
                    at = T.axis.spatial(size, i)
                    copy[at] = source[at]

    @T.prim_func(s_tir=True)
    def asking(source: T.Buffer((size,), "float32", offset_factor=1), copy: T.Buffer((size,), "float32", offset_factor=1)) -> None:
        with T.sblock("root"):
            T.reads(source[0:size])
            T.writes(copy[0:size])
            for i in T.unroll(lines):
                T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(source[i * line + ahead]), T.int32(0), T.int32(3), T.int32(1)))
                for v in T.vectorized(line):
                    copy[i * line + v] = source[i * line + v]

    TensorIntrin.register(name, plain, asking)
    return name
