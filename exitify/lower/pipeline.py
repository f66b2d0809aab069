"""From an artifact to the same artifact with a library for one target, everything in it held against the reference engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any, Literal

from numpy.typing import NDArray
from tvm import tirx

from exitify.artifact.artifact import Artifact, check_name
from exitify.artifact.manifest import Compiled, CompiledSegment
from exitify.artifact.sources import graph_hashes, source_hashes
from exitify.artifact.tensors import write_tensors
from exitify.errors import EngineError, ExitifyError
from exitify.lower.library import Kernels, build, lower_segments, scheduled_by_default, shared_object, silent_stderr
from exitify.lower.linking import link_with, linker
from exitify.lower.processors import Machine, machine_of
from exitify.lower.tuning.database import Database, default_folder
from exitify.lower.tuning.measure import LocalRunner, Runner
from exitify.lower.tuning.search import Report, tune, unheard
from exitify.lower.tuning.space import apply
from exitify.lower.tuning.tasks import task_key, tasks_of
from exitify.lower.verify import segment_errors
from exitify.progress import Progress, silent
from exitify.targets import Target, load_target, processor

TOLERANCE = {"float32": 1e-4}
"""Most that a segment's output may differ from the reference, as a share of its magnitude."""


def compile_artifact(
    artifact: Artifact,
    target: Target,
    *,
    trials: int = 0,
    database: Database | None = None,
    runner: Runner | None = None,
    fallback: Literal["", "onnxruntime"] = "",
    progress: Progress = silent,
    report: Report | None = None,
) -> Artifact:
    """Return the artifact with a library for the target.

    Args:
        target: The board.
        trials: Candidates to measure over all kernels; those that a search of this budget has been through cost none.
        database: What was measured before, and where to add to; without one and without trials, default schedules.
        runner: Where to measure; by default a process on this machine, if that is the target.
        fallback: What runs segments that TVM cannot take; empty: they are refused.
        progress: Told of each step. report: Told of each trial.

    Raises:
        NotLowered: TVM cannot take a segment. TargetError, NoLinker: there is no way to make code for the target.
        EngineError: a compiled segment differs from the reference by more than `TOLERANCE`.
    """
    check_name("target", target.name)
    machine = machine_of(target)
    if trials and runner is None and not machine.is_here:
        raise ExitifyError(f"kernels for {machine.tuned_on} cannot be measured on this machine", "give a board: --rpc HOST:PORT/KEY")
    command = linker(machine.triple.split("-")[0], processor.architecture())
    steps = ("lowering", "compiling", "linking", "checking")

    def begin(step: str) -> None:
        progress(step, steps.index(step), len(steps))

    begin("lowering")
    with silent_stderr():
        kernels = lower_segments(artifact, artifact.plan.segments, machine, leave=bool(fallback))
    scheduled, measured = _schedules(kernels, machine, trials, database, runner, report or unheard)
    begin("compiling")
    executable = build(kernels, scheduled, machine)
    begin("linking")
    library = shared_object(executable, link_with(command))
    begin("checking")
    here = machine if machine.is_here else _stand_in(machine)
    checked = executable if machine.is_here else build(kernels, scheduled, here)
    errors: dict[str, float] = {}
    for name, error in segment_errors(artifact, kernels, checked):
        if not error <= TOLERANCE["float32"]:
            raise EngineError(
                f"the compiled segment {name!r} differs from the reference by {error:.2g} of its magnitude, more than {TOLERANCE['float32']:g}",
                "report this with the model",
            )
        errors[name] = max(error, errors.get(name, 0.0))
    progress("checking", len(steps), len(steps))
    first, second, weights = _named(kernels)
    compiled = Compiled(
        target=target.name,
        triple=machine.triple,
        cpu=machine.cpu,
        features=machine.features,
        tvm=importlib.metadata.version("apache-tvm"),
        tvm_ffi=importlib.metadata.version("apache-tvm-ffi"),
        segments={
            segment: CompiledSegment(*graph_hashes(artifact, segment), first[segment], second.get(segment, ()), errors[segment])
            for segment in kernels.weights
        },
        left_to=fallback if len(kernels.weights) < len(artifact.plan.segments) else "",
        sources=source_hashes(artifact, kernels.weights),
        tolerance=TOLERANCE,
        trials=measured,
    )
    return artifact.with_target(compiled, library, write_tensors(weights))


def _named(kernels: Kernels) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]], dict[str, NDArray[Any]]]:
    """Names of what each segment takes with its first and with its second set of norms, and all of that by name."""
    first: dict[str, tuple[str, ...]] = {}
    second: dict[str, tuple[str, ...]] = {}
    weights: dict[str, NDArray[Any]] = {}
    for segment, arrays in kernels.weights.items():
        others = kernels.second_weights.get(segment, ())
        first[segment] = tuple(f"{segment}.{i}" for i in range(len(arrays)))
        weights.update(zip(first[segment], arrays))
        if others:
            second[segment] = tuple(name if other is one else f"{name}.second" for name, one, other in zip(first[segment], arrays, others))
            weights.update(zip(second[segment], others))
    return first, second, weights


def _schedules(
    kernels: Kernels, machine: Machine, trials: int, database: Database | None, runner: Runner | None, report: Report
) -> tuple[dict[str, tirx.PrimFunc], int]:
    """Each kernel by what was chosen for it, else by default; and how many candidates were measured for them."""
    scheduled = scheduled_by_default(kernels, machine)
    if database is None and not trials:
        return scheduled, 0
    database = database or Database(default_folder())
    tasks = tasks_of(kernels, machine)
    if trials:
        measuring = runner or LocalRunner(machine)
        try:
            tune(tasks, machine, database, measuring, trials, report)
        finally:
            measuring.close()
    known = {task.key: database.read(task.key) for task in tasks}
    for name, kernel in kernels.kernels.items():
        best = known[task_key(kernel, machine)].best
        if best is not None:
            with contextlib.suppress(Exception):  # measured for schedules of another release
                scheduled[name] = apply(kernel, best, machine)
    return scheduled, sum(found.trials for found in known.values())


def _stand_in(machine: Machine) -> Machine:
    """The machine at hand, in the place of one that cannot be run here: the same kernels, by the same schedules."""
    here = machine_of(load_target("host"))
    return Machine(here.triple, here.cpu, here.attributes, here.features, here.cores, machine.vectors, here.tuned_on)
