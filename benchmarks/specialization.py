"""What learning on the device gives and what it must not take: figures of docs/specialization.md.

    python -m benchmarks.specialization few r56.exitify --figure docs/figures/specialization.png
    python -m benchmarks.specialization stationary r56.exitify
    python -m benchmarks.specialization poison r56.exitify
    python -m benchmarks.specialization latency r56.exitify --engine tvm
    python -m benchmarks.specialization cost r56.exitify

`few`: devices that see three of ten classes, five triples, several splits of the test images into 2,500 to calibrate on, 1,000 to stream and
1,500 to judge. `stationary`: 100,000 answers to all classes. `poison`: streams that teach nonsense, with guard rails and without.
`latency`: the same devices' answers on an engine, before and after in turn, one thread. `cost`: an update's time, beside a forward pass.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.recorded_device import TRIPLES, Device, Judged, Population, judged
from exitify.adapt.learner import Learner
from exitify.adapt.review import Factory, Ruling
from exitify.adapt.session import LearningSession
from exitify.adapt.settings import Guards, Learning
from exitify.adapt.update import Classifier, Sgd, step, targets_of
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import SegmentTimes
from exitify.calibration.calibrate import Outputs, Settings, settle_max_drop, settle_risk
from exitify.calibration.segment_times import measure_segments
from exitify.calibration.thresholds import NEVER
from exitify.data import load_samples
from exitify.runtime.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("few", "stationary", "poison", "latency", "cost"))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--answers", type=int, default=15_000, help="a device gives in `few`")
    parser.add_argument("--updates", type=int, default=100_000, help="of all heads together in `stationary`")
    parser.add_argument("--risk", action="store_true", help="calibrate for a rate of 2 % at 95 % in place of a drop of half a point")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--engine", default="onnxruntime", help="that `latency` measures")
    parser.add_argument("--lax", type=float, default=1.0, help="how much farther from 1 thresholds are in `latency`, to compare at equal accuracy")
    parser.add_argument("--times", action="store_true", help="measure segments first, for devices that save time and not multiply-adds")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.what == "cost":
        cost(options.artifact)
        return
    population = Population.record(options.artifact)
    {"few": few, "stationary": stationary, "poison": poison, "latency": latency}[options.what](population, options)


def settle(population: Population, options: argparse.Namespace, seed: int) -> Callable[[Outputs], Settings]:
    plan = population.artifact.plan
    if options.risk:
        return lambda outputs: settle_risk(outputs, plan, 0.02, 0.95, seed=seed)
    return lambda outputs: settle_max_drop(outputs, plan, 0.005, seed=seed)


@dataclass(frozen=True)
class Life:
    """Before and after on the classes seen and on the others, and curves over thresholds of both."""

    triple: int
    few: tuple[Judged, Judged]
    rest: tuple[Judged, Judged]
    curves: tuple[NDArray[np.float64], ...]
    audited: float
    drift: float
    same_at_full_depth: bool


def few(population: Population, options: argparse.Namespace) -> None:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    lives = list(_lives(population, options))
    print(f"{'classes':24} {'right, seen':>18} {'cost, seen':>22} {'right, others':>18} audited")
    for number, triple in enumerate((*TRIPLES, None)):
        mine = [life for life in lives if triple is None or life.triple == number]
        few_, rest = (np.array([[(one.accuracy, one.cost) for one in getattr(life, part)] for life in mine]) for part in ("few", "rest"))
        (a0, c0), (a1, c1) = few_.mean(axis=0)
        change = (few_[:, 1, 1] / few_[:, 0, 1] - 1).mean()
        r0, r1 = rest.mean(axis=0)[:, 0]
        called = "mean" if triple is None else " ".join(names[label] for label in triple)
        audited = np.mean([life.audited for life in mine])
        print(f"{called:24} {a0:8.2%} {a1:8.2%} {c0:9.3f} {c1:.3f} {change:+7.1%} {r0:8.2%} {r1:8.2%} {audited:8.1%}")
    every = np.array([[life.few[1].accuracy - life.few[0].accuracy, life.few[1].cost / life.few[0].cost - 1,
                       life.rest[1].accuracy - life.rest[0].accuracy] for life in lives])  # fmt: skip
    error = every.std(axis=0) / np.sqrt(len(every))
    print(f"over {len(lives)} devices: right, seen {every[:, 0].mean() * 100:+.2f} ± {error[0] * 100:.2f} points; cost {every[:, 1].mean():+.1%} ± "
          f"{error[1]:.1%}; right, others {every[:, 2].mean() * 100:+.2f} ± {error[2] * 100:.2f} points")  # fmt: skip
    for what, index, before in (("as many answers are right as before", 1, (0.0, 0)), ("the others have lost a point", 3, (-0.01, 1))):
        print(f"on the curves of the figure, where {what}: {_on_the_curve(lives, index, *before)}")
    print(f"others at full depth unchanged: {all(life.same_at_full_depth for life in lives)}; largest drift of a head that learns "
          f"{max(life.drift for life in lives):.1%}")  # fmt: skip
    if options.figure:
        draw(lives, names, options.figure)


def _lives(population: Population, options: argparse.Namespace) -> Iterator[Life]:
    for split in range(options.splits):
        for number, (device, judge) in enumerate(_devices(population, options, split)):
            theirs = np.isin(population.labels[judge], TRIPLES[number])
            factory, after = device.learner.factory, device.learner.in_use
            curves = [_curve(factory, ruling, population, rows) for rows in (judge[theirs], judge[~theirs]) for ruling in (factory.ruling, after)]
            parts = [
                tuple(judged(factory, ruling, population, rows) for ruling in (factory.ruling, after)) for rows in (judge[theirs], judge[~theirs])
            ]
            whole = [
                judged(factory, replace(one, thresholds=np.full_like(one.thresholds, NEVER)), population, judge[~theirs])
                for one in (factory.ruling, after)
            ]
            drift = max(ours.distance(own) for ours, own in zip(device.learner.learnt, factory.ruling.heads))
            yield Life(number, *parts, tuple(curves), device.audited / device.learner.answers, drift, whole[0].accuracy == whole[1].accuracy)  # type: ignore[arg-type]


SHARES = np.geomspace(0.05, 8.0, 40)
"""How far from 1 thresholds are moved for a curve, as shares of what they were."""


def _laxer(ruling: Ruling, share: float) -> Ruling:
    return replace(ruling, thresholds=np.where(ruling.thresholds < NEVER, 1 - (1 - ruling.thresholds) * share, NEVER))


def latency(population: Population, options: argparse.Namespace) -> None:
    """Milliseconds of answers to the classes seen, before and after, image by image in turn."""
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    samples = load_samples(f"{data}#test", population.artifact.manifest.input, classes=10)
    times = measure_segments(population.artifact, engine=options.engine) if options.times else None
    changes = []
    for split in range(options.splits):
        for number, (device, rows) in enumerate(_devices(population, options, split, times)):
            sessions = [Session(device.artifact, engine=options.engine, profile=one) for one in ("default", "default", "default", "none")]
            sessions[1].change_exits(device.learner.tensors, device.learner.settings)
            lax = device.learner.factory.settings(_laxer(device.learner.in_use, options.lax))
            sessions[2].change_exits(device.learner.tensors, lax)
            mine = rows[np.isin(population.labels[rows], TRIPLES[number])]
            inputs = samples.inputs(mine)
            took, right = np.zeros((4, 5, len(mine))), np.zeros((4, len(mine)))
            for turn in range(-1, 5):
                for i, x in enumerate(inputs):
                    for k in np.roll(range(4), i):
                        answer = sessions[k].run(x)
                        right[k, i] = answer.label == population.labels[mine[i]]
                        if turn >= 0:
                            took[k, turn, i] = answer.ms
            before, after, laxer, whole = np.median(took, axis=1).mean(axis=1)
            rights = right.mean(axis=1)
            changes.append((after / before - 1, rights[1] - rights[0], before / whole, after / whole, laxer / before - 1, rights[2] - rights[0]))
            print(f"split {split} {TRIPLES[number]}: {whole:.3f} ms whole, {before:.3f} before, {after:.3f} after ({after / before - 1:+.1%}), right "
                  f"{right[0].mean():.2%} and {right[1].mean():.2%}", flush=True)  # fmt: skip
    found, error = np.mean(changes, axis=0), np.std(changes, axis=0) / np.sqrt(len(changes))
    print(
        f"{sessions[0].engine.full_name}: mean latency {found[0]:+.1%} ± {error[0]:.1%}, right {found[1] * 100:+.2f} ± {error[1] * 100:.2f} points; "
        f"of the whole network's {found[2]:.3f} before, {found[3]:.3f} after. Thresholds {options.lax:g} times as far from 1: "
        f"{found[4]:+.1%} ± {error[4]:.1%}, right {found[5] * 100:+.2f} ± {error[5] * 100:.2f} points"
    )


def _devices(
    population: Population, options: argparse.Namespace, split: int, times: SegmentTimes | None = None
) -> Iterator[tuple[Device, NDArray[np.integer]]]:
    """A device for each triple that has seen its stream, and the rows to judge on."""
    order = np.random.default_rng(100 + split).permutation(len(population.labels))
    calibrate, stream, judge = np.split(order, [2500, 3500])
    artifact = population.calibrated(calibrate, settle(population, options, split))
    for number, triple in enumerate(TRIPLES):
        mine = np.isin(population.labels[stream], triple)
        device = Device(population, artifact, Learning(Sgd(options.learning_rate)), times=times, seed=split)
        random = np.random.default_rng((split, number))
        device.see(np.concatenate([random.permutation(stream[mine]) for _ in range(options.answers // int(mine.sum()))]))
        yield device, judge


def _curve(factory: Factory, ruling: Ruling, population: Population, rows: NDArray[np.integer]) -> NDArray[np.float64]:
    """Accuracy and cost as thresholds become stricter or laxer together, as in the paper's figure 4; `(points, 2)`."""
    found = []
    for share in SHARES:
        one = judged(factory, _laxer(ruling, share), population, rows)
        found.append((one.accuracy, one.cost))
    return np.array(found)


def _on_the_curve(lives: list[Life], index: int, change: float, part: int) -> str:
    """Where a mean curve after learning falls to an accuracy, from strict to lax.

    index: Of the curve. change: From before. part: Of what: 0 classes seen, 1 others.
    """
    before = np.mean([[(one.accuracy, one.cost) for one in (life.few[0], life.rest[0])] for life in lives], axis=0)
    curve, seen, others = (np.mean([life.curves[k] for life in lives], axis=0) for k in (index, 1, 3))
    wanted = before[part, 0] + change
    at = int(np.argmax(curve[:, 0] < wanted))
    if at == 0:
        return "nowhere on them"
    share = (curve[at - 1, 0] - wanted) / (curve[at - 1, 0] - curve[at, 0])
    (right, cost), (rest, _) = (one[at - 1] + share * (one[at] - one[at - 1]) for one in (seen, others))
    points = f"seen {100 * (right - before[0, 0]):+.2f}, others {100 * (rest - before[1, 0]):+.2f} points"
    lax = SHARES[at - 1] * (SHARES[at] / SHARES[at - 1]) ** share
    return f"cost {cost:.3f} after {before[0, 1]:.3f}, {cost / before[0, 1] - 1:+.1%}; {points}; thresholds {lax:.2f} times as far from 1"


def draw(lives: list[Life], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4.2), sharey=True)
    for number, (triple, axis) in enumerate(zip(TRIPLES, axes)):
        mine = [life for life in lives if life.triple == number]
        for index, (colour, line, label) in enumerate(
            (
                ("tab:green", "-", "seen, before"),
                ("tab:green", ":", "seen, after"),
                ("tab:red", "-", "others, before"),
                ("tab:red", ":", "others, after"),
            )
        ):
            mean = np.mean([life.curves[index] for life in mine], axis=0)
            axis.plot(mean[:, 1], 100 * mean[:, 0], colour, linestyle=line, linewidth=2, label=label)
        for part, colour in (("few", "tab:green"), ("rest", "tab:red")):
            for when, marker in ((0, "o"), (1, "s")):
                points = np.array([(getattr(life, part)[when].cost, getattr(life, part)[when].accuracy) for life in mine]).mean(axis=0)
                axis.plot(points[0], 100 * points[1], marker, color=colour, markersize=8)
        axis.set_title(", ".join(names[label] for label in triple))
        axis.set_xlabel("mean cost, of the network's")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, %")
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def stationary(population: Population, options: argparse.Namespace) -> None:
    """All classes, for ever: accuracy on the population of every version that was in use, against the factory's."""
    for split in range(options.splits):
        _one_stationary(population, options, split)


def _one_stationary(population: Population, options: argparse.Namespace, split: int) -> None:
    order = np.random.default_rng(split).permutation(len(population.labels))
    artifact = population.calibrated(order[:2500], settle(population, options, split))
    device = Device(population, artifact, Learning(Sgd(options.learning_rate)), seed=split)
    random, everything = np.random.default_rng((1, split)), np.arange(len(population.labels))
    started = time.perf_counter()
    while device.learner.updates < options.updates and device.learner.stage == "learning":
        device.see(random.choice(everything, 1000))
    factory = device.learner.factory
    first = judged(factory, factory.ruling, population, everything)
    verdicts = [judged(factory, ruling, population, everything) for _, ruling in device.versions]
    worst = min(one.accuracy for one in verdicts)
    print(f"{device.learner.answers} answers, {device.learner.updates} updates, {len(verdicts) - 1} new versions, {device.audited} audits, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    print(f"factory {first.accuracy:.2%} right, {first.differs:.2%} other answers, cost {first.cost:.3f}; last {verdicts[-1].accuracy:.2%}, "
          f"{verdicts[-1].differs:.2%}, {verdicts[-1].cost:.3f}; worst version {(worst - first.accuracy) * 100:+.2f} points against "
          f"{factory.limit * 100:.1f} promised")  # fmt: skip
    for at, what in device.happened:
        print(f"  {at}: {what.what} {what.exit} {what.reason}")


def poison(population: Population, options: argparse.Namespace) -> None:
    """Streams of nonsense, then clean ones; with guard rails and without. Accuracy on clean images of all classes at the profile."""
    order = np.random.default_rng(0).permutation(len(population.labels))
    artifact = population.calibrated(order[:2500], settle(population, options, 0))
    session = Session(population.artifact, profile="none", threads=2)
    everything = np.arange(len(population.labels))
    images = _strange_images(session)
    wrong = np.flatnonzero(population.logits[-1].argmax(1) != population.labels)
    sure = wrong[np.argsort(-population.logits[-1].max(axis=1)[wrong])[:20]]
    cat = np.flatnonzero(population.labels == 3)
    streams: dict[str, Callable[[np.random.Generator], tuple[list[NDArray[np.float32]], NDArray[np.float32]]]] = {
        "constant image": lambda random: ([z[0] for z in images["grey"][0]], images["grey"][1][0]),
        "noise": lambda random: _one(images["noise"], int(random.integers(len(images["noise"][1])))),
        "one class only": lambda random: _one(population.rows(cat), int(random.integers(len(cat)))),
        "images it gets wrong": lambda random: _one(population.rows(sure), int(random.integers(len(sure)))),
        "labels turned": lambda random: _turned(population, int(random.integers(len(everything)))),
    }
    for name, draw_one in streams.items():
        for guarded in (True, False):
            how = Learning(Sgd(max(options.learning_rate, 1e-2)), guards=Guards() if guarded else None)
            device = Device(population, artifact, how, seed=0)
            random = np.random.default_rng(2)
            factory = device.learner.factory
            before = judged(factory, factory.ruling, population, everything)
            worst = before.accuracy
            for turn in range(20_000):
                audit = device.learner.wants_audit()
                device.take(device.trace(*draw_one(random), to_end=audit), audited=audit)
                if turn % 2000 == 1999:
                    worst = min(worst, judged(factory, device.learner.in_use, population, everything).accuracy)
            poisoned = judged(factory, device.learner.in_use, population, everything)
            alone = factory.outputs(device.learner.in_use.heads, population.rows(everything)).logits.argmax(axis=2)[:-1] == population.labels
            device.see(random.choice(everything, 10_000))
            clean = judged(factory, device.learner.in_use, population, everything)
            events: dict[str, int] = {}
            for _, what in device.happened:
                events[what.what] = events.get(what.what, 0) + 1
            called = f"{name:22} {'guarded' if guarded else 'unguarded':9}"
            print(
                f"{called} before {before.accuracy:.2%} at cost {before.cost:.3f}; worst {worst:.2%}; after 20,000 {poisoned.accuracy:.2%} at cost "
                f"{poisoned.cost:.3f}, heads alone {alone.mean():.1%}; after 10,000 clean ones {clean.accuracy:.2%} at cost {clean.cost:.3f}; "
                f"{events or 'nothing happened'}",
                flush=True,
            )


def _one(rows: tuple[list[NDArray[np.float32]], NDArray[np.float32]], row: int) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    return [array[row] for array in rows[0]], rows[1][row]


def _turned(population: Population, row: int) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """An image whose deepest exit, broken or attacked, says the next class."""
    features, logits = population.rows(np.array([row]))
    return [array[0] for array in features], np.roll(logits[0], 1)


def _strange_images(session: Session) -> dict[str, tuple[list[NDArray[np.float32]], NDArray[np.float32]]]:
    random = np.random.default_rng(3)
    made = {"grey": np.full((1, 32, 32, 3), 128, np.uint8), "noise": random.integers(0, 256, (500, 32, 32, 3)).astype(np.uint8)}
    found = {}
    for name, pixels in made.items():
        recording = session.record(pixels)
        found[name] = list(recording.features.values()), recording.logits["final"]
    return found


def cost(path: Path) -> None:
    """Medians of an update beside a forward pass of the whole network, in turn."""
    artifact = Artifact.open(path)
    random = np.random.default_rng(0)
    for classes, width in ((10, 64), (1000, 512), (1000, 2048)):
        head = Classifier((random.standard_normal((classes, width)) * 0.02).astype(np.float32), np.zeros(classes, np.float32))
        z = random.standard_normal((1, width)).astype(np.float32)
        logits = z @ head.weight.T + head.bias
        wanted = targets_of(random.standard_normal((1, classes)), "hard")
        fresh = _median(functools.partial(step, head, z, logits, wanted, Sgd()))
        spare = _median(functools.partial(step, head, z, logits, wanted, Sgd(), None, step(head, z, logits, wanted, Sgd())[0].weight))
        print(f"update of {classes}x{width}: {spare:.3f} ms in memory that was there, {fresh:.3f} in fresh memory")
    whole = Session(artifact, profile="none")
    x = random.standard_normal((200, *artifact.manifest.input.shape)).astype(np.float32)
    rows = iter(range(10**9))
    forward = "forward pass, whole network"
    ways: dict[str, Callable[[], object]] = {forward: lambda: whole.run(x[next(rows) % 200])}
    if "default" in artifact.profiles:
        learning = LearningSession(artifact, how=Learning(), seed=0)
        traces = [learning.trace(row) for row in x]
        learner: Learner = learning.learner
        pupil = next(iter(learner._pupils.values()))
        z, wanted = traces[0].visits[0].features, targets_of(traces[0].answer.logits, "hard")
        ways["update of one head"] = lambda: learner._teach(pupil, z, wanted)
        ways["everything learning does after an answer"] = lambda: learner.observe(traces[next(rows) % 200], audited=False)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(15):
        for name, way in ways.items():
            times[name].append(_median(way, 60))
    base = np.median(times[forward])
    for name, found in times.items():
        print(f"{name}: {np.median(found):.4f} ms, {np.median(found) / base:.2%} of a forward pass")


def _median(way: Callable[[], object], count: int = 200) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        way()
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times))


if __name__ == "__main__":
    main()
