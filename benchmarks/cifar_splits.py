"""ResNet-56 on CIFAR-10: calibrated on one half of the test images, judged on the other, over 20 splits.

    python -m benchmarks.cifar_splits r56.exitify --max-drop 0.005

Prints the drop of accuracy (with its paired standard error over splits), the mean multiply-adds with heads counted, and
wall-clock against the same network as one ONNX graph in ONNX Runtime (batch 1, one thread, same process, in turn).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Profile
from exitify.benchmark import bench
from exitify.calibration.calibrate import exit_settings, record_outputs, settle_max_drop
from exitify.calibration.thresholds import NEVER, exits_taken
from exitify.data import load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--timed", type=int, default=250, help="images timed in each split")
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    plan = artifact.plan
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    samples = load_samples(f"{data}#test", artifact.manifest.input, classes=10)
    outputs = record_outputs(artifact, samples, threads=2)
    full = plan.full_macs
    rows, times, baseline = [], [], []
    for seed in range(options.splits):
        order = np.random.default_rng(seed).permutation(len(samples))
        half, judged = order[: len(order) // 2], order[len(order) // 2 :]
        settings = settle_max_drop(outputs.select(half), plan, options.max_drop, seed=seed)
        on = settings.thresholds < NEVER
        taken = exits_taken(outputs.select(judged).confidence(settings.temperatures, "top1"), settings.thresholds)
        right = outputs.logits.argmax(axis=2) == outputs.labels
        macs = plan.macs_at([point.name for point, is_on in zip(plan.exits, on) if is_on])
        cost = np.array([macs.get(name, 0) for name in plan.exit_names])[taken] / full
        drop = right[-1, judged].mean() - right[taken, judged].mean()
        rows.append((drop, cost.mean(), on.sum(), settings.promise.mean_macs_share))
        exits = exit_settings(plan, settings.thresholds, settings.temperatures)
        profile = Profile(artifact.manifest.model_id, "top1", exits, float(settings.temperatures[-1]), "", settings.promise, "onnxruntime", "")
        report = bench(
            artifact.with_profile("split", profile), samples.subset(judged), profile="split", most=options.timed, rounds=1, memory=False, seed=seed
        )
        baseline.append(report.baseline)
        times.append(report.artifact)
        ratio = report.artifact.mean_ms / report.baseline.mean_ms
        print(f"split {seed:2d}: drop {drop * 100:+.2f} points, MACs {cost.mean():.3f}, wall-clock {ratio:.3f}, {on.sum()} exits on", flush=True)
    table = np.array(rows)
    error = table[:, 0].std(ddof=1) / np.sqrt(len(table))
    drops, macs_shares = table[:, 0], table[:, 1]
    print(f"full network {right[-1].mean():.4f}; drop {drops.mean() * 100:.2f} ± {error * 100:.2f} points", end="; ")
    print(f"MACs {macs_shares.mean():.3f} (sd {macs_shares.std():.3f})")
    for name in ("mean_ms", "p50_ms", "p95_ms"):
        ours, theirs = (np.array([getattr(timing, name) for timing in series]) for series in (times, baseline))
        low, middle, high = np.percentile(ours / theirs, (25, 50, 75))
        print(f"{name}: exitify {ours.mean():.3f}, one graph {theirs.mean():.3f}, ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
