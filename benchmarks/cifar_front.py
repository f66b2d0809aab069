"""Accuracy against time on CIFAR-10: exits alone, skip paths alone, and both, from one artifact.

    python -m benchmarks.cifar_front artifact --work DIR --seed 0 --output both.exitify      # from `cifar_skips train`; trains heads
    python -m benchmarks.cifar_front front seed0.exitify seed1.exitify … --plot front.png

`front` records every exit under every mask on the test images, and times every mask. On one half of the images each family
chooses as `calibrate --budget-ms` does, for a row of times; the other half judges. Then the choices are timed as they are,
in turn, batch 1, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
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
from exitify.calibration.thresholds import exits_taken
from exitify.calibration.time_budget import Candidate, Jury, candidates_of, most_accurate, probabilities, time_masks
from exitify.data import Samples, load_samples
from exitify.plan import mask_text
from exitify.program import HEADS
from exitify.runtime.session import Session
from exitify.train.heads import HeadTraining

FAMILIES = ("exits alone", "skips alone", "both")
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Times within which a choice is made, as shares of the whole network's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["artifact", "front"])
    parser.add_argument("paths", type=Path, nargs="*")
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
        artifacts = [Artifact.open(path) for path in options.paths]
        fronts = [front(artifact, load_samples(f"{data}#test", artifact.manifest.input, classes=10), options.splits) for artifact in artifacts]
        compare({family: np.stack([accuracy[family] for accuracy, _ in fronts]) for family in FAMILIES})
        if options.plot:
            draw(fronts, options.plot)


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


Accuracies = dict[str, NDArray[np.float64]]
"""Of each family, `(splits, times)`; not a number where the time is out of reach."""
Times = dict[tuple[str, int], float]
"""Milliseconds as measured, of each family within each time that it reaches."""


def front(artifact: Artifact, samples: Samples, splits: int) -> tuple[Accuracies, Times]:
    """Print, and return, accuracy against time of the three families."""
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
    accuracy = {family: np.full((splits, len(SHARES)), np.nan) for family in FAMILIES}
    shown: dict[tuple[str, int], tuple[Candidate, NDArray[np.float64]]] = {}
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(samples))
        half, judged = np.array_split(order, 2)
        fits = {mask: cross_fit(recorded[mask].select(half), plan, "top1", 0) for mask in masks}
        belief = np.mean([probabilities(recorded[mask].logits[-1, half], fits[mask][2][-1]) for mask in masks], axis=0)
        jury = Jury(samples.labels[half], belief)
        choices = [
            choice
            for mask, (path, held_out, _) in fits.items()
            for choice in candidates_of(mask, path, held_out, times[mask] * held_out.cost / held_out.cost[0], jury)
        ]
        for family, (i, share) in itertools.product(FAMILIES, enumerate(SHARES)):
            within = [choice for choice in choices if belongs(choice, family) and choice.ms <= share * whole * 1.0001]
            if not within:
                continue
            chosen = most_accurate(within, jury)
            temperatures = fits[chosen.mask][2]
            accuracy[family][split, i] = right_share(chosen, temperatures, recorded[chosen.mask].select(judged))
            if split == 0:
                shown[family, i] = chosen, temperatures
    measured = time_choices(artifact, shown, samples)
    print("time within   " + "   ".join(f"{family:>24s}" for family in FAMILIES))
    for i, share in enumerate(SHARES):
        cells = [
            f"{accuracy[f][:, i].mean() * 100:6.2f} % {measured[f, i]:6.3f} ms {mask_text(shown[f, i][0].mask)}"
            if (f, i) in shown
            else "out of reach"
            for f in FAMILIES
        ]
        print(f"{share:10.2f}   " + "   ".join(f"{cell:>24s}" for cell in cells))
    return accuracy, measured


def compare(accuracy: Accuracies) -> None:
    """Print how far both are ahead of one, in points, and the standard error: `(artifacts, splits, times)` a family.

    Over artifacts where there are several; over splits, which share their samples, where there is one.
    """
    for family in FAMILIES[:2]:
        gap = 100 * (accuracy["both"] - accuracy[family])
        rows = gap.mean(axis=1) if len(gap) > 1 else gap[0]
        errors = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
        cells = [f"{share:g}: {g:+.2f} ± {e:.2f}" for share, g, e in zip(SHARES, rows.mean(axis=0), errors) if not np.isnan(g)]
        print(f"both over {family}, points within a share of the time: " + ", ".join(cells))


def belongs(choice: Candidate, family: str) -> bool:
    """Whether a family may make this choice."""
    return family == "both" or (not any(choice.mask) if family == "exits alone" else not choice.stops)


def right_share(choice: Candidate, temperatures: NDArray[np.float64], outputs: Outputs) -> float:
    """Accuracy of a choice on other samples."""
    taken = exits_taken(outputs.confidence(temperatures, "top1"), choice.thresholds)
    return float((outputs.logits.argmax(2)[taken, np.arange(len(taken))] == outputs.labels).mean())


def time_choices(artifact: Artifact, shown: dict[tuple[str, int], tuple[Candidate, NDArray[np.float64]]], samples: Samples) -> Times:
    """Mean milliseconds an answer of each choice, in turn over the same images."""
    rows = np.random.default_rng(1).permutation(len(samples))[:200]
    inputs = samples.inputs(rows)
    sessions: dict[tuple[str, int], Session] = {}
    for key, (choice, temperatures) in shown.items():
        settings = exit_settings(artifact.plan, choice.thresholds, temperatures)
        promise = Promise("budget-ms", 0.0, 0.0, False, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
        made = Profile(artifact.manifest.model_id, "top1", settings, float(temperatures[-1]), mask_text(choice.mask), promise, "", "")
        sessions[key] = Session(artifact.with_profile("shown", made), profile="shown")
    found: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for warm in (True, False):
        for x in inputs[:10] if warm else inputs:
            for key, session in sessions.items():
                started = time.perf_counter_ns()
                session.run(x)
                if not warm:
                    found[key].append((time.perf_counter_ns() - started) / 1e6)
    return {key: float(np.mean(times)) for key, times in found.items()}


def draw(fronts: list[tuple[Accuracies, Times]], target: Path) -> None:
    """The three fronts in one plot, the mean over artifacts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for family, marker in zip(FAMILIES, "osx"):
        reached = [i for i in range(len(SHARES)) if all((family, i) in measured for _, measured in fronts)]
        times = [np.mean([measured[family, i] for _, measured in fronts]) for i in reached]
        axes.plot(times, [100 * np.mean([accuracy[family][:, i] for accuracy, _ in fronts]) for i in reached], marker=marker, label=family)
    axes.set_xlabel("mean ms an answer (batch 1, one thread)")
    axes.set_ylabel("accuracy on unseen images, %")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
