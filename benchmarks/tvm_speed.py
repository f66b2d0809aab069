"""Networks compiled by TVM without tuning against ONNX Runtime: whole network, batch 1, one thread and two.

    exitify transform torchvision:resnet18 -o resnet18.exitify
    python -m benchmarks.tvm_speed resnet18.exitify r56.exitify

Compiles each artifact for this machine (the time is printed), then runs both engines in turn in one process, buffers
bound once, several loads of each.
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
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="Of timing, a load.")
    options = parser.parse_args()
    for path in options.artifacts:
        started = time.perf_counter()
        artifact = compile_artifact(Artifact.open(path), load_target("host"))
        print(f"{path.stem}: {artifact.plan.full_macs / 1e6:.0f} M multiply-adds, compiled in {time.perf_counter() - started:.1f} s")
        x = np.random.default_rng(0).standard_normal((1, *artifact.manifest.input.shape)).astype(np.float32)
        ratios: dict[str, list[float]] = {"1 thread": [], "2 threads": [], "TVM, 2 threads over 1": []}
        for _ in range(options.loads):
            runs = {(engine, threads): one_graph(artifact, threads, engine) for engine in ("tvm", "onnxruntime") for threads in (1, 2)}
            times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
            ends = time.perf_counter() + options.seconds
            while time.perf_counter() < ends:
                for key, run in runs.items():
                    run(x)
                    begun = time.perf_counter()
                    run(x)
                    times[key].append((time.perf_counter() - begun) * 1e3)
            middle = {key: float(np.median(values)) for key, values in times.items()}
            for threads in (1, 2):
                ratios[f"{threads} thread{'s' * (threads > 1)}"].append(middle["tvm", threads] / middle["onnxruntime", threads])
            ratios["TVM, 2 threads over 1"].append(middle["tvm", 2] / middle["tvm", 1])
        said = ", ".join(f"{engine} {threads}: {value:.3f} ms" for (engine, threads), value in middle.items())
        print(f"  last load: {said}")
        for name, values in ratios.items():
            print(f"  {name:22s} ratio {np.median(values):.3f} ({min(values):.3f} to {max(values):.3f} over {options.loads} loads)")


if __name__ == "__main__":
    main()
