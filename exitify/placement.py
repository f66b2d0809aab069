"""`--exits auto` with data: probes at all sensible places, and a search over what they say for the exits that pay."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from exitify.artifact.artifact import Artifact, build_artifact
from exitify.artifact.manifest import InputContract
from exitify.calibration.calibrate import Outputs, are_memorised, excess_error, record_outputs, recorded_outputs
from exitify.calibration.exit_search import Found, Limit, Worth, best_added, lower_bound, of_exits, search, worths
from exitify.calibration.segment_times import measure_segments, shares_of_time
from exitify.calibration.temperature import fit_temperature
from exitify.calibration.thresholds import NEVER, Recorded
from exitify.data import Samples, rows_at_once
from exitify.errors import CalibrationError, DataError, PlanError
from exitify.heads import ExitHead, check_kind, head_cost
from exitify.onnx_export.to_artifact import export
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import MOST_EXITS, ChooseExits, Considered, HeadChooser, considered, sensible_places
from exitify.passes.cost import device_of
from exitify.passes.cut_segments import CutSegments
from exitify.passes.exit_places import Place, Places
from exitify.passes.switch_norms import SwitchNorms
from exitify.plan import ExitPoint, HeadSpec
from exitify.program import HEADS, Program, compile_graph, extract, in_mode
from exitify.progress import Progress, silent
from exitify.train.heads import HeadTraining, load_heads, pooled_shape, train_heads

MOST_PLACES = 16
"""Probes stand at no more places than these, those nearest to evenly spaced by cost."""

PROBE_SHARE = 0.1
"""No probe costs more than this share of the network."""

MOST_BYTES = 4 * 2**30
"""What is recorded for probes takes no more room on the disk; of more samples than fit, as many as do are drawn."""

TRIED = ("linear", "conv", "deep", "mlp", "own")
"""The heads that `auto` tries at a place."""

MOST_ROWS = 20_000
"""More samples tell places apart no better, and take longer."""

MAX_DROP = 0.005
"""How far accuracy may fall where nothing is said."""

HELD_OUT = 0.2
"""Share of the data on which the search judges, where no other is given."""

LARGEST = 60_000.0
"""Values are recorded in float16, which ends at 65,504."""

PROBE_TRAINING = HeadTraining(epochs=6, copies=1, validation=0.05)
"""How probes are trained: enough to tell places apart. `exitify train` goes on from there."""


@dataclass(frozen=True)
class Probe:
    """A head that was tried at a place.

    share: Cost of reaching it. head_share: What its head and boundary cost. Both of the network's, in the unit of the search.
    accuracy: Of its head alone, on the samples that the search judged on.
    worth: What it does for the mean under the thresholds found, or would do if it were added to them.
    verdict: `exit`, or why it is none.
    """

    value: str
    place: str
    head: HeadSpec
    share: float
    head_share: float
    crossing: int
    crossing_bytes: int
    accuracy: float
    worth: Worth
    verdict: str


@dataclass(frozen=True)
class Placement:
    """Where exits pay, and what that rests on.

    artifact: The network with these exits, their heads trained as probes.
    probes: Everything tried, in order. turned_down: Places that were not, and why.
    unit: `ms` of the engine named, measured alone in turn; or `macs`. whole: What the network without exits takes, in that unit.
    drop, cost: Expected loss of accuracy and mean cost, as a share, on the samples that the search chose by: it flatters itself, calibrate
        judges anew. bound: No choice among these probes costs less within the limit (or loses less, within a cost).
    reason: Why there are no exits; empty where there are.
    warning: What is wrong with the samples, if anything.
    """

    program: Program
    artifact: Artifact
    probes: tuple[Probe, ...]
    turned_down: tuple[Considered, ...]
    unit: Literal["ms", "macs"]
    engine: str
    whole: float
    accuracy: float
    drop: float
    cost: float
    bound: float
    is_exact: bool
    reason: str
    warning: str = ""

    @property
    def gap(self) -> float:
        """How far the mean cost can be above the least there is, as a share of it: at most so much."""
        return (self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


def place_by_data(
    program: Program,
    samples: Samples,
    *,
    contract: InputContract,
    held_out: Samples | None = None,
    max_drop: float | None = None,
    budget_ms: float | None = None,
    head: str = "auto",
    unit: Literal["ms", "macs"] = "ms",
    engine: str = "auto",
    threads: int = 1,
    most_exits: int = MOST_EXITS,
    training: HeadTraining | None = None,
    work: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Placement:
    """Return the network with exits where they pay.

    Heads of every kind that a place allows are trained at all sensible places, side by side over features recorded once. Every segment
    and head is timed on the engine at hand. Then the subset and its thresholds are chosen that make the mean cost least, boundaries
    and the heads that samples pass on their way counted, while the accuracy falls by no more than `max_drop`; or that lose least
    within `budget_ms`. The answer may be no exits.

    Args:
        program: Captured, with skip paths if it is to have any, without exits.
        samples: Labelled, to train probes on.
        contract: What the network reads.
        held_out: Labelled, unseen by the network, to choose by; by default a part of `samples`.
        max_drop: Accuracy may fall by this much, in [0, 1]; `MAX_DROP` unless a budget is given.
        budget_ms: Mean time of an answer on this machine.
        head: `auto` tries all kinds.
        unit: Whether cost is measured time or multiply-adds. engine, threads: What is timed.
        most_exits: No more than so many.
        training: Of the probes. work: Folder for what is recorded; an interrupted search goes on there.

    Raises:
        PlanError: no head of this kind reads any place. DataError, CalibrationError: the samples do not fit, or are too few.
    """
    _check_request(max_drop, budget_ms, unit, head)
    options = replace(training or PROBE_TRAINING, seed=seed)
    if held_out is None:
        order = np.random.default_rng(seed).permutation(len(samples))
        cut = round(len(order) * HELD_OUT)
        samples, held_out = samples.subset(order[cut:]), samples.subset(order[:cut])
    if len(held_out) < 50 or len(samples) < 100:
        raise DataError(f"{len(samples)} samples to train probes on and {len(held_out)} to choose by are too few", "give at least 100 and 50")
    places, turned_down = _places(program, head, samples)
    if not places:
        verdicts = "; ".join(dict.fromkeys(place.verdict for place in turned_down))
        raise PlanError(f"no exit can stand in this network: {verdicts or 'nothing lies between its input and its scores'}", "see --why")
    rows = _rows_that_fit(places)
    drawn = samples if rows >= len(samples) else samples.subset(np.random.default_rng((seed, 1)).permutation(len(samples))[:rows])
    folder = work or Path("exitify-probes")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the same probes when an interrupted search goes on
        probed = export(_with_probes(program, places), contract=contract, heads_trained=False)
    artifact, _ = train_heads(probed, drawn, options, work=folder, progress=progress)
    outputs = record_outputs(artifact, held_out, engine="auto" if unit == "macs" else engine, threads=threads, progress=progress)
    temperatures = np.array([fit_temperature(logits, outputs.labels) for logits in outputs.logits])
    recorded = recorded_outputs(outputs, temperatures, artifact.plan, "top1", excess_error(outputs, temperatures))
    whole, engine_name = float(artifact.plan.full_macs), ""
    if unit == "ms":
        times = measure_segments(artifact, engine=engine, threads=threads, progress=progress)
        reach, heads = shares_of_time(artifact.plan, times, ())
        recorded = Recorded(recorded.confidence, recorded.loss, reach, heads)
        whole, engine_name = times.whole_ms, times.engine
    progress("searching exits", 0, 1)
    limit = Limit(cost=budget_ms / whole) if budget_ms is not None else Limit(loss=MAX_DROP if max_drop is None else max_drop)
    found = _search(recorded, limit, most_exits, [point.after for point in artifact.plan.exits])
    progress("searching exits", 1, 1)
    probes = _judged(artifact, outputs, recorded, found, limit, {place.value: place for place, _ in places}, most_exits)
    placed = _placed(program, artifact, [artifact.plan.exits[k] for k in found.chosen])
    exported = export(placed, contract=contract, heads_trained=True)
    exported = build_artifact(replace(exported.manifest, training_data=drawn.identity()), dict(exported.files))
    if work is None:
        with contextlib.suppress(OSError):  # not empty: a search with other options was interrupted
            folder.rmdir()
    accuracy = float((outputs.full.argmax(1) == outputs.labels).mean())
    return Placement(
        placed, exported, probes, tuple(turned_down), unit, engine_name, whole, accuracy, found.loss, found.cost, found.bound, found.is_exact,
        "" if len(found.chosen) else _why_none(probes), _warning(accuracy, temperatures[-1]),
    )  # fmt: skip


def _check_request(max_drop: float | None, budget_ms: float | None, unit: str, head: str) -> None:
    if max_drop is not None and budget_ms is not None:
        raise CalibrationError("exits are placed for one promise", "give --max-drop or --budget-ms")
    if budget_ms is not None and unit != "ms":
        raise CalibrationError("--budget-ms is a time, and costs were asked for in multiply-adds", "leave out --cost macs")
    if budget_ms is not None and not 0 < budget_ms < np.inf:
        raise CalibrationError(f"--budget-ms {budget_ms:g} is no time", "12 is twelve milliseconds an answer")
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise CalibrationError(f"--max-drop {max_drop:g} is no share of the samples", "0.005 is half a point of accuracy")
    if head != "auto":
        check_kind(head)


def _places(program: Program, head: str, samples: Samples) -> tuple[list[tuple[Place, HeadSpec]], list[Considered]]:
    """Places with every head that is tried there, and those that are turned down."""
    places = Places(program)
    chooser = HeadChooser(places)
    looked_at, verdicts = sensible_places(places)
    heads: dict[str, list[HeadSpec]] = {}
    for place in looked_at:
        if place.value in verdicts:
            continue
        found: list[HeadSpec] = []
        problem = ""
        for kind in TRIED if head == "auto" else (head,):
            try:
                spec = chooser.head(kind, place.value)
            except PlanError as error:
                problem = problem or error.problem
                continue
            if head != "auto" or _is_worth_trying(spec, found, places.full.macs):
                found.append(spec)
        if found:
            heads[place.value] = found
        else:
            verdicts[place.value] = problem or f"every head would cost more than {PROBE_SHARE:.0%} of the network"
    if heads:
        x = samples.inputs(slice(0, min(32, rows_at_once(program.values[program.plan.input]))))
        for value in _too_large(program, list(heads), x):
            verdicts[value] = f"its values go beyond {LARGEST:g}, and features are recorded in float16"
            del heads[value]
    kept = _spread([place for place in looked_at if place.value in heads])
    verdicts.update(
        dict.fromkeys(heads.keys() - {p.value for p in kept}, f"a neighbour at nearly the same cost was probed: {MOST_PLACES} places are")
    )
    return [(place, spec) for place in kept for spec in heads[place.value]], [
        considered(p, verdicts[p.value]) for p in looked_at if p.value in verdicts
    ]


def _is_worth_trying(spec: HeadSpec, others: list[HeadSpec], full: int) -> bool:
    """Whether `auto` tries a head: it is not too dear, and not one of the others over again."""
    if spec.kind in ("conv", "deep") and min(spec.shape[1:] if spec.layout == "nchw" else spec.shape[:2]) < 4:
        return False
    if spec in others or (spec.kind == "mlp" and any(other.kind == "conv" for other in others)):
        return False
    if spec.kind == "own" and not any("norm" in step or step.startswith("linear") for step in spec.steps):
        return False
    return head_cost(spec).macs <= PROBE_SHARE * full or spec.kind == "linear"


def _spread(places: list[Place]) -> list[Place]:
    """At most `MOST_PLACES` of them, spread over the cost."""
    if len(places) <= MOST_PLACES:
        return places
    chosen: list[Place] = []
    for goal in np.linspace(places[0].share, places[-1].share, MOST_PLACES):
        free = [place for place in places if place not in chosen]
        chosen.append(min(free, key=lambda place: abs(place.share - goal)))
    return sorted(chosen, key=places.index)


def _too_large(program: Program, values: list[str], x: NDArray[np.generic]) -> set[str]:
    """Which of these values float16 cannot hold."""
    nodes = {node.name: node for node in program.graph.nodes}
    function = compile_graph(extract(program.graph, [nodes[value] for value in values]))
    with in_mode(program, training=False), torch.no_grad():
        found = function(program, torch.from_numpy(x).to(device_of(program)))
    return {value for value, tensor in zip(values, found) if not tensor.abs().max() < LARGEST}


def _with_probes(program: Program, places: list[tuple[Place, HeadSpec]]) -> Program:
    points = tuple(ExitPoint(f"probe{i}", place.value, place.place, spec) for i, (place, spec) in enumerate(places, 1))
    return CutSegments()(AttachHeads()(program.replace(plan=replace(program.plan, exits=points, segments=()))))


def _rows_that_fit(places: list[tuple[Place, HeadSpec]]) -> int:
    """How many samples can be recorded for these probes."""
    heads = [(place.value, spec, ExitHead(spec)) for place, spec in places]
    numbers = sum({(value, str(head.pool)): pooled_shape(head, spec.shape).numel() for value, spec, head in heads}.values())
    return min(max(int(MOST_BYTES / (2 * numbers)), 100), MOST_ROWS)


def _search(recorded: Recorded, limit: Limit, most: int, values: list[str]) -> Found:
    """The best exits with no two after one value, of which the second can only repeat the first."""
    allowed = np.arange(len(values))
    while True:
        found = search(of_exits(recorded, allowed), limit, most_exits=most)
        worth = worths(of_exits(recorded, allowed), found.thresholds)
        by_value: dict[str, list[int]] = {}
        for k in found.chosen:
            by_value.setdefault(values[allowed[k]], []).append(int(k))
        lesser = [min(same, key=lambda k: worth[k].saves - worth[k].costs) for same in by_value.values() if len(same) > 1]
        if not lesser:
            thresholds = np.full(len(values), NEVER)
            thresholds[allowed] = found.thresholds
            return replace(found, thresholds=thresholds, bound=lower_bound(recorded, limit))
        allowed = np.delete(allowed, lesser)


def _judged(
    artifact: Artifact, outputs: Outputs, recorded: Recorded, found: Found, limit: Limit, places: dict[str, Place], most: int
) -> tuple[Probe, ...]:
    """Every probe with what it does, or would do."""
    points = artifact.plan.exits
    off = [k for k in range(len(points)) if k not in found.chosen]
    worth = dict(enumerate(worths(recorded, found.thresholds))) | best_added(recorded, found.thresholds, limit, off)
    probes = []
    for k, point in enumerate(points):
        place = places[point.after]
        verdict = "exit" if k in found.chosen else _why_not(worth[k], len(found.chosen) >= most)
        accuracy = float((outputs.logits[k].argmax(1) == outputs.labels).mean())
        share, head_share = float(recorded.reach_cost[k]), float(recorded.try_cost[k])
        probes.append(
            Probe(point.after, point.place, point.head, share, head_share, len(place.crossing), place.crossing_bytes, accuracy, worth[k], verdict)
        )
    return tuple(probes)


def _why_not(worth: Worth, is_full: bool) -> str:
    if worth.leaves == 0:
        return "whatever would leave there is not sure enough, or would leave as cheaply elsewhere"
    text = f"would save {worth.saves:.2%} of the mean and cost {worth.costs:.2%}"
    return f"{text}, and others save more" if worth.saves > worth.costs and is_full else text


def _why_none(probes: tuple[Probe, ...]) -> str:
    best = max(probes, key=lambda probe: probe.worth.saves - probe.worth.costs)
    if best.worth.leaves == 0:
        return f"at none of {len(probes)} probes would a sample leave that is sure enough"
    return (
        f"of {len(probes)} probes the best, {best.head.text} after {best.place}, would save {best.worth.saves:.2%} of the mean "
        f"and cost {best.worth.costs:.2%}"
    )


def _placed(program: Program, probed: Artifact, points: list[ExitPoint]) -> Program:
    """The network with these probes as its exits, their weights as trained."""
    named = ",".join(f"{point.after}:{point.head.text}" for point in points) or "none"
    placed = AttachHeads()(ChooseExits(named)(program))
    placed = CutSegments()(SwitchNorms()(placed) if placed.plan.skips else placed)
    trained = {(point.after, point.head): head for point, head in zip(probed.plan.exits, load_heads(probed).values())}
    for point in placed.plan.exits:
        placed.get_submodule(f"{HEADS}.{point.name}").load_state_dict(trained[point.after, point.head].state_dict())
    return placed


def _warning(full_accuracy: float, temperature: float) -> str:
    if are_memorised(full_accuracy, temperature):
        return (
            f"The network is right on {full_accuracy:.2%} of the samples that the search judged on and too modest about it (temperature "
            f"{temperature:.2f}): they look memorised, and exits look better on them than they are. Give others with --held-out."
        )
    return ""
