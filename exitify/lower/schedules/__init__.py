"""Default schedules, one file a kind of kernel: each takes a PrimFunc as fused and returns it scheduled, or None when it is not of its kind."""

from __future__ import annotations

import tvm
from tvm import tirx

from exitify.lower.schedules import attention, convolution, fallback, layouts, normalization, product, windows, winograd
from exitify.lower.vectors import Vectors

KINDS = (convolution, winograd, windows, layouts, product, attention, normalization, fallback)


def default_schedule(func: tirx.PrimFunc, vectors: Vectors) -> tvm.s_tir.Schedule:
    """The schedule by the first kind that takes the function; as it is, if none does."""
    for kind in KINDS:
        made = kind.schedule(func, vectors)
        if made is not None:
            return made
    return tvm.s_tir.Schedule(func)
