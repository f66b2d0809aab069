"""Where TVM's runtime library is, found without importing tvm, which would bring the compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def runtime_library() -> Path:
    """Return the path of `libtvm_runtime.so`.

    Raises:
        ModuleNotFoundError: TVM's runtime is not installed.
    """
    found = importlib.util.find_spec("tvm")
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder) / "lib" / "libtvm_runtime.so"
        if path.is_file():
            return path
    raise ModuleNotFoundError("no libtvm_runtime.so", name="apache-tvm")
