"""How long each segment takes where an artifact runs, and what any way through the network takes by that."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import SegmentTimes
from exitify.plan import FINAL, Mask, Plan, Stretch
from exitify.progress import Progress, silent
from exitify.runtime.session import Session
from exitify.targets.board import conditions

ROUNDS = 25
"""How often each is timed, in turn with the others."""
_FOR_NAMES = re.compile(r"[^A-Za-z0-9_.]+")
LEAST_SECONDS = 2e-3
"""A segment is run so often that one reading takes as long: a clock says little of microseconds."""


def measure_segments(
    artifact: Artifact, *, engine: str = "auto", threads: int = 1, rounds: int = ROUNDS, seed: int = 0, progress: Progress = silent
) -> SegmentTimes:
    """Time every segment, and the whole network without exits, batch 1, on the machine at hand.

    What is computed does not depend on the input's values, so random ones do.

    Args:
        artifact: Its heads may be untrained. engine, threads: As for `Session`. rounds: Readings; their medians count.
    """
    plan = artifact.plan
    session = Session(artifact, engine=engine, profile=NO_PROFILE, threads=threads)
    x = np.random.default_rng(seed).standard_normal((1, *plan.values[plan.input].shape)).astype(plan.values[plan.input].dtype)
    parameters = {name: np.ascontiguousarray(array) for name, array in artifact.classifiers().items()}
    parameters |= {point.temperature: np.array(1.0, np.float32) for point in plan.exits}
    alone = [Stretch((s.name,), s.inputs, s.outputs, s.parameters, FINAL, s.cost) for s in plan.segments]
    bound = session.engine.bind(alone, parameters)
    bound.set_input(x)

    def whole() -> None:
        session.run(x)

    calls: dict[str, Callable[[], None]] = {segment.name: functools.partial(bound.step, i) for i, segment in enumerate(plan.segments)}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():  # in order: each reads what those before it wrote
        call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, int(LEAST_SECONDS / max(time.perf_counter() - started, 1e-6)))
    whole()
    readings: dict[str, list[float]] = {name: [] for name in ("", *calls)}
    for i in range(rounds):
        progress("timing segments", i, rounds)
        for name, call in {"": whole, **calls}.items():
            count = repeats.get(name, 1)
            started = time.perf_counter_ns()
            for _ in range(count):
                call()
            bound.value(alone[-1].outputs[0])  # a GPU's kernels are done when somebody reads
            readings[name].append((time.perf_counter_ns() - started) / 1e6 / count)
    progress("timing segments", rounds, rounds)
    medians = {name: float(np.median(found)) for name, found in readings.items()}
    return SegmentTimes(artifact.manifest.model_id, session.engine.full_name, threads, conditions(), rounds, medians.pop(""), medians)


def name_of(times: SegmentTimes) -> str:
    """What times are called unless somebody says otherwise: `orin-nano-8gb-15W-fixed-tvm.gpu`."""
    engine, _, library = times.engine.partition(":")
    where = times.conditions
    with_what = engine + (library.removeprefix(where.board) if where.board and library.startswith(where.board) else f"-{library}" if library else "")
    parts = (where.power_mode, where.clocks, with_what, f"{times.threads}-threads" if times.threads > 1 else "")
    rest, board = (_FOR_NAMES.sub("-", text).strip("-.") for text in ("-".join(filter(None, parts)), where.board))
    return f"{board[: 63 - len(rest)].strip('-.')}-{rest}".strip("-.")  # of a long name the end tells times apart


def run_times(plan: Plan, times: SegmentTimes, enabled: Collection[str], mask: Mask) -> dict[str, float]:
    """Milliseconds of a run that ends at each of these exits, the heads tried on the way counted.

    The network's own segments take their shares of what the whole takes: joined, they take less than alone in ONNX Runtime, and with
    the session's own work more in TVM.
    """
    own = {segment.name: times.segments[segment.name] for segment in plan.segments if segment.kind != "head"}
    needed = {name for stretch in plan.stretches(()) for name in stretch.segments}
    scale = times.whole_ms / sum(own[name] for name in needed)
    total, found = 0.0, {}
    for stretch in plan.stretches(enabled, mask or None):
        for name in stretch.segments:
            segment = plan.segment(name)
            if segment.kind == "block" and segment.follows in stretch.skipped:
                continue
            total += own[name] * scale if name in own else times.segments[name]
        found[stretch.exit] = total
    return found


def shares_of_time(plan: Plan, times: SegmentTimes, mask: Mask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the whole network's time: to reach what each exit reads, no head counted, `(K + 1,)`, and of each head, `(K,)`."""
    found = run_times(plan, times, [point.name for point in plan.exits], mask)
    names = {segment.outputs[0]: segment.name for segment in plan.segments if segment.kind == "head"}
    heads = np.array([times.segments[names[point.logits]] for point in plan.exits])
    reach = np.array([found[name] for name in plan.exit_names]) - np.append(np.cumsum(heads), heads.sum())
    return reach / times.whole_ms, heads / times.whole_ms


def mean_time(plan: Plan, times: SegmentTimes, enabled: Collection[str], mask: Mask, taken: NDArray[np.integer]) -> float:
    """Mean milliseconds of runs that ended at these exits. taken: Numbers of exits in the plan's order, the network's own last."""
    found = run_times(plan, times, enabled, mask)
    of_exit = np.array([found.get(name, 0.0) for name in plan.exit_names])
    return float(of_exit[taken].mean())
