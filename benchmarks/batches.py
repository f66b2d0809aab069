"""Throughput in batches with exits against the ideal: the whole network's throughput over the mean share of its multiply-adds that was spent.

    exitify compile r56.exitify --target host
    exitify calibrate r56.exitify --data CIFAR#test --max-drop 0.005
    python -m benchmarks.batches r56.exitify CIFAR#test

Samples leave at exits, and those that are left go on together. The whole network is the same library without its exits, in batches as large,
in turn with it. Heads that were tried count as spent.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.data import load_samples
from exitify.runtime.engines import make_engine
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
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    plan, samples = artifact.plan, load_samples(options.data, artifact.manifest.input, classes=artifact.plan.classes)
    x = samples.inputs(slice(0, options.samples))
    print("| threads | batch | whole network, samples/s | with exits | share of the multiply-adds | of the ideal |\n|---:|---:|---:|---:|---:|---:|")
    for threads in options.threads:
        session = Session(artifact, engine=options.engine, profile=options.profile or list(artifact.profiles)[-1], threads=threads)
        (whole,) = plan.stretches(())
        run = make_engine(options.engine, artifact, threads).prepare(whole)
        for batch in options.batch:
            parts = [x[start : start + batch] for start in range(0, len(x), batch)]
            spent = np.mean([answer.macs for part in parts for answer in session.run_batch(part)]) / plan.full_macs
            ratios, rates = [], []
            for _ in range(options.rounds):
                started = time.perf_counter()
                for part in parts:
                    run({plan.input: part})
                middle = time.perf_counter()
                for part in parts:
                    session.run_batch(part)
                times = [middle - started, time.perf_counter() - middle]
                rates.append(len(x) / np.array(times))
                ratios.append(times[0] / times[1] * spent)
            alone, exits = np.median(rates, axis=0)
            spread = f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"| {threads} | {batch} | {alone:.0f} | {exits:.0f} | {spent:.3f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
