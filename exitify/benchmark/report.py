"""What a benchmark found, and the cells of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exitify.artifact.manifest import Conditions
from exitify.benchmark.noise import BLOCK
from exitify.board.power import Energy

Role = Literal["baseline", "again", "against", "smaller", "artifact"]
"""`baseline`: the untransformed network in the engine that runs the artifact; `again`: its second copy; `against`: the untransformed network in
another engine; `smaller`: another network; `artifact`: the artifact."""


LEAST_BLOCKS = 6
"""Of a round: fewer differ too little from their own median to say how far another's would be."""
QUIET = 0.05
"""Up to such a share of the processors' time, other programs are those that every machine runs."""


@dataclass(frozen=True)
class Timing:
    """One contender at batch 1. Times are in ms: of each sample in each round the shorter of two calls, so that percentiles are over samples.

    name: Unlike any other's: its engine's, `… again` for the second copy of the baseline, the file's for a smaller network, `exitify`.
    engine: What runs it, with its library or provider.
    accuracy: Share of the samples that it is right on.
    throughput: Answers a second, one after the other: of the mean time.
    ratio: Of its time to the baseline's: the median over blocks of 50 samples of the ratio of their means, and of these the median over rounds.
    interval: Of that median, at 95 %. rounds: Each round's ratio.
    noise: A share of the ratio: the same command, run again, finds a ratio between `ratio / (1 + noise)` and `ratio * (1 + noise)` in
        95 of 100 runs or more (`exitify.benchmark.noise.compare` says how that is known).
    rss_mib: Most memory resident while a process that holds nothing but this contender answers; None where it was not measured.
    energy: Of an answer, where it was measured.
    """

    name: str
    role: Role
    engine: str
    accuracy: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    throughput: float
    ratio: float
    interval: tuple[float, float]
    rounds: tuple[float, ...]
    noise: float
    rss_mib: float | None = None
    energy: Energy | None = None

    @property
    def label(self) -> str:
        """What it is, for people; its engine stands beside it."""
        return {"baseline": "untransformed", "again": "untransformed, again", "against": "untransformed"}.get(self.role, self.name)


@dataclass(frozen=True)
class BenchReport:
    """Times of all contenders, the baseline and its second copy first, the artifact last; and what the artifact did.

    exits: Share of the samples that left at each exit. mean_macs_share: Of the full network's multiply-adds.
    samples: How many were timed in each round. precision: Of all contenders but a smaller network, which has its own.
    network: What the model was called when it was transformed; empty where it came as an object. profile: In use; None takes no exit.
    conditions: What all of it belongs to. others_share: Of the processors' time that other programs took meanwhile; None where nobody says.
    versions: Of Python, exitify and each engine's library.
    """

    timings: tuple[Timing, ...]
    exits: Mapping[str, float]
    mean_macs_share: float
    samples: int
    rounds: int
    threads: int
    precision: str
    network: str
    profile: str | None
    conditions: Conditions
    others_share: float | None
    versions: Mapping[str, str]

    @property
    def baseline(self) -> Timing:
        """The untransformed network in the engine that runs the artifact."""
        return self._only("baseline")

    @property
    def again(self) -> Timing:
        """The baseline's second copy: its ratio should be 1, and what it is instead is noise."""
        return self._only("again")

    @property
    def artifact(self) -> Timing:
        """The artifact, with the profile that was asked for."""
        return self._only("artifact")

    def _only(self, role: Role) -> Timing:
        (found,) = (timing for timing in self.timings if timing.role == role)
        return found


def cells(report: BenchReport) -> tuple[list[str], list[list[str]]]:
    """The table's columns and rows, as text; memory is left out where it was not measured, intervals where a round has too few blocks for one."""
    with_memory = any(timing.rss_mib is not None for timing in report.timings)
    columns = ["", "engine", "accuracy", "mean ms", "p50 ms", "p95 ms", "answers/s", "ratio", "95 % interval", *["RSS MiB"] * with_memory]
    rows = []
    for t in report.timings:
        is_unit = t.role == "baseline"
        row = [t.label, t.engine, percent(t.accuracy, 2), f"{t.mean_ms:.3f}", f"{t.p50_ms:.3f}", f"{t.p95_ms:.3f}", f"{t.throughput:.1f}"]
        interval = f"{t.interval[0]:.3f} to {t.interval[1]:.3f}" if report.samples >= LEAST_BLOCKS * BLOCK else ""
        row += ["1", ""] if is_unit else [f"{t.ratio:.3f} ± {percent(t.noise)}", interval]
        row += ["" if t.rss_mib is None else f"{t.rss_mib:.1f}"] * with_memory
        rows.append(row)
    return columns, rows


def energy_cells(report: BenchReport) -> tuple[list[str], list[list[str]]]:
    """The same of energy; no rows where it was not measured."""
    columns = ["", "engine", "mJ above idle", "lowest to highest", "mJ in all", "W", "W idle"]
    measured = [(t, t.energy) for t in report.timings if t.energy is not None]
    rows = [
        [t.label, t.engine, f"{e.mj:.3f}", f"{e.spread[0]:.3f} to {e.spread[1]:.3f}", f"{e.total_mj:.3f}", f"{e.watts:.2f}", f"{e.idle_watts:.2f}"]
        for t, e in measured
    ]
    return columns, rows


def conditions_text(report: BenchReport) -> str:
    """How it was measured, in a line."""
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    rounds = f" in each of {report.rounds} rounds" if report.rounds > 1 else ""
    return f"{report.samples} samples{rounds}, batch 1, {threads}, {report.precision}; {report.conditions}"


def noise_text(report: BenchReport) -> str:
    """What the ratios are worth, in a line."""
    again = report.again
    few = "" if report.rounds > 1 else " One round says little of how loads differ; five say more: --rounds 5."
    return (
        "Ratios are to the untransformed network in the engine that runs the artifact; run again, one lies within its ± in 95 of 100 runs. "
        f"That network against itself, loaded twice: {again.ratio:.3f}.{few}{_others_text(report.others_share)}"
    )


def _others_text(share: float | None) -> str:
    if share is None:
        return ""
    caution = "" if share <= QUIET else ", and ratios may be others when they take less"
    return f" Meanwhile other programs took {percent(share, 0)} of the processors' time{caution}."


def exits_text(report: BenchReport) -> str:
    """Where the artifact stopped, in a line."""
    left = ", ".join(f"{name} {percent(share)}" for name, share in report.exits.items())
    return f"Left at: {left}; mean cost {report.mean_macs_share:.3f} of the network's."


def versions_text(report: BenchReport) -> str:
    """What it was measured with, in a line."""
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share * 100:.{digits}f} %"
