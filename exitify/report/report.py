"""Everything that a report shows, gathered from an artifact and, if they are given, labelled samples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Profile, SegmentTimes
from exitify.calibration.segment_times import measure_segments
from exitify.calibration.temperature import Reliability, reliability
from exitify.data import Samples
from exitify.errors import ExitifyError
from exitify.files import NotWritten, written_whole
from exitify.progress import Progress, silent
from exitify.report.behaviour import Behaviour, behaviour
from exitify.report.evidence import Evidence, answered, remembered
from exitify.report.front import Front, front
from exitify.runtime.policies import softmax

USUAL = "default"
"""The profile that a session takes unless it is told another."""


@dataclass(frozen=True)
class Report:
    """What an artifact is, and what it does with samples. `inspect` makes it; `save` and `save_plots` write it.

    profile_name, profile: The one that is shown; None where the artifact has none.
    evidence: What every exit says of some samples; None without samples and without a memory. The three below rest on it.
    behaviour: What the profile does with them. front: What other thresholds would. reliability: By exit, `final` among them, without a
        temperature and with it.
    times: How long segments take; None where that was not measured.
    """

    artifact: Artifact
    profile_name: str | None
    profile: Profile | None
    evidence: Evidence | None
    behaviour: Behaviour | None
    front: Front | None
    reliability: Mapping[str, tuple[Reliability, Reliability]]
    times: SegmentTimes | None

    def html(self, title: str = "") -> str:
        """One page that needs nothing beside it: no network, no script. title: What it is about; the model's source by default."""
        from exitify.report.page import render

        return render(self, title or self.artifact.manifest.model.source or "a network")

    def save(self, path: str | os.PathLike[str], title: str = "") -> Path:
        """Write the page, whole or not at all.

        Raises:
            NotWritten: the file cannot be written.
        """
        text = self.html(title)
        with written_whole(path) as stream:
            stream.write(text.encode())
        return Path(path)

    def save_plots(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each figure that there is something to show in as SVG, and as PNG of 300 dots an inch; make the folder if need be.

        Raises:
            NotWritten: a file cannot be written.
        """
        from exitify.report.figures import figures_of, saved

        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotWritten(f"cannot make the folder {place}: {error.strerror}", "choose another place") from error
        written = []
        for name, draw in figures_of(self).items():
            for kind in ("svg", "png"):
                data = saved(draw, kind)
                with written_whole(place / f"{name}.{kind}") as stream:
                    stream.write(data)
                written.append(place / f"{name}.{kind}")
        return written


def inspect(
    artifact: Artifact,
    samples: Samples | None = None,
    *,
    profile: str | None = None,
    engine: str = "auto",
    threads: int = 1,
    progress: Progress = silent,
) -> Report:
    """Gather what a report shows.

    Args:
        artifact: Its heads trained, for more than its structure.
        samples: Labelled ones, best such that the network was not trained and not calibrated on. They are answered here, and where the
            artifact has no times of segments, these are measured here. Without samples those that calibration left in the artifact serve.
        profile: Which one is shown; by default the one called `default`, else the newest.
        engine, threads: What answers and is timed, with samples.

    Raises:
        UnknownProfile: there is none of that name. ExitifyError: samples are given, and the heads are untrained.
    """
    profiles = artifact.profiles
    name = profile or (USUAL if USUAL in profiles else next(reversed(profiles), None))
    chosen = artifact.profile(name) if name is not None else None
    times = next(reversed(artifact.times.values()), None)
    evidence = None
    if samples is not None:
        if not artifact.manifest.heads_trained and artifact.plan.exits:
            raise ExitifyError("the artifact's heads are untrained, so what they say of samples means nothing", "run `exitify train` first")
        evidence = answered(artifact, samples, chosen, engine=engine, threads=threads, progress=progress)
        times = times or measure_segments(artifact, engine=engine, threads=threads, progress=progress)
    elif artifact.manifest.heads_trained:
        evidence = remembered(artifact, chosen)
    done, curve = None, None
    calibrated: dict[str, tuple[Reliability, Reliability]] = {}
    if evidence is not None:
        outputs, temperatures = evidence.outputs, evidence.temperatures
        for exit_name, logits, temperature in zip(artifact.plan.exit_names, outputs.logits, temperatures):
            with_it = softmax(logits, float(temperature))
            calibrated[exit_name] = reliability(softmax(logits), outputs.labels), reliability(with_it, outputs.labels)
        if chosen is not None:
            done = behaviour(artifact.plan, chosen, evidence, times)
        if artifact.plan.exits:
            policy = "top1" if chosen is None or chosen.policy == "temporal" else chosen.policy
            gates = [chosen.exits[point.name].gate for point in artifact.plan.exits] if chosen is not None else []
            curve = front(artifact.plan, evidence, policy, gates if all(gates) else (), times)
    return Report(artifact, name, chosen, evidence, done, curve, calibrated, times)


def pareto(cost: np.ndarray, worth: np.ndarray) -> list[int]:
    """Of points, those that no other beats in both, from the cheapest on: less cost, more worth."""
    best, found = -np.inf, []
    for i in np.lexsort((-worth, cost)):
        if worth[i] > best:
            best = float(worth[i])
            found.append(int(i))
    return found
