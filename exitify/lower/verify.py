"""Compiled segments against the reference engine, one by one, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from exitify.artifact.artifact import HEADS_FILE, Artifact, parameter_values
from exitify.artifact.manifest import name_of
from exitify.lower.library import Kernels
from exitify.plan import Segment, Stretch
from exitify.runtime.engines import make_engine
from exitify.runtime.engines.base import Engine
from exitify.runtime.engines.blocks import in_blocks

Array = NDArray[Any]

SAMPLES = 3
"""So many are different in batches that are checked; those behind them are the same again."""


def segment_errors(artifact: Artifact, kernels: Kernels, executable: relax.VMExecutable) -> Iterator[tuple[str, float]]:
    """Yield each compiled segment's name and error, once a set of norms.

    An error is the largest difference of an output from the reference, over that output's magnitude.

    The network's input is random, of the kind that normalised pictures are; each segment reads what the reference computed before it.
    """
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for segment, weights, given, expected, _ in _reference(artifact, kernels, SAMPLES if kernels.in_batches else 1):
        for batch in (1, *kernels.in_batches.get(segment.name, ())):
            rows = np.arange(batch) % SAMPLES
            inputs = [_form(name, array[rows], kernels) for name, array in zip(segment.inputs, given)]
            found = machine[name_of(segment.name, batch)](*(_tensor(array) for array in (*inputs, *given[len(inputs) :], *weights)))
            outputs = [found] if len(segment.outputs) == 1 else list(found)
            wanted = [_form(name, array[rows], kernels) for name, array in zip(segment.outputs, expected)]
            # NumPy's largest: where one is not a number, Python's may be another.
            yield segment.name, float(np.max([_difference(output.numpy(), array) for output, array in zip(outputs, wanted)]))


def engine_errors(artifact: Artifact, kernels: Kernels, engine: Engine) -> Iterator[tuple[str, float]]:
    """The same of segments as an engine runs them."""
    for segment, _, given, expected, stretch in _reference(artifact, kernels):
        found = engine.prepare(stretch)(dict(zip((*segment.inputs, *segment.parameters), given)))
        yield segment.name, float(np.max([_difference(found[name], array) for name, array in zip(segment.outputs, expected)]))


def _reference(
    artifact: Artifact, kernels: Kernels, samples: int = 1
) -> Iterator[tuple[Segment, Sequence[Array], Sequence[Array], Sequence[Array], Stretch]]:
    """Each compiled segment, once a set of norms: its weights, its inputs and outputs as the reference computes them, and as what it runs."""
    plan = artifact.plan
    engine = make_engine("reference", artifact, 1)
    random = np.random.default_rng(0)
    value = plan.values[plan.input]
    values: dict[str, Array] = {plan.input: random.standard_normal((samples, *value.shape)).astype(value.dtype)}
    heads = artifact.tensors(HEADS_FILE)
    values.update({name: heads.get(name, np.ones(look.shape, look.dtype)) for name, look in parameter_values(plan).items()})
    for segment in plan.segments:
        stretch = Stretch((segment.name,), segment.inputs, segment.outputs, segment.parameters, "", segment.cost)
        given = {name: values[name] for name in (*segment.inputs, *segment.parameters)}
        found = engine.prepare(stretch)(given)
        values.update(found)
        if segment.name in kernels.weights:
            yield segment, kernels.weights[segment.name], list(given.values()), [found[name] for name in segment.outputs], stretch
        if segment.name in kernels.second_weights:
            second = replace(stretch, skipped=(segment.follows,))
            found = engine.prepare(second)(given)
            yield segment, kernels.second_weights[segment.name], list(given.values()), [found[name] for name in segment.outputs], second


def _form(name: str, array: Array, kernels: Kernels) -> Array:
    """A value as functions take and give it."""
    return in_blocks(array, kernels.block) if name in kernels.in_blocks else array


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / max(largest, 1e-6)


def _tensor(array: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.array(array, order="C"))
