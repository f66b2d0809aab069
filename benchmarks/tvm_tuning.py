"""Tuning: what trials bring and cost, that known kernels cost none, and that a killed run loses nothing.

    python -m benchmarks.tvm_tuning r56.exitify --trials 200 [--second other.exitify]

In a database of its own: a run that is killed at a random moment and started again until it ends; the same compile once
more; another artifact with the same layers. Then each task's chosen schedule against its default, timed in turn, and the
whole network tuned against untuned.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.benchmark import one_graph
from exitify.lower.library import lower_segments
from exitify.lower.pipeline import compile_artifact
from exitify.lower.processors import machine_of
from exitify.lower.tuning import space
from exitify.lower.tuning.database import Database
from exitify.lower.tuning.measure import LocalRunner
from exitify.lower.tuning.tasks import tasks_of
from exitify.targets import load_target


def records(folder: Path) -> list[str]:
    """Measurements in the database, whole lines alone."""
    return [line for path in folder.glob("*.jsonl") for line in path.read_text().split("\n")[:-1] if '"seconds"' in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--second", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tuning-"))
    output = folder / "tuned.exitify"
    command = [
        sys.executable,
        "-m",
        "exitify",
        "compile",
        str(options.artifact),
        "-o",
        str(output),
        "--trials",
        str(options.trials),
        "--db",
        str(folder),
    ]

    moments = random.Random(options.seed)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=15 + moments.uniform(0, 20))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    before = records(folder)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = records(folder)
    lost = sum(line not in after for line in before)
    print(
        f"killed after {len(before)} trials, {lost} lost; started again: {len(after) - len(before)} more in {seconds:.0f} s, all else included: ",
        end="",
    )
    print(f"{seconds / max(1, len(after) - len(before)):.2f} s a trial; {len(after)} in all")
    for name, path in (("the same again", options.artifact), ("another artifact", options.second)):
        if path:
            started = time.perf_counter()
            subprocess.run([*command[:4], str(path), *command[5:]], check=True, stdout=subprocess.DEVNULL)
            print(f"{name}: {len(records(folder)) - len(after)} trials, {time.perf_counter() - started:.1f} s")
            after = records(folder)

    machine, database = machine_of(load_target("host")), Database(folder)
    artifact = Artifact.open(options.artifact)
    tasks = tasks_of(lower_segments(artifact, artifact.plan.segments, machine), machine)
    runner = LocalRunner(machine)
    totals = np.zeros(2)
    slower = 0
    for task in sorted(tasks, key=lambda task: task.name):
        best = database.read(task.key).best
        if best is None:
            totals += task.calls * runner.seconds([space.apply(task.kernel, None, machine)], 15)[0]
            continue
        default, chosen = runner.seconds([space.apply(task.kernel, choice, machine) for choice in (None, best)], 25)
        slower += chosen > default
        totals += task.calls * np.array([default, chosen])
        print(f"  {task.name}: {default * 1e6:.1f} µs by default, {chosen * 1e6:.1f} µs chosen ({chosen / default:.3f}), {task.calls} calls")
    runner.close()
    print(f"{len(tasks)} tasks, {slower} chosen ones slower when timed again")
    print(f"all calls {totals[0] * 1e3:.3f} ms by default, {totals[1] * 1e3:.3f} ms chosen")
    runs = [one_graph(compile_artifact(artifact, load_target("host"), **given), 1, "tvm") for given in ({}, {"database": database})]
    x = np.random.default_rng(0).standard_normal((1, *artifact.manifest.input.shape)).astype(np.float32)
    times: list[list[float]] = [[], []]
    for _ in range(500):
        for run, found in zip(runs, times):
            run(x)
            started = time.perf_counter()
            run(x)
            found.append(time.perf_counter() - started)
    untuned, tuned = (float(np.median(found)) * 1e3 for found in times)
    print(f"the network without heads: {untuned:.3f} ms untuned, {tuned:.3f} ms tuned, ratio {tuned / untuned:.3f}")


if __name__ == "__main__":
    main()
