"""From labelled samples to a profile: temperatures, thresholds, and the promise they keep."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, WEIGHTS_FILE, Artifact, check_name
from exitify.artifact.manifest import Conformal, ExitSetting, Policy, Profile, Promise, SegmentTimes
from exitify.artifact.memory import remember
from exitify.calibration.bounds import BOUNDS, Bound
from exitify.calibration.conformal import KINDS, Kind, fit_conformal, require_enough
from exitify.calibration.exit_search import least_costs
from exitify.calibration.quotas import quota_path
from exitify.calibration.risk import RISKS, SEARCH_SHARE, SHARPEST, Risk, Steps, best_provable, proven, require_provable, to_test
from exitify.calibration.temperature import calibration_errors, diverges, fit_temperature, log_softmax, require_labels
from exitify.calibration.thresholds import (
    NEVER,
    Recorded,
    common_path,
    exits_taken,
    finer_price_path,
    judge,
    patience_path,
    price_path,
    stricter_first,
)
from exitify.data import Samples, rows_at_once
from exitify.errors import CalibrationError
from exitify.plan import FINAL, SCORES, Mask, Plan, boundary_macs, mask_text
from exitify.progress import Progress, silent
from exitify.runtime.policies import from_logits, score, score_run
from exitify.runtime.session import Session

log = logging.getLogger(__name__)

FOLDS = 5
"""Parts of the calibration samples; each is judged with thresholds found on the others."""

CONFORMAL_SHARE = 0.3
"""Of the samples, the share that prediction sets rest on, where they are asked for; temperatures and thresholds are found on the rest."""

FEWEST_SAMPLES = 50

Gates = Sequence[Sequence[float]]
"""Of each exit in order, the weights that its gate gives to `exitify.plan.SCORES`, then its bias; empty for none."""

Search = Literal["coordinate", "quotas"]
Path = Callable[[Recorded], Iterable[NDArray[np.float64]]]
"""From recorded outputs to thresholds, as many whatever the samples, from the safest to the cheapest."""

GATED = ("gates", "jei")
"""Policies that read a learned gate. Gates are learned at the temperature 1, which early exits then keep."""

LOOK_BACK: dict[str, Path] = {"patience": patience_path, "jei": common_path}
"""Policies whose exits share one threshold and look back at each other: all of them are run."""

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

    def confidence(self, temperatures: NDArray[np.float64], policy: Policy, gates: Gates = ()) -> NDArray[np.float64]:
        """How sure each early exit is, `(K, N)`, by a policy's score at its temperature, all exits run."""
        early = self.logits[:-1]
        if policy in LOOK_BACK or policy in GATED:
            scores = np.zeros((*early.shape[:2], len(SCORES)))
            for row, logits, temperature in zip(scores, early, temperatures):
                row[:] = from_logits(logits, temperature)
            return score_run(policy, scores, early.argmax(axis=2), gates)
        found = np.zeros(early.shape[:2])
        for row, logits, temperature in zip(found, early, temperatures):
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
    errors: The calibration error of each exit without its temperature and with it, `(K + 1, 2)` (`calibration_errors`); None where not measured.
    """

    thresholds: NDArray[np.float64]
    temperatures: NDArray[np.float64]
    promise: Promise
    errors: NDArray[np.float64] | None = None


def calibrate(
    artifact: Artifact,
    samples: Samples,
    *,
    max_drop: float | None = None,
    budget_macs: float | None = None,
    budget_ms: float | None = None,
    times: str = "",
    risk: tuple[float, float] | None = None,
    risk_of: Risk = "disagreement",
    bound: Bound | None = None,
    search: Search = "coordinate",
    skip: str | Sequence[bool] | None = None,
    name: str = "default",
    policy: Policy = "top1",
    gates: Mapping[str, Sequence[float]] | None = None,
    alpha: float | None = None,
    conformal: Kind = "gated",
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
        risk: `(rate, confidence)`: what `risk_of` says is at most this rate, at this confidence.
        risk_of: With `risk`: `disagreement`, the share of answers that differ from the full network's; `accuracy`, what is lost of it.
        bound: With `risk`: what proves it, `clopper-pearson` (of disagreement alone), `bentkus` or `betting`; None is the sharpest.
        search: With `budget_macs`: `coordinate`, one threshold at a time for a price on errors; `quotas`, MSDNet's geometric ones.
        skip: Skip paths that the profile leaves out (see `Plan.mask`); None is none of them, with `budget_ms` any. Promises
            are about the full network all the same.
        name: The profile's.
        policy: The score to decide by: `top1`, `entropy`, `margin`, `renyi_entropy`, or `gates`, each with a threshold of its own at every
            exit; `patience` (how many exits in a row must agree) or `jei`, with one threshold and all exits run.
        gates: For `gates` and `jei`: a learned gate of each exit, its four weights on `exitify.plan.SCORES` and its bias; by default
            those that were trained with the artifact's heads. They are for the temperature 1, which early exits then keep.
        alpha: Adds prediction sets, which miss the true class in at most this share of the answers. A part of the samples is kept for
            them that temperatures and thresholds are not found on.
        conformal: With `alpha`: which samples each exit's sets rest on (`exitify.calibration.conformal.conformal_quantiles`).
        engine, threads: What records the outputs.
        seed: Of the folds.

    Raises:
        CalibrationError: no or several promises asked for, heads not trained, too few samples for the promise or the sets, no such times,
            no gates, labels that are no classes.
        PlanError: the mask is none of this network.
    """
    mask = artifact.plan.mask(skip)
    _check_request(artifact, mask, max_drop, budget_macs, budget_ms, risk)
    _check_options(risk, risk_of, bound, budget_macs, search, policy, conformal)
    check_name("profile", name)
    found_gates = _gates_of(artifact, policy, gates)
    proof = bound or SHARPEST[risk_of]
    fitted, held = split_for_sets(len(samples), alpha, seed)
    _check_samples(samples, len(fitted), risk, risk_of, proof, alpha, artifact.plan.classes)
    measured = _times_called(artifact, times, budget_ms)
    chosen = functools.partial(_with_settings, samples=samples, name=name, policy=policy, gates=found_gates)
    if budget_ms is not None:
        from exitify.calibration.time_budget import settle_time

        masks = None if skip is None else [mask]
        table, mask, settings, recorded_with = settle_time(
            artifact, samples.subset(fitted) if len(held) else samples, budget_ms, masks=masks, times=measured, policy=policy, gates=found_gates,
            engine=engine, threads=threads, seed=seed, progress=progress,
        )  # fmt: skip
        if measured is None:  # by segments they are estimates, and what was measured stays
            artifact = artifact.with_masks(table)
        sets = None
        if alpha is not None:
            apart = record_outputs(artifact, samples.subset(held), skip=mask, engine=engine, threads=threads, progress=progress)
            sets = conformal_of(apart, artifact.plan, settings, alpha, conformal, policy=policy, gates=found_gates)
        return chosen(artifact, mask=mask, settings=settings, sets=sets, engine=recorded_with)
    outputs = record_outputs(artifact, samples, skip=mask, engine=engine, threads=threads, progress=progress)
    progress("searching thresholds", 0, 1)
    known = outputs.select(fitted) if len(held) else outputs
    if max_drop is not None:
        settings = settle_max_drop(known, artifact.plan, max_drop, policy=policy, gates=found_gates, seed=seed)
    elif budget_macs is not None:
        settings = settle_budget(known, artifact.plan, budget_macs, policy=policy, gates=found_gates, search=search, seed=seed)
    else:
        assert risk is not None
        settings = settle_risk(known, artifact.plan, *risk, risk_of=risk_of, bound=proof, policy=policy, gates=found_gates, seed=seed)
    sets = None
    if alpha is not None:
        sets = conformal_of(outputs.select(held), artifact.plan, settings, alpha, conformal, policy=policy, gates=found_gates)
    progress("searching thresholds", 1, 1)
    calibrated = chosen(artifact, mask=mask, settings=settings, sets=sets, engine=outputs.engine)
    if not outputs.features:
        return calibrated
    weights = memoryview(artifact.files[WEIGHTS_FILE]).nbytes
    return calibrated.with_memory(remember(outputs.features, outputs.full, outputs.labels, weights))


def conformal_of(
    outputs: Outputs, plan: Plan, settings: Settings, alpha: float, kind: Kind, *, policy: Policy = "top1", gates: Gates = ()
) -> Conformal:
    """What makes prediction sets of answers under these settings.

    Args:
        outputs: Of samples that the settings were not found on.

    Raises:
        CalibrationError: so few samples that no set could leave out a class.
    """
    taken = exits_taken(outputs.confidence(settings.temperatures, policy, gates), settings.thresholds)
    probabilities = np.exp(log_softmax(outputs.logits / settings.temperatures[:, None, None]))
    return fit_conformal(probabilities, outputs.labels, taken, plan.exit_names, alpha, kind)


def split_for_sets(count: int, alpha: float | None, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that temperatures and thresholds are found on, and rows that are kept for prediction sets."""
    if alpha is None:
        return np.arange(count), np.arange(0)
    order = np.random.default_rng(seed).permutation(count)
    kept = round(CONFORMAL_SHARE * count)
    return np.sort(order[kept:]), np.sort(order[:kept])


def _gates_of(artifact: Artifact, policy: Policy, gates: Mapping[str, Sequence[float]] | None) -> Gates:
    """Each exit's gate in order, for policies that need one: those given, or those that were trained with the heads."""
    if policy not in GATED:
        if gates is not None:
            raise CalibrationError(f"gates serve the policies gates and jei, not {policy}", "give --policy gates with them")
        return ()
    names = [point.name for point in artifact.plan.exits]
    gates = artifact.manifest.gates if gates is None else gates
    if not gates:
        raise CalibrationError(
            f"the policy {policy} needs learned gates, and the artifact has none",
            "train them with its heads, `exitify train --method jei`, or give gates=…",
        )
    for name in names:
        found = gates.get(name, ())
        if len(found) != len(SCORES) + 1 or not np.isfinite(found).all():
            raise CalibrationError(
                f"the gate of {name} is {tuple(found)}, not {len(SCORES) + 1} finite numbers", f"weights of {', '.join(SCORES)}, then a bias"
            )
    return [tuple(float(number) for number in gates[name]) for name in names]


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
    artifact: Artifact,
    *,
    samples: Samples,
    mask: Mask,
    settings: Settings,
    sets: Conformal | None,
    name: str,
    policy: Policy,
    gates: Gates,
    engine: str,
) -> Artifact:
    """The artifact with a profile of these settings, warned about where the samples look wrong."""
    warnings = [looks_memorised(settings), _diverging(artifact.plan, settings)]
    if samples.identity() == artifact.manifest.training_data:
        warnings[0] = "These are the samples that the heads were trained on. Calibrate on others."
    for warning in filter(None, warnings):
        log.warning(warning)
    apart = f"Prediction sets rest on {sets.samples} other samples." if sets is not None else ""
    note = " ".join(filter(None, (settings.promise.note, apart, *warnings)))
    errors = {} if settings.errors is None else dict(zip(artifact.plan.exit_names, ((float(a), float(b)) for a, b in settings.errors)))
    profile = Profile(
        artifact.manifest.model_id,
        policy,
        exit_settings(artifact.plan, settings.thresholds, settings.temperatures, gates),
        float(settings.temperatures[-1]),
        mask_text(mask),
        replace(settings.promise, note=note),
        engine=engine,
        data=samples.identity(),
        conformal=sets,
        calibration_errors=errors,
    )
    return artifact.with_profile(name, profile)


def _diverging(plan: Plan, settings: Settings) -> str:
    """A warning of temperatures that no sample held back, else an empty text."""
    found = [f"{name} ({t:.3g})" for name, t in zip(plan.exit_names, settings.temperatures) if diverges(t)]
    if not found:
        return ""
    return (
        f"No finite temperature fits {', '.join(found)}: on these samples it is always right, or no better than chance. "
        "Its probabilities say little; give more samples, or train it again."
    )


def exit_settings(plan: Plan, thresholds: NDArray[np.float64], temperatures: NDArray[np.float64], gates: Gates = ()) -> dict[str, ExitSetting]:
    """Thresholds, temperatures and gates as a profile holds them, by exit."""
    return {
        point.name: ExitSetting(
            bool(threshold < NEVER), float(threshold) if threshold < NEVER else 2.0, float(temperature), tuple(gates[i]) if gates else ()
        )
        for i, (point, threshold, temperature) in enumerate(zip(plan.exits, thresholds, temperatures))
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
    logits = np.concatenate(parts, axis=1)
    for exit_name, one in zip(names, logits):
        if not np.isfinite(one).all():
            first = int(np.flatnonzero(~np.isfinite(one).all(axis=1))[0])
            raise CalibrationError(f"the logits of {exit_name} are not finite for sample {first}", "train the heads again: `exitify train`")
    return Outputs(logits, samples.labels, session.engine.full_name, mask, all_of_it, features)


def settle_max_drop(outputs: Outputs, plan: Plan, max_drop: float, *, policy: Policy = "top1", gates: Gates = (), seed: int = 0) -> Settings:
    """The cheapest thresholds whose accuracy, judged on samples they were not found on, falls by no more than `max_drop`.

    A search over thresholds flatters itself on its own samples (here by 0.4 points), so each fold is judged with the
    thresholds that the others would have chosen at the same price of errors, and the price is chosen by that: the
    last one before an estimate is above the limit, since the cheapest of all below it would be below it by luck.
    """
    path, held_out, temperatures = cross_fit(outputs, plan, policy, seed, gates=gates)
    broken = np.flatnonzero(held_out.drop > max_drop)  # the first step, without an exit, only where a mask leaves something out
    kept = not (len(broken) and broken[0] == 0)
    best = (max(int(broken[0]), 1) if len(broken) else len(path)) - 1
    if held_out.cost[best] >= held_out.cost[0]:  # where all exits are run, whether one is taken or not
        best = 0
    error = held_out.drop_error[best]
    note = f"estimated drop {held_out.drop[best] * 100:+.2f} ± {error * 100:.2f} points."
    if not kept:
        least = held_out.drop.min() * 100
        note = f"with what the mask leaves out no drop of {max_drop * 100:g} points can be kept, {least:+.2f} is the least found; " + note
    if error > max_drop > 0:
        note += f" The samples are few for this limit: about {int(len(outputs.labels) * (error / max_drop) ** 2)} would tell."
    promise = Promise("max-drop", max_drop, 0.0, kept, len(outputs.labels), 0, 0, 0, 0, 0, note)
    return settled(path[best], temperatures, held_out, best, promise, outputs.mask)


def settle_budget(
    outputs: Outputs, plan: Plan, budget: float, *, policy: Policy = "top1", gates: Gates = (), search: Search = "coordinate", seed: int = 0
) -> Settings:
    """The most accurate thresholds whose mean cost is within the budget."""
    path_of = LOOK_BACK.get(policy, quota_path if search == "quotas" else finer_price_path)
    path, held_out, temperatures = cross_fit(outputs, plan, policy, seed, gates=gates, path_of=path_of)
    within = np.flatnonzero((held_out.macs <= budget) & (held_out.own_macs <= budget))
    kept = bool(len(within))
    best = int(within[held_out.drop[within].argmin()]) if kept else int(held_out.macs.argmin())
    note = f"estimated drop {held_out.drop[best] * 100:+.2f} ± {held_out.drop_error[best] * 100:.2f} points."
    if not kept:
        least = max(held_out.macs[best], held_out.own_macs[best])
        note = f"a mean of {budget:g} of the multiply-adds cannot be reached, {least:.3f} is the least; " + note
    promise = Promise("budget-macs", budget, 0.0, kept, len(outputs.labels), 0, 0, 0, 0, 0, note)
    return settled(path[best], temperatures, held_out, best, promise, outputs.mask)


def settle_risk(
    outputs: Outputs,
    plan: Plan,
    rate: float,
    confidence: float,
    *,
    risk_of: Risk = "disagreement",
    bound: Bound | None = None,
    policy: Policy = "top1",
    gates: Gates = (),
    seed: int = 0,
) -> Settings:
    """The cheapest thresholds of which it is proven that they lose at most `rate`: of agreement with the full network, or of its accuracy.

    Thresholds, from safest to cheapest, come from one part of the samples. On the other part each is tested in this order
    until one fails (`risk.proven`); the cheapest of those before it is taken.

    Args:
        bound: What tests them; None is the one that stops earliest.

    Raises:
        CalibrationError: so few samples that nothing could be proven if none of them lost anything; a bound that cannot be of accuracy.
    """
    bound = bound or SHARPEST[risk_of]
    require_provable(len(outputs.labels), rate, confidence, bound, risk_of)
    trial = prepare_risk(outputs, plan, risk_of, policy=policy, gates=gates, seed=seed)
    steps, test, judged_on, left_out = trial.steps, trial.test, trial.judged_on, any(outputs.mask)
    count = proven(steps, rate, confidence, bound, risk_of)
    chosen = trial.cheapest(count)
    taken = exits_taken(judged_on.confidence, chosen)
    everyone = np.arange(len(taken))
    predictions = test.logits.argmax(axis=2)
    full = test.full.argmax(axis=1)
    is_on = bool((chosen < NEVER).any())
    lost = f"{judged_on.loss[taken, everyone].mean() * 100:.2f} %"
    what = {"disagreement": "other answers than the network's", "accuracy": "of accuracy lost"}[risk_of]
    notes = [] if is_on else [_without_exits(NO_EXIT if count or not steps.thresholds else NOT_PROVEN, outputs.mask)]
    if count and (is_on or left_out):
        notes.append(f"at most {rate * 100:g} % {what} at {confidence:g}, proven on {len(taken)} of the samples by the {bound} bound ({lost} seen).")
    elif left_out:
        notes.append(f"{lost} {what} seen on {len(taken)} of the samples.")
    if not count and len(steps.thresholds):
        smallest = best_provable(steps, confidence, bound, risk_of)
        notes.append(f"The smallest rate that these samples prove at {confidence:g} is {np.ceil(smallest * 1e4) / 100:.4g} %.")
    if is_on:
        loss, cost = judge(trial.found_on, chosen)
        notes.append(_gap_text(cost, float(least_costs(trial.found_on, np.array([loss]))[0])))
    promise = Promise(
        "risk" if risk_of == "disagreement" else "max-drop", rate, confidence, bool(count) or not left_out, len(outputs.labels),
        accuracy=float((predictions[taken, everyone] == test.labels).mean()),
        full_accuracy=float((full == test.labels).mean()),
        disagreement=float((predictions[taken, everyone] != full).mean()),
        mean_macs_share=float(_macs(plan, outputs.mask, chosen)[taken].mean()),
        mean_ms=0.0,
        note=" ".join(notes),
    )  # fmt: skip
    return Settings(chosen, trial.temperatures, promise, _errors(outputs, policy, seed))


@dataclass(frozen=True)
class RiskTrial:
    """All that a promise of risk is proven from, whatever its rate.

    found_on, judged_on: The two parts of the samples. test: What exits say of the second.
    """

    steps: Steps
    temperatures: NDArray[np.float64]
    found_on: Recorded
    judged_on: Recorded
    test: Outputs

    def cheapest(self, count: int) -> NDArray[np.float64]:
        """Of the first so many settings the cheapest, or no exit where none saves more than it costs; of proven ones any may be taken."""
        nothing = np.full(len(self.found_on.confidence), NEVER)
        if not count or self.steps.cost[:count].min() >= judge(self.found_on, nothing)[1]:
            return nothing
        return self.steps.thresholds[int(self.steps.cost[:count].argmin())]


def prepare_risk(outputs: Outputs, plan: Plan, risk_of: Risk, *, policy: Policy = "top1", gates: Gates = (), seed: int = 0) -> RiskTrial:
    """Split the samples, find settings on one part, and say what each loses on the other."""
    order = np.random.default_rng(seed).permutation(len(outputs.labels))
    searched = round(SEARCH_SHARE * len(order))
    search, test = outputs.select(order[:searched]), outputs.select(order[searched:])
    temperatures = _temperatures(search, policy)
    loss = disagreement_of(search) if risk_of == "disagreement" else excess_error(search, temperatures)
    found_on = recorded_outputs(search, temperatures, plan, policy, loss, gates=gates)
    judged_on = recorded_outputs(test, temperatures, plan, policy, loss_of(test, risk_of), gates=gates)
    untaken = [np.full(len(plan.exits), NEVER)] if any(outputs.mask) else []  # without an exit nothing differs, unless something is left out
    return RiskTrial(to_test([*untaken, *_finely(found_on, policy)], found_on, judged_on), temperatures, found_on, judged_on, test)


def _finely(recorded: Recorded, policy: Policy) -> Iterable[NDArray[np.float64]]:
    """What a policy's thresholds are tested as, from the safest to the cheapest."""
    if policy in LOOK_BACK:
        return LOOK_BACK[policy](recorded)
    return stricter_first(price_path(recorded), 0.0 if policy in ("entropy", "renyi_entropy") else 1.0)


def loss_of(outputs: Outputs, risk_of: Risk) -> NDArray[np.float64]:
    """What a promise of risk is about, `(K + 1, N)`: 0 or 1 of disagreement; of accuracy -1, 0 or 1, the full network right less the exit right."""
    if risk_of == "disagreement":
        return disagreement_of(outputs, smooth=False)
    right = (outputs.logits.argmax(axis=2) == outputs.labels).astype(float)
    return (outputs.full.argmax(axis=1) == outputs.labels) - right


def _gap_text(cost: float, bound: float) -> str:
    """How far a search may be from the best there is, for people."""
    return (
        f"Where thresholds were found they cost {cost:.3f}, boundaries priced; none that lose as little cost less than {bound:.3f} "
        f"(gap {max(1 - bound / cost, 0.0):.0%})."
    )


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
    own_macs: The cost of the path's own thresholds, on the samples that they were found on. own_cost: The same with boundaries priced.
    bound: What no thresholds that lose as little there cost less than (`exit_search.lower_bound`).
    errors: Of each exit, as `Settings` has them.
    """

    answers: NDArray[np.int32]
    exits: NDArray[np.int16]
    drop: NDArray[np.float64]
    drop_error: NDArray[np.float64]
    disagreement: NDArray[np.float64]
    cost: NDArray[np.float64]
    macs: NDArray[np.float64]
    own_macs: NDArray[np.float64]
    own_cost: NDArray[np.float64]
    bound: NDArray[np.float64]
    errors: NDArray[np.float64]
    full_accuracy: float


def cross_fit(
    outputs: Outputs, plan: Plan, policy: Policy, seed: int, *, gates: Gates = (), path_of: Path | None = None
) -> tuple[list[NDArray[np.float64]], HeldOut, NDArray[np.float64]]:
    """The path over all samples, its first step no exit at all, and how its prices fare on samples held out."""
    temperatures = _temperatures(outputs, policy)
    recorded = recorded_outputs(outputs, temperatures, plan, policy, excess_error(outputs, temperatures), gates=gates)
    path_of = path_of or LOOK_BACK.get(policy, price_path)
    nothing = np.full(len(plan.exits), NEVER)
    path = [nothing, *path_of(recorded)]
    count = len(outputs.labels)
    predictions = outputs.logits.argmax(axis=2)
    full = outputs.full.argmax(axis=1)
    full_right = (full == outputs.labels).astype(float)
    answers, exits = np.zeros((len(path), count), np.int32), np.zeros((len(path), count), np.int16)
    cost, macs = (np.zeros((len(path), count)) for _ in range(2))
    for fold, found in by_folds(recorded, path_of, seed):
        for step, thresholds in enumerate(found):
            taken = exits_taken(recorded.confidence[:, fold], thresholds)
            answers[step, fold], exits[step, fold] = predictions[taken, fold], taken
            cost[step, fold] = recorded.cost(thresholds)[taken]
            macs[step, fold] = _macs(plan, outputs.mask, thresholds)[taken]
    drop, differs = full_right - (answers == outputs.labels), answers != full
    error = drop.std(axis=1) / np.sqrt(count)
    own = np.array([_macs(plan, outputs.mask, thresholds)[exits_taken(recorded.confidence, thresholds)].mean() for thresholds in path])
    own_loss, own_cost = np.array([judge(recorded, thresholds) for thresholds in path]).T
    held_out = HeldOut(
        answers, exits, drop.mean(1), error, differs.mean(1), cost.mean(1), macs.mean(1), own, own_cost, least_costs(recorded, own_loss),
        _errors(outputs, policy, seed), float(full_right.mean()),
    )  # fmt: skip
    return path, held_out, temperatures


def by_folds(recorded: Recorded, path_of: Path, seed: int) -> Iterator[tuple[NDArray[np.intp], list[NDArray[np.float64]]]]:
    """Each part of the samples, and the path that the others have, its first step no exit at all."""
    count = recorded.confidence.shape[1]
    for fold in np.array_split(np.random.default_rng(seed).permutation(count), FOLDS):
        yield fold, [np.full(len(recorded.confidence), NEVER), *path_of(recorded.select(np.setdiff1d(np.arange(count), fold)))]


def settled(
    thresholds: NDArray[np.float64], temperatures: NDArray[np.float64], held_out: HeldOut, step: int, promise: Promise, mask: Mask
) -> Settings:
    """Settings whose promise carries what was measured at this step, under this mask."""
    if (thresholds < NEVER).any():
        promise = replace(promise, note=f"{promise.note} {_gap_text(held_out.own_cost[step], held_out.bound[step])}")
    else:
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
    return Settings(thresholds, temperatures, measured, held_out.errors)


def _without_exits(why: str, mask: Mask) -> str:
    return f"{why}: the full network runs, without what the mask leaves out." if any(mask) else f"{why}: the full network runs."


def _temperatures(outputs: Outputs, policy: Policy) -> NDArray[np.float64]:
    if policy in GATED:
        return np.append(np.ones(len(outputs.logits) - 1), fit_temperature(outputs.logits[-1], outputs.labels))
    return np.array([fit_temperature(logits, outputs.labels) for logits in outputs.logits])


def _errors(outputs: Outputs, policy: Policy, seed: int) -> NDArray[np.float64]:
    """Calibration errors, `(K + 1, 2)`, at the temperatures that this policy leaves an exit."""
    found = calibration_errors(outputs.logits, outputs.labels, seed)
    if policy in GATED:
        found[:-1, 1] = found[:-1, 0]
    return found


def recorded_outputs(
    outputs: Outputs, temperatures: NDArray[np.float64], plan: Plan, policy: Policy, loss: NDArray[np.float64], *, gates: Gates = ()
) -> Recorded:
    """What the search works on; costs in units of the full network's, boundaries priced."""
    full = plan.full_macs
    names = [point.name for point in plan.exits]
    reach = plan.macs_at(names, outputs.mask or None)
    heads = np.array([plan.head(point).cost.macs for point in plan.exits], float)
    reach_cost = np.array([*reach.values()], float) - np.append(np.cumsum(heads), heads.sum())
    boundaries = np.array([boundary_macs(plan.crossing_bytes(point)) for point in plan.exits], float)
    tied = heads / full if any(point.previous for point in plan.exits) else None
    return Recorded(outputs.confidence(temperatures, policy, gates), loss, reach_cost / full, (heads + boundaries) / full, head_cost=tied)


def confidence_of(logits: NDArray[np.floating], policy: Policy) -> NDArray[np.float64]:
    """A policy's score of one exit's logits `(N, classes)` at their temperature, higher is surer; of policies that look at this exit alone."""
    if policy in ("top1", "margin"):  # a review on a device computes these often, and has no use for entropies
        probabilities = np.exp(log_softmax(logits))
        top = np.partition(probabilities, -2, axis=1)[:, -2:]
        return top[:, 1] if policy == "top1" else top[:, 1] - top[:, 0]
    return score(policy, from_logits(logits), logits.argmax(axis=1))[0]


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


def _check_options(
    risk: tuple[float, float] | None, risk_of: Risk, bound: Bound | None, budget_macs: float | None, search: Search, policy: Policy, conformal: Kind
) -> None:
    if policy == "temporal":
        raise CalibrationError(
            "the policy temporal compares frames of a stream, and samples are none", "give the stream its own: Session.stream(hold=0.95)"
        )
    policies = tuple(name for name in get_args(Policy) if name != "temporal")
    one_of = (("risk_of", risk_of, RISKS), ("search", search, get_args(Search)), ("conformal", conformal, KINDS), ("policy", policy, policies))
    for option, value, known in (*one_of, *([("bound", bound, BOUNDS)] if bound is not None else [])):
        if value not in known:
            raise CalibrationError(f"there is no {option} {value!r}", f"there are {', '.join(known)}")
    if risk is None and (bound is not None or risk_of != "disagreement"):
        raise CalibrationError("bound and risk_of say how a risk is proven", "give --risk 0.02@0.95 with them")
    if search == "quotas" and budget_macs is None:
        raise CalibrationError("quotas are found for a budget of multiply-adds", "give --budget-macs 0.6 with --search quotas")
    if search == "quotas" and policy in LOOK_BACK:
        raise CalibrationError(
            f"quotas give each exit a threshold of its own, and {policy} has one for all", "give --search coordinate, or --policy top1"
        )


def _check_samples(
    samples: Samples, fitted: int, risk: tuple[float, float] | None, risk_of: Risk, bound: Bound, alpha: float | None, classes: int
) -> None:
    """Refuse what could not come out well, before anything is recorded."""
    if fitted < FEWEST_SAMPLES:
        enough = FEWEST_SAMPLES if alpha is None else int(np.ceil(FEWEST_SAMPLES / (1 - CONFORMAL_SHARE)))
        raise CalibrationError(
            f"{len(samples)} samples are too few to calibrate on", f"give at least {enough}; a thousand and more make the promise sharp"
        )
    if alpha is not None:
        require_enough(len(samples) - fitted, alpha, CONFORMAL_SHARE)
    if risk is not None:
        require_provable(fitted, *risk, bound, risk_of, share=1.0 if alpha is None else 1.0 - CONFORMAL_SHARE)
    require_labels(samples.labels, classes)


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
