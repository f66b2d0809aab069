"""The page: a report as HTML that needs nothing beside it."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from exitify.artifact.manifest import Compiled
from exitify.plan import FINAL, Plan, Segment
from exitify.report import figures
from exitify.report.behaviour import Behaviour
from exitify.report.gallery import gallery
from exitify.report.report import Report

MOST_CLASSES = 24
"""Of more, half as many of those that leave first are shown, and of those that leave last."""
MOST_KERNELS = 20


@dataclass(frozen=True)
class Block:
    """A column of the picture of costs.

    kind: `trunk`, `block`, or `head`. width: Its share of the network's multiply-adds. height: Share of the samples that run it.
    exit: The number of a head's exit in the plan's order; None of other segments.
    """

    name: str
    kind: str
    width: float
    height: float
    exit: int | None


@dataclass(frozen=True)
class Row:
    """A line of the list of segments.

    kind: `trunk`, `block`, or `exit`. share: Of the network's multiply-adds. reached: Of an exit: what a run that ends there has spent, heads that
    run counted; of one that is off, what it would. ms: Alone; None where segments were not timed. is_on: Whether the profile runs it, or asks it.
    note: What a reader must know of it. asked: When an exit is taken, or why it is never.
    leaves, comes_by: Shares of the samples. right: Of those that leave there. colour: The exit's.
    """

    name: str
    kind: str
    share: float
    ms: float | None
    is_on: bool = True
    note: str = ""
    reached: float = 0.0
    asked: str = ""
    leaves: float | None = None
    comes_by: float | None = None
    right: float | None = None
    colour: str = ""


@dataclass(frozen=True)
class ClassRow:
    """Of one class: where its samples leave, what their mean answer costs, how many are right."""

    name: str
    shares: Sequence[float]
    samples: int
    macs: float
    right: float
    full_right: float


def render(report: Report, title: str) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "millions": millions, "size": size, "ms": milliseconds, "breakable": breakable}
    here = importlib.resources.files("exitify.report")
    plan = report.artifact.plan
    colours = figures.exit_colours(len(plan.exit_names))
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        style=Markup((here / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        report=report,
        artifact=report.artifact,
        manifest=report.artifact.manifest,
        plan=plan,
        profile=report.profile,
        others=[name for name in report.artifact.profiles if name != report.profile_name],
        done=report.behaviour,
        evidence=report.evidence,
        expected=expected(report),
        leaving=leaving(report),
        colours=colours,
        dark=[is_dark(colour) for colour in colours],
        blocks=blocks(report),
        rows=rows(report, colours),
        classes=classes(report) if report.behaviour is not None else [],
        present=len(figures.classes_by_cost(report)) if report.behaviour is not None else 0,
        class_name=partial(figures.class_name, report),
        gallery=gallery(report.evidence, report.behaviour) if report.evidence is not None and report.behaviour is not None else {},
        drawings=drawings(report),
        reliabilities={name: drawing(partial(figures.calibration_of, name, pair)) for name, pair in report.reliability.items()},
        tuned=[(library, figures.slowest(library.kernels, MOST_KERNELS)) for library in report.artifact.targets.values() if library.kernels],
        tuned_total=tuned_total,
        skip_only=lambda plan, number: [number == i for i in range(len(plan.skips))],
        final=FINAL,
    )


@dataclass(frozen=True)
class Expected:
    """What to expect of the profile, and of the network without exits.

    where: What that rests on, in words. drop_error: Standard error of the difference of both accuracies; None where it is not known.
    """

    accuracy: float
    full_accuracy: float
    disagreement: float
    macs: float
    drop_error: float | None
    where: str

    @property
    def drop(self) -> float:
        """By how much accuracy is below the network's, in points."""
        return (self.full_accuracy - self.accuracy) * 100


def expected(report: Report) -> Expected | None:
    """What a reader should count on: what these samples show; where they are those that thresholds were found on, what calibration promised."""
    done, evidence, profile = report.behaviour, report.evidence, report.profile
    if profile is None:
        return None
    if done is None or evidence is None or evidence.are_those_calibrated_on:
        promise = profile.promise
        where = f"as calibration estimated it on {promise.samples:,} samples"
        return Expected(promise.accuracy, promise.full_accuracy, promise.disagreement, promise.mean_macs_share, None, where)
    where = f"on the {len(evidence):,} samples given"
    return Expected(done.accuracy, done.full_accuracy, done.disagreement, done.mean_macs, done.drop_error, where)


def leaving(report: Report) -> list[str]:
    """How many samples leave at each early exit, in words; empty where that is not known."""
    if report.behaviour is None:
        return []
    return [f"{percent(share, 0)} at {name}" for name, share in zip(report.artifact.plan.exit_names[:-1], report.behaviour.shares()) if share]


def blocks(report: Report) -> list[Block]:
    """The network from left to right, as wide as what it costs and as high as how many samples run it."""
    plan = report.artifact.plan
    left, found = 1.0, []
    numbers = {plan.head(point).name: number for number, point in enumerate(plan.exits)}
    shares = dict(zip(plan.exit_names, report.behaviour.shares())) if report.behaviour is not None else {}
    for stretch in plan.stretches(enabled(report), mask_of(report)):
        for name in stretch.segments:
            segment = plan.segment(name)
            if not (segment.kind == "block" and segment.follows in stretch.skipped):
                found.append(Block(name, segment.kind, segment.cost.macs / plan.full_macs, left, numbers.get(name)))
        left -= float(shares.get(stretch.exit, 0.0))
    return found


def enabled(report: Report) -> tuple[str, ...]:
    """Exits that are asked: the profile's; without one the network's own alone."""
    return report.profile.enabled if report.profile is not None else (FINAL,)


def mask_of(report: Report) -> str | None:
    """What the profile leaves out."""
    return report.profile.skip if report.profile is not None and report.artifact.plan.skips else None


def rows(report: Report, colours: Sequence[str]) -> list[Row]:
    """Segments and exits in the order in which a run comes to them."""
    plan, done, times, mask = report.artifact.plan, report.behaviour, report.times, mask_of(report)
    heads = {plan.head(point).name: number for number, point in enumerate(plan.exits)}
    left_out = {path.name for path in plan.left_out(mask)}
    runs = {name for stretch in plan.stretches(enabled(report), mask) for name in stretch.segments}
    reach = plan.macs_at(enabled(report), mask)
    shares = done.shares() if done is not None else None
    comes_by, found = 1.0, []
    for segment in plan.segments:
        ms = times.segments[segment.name] if times is not None else None
        share, number = segment.cost.macs / plan.full_macs, heads.get(segment.name)
        if number is None:
            is_on = segment.name in runs and not (segment.kind == "block" and segment.follows in left_out)
            found.append(Row(segment.name, segment.kind, share, ms, is_on, _holds(plan, segment)))
            continue
        point = plan.exits[number]
        is_on = point.name in reach
        leaves = float(shares[number]) if shares is not None else None
        found.append(
            Row(
                point.name, "exit", share, ms, is_on, f"after {point.place}",
                (reach if is_on else plan.macs_at([point.name], mask))[point.name] / plan.full_macs,
                _asked(report, point.name, is_run=segment.name in runs), leaves, comes_by if shares is not None else None,
                _right_at(done, number), colours[number],
            )
        )  # fmt: skip
        comes_by -= leaves or 0.0
    last = len(plan.exits)
    found.append(
        Row(
            FINAL, "exit", 0.0, None, True, "the network's own answer", reach[FINAL] / plan.full_macs, "",
            float(shares[last]) if shares is not None else None, comes_by if shares is not None else None, _right_at(done, last), colours[last],
        )
    )  # fmt: skip
    return found


def _asked(report: Report, exit_name: str, *, is_run: bool) -> str:
    """When an exit is taken; or why it is never."""
    if report.profile is None:
        return "not asked without a profile"
    setting, policy = report.profile.exits[exit_name], report.profile.policy
    if not setting.enabled:
        return "off, but its head is run: a later one reads what it says" if is_run else "off: its head is not run"
    if policy in ("entropy", "renyi_entropy"):  # their scores are turned round, so that higher is surer
        return f"stops at an entropy ({policy}) of {-setting.threshold:.6g} or less"
    return f"stops at a score ({policy}) of {setting.threshold:.6g} or more"


def _holds(plan: Plan, segment: Segment) -> str:
    """What a segment of the network's own is, by the modules that the user knows."""
    if segment.kind == "block":
        path = next(path for path in plan.skips if path.name == segment.follows)
        return f"{', '.join(path.blocks)} may be left out ({path.name} of {path.stage})"
    ends = [place for value, place in (*((p.after, p.place) for p in plan.exits), (plan.output, "the network's end")) if value in segment.outputs]
    return f"up to {ends[0]}" if ends else ""


def _right_at(done: Behaviour | None, number: int) -> float | None:
    """Share of right answers among samples that leave at an exit; None where none do, or nobody knows."""
    if done is None:
        return None
    here = done.taken == number
    return float(done.right[here].mean()) if here.any() else None


def classes(report: Report) -> list[ClassRow]:
    """Classes in the order in which they leave, the middle ones left out of many."""
    done = report.behaviour
    assert done is not None
    found = []
    for label in figures.ends_of(figures.classes_by_cost(report), MOST_CLASSES):
        here = done.labels == label
        found.append(
            ClassRow(figures.class_name(report, label), [float(share) for share in done.shares(here)], int(here.sum()),
                     float(done.macs[done.taken[here]].mean()), float(done.right[here].mean()), float((done.full == done.labels)[here].mean()))
        )  # fmt: skip
    return found


def drawings(report: Report) -> Mapping[str, Markup]:
    """The figures of the page by name; exits by class and calibration have their own there."""
    return {name: drawing(draw) for name, draw in figures.figures_of(report).items() if name not in ("exits_by_class", "calibration")}


def drawing(draw: figures.Draw) -> Markup:
    """A figure as a part of the page, in the page's own colour of text."""
    text = figures.saved(draw, "svg", ink="currentColor").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(re.sub(r' id="\w+_\d+"', "", text))  # noqa: S704 - matplotlib escapes the text; its numbered ids would clash


def tuned_total(library: Compiled) -> tuple[float, float]:
    """Milliseconds that a run's searched kernels take by their default schedules, and by those chosen."""
    kernels = library.kernels.values()
    return sum(kernel.calls * kernel.default_ms for kernel in kernels), sum(kernel.calls * kernel.chosen_ms for kernel in kernels)


def is_dark(colour: str) -> bool:
    """Whether white text is read on it better than black."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, on one line."""
    return f"{share * 100:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def millions(macs: float) -> str:
    """Multiply-adds in millions, or in thousands of millions."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def milliseconds(ms: float) -> str:
    """A time, with as many digits as it is worth, on one line."""
    number, unit = (f"{ms:.2f}", "ms") if ms >= 1 else (f"{ms * 1e3:.0f}" if ms >= 0.01 else f"{ms * 1e3:.1f}", "µs")
    return f"{number}\N{NARROW NO-BREAK SPACE}{unit}"


def breakable(name: str) -> Markup:
    """A long name that a line may end within, behind each underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.1f} KiB"
