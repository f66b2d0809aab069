"""A board's processor as TVM's target and as a vector unit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import tvm

from exitify.lower.vectors import Vectors
from exitify.targets import Target, TargetError, processor

_LINUX_NAMES = {"neon": "asimd", "fullfp16": "asimdhp", "dotprod": "asimddp"}
"""Linux's name of a feature, by LLVM's."""


@dataclass(frozen=True)
class Machine:
    """What code is made for.

    triple, cpu: LLVM's. attributes: LLVM's features, with + or -. features: What it needs, by Linux's names.
    tuned_on: What measurements hold for: a board, or this machine's processor.
    """

    triple: str
    cpu: str
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    cores: int
    vectors: Vectors
    tuned_on: str

    @property
    def host(self) -> Machine:
        """The processor that calls the kernels: itself."""
        return self

    @property
    def architecture(self) -> str:
        """`aarch64`, as the operating system calls it."""
        return self.triple.split("-")[0]

    @property
    def description(self) -> dict[str, Any]:
        """TVM's target as plain values."""
        described: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu, "num-cores": self.cores}
        return {**described, "mattr": list(self.attributes)} if self.attributes else described

    @property
    def identity(self) -> tuple[object, ...]:
        """What measurements depend on."""
        return self.triple, self.cpu, self.attributes, self.vectors, self.tuned_on

    @property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return tvm.target.Target(self.description)

    @property
    def is_here(self) -> bool:
        """Whether the machine at hand can run the code."""
        return self.architecture == processor.architecture() and set(self.features) <= processor.features()


def machine_of(board: Target) -> Machine:
    """Return what to make code for.

    Raises:
        TargetError: the processor's architecture has no schedules here.
    """
    triple = f"{processor.architecture()}-linux-gnu" if board.cpu.triple == "native" else board.cpu.triple
    cores = board.cpu.cores or os.cpu_count() or 1
    architecture = triple.split("-")[0]
    if architecture == "aarch64":
        here = processor.features()
        names = board.cpu.features if board.cpu.name != "native" else tuple(name for name, linux in _LINUX_NAMES.items() if linux in here)
        for name in names:
            if name not in _LINUX_NAMES:
                known = ", ".join(_LINUX_NAMES)
                raise TargetError(f"the target {board.name!r} has the feature {name!r}, which no device could be asked for", f"exitify knows {known}")
        cpu = "generic" if board.cpu.name == "native" else board.cpu.name
        needed = tuple(sorted(_LINUX_NAMES[name] for name in names))
        tuned_on = processor.model_name() if board.cpu.name == "native" else board.name
        return Machine(triple, cpu, tuple(f"+{name}" for name in names), needed, cores, Vectors(4, 32), tuned_on)
    if architecture == "x86_64":
        level = _level() if board.cpu.name == "native" else board.cpu.name
        if level in processor.X86_LEVELS:
            vectors = {"x86-64-v4": Vectors(16, 32), "x86-64-v3": Vectors(8, 16), "x86-64-v2": Vectors(4, 16)}[level]
            # Left to itself LLVM splits vectors of 512 bits at this level.
            attributes = ("-prefer-256-bit",) if level == "x86-64-v4" else ()
            tuned_on = processor.model_name() if board.cpu.name == "native" else board.name
            return Machine(triple, level, attributes, processor.x86_level_features(level), cores, vectors, tuned_on)
        raise TargetError(f"the target {board.name!r} has the processor {level!r}", f"exitify compiles for {', '.join(processor.X86_LEVELS)}")
    raise TargetError(f"the target {board.name!r} is for {triple!r}", "exitify compiles for aarch64 and x86_64")


def _level() -> str:
    """The highest level that the machine at hand has."""
    here = processor.features()
    for level in processor.X86_LEVELS:
        if set(processor.x86_level_features(level)) <= here:
            return level
    return "x86-64-v2"
