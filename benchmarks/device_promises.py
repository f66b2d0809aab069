"""Does `risk 0.02@0.95` stay true on devices whose heads learn? A thousand of them, each calibrated on its own draw, each seeing its own stream.

    python -m benchmarks.device_promises r56.exitify --devices 1000 --log promises.jsonl

A device's artifact is calibrated on 2,500 images drawn from the recorded population, whose disagreement under any heads
and thresholds is known exactly. Its promise holds if no version that was ever in use breaks it, judged against the
population of its stream: every class (`--classes all`), or the images of three classes (`--classes three`), which the
factory has promised nothing about: there `--prove-first` belongs. Resumable: devices in the log are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.recorded_device import TRIPLES, Device, Population, judged
from exitify.adapt.settings import Guards, Learning
from exitify.calibration.bounds import upper_bound
from exitify.calibration.calibrate import settle_risk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first device, to share the work")
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--classes", choices=("all", "three"), default="all")
    parser.add_argument("--prove-first", action="store_true", help="no exit before one is proven on the device's own stream")
    parser.add_argument("--log", type=Path, default=Path("promises.jsonl"))
    options = parser.parse_args()
    population = Population.record(options.artifact)
    known = {json.loads(line)["device"] for line in options.log.read_text().splitlines()} if options.log.exists() else set()
    for device in range(options.first, options.first + options.devices):
        if device not in known:
            with options.log.open("a") as log:
                log.write(json.dumps(live(population, device, options)) + "\n")
    rows = [json.loads(line) for line in options.log.read_text().splitlines()]
    for what in ("held", "held_at_start", "stream_held"):
        held = sum(row[what] for row in rows)
        print(f"{what}: {held} of {len(rows)} (at least {1 - upper_bound(len(rows) - held, len(rows), 0.95):.3f} at 95 %)")
    broke = sum(row["held_at_start"] and not row["held"] for row in rows)
    print(f"broken by learning where the factory's held: {broke}; devices with new heads in use: {sum(row['promoted'] > 0 for row in rows)}")
    cost = np.array([(row["cost_before"], row["cost_after"]) for row in rows]).mean(axis=0)
    print(f"mean cost {cost[0]:.3f} before, {cost[1]:.3f} after")


def live(population: Population, number: int, options: argparse.Namespace) -> dict[str, object]:
    """One device's life."""
    random = np.random.default_rng((7, number))
    draw = random.integers(0, len(population.labels), 2500)
    artifact = population.calibrated(
        draw, lambda outputs: settle_risk(outputs, population.artifact.plan, options.rate, options.confidence, seed=number)
    )
    everything = np.arange(len(population.labels))
    mine = everything if options.classes == "all" else np.flatnonzero(np.isin(population.labels, TRIPLES[number % len(TRIPLES)]))
    guards = Guards(left_for_rare=(0.3,), trust_factory=not options.prove_first)
    device = Device(population, artifact, Learning(guards=guards), seed=number)
    device.see(random.choice(mine, options.answers))
    factory = device.learner.factory
    verdicts = [judged(factory, ruling, population, mine) for _, ruling in device.versions]
    spans = np.diff([at for at, _ in device.versions] + [options.answers])
    rate = float(np.average([one.differs for one in verdicts], weights=spans))
    return {
        "device": number, "held": all(one.differs <= options.rate for one in verdicts), "held_at_start": verdicts[0].differs <= options.rate,
        "stream_held": rate <= options.rate, "rate": rate, "worst": max(one.differs for one in verdicts), "audited": device.audited,
        "promoted": sum(what.what == "in use" for _, what in device.happened), "trials": device.learner.trials,
        "alarms": sum(what.what in ("thresholds up", "updates off", "exits off") for _, what in device.happened),
        "cost_before": verdicts[0].cost, "cost_after": verdicts[-1].cost,
    }  # fmt: skip


if __name__ == "__main__":
    main()
