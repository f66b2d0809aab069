"""The artifact against the same network untransformed: same samples, same threads, in one process, in turn, sample by sample."""

from __future__ import annotations

import itertools
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.benchmark.contenders import AGAINST, Contender, InOpenVino, InTorch, OneGraph, WithExits, engine_kind
from exitify.benchmark.memory import rss_alone
from exitify.benchmark.neighbours import now, others_share
from exitify.benchmark.noise import BLOCK, balanced_order, compare
from exitify.benchmark.report import BenchReport, Timing
from exitify.benchmark.rounds import WARM_UP, Race, Round, Stored, all_loaded, run_round
from exitify.benchmark.smaller import smaller_network
from exitify.benchmark.worker import NotHandedOver, call_alone
from exitify.board.power import Energy, find_rails, measure
from exitify.data import Samples
from exitify.errors import DataError, ExitifyError
from exitify.progress import Progress, silent
from exitify.runtime.engines.base import Array
from exitify.runtime.session import Session
from exitify.targets.board import conditions
from exitify.version import __version__

log = logging.getLogger(__name__)

SAMPLES, ROUNDS = 500, 5
"""By default; see `exitify.benchmark.noise.compare` for what rounds bring."""
KEPT = 200
"""Samples in memory while energy is measured: reading others takes energy too."""


def bench(
    artifact: Artifact,
    samples: Samples,
    *,
    against: Sequence[str] = ("onnxruntime",),
    smaller: str | Path | None = None,
    profile: str | None = None,
    engine: str = "auto",
    threads: int = 1,
    most: int = SAMPLES,
    rounds: int = ROUNDS,
    model: Any = None,
    memory: bool = True,
    energy: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> BenchReport:
    """Time the artifact at batch 1 against the network without exits, with a noise that a repeated run keeps to.

    The untransformed network in the engine that runs the artifact is always among the contenders, twice: the first is what all ratios are to,
    the second shows what no difference looks like. Each round is a process of its own, in which all are loaded in another order and elsewhere in
    memory, and checked to give the network's logits; then each sample is answered by all of them, in an order of its own. Each answers it twice
    in a row, and the shorter call counts: the second finds caches and threads as when the contender answers alone, whoever else is compared, and
    what the operating system gives to other programs would have to interrupt both.

    Args:
        artifact: With or without profiles.
        samples: What to answer; a random `most` of them, the same in each round.
        against: `onnxruntime` or `tvm` (the whole network as one graph), `openvino` (the same from an ONNX file), `torch` and `inductor`
            (these need `model`). The one that runs the artifact is there anyhow.
        smaller: An ONNX file of another static network with the same input and classes, to be run in ONNX Runtime.
        profile: See `Session`.
        engine, threads: What runs the artifact; all contenders use as many threads.
        rounds: How often all is loaded and timed; the time grows with them, and the noise shrinks.
        model: The original module, for torch. If its class cannot be imported by another process, all rounds are in this one, with a warning:
            they then differ less than runs do.
        memory: Measure each contender's memory, too, in a process of its own (`exitify.benchmark.memory.rss_alone`).
        energy: Measure what answers take from the board's supply, too.
        seed: Of the choice of samples, and of all orders.

    Raises:
        ExitifyError: an unknown contender; torch without the model; another precision than the artifact's library. ModelError: a contender
            gives other logits than the network, or the smaller network does not fit. EngineError: an engine refuses. DataError: too few
            samples. ModuleNotFoundError: a contender's package is missing. NoPower: energy was asked for and cannot be read.
    """
    for name in against:
        if name not in AGAINST:
            raise ExitifyError(f"there is no contender {name!r}", f"there are {', '.join(AGAINST)}")
        if name in ("torch", "inductor") and model is None:
            raise ExitifyError(f"timing against {name} needs the original model", "give --model MODEL, with --weights if it needs them")
    if rounds < 1:
        raise DataError(f"{rounds} rounds measure nothing", "give 5")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(samples))[:most]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} samples are too few to time", "give a few hundred")
    rails = find_rails() if energy else []
    with tempfile.TemporaryDirectory(prefix="exitify-bench-") as folder:
        contenders = _contenders(artifact, Path(folder), against, smaller, profile, engine, model)
        session = Session(artifact, engine=engine, profile=profile, threads=threads)
        in_use = session.profile_name
        answered = _answers(session, samples, rows, progress)
        rows = rows[balanced_order(np.array([macs for _, macs in answered]), rng)]
        session.use(NO_PROFILE)
        expected = np.stack([session.run(x).logits for x in samples.inputs(rows[:WARM_UP])])
        del session
        race = Race(tuple(contenders), threads, _stored(samples, rows, Path(folder)), samples.labels[rows], expected)
        before = now()
        found = _rounds(race, rounds, seed, progress)
        others = others_share(before, now())
        spent = _energy(race, lambda: sum(rail.watts() for rail in rails), progress) if energy else [None] * len(contenders)
        resident = _memory(race, progress) if memory else [None] * len(contenders)
    times = np.stack([one.times for one in found], 1)
    accuracy = sum(one.right for one in found) / times[0].size
    left = Counter(name for name, _ in answered)
    return BenchReport(
        timings=tuple(
            _timing(contender, found[0].engines[i], times[[i, 0, 1]], float(accuracy[i]), resident[i], spent[i])
            for i, contender in enumerate(contenders)
        ),
        exits={name: left[name] / len(rows) for name in artifact.plan.exit_names},
        mean_macs_share=sum(macs for _, macs in answered) / len(rows) / artifact.plan.full_macs,
        samples=len(rows),
        rounds=rounds,
        threads=threads,
        precision=found[0].precision,
        network=artifact.manifest.model.source,
        profile=in_use,
        conditions=conditions(),
        others_share=others,
        versions={"exitify": __version__, "Python": platform.python_version(), **found[0].versions},
    )


def _answers(session: Session, samples: Samples, rows: NDArray[np.int64], progress: Progress) -> list[tuple[str, int]]:
    """Where the artifact leaves, and what that costs in multiply-adds."""
    found = []
    for i, row in enumerate(rows):
        if i % BLOCK == 0:
            progress("answering", i, len(rows))
        answer = session.run(samples.inputs([row])[0])
        found.append((answer.exit, answer.macs))
    progress("answering", len(rows), len(rows))
    return found


def _stored(samples: Samples, rows: NDArray[np.int64], folder: Path) -> Stored:
    """These samples in the folder, decoded once for all rounds."""
    first = samples.pixels(rows[:1])
    stored = np.lib.format.open_memmap(folder / "samples.npy", "w+", first.dtype, (len(rows), *first.shape[1:]))
    for start in range(0, len(rows), BLOCK):
        stored[start : start + BLOCK] = samples.pixels(rows[start : start + BLOCK])
    stored.flush()
    return Stored(folder / "samples.npy", samples.contract, samples.are_pictures)


def _contenders(
    artifact: Artifact,
    folder: Path,
    against: Sequence[str],
    smaller: str | Path | None,
    profile: str | None,
    engine: str,
    model: Any,
) -> list[Contender]:
    """Everything that is timed, in the report's order; what several processes open is written to the folder."""
    stored = artifact.save(folder / "net.exitify")
    ours = engine_kind(engine)
    found: list[Contender] = [OneGraph(ours, "baseline", stored, engine), OneGraph(f"{ours} again", "again", stored, engine)]
    for name in dict.fromkeys(against):
        if name == ours:
            continue
        if name in ("onnxruntime", "tvm"):
            found.append(OneGraph(name, "against", stored, name))
        elif name == "openvino":
            found.append(InOpenVino(name, "against", _whole_as_onnx(artifact, folder)))
        else:
            found.append(InTorch(name, "against", model, artifact.plan.classes, name == "inductor"))
    if smaller is not None:
        found.append(smaller_network(Path(smaller), artifact.manifest.input, artifact.plan.classes))
    return [*found, WithExits("exitify", "artifact", stored, engine, profile)]


def _whole_as_onnx(artifact: Artifact, folder: Path) -> Path:
    from exitify.onnx_export.static import export_static

    path = folder / "whole.onnx"
    path.write_bytes(export_static(artifact).SerializeToString())
    return path


def _rounds(race: Race, rounds: int, seed: int, progress: Progress) -> list[Round]:
    """Every round, each in a process of its own if the contenders can go there."""
    total, found, is_alone = rounds * len(race.labels), [], True
    for number in range(rounds):
        tell = partial(_tell, progress, number * len(race.labels), total)
        if is_alone:
            try:
                found.append(call_alone(run_round, race, (seed, number), tell=tell))
                continue
            except NotHandedOver as refusal:
                log.warning("rounds run in this process, and differ less than runs do, since the model cannot go to another: %s", refusal.problem)
                is_alone = False
        found.append(run_round(race, (seed, number), tell))
    return found


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress("timing", before + done, total)


def _energy(race: Race, watts: Callable[[], float], progress: Progress) -> list[Energy]:
    """What an answer of each contender takes, over the same inputs in turn."""
    progress("measuring energy", 0, 1)
    inputs = race.samples.inputs(slice(KEPT))

    def over_inputs(answer: Callable[[Array], object]) -> Callable[[], object]:
        rows = itertools.cycle(range(len(inputs)))
        return lambda: answer(inputs[(i := next(rows)) : i + 1])

    with all_loaded(race, np.random.default_rng(0)) as loaded:
        found = measure([over_inputs(one.run) for one in loaded], watts)
    progress("measuring energy", 1, 1)
    return found


def _memory(race: Race, progress: Progress) -> list[float | None]:
    """Each contender's memory; the baseline's second copy is the baseline."""
    found: list[float | None] = []
    inputs = race.samples.inputs(slice(WARM_UP))
    for i, contender in enumerate(race.contenders):
        progress("measuring memory", i, len(race.contenders))
        try:
            found.append(found[0] if contender.role == "again" else rss_alone(contender, race.threads, inputs))
        except NotHandedOver as refusal:
            log.warning("the memory of %s is not measured, since the model cannot go to another process: %s", contender.name, refusal.problem)
            found.append(None)
    progress("measuring memory", len(race.contenders), len(race.contenders))
    return found


def _timing(contender: Contender, engine: str, times: NDArray[np.float64], accuracy: float, rss_mib: float | None, energy: Energy | None) -> Timing:
    """A contender's row. times: Its own, the baseline's and those of the baseline's second copy, `(3, rounds, samples)`."""
    own, baseline, again = times
    mean = float(own.mean())
    p50, p95 = np.percentile(own, (50, 95))
    found = compare(own, baseline, again)
    return Timing(
        name=contender.name,
        role=contender.role,
        engine=engine,
        accuracy=accuracy,
        mean_ms=mean,
        p50_ms=float(p50),
        p95_ms=float(p95),
        throughput=1e3 / mean,
        ratio=found.ratio,
        interval=found.interval,
        rounds=found.rounds,
        noise=0.0 if contender.role == "baseline" else found.noise,
        rss_mib=rss_mib,
        energy=energy,
    )
