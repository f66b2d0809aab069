"""From an artifact to the same artifact with a library for one target, everything in it held against the reference engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from numpy.typing import NDArray
from tvm import relax, tirx

from exitify.artifact.artifact import Artifact, check_name
from exitify.artifact.manifest import Compiled, CompiledSegment, GpuKernels, Precision, TunedKernel, target_name
from exitify.artifact.sources import graph_hashes, source_hashes
from exitify.artifact.tensors import write_tensors
from exitify.errors import EngineError, ExitifyError, LibraryRefused
from exitify.lower.graphics import GpuMachine, build_for_gpu, gpu_machine_of
from exitify.lower.library import Kernels, build, lower_segments, scheduled_by_default, shared_object, silent_stderr
from exitify.lower.linking import link_with, linker
from exitify.lower.nvrtc import Compiler, compiler_for
from exitify.lower.processors import Machine, machine_of
from exitify.lower.tuning.database import Choice, Database, Known, choice_text, default_folder
from exitify.lower.tuning.measure import LocalRunner, Runner
from exitify.lower.tuning.search import Report, tune, unheard
from exitify.lower.tuning.space import apply
from exitify.lower.tuning.tasks import calls_of, task_key, tasks_of
from exitify.lower.verify import engine_errors, segment_errors
from exitify.progress import Progress, silent
from exitify.runtime.engines import make_engine
from exitify.runtime.engines.cuda import NoGpu, gpu_at_hand
from exitify.targets import Target, TargetError, load_jetpack, load_target, processor

log = logging.getLogger(__name__)

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2}
"""Most that a segment's output may differ from the reference, as a share of its magnitude."""

Device = Literal["cpu", "gpu"]


def compile_artifact(
    artifact: Artifact,
    target: Target,
    *,
    device: Device = "cpu",
    precision: Precision = "fp32",
    architecture: str = "",
    jetpack: str = "",
    batches: Sequence[int] = (),
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
        device: Its processor or its GPU.
        precision: `fp16` multiplies float16 where weights are known, see `exitify.lower.precision`.
        architecture: Of the GPU, `sm_90`, where the target is whatever GPU there is.
        jetpack: Release on the board whose driver loads the GPU's kernels; by default the board's oldest, whose code newer ones load too.
        batches: Sizes of batches beside 1 that get code of their own, over the same weights; others run in parts.
        trials: Candidates to measure over all kernels; those that a search of this budget has been through cost none.
        database: What was measured before, and where to add to; without one and without trials, default schedules.
        runner: Where to measure; by default a process on this machine, if that is the target.
        fallback: What runs segments that TVM cannot take; empty: they are refused.
        progress: Told of each step. report: Told of each trial.

    Raises:
        NotLowered: TVM cannot take a segment. TargetError, NoLinker, NoCompiler: there is no way to make code for the target.
        EngineError: a compiled segment differs from the reference by more than `TOLERANCE`.
    """
    name = target_name(target.name, on_gpu=device == "gpu", precision=precision)
    check_name("target", name)
    if list(batches) != sorted(set(batches)) or min(batches, default=2) < 2:
        raise ExitifyError(f"batches of {', '.join(map(str, batches))} cannot be compiled for", "give sizes from 2 in ascending order: --batch 4,16")
    machine, command, compiler = tools_for(target, device, architecture, jetpack)
    host = machine.host
    if trials and runner is None and not machine.is_here:
        raise ExitifyError(f"kernels for {machine.tuned_on} cannot be measured on this machine", "give a board: --rpc HOST:PORT/KEY")
    steps = ("lowering", "compiling", "linking", "checking")

    def begin(step: str) -> None:
        progress(step, steps.index(step), len(steps))

    begin("lowering")
    with silent_stderr():
        kernels = lower_segments(artifact, artifact.plan.segments, machine, precision=precision, batches=batches, leave=bool(fallback))
    scheduled, measured, tuned = _schedules(kernels, machine, trials, database, runner, report or unheard)
    begin("compiling")
    made, code = None, None
    if isinstance(machine, GpuMachine):
        assert compiler is not None
        executable, mark, code = build_for_gpu(kernels, scheduled, machine, compiler)
        made = GpuKernels(machine.architecture, code.ptx_version, code.compiler, mark)
    else:
        executable = build(kernels, scheduled, machine)
    begin("linking")
    library = shared_object(executable, link_with(command))
    begin("checking")
    checked = executable if device == "cpu" and machine.is_here else _stand_in(kernels, scheduled, machine)
    errors: dict[str, float] = {}
    for segment, error in segment_errors(artifact, kernels, checked):
        _tolerate(segment, error, precision)
        errors[segment] = max(error, errors.get(segment, 0.0))
    progress("checking", len(steps), len(steps))
    first, second, weights = _named(kernels)
    compiled = Compiled(
        target=name,
        board=target.name,
        triple=host.triple,
        cpu=host.cpu,
        features=host.features,
        gpu=made,
        precision=precision,
        tvm=importlib.metadata.version("apache-tvm"),
        tvm_ffi=importlib.metadata.version("apache-tvm-ffi"),
        segments={
            segment: CompiledSegment(
                *graph_hashes(artifact, segment), first[segment], second.get(segment, ()), kernels.in_batches.get(segment, ()), errors[segment]
            )
            for segment in kernels.weights
        },
        left_to=fallback if len(kernels.weights) < len(artifact.plan.segments) else "",
        in_blocks=tuple(sorted(kernels.in_blocks)),
        block=kernels.block,
        sources=source_hashes(artifact, kernels.weights),
        tolerance=TOLERANCE[precision],
        trials=measured,
        kernels=tuned,
    )
    made_artifact = artifact.with_target(compiled, library, write_tensors(weights), (code.cubin, code.ptx) if code is not None else None)
    if device == "gpu" and machine.is_here:
        _check_here(made_artifact, kernels, name, precision)
    return made_artifact


def tools_for(target: Target, device: Device, architecture: str = "", jetpack: str = "") -> tuple[Machine | GpuMachine, list[str], Compiler | None]:
    """What code is made for, and what makes it: the command that links, and for a GPU NVRTC.

    Raises:
        TargetError, NoLinker, NoCompiler: there is no way to make code for the target.
    """
    driver = driver_of(target, jetpack) if device == "gpu" else ""
    machine = gpu_machine_of(target, architecture, driver) if device == "gpu" else machine_of(target)
    command = linker(machine.host.architecture, processor.architecture())
    return machine, command, compiler_for(driver) if device == "gpu" else None


def _check_here(artifact: Artifact, kernels: Kernels, name: str, precision: Precision) -> None:
    """Hold a library for the GPU at hand against the reference, as it runs there.

    Raises:
        EngineError: a segment differs by more than `TOLERANCE`.
    """
    try:
        engine = make_engine(f"tvm:{name}", artifact, 1)
    except LibraryRefused as refusal:  # TVM's CUDA runtime may be missing here and not where the artifact goes
        log.warning("the library is not checked on this GPU: %s", refusal.problem)
        return
    for segment, error in engine_errors(artifact, kernels, engine):
        _tolerate(segment, error, precision, "on this GPU ")


def _tolerate(segment: str, error: float, precision: Precision, where: str = "") -> None:
    if not error <= TOLERANCE[precision]:
        raise EngineError(
            f"the compiled segment {segment!r} {where}differs from the reference by {error:.2g} of its magnitude, more than {TOLERANCE[precision]:g}",
            "report this with the model" if precision == "fp32" else "compile it with --precision fp32",
        )


def driver_of(target: Target, jetpack: str = "") -> str:
    """The CUDA version of the driver that will load a target's kernels; empty where that is not known.

    Raises:
        TargetError: the board does not run that JetPack, or there is none of that name.
    """
    if target.jetpacks:
        if jetpack and jetpack not in target.jetpacks:
            load_jetpack(jetpack)
            raise TargetError(f"the target {target.name!r} does not run JetPack {jetpack}", f"it runs {', '.join(target.jetpacks)}")
        return load_jetpack(jetpack or target.jetpacks[0]).cuda
    if jetpack:
        raise TargetError(f"the target {target.name!r} is no board with JetPack", "leave --jetpack out")
    try:
        return gpu_at_hand().driver
    except NoGpu:
        return ""


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
    kernels: Kernels, machine: Machine | GpuMachine, trials: int, database: Database | None, runner: Runner | None, report: Report
) -> tuple[dict[str, tirx.PrimFunc], int, dict[str, TunedKernel]]:
    """Each kernel by what was chosen for it, else by default; how many candidates were measured for them; and what was found for each."""
    scheduled = scheduled_by_default(kernels, machine)
    if database is None and not trials:
        return scheduled, 0, {}
    database = database or Database(default_folder())
    tasks = tasks_of(kernels, machine)
    if trials:
        measuring = runner or LocalRunner(machine)
        try:
            tune(tasks, machine, database, measuring, trials, report)
        finally:
            measuring.close()
    known = {task.key: database.read(task.key) for task in tasks}
    calls: Counter[str] = Counter()
    applied: dict[str, Choice | None] = {}
    in_a_run = calls_of(kernels.module, kernels.weights)
    for name, kernel in kernels.kernels.items():
        key = task_key(kernel, machine)
        calls[key] += in_a_run[name]
        best = known[key].best
        if best is not None:
            with contextlib.suppress(Exception):  # measured for schedules of another release
                scheduled[name] = apply(kernel, best, machine)
                applied[key] = best
    tuned = {task.name: found for task in tasks if (found := _found(known[task.key], calls[task.key], applied.get(task.key))) is not None}
    return scheduled, sum(found.trials for found in known.values()), tuned


def _found(known: Known, calls: int, chosen: Choice | None) -> TunedKernel | None:
    """What the database holds of a kernel, for people; None where its default did not run, or no run of one sample calls it."""
    default = known.seconds.get(choice_text(None), math.inf)
    if not math.isfinite(default) or not calls:
        return None
    history = [(1, default * 1e3)]  # measured first, though on several boards at once others may be done before it
    others = (seconds for text, seconds in known.seconds.items() if text != choice_text(None))
    for trial, seconds in enumerate(others, 2):
        if seconds * 1e3 < history[-1][1]:
            history.append((trial, seconds * 1e3))
    # Where folders of several machines were put together, a later reading of the chosen one may be outside of what it was chosen by.
    chosen_ms = min(max(known.seconds.get(choice_text(chosen), default) * 1e3, history[-1][1]), history[0][1])
    return TunedKernel(calls, known.trials, tuple(history), chosen_ms)


def _stand_in(kernels: Kernels, scheduled: Mapping[str, tirx.PrimFunc], machine: Machine | GpuMachine) -> relax.VMExecutable:
    """Kernels for a machine that is not here, built for the one at hand: by the same schedules, if it is a processor too."""
    here = machine_of(load_target("host"))
    return build(kernels, scheduled if isinstance(machine, Machine) else scheduled_by_default(kernels, here), here)
