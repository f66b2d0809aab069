"""From labelled samples to a profile: temperatures, thresholds, and the promise they keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, WEIGHTS_FILE, Artifact, check_name
from exitify.artifact.manifest import ExitSetting, Profile, Promise, SegmentTimes
from exitify.artifact.memory import remember
from exitify.calibration.bounds import samples_needed, upper_bound
from exitify.calibration.temperature import fit_temperature, log_softmax
from exitify.calibration.thresholds import NEVER, Recorded, exits_taken, judge, price_path, stricter_first
from exitify.data import Samples, rows_at_once
from exitify.errors import CalibrationError
from exitify.plan import FINAL, Mask, Plan, boundary_macs, mask_text
from exitify.progress import Progress, silent
from exitify.runtime.session import Session

log = logging.getLogger(__name__)

FOLDS = 5
"""Parts of the calibration samples; each is judged with thresholds found on the others."""

SEARCH_SHARE = 0.4
"""Of a risk promise's samples, the share on which thresholds are searched; the bound is computed on the rest."""

FEWEST_SAMPLES = 50

NOT_PROVEN = "No exit could be proven to keep this promise on these samples"
NO_EXIT = "No exit pays within this promise"


@dataclass(frozen=True)
class Outputs:
    """Logits of every exit on the calibration samples, and their labels.

    logits: `(K + 1, N, classes)`, the network's own last. labels: `(N,)`. engine: What computed them.
    mask: What was left out; whole: the logits when nothing is, `(N, classes)`, where something was.
    features: What each early exit's classifier read, `(N, width)`, float16, by exit, where nothing was left out.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    engine: str = ""
    mask: Mask = ()
    whole: NDArray[np.float32] | None = None
    features: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)

    def select(self, rows: NDArray[np.integer]) -> Outputs:
        """The same for these samples only."""
        features = {name: array[rows] for name, array in self.features.items()}
        whole = None if self.whole is None else self.whole[rows]
        return replace(self, logits=self.logits[:, rows], labels=self.labels[rows], whole=whole, features=features)

    def confidence(self, temperatures: NDArray[np.float64], policy: str) -> NDArray[np.float64]:
        """How sure each early exit is, `(K, N)`, by a policy's score at its temperature."""
        found = np.zeros(self.logits.shape[:2])[:-1]
        for row, logits, temperature in zip(found, self.logits, temperatures):
            row[:] = confidence_of(logits / temperature, policy)
        return found

    @property
    def full(self) -> NDArray[np.float32]:
        """The full network's logits, `(N, classes)`: nothing left out, no exit taken."""
        return self.logits[-1] if self.whole is None else self.whole


@dataclass(frozen=True)
class Settings:
    """What calibration decides.

    thresholds: One an exit, `NEVER` for those switched off. temperatures: One an exit, the network's own last.
    """

    thresholds: NDArray[np.float64]
    temperatures: NDArray[np.float64]
    promise: Promise


def calibrate(
    artifact: Artifact,
    samples: Samples,
    *,
    max_drop: float | None = None,
    budget_macs: float | None = None,
    budget_ms: float | None = None,
    times: str = "",
    risk: tuple[float, float] | None = None,
    skip: str | Sequence[bool] | None = None,
    name: str = "default",
    policy: Literal["top1", "margin"] = "top1",
    engine: str = "auto",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Artifact:
    """Return the artifact with a profile that keeps one promise.

    Args:
        artifact: With trained heads.
        samples: Pictures and labels that the network was not trained on.
        max_drop: Accuracy may fall by this much below the full network's, in [0, 1].
        budget_macs: Mean cost, as a share of the full network's multiply-adds.
        budget_ms: Mean time of an answer on this machine, with this engine. Chooses a mask too, and the artifact then holds
            what was measured of each, unless `times` are given.
        times: With `budget_ms`: name of segment times in the artifact, measured on the machine that is to answer; this one then
            only records outputs.
        risk: `(rate, confidence)`: answers differ from the full network's in at most this share, at this confidence.
        skip: Skip paths that the profile leaves out (see `Plan.mask`); None is none of them, with `budget_ms` any. Promises
            are about the full network all the same.
        name: The profile's.
        policy: The score to decide by.
        engine, threads: What records the outputs.
        seed: Of the folds.

    Raises:
        CalibrationError: no or several promises asked for, heads not trained, too few samples for the promise, no such times.
        PlanError: the mask is none of this network.
    """
    mask = artifact.plan.mask(skip)
    _check_request(artifact, mask, max_drop, budget_macs, budget_ms, risk)
    check_name("profile", name)
    if len(samples) < FEWEST_SAMPLES:
        raise CalibrationError(
            f"{len(samples)} samples are too few to calibrate on", f"give at least {FEWEST_SAMPLES}; a thousand and more make the promise sharp"
        )
    measured = _times_called(artifact, times, budget_ms)
    if budget_ms is not None:
        from exitify.calibration.time_budget import settle_time

        masks = None if skip is None else [mask]
        table, mask, settings, recorded_with = settle_time(
            artifact, samples, budget_ms, masks=masks, times=measured, policy=policy, engine=engine, threads=threads, seed=seed, progress=progress
        )
        if measured is None:  # by segments they are estimates, and what was measured stays
            artifact = artifact.with_masks(table)
        return _with_settings(artifact, samples, mask, settings, name=name, policy=policy, engine=recorded_with)
    outputs = record_outputs(artifact, samples, skip=mask, engine=engine, threads=threads, progress=progress)
    progress("searching thresholds", 0, 1)
    if max_drop is not None:
        settings = settle_max_drop(outputs, artifact.plan, max_drop, policy=policy, seed=seed)
    elif budget_macs is not None:
        settings = settle_budget(outputs, artifact.plan, budget_macs, policy=policy, seed=seed)
    else:
        assert risk is not None
        settings = settle_risk(outputs, artifact.plan, *risk, policy=policy, seed=seed)
    progress("searching thresholds", 1, 1)
    calibrated = _with_settings(artifact, samples, mask, settings, name=name, policy=policy, engine=outputs.engine)
    if not outputs.features:
        return calibrated
    weights = memoryview(artifact.files[WEIGHTS_FILE]).nbytes
    return calibrated.with_memory(remember(outputs.features, outputs.full, outputs.labels, weights))


def _times_called(artifact: Artifact, name: str, budget_ms: float | None) -> SegmentTimes | None:
    if not name:
        return None
    if budget_ms is None:
        raise CalibrationError("times serve a promise of time", "give --budget-ms with --times")
    if name not in artifact.times:
        there_are = f"it has {', '.join(artifact.times)}" if artifact.times else "it has none"
        raise CalibrationError(f"the artifact has no times {name!r}", f"{there_are}; measure on the machine that is to answer: exitify measure")
    return artifact.times[name]


def _with_settings(
    artifact: Artifact, samples: Samples, mask: Mask, settings: Settings, *, name: str, policy: Literal["top1", "margin"], engine: str
) -> Artifact:
    """The artifact with a profile of these settings, warned about where the samples look wrong."""
    warning = looks_memorised(settings)
    if samples.identity() == artifact.manifest.training_data:
        warning = "These are the samples that the heads were trained on. Calibrate on others."
    if warning:
        log.warning(warning)
        settings = replace(settings, promise=replace(settings.promise, note=" ".join(filter(None, (settings.promise.note, warning)))))
    exits = exit_settings(artifact.plan, settings.thresholds, settings.temperatures)
    profile = Profile(
        artifact.manifest.model_id,
        policy,
        exits,
        float(settings.temperatures[-1]),
        mask_text(mask),
        settings.promise,
        engine=engine,
        data=samples.identity(),
    )
    return artifact.with_profile(name, profile)


def exit_settings(plan: Plan, thresholds: NDArray[np.float64], temperatures: NDArray[np.float64]) -> dict[str, ExitSetting]:
    """Thresholds and temperatures as a profile holds them, by exit."""
    return {
        point.name: ExitSetting(bool(threshold < NEVER), float(min(threshold, 2.0)), float(temperature))
        for point, threshold, temperature in zip(plan.exits, thresholds, temperatures)
    }


def record_outputs(
    artifact: Artifact,
    samples: Samples,
    *,
    skip: str | Sequence[bool] | None = None,
    engine: str = "auto",
    threads: int = 1,
    progress: Progress = silent,
    session: Session | None = None,
    full: NDArray[np.float32] | None = None,
) -> Outputs:
    """Run all samples through every exit, under a mask; and through the whole network, if that leaves something out.

    Args:
        session: In place of a new one. full: The whole network's logits, where they are known.
    """
    session = session or Session(artifact, engine=engine, profile=NO_PROFILE, threads=threads)
    names, mask = artifact.plan.exit_names, artifact.plan.mask(skip)
    parts: list[NDArray[np.float32]] = []
    whole: list[NDArray[np.float32]] = []
    read: list[dict[str, NDArray[np.float16]]] = []
    done = 0
    for inputs, labels in samples.batches(rows_at_once(artifact.plan.values[artifact.plan.input])):
        progress("recording outputs", done, len(samples))
        recording = session.record(inputs, mask)
        parts.append(np.stack([recording.logits[name] for name in names]))
        if not any(mask):
            with np.errstate(over="ignore"):  # a memory keeps what float16 can
                read.append({name: array.astype(np.float16) for name, array in recording.features.items()})
        if any(mask) and full is None:
            whole.append(session.record(inputs).logits[FINAL])
        done += len(labels)
    progress("recording outputs", done, len(samples))
    features = {point.name: np.concatenate([one[point.name] for one in read]) for point in artifact.plan.exits} if read else {}
    all_of_it = np.concatenate(whole) if whole else full
    return Outputs(np.concatenate(parts, axis=1), samples.labels, session.engine.full_name, mask, all_of_it, features)


def settle_max_drop(outputs: Outputs, plan: Plan, max_drop: float, *, policy: str = "top1", seed: int = 0) -> Settings:
    """The cheapest thresholds whose accuracy, judged on samples they were not found on, falls by no more than `max_drop`.

    A search over thresholds flatters itself on its own samples (here by 0.4 points), so each fold is judged with the
    thresholds that the others would have chosen at the same price of errors, and the price is chosen by that: the
    last one before an estimate is above the limit, since the cheapest of all below it would be below it by luck.
    """
    path, held_out, temperatures = cross_fit(outputs, plan, policy, seed)
    broken = np.flatnonzero(held_out.drop > max_drop)  # the first step, without an exit, only where a mask leaves something out
    kept = not (len(broken) and broken[0] == 0)
    best = (max(int(broken[0]), 1) if len(broken) else len(path)) - 1
    error = held_out.drop_error[best]
    note = f"estimated drop {held_out.drop[best] * 100:+.2f} ± {error * 100:.2f} points."
    if error > max_drop > 0:
        note += f" The samples are few for this limit: about {int(len(outputs.labels) * (error / max_drop) ** 2)} would tell."
    promise = Promise("max-drop", max_drop, 0.0, kept, len(outputs.labels), 0, 0, 0, 0, 0, note)
    return settled(path[best], temperatures, held_out, best, promise, outputs.mask)


def settle_budget(outputs: Outputs, plan: Plan, budget: float, *, policy: str = "top1", seed: int = 0) -> Settings:
    """The most accurate thresholds whose mean cost is within the budget."""
    path, held_out, temperatures = cross_fit(outputs, plan, policy, seed)
    within = np.flatnonzero((held_out.macs <= budget) & (held_out.own_macs <= budget))
    kept = bool(len(within))
    best = int(within[held_out.drop[within].argmin()]) if kept else int(held_out.macs.argmin())
    note = f"estimated drop {held_out.drop[best] * 100:+.2f} ± {held_out.drop_error[best] * 100:.2f} points."
    if not kept:
        least = max(held_out.macs[best], held_out.own_macs[best])
        note = f"a mean of {budget:g} of the multiply-adds cannot be reached, {least:.3f} is the least; " + note
    promise = Promise("budget-macs", budget, 0.0, kept, len(outputs.labels), 0, 0, 0, 0, 0, note)
    return settled(path[best], temperatures, held_out, best, promise, outputs.mask)


def settle_risk(outputs: Outputs, plan: Plan, rate: float, confidence: float, *, policy: str = "top1", seed: int = 0) -> Settings:
    """The cheapest thresholds of which it is proven that they change at most `rate` of the full network's answers.

    Thresholds, from safest to cheapest, come from one part of the samples. On the other part each is tested in this order
    with a one-sided binomial bound, until one fails; the one before it is taken. Testing in a fixed order, found on other
    samples, needs no correction for having looked at many (fixed-sequence testing; Angelopoulos et al. 2021,
    arXiv:2110.01052, section 2).

    Raises:
        CalibrationError: so few samples that even full agreement among them would prove nothing.
    """
    order = np.random.default_rng(seed).permutation(len(outputs.labels))
    searched = round(SEARCH_SHARE * len(order))
    search, test = outputs.select(order[:searched]), outputs.select(order[searched:])
    needed = samples_needed(rate, confidence)
    if len(test.labels) < needed:
        raise CalibrationError(
            f"{len(outputs.labels)} samples cannot prove a disagreement of at most {rate:g} at {confidence:g}",
            f"give at least {int(np.ceil(needed / (1 - SEARCH_SHARE)))}, or ask for less",
        )
    temperatures = _temperatures(search)
    recorded = recorded_outputs(search, temperatures, plan, policy, disagreement_of(search))
    tested = recorded_outputs(test, temperatures, plan, policy, disagreement_of(test, smooth=False))
    chosen = np.full(len(plan.exits), NEVER)
    least = judge(recorded, chosen)[1]
    any_proven = False
    untaken = [chosen] if any(outputs.mask) else []  # without an exit nothing differs, unless something is left out
    for thresholds in (*untaken, *stricter_first(price_path(recorded))):
        failures = round(judge(tested, thresholds)[0] * len(test.labels))
        if upper_bound(failures, len(test.labels), confidence) > rate:
            break
        any_proven = True
        cost = judge(recorded, thresholds)[1]
        if cost < least:  # among proven ones any may be taken: the cheapest, and none that costs more than it saves
            chosen, least = thresholds, cost
    taken = exits_taken(tested.confidence, chosen)
    everyone = np.arange(len(taken))
    predictions = test.logits.argmax(axis=2)
    full = test.full.argmax(axis=1)
    disagreement = float((predictions[taken, everyone] != full).mean())
    bound = upper_bound(round(disagreement * len(taken)), len(taken), confidence)
    note = f"at most {bound * 100:.2f} % disagreement at {confidence:g}, proven on {len(taken)} of the samples."
    promise = Promise(
        "risk", rate, confidence, any_proven or not any(outputs.mask), len(outputs.labels),
        accuracy=float((predictions[taken, everyone] == test.labels).mean()),
        full_accuracy=float((full == test.labels).mean()),
        disagreement=disagreement,
        mean_macs_share=float(_macs(plan, outputs.mask, chosen)[taken].mean()),
        mean_ms=0.0,
        note=note if (chosen < NEVER).any() else f"{_without_exits(NO_EXIT if any_proven else NOT_PROVEN, outputs.mask)} {note}",
    )  # fmt: skip
    return Settings(chosen, temperatures, promise)


def are_memorised(full_accuracy: float, final_temperature: float) -> bool:
    """Whether a network is so right on samples, and too modest about it, as on those that it was trained on."""
    return full_accuracy > 0.99 and final_temperature < 1.0


def looks_memorised(settings: Settings) -> str:
    """A warning when the samples look like ones that the network was trained on, else an empty text."""
    promise = settings.promise
    if are_memorised(promise.full_accuracy, settings.temperatures[-1]):
        return (
            f"The network is right on {promise.full_accuracy:.2%} of these samples and too modest about it "
            f"(temperature {settings.temperatures[-1]:.2f}): they look memorised. Calibrate on samples that it was not trained on."
        )
    return ""


@dataclass(frozen=True)
class HeldOut:
    """The steps of the path, each judged on samples that its thresholds were not found on: one number a step.

    answers: `(steps, N)`, the class that each step answers with. exits: `(steps, N)`, where it leaves, the network's own exit last.
    own_macs: The cost of the path's own thresholds, on the samples that they were found on.
    """

    answers: NDArray[np.int32]
    exits: NDArray[np.int16]
    drop: NDArray[np.float64]
    drop_error: NDArray[np.float64]
    disagreement: NDArray[np.float64]
    cost: NDArray[np.float64]
    macs: NDArray[np.float64]
    own_macs: NDArray[np.float64]
    full_accuracy: float


def cross_fit(outputs: Outputs, plan: Plan, policy: str, seed: int) -> tuple[list[NDArray[np.float64]], HeldOut, NDArray[np.float64]]:
    """The path over all samples, its first step no exit at all, and how its prices fare on samples held out."""
    temperatures = _temperatures(outputs)
    recorded = recorded_outputs(outputs, temperatures, plan, policy, excess_error(outputs, temperatures))
    nothing = np.full(len(plan.exits), NEVER)
    path = [nothing, *price_path(recorded)]
    count = len(outputs.labels)
    predictions = outputs.logits.argmax(axis=2)
    full = outputs.full.argmax(axis=1)
    full_right = (full == outputs.labels).astype(float)
    answers, exits = np.zeros((len(path), count), np.int32), np.zeros((len(path), count), np.int16)
    cost, macs = (np.zeros((len(path), count)) for _ in range(2))
    folds = np.array_split(np.random.default_rng(seed).permutation(count), FOLDS)
    for fold in folds:
        others = np.setdiff1d(np.arange(count), fold)
        for step, thresholds in enumerate([nothing, *price_path(recorded.select(others))]):
            taken = exits_taken(recorded.confidence[:, fold], thresholds)
            answers[step, fold], exits[step, fold] = predictions[taken, fold], taken
            cost[step, fold] = recorded.cost(thresholds)[taken]
            macs[step, fold] = _macs(plan, outputs.mask, thresholds)[taken]
    drop, differs = full_right - (answers == outputs.labels), answers != full
    error = drop.std(axis=1) / np.sqrt(count)
    own = np.array([_macs(plan, outputs.mask, thresholds)[exits_taken(recorded.confidence, thresholds)].mean() for thresholds in path])
    return (
        path,
        HeldOut(answers, exits, drop.mean(1), error, differs.mean(1), cost.mean(1), macs.mean(1), own, float(full_right.mean())),
        temperatures,
    )


def settled(
    thresholds: NDArray[np.float64], temperatures: NDArray[np.float64], held_out: HeldOut, step: int, promise: Promise, mask: Mask
) -> Settings:
    """Settings whose promise carries what was measured at this step, under this mask."""
    if not (thresholds < NEVER).any():
        step = 0  # without an exit: what others of the folds' thresholds would give says nothing
        if len(thresholds):
            promise = replace(promise, note=f"{_without_exits(NO_EXIT, mask)} {promise.note}")
    measured = replace(
        promise,
        accuracy=held_out.full_accuracy - float(held_out.drop[step]),
        full_accuracy=held_out.full_accuracy,
        disagreement=float(held_out.disagreement[step]),
        mean_macs_share=float(held_out.macs[step]),
    )
    return Settings(thresholds, temperatures, measured)


def _without_exits(why: str, mask: Mask) -> str:
    return f"{why}: the full network runs, without what the mask leaves out." if any(mask) else f"{why}: the full network runs."


def _temperatures(outputs: Outputs) -> NDArray[np.float64]:
    return np.array([fit_temperature(logits, outputs.labels) for logits in outputs.logits])


def recorded_outputs(outputs: Outputs, temperatures: NDArray[np.float64], plan: Plan, policy: str, loss: NDArray[np.float64]) -> Recorded:
    """What the search works on; costs in units of the full network's, boundaries priced."""
    full = plan.full_macs
    names = [point.name for point in plan.exits]
    reach = plan.macs_at(names, outputs.mask or None)
    heads = np.array([plan.head(point).cost.macs for point in plan.exits], float)
    reach_cost = np.array([*reach.values()], float) - np.append(np.cumsum(heads), heads.sum())
    boundaries = np.array([boundary_macs(plan.crossing_bytes(point)) for point in plan.exits], float)
    return Recorded(outputs.confidence(temperatures, policy), loss, reach_cost / full, (heads + boundaries) / full)


def confidence_of(logits: NDArray[np.floating], policy: str) -> NDArray[np.float64]:
    """A policy's score of logits `(N, classes)` at their temperature, higher is surer."""
    probabilities = np.exp(log_softmax(logits))
    top = np.partition(probabilities, -2, axis=1)[:, -2:]
    return top[:, 1] if policy == "top1" else top[:, 1] - top[:, 0]


def excess_error(outputs: Outputs, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors beyond the full network's, `(K + 1, N)`: half as observed, half as the full network's own probabilities expect.

    Observed errors are few and their differences noisy; expected ones are smooth, but trust the network also where it is
    wrong. docs/measurements.md compares them.
    """
    predictions = outputs.logits.argmax(axis=2)
    observed = (predictions != outputs.labels).astype(float)
    belief = np.exp(log_softmax(outputs.logits[-1] / temperatures[-1]))
    expected = 1.0 - np.take_along_axis(belief, predictions.T, axis=1).T
    return 0.5 * (observed - observed[-1]) + 0.5 * (expected - expected[-1])


def disagreement_of(outputs: Outputs, *, smooth: bool = True) -> NDArray[np.float64]:
    """Whether each exit answers otherwise than the full network, `(K + 1, N)`; smooth: weighed by how sure that one is."""
    predictions = outputs.logits.argmax(axis=2)
    full = outputs.full.argmax(axis=1)
    differs = (predictions != full).astype(float)
    if not smooth:
        return differs
    belief = np.exp(log_softmax(outputs.full))
    gap = belief.max(axis=1) - np.take_along_axis(belief, predictions.T, axis=1).T
    return 0.5 * differs + 0.5 * gap


def _macs(plan: Plan, mask: Mask, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply-adds of a run that ends at each exit, as shares of the full network's; infinite where an exit is off."""
    reach = plan.macs_at([point.name for point, threshold in zip(plan.exits, thresholds) if threshold < NEVER], mask or None)
    return np.array([reach.get(name, np.inf) for name in plan.exit_names], np.float64) / plan.full_macs


def _check_request(
    artifact: Artifact,
    mask: Mask,
    max_drop: float | None,
    budget_macs: float | None,
    budget_ms: float | None,
    risk: tuple[float, float] | None,
) -> None:
    if sum(option is not None for option in (max_drop, budget_macs, budget_ms, risk)) != 1:
        raise CalibrationError("one promise must be asked for", "give one of --max-drop 0.005, --budget-macs 0.6, --budget-ms 12, --risk 0.02@0.95")
    if not artifact.plan.exits and not any(mask) and not (budget_ms is not None and artifact.plan.skips):
        raise CalibrationError(
            "the artifact has no exits to calibrate", "leave something out, `--skip 0110`" if artifact.plan.skips else "transform with `--exits auto`"
        )
    if artifact.plan.exits and not artifact.manifest.heads_trained:
        raise CalibrationError("the artifact's heads are untrained", "run `exitify train` first")
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise CalibrationError(f"--max-drop {max_drop:g} is no share of the samples", "0.005 is half a point of accuracy")
    if budget_ms is not None and not 0 < budget_ms < np.inf:
        raise CalibrationError(f"--budget-ms {budget_ms:g} is no time", "12 is twelve milliseconds an answer")
    if budget_macs is not None and not 0 < budget_macs < np.inf:
        raise CalibrationError(f"--budget-macs {budget_macs:g} is no share of the network's multiply-adds", "0.6 is three fifths")
    if risk is not None and not (0 < risk[0] < 1 and 0 < risk[1] < 1):
        raise CalibrationError(f"--risk {risk[0]:g}@{risk[1]:g} is no rate and confidence in (0, 1)", "0.02@0.95: at most 2 % at 95 % confidence")
