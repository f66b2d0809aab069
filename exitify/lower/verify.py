"""Compiled segments against the reference engine, one by one, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from exitify.artifact.artifact import HEADS_FILE, Artifact, parameter_values
from exitify.lower.library import Kernels
from exitify.plan import Segment, Stretch
from exitify.runtime.engines import make_engine

Arrays = dict[str, NDArray[Any]]


def segment_errors(artifact: Artifact, kernels: Kernels, executable: relax.VMExecutable) -> Iterator[tuple[str, float]]:
    """Yield each compiled segment's name and error: the largest difference of an output from the reference, over that output's magnitude.

    The network's input is random, of the kind that normalised pictures are; each segment reads what the reference computed before it.
    """
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for segment, given, expected in _reference(artifact):
        if segment.name not in kernels.weights:
            continue
        found = machine[segment.name](*(_tensor(array) for array in (*given, *kernels.weights[segment.name])))
        outputs = [found] if len(segment.outputs) == 1 else list(found)
        # NumPy's largest: where one is not a number, Python's may be another.
        yield segment.name, float(np.max([_difference(output.numpy(), array) for output, array in zip(outputs, expected)]))


def _reference(artifact: Artifact) -> Iterator[tuple[Segment, Sequence[NDArray[Any]], Sequence[NDArray[Any]]]]:
    """Each segment with its inputs and outputs as the reference computes them."""
    plan = artifact.plan
    engine = make_engine("reference", artifact, 1)
    random = np.random.default_rng(0)
    value = plan.values[plan.input]
    values: Arrays = {plan.input: random.standard_normal((1, *value.shape)).astype(value.dtype)}
    heads = artifact.tensors(HEADS_FILE)
    values.update({name: heads.get(name, np.ones(look.shape, look.dtype)) for name, look in parameter_values(plan).items()})
    for segment in plan.segments:
        stretch = Stretch((segment.name,), segment.inputs, segment.outputs, segment.parameters, "", segment.cost)
        names = (*segment.inputs, *segment.parameters)
        found = engine.prepare(stretch)({name: values[name] for name in names})
        values.update(found)
        yield segment, [values[name] for name in names], [found[name] for name in segment.outputs]


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / max(largest, 1e-6)


def _tensor(array: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.array(array, order="C"))
