"""The processor at hand: its architecture and what it can do, as the operating system says."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

X86_LEVELS = {
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"),
}
"""What each micro-architecture level adds to the one below (x86-64 psABI 1.0, table 3.1), by Linux's names."""

_ARM_BITS = {"asimd": 1, "fphp": 9, "asimdhp": 10, "asimddp": 20}
"""Bits of AT_HWCAP (Linux, arch/arm64/include/uapi/asm/hwcap.h)."""
_AT_HWCAP = 16


def architecture() -> str:
    """`x86_64`, `aarch64`, or what else the operating system calls it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty where nobody says."""
    if architecture() == "aarch64":
        try:
            bits = ctypes.CDLL(None).getauxval(_AT_HWCAP)
        except (OSError, AttributeError):
            return frozenset()
        return frozenset(name for name, bit in _ARM_BITS.items() if bits >> bit & 1)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            return frozenset(values.split())
    return frozenset()


def model_name() -> str:
    """The processor's name, for people and for tuning records; its architecture where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return architecture()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), architecture())


def x86_level_features(level: str) -> tuple[str, ...]:
    """Everything that a level needs, those below it included."""
    names = list(X86_LEVELS)
    return tuple(sorted(feature for name in names[names.index(level) :] for feature in X86_LEVELS[name]))
