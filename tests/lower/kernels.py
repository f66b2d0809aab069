"""Operators lowered, scheduled, compiled and run as a segment's are, without an artifact round them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from exitify.lower import library
from exitify.lower.library import Kernels
from exitify.lower.processors import Machine, machine_of
from exitify.lower.schedules.blocks import child_blocks
from exitify.lower.vectors import Vectors
from exitify.plan import Cost, Segment
from exitify.targets import load_target

HERE = machine_of(load_target("host"))
UNITS = (Vectors(16, 32), Vectors(8, 16), Vectors(4, 32), Vectors(4, 16))
"""The vector units there are schedules for: AVX-512, AVX2, NEON and SSE. Their kernels all run here; LLVM splits or joins the vectors."""

ROUNDING = 2.0**-23
"""An upper bound of what one float32 operation adds, as a share of the largest number that it meets."""

SEGMENT = Segment("trunk_test", "trunk", (), (), (), (), Cost())

Array = NDArray[Any]


def machine_with(vectors: Vectors) -> Machine:
    """This machine, kernels made as for a processor with another vector unit."""
    return replace(HERE, vectors=vectors)


def module_of(arrays: Sequence[Array], write: Callable[..., Sequence[relax.Expr]]) -> tvm.IRModule:
    """A module whose `main` takes arrays like these.

    Args:
        write: Gets the builder's `emit` and a variable for each array, and returns what `main` gives out.
    """
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(array.shape, str(array.dtype))) for i, array in enumerate(arrays)]
    with builder.function("main", params):
        with builder.dataflow():
            found = builder.emit_output(relax.Tuple(list(write(builder.emit, *params))))
        builder.emit_func_output(found)
    return builder.get()


def lowered(module: tvm.IRModule, machine: Machine = HERE) -> Kernels:
    """The module's operators as kernels, constants inside."""
    return Kernels(library._fused(module, SEGMENT, machine)[0], {}, {})


def function(kernels: Kernels, machine: Machine = HERE, scheduled: Mapping[str, tirx.PrimFunc] | None = None) -> Callable[..., list[Array]]:
    """`main`, compiled; by default schedules where no others are given."""
    executable = library.build(kernels, scheduled or library.scheduled_by_default(kernels, machine), machine)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return lambda *arrays: [tensor.numpy() for tensor in main(*(tvm.runtime.tensor(array) for array in arrays))]


def run(kernels: Kernels, arrays: Sequence[Array], machine: Machine = HERE, scheduled: Mapping[str, tirx.PrimFunc] | None = None) -> list[Array]:
    """What `main` gives out."""
    return function(kernels, machine, scheduled)(*arrays)


def stages(kernel: tirx.PrimFunc) -> list[str]:
    """The names of a kernel's blocks, in the order in which they run."""
    return list(child_blocks(tvm.s_tir.Schedule(kernel)))


def assert_rounded(found: Array, expected: Array, magnitude: Array, terms: int) -> None:
    """That an array of float32 sums is right but for rounding.

    Args:
        expected: In float64. magnitude: The same sums over absolute values. terms: How many are added up.
    """
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_array_less(np.abs(found - expected), terms * ROUNDING * magnitude + 1e-30)
