"""exp, erf, tanh and sigmoid as kernels compute them, against the C library's in float64."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from exitify.lower import library
from exitify.lower.processors import machine_of
from exitify.targets import load_target
from tests.lower.kernels import HERE, Array, function, lowered, module_of

COUNT = 1000
CLOSE = 3e-7
"""Of the result."""
SMALLEST = 2.0**-126
"""float32's smallest number with all its digits."""

OPERATORS = {"exp": relax.op.exp, "erf": relax.op.erf, "tanh": relax.op.tanh, "sigmoid": relax.op.sigmoid}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


EXACT: dict[str, Callable[[float], float]] = {"exp": exp, "erf": math.erf, "tanh": math.tanh, "sigmoid": sigmoid}
CALLS = re.compile(r"\b(expf?|erff?|tanhf?|_?ZGV\w*)\b")


def kernels_of(name: str, machine=HERE):
    return lowered(module_of([np.zeros(COUNT, np.float32)], lambda emit, x: [emit(OPERATORS[name](x))]), machine)


@functools.cache
def computed(name: str) -> Callable[[Array], Array]:
    run = function(kernels_of(name))
    return lambda x: run(np.resize(x, COUNT))[0][: len(x)]


def assert_close(name: str, x: Array) -> None:
    found = computed(name)(x).astype(np.float64)
    with np.errstate(over="ignore"):
        expected = np.array([EXACT[name](float(value)) for value in x]).astype(np.float32).astype(np.float64)
    whole = np.isfinite(expected)
    np.testing.assert_array_equal(found[~whole], expected[~whole])
    np.testing.assert_array_less(np.abs(found[whole] - expected[whole]), CLOSE * np.abs(expected[whole]) + SMALLEST)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("bound", [1e-30, 1e-3, 1.0, 4.0, 20.0, 86.0, 120.0, 1e4, 3e38])
def test_functions_are_the_c_librarys_but_for_rounding(name, bound):
    assert_close(name, np.linspace(-bound, bound, COUNT, dtype=np.float32))


@given(name=st.sampled_from(sorted(OPERATORS)), x=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=COUNT))
def test_functions_of_any_numbers_are_the_c_librarys_but_for_rounding(name: str, x: list[float]):
    assert_close(name, np.array(x, np.float32))


@pytest.mark.parametrize(("name", "limits"), [("exp", (0, math.inf, 1)), ("erf", (-1, 1, 0)), ("tanh", (-1, 1, 0)), ("sigmoid", (0, 1, 0.5))])
def test_limits_are_reached_and_nan_stays_nan(name, limits):
    found = computed(name)(np.array([-math.inf, math.inf, 0.0, math.nan], np.float32))
    np.testing.assert_allclose(found, [*limits, math.nan], rtol=CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("name", OPERATORS)
def test_other_types_are_computed_too(name, dtype):
    x = np.linspace(-4, 4, 37).astype(dtype)
    (found,) = function(lowered(module_of([x], lambda emit, x: [emit(OPERATORS[name](x))])))(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, [EXACT[name](float(value)) for value in x], rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("target", ["host", "aarch64-cpu"])
def test_no_function_is_called_for(target):
    machine = machine_of(load_target(target))
    for name in OPERATORS:
        kernels = kernels_of(name, machine)
        for kernel in library.scheduled_by_default(kernels, machine).values():
            code = tvm.compile(kernel.with_attr("global_symbol", "kernel"), target=machine.target).mod.inspect_source("s")
            assert not CALLS.findall(code.replace("kernel", ""))
            assert re.search(r"\b(v?\w+ps|fml[as]\s+v\d+\.4s)\b", code)
