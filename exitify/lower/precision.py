"""float16 where it pays: weights of convolutions and products, and what these read; all else stays float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from exitify.lower.expressions import is_known, operator_of


def to_half(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with its convolutions and its products with known weights over float16, their results float32.

    Left in float32: grouped convolutions, which move more than they multiply; products of two activations; a head's classifier, whose
    weights are arguments; and norms, softmax, pooling, scores and every addition, which lose digits that later layers cannot give back.
    """
    changed = tvm.IRModule(dict(module.functions_items()))
    changed[module.get_global_var("main")] = _Half(module).visit_expr(module["main"])
    return changed


@mutator
class _Half(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        kind = operator_of(call)
        if kind not in ("relax.nn.conv2d", "relax.matmul") or not is_known(call.args[1]) or call.args[1].value.dtype != "float32":
            return call
        data = relax.op.astype(call.args[0], "float16")
        weight = relax.const(call.args[1].value.numpy().astype(np.float16))
        if kind == "relax.matmul":
            return relax.op.matmul(data, weight, out_dtype="float32")
        attributes = call.attrs
        if attributes.groups != 1:
            return call
        sizes = {name: [int(n) for n in getattr(attributes, name)] for name in ("strides", "padding", "dilation")}
        layouts = {name: getattr(attributes, name) for name in ("data_layout", "kernel_layout", "out_layout")}
        return relax.op.nn.conv2d(data, weight, **sizes, **layouts, groups=1, out_dtype="float32")
