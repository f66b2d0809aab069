"""Answers of a library for aarch64 against this machine's own, on CIFAR-10's test images.

    python -m benchmarks.aarch64_answers r56.exitify --images 200

Compiles here, for `--target` and for this machine, and runs the former on the processor that QEMU emulates
(tests/emulator.py). An image that leaves elsewhere there is a tie if its score here lies within `--tolerance` of the
threshold at the exit where the two part; any other is a fault. What it takes there says nothing about a board.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.data import load_samples
from exitify.lower.pipeline import compile_artifact
from exitify.plan import FINAL
from exitify.runtime.session import Session
from exitify.targets import load_target
from tests.emulator import ORIN, emulated_python

ANSWER = """
import json, sys
import numpy as np
from exitify import Session
path, engine, inputs, *profiles = sys.argv[1:]
xs = np.load(inputs)
document = {}
for profile in profiles:
    session = Session.load(path, engine=engine, profile=profile)
    document[profile] = [[a.label, a.exit, a.logits.astype(float).tolist()] for a in map(session.run, xs)]
print(json.dumps(document))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--target", default="aarch64-cpu")
    parser.add_argument("--cpu", default=ORIN, help="QEMU's name of the processor")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data"))
    artifact = Artifact.open(options.artifact)
    for target in ("host", options.target):
        artifact = compile_artifact(artifact, load_target(target))
        made = artifact.targets[load_target(target).name]
        print(
            f"compiled for {made.target}: {len(made.segments)} segments, within {max(s.error for s in made.segments.values()):.1e} of the reference"
        )
    samples = load_samples(f"{data / 'cifar10.npz'}#test", artifact.manifest.input, classes=artifact.plan.classes)
    x = samples.inputs(np.arange(options.images))
    profiles = (NO_PROFILE, options.profile)
    there = answers_there(artifact, x, profiles, options)
    for profile in profiles:
        for engine in ("tvm:host", "onnxruntime"):
            compare(artifact, x, there[profile], profile, engine, options)


def answers_there(artifact: Artifact, x: np.ndarray, profiles: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Label, exit and logits of every image, by profile."""
    python = emulated_python()
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "net.exitify")
        np.save(Path(folder) / "x.npy", x)
        started = time.perf_counter()
        engine = f"tvm:{load_target(options.target).name}"
        done = python.run("-c", ANSWER, path, engine, Path(folder) / "x.npy", *profiles, cpu=options.cpu, timeout=3600)
    if done.returncode:
        raise SystemExit(f"the emulated Python ended with {done.returncode}: {done.stderr}")
    print(f"{len(profiles) * len(x)} answers on an emulated {options.cpu} in {time.perf_counter() - started:.0f} s")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def compare(artifact: Artifact, x: np.ndarray, there: list[Any], profile: str, engine: str, options: argparse.Namespace) -> None:
    """Print how the answers there compare with an engine's here."""
    session = Session(artifact, engine=engine, profile=profile)
    labels = exits = ties = 0
    largest = 0.0
    for row, (label, exit_name, logits) in zip(x, there):
        answer = session.run(row)
        labels += label != answer.label
        if exit_name == answer.exit:
            difference = np.abs(np.array(logits) - answer.logits).max() / np.abs(answer.logits).max()
            largest = max(largest, float(difference))
        else:
            exits += 1
            parted = min((exit_name, answer.exit), key=artifact.plan.exit_names.index)
            distance = abs(score(artifact, session, row, parted) - artifact.profile(profile).exits[parted].threshold)
            ties += distance <= options.tolerance
    left = {name: sum(found == name for _, found, _ in there) for name in artifact.plan.exit_names}
    shown = ", ".join(f"{name} {count}" for name, count in left.items() if count)
    print(f"profile {profile!r} against {engine}: {labels} of {len(x)} labels differ, {exits} exits differ, {ties} of those are ties;")
    print(f"  logits of the same exit differ by at most {largest:.1e} of their largest; left at {shown}")


def score(artifact: Artifact, session: Session, row: np.ndarray, exit_name: str) -> float:
    """What the profile holds against the threshold of an exit."""
    assert exit_name != FINAL
    assert session.profile_name is not None
    profile = artifact.profile(session.profile_name)
    logits = session.record(row[None]).logits[exit_name][0].astype(np.float64) / profile.exits[exit_name].temperature
    powers = np.exp(logits - logits.max())
    second, first = np.sort(powers / powers.sum())[-2:]
    return float(first if profile.policy == "top1" else first - second)


if __name__ == "__main__":
    main()
