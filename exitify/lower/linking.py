"""The linker: shared libraries for the target's architecture, without that target's C library or compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from exitify.errors import ExitifyError

_LINKERS = {"x86_64": ("x86_64-linux-gnu-ld", "elf_x86_64"), "aarch64": ("aarch64-linux-gnu-ld", "aarch64linux")}
"""GNU's cross linker, and ld's name of the output format, by architecture."""


class NoLinker(ExitifyError):
    """No linker for the target's architecture was found."""


def linker(architecture: str, native: str) -> list[str]:
    """Return the command that links for an architecture, flags included.

    Looked for in this order: `$EXITIFY_<ARCHITECTURE>_LD`, GNU's linker for it, the machine's own where that is its
    architecture, LLVM's, and the one in the PyPI package ziglang. Compiled kernels need no C library, so that any of them does.

    Args:
        architecture: `aarch64` or `x86_64`. native: That of the machine at hand.

    Raises:
        NoLinker: none is there; the hint names what to install.
    """
    variable = f"EXITIFY_{architecture.upper()}_LD"
    gnu, emulation = _LINKERS[architecture]
    chosen = os.environ.get(variable)
    if chosen:
        if not shutil.which(chosen):
            raise NoLinker(f"${variable} is {chosen!r}, which is no program", "give the path of a linker")
        return [chosen]
    for name in (gnu, *(["ld"] if architecture == native else [])):
        if shutil.which(name):
            return [name]
    if shutil.which("ld.lld"):
        return ["ld.lld", "-m", emulation]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "ld.lld", "-m", emulation]
    package = f"binutils-{architecture.replace('_', '-')}-linux-gnu"
    raise NoLinker(
        f"no linker for {architecture} was found (${variable}, {gnu}, ld.lld)", f"install one: apt install {package}, or pip install ziglang"
    )


def link_with(command: Sequence[str]) -> Any:
    """What TVM's `export_library` is given to make a shared library of object files.

    `-z now`: a symbol that is missing is an error when the library is loaded, not when a function is called.
    """

    def link(output: str, objects: Sequence[str], **_: object) -> None:
        arguments = ["-shared", "-z", "now", "--strip-all", "-o", output, *objects]
        try:
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
        except OSError as error:
            raise ExitifyError(f"linking with {command[0]} failed: {error.strerror}", "choose another linker; see docs/tvm.md") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ExitifyError(f"linking with {command[0]} failed: {said[-1] if said else done.returncode}", "choose another linker; see docs/tvm.md")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link
