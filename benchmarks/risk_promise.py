"""Does `--risk 0.02@0.95` hold? Calibration sets drawn with replacement, each judged against the whole recorded population.

    python -m benchmarks.risk_promise r56.exitify --rate 0.02 --confidence 0.95

The population is the 5,000 test images of $EXITIFY_DATA/cifar10.npz: its disagreement under given thresholds is known
exactly, so a promise either holds or does not (a held-out half would be a sample itself).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.calibration.bounds import upper_bound
from exitify.calibration.calibrate import record_outputs, settle_risk
from exitify.calibration.thresholds import exits_taken
from exitify.data import load_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--size", type=int, default=2500, help="samples in a calibration set")
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    plan = artifact.plan
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    population = record_outputs(artifact, load_samples(f"{data}#test", artifact.manifest.input, classes=10), threads=2)
    count = len(population.labels)
    everyone = np.arange(count)
    predictions = population.logits.argmax(axis=2)
    rates, macs = [], []
    for draw in range(options.draws):
        rows = np.random.default_rng(draw).integers(0, count, options.size)
        settings = settle_risk(population.select(rows), plan, options.rate, options.confidence, seed=draw)
        taken = exits_taken(population.confidence(settings.temperatures, "top1"), settings.thresholds)
        rates.append((predictions[taken, everyone] != predictions[-1]).mean())
        macs.append(settings.promise.mean_macs_share)
        if draw % 100 == 99:
            held = int((np.array(rates) <= options.rate).sum())
            means = f"mean disagreement {np.mean(rates):.4f}, MACs {np.mean(macs):.3f}"
            print(f"{draw + 1} draws: held in {held} ({held / (draw + 1):.3f}), {means}", flush=True)
    held = int((np.array(rates) <= options.rate).sum())
    bound = 1 - upper_bound(len(rates) - held, len(rates), 0.95)
    promise = f"promise {options.rate:g}@{options.confidence:g} on {options.size} samples"
    print(f"{promise}: held in {held} of {len(rates)} draws (at least {bound:.3f} at 95 %)")


if __name__ == "__main__":
    main()
