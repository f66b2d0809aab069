"""Accuracy against time on CIFAR-10: exits alone, skip paths alone, and both, from one artifact.

    python -m benchmarks.cifar_front artifact --work DIR --seed 0 --output both.exitify      # from `cifar_skips train`; trains heads
    python -m benchmarks.cifar_front front both.exitify --plot front.png

`front` records every exit under every mask on the test images, and times every mask. On one half of the images each family
chooses what loses least within a time, for a row of times; the other half judges. Then the choices are timed as they are,
in turn, batch 1, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import exitify
from benchmarks.cifar_skips import MEAN, STD
from examples.cifar_resnet56.model import CifarResNet
from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import InputContract, Preprocess, Profile, Promise
from exitify.calibration.calibrate import Outputs, cross_fit, exit_settings, record_outputs
from exitify.calibration.thresholds import NEVER, exits_taken
from exitify.calibration.time_budget import time_masks
from exitify.data import Samples, load_samples
from exitify.plan import Mask, mask_text
from exitify.program import HEADS
from exitify.runtime.session import Session
from exitify.train.heads import HeadTraining

FAMILIES = ("exits alone", "skips alone", "both")
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Times within which a choice is made, as shares of the whole network's."""


@dataclass(frozen=True)
class Choice:
    """A mask with thresholds and temperatures. drop: Estimated on the half that it was chosen on."""

    mask: Mask
    thresholds: NDArray[np.float64]
    temperatures: NDArray[np.float64]
    drop: float
    ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["artifact", "front"])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("both.exitify"))
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    if options.what == "artifact":
        make(options, data)
    else:
        front(Artifact.open(options.path), load_samples(f"{data}#test", Artifact.open(options.path).manifest.input, classes=10), options)


def make(options: argparse.Namespace, data: Path) -> None:
    """The trained network with skip paths, given exits whose heads are trained."""
    torch.manual_seed(0)
    program = exitify.transform(CifarResNet((options.depth - 2) // 6), torch.zeros(1, 3, 32, 32), exits="auto", skips="auto")
    trained = torch.load(options.work / f"resnet{options.depth}-skips-{options.seed}.pt", weights_only=True, map_location="cpu")["model"]
    missing, unknown = program.load_state_dict(trained, strict=False)
    assert not unknown
    assert all(name.startswith(f"{HEADS}.") for name in missing)
    steps = Preprocess(mean=tuple(float(m) for m in MEAN), std=tuple(float(s) for s in STD))
    artifact = exitify.export(program.eval(), contract=InputContract((3, 32, 32), preprocess=steps), heads_trained=False)
    samples = load_samples(f"{data}#train", artifact.manifest.input, classes=10)
    artifact, reports = exitify.train_heads(artifact, samples, HeadTraining())
    artifact.save(options.output)
    print(artifact.plan.text(), *(f"{report.exit} {report.accuracy:.4f}" for report in reports), sep="\n")


def front(artifact: Artifact, samples: Samples, options: argparse.Namespace) -> None:
    """Print, and draw, accuracy against time of the three families."""
    plan = artifact.plan
    session = Session(artifact, profile=NO_PROFILE)
    nothing = plan.mask(None)
    masks = list(itertools.product((False, True), repeat=len(plan.skips)))
    recorded = {nothing: record_outputs(artifact, samples, session=session)}
    for mask in masks[1:]:
        recorded[mask] = record_outputs(artifact, samples, skip=mask, session=session, full=recorded[nothing].full)
    times = time_masks(session, masks, samples.inputs(np.arange(100)))
    for mask in masks:
        right = (recorded[mask].logits[-1].argmax(1) == samples.labels).mean()
        print(f"{mask_text(mask)}: {right:.4f}, {times[mask]:.3f} ms")
    whole = times[nothing]
    accuracy = {family: np.zeros((options.splits, len(SHARES))) for family in FAMILIES}
    shown: dict[str, list[Choice]] = {}
    for split in range(options.splits):
        order = np.random.default_rng(split).permutation(len(samples))
        half, judged = np.array_split(order, 2)
        choices = [choice for mask in masks for choice in path(recorded[mask].select(half), artifact, mask, times[mask])]
        for family in FAMILIES:
            allowed = [choice for choice in choices if belongs(choice, family, nothing)]
            taken = [best(allowed, share * whole) for share in SHARES]
            accuracy[family][split] = [right_share(choice, recorded[choice.mask].select(judged)) for choice in taken]
            if split == 0:
                shown[family] = taken
    measured = time_choices(artifact, shown, samples)
    print("time within   " + "   ".join(f"{family:>24s}" for family in FAMILIES))
    for i, share in enumerate(SHARES):
        cells = [f"{accuracy[f][:, i].mean() * 100:6.2f} % {measured[f][i]:6.3f} ms {mask_text(shown[f][i].mask)}" for f in FAMILIES]
        print(f"{share:10.2f}   " + "   ".join(f"{cell:>24s}" for cell in cells))
    for family in FAMILIES[:2]:
        gap = accuracy["both"] - accuracy[family]
        errors = gap.std(axis=0, ddof=1) / np.sqrt(options.splits)
        print(f"both over {family}: " + " ".join(f"{g * 100:+.2f}±{e * 100:.2f}" for g, e in zip(gap.mean(axis=0), errors)))
    if options.plot:
        draw(accuracy, measured, options.plot)


def path(outputs: Outputs, artifact: Artifact, mask: Mask, ms: float) -> list[Choice]:
    """A mask's settings from the safest to the cheapest, with what they lose and take."""
    thresholds, held_out, temperatures = cross_fit(outputs, artifact.plan, "top1", 0)
    shares = held_out.cost / held_out.cost[0]
    return [Choice(mask, found, temperatures, float(drop), ms * float(share)) for found, drop, share in zip(thresholds, held_out.drop, shares)]


def belongs(choice: Choice, family: str, nothing: Mask) -> bool:
    """Whether a family may make this choice."""
    stops = bool((choice.thresholds < NEVER).any())
    return family == "both" or (choice.mask == nothing if family == "exits alone" else not stops)


def best(choices: list[Choice], budget: float) -> Choice:
    """What loses least within a time; the fastest where nothing is within it."""
    within = [choice for choice in choices if choice.ms <= budget * 1.0001]
    return min(within, key=lambda choice: (choice.drop, choice.ms)) if within else min(choices, key=lambda choice: choice.ms)


def right_share(choice: Choice, outputs: Outputs) -> float:
    """Accuracy of a choice on other samples."""
    taken = exits_taken(outputs.confidence(choice.temperatures, "top1"), choice.thresholds)
    return float((outputs.logits.argmax(2)[taken, np.arange(len(taken))] == outputs.labels).mean())


def time_choices(artifact: Artifact, shown: dict[str, list[Choice]], samples: Samples) -> dict[str, NDArray[np.float64]]:
    """Mean milliseconds an answer of each choice, in turn over the same images."""
    rows = np.random.default_rng(1).permutation(len(samples))[:200]
    inputs = samples.inputs(rows)
    sessions: dict[tuple[str, int], Session] = {}
    for family, taken in shown.items():
        for i, choice in enumerate(taken):
            settings = exit_settings(artifact.plan, choice.thresholds, choice.temperatures)
            promise = Promise("budget-ms", 0.0, 0.0, False, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
            made = Profile(artifact.manifest.model_id, "top1", settings, float(choice.temperatures[-1]), mask_text(choice.mask), promise, "", "")
            sessions[family, i] = Session(artifact.with_profile("shown", made), profile="shown")
    found: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for warm in (True, False):
        for x in inputs[:10] if warm else inputs:
            for key, session in sessions.items():
                started = time.perf_counter_ns()
                session.run(x)
                if not warm:
                    found[key].append((time.perf_counter_ns() - started) / 1e6)
    return {family: np.array([np.mean(found[family, i]) for i in range(len(taken))]) for family, taken in shown.items()}


def draw(accuracy: dict[str, NDArray[np.float64]], measured: dict[str, NDArray[np.float64]], target: Path) -> None:
    """The three fronts in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for family, marker in zip(FAMILIES, "osx"):
        axes.plot(measured[family], accuracy[family].mean(axis=0) * 100, marker=marker, label=family)
    axes.set_xlabel("mean ms an answer (batch 1, one thread)")
    axes.set_ylabel("accuracy on unseen images, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
