"""From an artifact to the same artifact with a library for one target, everything in it held against the reference engine."""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from exitify.artifact.artifact import Artifact, graph_path
from exitify.artifact.manifest import Compiled, CompiledSegment
from exitify.artifact.sources import source_hashes
from exitify.artifact.tensors import write_tensors
from exitify.errors import EngineError
from exitify.lower.library import build, lower_segments, scheduled_by_default, shared_object
from exitify.lower.linking import link_with, linker
from exitify.lower.processors import Machine, machine_of
from exitify.lower.verify import segment_errors
from exitify.progress import Progress, silent
from exitify.targets import Target, load_target, processor

TOLERANCE = {"float32": 1e-4}
"""Most that a segment's output may differ from the reference, as a share of its magnitude."""


def compile_artifact(
    artifact: Artifact,
    target: Target,
    *,
    fallback: Literal["", "onnxruntime"] = "",
    progress: Progress = silent,
) -> Artifact:
    """Return the artifact with a library for the target.

    Args:
        target: The board.
        fallback: What runs segments that TVM cannot take; empty: they are refused.
        progress: Told of each step.

    Raises:
        NotLowered: TVM cannot take a segment. TargetError, NoLinker: there is no way to make code for the target.
        EngineError: a compiled segment differs from the reference by more than `TOLERANCE`.
    """
    machine = machine_of(target)
    command = linker(machine.triple.split("-")[0], processor.architecture())
    steps = ("lowering", "compiling", "linking", "checking")

    def report(step: str) -> None:
        progress(step, steps.index(step), len(steps))

    report("lowering")
    kernels = lower_segments(artifact, artifact.plan.segments, machine, leave=bool(fallback))
    scheduled = scheduled_by_default(kernels, machine)
    report("compiling")
    executable = build(kernels, scheduled, machine)
    report("linking")
    library = shared_object(executable, link_with(command))
    report("checking")
    here = machine if machine.is_here else _stand_in(machine)
    checked = executable if machine.is_here else build(kernels, scheduled, here)
    errors = {}
    for name, error in segment_errors(artifact, kernels, checked):
        if not error <= TOLERANCE["float32"]:
            raise EngineError(
                f"the compiled segment {name!r} differs from the reference by {error:.2g} of its magnitude, more than {TOLERANCE['float32']:g}",
                "report this with the model",
            )
        errors[name] = error
    progress("checking", len(steps), len(steps))
    names = {segment: tuple(f"{segment}.{i}" for i in range(len(weights))) for segment, weights in kernels.weights.items()}
    compiled = Compiled(
        target=target.name,
        triple=machine.triple,
        cpu=machine.cpu,
        features=machine.features,
        tvm=importlib.metadata.version("apache-tvm"),
        tvm_ffi=importlib.metadata.version("apache-tvm-ffi"),
        segments={
            segment: CompiledSegment(artifact.manifest.files[graph_path(segment)].sha256, names[segment], errors[segment])
            for segment in kernels.weights
        },
        left_to=fallback if len(kernels.weights) < len(artifact.plan.segments) else "",
        sources=source_hashes(artifact, kernels.weights),
        tolerance=TOLERANCE,
        trials=0,
    )
    weights = {name: array for segment, arrays in kernels.weights.items() for name, array in zip(names[segment], arrays)}
    return artifact.with_target(compiled, library, write_tensors(weights))


def _stand_in(machine: Machine) -> Machine:
    """The machine at hand, in the place of one that cannot be run here: the same kernels, by the same schedules."""
    here = machine_of(load_target("host"))
    return Machine(here.triple, here.cpu, here.attributes, here.features, here.cores, machine.vectors, here.tuned_on)
