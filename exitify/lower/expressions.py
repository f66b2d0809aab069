"""What passes over Relax functions ask of an expression, and what they tell TVM of a kernel."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

OUT_ELEMENTWISE_FUSABLE, OPAQUE = 4, 8
"""TVM's OpPatternKind: element-wise operators behind a kernel may join it; nothing joins it."""


def operator_of(expression: Any) -> str:
    """The operator that this is a call of, `relax.add`; empty where it is a call of something else, or none."""
    return str(expression.op.name) if isinstance(expression, relax.Call) and isinstance(expression.op, tvm.ir.Op) else ""


def is_known(expression: Any) -> bool:
    """Whether it is an array of numbers."""
    return isinstance(expression, tvm.ir.GenericConst) and isinstance(expression.value, tvm.runtime.Tensor)
