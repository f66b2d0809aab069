"""A process that compiles and times kernels: `python -m exitify.lower.tuning.worker`, one JSON request a line, one answer a line.

What it compiles may crash LLVM, read where it must not, or never end; its parent gives it a time and starts another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exitify.lower.linking import link_with
from exitify.lower.nvrtc import NoCompiler
from exitify.runtime.engines.cuda import NoGpu

CPU_DEVICE, RPC_DEVICE = 1, 128
"""DLPack's number of a processor, and what TVM adds to a device's number behind RPC, for each hop."""
CACHE, LARGEST = 32 << 20, 64 << 20
"""Bytes of the last cache where the system does not say, and the most that are believed: servers have caches that many machines share."""
MOST = 256
"""Sets of weights that a kernel is timed with, where small ones would not fill the cache."""


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import tvm  # the slow part, before the first request's time runs

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"seconds": seconds_of(**json.loads(line))}
        except (NoGpu, NoCompiler) as error:  # no kernel's fault
            answer = {"unable": [error.problem, error.hint]}
        except Exception as error:
            answer = {"failure": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)
    del tvm


def seconds_of(kernels: list[str], target: dict[str, Any], repeats: int, driver: str, linker: Sequence[str]) -> list[float]:
    """Median seconds a call of each kernel, timed in turn so that a slower moment of the machine hits them all.

    Args:
        kernels: Modules with one scheduled function `main` each, TVM's JSON.
        target: What to compile for, as TVM's target describes itself. repeats: Timings of each, about 5 ms long.
        driver: CUDA version of the GPU's driver, where the target is a GPU. linker: The command that links for it.
    """
    import tvm

    import exitify.lower.functions  # noqa: F401 (how processors compute exp and the like)

    if target["kind"] == "cuda":
        with tempfile.TemporaryDirectory(prefix="exitify-") as folder:
            modules = [tvm.ir.load_json(text) for text in kernels]
            paths = [built(module, target, driver, linker, Path(folder, f"kernel{i}.so")) for i, module in enumerate(modules)]
            _use_gpu()
            return timed_in_turn([tvm.runtime.load_module(str(path)) for path in paths], modules, tvm.cuda(0), repeats)
    functions, arguments = [], []
    for text in kernels:
        module = tvm.ir.load_json(text)
        functions.append(tvm.compile(module, target=tvm.target.Target(target))["main"])
        arguments.append(_argument_sets([(tuple(int(size) for size in p.shape), str(p.dtype)) for p in module["main"].params]))
    numbers = []
    for function, sets in zip(functions, arguments):
        function(*sets[0])
        started = time.perf_counter()
        function(*sets[0])
        numbers.append(max(1, int(0.005 / max(time.perf_counter() - started, 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, sets, number, found in zip(functions, arguments, numbers, times):
            given = list(itertools.islice(itertools.cycle(sets), number))
            started = time.perf_counter()
            for one in given:
                function(*one)
            found.append((time.perf_counter() - started) / number)
    return [float(np.median(found)) for found in times]


def built(module: Any, target: dict[str, Any], driver: str, linker: Sequence[str], path: Path) -> Path:
    """Compile a module with one scheduled function `main` and write it as a library, a GPU's kernels as text in it."""
    import tvm

    import exitify.lower.functions  # noqa: F401 (how processors compute exp and the like)
    from exitify.lower.graphics import kernels_inline

    of_gpu = kernels_inline(target["arch"], driver) if target["kind"] == "cuda" else contextlib.nullcontext()
    with of_gpu:
        tvm.compile(module, target=tvm.target.Target(target)).export_library(str(path), fcompile=link_with(linker))
    return path


def timed_in_turn(loaded: Sequence[Any], modules: Sequence[Any], device: Any, repeats: int) -> list[float]:
    """Median seconds a call of each on a device, here or behind RPC.

    On a processor each call finds its weights out of the cache, as in a network; on a GPU in it, if they fit.

    Args:
        loaded: Modules of the device's. modules: What they were compiled from. repeats: Timings of each, about 5 ms long.
    """
    import tvm

    looks = [[(tuple(int(size) for size in p.shape), str(p.dtype)) for p in module["main"].params] for module in modules]
    arguments = [[tvm.runtime.tensor(np.ones(shape, dtype), device) for shape, dtype in look] for look in looks]
    timers = []
    for module, given in zip(loaded, arguments):
        if device.dlpack_device_type() % RPC_DEVICE == CPU_DEVICE:
            once = module.time_evaluator("main", device, number=1, repeat=2)(*given).results[-1]
            count = min(max(1, int(0.005 / max(once, 1e-7))), 500)
            timers.append(module.time_evaluator("main", device, number=1, repeat=count, f_preproc="cache_flush_cpu_non_first_arg"))
        else:
            timers.append(module.time_evaluator("main", device, number=1, repeat=1, min_repeat_ms=5))
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(repeats):
        for timer, given, found in zip(timers, arguments, times):
            found.append(float(np.median(timer(*given).results)))
    return [float(np.median(found)) for found in times]


@functools.lru_cache(maxsize=1)
def _use_gpu() -> None:
    """TVM's CUDA runtime into this process.

    Raises:
        NoGpu: it cannot be loaded.
    """
    import tvm

    from exitify.runtime.engines.cuda import accept_kernels, load_sidecar

    load_sidecar(Path(tvm.__file__).parent / "lib")
    accept_kernels()


def _argument_sets(looks: list[tuple[tuple[int, ...], str]]) -> list[list[Any]]:
    """Arguments for one call after the other: the same input and output, and weights that change.

    In a network a kernel's input has just been written, and its weights have not been read since the last picture: with
    weights that stay in a cache, be it the last one, schedules that read them twice, or ask for nothing ahead, look better than they are.
    """
    first, *middle, last = [_random(*look) for look in looks]
    weights = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in looks[1:-1])
    copies = min(MOST, 2 * last_cache() // max(weights, 1) + 1)
    return [[first, *given, last] for given in (middle, *([_copy(tensor) for tensor in middle] for _ in range(copies - 1)))]


@functools.lru_cache(maxsize=1)
def last_cache(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the processor's last cache, as far as they are believed."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    known = [int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in "KM"]
    return min(max(known, default=CACHE), LARGEST)


def _random(shape: tuple[int, ...], dtype: str) -> Any:
    import tvm

    tensor = tvm.runtime.empty(shape, dtype)
    np.from_dlpack(tensor)[...] = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(dtype)
    return tensor


def _copy(tensor: Any) -> Any:
    import tvm

    copy = tvm.runtime.empty(tensor.shape, tensor.dtype)
    np.from_dlpack(copy)[...] = np.from_dlpack(tensor)
    return copy


if __name__ == "__main__":
    main()
