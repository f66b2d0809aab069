"""A GPU as TVM's target, the default schedules for it, and its kernels compiled where there is none."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from exitify.artifact.manifest import MARK
from exitify.lower.library import Kernels, build
from exitify.lower.nvrtc import Compiler, GpuCode, compiler_for
from exitify.lower.processors import Machine, machine_of
from exitify.runtime.engines.cuda import INLINE, NoGpu, gpu_at_hand
from exitify.targets import Target, TargetError

THREADS_A_BLOCK, SHARED_BYTES_A_BLOCK, WARP = 1024, 48 * 1024, 32
"""What every NVIDIA GPU since compute capability 3.0 gives a block without being asked for more."""

_POSTPROCESS, _CREATE = "tvm_callback_cuda_postproc", "ffi.Module.create.cuda"
_lock = threading.Lock()


@dataclass(frozen=True)
class GpuMachine:
    """A GPU that code is made for, and the processor beside it.

    architecture: CUDA's, `sm_87`. tuned_on: What measurements hold for.
    driver: CUDA version of the driver that is to load the code, `12.6`; empty where that is not known.
    """

    architecture: str
    host: Machine
    tuned_on: str
    driver: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """TVM's target as plain values."""
        return {
            "kind": "cuda",
            "arch": self.architecture,
            "max_threads_per_block": THREADS_A_BLOCK,
            "max_shared_memory_per_block": SHARED_BYTES_A_BLOCK,
            "thread_warp_size": WARP,
            "host": self.host.description,
        }

    @property
    def identity(self) -> tuple[object, ...]:
        """What measurements depend on."""
        return "cuda", self.architecture, self.tuned_on

    @property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return tvm.target.Target(self.description)

    @property
    def is_here(self) -> bool:
        """Whether the machine at hand can run the code."""
        try:
            return self.host.is_here and gpu_at_hand().architecture == self.architecture
        except NoGpu:
            return False


def gpu_machine_of(board: Target, architecture: str = "", driver: str = "") -> GpuMachine:
    """Return what to make code for.

    Args:
        architecture: In place of the board's own, for a board whose GPU is the one at hand. driver: See `GpuMachine`.

    Raises:
        TargetError: the board has no GPU, or it is the machine at hand and that has none.
    """
    if board.gpu is None:
        raise TargetError(f"the target {board.name!r} has no GPU", "compile for its CPU, or give the target cuda")
    wanted = architecture or board.gpu.architecture
    tuned_on = board.name
    if board.gpu.architecture == "native":
        try:
            gpu = gpu_at_hand()
            wanted, tuned_on = architecture or gpu.architecture, gpu.name
        except NoGpu as error:
            if not architecture:
                raise TargetError(
                    f"the target {board.name!r} is for the GPU at hand: {error.problem}", "name its architecture: --arch sm_90"
                ) from error
            tuned_on = architecture
    if not re.fullmatch(r"sm_[0-9]{2,3}", wanted):  # sm_90a's PTX would run on no newer GPU
        raise TargetError(f"{wanted!r} is no architecture of NVIDIA's GPUs", "sm_87 for instance, compute capability 8.7")
    return GpuMachine(wanted, machine_of(board), tuned_on, driver)


def build_for_gpu(
    kernels: Kernels, scheduled: Mapping[str, tirx.PrimFunc], machine: GpuMachine, compiler: Compiler
) -> tuple[relax.VMExecutable, str, GpuCode]:
    """Compile functions for the processor and scheduled kernels for the GPU; also return the mark that stands for the kernels.

    TVM writes CUDA source. In its place the executable gets a mark, `MARK` and the source's sha256; the kernels stand beside it, as machine
    code and as PTX, and the engine hands TVM the one that the GPU at hand takes. So nothing of CUDA but NVRTC is needed here.
    """
    sources: list[str] = []

    def take(source: str) -> str:
        sources.append(source)
        return _mark(source)

    with _text_for_kernels(take):
        executable = build(kernels, scheduled, machine)
    if not sources:
        raise TargetError("nothing of this network is left for a GPU to compute", "compile for the processor: --device cpu")
    (source,) = sources
    return executable, _mark(source), compiler.compile(source, machine.architecture)


@contextlib.contextmanager
def kernels_inline(architecture: str, driver: str) -> Iterator[None]:
    """Libraries that are built meanwhile hold their kernels' machine code as text, which `accept_kernels` reads: to be timed and forgotten.

    Raises:
        NoCompiler: there is no NVRTC for that driver.
    """
    compiler = compiler_for(driver)
    with _text_for_kernels(lambda source: INLINE + base64.b64encode(compiler.compile(source, architecture).cubin).decode()):
        yield


def _mark(source: str) -> str:
    return MARK + hashlib.sha256(source.encode()).hexdigest()


@contextlib.contextmanager
def _text_for_kernels(text_for: Callable[[str], str]) -> Iterator[None]:
    """For each CUDA source that TVM writes meanwhile it stores this text."""

    def take(source: str, target: Any) -> str:
        return text_for(source)

    # Where TVM finds its CUDA runtime it would compile the mark; without the constructor of its CUDA modules it stores text.
    with _lock, _global_function(_POSTPROCESS, take), _global_function(_CREATE, None):
        yield


@contextlib.contextmanager
def _global_function(name: str, function: Any) -> Iterator[None]:
    """TVM's function of this name replaced, or absent where `function` is None."""
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    if function is not None:
        tvm_ffi.register_global_func(name, function, override=True)
    elif before is not None:
        tvm_ffi.remove_global_func(name)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(name, before, override=True)
        elif function is not None:
            tvm_ffi.remove_global_func(name)
