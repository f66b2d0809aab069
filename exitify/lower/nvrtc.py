"""CUDA source to machine code, on a machine without a GPU: NVIDIA's run-time compiler, from PyPI or a CUDA toolkit."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exitify.errors import ExitifyError

Version = tuple[int, int]

_PTX_VERSION = re.compile(rb"^\.version (\d+\.\d+)$", re.MULTILINE)


class NoCompiler(ExitifyError):
    """No NVRTC was found whose code the driver would load."""


@dataclass(frozen=True)
class GpuCode:
    """Kernels for one GPU architecture.

    cubin: Machine code for that architecture alone. ptx: What a driver compiles for it and for newer ones, text.
    compiler: NVRTC's version, `12.6`. ptx_version: Of the language, `8.5`.
    """

    cubin: bytes
    ptx: bytes
    compiler: str
    ptx_version: str


@dataclass(frozen=True)
class Compiler:
    """An NVRTC.

    library: Its shared object. headers: Folders with CUDA's headers.
    """

    library: Path
    headers: tuple[Path, ...]

    @property
    def version(self) -> Version:
        """Of CUDA, as the library itself says."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        _check(self._calls, self._calls.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return major.value, minor.value

    @property
    def _calls(self) -> ctypes.CDLL:
        return _load(self.library)

    def compile(self, source: str, architecture: str) -> GpuCode:
        """Return the kernels in a CUDA source.

        Without `--use_fast_math`, which TVM would give: thresholds were found with exact exponentials and divisions.

        Raises:
            ExitifyError: NVRTC refuses it; its first error is in the message.
        """
        calls, program = self._calls, ctypes.c_void_p()
        _check(calls, calls.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
        try:
            options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", "-w", *(f"-I{folder}" for folder in self.headers)]
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if calls.nvrtcCompileProgram(program, len(options), given):
                said = _read(calls, program, "ProgramLog").decode(errors="replace")
                first = next((line for line in said.splitlines() if "error" in line), said[:200])
                raise ExitifyError(
                    f"NVRTC {_text(self.version)} refuses the kernels for {architecture}: {first.strip()}", "report this with the model"
                )
            cubin, ptx = _read(calls, program, "CUBIN"), _read(calls, program, "PTX").rstrip(b"\0")
        finally:
            calls.nvrtcDestroyProgram(ctypes.byref(program))
        found = _PTX_VERSION.search(ptx)
        assert found is not None
        assert cubin_architecture(cubin) == architecture
        return GpuCode(cubin, ptx, _text(self.version), found.group(1).decode())


def compiler_for(driver: str = "") -> Compiler:
    """Return the newest NVRTC whose code a driver loads.

    Looked for in `$EXITIFY_NVRTC` (a shared object), among the packages of this Python, and in CUDA toolkits under /usr/local.

    Args:
        driver: The CUDA version of the driver that will load the code, `12.6`; empty where any will do.

    Raises:
        NoCompiler: there is none; the hint names what to install.
    """
    limit = _version(driver) if driver else None
    extra = "cuda12" if limit is not None and limit[0] == 12 else "cuda13"
    found = {compiler.version: compiler for compiler in _installed()}
    fitting = [version for version in found if limit is None or version <= limit]
    if not fitting:
        if not found:
            raise NoCompiler("no NVRTC was found, which compiles code for GPUs", f"pip install 'exitify[{extra}]', or give $EXITIFY_NVRTC")
        raise NoCompiler(
            f"the driver is for CUDA {driver} and does not load what NVRTC {', '.join(map(_text, sorted(found)))} writes",
            f"pip install 'exitify[{extra}]'",
        )
    return found[max(fitting)]


def cubin_architecture(cubin: bytes) -> str:
    """The architecture that an ELF file of NVIDIA's was made for, `sm_87`, as its header says.

    Raises:
        ValueError: it is no such file.
    """
    elf_of_cuda, flags_at = 190, 48
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or struct.unpack_from("<H", cubin, 18)[0] != elf_of_cuda:
        raise ValueError("no ELF file of CUDA's")
    flags: int = struct.unpack_from("<I", cubin, flags_at)[0]
    version = cubin[8]  # from CUDA 13 on the architecture stands one byte higher
    return f"sm_{(flags >> 8 if version >= 8 else flags) & 0xFF}"


def _installed() -> Iterator[Compiler]:
    """Every NVRTC there is, with its headers; of one version the later ones count."""
    for toolkit in sorted(Path("/usr/local").glob("cuda*")):
        for library in sorted((toolkit / "lib64").glob("libnvrtc.so.*")):
            yield Compiler(library, (toolkit / "include", toolkit / "include" / "cccl"))
    for folder in map(Path, sys.path):
        twelve = folder / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
        if twelve.is_file():
            parts = ("cuda_runtime", "cuda_cccl", "cuda_nvcc")
            yield Compiler(twelve, tuple(folder / "nvidia" / part / "include" for part in parts))
        for library in sorted(folder.glob("nvidia/cu[0-9]*/lib/libnvrtc.so.*")):
            include = library.parent.parent / "include"
            yield Compiler(library, (include, include / "cccl"))
    chosen = os.environ.get("EXITIFY_NVRTC")
    if chosen:
        if not Path(chosen).is_file():
            raise NoCompiler(f"$EXITIFY_NVRTC is {chosen!r}, which is no file", "give the path of libnvrtc.so")
        beside = Path(chosen).parent.parent
        yield Compiler(Path(chosen), (beside / "include", beside / "include" / "cccl"))


@functools.lru_cache
def _load(library: Path) -> ctypes.CDLL:
    """The library; what it loads itself must stand beside it or be loaded already."""
    for builtins in sorted(library.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))
    try:
        calls = ctypes.CDLL(str(library))
    except OSError as error:
        raise NoCompiler(f"NVRTC cannot be loaded: {error}", "pip install --force-reinstall nvidia-cuda-nvrtc-cu12") from error
    calls.nvrtcGetErrorString.restype = ctypes.c_char_p
    return calls


def _read(calls: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(calls, getattr(calls, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(calls, getattr(calls, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(calls: Any, status: int) -> None:
    if status:
        raise ExitifyError(f"NVRTC failed: {calls.nvrtcGetErrorString(status).decode()}", "try another version of it: $EXITIFY_NVRTC")


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
