"""Handwritten digits, the whole way on this machine: train, place exits, train them, calibrate, write, run, time.

    python -m examples.digits.run

The pictures are scikit-learn's (1,797 scans of 8x8 pixels, shipped in the package), enlarged to 32x32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import exitify
from examples.digits.model import train_network
from exitify.artifact.manifest import Preprocess
from exitify.benchmark import BenchReport
from exitify.cli import tables
from exitify.data import Samples, load_samples
from exitify.train.heads import HeadTraining

CONTRACT = exitify.InputContract(
    shape=(1, 32, 32), color="L", preprocess=Preprocess(mean=(0.3,), std=(0.3,)), classes=tuple(str(digit) for digit in range(10))
)


def digits(folder: Path) -> dict[str, Samples]:
    """The pictures in three sets that share none: to train on, to calibrate on, to judge on."""
    scans = load_digits()
    bytes_ = (scans.images * 255 / 16).astype(np.uint8)
    pictures = np.stack([np.asarray(Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC)) for scan in bytes_])
    order = np.random.default_rng(0).permutation(len(pictures))
    sets = {}
    for name, rows in zip(("train", "calibrate", "judge"), np.split(order, (900, 1350))):
        np.savez(folder / f"{name}.npz", x=pictures[rows], y=scans.target[rows])
        sets[name] = load_samples(str(folder / f"{name}.npz"), CONTRACT, classes=10)
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of the network, and of the heads")
    parser.add_argument("--output", type=Path, default=Path("digits.exitify"))
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sets = digits(Path(folder))
        train = sets["train"]

        started = time.perf_counter()
        network = train_network(torch.from_numpy(train.inputs(slice(None))), torch.from_numpy(train.labels), options.epochs)
        say(f"Trained an ordinary residual network on {len(train)} digits", started)

        started = time.perf_counter()
        program = exitify.transform(network, torch.zeros(1, 1, 32, 32), exits=3)
        artifact = exitify.export(program, contract=CONTRACT, heads_trained=False)
        say("Placed exits, and wrote every piece as ONNX", started)
        tables.exits(artifact.plan)

        started = time.perf_counter()
        artifact, _ = exitify.train_heads(artifact, train, HeadTraining(epochs=2 * options.epochs, copies=6, batch=50), work=Path(folder) / "work")
        say("Trained the heads; the network itself is unchanged", started)

        started = time.perf_counter()
        artifact = exitify.calibrate(artifact, sets["calibrate"], max_drop=0.005)
        say(f"Calibrated on {len(sets['calibrate'])} other digits", started)
        artifact.save(options.output)
        tables.profile("default", artifact.profile("default"))

        written = exitify.Artifact.open(options.output)
        report = exitify.bench(written, sets["judge"])
        page = exitify.inspect(written, sets["judge"]).save(options.output.with_suffix(".html"), options.output.name)
    show(report, options.output)
    print(f"Open {page} in a browser: where it stops, what that costs and saves, and which digits are easy.")


def show(report: BenchReport, output: Path) -> None:
    """The one table: the same network, without and with exits."""
    before, after = report.baseline, report.artifact
    table = Table(title=f"\n{report.samples} digits that nothing has seen, one at a time, one thread", title_justify="left")
    for column in ("", "without exits", "with exits"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("right answers", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}")
    table.add_row("mean time", f"{before.mean_ms:.3f} ms", f"{after.mean_ms:.3f} ms  ({after.mean_ms / before.mean_ms:.2f} of it)")
    table.add_row("typical time (p50)", f"{before.p50_ms:.3f} ms", f"{after.p50_ms:.3f} ms")
    table.add_row("slow time (p95)", f"{before.p95_ms:.3f} ms", f"{after.p95_ms:.3f} ms")
    table.add_row("multiply-adds", "100 %", f"{report.mean_macs_share:.1%}")
    for name, share in report.exits.items():
        table.add_row(f"stopped at {name}", "", f"{share:.1%}")
    Console(width=100).print(table)
    print(f"Wrote {output}. It runs without torch: `exitify run {output} PICTURE`, `exitify inspect {output}`.")


def say(what: str, started: float) -> None:
    print(f"{what} ({time.perf_counter() - started:.0f} s).", flush=True)


if __name__ == "__main__":
    main()
