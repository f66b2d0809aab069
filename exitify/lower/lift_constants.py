"""Weights out of the code: a function's large constants become arguments behind its own."""

from __future__ import annotations

from typing import Any

import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def lift_constants(function: relax.Function) -> tuple[relax.Function, list[NDArray[Any]]]:
    """Return the function with an argument more for each constant that is no scalar, and those constants in that order."""
    lift = _Lift()
    body = lift.visit_expr(function.body)
    lifted = relax.Function([*function.params, *lift.params], body, function.ret_ty, function.is_pure, function.attrs)
    return lifted, [constant.value.numpy() for constant in lift.constants]


@mutator
class _Lift(PyExprMutator):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.constants: list[Any] = []
        self.params: list[relax.Var] = []

    def visit_generic_const_(self, constant: Any) -> Any:
        if not isinstance(constant.value, tvm.runtime.Tensor) or not constant.value.shape:
            return constant
        for known, param in zip(self.constants, self.params):
            if known.same_as(constant):
                return param
        self.constants.append(constant)
        self.params.append(relax.Var(f"weight{len(self.params)}", constant.ty))
        return self.params[-1]
