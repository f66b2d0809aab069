"""Which loss should the search for thresholds minimise? Observed errors, expected ones, or the mean of both.

    python -m benchmarks.search_loss r56.exitify --max-drop 0.005

Each is used over the same splits of the test images into halves: calibrated on one, judged on the other. Also shown:
what a search does that trusts its own samples (no cross-fitting).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.calibration import calibrate
from exitify.calibration.calibrate import Outputs, record_outputs, settle_max_drop
from exitify.calibration.temperature import fit_temperature, log_softmax
from exitify.calibration.thresholds import NEVER, exits_taken, judge, price_path
from exitify.data import load_samples
from exitify.plan import Plan


def observed(outputs: Outputs, temperatures: np.ndarray) -> np.ndarray:
    wrong = (outputs.logits.argmax(axis=2) != outputs.labels).astype(float)
    return wrong - wrong[-1]


def expected(outputs: Outputs, temperatures: np.ndarray) -> np.ndarray:
    belief = np.exp(log_softmax(outputs.logits[-1] / temperatures[-1]))
    error = 1.0 - np.take_along_axis(belief, outputs.logits.argmax(axis=2).T, axis=1).T
    return error - error[-1]


def trusting(outputs: Outputs, plan: Plan, max_drop: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and temperatures of a search that judges itself on the samples it saw."""
    temperatures = np.array([fit_temperature(logits, outputs.labels) for logits in outputs.logits])
    recorded = calibrate.recorded_outputs(outputs, temperatures, plan, "top1", observed(outputs, temperatures))
    chosen, least = np.full(len(plan.exits), NEVER), np.inf
    for thresholds in price_path(recorded):
        loss, cost = judge(recorded, thresholds)
        if loss <= max_drop and cost < least:
            chosen, least = thresholds, cost
    return chosen, temperatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--splits", type=int, default=20)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    plan = artifact.plan
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    outputs = record_outputs(artifact, load_samples(f"{data}#test", artifact.manifest.input, classes=10), threads=2)
    right = outputs.logits.argmax(axis=2) == outputs.labels
    mean_of_both = calibrate.excess_error
    for name, loss in (("mean of both", mean_of_both), ("observed", observed), ("expected", expected), ("observed, no cross-fit", None)):
        rows = []
        for seed in range(options.splits):
            order = np.random.default_rng(seed).permutation(len(outputs.labels))
            half, judged = np.array_split(order, 2)
            if loss is None:
                thresholds, temperatures = trusting(outputs.select(half), plan, options.max_drop)
            else:
                calibrate.excess_error = loss  # type: ignore[assignment]
                settings = settle_max_drop(outputs.select(half), plan, options.max_drop, seed=seed)
                thresholds, temperatures = settings.thresholds, settings.temperatures
            taken = exits_taken(outputs.select(judged).confidence(temperatures, "top1"), thresholds)
            rows.append((right[-1, judged].mean() - right[taken, judged].mean(), calibrate._macs(plan, (), thresholds)[taken].mean()))
        drop, macs = np.array(rows).T
        error = drop.std(ddof=1) / np.sqrt(len(rows))
        print(f"{name:24s} drop {drop.mean() * 100:.2f} ± {error * 100:.2f} points, MACs {macs.mean():.3f}", flush=True)


if __name__ == "__main__":
    main()
