"""From an artifact's segments to a library for one target. All knowledge of TVM's compiler is here; torch is not needed."""

from __future__ import annotations

import importlib.metadata
import re

from exitify.errors import EngineError

_PAIR = {"apache-tvm": ((0, 27), (0, 28)), "apache-tvm-ffi": ((0, 1, 14), (0, 1, 15))}
"""Versions that work together, from and below: with tvm-ffi 0.1.15 MetaSchedule of TVM 0.27 ends the process (docs/tvm.md)."""


def _require_versions() -> None:
    """Refuse a pair of versions that would crash, before it is imported."""
    for package, (first, below) in _PAIR.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"no {package}", name="tvm") from error
        numbers = tuple(int(n) for n in re.findall(r"\d+", found)[: len(below)])
        if not first <= numbers < below:
            wanted = f"{package}>={'.'.join(map(str, first))},<{'.'.join(map(str, below))}"
            raise EngineError(f"{package} {found} is installed, which exitify does not work with", f"pip install '{wanted}'")


_require_versions()
