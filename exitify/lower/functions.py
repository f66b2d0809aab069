"""exp, erf and tanh as arithmetic that LLVM vectorises: TVM leaves them to the C library, which takes one number a call.

Importing this module tells TVM to lower them so for every processor, in this process. Errors are a few units in the last place:
at most 3e-7 of the result (tests/lower/test_functions.py). Sigmoid, softmax, GELU and the like are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

EXP_OF_FRACTION = np.polynomial.Chebyshev.interpolate(np.exp, 6, (-0.35, 0.35)).convert(kind=np.polynomial.Polynomial).coef.tolist()
"""exp(r) for |r| <= ln(2) / 2, off by 2e-9."""
ERF = (
    3.92,
    (1.1283791065216064, 0.19041360914707184, 0.05274967476725578, 0.0037659306544810534, 0.0002848910808097571, 2.050045623036567e-06),
    (1.0, 0.5020824074745178, 0.11411207169294357, 0.014969835057854652, 0.0011626145569607615, 3.809172994806431e-05),
)
TANH = (
    9.01,
    (1.0, 0.1338033676147461, 0.0034947709646075964, 2.0595663954736665e-05, 1.333609045417461e-08),
    (1.0, 0.46713653206825256, 0.02587387152016163, 0.0003284299746155739, 7.768954333187139e-07),
)
"""Odd functions as x P(x²) / Q(x²) up to a largest x, from where they are 1 in float32. Fitted: least squares, weights rising with errors."""
ROUNDER = 1.5 * 2.0**23
"""Added to a small number, it leaves that number rounded in the lowest bits."""
LN2_HIGH = 355 / 512
"""ln(2) to nine bits: its product with a whole number below 2^15 is exact."""


def exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """The exponential.

    It is 2^n exp(r) where x = n ln(2) + r, with 2^n in two factors: neither leaves float32's range before the result does.
    """
    low, high = (_as(x, bound) for bound in (-105.0, 90.0))
    within = tirx.Min(high, tirx.Max(low, x))  # in this order NaN stays NaN
    shifted = _variable("shifted", x)
    whole, fraction = _variable("whole", x), _variable("fraction", x)
    exponent = tirx.reinterpret(_dtype(x, "int32"), shifted) - _as(x, int(np.float32(ROUNDER).view(np.int32)), "int32")
    half = exponent >> _as(x, 1, "int32")
    result = _polynomial(EXP_OF_FRACTION, fraction) * _power_of_two(x, half) * _power_of_two(x, exponent - half)
    clamped = _variable("clamped", x)
    remainder = (clamped - whole * _as(x, LN2_HIGH)) - whole * _as(x, math.log(2) - LN2_HIGH)
    return _let(
        result,
        (clamped, within),
        (shifted, clamped * _as(x, 1 / math.log(2)) + _as(x, ROUNDER)),
        (whole, shifted - _as(x, ROUNDER)),
        (fraction, remainder),
    )


def erf(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """The error function."""
    return _odd(x, *ERF)


def tanh(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """The hyperbolic tangent."""
    return _odd(x, *TANH)


def _odd(x: tirx.PrimExpr, top: float, above: Sequence[float], below: Sequence[float]) -> tirx.PrimExpr:
    clamped, square = _variable("clamped", x), _variable("square", x)
    quotient = clamped * _polynomial(above, square) / _polynomial(below, square)
    return _let(quotient, (clamped, tirx.Min(_as(x, top), tirx.Max(_as(x, -top), x))), (square, clamped * clamped))


def _polynomial(coefficients: Sequence[float], x: tirx.Var) -> tirx.PrimExpr:
    """The sum of coefficient i times x^i."""
    *others, total = (_as(x, float(coefficient)) for coefficient in coefficients)
    for coefficient in reversed(others):
        total = total * x + coefficient
    return total


def _power_of_two(x: tirx.PrimExpr, exponent: tirx.PrimExpr) -> tirx.PrimExpr:
    """2^exponent from its bits in float32."""
    return tirx.reinterpret(_dtype(x, "float32"), (exponent + _as(x, 127, "int32")) << _as(x, 23, "int32"))


def _dtype(x: tirx.PrimExpr, kind: str) -> str:
    """A type with as many lanes as x has."""
    _, lanes, count = str(x.ty.dtype).partition("x")
    return kind + lanes + count


def _as(x: tirx.PrimExpr, value: float, kind: str = "float32") -> tirx.PrimExpr:
    return tirx.const(value, _dtype(x, kind))


def _variable(name: str, x: tirx.PrimExpr) -> tirx.Var:
    return tirx.Var(name, str(x.ty.dtype))


def _let(body: tirx.PrimExpr, *bindings: tuple[tirx.Var, tirx.PrimExpr]) -> tirx.PrimExpr:
    """The body with each variable computed once, the first binding first."""
    for variable, value in reversed(bindings):
        body = tirx.Let(variable, value, body)
    return body


def _register(name: str, function: Callable[[Any], Any]) -> None:
    """Lower TVM's function of that name so where it is of float32 or float16."""

    def rule(call: tirx.Call) -> tirx.PrimExpr:
        (x,) = call.args
        if str(x.ty.dtype).startswith("float32"):
            return function(x)
        if str(x.ty.dtype).startswith("float16"):
            return function(x.astype(_dtype(x, "float32"))).astype(str(x.ty.dtype))
        return call if name == "erf" else tirx.call_llvm_pure_intrin(x.ty.dtype, f"llvm.{name}", x)  # as TVM does

    tirx.op.register_intrin_lowering(f"tirx.{name}", target="llvm", f=rule, level=100)


for _name, _function in (("exp", exp), ("erf", erf), ("tanh", tanh)):
    _register(_name, _function)
