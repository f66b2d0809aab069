"""An artifact on TVM against the same on ONNX Runtime: exits and labels of every picture, and the time of both.

    python -m benchmarks.tvm_answers r56.exitify --data cifar10.npz#test --profile default

Compiles for this machine without tuning. A picture that leaves elsewhere is counted as a tie if its score on ONNX Runtime
lies within `--tolerance` of the threshold at the exit where the two part; any other is a fault.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.data import load_samples
from exitify.lower.pipeline import compile_artifact
from exitify.runtime.session import Session
from exitify.targets import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--profile", default="default")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    artifact = compile_artifact(Artifact.open(options.artifact), load_target("host"))
    samples = load_samples(options.data, artifact.manifest.input, classes=artifact.plan.classes)
    sessions = [Session(artifact, engine=engine, profile=options.profile) for engine in ("tvm", "onnxruntime")]
    settings = artifact.profile(options.profile)
    times: list[list[float]] = [[], []]
    labels = exits = ties = 0
    largest = 0.0
    for i in range(len(samples)):
        x = samples.inputs(np.array([i]))
        answers = []
        for session, found in zip(sessions, times):
            started = time.perf_counter()
            answers.append(session.run(x))
            found.append((time.perf_counter() - started) * 1e3)
        tvm, ort = answers
        labels += tvm.label == ort.label
        exits += tvm.exit == ort.exit
        if tvm.exit == ort.exit:
            largest = max(largest, float(np.abs(tvm.logits - ort.logits).max()))
        else:
            parted = min((tvm.exit, ort.exit), key=artifact.plan.exit_names.index)
            setting = settings.exits[parted]
            logits = sessions[1].record(x).logits[parted][0].astype(np.float64) / setting.temperature
            p = np.sort(np.exp(logits - logits.max()))[::-1] / np.exp(logits - logits.max()).sum()
            score = p[0] if settings.policy == "top1" else p[0] - p[1]
            ties += abs(score - setting.threshold) <= options.tolerance
    count = len(samples)
    print(f"{labels} of {count} labels and {exits} exits the same; {ties} of {count - exits} that part are ties; logits within {largest:.1e}")
    for name, found in zip(("TVM", "ONNX Runtime"), times):
        p50, p95 = np.percentile(found, (50, 95))
        print(f"{name}: mean {np.mean(found):.3f} ms, p50 {p50:.3f}, p95 {p95:.3f}")
    print(f"mean over mean {np.mean(times[0]) / np.mean(times[1]):.3f}")


if __name__ == "__main__":
    main()
