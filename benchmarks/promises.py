"""Are promises kept, and what do they cost? Bounds on a risk, prediction sets, temperatures, searches and policies.

    python -m benchmarks.promises r56.exitify --save r56.npz
    python -m benchmarks.promises r56.npz --parts risk --draws 1000 --size 2500

The population is the 5,000 test images of $EXITIFY_DATA/cifar10.npz as the artifact's network answers them, or any recording:
a .npz with `logits` (K + 1, N, classes), the network's own last, `labels` (N,), `macs` (K + 1,) of a run that ends at each exit
with all exits run, as shares of the network, and `heads` (K,), their share. Calibration sets are drawn from it with
replacement, so that it is the truth: a promise holds or it does not (a held-out half would be a sample itself).
Tables are Markdown.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Policy
from exitify.calibration.bounds import BOUNDS, Bound
from exitify.calibration.calibrate import (
    Outputs,
    Search,
    Settings,
    conformal_of,
    loss_of,
    prepare_risk,
    record_outputs,
    settle_budget,
    settle_max_drop,
    settle_risk,
    split_for_sets,
)
from exitify.calibration.conformal import KINDS, Kind, prediction_sets
from exitify.calibration.risk import RISKS, Risk, proven
from exitify.calibration.temperature import calibration_errors, log_softmax
from exitify.calibration.thresholds import NEVER, exits_taken
from exitify.data import load_samples
from exitify.plan import SCORES, Cost, ExitPoint, HeadSpec, Plan, Segment, Value

RATES, CONFIDENCE = (0.01, 0.02, 0.05), 0.95
ALPHAS = (0.01, 0.05, 0.1)
BUDGETS = (0.4, 0.5, 0.6, 0.7)
MACS = 10**9
"""Of a recorded network that does not say; boundaries then hardly count."""


@dataclass(frozen=True)
class Population:
    """Everything that a network and its exits say of all images there are."""

    outputs: Outputs
    plan: Plan

    def judged(self, settings: Settings, rows: NDArray[np.int64] | None = None, policy: Policy = "top1") -> tuple[float, float]:
        """Accuracy lost and mean MACs share of these rows under these settings."""
        outputs = self.outputs if rows is None else self.outputs.select(rows)
        taken = exits_taken(outputs.confidence(settings.temperatures, policy), settings.thresholds)
        lost = loss_of(outputs, "accuracy")[taken, np.arange(len(taken))]
        return float(lost.mean()), float(self.macs(settings.thresholds)[taken].mean())

    def macs(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of a run that ends at each exit; what is off is never reached."""
        reach = self.plan.macs_at([point.name for point, threshold in zip(self.plan.exits, thresholds) if threshold < NEVER])
        return np.array([reach.get(name, np.inf) for name in self.plan.exit_names]) / self.plan.full_macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an artifact, or a recording .npz")
    parser.add_argument("--save", type=Path, help="write the recording, and do nothing else")
    parser.add_argument("--parts", default="risk,sets,errors,searches,policies")
    parser.add_argument("--draws", type=int, default=1000, help="calibration sets for risk")
    parser.add_argument("--size", type=int, default=2500, help="samples in a calibration set")
    parser.add_argument("--splits", type=int, default=100, help="random halves for sets; a fifth of them for the rest")
    options = parser.parse_args()
    population = recording(options.source) if options.source.suffix == ".npz" else recorded(options.source)
    if options.save:
        save(population, options.save)
        return
    parts: dict[str, Callable[[], None]] = {
        "risk": lambda: risk(population, options.draws, options.size),
        "sets": lambda: sets(population, options.splits),
        "errors": lambda: errors(population, options.splits // 5),
        "searches": lambda: searches(population, options.splits // 5),
        "policies": lambda: policies(population, options.splits // 5),
    }
    for name in options.parts.split(","):
        started = time.perf_counter()
        parts[name]()
        print(f"\n({time.perf_counter() - started:.0f} s)\n", flush=True)


# --- the population -------------------------------------------------------------------------------------------------


def recorded(path: Path) -> Population:
    """What an artifact's network says of the test images."""
    artifact = Artifact.open(path)
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    samples = load_samples(f"{data}#test", artifact.manifest.input, classes=artifact.plan.classes)
    return Population(record_outputs(artifact, samples), artifact.plan)


def save(population: Population, path: Path) -> None:
    """Write what `recording` reads."""
    plan = population.plan
    macs = np.array([*plan.macs_at([point.name for point in plan.exits]).values()]) / plan.full_macs
    heads = np.array([plan.head(point).cost.macs for point in plan.exits]) / plan.full_macs
    outputs = population.outputs
    np.savez_compressed(path, logits=outputs.logits, labels=outputs.labels, macs=macs, heads=heads, full_macs=np.array(plan.full_macs))


def recording(path: Path) -> Population:
    """What was recorded, with a plan of the same costs."""
    with np.load(path, allow_pickle=False) as arrays:
        logits, labels, macs = arrays["logits"], arrays["labels"], arrays["macs"]
        heads = arrays["heads"] if "heads" in arrays else np.full(len(macs) - 1, (macs[-1] - 1.0) / (len(macs) - 1))
        full = int(arrays["full_macs"]) if "full_macs" in arrays else MACS
    trunk = macs - np.append(np.cumsum(heads), heads.sum())
    return Population(Outputs(logits, labels.astype(np.int64), "recorded"), plan_of(trunk, heads, logits.shape[2], full))


def plan_of(trunk: NDArray[np.float64], heads: NDArray[np.float64], classes: int, full: int) -> Plan:
    """A chain of trunks with a head after each but the last. trunk: What reaching each exit costs, heads apart; all of it shares of `full`."""
    values, segments, exits = {"x": Value((3, 8, 8), "float32"), "scores": Value((classes,), "float32")}, [], []
    before, spent = "x", 0
    for number, (reached, head) in enumerate(zip(trunk, heads), 1):
        point = ExitPoint(f"exit{number}", f"v{number}", f"stage{number}", HeadSpec("linear", "nchw", (16, 8, 8), 1, 16, classes))
        values |= {point.after: Value((16, 8, 8), "float32"), point.logits: Value((classes,), "float32")}
        values |= {point.features: Value((16,), "float32"), point.scores: Value((len(SCORES),), "float32")}
        said, taken = (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
        segments.append(Segment(f"trunk{number}", "trunk", (point.after,), (before,), (point.after,), (), Cost(round(reached * full) - spent)))
        segments.append(Segment(f"head{number}", "head", (point.name,), (point.after,), said, taken, Cost(round(head * full))))
        exits.append(point)
        before, spent = point.after, round(reached * full)
    segments.append(Segment("last", "trunk", ("last",), (before,), ("scores",), (), Cost(full - spent)))
    plan = Plan("x", "scores", tuple(exits), tuple(segments), values)
    plan.check()
    return plan


def table(columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    """Print Markdown."""
    for row in (columns, ("---",) * len(columns), *rows):
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def halves(population: Population, splits: int) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Random halves, each with its seed."""
    for seed in range(splits):
        first, second = np.array_split(np.random.default_rng(seed).permutation(len(population.outputs.labels)), 2)
        yield seed, first, second


def points(values: NDArray[np.float64]) -> str:
    """Mean and its standard error over splits, in percent."""
    return f"{values.mean() * 100:.2f} ± {values.std(ddof=1) / np.sqrt(len(values)) * 100:.2f}"


# --- what is measured -----------------------------------------------------------------------------------------------


def risk(population: Population, draws: int, size: int) -> None:
    """Each bound at each rate: how often it holds against the population, and what an answer costs."""
    everyone = np.arange(len(population.outputs.labels))
    found: dict[tuple[Risk, float, Bound], list[tuple[float, float]]] = {}
    for draw in range(draws):
        outputs = population.outputs.select(np.random.default_rng(draw).integers(0, len(everyone), size))
        for risk_of in RISKS:
            trial = prepare_risk(outputs, population.plan, risk_of, seed=draw)
            confidence = population.outputs.confidence(trial.temperatures, "top1")
            loss = loss_of(population.outputs, risk_of)
            known: dict[int, tuple[float, float]] = {}
            for rate in RATES:
                for bound in BOUNDS:
                    if risk_of == "accuracy" and bound == "clopper-pearson":
                        continue
                    count = proven(trial.steps, rate, CONFIDENCE, bound, risk_of)
                    if count not in known:
                        thresholds = trial.cheapest(count)
                        taken = exits_taken(confidence, thresholds)
                        known[count] = float(loss[taken, everyone].mean()), float(population.macs(thresholds)[taken].mean())
                    found.setdefault((risk_of, rate, bound), []).append(known[count])
        if draw % 100 == 99:
            print(f"{draw + 1} draws", flush=True)
    print(f"\n{draws} calibration sets of {size}, at {CONFIDENCE:g}\n")
    rows: list[tuple[object, ...]] = []
    for (risk_of, rate, bound), pairs in found.items():
        lost, macs = np.array(pairs).T
        rows.append((risk_of, f"{rate:.0%}", bound, int((lost <= rate).sum()), f"{lost.mean() * 100:.2f} %", f"{macs.mean():.3f}"))
    table(("risk of", "rate", "bound", "held", "mean risk", "mean MACs"), rows)


def sets(population: Population, splits: int) -> None:
    """Prediction sets of a profile with 2 % risk: how often they hold the true class, over all and at each exit, and how large they are."""
    names = population.plan.exit_names
    found: dict[tuple[float, Kind], list[NDArray[np.float64]]] = {}
    for seed, first, second in halves(population, splits):
        calibrated, judged = population.outputs.select(first), population.outputs.select(second)
        fitted, held = split_for_sets(len(first), ALPHAS[0], seed)
        settings = settle_risk(calibrated.select(fitted), population.plan, 0.02, CONFIDENCE, seed=seed)
        taken = exits_taken(judged.confidence(settings.temperatures, "top1"), settings.thresholds)
        p = np.exp(log_softmax(judged.logits / settings.temperatures[:, None, None]))[taken, np.arange(len(taken))]
        for alpha in ALPHAS:
            for kind in KINDS:
                quantiles = conformal_of(calibrated.select(held), population.plan, settings, alpha, kind).quantiles
                sized = prediction_sets(p, np.array([quantiles[name] for name in names])[taken, None])
                holds = sized[np.arange(len(taken)), judged.labels]
                at_exits = [holds[taken == k].mean() if (taken == k).any() else np.nan for k in range(len(names))]
                found.setdefault((alpha, kind), []).append(np.array([holds.mean(), sized.sum(1).mean(), *at_exits]))
    print(f"\nPrediction sets over {splits} halves, {len(held)} samples for them\n")
    rows: list[tuple[object, ...]] = []
    for (alpha, kind), values in found.items():
        array = np.array(values)
        at_exits = np.nanmean(array[:, 2:], axis=0)
        worst, best = at_exits.min(), at_exits.max()
        rows.append((f"{alpha:g}", kind, f"{points(array[:, 0])} %", f"{worst:.1%} to {best:.1%}", f"{array[:, 1].mean():.2f}"))
    table(("alpha", "kind", "coverage", "at its worst and best exit", "classes in a set"), rows)


def errors(population: Population, splits: int) -> None:
    """Calibration error of each exit: each half judged at the temperature of the other."""
    outputs = population.outputs
    found = np.mean([calibration_errors(outputs.logits, outputs.labels, seed) for seed in range(splits)], axis=0)
    right = (outputs.logits.argmax(axis=2) == outputs.labels).mean(axis=1)
    print(f"\nECE (15 bins of equal mass) over {splits} pairs of halves\n")
    rows = [(name, f"{r:.1%}", f"{before:.4f}", f"{after:.4f}") for name, r, (before, after) in zip(population.plan.exit_names, right, found)]
    table(("exit", "accuracy", "without temperature", "with it"), rows)


def searches(population: Population, splits: int) -> None:
    """Both searches within a budget of multiply-adds, calibrated on one half and judged on the other."""
    rows: list[tuple[object, ...]] = []
    for budget in BUDGETS:
        drops: dict[Search, list[float]] = {"coordinate": [], "quotas": []}
        spent: dict[Search, list[float]] = {"coordinate": [], "quotas": []}
        for seed, first, second in halves(population, splits):
            for search in drops:
                settings = settle_budget(population.outputs.select(first), population.plan, budget, search=search, seed=seed)
                drop, macs = population.judged(settings, second)
                drops[search].append(drop)
                spent[search].append(macs)
        one, two = np.array(drops["coordinate"]), np.array(drops["quotas"])
        shares = [f"{np.mean(spent[search]):.3f}" for search in drops]
        rows.append((f"{budget:g}", points(one), shares[0], points(two), shares[1], points(two - one)))
    print(f"\nSearches within a budget, {splits} splits; drop in points\n")
    table(("budget", "drop, coordinate", "MACs", "drop, quotas", "MACs", "difference"), rows)


def policies(population: Population, splits: int) -> None:
    """What each policy costs at half a point of accuracy, calibrated on one half and judged on the other."""
    rows: list[tuple[object, ...]] = []
    names: tuple[Policy, ...] = ("top1", "entropy", "margin", "renyi_entropy", "patience")
    for policy in names:
        pairs = []
        for seed, first, second in halves(population, splits):
            settings = settle_max_drop(population.outputs.select(first), population.plan, 0.005, policy=policy, seed=seed)
            pairs.append(population.judged(settings, second, policy))
        drop, macs = np.array(pairs).T
        rows.append((policy, points(drop), f"{macs.mean():.3f} ± {macs.std(ddof=1) / np.sqrt(len(macs)):.3f}"))
    print(f"\nPolicies at a drop of half a point, {splits} splits; drop in points\n")
    table(("policy", "drop", "MACs"), rows)


if __name__ == "__main__":
    main()
