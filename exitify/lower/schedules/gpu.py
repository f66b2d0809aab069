"""Default schedules for GPUs: dlight's rules, the first that takes a kernel."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import dlight

RULES = (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction, dlight.gpu.Fallback)
"""Products and convolutions first; the last takes anything, one thread a value."""


def default_schedule(func: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc:
    """The kernel, scheduled by the first rule that takes it."""
    with target:
        for rule in RULES:
            made = rule().apply(func, target, False)
            if made is not None:
                return (made[0] if isinstance(made, list) else made).mod["main"]
    raise AssertionError(f"no rule takes {func}")
