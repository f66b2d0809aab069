"""Networks compiled by TVM without tuning against ONNX Runtime: whole network, batch 1, one thread and two.

    exitify transform torchvision:resnet18 -o resnet18.exitify
    python -m benchmarks.tvm_speed resnet18.exitify r56.exitify
    python -m benchmarks.tvm_speed resnet18.exitify --trials 500

Compiles each artifact for this machine (the time is printed), with `--trials` tuned too, then runs all in turn in one process, buffers
bound once, several loads of each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.benchmark import one_graph
from exitify.lower.pipeline import compile_artifact
from exitify.lower.tuning.database import Database
from exitify.targets import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--trials", type=int, default=0, help="Of tuning, in a database of its own unless one is given.")
    parser.add_argument("--db", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="Of timing, a load.")
    options = parser.parse_args()
    for path in options.artifacts:
        started = time.perf_counter()
        artifact = compile_artifact(Artifact.open(path), load_target("host"))
        print(f"{path.stem}: {artifact.plan.full_macs / 1e6:.0f} M multiply-adds, compiled in {time.perf_counter() - started:.1f} s")
        contenders = {"tvm": (artifact, "tvm"), "onnxruntime": (artifact, "onnxruntime")}
        if options.trials:
            database = Database(options.db or Path(tempfile.mkdtemp(prefix="tuning-")))
            started = time.perf_counter()
            tuned = compile_artifact(Artifact.open(path), load_target("host"), trials=options.trials, database=database)
            print(f"  tuned within {options.trials} trials in {time.perf_counter() - started:.0f} s")
            contenders["tuned"] = tuned, "tvm"
        x = np.random.default_rng(0).standard_normal((1, *artifact.manifest.input.shape)).astype(np.float32)
        ratios: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.loads):
            runs = {(name, threads): one_graph(made, threads, engine) for name, (made, engine) in contenders.items() for threads in (1, 2)}
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
                counted = f"{threads} thread{'s' * (threads > 1)}"
                ratios[counted].append(middle["tvm", threads] / middle["onnxruntime", threads])
                if options.trials:
                    ratios[f"tuned, {counted}"].append(middle["tuned", threads] / middle["onnxruntime", threads])
                    ratios[f"tuned over untuned, {counted}"].append(middle["tuned", threads] / middle["tvm", threads])
            ratios["TVM, 2 threads over 1"].append(middle["tvm", 2] / middle["tvm", 1])
        said = ", ".join(f"{engine} {threads}: {value:.3f} ms" for (engine, threads), value in middle.items())
        print(f"  last load: {said}")
        for name, values in ratios.items():
            print(f"  {name:30s} ratio {np.median(values):.3f} ({min(values):.3f} to {max(values):.3f} over {options.loads} loads)")


if __name__ == "__main__":
    main()
