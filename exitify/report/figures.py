"""The figures, by matplotlib: for the page, and for papers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from exitify.calibration.segment_times import run_times
from exitify.report.behaviour import exit_accuracy
from exitify.report.report import pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from exitify.artifact.manifest import MaskTable, TunedKernel
    from exitify.calibration.temperature import Reliability
    from exitify.report.report import Report

INK = "#010203"
"""Of text and axes. No other thing has it, so that a page can put its own in its place."""
GREY, ACCENT, SECOND = "#8a8f98", "#c2410c", "#2563eb"
WIDE, SQUARE = (4.6, 3.2), (2.5, 2.5)
"""Inches. Narrow enough that their text can be read on a phone, where a page is as wide as one of them."""
MOST_KERNELS, MOST_CLASSES = 8, 30

STYLE: Any = {  # matplotlib types every key
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "exitify",  # the same figure is the same file
    "text.parse_math": False,  # names come from strangers' files
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a8f9855",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}

Draw = Callable[[], Figure]


def exit_colours(count: int) -> list[str]:
    """One for each exit, the network's own last: from light to dark, told apart without colour vision too."""
    shades = mpl.colormaps["viridis"](np.linspace(0.92, 0.1, max(count, 2)))
    return [mpl.colors.to_hex(shade) for shade in shades[-count:]]


def saved(draw: Draw, kind: str, *, ink: str = "") -> bytes:
    """A figure as a file.

    Args:
        kind: `svg` or `png`. ink: In an SVG, the colour of text and axes: `currentColor` takes that of the page around it.
    """
    stream = io.BytesIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes in a PNG; a page has its own fonts
        mpl.rcdefaults()  # nothing of the user's: the same figure is the same file
        mpl.rcParams.update(STYLE)
        figure = draw()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(stream, format=kind, dpi=300, bbox_inches="tight", transparent=kind == "svg", metadata=metadata)
    data = stream.getvalue()
    return data.replace(INK.encode(), ink.encode()) if ink else data


def figures_of(report: Report) -> dict[str, Draw]:
    """What there is to draw for a report, by the file's name."""
    found: dict[str, Draw] = {}
    if report.front is not None:
        found["accuracy_by_cost"] = partial(accuracy_by_cost, report)
    if report.behaviour is not None and report.evidence is not None:
        found["exits_by_class"] = partial(exits_by_class, report)
    if report.reliability:
        found["calibration"] = partial(calibration, report.reliability)
    masks = report.artifact.masks
    if masks is not None and len(masks.masks) > 1:
        found["masks"] = partial(accuracy_by_mask, masks)
    for name, compiled in report.artifact.targets.items():
        if slowest(compiled.kernels):
            found[f"tuning_{name}"] = partial(tuning, compiled.kernels)
    return found


def _figure(size: tuple[float, float] = WIDE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def accuracy_by_cost(report: Report) -> Figure:
    """What a mean answer costs, and how often it is right: other thresholds, the profile's, one exit for all, the whole network."""
    assert report.front is not None
    assert report.evidence is not None
    curve, times = report.front, report.times
    figure, axes = _figure()
    cost = curve.macs if curve.ms is None else curve.ms
    steps = pareto(cost, curve.accuracy)
    axes.fill_between(cost[steps], (curve.accuracy - curve.error)[steps], (curve.accuracy + curve.error)[steps], color=SECOND, alpha=0.15, lw=0)
    axes.plot(cost[steps], curve.accuracy[steps], color=SECOND, lw=1.6, label="exits, other thresholds (± 1 s. e.)")
    alone = exit_accuracy(report.evidence.outputs)
    whole = float((report.evidence.outputs.full.argmax(axis=1) == report.evidence.outputs.labels).mean())
    single = _one_exit_costs(report)
    axes.plot(single[:-1], alone[:-1], "o", color=GREY, mfc="none", ms=5, label="everything at one exit")
    axes.plot([1.0 if times is None else times.whole_ms], [whole], "s", color=INK, ms=6, label="the network without exits")
    done, right_ones = report.behaviour, [whole]
    if done is not None:
        # The samples that thresholds were found on flatter them: there the loss that calibration estimated stands for theirs.
        promise = report.profile.promise if report.profile is not None and report.evidence.are_those_calibrated_on else None
        accuracy = done.accuracy if promise is None else whole - (promise.full_accuracy - promise.accuracy)
        macs = done.mean_macs if promise is None else promise.mean_macs_share
        at = macs if done.ms is None else done.mean_ms()
        axes.plot([at], [accuracy], "*", color=ACCENT, ms=13, mec="white", mew=0.7, label=f"profile {report.profile_name}", zorder=5)
        right_ones.append(accuracy)
    lowest = max(min(float(curve.accuracy[steps].min()), *right_ones), min(right_ones) - 0.12)
    top = max(float((curve.accuracy + curve.error)[steps].max()), *right_ones)
    axes.set_ylim(lowest - 0.1 * (top - lowest) - 0.001, top + 0.12 * (top - lowest) + 0.001)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if top - lowest < 0.1 else 0))
    axes.set_ylabel("right answers")
    if times is None:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("mean cost, of the network's multiply-adds")
    else:
        axes.set_xlabel(f"mean time of an answer in ms ({times.engine}, {_threads(times.threads)})")
    axes.legend(loc="best", fontsize=8)
    return figure


def _one_exit_costs(report: Report) -> np.ndarray:
    """What it costs to answer everything at one exit, `(K + 1,)`, in the unit of the curve."""
    assert report.evidence is not None
    plan, mask = report.artifact.plan, report.evidence.outputs.mask
    if report.times is None:
        return np.array([plan.macs_at([name], mask or None)[name] / plan.full_macs for name in plan.exit_names])
    return np.array([run_times(plan, report.times, [name], mask)[name] for name in plan.exit_names])


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def exits_by_class(report: Report) -> Figure:
    """Where samples leave, all together and of each class, those that leave late last."""
    assert report.behaviour is not None
    assert report.evidence is not None
    done, plan = report.behaviour, report.artifact.plan
    shown = ends_of(classes_by_cost(report), MOST_CLASSES)
    rows = [done.shares(), *(done.shares(done.labels == label) for label in shown)]
    names = ["all", *(class_name(report, label) for label in shown)]
    figure, axes = _figure((WIDE[0], 0.9 + 0.24 * len(rows)))
    left = np.zeros(len(rows))
    for k, (exit_name, colour) in enumerate(zip(plan.exit_names, exit_colours(len(plan.exit_names)))):
        widths = np.array([row[k] for row in rows])
        if widths.any():
            axes.barh(np.arange(len(rows)), widths, left=left, color=colour, label=exit_name, height=0.82)
        left += widths
    axes.set_yticks(np.arange(len(rows)), [name[:24] for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("of the samples")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1 + 0.55 / (0.24 * len(rows) + 0.3)), ncols=min(7, len(plan.exit_names)), fontsize=8,
                handlelength=1, columnspacing=1)  # fmt: skip
    return figure


def classes_by_cost(report: Report) -> list[int]:
    """Classes that occur, those whose answers cost least first."""
    done = report.behaviour
    assert done is not None
    present = [int(label) for label in np.unique(done.labels)]
    return sorted(present, key=lambda label: float(done.macs[done.taken[done.labels == label]].mean()))


def ends_of(order: list[int], most: int) -> list[int]:
    """All of a few; of many the first and the last, half of `most` each."""
    return order if len(order) <= most else [*order[: most // 2], *order[-(most // 2) :]]


def class_name(report: Report, label: int) -> str:
    """What the network, or else the samples, call a class."""
    samples = report.evidence.samples if report.evidence is not None else None
    names = report.artifact.manifest.input.classes or (samples.classes if samples is not None else ())
    return names[label] if label < len(names) else str(label)


def calibration(found: Mapping[str, tuple[Reliability, Reliability]]) -> Figure:
    """How often each exit is right where it is so sure, without its temperature and with it."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(SQUARE[0] * columns, SQUARE[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (name, pair) in enumerate(found.items()):
        _reliability(figure.add_subplot(rows, columns, i + 1), name, pair)
    return figure


def calibration_of(name: str, pair: tuple[Reliability, Reliability]) -> Figure:
    """The same of one exit."""
    figure, axes = _figure(SQUARE)
    _reliability(axes, name, pair)
    return figure


def _reliability(axes: Axes, name: str, pair: tuple[Reliability, Reliability]) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls="--")
    for one, colour, mark, label in ((pair[0], GREY, "o", "T = 1"), (pair[1], ACCENT, "o", "with T")):
        axes.plot(one.confidence, one.accuracy, color=colour, marker=mark, ms=3, lw=1.2, label=f"{label}: ECE {one.error:.3f}")
    axes.set_title(name, fontsize=9)
    lowest = min(0.9, *(float(min(one.confidence.min(), one.accuracy.min())) for one in pair))
    axes.set_xlim(max(lowest - 0.03, 0), 1.01)
    axes.set_ylim(max(lowest - 0.03, 0), 1.01)
    axes.set_xlabel("probability")
    axes.set_ylabel("share right")
    axes.legend(loc="best", fontsize=7, handlelength=1.2)


def accuracy_by_mask(masks: MaskTable) -> Figure:
    """What each mask gives and costs; those on the line are beaten by none in both."""
    figure, axes = _figure()
    names = list(masks.masks)
    ms = np.array([masks.masks[name].ms for name in names])
    accuracy = np.array([masks.masks[name].accuracy for name in names])
    best = pareto(ms, accuracy)
    axes.plot(ms, accuracy, "o", color=GREY, mfc="none", ms=5, label="a mask")
    axes.plot(ms[best], accuracy[best], "o-", color=SECOND, ms=5, lw=1.4, label="no other is faster and better")
    for i in best if len(best) <= 8 else [best[0], best[len(best) // 2], best[-1]]:
        axes.annotate(names[i], (ms[i], accuracy[i]), textcoords="offset points", xytext=(5, -10), fontsize=7)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("right answers")
    axes.set_xlabel(f"ms an answer ({masks.engine}, {_threads(masks.threads)})")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def slowest(kernels: Mapping[str, TunedKernel], most: int = MOST_KERNELS) -> Sequence[tuple[str, TunedKernel]]:
    """Of the kernels that leave a choice, those that take most of a run by their default schedules."""
    searched = [(name, kernel) for name, kernel in kernels.items() if kernel.trials > 1]
    return sorted(searched, key=lambda item: -item[1].calls * item[1].default_ms)[:most]


def tuning(kernels: Mapping[str, TunedKernel]) -> Figure:
    """How the best schedule so far of each kernel came down with trials, from its default's time."""
    figure, axes = _figure()
    shown = slowest(kernels)
    colours = mpl.colormaps["viridis"](np.linspace(0.1, 0.85, len(shown)))
    for (name, kernel), colour in zip(shown, colours):
        trials = [at for at, _ in kernel.history] + [kernel.trials]
        times = [ms / kernel.default_ms for _, ms in kernel.history] + [kernel.history[-1][1] / kernel.default_ms]
        axes.step(trials, times, where="post", color=colour, lw=1.3, label=name[:34])
    axes.set_xlabel("candidates measured")
    axes.set_ylabel("of the default schedule's time")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(top=1.02)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7, handlelength=1.2)
    return figure
