"""The GPU at hand, asked of its driver; and TVM's CUDA runtime in this process, with kernels that it takes from an artifact."""

from __future__ import annotations

import base64
import ctypes
import functools
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exitify.artifact.manifest import MARK
from exitify.errors import EngineError

INLINE = "exitify cubin "
"""What a kernel that is only to be timed holds, followed by its machine code in base64."""

SIDECAR = "libtvm_runtime_cuda.so"
"""TVM's CUDA runtime. The one in PyPI's wheel is for CUDA 13; `exitify.board.sidecar` builds one for the CUDA at hand."""

_CHOSEN = "EXITIFY_TVM_CUDA"
_COMPILE = "tvm_callback_cuda_compile"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class NoGpu(EngineError):
    """There is no GPU here that can be used; the message says what is missing."""


@dataclass(frozen=True)
class Gpu:
    """A GPU. architecture: CUDA's, `sm_87`. driver: The newest CUDA that its driver knows, `12.6`."""

    name: str
    architecture: str
    driver: str


@functools.lru_cache(maxsize=1)
def gpu_at_hand() -> Gpu:
    """Ask the driver for the first GPU.

    Raises:
        NoGpu: no driver, or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoGpu("there is no NVIDIA driver here (libcuda.so.1)", "use a machine with an NVIDIA GPU, or the CPU's library") from error
    count, device, version, major, minor = (ctypes.c_int() for _ in range(5))
    name = ctypes.create_string_buffer(256)
    for call, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDeviceGetName", (name, len(name), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(major), _MAJOR, device)),
        ("cuDeviceGetAttribute", (ctypes.byref(minor), _MINOR, device)),
    ):
        status = getattr(driver, call)(*arguments)
        if status:
            raise NoGpu(f"the NVIDIA driver finds no GPU: {call} says {status}", "look at `nvidia-smi`, and whether this user may open /dev/nvidia*")
        if call == "cuDeviceGetCount" and not count.value:
            raise NoGpu("the NVIDIA driver finds no GPU", "use a machine with an NVIDIA GPU, or the CPU's library")
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}", f"{version.value // 1000}.{version.value % 1000 // 10}")


def own_sidecar() -> Path:
    """Where the CUDA runtime that was built here stands, if it was: `$EXITIFY_TVM_CUDA`, or in `$XDG_DATA_HOME/exitify`.

    There it has a folder for each version of TVM: with another one it would crash.

    Raises:
        NoGpu: TVM is not installed.
    """
    chosen = os.environ.get(_CHOSEN)
    if chosen:
        return Path(chosen).expanduser()
    try:
        tvm, ffi = (importlib.metadata.version(package) for package in ("apache-tvm", "apache-tvm-ffi"))
    except importlib.metadata.PackageNotFoundError as error:
        raise NoGpu("TVM's runtime is not installed", "pip install 'exitify[tvm]'") from error
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "exitify" / f"tvm-{tvm}-ffi-{ffi}" / SIDECAR


def load_sidecar(tvm_libraries: Path) -> Path:
    """Load TVM's CUDA runtime into this process and return where it was found: the one built here before the wheel's.

    Raises:
        NoGpu: it cannot be loaded; the loader's own words are in the message.
    """
    own = own_sidecar()
    built = bool(os.environ.get(_CHOSEN)) or own.is_file()
    path = own if built else tvm_libraries / SIDECAR
    try:
        if not built:
            _load_runtime_of_13()
        return _load(path)
    except OSError as error:
        hint = f"build it again: `exitify board sidecar`, or do without it: {_without(own)}" if built else _sidecar_hint()
        raise NoGpu(f"TVM's CUDA runtime cannot be loaded: {error}", hint) from error


def _without(own: Path) -> str:
    return f"unset {_CHOSEN}" if os.environ.get(_CHOSEN) else f"rm {own}"


def _sidecar_hint() -> str:
    """What helps where the wheel's CUDA runtime, which is for CUDA 13, cannot be loaded."""
    build, install = "build the board's own: `exitify board sidecar` (docs/jetson.md)", "install CUDA 13's runtime: pip install nvidia-cuda-runtime"
    try:
        major = int(gpu_at_hand().driver.partition(".")[0])
    except NoGpu:
        return f"on JetPack 6 {build}; elsewhere {install}"
    return f"the driver is for CUDA {major}: {build}" if major < 13 else install


def _load_runtime_of_13() -> None:
    """CUDA's runtime for the wheel's library, from PyPI where the system has none."""
    for folder in sys.path:
        for runtime in sorted(Path(folder).glob("nvidia/cu13/lib/libcudart.so.13")):
            ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)


@functools.lru_cache
def _load(path: Path) -> Path:
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return path


_kernels: dict[str, bytes] = {}


def offer_kernels(mark: str, code: bytes) -> None:
    """Let libraries with this mark be loaded with these kernels: machine code, or PTX and a zero byte."""
    accept_kernels()
    _kernels[mark] = code


@functools.lru_cache(maxsize=1)
def accept_kernels() -> None:
    """Let TVM load libraries with text in place of kernels: those that were offered, and those that are the text (`INLINE`)."""
    import tvm_ffi

    before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)

    def compile_or_find(source: Any) -> Any:
        """What TVM calls when it loads a library with text in place of kernels."""
        text = str(source)
        if text in _kernels:
            return _kernels[text]
        if text.startswith(INLINE):
            return base64.b64decode(text.removeprefix(INLINE), validate=True)
        if text.startswith(MARK) or before is None:
            raise EngineError("the library's kernels are not those of its artifact", "compile again: exitify compile")
        return before(source)

    tvm_ffi.register_global_func(_COMPILE, compile_or_find, override=True)
