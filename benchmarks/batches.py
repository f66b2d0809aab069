"""Throughput in batches with exits against the ideal: the whole network's throughput over the mean share of its cost that was spent.

    exitify compile r56.exitify --target host --batch 2,4,8,16,32
    exitify calibrate r56.exitify --data CIFAR#test --max-drop 0.005
    python -m benchmarks.batches r56.exitify CIFAR#test

Samples leave at exits, and those that are left go on together. The whole network is the same library by the same runtime with no exit, in
batches as large, in turn with it. A cost is counted in multiply-adds, and in the time that segments take one by one, on as many threads
as share a sample; heads that were tried count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.calibration.segment_times import measure_segments, run_times
from exitify.data import load_samples
from exitify.runtime.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("data")
    parser.add_argument("--profile", help="By default the last one.")
    parser.add_argument("--engine", default="tvm")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    plan, samples = artifact.plan, load_samples(options.data, artifact.manifest.input, classes=artifact.plan.classes)
    profile = options.profile or list(artifact.profiles)[-1]
    enabled = [name for name, setting in artifact.profiles[profile].exits.items() if setting.enabled]
    x = samples.inputs(slice(0, options.samples))
    print("| threads | batch | whole network, samples/s | with exits | share of multiply-adds | of that ideal | share of time | of that ideal |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for threads in options.threads:
        session = Session(artifact, engine=options.engine, profile=profile, threads=threads)
        whole = Session(artifact, engine=options.engine, profile="none", threads=threads)
        times = measure_segments(artifact, engine=options.engine, threads=1 if session.engine.shares_samples else threads)
        ms = run_times(plan, times, enabled, plan.mask(artifact.profiles[profile].skip))
        for batch in options.batch:
            parts = [x[start : start + batch] for start in range(0, len(x), batch)]
            whole.run_batch(parts[0])
            answers = [answer for part in parts for answer in session.run_batch(part)]
            shares = [
                np.mean([answer.macs for answer in answers]) / plan.full_macs,
                np.mean([ms[answer.exit] for answer in answers]) / times.whole_ms,
            ]
            ratios, rates = [], []
            for _ in range(options.rounds):
                started = time.perf_counter()
                for part in parts:
                    whole.run_batch(part)
                middle = time.perf_counter()
                for part in parts:
                    session.run_batch(part)
                spent = np.array([middle - started, time.perf_counter() - middle])
                rates.append(len(x) / spent)
                ratios.append(spent[0] / spent[1])
            alone, exits = np.median(rates, axis=0)
            ideals = " | ".join(
                f"{share:.3f} | {np.median(ratios) * share:.3f} ({min(ratios) * share:.3f} to {max(ratios) * share:.3f})" for share in shares
            )
            print(f"| {threads} | {batch} | {alone:.0f} | {exits:.0f} | {ideals} |", flush=True)


if __name__ == "__main__":
    main()
