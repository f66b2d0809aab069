"""What a person reads of a plan, a profile, answers and timings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Compiled, MaskTable, Profile, SegmentTimes
from exitify.cli.show import millions, percent, say, table
from exitify.plan import FINAL, Plan

if TYPE_CHECKING:
    from exitify.adapt.compare import Difference
    from exitify.adapt.report import AdaptReport
    from exitify.adapt.state import State
    from exitify.benchmark import BenchReport
    from exitify.board.doctor import Finding
    from exitify.passes.choose_exits import Considered
    from exitify.passes.choose_skips import ConsideredBlock
    from exitify.placement import Placement
    from exitify.runtime.answers import Answer
    from exitify.targets import Target
    from exitify.train.heads import HeadReport

SHOWN_CLASSES = 5
"""Of an answer's set of classes, so many are named."""


def exits(plan: Plan) -> None:
    """Where the network may stop."""
    reach = plan.macs_at([point.name for point in plan.exits])
    rows: list[tuple[object, ...]] = []
    for point in plan.exits:
        cost = plan.head(point).cost.macs
        spent = reach[point.name]
        rows.append((point.name, point.place, millions(spent), percent(spent / plan.full_macs), point.head, millions(cost)))
    rows.append((FINAL, plan.output, millions(reach[FINAL]), percent(reach[FINAL] / plan.full_macs), "", ""))
    columns = ("exit", "after", "reached for", "of the network", "head", "its cost")
    table(f"Exits of a network of {millions(plan.full_macs)} multiply-adds", columns, rows)


def skips(plan: Plan) -> None:
    """What the network may leave out."""
    rows: list[tuple[object, ...]] = []
    for i, path in enumerate(plan.skips):
        saved = plan.full_macs - plan.macs_at((), [i == j for j in range(len(plan.skips))])[FINAL]
        rows.append((path.name, path.stage, ", ".join(path.blocks), millions(saved), percent(saved / plan.full_macs), len(path.norms)))
    least = plan.macs_at((), "all")[FINAL]
    title = f"Skip paths; with all of them left out {millions(least)} multiply-adds remain, {percent(least / plan.full_macs)}"
    table(title, ("path", "stage", "leaves out", "saves", "of the network", "norms that switch"), rows)


def masks(found: MaskTable) -> None:
    """What every mask gives and costs, the whole network first."""
    rows = [
        (mask, percent(measured.accuracy), percent(measured.disagreement), percent(measured.macs_share), f"{measured.ms:.3f}")
        for mask, measured in found.masks.items()
    ]
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    title = f"Masks without exits, on {found.samples} samples; {found.engine}, {threads}, {found.conditions}"
    table(title, ("mask", "accuracy", "other answers", "of the multiply-adds", "ms"), rows)


def blocks(found: Sequence[ConsideredBlock]) -> None:
    """What was looked at, and why it cannot be left out."""
    rows = [(block.stage, block.place, percent(block.share), block.verdict) for block in found]
    table("Blocks considered", ("stage", "block", "of the cost", "verdict"), rows)


def considered(places: Sequence[Considered]) -> None:
    """What was looked at, and why it is no exit."""
    rows = [
        (place.place or place.value, place.value, percent(place.share), crossing(place.crossing, place.crossing_bytes), place.verdict)
        for place in places
    ]
    table("Places considered", ("module", "value", "of the cost", "crossing", "verdict"), rows)


def crossing(tensors: int, size: int) -> str:
    """How much a cut hands on."""
    return f"{tensors} × {size / tensors / 1024:.0f} KiB" if tensors else ""


def placement(found: Placement, *, with_all: bool) -> None:
    """What each exit saves and costs, and what was tried beside them."""
    unit = f"{found.whole:.3f} ms on {found.engine}" if found.unit == "ms" else f"{millions(int(found.whole))} multiply-adds"
    rows = [
        (
            probe.place,
            probe.head.text,
            percent(probe.share),
            crossing(probe.crossing, probe.crossing_bytes),
            percent(probe.accuracy),
            percent(probe.worth.leaves),
            percent(probe.worth.saves),
            percent(probe.worth.costs),
            probe.verdict,
        )
        for probe in found.probes
        if with_all or probe.verdict == "exit"
    ]
    columns = ("after", "head", "reached for", "crossing", "right", "leave there", "saves", "costs", "verdict")
    if rows:
        table(f"{'Probes' if with_all else 'What exits are worth'}, in shares of the network's {unit}", columns, rows)
    if found.reason:
        say(f"No exit pays: {found.reason}.")
    else:
        how = "every combination was tried" if found.is_exact else f"the least there can be with these probes is {found.bound:.3f}"
        say(f"Expected on the samples chosen by: {found.cost:.3f} of the network's cost, {found.drop * 100:+.2f} points lost; {how}.")
    if found.warning:
        say(f"Warning: {found.warning}")


def placement_json(found: Placement) -> dict[str, Any]:
    """A placement for machines."""
    names = ("unit", "engine", "whole", "accuracy", "drop", "cost", "bound", "gap", "is_exact", "reason", "warning")
    return {"probes": found.probes, **{name: getattr(found, name) for name in names}}


def heads(reports: Sequence[HeadReport]) -> None:
    """How good trained heads are."""
    rows = [(report.exit, percent(report.accuracy), report.epoch + 1) for report in reports]
    table("Heads, on training samples set aside (the network knows them: unseen ones score lower)", ("exit", "accuracy", "best epoch"), rows)


def profile(name: str, made: Profile) -> None:
    """When a profile stops, and what it promises."""
    rows: list[tuple[object, ...]] = []
    errors = {exit_name: tuple(f"{error:.3f}" for error in pair) for exit_name, pair in made.calibration_errors.items()}
    for exit_name, setting in made.exits.items():
        threshold = f"{setting.threshold:.4f}" if setting.enabled else ""
        rows.append((exit_name, "on" if setting.enabled else "off", threshold, f"{setting.temperature:.3f}", *errors.get(exit_name, ())))
    rows.append((FINAL, "on", "", f"{made.final_temperature:.3f}", *errors.get(FINAL, ())))
    masked = f", leaving out {made.skip}" if "1" in made.skip else ""
    table(f"Profile {name!r}, by {made.policy}{masked}", ("exit", "runs", "threshold", "temperature", *(("ECE", "with it") if errors else ())), rows)
    promise = made.promise
    say(f"Promise: {promise.asked}: {'kept' if promise.kept else 'NOT KEPT'}, on {promise.samples} samples. {promise.note}")
    accuracy = f"Accuracy {promise.accuracy:.2%} against {promise.full_accuracy:.2%}, other answers {promise.disagreement:.2%}"
    say(f"{accuracy}, mean cost {promise.mean_macs_share:.3f} of the network's.")


def answers(names: Sequence[str], given: Sequence[Answer], plan: Plan) -> None:
    """One line an input."""
    with_sets = any(answer.prediction_set is not None for answer in given)
    rows: list[tuple[object, ...]] = []
    for name, answer in zip(names, given):
        where = f"{answer.exit}, held" if answer.held else answer.exit
        sure = f"{answer.probabilities[answer.label]:.3f}"
        sets = (_classes_of(answer),) if with_sets else ()
        rows.append((name, answer.name, sure, *sets, where, f"{answer.macs / plan.full_macs:.3f}", f"{answer.ms:.2f}"))
    columns = ("input", "answer", "probability", *(("one of",) if with_sets else ()), "exit", "of the cost", "ms")
    table("", columns, rows)


def _classes_of(answer: Answer) -> str:
    """The names of an answer's set of classes, the first few of many."""
    labels = answer.prediction_set or ()
    names = [answer.classes[label] if label < len(answer.classes) else str(label) for label in labels[:SHOWN_CLASSES]]
    more = f" and {len(labels) - SHOWN_CLASSES} more" if len(labels) > SHOWN_CLASSES else ""
    return ", ".join(names) + more or "none"


def answer_json(name: str, answer: Answer) -> dict[str, Any]:
    """An answer for machines."""
    return {
        "input": name,
        "label": answer.label,
        "name": answer.name,
        "exit": answer.exit,
        "held": answer.held,
        "macs": answer.macs,
        "ms": answer.ms,
        "prediction_set": answer.prediction_set,
        "probabilities": [float(p) for p in answer.probabilities],
        "logits": [float(v) for v in answer.logits],
    }


def timings(report: BenchReport) -> None:
    """Contenders against each other."""
    from exitify.benchmark.report import cells, conditions_text, energy_cells, exits_text, noise_text, versions_text

    columns, rows = cells(report)
    table(conditions_text(report), columns, rows)
    columns, rows = energy_cells(report)
    if rows:
        table("Energy of an answer", columns, rows)
    say(noise_text(report))
    say(exits_text(report))
    say(f"{versions_text(report)}.")


def artifact(opened: Artifact) -> None:
    """Everything an artifact says of itself."""
    manifest = opened.manifest
    contract = manifest.input
    say(f"format {manifest.format}, written by exitify {manifest.exitify}")
    say(f"model {manifest.model_id[:16]} from {manifest.model.source or 'a module'}; heads {'trained' if manifest.heads_trained else 'untrained'}")
    say(f"input {contract.dtype} (N, {', '.join(map(str, contract.shape))}); {contract.preprocess or 'no preprocessing known: arrays only'}")
    shown = f": {', '.join(contract.classes[:10])}{' …' if len(contract.classes) > 10 else ''}" if contract.classes else ""
    say(f"{opened.plan.classes} classes{shown}")
    exits(opened.plan)
    if opened.plan.skips:
        skips(opened.plan)
    if opened.masks is not None:
        masks(opened.masks)
    for name, made in opened.profiles.items():
        profile(name, made)
    for name, measured in opened.times.items():
        times(name, measured, opened.plan)
    for library in opened.targets.values():
        compiled(opened, library)


def compiled(artifact: Artifact, made: Compiled) -> None:
    """What stands in a library: segments, what they differ from the reference by, and what is left to another engine."""
    rows = []
    for segment in artifact.plan.segments:
        found = made.segments.get(segment.name)
        rows.append((segment.name, millions(segment.cost.macs), "TVM" if found else made.left_to, f"{found.error:.1e}" if found else ""))
    tuned = f"; {made.trials} schedules measured" if made.trials else "; default schedules"
    gpu = f"; {made.gpu.architecture} by CUDA {made.gpu.compiler}, PTX {made.gpu.ptx}" if made.gpu else ""
    table(
        f"Library for {made.target} ({made.triple}, {made.cpu}{gpu}), {made.precision}{tuned}",
        ("segment", "multiply-adds", "runs on", "difference"),
        rows,
    )


def times(name: str, found: SegmentTimes, plan: Plan) -> None:
    """How long segments take."""
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    rows = [(s.name, millions(s.cost.macs), f"{found.segments[s.name]:.4f}") for s in plan.segments]
    rows.append(("the network without exits", millions(plan.full_macs), f"{found.whole_ms:.4f}"))
    table(f"Times {name}: {found.engine}, {threads}, {found.conditions}; medians of {found.rounds}", ("segment", "multiply-adds", "ms"), rows)


def findings(found: Sequence[Finding]) -> None:
    """What a machine has, and what helps where it lacks something."""
    marks = {"right": "yes", "absent": "no", "wrong": "WRONG"}
    table("", ("", "", "found", "what helps"), [(f.topic, marks[f.state], f.text, f.hint) for f in found])


def targets(boards: Sequence[Target]) -> None:
    """Boards, their processors and memory."""
    rows = []
    for board in boards:
        gpu = f"{board.gpu.architecture}, {board.gpu.multiprocessors} SMs, {board.gpu.clock_mhz} MHz" if board.gpu else ""
        gpu = board.gpu.architecture if board.gpu and not board.gpu.multiprocessors else gpu
        cores = f"{board.cpu.cores} x {board.cpu.name}" if board.cpu.cores else board.cpu.name
        memory = f"{board.memory_gib} GiB, {board.bandwidth_gb_s:g} GB/s" if board.memory_gib else ""
        rows.append((board.name, board.description, cores, gpu, memory, ", ".join(board.power_modes)))
    table("Targets", ("name", "board", "CPU", "GPU", "memory", "power modes"), rows)


def adapted(report: AdaptReport, classes: Sequence[str]) -> None:
    """What a stream has changed."""
    names = [classes[i] if i < len(classes) else str(i) for i in report.seen]
    classes_seen = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    say(
        f"{report.answers} answers in {report.seconds:.0f} s, {report.updates} updates; {report.audited} audited, "
        f"{percent(report.differed)} of these other than the network's. Seen: {classes_seen}."
    )
    if report.refused:
        say(f"{report.refused} inputs were refused; the first: {report.refusal}")
    if report.not_saved:
        say(f"On the way the state could not be written: {report.not_saved}")
    happened([(event.updates, event.what, event.exit, event.reason) for event in report.events])
    if report.before is not None and report.after is not None:
        rows: list[tuple[object, ...]] = []
        for name, one in (("before", report.before), ("after", report.after)):
            exits = ", ".join(f"{exit_name} {share * 100:.0f} %" for exit_name, share in one.exits.items() if share)
            accuracies = ("" if share is None else f"{share:.2%}" for share in (one.accuracy_seen, one.accuracy_rest))
            costs = ("" if number is None else f"{number:.3f}" for number in (one.macs_seen, one.ms_seen))
            rows.append((name, *accuracies, *costs, exits))
        title = f"On {report.after.samples} labelled samples, not learnt from"
        table(title, ("", "right, classes seen", "right, the others", "cost, seen", "mean ms, seen", "left at, seen"), rows)
    audited = [
        (name, percent(drift), seen.answers, seen.differed, percent(seen.at_most) if seen.answers else "")
        for (name, drift), seen in zip(report.drift.items(), report.at_exits.values())
    ]
    table("Exits", ("exit", "drift of what learns", "audited answers", "other than the network's", "at most, at 95 %"), audited)


def happened(rows: Sequence[tuple[object, ...]]) -> None:
    """What was decided, and why."""
    table("Decided", ("updates", "what", "exit", "why"), rows)


def state_log(state: State) -> None:
    """What is in a state."""
    record = state.record
    say(
        f"{record.answers} answers, {record.updates} updates in the heads that learn, {record.trials} trials; "
        f"in use: {f'snapshot {record.current}' if record.current else 'the artifact itself'}"
        f"{'; nothing is learnt any more' if record.stopped else ''}."
    )
    rows = [(one.number, one.profile, one.updates, one.reason) for one in record.snapshots]
    table("Snapshots", ("number", "profile", "updates", "why"), rows)
    happened([(event.updates, event.what, event.exit, event.reason) for event in record.events])


def state_diff(found: Sequence[Difference], other: str) -> None:
    """How far a state is from another."""
    rows = [
        (one.exit, percent(one.in_use), percent(one.learning), *("off" if t is None else f"{t:.4f}" for t in (one.ours, one.theirs))) for one in found
    ]
    table(f"Against {other}", ("exit", "head in use", "head that learns", "threshold", "there"), rows)
