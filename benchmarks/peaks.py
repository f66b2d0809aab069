"""What one thread of this machine can do at most: multiply-adds from registers, and bytes read from each of its caches.

python -m benchmarks.peaks
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.script import tirx as T  # noqa: N812 (as TVMScript is written)

from exitify.lower.processors import Machine, machine_of
from exitify.targets import load_target

SUMS = 12
"""Vectors that are added to in turn: enough that none waits for itself, and few enough for 16 registers with two operands."""
KIB = 1024
MEMORY = 1 << 62
"""The size of the last level: all there is."""


@dataclass(frozen=True)
class Peaks:
    """A thread's most.

    macs: float32 multiply-adds a second. levels: Bytes that a level of memory holds, and bytes a second read from it, nearest first.
    """

    macs: float
    levels: tuple[tuple[int, float], ...]

    def bandwidth(self, held: float) -> float:
        """Bytes a second from the nearest level that holds so many."""
        return next((speed for size, speed in self.levels if held <= size), self.levels[-1][1])

    def seconds_for(self, touched: float) -> float:
        """Least seconds for so many bytes, each level giving as many of them as it holds."""
        seconds = 0.0
        for size, speed in self.levels:
            part = min(touched, size)
            seconds, touched = seconds + part / speed, touched - part
        return seconds


def measure(machine: Machine, rounds: int = 15) -> Peaks:
    """The best of some rounds, each level read over and over from half of what it holds, memory from far more than any cache."""
    sizes = caches()
    macs = _best(_multiply_adds(200_000, machine), 200_000 * SUMS * machine.vectors.lanes, rounds)
    beyond = 8 * sizes[-1]
    speeds = [(size, _best(_read(size // 2, max(1, (8 << 20) // size), machine), size // 2 * max(1, (8 << 20) // size), rounds)) for size in sizes]
    return Peaks(macs, (*speeds, (MEMORY, _best(_read(beyond, 1, machine), beyond, 3))))


def caches() -> list[int]:
    """Bytes of the first core's data caches, nearest first, as Linux tells."""
    found = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (folder / "type").read_text().strip() != "Instruction":
            found[int((folder / "level").read_text())] = int((folder / "size").read_text().strip().removesuffix("K")) * KIB
    return [found[level] for level in sorted(found)] or [32 * KIB, 512 * KIB, 8192 * KIB]


def called(size: int) -> str:
    """A level's name for people."""
    if size == MEMORY:
        return "memory"
    return f"{size // KIB} KiB" if size < KIB * KIB else f"{size / KIB**2:.3g} MiB"


def _best(run: Callable[[], Any], work: float, rounds: int) -> float:
    """Work a second in the fastest round."""
    run()
    best = 1e9
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return work / best


def _multiply_adds(times: int, machine: Machine) -> Callable[[], Any]:
    lanes = machine.vectors.lanes

    @T.prim_func(s_tir=True)
    def main(
        start: T.Buffer((SUMS, lanes), "float32"),
        factor: T.Buffer((lanes,), "float32"),
        term: T.Buffer((lanes,), "float32"),
        result: T.Buffer((SUMS, lanes), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        with T.sblock("root"):
            held = T.sblock_alloc_buffer((SUMS, lanes), "float32", scope="local")
            for j in T.unroll(SUMS):
                for v in T.vectorized(lanes):
                    held[j, v] = start[j, v]
            for _ in range(times):
                for j in T.unroll(SUMS):
                    for v in T.vectorized(lanes):
                        held[j, v] = held[j, v] * factor[v] + term[v]
            for j in T.unroll(SUMS):
                for v in T.vectorized(lanes):
                    result[j, v] = held[j, v]

    return _bound(main, machine, *(np.full(shape, 0.5, np.float32) for shape in ((SUMS, lanes), (lanes,), (lanes,), (SUMS, lanes))))


def _read(size: int, times: int, machine: Machine) -> Callable[[], Any]:
    """Sums of an array of so many bytes, over and over."""
    lanes = machine.vectors.lanes
    steps = size // (4 * SUMS * lanes)

    @T.prim_func(s_tir=True)
    def main(data: T.Buffer((steps, SUMS, lanes), "float32"), result: T.Buffer((times, SUMS, lanes), "float32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        with T.sblock("root"):
            held = T.sblock_alloc_buffer((SUMS, lanes), "float32", scope="local")
            for t in range(times):
                for j in T.unroll(SUMS):
                    for v in T.vectorized(lanes):
                        held[j, v] = T.float32(0)
                for i in range(steps):
                    for j in T.unroll(SUMS):
                        for v in T.vectorized(lanes):
                            held[j, v] = held[j, v] + data[i, j, v]
                for j in T.unroll(SUMS):
                    for v in T.vectorized(lanes):
                        result[t, j, v] = held[j, v]

    return _bound(main, machine, np.ones((steps, SUMS, lanes), np.float32), np.zeros((times, SUMS, lanes), np.float32))


def _bound(kernel: Any, machine: Machine, *arrays: NDArray[np.float32]) -> Callable[[], Any]:
    function = tvm.compile(tvm.IRModule({"main": kernel}), target=machine.target)["main"]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: function(*tensors)


def main() -> None:
    found = measure(machine_of(load_target("host")))
    print(f"{found.macs / 1e9:.1f} G multiply-adds/s")
    for size, speed in found.levels:
        print(f"{speed / 1e9:.1f} GB/s from {called(size)}")


if __name__ == "__main__":
    main()
