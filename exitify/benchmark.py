"""The artifact against the same network untransformed: same process, same threads, in turn, sample by sample."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Conditions
from exitify.board.power import Energy, Rail, find_rails, measure
from exitify.data import Samples
from exitify.errors import DataError, ExitifyError
from exitify.progress import Progress, silent
from exitify.runtime.engines import make_engine
from exitify.runtime.session import Session
from exitify.targets.board import conditions

AGAINST = ("onnxruntime", "tvm", "torch", "inductor")

WARM_UP = 30
"""Samples run before the clock counts."""
KEPT = 200
"""Samples in memory while energy is measured: reading others takes energy too."""


@dataclass(frozen=True)
class Timing:
    """One contender: wall-clock per sample in ms, and how often it was right.

    mean_ratio: The median over blocks of 50 samples of its mean time over the first contender's; spread: the quartiles.
    energy: Of an answer, where it was measured.
    """

    name: str
    mean_ms: float
    p50_ms: float
    p95_ms: float
    accuracy: float
    mean_ratio: float
    spread: tuple[float, float]
    energy: Energy | None = None


@dataclass(frozen=True)
class BenchReport:
    """Times of all contenders, the artifact last; and what the artifact did.

    exits: Share of the samples that left at each exit. mean_macs_share: Of the full network's multiply-adds.
    conditions: What all of it belongs to.
    """

    timings: tuple[Timing, ...]
    exits: dict[str, float]
    mean_macs_share: float
    samples: int
    threads: int
    conditions: Conditions


def bench(
    artifact: Artifact,
    samples: Samples,
    *,
    against: Sequence[str] = ("onnxruntime",),
    profile: str | None = None,
    engine: str = "auto",
    threads: int = 1,
    most: int = 1000,
    model: Any = None,
    energy: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> BenchReport:
    """Time the artifact at batch 1 against the network without exits.

    Args:
        artifact: With or without profiles.
        samples: What to answer; a random `most` of them.
        against: `onnxruntime` or `tvm` (the whole network in that engine, buffers bound once), `torch` and `inductor` (these need `model`).
        profile: See `Session`.
        engine, threads: What runs the artifact; all contenders use as many threads.
        model: The original module, for torch.
        energy: Measure what answers take from the board's supply, too.
        seed: Of the choice of samples.

    Raises:
        ExitifyError: an unknown contender, or torch without the model. NoPower: energy was asked for and cannot be read.
    """
    rails = find_rails() if energy else []
    session = Session(artifact, engine=engine, profile=profile, threads=threads)
    contenders: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {}
    for name in against:
        if name not in AGAINST:
            raise ExitifyError(f"there is no contender {name!r}", f"there are {', '.join(AGAINST)}")
        same = engine if engine.partition(":")[0] == name else name
        contenders[name] = one_graph(artifact, threads, same) if name in ("onnxruntime", "tvm") else _in_torch(model, threads, name)
    rows = np.random.default_rng(seed).permutation(len(samples))[:most]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} samples are too few to time", "give a few hundred")
    labels = samples.labels[rows]
    times = {name: np.zeros(len(rows)) for name in (*contenders, "exitify")}
    right = dict.fromkeys(times, 0)
    left: Counter[str] = Counter()
    macs = 0
    inputs = samples.inputs(rows[: min(WARM_UP, len(rows))])
    for i in range(len(inputs)):
        for answer in contenders.values():
            answer(inputs[i : i + 1])
        session.run(inputs[i : i + 1])
    for i, row in enumerate(rows):
        if i % 50 == 0:
            progress("timing", i, len(rows))
        x = samples.inputs(rows[i : i + 1])
        for name, answer in contenders.items():
            started = time.perf_counter_ns()
            logits = answer(x)
            times[name][i] = (time.perf_counter_ns() - started) / 1e6
            right[name] += int(logits.argmax()) == labels[i]
        started = time.perf_counter_ns()
        result = session.run(x)
        times["exitify"][i] = (time.perf_counter_ns() - started) / 1e6
        right["exitify"] += result.label == samples.labels[row]
        left[result.exit] += 1
        macs += result.macs
    progress("timing", len(rows), len(rows))
    first = times[next(iter(times))]
    answers: dict[str, Callable[[NDArray[Any]], object]] = {**contenders, "exitify": session.run}
    spent = _energy(answers, rails, samples.inputs(rows[:KEPT]), progress) if energy else {}
    timings = tuple(_summary(name, values, first, right[name] / len(rows), spent.get(name)) for name, values in times.items())
    exits = {name: left[name] / len(rows) for name in artifact.plan.exit_names}
    return BenchReport(timings, exits, macs / len(rows) / artifact.plan.full_macs, len(rows), threads, conditions())


def _energy(answers: Mapping[str, Callable[[Any], object]], rails: Sequence[Rail], inputs: NDArray[Any], progress: Progress) -> dict[str, Energy]:
    """What an answer of each contender takes, over the same inputs in turn."""
    progress("measuring energy", 0, 1)

    def over_inputs(answer: Callable[[Any], object]) -> Callable[[], object]:
        rows = itertools.cycle(range(len(inputs)))
        return lambda: answer(inputs[(i := next(rows)) : i + 1])

    found = measure([over_inputs(answer) for answer in answers.values()], lambda: sum(rail.watts() for rail in rails))
    progress("measuring energy", 1, 1)
    return dict(zip(answers, found))


def _summary(name: str, values: NDArray[np.float64], first: NDArray[np.float64], accuracy: float, energy: Energy | None) -> Timing:
    blocks = np.array_split(np.arange(len(values)), max(1, len(values) // 50))
    ratios = np.array([values[block].mean() / first[block].mean() for block in blocks])
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    p50, p95 = np.percentile(values, (50, 95))
    return Timing(name, float(values.mean()), float(p50), float(p95), accuracy, float(middle), (float(low), float(high)), energy)


def one_graph(artifact: Artifact, threads: int, engine: str = "auto") -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The network without exits as one ONNX graph in the same engine, buffers bound once: no decision, no session of ours."""
    (whole,) = artifact.plan.stretches(())
    bound = make_engine(engine, artifact, threads).bind([whole], {})

    def answer(given: NDArray[Any]) -> NDArray[Any]:
        bound.set_input(given)
        bound.step(0)
        return bound.value(artifact.plan.output)

    return answer


def _in_torch(model: Any, threads: int, name: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
    if model is None:
        raise ExitifyError(f"timing against {name} needs the original model", "give --model MODEL, with --weights if it needs them")
    import torch

    torch.set_num_threads(threads)
    network = model.eval()
    if name == "inductor":
        network = torch.compile(network)

    def answer(given: NDArray[Any]) -> NDArray[Any]:
        with torch.inference_mode():
            result: NDArray[Any] = network(torch.from_numpy(given)).numpy()
        return result

    return answer
