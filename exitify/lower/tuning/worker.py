"""A process that compiles and times kernels: `python -m exitify.lower.tuning.worker`, one JSON request a line, one answer a line.

What it compiles may crash LLVM, read where it must not, or never end; its parent gives it a time and starts another.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

import numpy as np

BEYOND_THE_CACHE = 4 * 2**20
"""Bytes of weights that are read before the same ones come again."""


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import tvm  # the slow part, before the first request's time runs

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"seconds": seconds_of(**json.loads(line))}
        except Exception as error:
            answer = {"failure": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)
    del tvm


def seconds_of(kernels: list[str], target: dict[str, Any], repeats: int) -> list[float]:
    """Median seconds a call of each kernel, timed in turn so that a slower moment of the machine hits them all.

    Args:
        kernels: Modules with one scheduled function `main` each, TVM's JSON.
        target: What to compile for, as TVM's target describes itself. repeats: Timings of each, about 5 ms long.
    """
    import tvm

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


def _argument_sets(looks: list[tuple[tuple[int, ...], str]]) -> list[list[Any]]:
    """Arguments for one call after the other: the same input and output, and weights that change.

    In a network a kernel's input has just been written, and its weights have not been read since the last picture: with
    weights that stay in the cache, schedules that read them twice look better than they are.
    """
    first, *middle, last = [_random(*look) for look in looks]
    weights = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in looks[1:-1])
    copies = min(32, BEYOND_THE_CACHE // max(weights, 1) + 1)
    others = [[_random(*look) for look in looks[1:-1]] for _ in range(copies - 1)]
    return [[first, *given, last] for given in (middle, *others)]


def _random(shape: tuple[int, ...], dtype: str) -> Any:
    import tvm

    tensor = tvm.runtime.empty(shape, dtype)
    np.from_dlpack(tensor)[...] = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(dtype)
    return tensor


if __name__ == "__main__":
    main()
