"""What is tuned: each different kernel once, however many segments call it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm_ffi import structural_hash

from exitify.lower.library import AnyMachine, Kernels

MEASURING = 3
"""The way in which kernels are timed: figures of another way are not compared with these. 2: on boards with weights that the cache does not hold.
3: here too, the last cache counted."""


@dataclass(frozen=True)
class Task:
    """A kernel to be tuned.

    name: As the library calls it, for people. key: sha256 of the kernel, the machine and TVM's version: the same in every artifact.
    calls: How often a run of all segments calls it.
    """

    name: str
    kernel: tirx.PrimFunc
    key: str
    calls: int


def tasks_of(kernels: Kernels, machine: AnyMachine) -> list[Task]:
    """The tasks, those of one key joined."""
    calls = calls_of(kernels.module)
    tasks: dict[str, Task] = {}
    for name, kernel in kernels.kernels.items():
        key = task_key(kernel, machine)
        known = tasks.get(key)
        tasks[key] = Task(known.name if known else name, kernel, key, calls[name] + (known.calls if known else 0))
    return list(tasks.values())


def calls_of(module: tvm.IRModule, functions: Collection[str] | None = None) -> Counter[str]:
    """How often each kernel is called by these functions of a module, each run once; None is all of them."""
    calls: Counter[str] = Counter()

    def note(expression: Any) -> None:
        if isinstance(expression, relax.Call) and expression.args and isinstance(expression.args[0], tvm.ir.GlobalVar):
            calls[expression.args[0].name_hint] += 1

    for variable, function in module.functions.items():
        if isinstance(function, relax.Function) and (functions is None or variable.name_hint in functions):
            relax.analysis.post_order_visit(function, note)
    return calls


def task_key(kernel: tirx.PrimFunc, machine: AnyMachine) -> str:
    """The content hash under which a kernel's measurements are kept; names of variables do not count."""
    structure = structural_hash(kernel.without_attr("global_symbol"), map_free_vars=True)
    parts = (structure, *machine.identity, MEASURING, importlib.metadata.version("apache-tvm"))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
