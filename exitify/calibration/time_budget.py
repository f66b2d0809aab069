"""The most accurate mask and thresholds within a time: every mask measured on the machine at hand, or by segment times of another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import MaskMeasured, MaskTable, Policy, Profile, Promise, SegmentTimes
from exitify.calibration.calibrate import Gates, HeldOut, Outputs, Settings, cross_fit, exit_settings, record_outputs, settled
from exitify.calibration.segment_times import mean_time, run_times
from exitify.calibration.temperature import log_softmax
from exitify.calibration.thresholds import NEVER
from exitify.data import Samples
from exitify.plan import FINAL, Mask, Plan, mask_text
from exitify.progress import Progress, silent
from exitify.runtime.session import Session
from exitify.targets.board import conditions

MOST_MASKS = 32
"""Up to so many masks are all measured; of more, those on a greedy way from the whole network to the shallowest."""

TIMED, ROUNDS = 100, 5
"""Samples that a time rests on, and how often each mask is timed in turn with the others."""

CHECKS = 6
"""How many choices are timed until one is within the budget; the last is the fastest there is."""


@dataclass(frozen=True)
class Candidate:
    """A mask with one step of its path of thresholds.

    answers: `(N,)`, classes, on held-out samples. loss: The mean of what `Jury` says of them. ms: Estimated.
    """

    mask: Mask
    step: int
    thresholds: NDArray[np.float64]
    answers: NDArray[np.int32]
    loss: float
    ms: float

    @property
    def stops(self) -> bool:
        """Whether an exit is on."""
        return bool((self.thresholds < NEVER).any())


@dataclass(frozen=True)
class Jury:
    """What tells good answers from bad ones: labels, and what the networks of all masks believe together.

    Labels alone say little of two masks that differ in few answers; belief is smooth, but sure of what all masks get wrong. No one
    mask's belief is taken, since that mask would be the best by it.

    labels: `(N,)`. belief: `(N, classes)`, the mean of the masks' probabilities.
    """

    labels: NDArray[np.int64]
    belief: NDArray[np.float64]

    def loss(self, answers: NDArray[np.int32]) -> NDArray[np.float64]:
        """Errors of the answers, `(N,)`: half as observed, half as expected."""
        believed = np.take_along_axis(self.belief, answers[:, None].astype(np.intp), axis=1)[:, 0]
        return 0.5 * (answers != self.labels) + 0.5 * (1.0 - believed)


def settle_time(
    artifact: Artifact,
    samples: Samples,
    budget: float,
    *,
    masks: Sequence[Mask] | None = None,
    times: SegmentTimes | None = None,
    policy: Policy = "top1",
    gates: Gates = (),
    engine: str = "auto",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[MaskTable, Mask, Settings, str]:
    """Return what is known of each mask, the mask and thresholds with the least drop of accuracy within the budget, and what recorded outputs.

    A mask's time is measured; with exits it is that times the share of the cost that they leave, boundaries counted. The
    choice is then timed as it is, and replaced by a cheaper one while it takes longer than the budget. With the segment times of
    another machine, all of it follows from these.

    Args:
        budget: Mean milliseconds an answer, batch 1.
        masks: Those to choose among; None is all of them, or `greedy_masks` where there are more than `MOST_MASKS`.
    """
    plan = artifact.plan
    session = Session(artifact, engine=engine, profile=NO_PROFILE, threads=threads)
    nothing = plan.mask(None)
    recorded = {nothing: record_outputs(artifact, samples, session=session, progress=progress)}
    full = recorded[nothing].full.copy()  # a view would keep what every exit said

    def outputs_of(mask: Mask) -> Outputs:
        if mask not in recorded:
            recorded[mask] = record_outputs(artifact, samples, skip=mask, session=session, full=full, progress=progress)
        return recorded[mask]

    if masks is None:
        every = list(itertools.product((False, True), repeat=len(plan.skips))) if 2 ** len(plan.skips) <= MOST_MASKS else None
        masks = every or greedy_masks(plan, lambda mask: _disagreement(outputs_of(mask)))
    rows = np.random.default_rng(seed).permutation(len(samples))[:TIMED]
    inputs = samples.inputs(rows)
    wanted = list(dict.fromkeys([nothing, *masks]))
    if times is None:
        mask_ms = time_masks(session, wanted, inputs, progress)
        place = session.engine.full_name, threads, conditions()
    else:
        mask_ms = {mask: run_times(plan, times, (), mask)[FINAL] for mask in wanted}
        place = times.engine, times.threads, times.conditions
    paths: dict[Mask, tuple[list[NDArray[np.float64]], HeldOut, NDArray[np.float64]]] = {}
    measured: dict[str, MaskMeasured] = {}
    belief = np.zeros(full.shape)
    for i, mask in enumerate(mask_ms):
        progress("searching thresholds", i, len(mask_ms))
        outputs = outputs_of(mask)
        right = float((outputs.logits[-1].argmax(1) == outputs.labels).mean())
        share = plan.macs_at((), mask)[FINAL] / plan.full_macs
        measured[mask_text(mask)] = MaskMeasured(right, _disagreement(outputs), share, mask_ms[mask])
        fit = cross_fit(outputs, plan, policy, seed, gates=gates)
        belief += probabilities(outputs.logits[-1], fit[2][-1]) / len(mask_ms)
        if mask in masks:
            paths[mask] = fit
        del outputs, recorded[mask]  # thousands of classes fill the memory
    table = MaskTable(artifact.manifest.model_id, *place, len(samples), samples.identity(), measured)
    jury = Jury(samples.labels, belief)
    candidates = [
        found
        for mask, (path, held_out, _) in paths.items()
        for found in candidates_of(mask, path, held_out, _step_times(plan, path, held_out, mask, mask_ms[mask], times), jury)
    ]
    slower = dict.fromkeys(paths, 1.0)
    best, ms = candidates[0], np.inf
    for check in range(CHECKS):
        progress("timing the choice", check, CHECKS)
        within = [found for found in candidates if found.ms * slower[found.mask] <= budget]
        fastest = min(candidates, key=lambda found: found.ms * slower[found.mask])
        chosen = most_accurate(within, jury) if within and check < CHECKS - 1 else fastest
        found_ms = chosen.ms
        if times is None:
            found_ms = _time_choice(artifact, chosen, paths[chosen.mask][2], inputs, policy, gates, engine, threads)
        if found_ms <= budget or found_ms < ms:
            best, ms = chosen, found_ms
        if ms <= budget or not within:
            break
        slower[chosen.mask] *= max(found_ms / (chosen.ms * slower[chosen.mask]), 1.01)
    progress("timing the choice", CHECKS, CHECKS)
    _, held_out, temperatures = paths[best.mask]
    note = f"{ms:.2f} ms {'measured' if times is None else 'by the times of its segments'} with {place[0]} on {place[2]}; "
    if ms > budget:
        note = f"no choice that was found is within {budget:g} ms, this is the fastest: {note}"
    note += f"estimated drop {held_out.drop[best.step] * 100:+.2f} ± {held_out.drop_error[best.step] * 100:.2f} points."
    promise = Promise("budget-ms", budget, 0.0, ms <= budget, len(samples), 0, 0, 0, 0, ms, note)
    return table, best.mask, settled(best.thresholds, temperatures, held_out, best.step, promise, best.mask), session.engine.full_name


def _step_times(
    plan: Plan, path: list[NDArray[np.float64]], held_out: HeldOut, mask: Mask, ms: float, times: SegmentTimes | None
) -> NDArray[np.float64]:
    """Mean milliseconds of each step: as segments take, or else as its cost is. ms: Of an answer without exits."""
    if times is None:
        return ms * held_out.cost / held_out.cost[0]
    names, found = plan.exit_names, []
    for thresholds, exits in zip(path, held_out.exits):
        used = {names[i] for i in np.unique(exits)} | {name for name, threshold in zip(names, thresholds) if threshold < NEVER}
        found.append(mean_time(plan, times, used - {FINAL}, mask, exits))
    return np.array(found)


def candidates_of(mask: Mask, path: list[NDArray[np.float64]], held_out: HeldOut, ms: NDArray[np.float64], jury: Jury) -> list[Candidate]:
    """A mask's settings from the safest to the cheapest. ms: Of an answer of each."""
    return [
        Candidate(mask, step, thresholds, answers, float(jury.loss(answers).mean()), float(ms[step]))
        for step, (thresholds, answers) in enumerate(zip(path, held_out.answers))
    ]


def most_accurate(candidates: Sequence[Candidate], jury: Jury) -> Candidate:
    """The one that loses least, as far as the samples can tell.

    The least of many estimates is a lucky one, and the more masks are looked at, the luckier. So what has few rivals goes first:
    stopping early with nothing left out, then leaving out without stopping, then both. A later one is taken when it is better
    by more than the standard error of the difference on the same samples.
    """
    kinds: dict[tuple[bool, bool], list[Candidate]] = {}
    for found in candidates:
        kinds.setdefault((any(found.mask), any(found.mask) and found.stops), []).append(found)
    best, *others = (min(kinds[kind], key=lambda found: (found.loss, found.ms)) for kind in sorted(kinds))
    for other in others:
        gain = jury.loss(best.answers) - jury.loss(other.answers)
        if gain.mean() > gain.std() / np.sqrt(len(gain)):
            best = other
    return best


def time_masks(session: Session, masks: Sequence[Mask], inputs: NDArray[np.generic], progress: Progress = silent) -> dict[Mask, float]:
    """Milliseconds an answer of each mask without exits: the median over rounds in which all take their turn."""
    rounds: dict[Mask, list[float]] = {mask: [] for mask in masks}
    for mask in masks:
        for x in inputs[:3]:
            session.run(x, mask)
    for i in range(ROUNDS):
        for j, (mask, found) in enumerate(rounds.items()):
            progress("timing masks", i * len(masks) + j, ROUNDS * len(masks))
            for x in inputs[i::ROUNDS]:
                started = time.perf_counter_ns()
                session.run(x, mask)
                found.append((time.perf_counter_ns() - started) / 1e6)
    return {mask: float(np.median(found)) for mask, found in rounds.items()}


def probabilities(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Of the classes, `(N, classes)`."""
    return np.exp(log_softmax(logits / temperature))


def greedy_masks(plan: Plan, loss: Callable[[Mask], float]) -> list[Mask]:
    """Masks from none to all: at each step the path is left out that costs least for what it saves."""
    mask = plan.mask(None)
    chosen = [mask]
    while not all(mask):
        options = [tuple(flag or i == j for j, flag in enumerate(mask)) for i, flag in enumerate(mask) if not flag]
        saved = [plan.macs_at((), mask)[FINAL] - plan.macs_at((), option)[FINAL] for option in options]
        losses = [loss(option) for option in options]
        mask = options[int(np.argmin([lost / max(save, 1) for lost, save in zip(losses, saved)]))]
        chosen.append(mask)
    return chosen


def _disagreement(outputs: Outputs) -> float:
    """Share of the samples on which the mask's network answers otherwise than the whole one."""
    return float((outputs.logits[-1].argmax(1) != outputs.full.argmax(1)).mean())


def _time_choice(
    artifact: Artifact,
    choice: Candidate,
    temperatures: NDArray[np.float64],
    inputs: NDArray[np.generic],
    policy: Policy,
    gates: Gates,
    engine: str,
    threads: int,
) -> float:
    """Mean milliseconds an answer with this mask and these thresholds."""
    settings = exit_settings(artifact.plan, choice.thresholds, temperatures, gates)
    promise = Promise("budget-ms", 0.0, 0.0, False, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
    profile = Profile(artifact.manifest.model_id, policy, settings, float(temperatures[-1]), mask_text(choice.mask), promise, "", "")
    session = Session(artifact.with_profile("timed", profile), engine=engine, profile="timed", threads=threads)
    for x in inputs[:10]:
        session.run(x)
    times = []
    for x in inputs:
        started = time.perf_counter_ns()
        session.run(x)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return float(np.mean(times))
