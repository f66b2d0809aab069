"""Segments of a compiled network in a row against the same network as one TVM function, and what a call of a segment costs.

    exitify transform examples.cifar_resnet56.model:resnet56 --weights W --input-shape 3x32x32 --exits none -o whole.exitify
    python -m benchmarks.tvm_segments r56.exitify whole.exitify

Both are compiled here without tuning and run in turn, one thread, buffers bound once. The first may have heads; they are
not run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.benchmark import one_graph
from exitify.lower.pipeline import compile_artifact
from exitify.targets import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cut", type=Path)
    parser.add_argument("whole", type=Path)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    cut, whole = (compile_artifact(Artifact.open(path), load_target("host")) for path in (options.cut, options.whole))
    calls = len(cut.plan.stretches(())[0].segments)
    x = np.random.default_rng(0).standard_normal((1, *whole.manifest.input.shape)).astype(np.float32)
    ratios, each = [], []
    for _ in range(options.loads):
        runs = [one_graph(cut, 1, "tvm"), one_graph(whole, 1, "tvm")]
        assert np.array_equal(runs[0](x), runs[1](x))
        times: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for run, found in zip(runs, times):
                run(x)
                started = time.perf_counter_ns()
                run(x)
                found.append((time.perf_counter_ns() - started) / 1e3)
        in_a_row, together = (float(np.median(found)) for found in times)
        ratios.append(in_a_row / together)
        each.append((in_a_row - together) / (calls - 1))
    print(f"{calls} segments in a row {in_a_row:.1f} µs, one function {together:.1f} µs")
    spread = f"{min(ratios):.4f} to {max(ratios):.4f} over {options.loads} loads"
    print(f"ratio {np.median(ratios):.4f} ({spread}), {np.median(each):.1f} µs a further segment")


if __name__ == "__main__":
    main()
