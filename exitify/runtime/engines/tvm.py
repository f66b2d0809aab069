"""TVM: a library compiled for this machine, run by TVM's runtime alone; its compiler need not be installed.

A compiled library is native code. It is loaded when this engine is asked for by name, never by `auto`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from exitify.artifact.artifact import Artifact, target_path
from exitify.artifact.manifest import Compiled, name_of
from exitify.artifact.sources import graph_hashes, source_hashes
from exitify.errors import EngineError, LibraryRefused, first_line
from exitify.plan import Segment, Stretch
from exitify.runtime.engines.base import ALIGNMENT, Array, Bound, Engine, Parameters, Runner, aligned
from exitify.runtime.engines.blocks import in_blocks, in_rows
from exitify.runtime.engines.cuda import NoGpu, gpu_at_hand, load_sidecar, offer_kernels
from exitify.runtime.engines.elf import architecture_of
from exitify.runtime.engines.tvm_library import runtime_library
from exitify.targets import processor

# Read by TVM's thread pool when it starts: workers are not tied to cores, which they would share with whatever else runs
# there, and wait about 50 µs for the next kernel before they sleep, in place of 100 ms.
os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "200")

import tvm_ffi

if TYPE_CHECKING:
    from exitify.runtime.engines.onnxruntime import OnnxRuntimeEngine

log = logging.getLogger(__name__)

_AGAIN = "compile again: exitify compile"


class _Most:
    """The largest number of threads that an engine in this process was given."""

    threads = 1


_caller = threading.local()
"""What TVM keeps for a calling thread: how many threads it was last set to; and whether its workers are in the process that forked."""


def _note_fork() -> None:
    if hasattr(_caller, "threads"):
        _caller.forked = True


os.register_at_fork(after_in_child=_note_fork)


class TvmEngine(Engine):
    """Each segment is a function of the artifact's library; a stretch is a row of calls, and what one returns the next one reads."""

    name = "tvm"

    def __init__(self, artifact: Artifact, threads: int, target: str = "") -> None:
        """Load the library for a target.

        Args:
            target: Its name; empty for the only one, or the first that fits this machine, those for GPUs before others.

        Raises:
            LibraryRefused: there is none, or it does not fit the artifact, this machine or this TVM.
        """
        super().__init__(artifact, threads)
        self.compiled = _choose(artifact, target)
        self.library = self.compiled.target
        if self.compiled.gpu is not None:
            offer_kernels(self.compiled.gpu.mark, _kernels(artifact, self.compiled))
        self.device: _Device = _Processor() if self.compiled.gpu is None else _Gpu()
        self._new_machine = _load(bytes(artifact.files[target_path(self.compiled.target, "library.so")]), self.device)
        weights = artifact.tensors(target_path(self.compiled.target, "weights.safetensors"))
        self._weights = {name: self.device.place(array) for name, array in weights.items()}
        self._others = None
        if any(segment.name not in self.compiled.segments for segment in artifact.plan.segments):
            from exitify.runtime.engines.onnxruntime import OnnxRuntimeEngine

            self._others = OnnxRuntimeEngine(artifact, threads)
        self._own = threading.local()
        self._batches: dict[tuple[str, ...], tuple[int, ...]] = {}
        _Most.threads = max(_Most.threads, threads)

    def prepare(self, stretch: Stretch) -> Runner:
        return _Runner(self, stretch)

    def bind(self, stretches: Sequence[Stretch], parameters: Parameters) -> Bound:
        return _Binding(self, stretches, parameters)

    def function(self, segment: str, skipped: Collection[str] = (), batch: int = 1) -> _Function:
        """A segment's function for so many samples and the calling thread while these skip paths are left out, looked up once.

        TVM's virtual machine keeps the registers of a call in itself, so that each thread has a machine of its own.
        """
        own = self._own
        if not hasattr(own, "machine"):
            own.machine, own.functions = self._new_machine(), {}
        found = self.artifact.plan.segment(segment)
        is_second = found.follows in skipped
        key = segment, is_second, batch
        if key not in own.functions:
            own.functions[key] = self._find(found, own.machine, batch, is_second=is_second)
        function: _Function = own.functions[key]
        return function

    @property
    def shares_samples(self) -> bool:
        return self.threads > 1 and self.compiled.gpu is None

    @contextlib.contextmanager
    def alone(self, *, always: bool = False) -> Iterator[None]:
        if not always:
            self.use_threads()
        self._own.is_alone = True
        try:
            yield
        finally:
            self._own.is_alone = False

    def batches(self, stretch: Stretch) -> Sequence[int]:
        """Those for which all of a stretch has functions, and 1."""
        if stretch.segments not in self._batches:
            sizes = [self.compiled.segments[name].batches if name in self.compiled.segments else () for name in stretch.segments]
            self._batches[stretch.segments] = (*sorted(set.intersection(*map(set, sizes)), reverse=True), 1)
        return self._batches[stretch.segments]

    def _find(self, segment: Segment, machine: Any, batch: int, *, is_second: bool) -> _Function:
        if is_second and segment.kind == "block":
            return lambda given: given  # left out: its output is its input
        compiled = self.compiled.segments.get(segment.name)
        if compiled is None:
            assert self._others is not None
            return _on_onnxruntime(self._others, segment, self.device, is_second=is_second)
        try:
            call = machine[name_of(segment.name, batch)]
        except AttributeError as error:
            raise LibraryRefused(f"the library for {self.compiled.target!r} has no function {name_of(segment.name, batch)!r}", _AGAIN) from error
        weights = [self._weights[name] for name in (compiled.second_weights if is_second else compiled.weights)]
        if len(segment.outputs) == 1:
            return lambda given: (call(*given, *weights),)
        return lambda given: call(*given, *weights)

    def rows(self, name: str, array: Array) -> Array:
        """A value as the plan describes it, which the library may keep in blocks of channels."""
        return in_rows(array, self.artifact.plan.values[name].shape[0]) if name in self.compiled.in_blocks else array

    def kept(self, name: str, array: Array) -> Array:
        """A value as the library keeps it, given so or as the plan describes it."""
        return in_blocks(array, self.compiled.block) if name in self.compiled.in_blocks and array.ndim == 4 else array

    def use_threads(self) -> None:
        """Let the calling thread's kernels share its work with as many threads as the engine was given.

        A calling thread has workers of its own, made at its first call and never more: enough for every engine there is then,
        or none for a thread that always computes alone. A process that it forks has none of them.
        """
        is_alone = getattr(self._own, "is_alone", False)
        before, wanted = getattr(_caller, "threads", 0), 1 if is_alone or hasattr(_caller, "forked") else self.threads
        if not before:
            _set_threads(1 if is_alone else _Most.threads)
        if before != wanted:
            _set_threads(wanted)
            _caller.threads = wanted


_Function = Callable[[Sequence[Any]], Sequence[Any]]
"""A segment: inputs and parameters to outputs, all of them tensors."""


_Call = tuple[_Function, tuple[str, ...], tuple[str, ...]]
"""A segment's function, the names of what it reads, and of what it writes."""


def _call(engine: TvmEngine, segment: Segment, skipped: Collection[str], batch: int = 1) -> _Call:
    return engine.function(segment.name, skipped, batch), (*segment.inputs, *segment.parameters), segment.outputs


class _Binding(Bound):
    """Tensors by value; a run overwrites them with what it computes."""

    def __init__(self, engine: TvmEngine, stretches: Sequence[Stretch], parameters: Parameters) -> None:
        self.engine, self.stretches = engine, stretches
        plan = engine.artifact.plan
        value = plan.values[plan.input]
        self.input = aligned((1, *value.shape), value.dtype)
        self.values: dict[str, Any] = {name: engine.device.place(array) for name, array in {plan.input: self.input, **parameters}.items()}
        self._given = self.values[plan.input]
        self.steps = [[_call(engine, plan.segment(name), stretch.skipped) for name in stretch.segments] for stretch in stretches]

    def set_input(self, x: Array) -> None:
        self.engine.use_threads()
        np.copyto(self.input, x)
        self.engine.device.refresh(self._given, self.input)

    def set_parameters(self, parameters: Parameters) -> None:
        self.engine.use_threads()
        self.values.update({name: self.engine.device.place(array) for name, array in parameters.items()})

    def step(self, index: int) -> None:
        values = self.values
        try:
            for function, reads, writes in self.steps[index]:
                values.update(zip(writes, function([values[name] for name in reads])))
        except Exception as error:
            raise _failed(self.stretches[index], error) from error

    def value(self, name: str) -> Array:
        return self.engine.rows(name, self.engine.device.read(self.values[name]))


class _Runner(Runner):
    """As many samples at once as the library has functions for, through all of the stretch.

    Feature maps between stretches stay as the library keeps them.
    """

    def __init__(self, engine: TvmEngine, stretch: Stretch) -> None:
        self.engine, self.stretch = engine, stretch
        self.segments = [engine.artifact.plan.segment(name) for name in stretch.segments]
        self.batches = engine.batches(stretch)
        self._placed: dict[str, tuple[Array, Any]] = {}
        self._own = threading.local()
        self._calls(1)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.engine.use_threads()
        device = self.engine.device
        parameters = {name: self._placed_once(name, inputs[name]) for name in self.stretch.parameters}
        count = len(inputs[self.stretch.inputs[0]])
        given = {name: self.engine.kept(name, inputs[name]) for name in self.stretch.inputs}
        results: dict[str, Array] = {}
        start = 0
        while start < count:
            batch = next(size for size in self.batches if size <= count - start)
            part = given if batch == count else {name: array[start : start + batch] for name, array in given.items()}
            found = self._computed({**parameters, **{name: device.place(array) for name, array in part.items()}}, batch)
            if batch == count:
                return found
            for name, array in found.items():
                if name not in results:
                    results[name] = aligned((count, *array.shape[1:]), array.dtype)
                results[name][start : start + batch] = array
            start += batch
        return results

    def _placed_once(self, name: str, array: Array) -> Any:
        """A parameter as a tensor; nobody changes its values, so that the last one's stands as long as it is given."""
        known = self._placed.get(name)
        if known is None or known[0] is not array:
            known = self._placed[name] = array, self.engine.device.place(array)
        return known[1]

    def _computed(self, values: dict[str, Any], batch: int) -> dict[str, Array]:
        """The outputs for as many samples as there are functions for."""
        calls = self._calls(batch)
        try:
            for function, reads, writes in calls:
                values.update(zip(writes, function([values[name] for name in reads])))
        except Exception as error:
            raise _failed(self.stretch, error) from error
        read = self.engine.device.read
        return {name: read(values[name]) for name in self.stretch.outputs}

    def _calls(self, batch: int) -> Sequence[_Call]:
        """The calls of the calling thread for so many samples."""
        known: dict[int, list[_Call]] = self._own.__dict__.setdefault("calls", {})
        if batch not in known:
            known[batch] = [_call(self.engine, segment, self.stretch.skipped, batch) for segment in self.segments]
        return known[batch]


class _Device(Protocol):
    """Where a library's tensors are.

    machine: What its virtual machine is made with: for each device that it uses its DLPack type, number, and how memory is kept.
    """

    machine: tuple[int, ...]

    def place(self, array: Array) -> Any:
        """A tensor there with these values."""

    def refresh(self, tensor: Any, array: Array) -> None:
        """Let a tensor hold what the array that it was placed from holds now."""

    def read(self, tensor: Any) -> Array:
        """Its values."""


_POOLED = 2
"""Memory of values is kept for the next call."""


class _Processor(_Device):
    machine = (1, 0, _POOLED)

    def place(self, array: Array) -> Any:
        return _tensor(array)

    def refresh(self, tensor: Any, array: Array) -> None:
        pass  # it is in the array's own memory

    def read(self, tensor: Any) -> Array:
        return np.from_dlpack(tensor)


class _Gpu(_Device):
    """The first GPU. Reading waits for the kernels before."""

    machine = (2, 0, _POOLED, 1, 0, _POOLED)

    def __init__(self) -> None:
        find = tvm_ffi.get_global_func
        self._allocate, self._write, self._read = (find(f"runtime.TVMTensor{name}") for name in ("AllocWithScope", "CopyFromBytes", "CopyToBytes"))
        self._device = tvm_ffi.device("cuda:0")

    def place(self, array: Array) -> Any:
        tensor = self._allocate(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(array.dtype.name), self._device, None)
        self.refresh(tensor, array)
        return tensor

    def refresh(self, tensor: Any, array: Array) -> None:
        array = np.ascontiguousarray(array)
        self._write(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def read(self, tensor: Any) -> Array:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._read(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array


def _tensor(array: Array) -> Any:
    """The array as TVM's tensor: in place where its address allows it, and else a copy."""
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous:
        copy = aligned(array.shape, array.dtype.name)
        np.copyto(copy, array)
        array = copy
    if not array.flags.writeable:
        # DLPack has no read-only arrays and NumPy refuses to pass one on. Weights mapped from the artifact are only read.
        memory: Any = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
        memory.source = array  # keeps what it points into
        array = np.frombuffer(memory, array.dtype).reshape(array.shape)
    return tvm_ffi.from_dlpack(array)


def _choose(artifact: Artifact, target: str) -> Compiled:
    """The library's record, everything about it checked that can be without loading it."""
    targets = artifact.targets
    if target and target not in targets:
        there_are = f"it has {', '.join(targets)}" if targets else "it has none"
        raise LibraryRefused(f"the artifact has no library for {target!r}", f"{there_are}; exitify compile --target {target} makes one")
    if not targets:
        raise LibraryRefused("the artifact has no compiled library", "exitify compile --target host makes one, or use the engine onnxruntime")
    refusals: list[LibraryRefused] = []
    for name in [target] if target else sorted(targets, key=lambda name: targets[name].gpu is None):
        try:
            check_library(artifact, targets[name])
        except LibraryRefused as refusal:
            refusals.append(refusal)
            if targets[name].gpu is not None and not target:
                log.warning("the GPU is not used: %s", refusal.problem)
        else:
            return targets[name]
    raise refusals[0]


def check_library(artifact: Artifact, compiled: Compiled) -> None:
    """Check all of a library that can be without loading it.

    Raises:
        LibraryRefused: it is for another machine, another TVM, or other graphs or weights than the artifact's.
    """
    name = f"the library for {compiled.target!r}"
    architecture = compiled.triple.split("-")[0]
    if architecture != processor.architecture():
        raise LibraryRefused(
            f"{name} is for {architecture}, and this machine is {processor.architecture()}", "compile for this machine: --target host"
        )
    lacking = sorted(set(compiled.features) - processor.features())
    if lacking:
        raise LibraryRefused(f"{name} needs a processor with {', '.join(lacking)}", "compile on this machine: --target host")
    for package, wanted in (("apache-tvm", compiled.tvm), ("apache-tvm-ffi", compiled.tvm_ffi)):
        found = importlib.metadata.version(package)
        if found != wanted:
            raise LibraryRefused(
                f"{name} was compiled with {package} {wanted}, and {found} is installed", f"pip install '{package}=={wanted}', or {_AGAIN}"
            )
    for segment, made in compiled.segments.items():
        if graph_hashes(artifact, segment) != (made.graph, made.second_graph):
            raise LibraryRefused(f"{name} is stale: it was compiled from another graph of {segment!r}", _AGAIN)
    if compiled.gpu is not None:
        _kernels(artifact, compiled)
        try:
            load_sidecar(load_runtime())
        except NoGpu as error:
            raise LibraryRefused(f"{name} cannot run: {error.problem}", error.hint) from error
    now = source_hashes(artifact, compiled.segments)
    stale = sorted(weight for weight in now.keys() | compiled.sources.keys() if now.get(weight) != compiled.sources.get(weight))
    if stale:
        others = f" and {len(stale) - 1} others" if len(stale) > 1 else ""
        raise LibraryRefused(f"{name} is stale: it was compiled from another {stale[0][:80]!r}{others}", _AGAIN)


def _kernels(artifact: Artifact, compiled: Compiled) -> bytes:
    """The kernels that the GPU at hand takes: machine code where it is of their architecture, else PTX, which its driver compiles."""
    assert compiled.gpu is not None
    name, made = f"the library for {compiled.target!r}", compiled.gpu
    try:
        gpu = gpu_at_hand()
    except NoGpu as error:
        raise LibraryRefused(f"{name} needs a GPU: {error.problem}", error.hint) from error
    driver, compiler, own, wanted = (
        tuple(int(part) for part in text.split(".")) for text in (gpu.driver, made.compiler, _number(gpu.architecture), _number(made.architecture))
    )
    if gpu.architecture == made.architecture and driver[0] >= compiler[0]:
        return bytes(artifact.files[target_path(compiled.target, "kernels.cubin")])
    if own < wanted:
        raise LibraryRefused(f"{name} is for GPUs from {made.architecture} on, and this one is {gpu.architecture} ({gpu.name})", _AGAIN)
    if driver < compiler:
        raise LibraryRefused(
            f"{name} was compiled by CUDA {made.compiler} (PTX {made.ptx}), and the driver here is for CUDA {gpu.driver}",
            f"compile with an older NVRTC, for JetPack 6 `exitify compile --jetpack 6`, or update the driver; {_AGAIN}",
        )
    return bytes(artifact.files[target_path(compiled.target, "kernels.ptx")]) + b"\0"


def _number(architecture: str) -> str:
    """`sm_87` as `8.7`."""
    digits = architecture.removeprefix("sm_").rstrip("a")
    return f"{digits[:-1]}.{digits[-1:]}"


def _load(library: bytes, device: _Device) -> Callable[[], Any]:
    """What makes virtual machines, functions by segment: the shared object from a file that is gone once it is loaded."""
    load_runtime()
    try:
        made_for = architecture_of(library)
    except ValueError as error:
        raise LibraryRefused(f"the library is not whole: {error}", _AGAIN) from error
    if made_for != processor.architecture():
        raise LibraryRefused(f"the library is for {made_for}, whatever its record says", _AGAIN)
    try:
        with tempfile.TemporaryDirectory(prefix="exitify-") as folder:
            path = Path(folder) / "library.so"
            path.write_bytes(library)
            make = tvm_ffi.load_module(path, keep_module_alive=True)["vm_load_executable"]
    except Exception as error:
        raise LibraryRefused(
            f"the library cannot be loaded: {first_line(error)}",
            "if the folder for temporary files forbids programs, set TMPDIR to one that does not",
        ) from error

    def machine() -> Any:
        made = make()
        made["vm_initialization"](*device.machine)
        return made

    return machine


@functools.lru_cache(maxsize=1)
def load_runtime() -> Path:
    """TVM's runtime into this process; the folder that it is in."""
    path = runtime_library()
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    return path.parent


@functools.lru_cache(maxsize=1)
def _configure() -> Callable[[int, int, Sequence[str]], None]:
    return tvm_ffi.get_global_func("runtime.config_threadpool")


def _set_threads(count: int) -> None:
    _configure()(1, count, ["0"] * count)  # the list's length is what counts: nothing is tied to a core


def _on_onnxruntime(engine: OnnxRuntimeEngine, segment: Segment, device: _Device, *, is_second: bool) -> _Function:
    """A segment that TVM could not take, on ONNX Runtime: tensors in and out as NumPy sees them, in place where they are on the processor."""
    names = (*segment.inputs, *segment.parameters)
    stretch = Stretch(
        segments=(segment.name,),
        inputs=segment.inputs,
        outputs=segment.outputs,
        parameters=segment.parameters,
        exit="",
        cost=segment.cost,
        skipped=(segment.follows,) if is_second else (),
    )
    run = engine.prepare(stretch)

    def call(given: Sequence[Any]) -> Sequence[Any]:
        found = run({name: device.read(tensor) for name, tensor in zip(names, given)})
        return [device.place(found[name]) for name in segment.outputs]

    return call


def _failed(stretch: Stretch, error: Exception) -> EngineError:
    return EngineError(f"TVM failed in {', '.join(stretch.segments)}: {first_line(error)}", "check the input and the memory left")
