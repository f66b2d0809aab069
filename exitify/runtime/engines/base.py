"""What an engine is: it runs stretches of an artifact's segments. Everything above is engine-blind."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, parameter_values
from exitify.artifact.onnx_graph import Graph, join
from exitify.plan import Stretch, Value

ALIGNMENT = 64
"""What compiled code takes for granted of an array's address; nothing checks it."""
Array = NDArray[Any]
Parameters = Mapping[str, Array]


class Runner(Protocol):
    """One stretch, ready to run."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the stretch's outputs for its inputs and parameters, any batch size. Safe to call from many threads.

        Feature maps that only other stretches read may be in a form of the engine's own.
        """


class Bound(abc.ABC):
    """A row of stretches with buffers for one sample: for one thread, with nothing allocated between calls."""

    @abc.abstractmethod
    def set_input(self, x: Array) -> None:
        """Copy the input, `(1, *shape)`, into its buffer."""

    @abc.abstractmethod
    def set_parameters(self, parameters: Parameters) -> None:
        """Let these stand in place of those of the same names; they must not change as long as they do."""

    @abc.abstractmethod
    def step(self, index: int) -> None:
        """Run the stretch of this number; the ones before it have run."""

    @abc.abstractmethod
    def value(self, name: str) -> Array:
        """The buffer of an output, overwritten by the next run."""


class Engine(abc.ABC):
    """Runs stretches of one artifact. Stretches once prepared are kept, so switching profiles back costs nothing."""

    name: ClassVar[str]
    library = ""
    """Name of the compiled library that runs, where one does."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.artifact, self.threads = artifact, threads
        self.weights = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}

    @property
    def full_name(self) -> str:
        """What times belong to: the engine, and its library."""
        return f"{self.name}:{self.library}" if self.library else self.name

    def batches(self, stretch: Stretch) -> Sequence[int]:
        """Sizes of batches that it runs as they are, the largest first, 1 last; it divides others up. None when all are alike to it."""
        return ()

    @property
    def shares_samples(self) -> bool:
        """Whether several threads that each compute some samples of a batch are faster than one whose kernels they share."""
        return False

    def alone(self, *, always: bool = False) -> contextlib.AbstractContextManager[None]:
        """Within it the calling thread's kernels are shared with no other. always: Whether this thread never runs any others."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def prepare(self, stretch: Stretch) -> Runner:
        """Return a runner for this stretch.

        Raises:
            EngineError: the engine refuses it.
        """

    def bind(self, stretches: Sequence[Stretch], parameters: Parameters) -> Bound:
        """Return buffers and bindings for runs at batch 1 in the calling thread."""
        return _PlainBound([self.prepare(stretch) for stretch in stretches], stretches, parameters, self.artifact.plan.input)

    def joined(self, stretch: Stretch) -> tuple[bytes, dict[str, Array]]:
        """The stretch as one ONNX model, and the tensors that stand outside it by name."""
        plan = self.artifact.plan
        graphs: list[Graph] = [self.artifact.graph(name, stretch.skipped) for name in stretch.segments]
        looks: dict[str, Value] = {**plan.values, **parameter_values(plan)}
        model = join(graphs, [*stretch.inputs, *stretch.parameters], stretch.outputs, looks)
        return model, {name: self.weights[name] for graph in graphs for name in graph.external}


class _PlainBound(Bound):
    """Bindings for an engine that has none of its own."""

    def __init__(self, runners: Sequence[Runner], stretches: Sequence[Stretch], parameters: Parameters, input_name: str) -> None:
        self.runners, self.stretches, self.input_name = runners, stretches, input_name
        self.parameters = parameters
        self.values: dict[str, Array] = {}

    def set_input(self, x: Array) -> None:
        self.values = {self.input_name: np.array(x)}

    def set_parameters(self, parameters: Parameters) -> None:
        self.parameters = {**self.parameters, **parameters}

    def step(self, index: int) -> None:
        stretch = self.stretches[index]
        given = {name: self.values[name] for name in stretch.inputs}
        self.values.update(self.runners[index]({**given, **{name: self.parameters[name] for name in stretch.parameters}}))

    def value(self, name: str) -> Array:
        return self.values[name]


def aligned(shape: tuple[int, ...], dtype: str | np.dtype[Any]) -> Array:
    """An array at an address that compiled code accepts; what it holds is yet to be written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
