"""One round: everything loaded anew, checked to be the same network, and every sample answered by all contenders in turn."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import InputContract
from exitify.benchmark.contenders import Contender, InTorch, Loaded, library_versions
from exitify.benchmark.noise import BLOCK
from exitify.benchmark.worker import Tell
from exitify.errors import ExitifyError, ModelError
from exitify.pictures import pixels_to_inputs
from exitify.runtime.engines.base import Array

WARM_UP = 30
"""Samples run before the clock counts."""
TOLERANCE = 1e-3
"""Most that logits may differ by, over their largest magnitude: engines that add in another order differ by 1e-5, a wrong preprocess or
float16 by more than 1e-2."""


@dataclass(frozen=True)
class Stored:
    """Samples in a .npy file, read as they are needed: bytes of pictures that the contract makes inputs of, or ready inputs."""

    path: Path
    contract: InputContract
    are_pictures: bool

    def inputs(self, rows: slice) -> Array:
        """Rows as the network reads them, `(N, *shape)`."""
        pixels: Array = np.array(np.load(self.path, mmap_mode="r")[rows])
        return pixels_to_inputs(pixels, self.contract) if self.are_pictures else pixels


@dataclass(frozen=True)
class Race:
    """What is timed on what. It can be pickled when its contenders can.

    contenders: The first is the network in the engine that runs the artifact. labels: int64, of all samples.
    expected: Logits of the whole network for the first samples, `(N, classes)`.
    """

    contenders: tuple[Contender, ...]
    threads: int
    samples: Stored
    labels: NDArray[np.int64]
    expected: Array


@dataclass(frozen=True)
class Round:
    """What a round found.

    times: ms, `(contenders, samples)`: the shorter of two calls. right: How often each contender was.
    engines: What ran each, with its library or provider. precision: Of all of the whole network. versions: Of the engines' packages.
    """

    times: NDArray[np.float64]
    right: NDArray[np.int64]
    engines: tuple[str, ...]
    precision: str
    versions: Mapping[str, str]


def run_round(race: Race, seed: tuple[int, ...], tell: Tell) -> Round:
    """Load all contenders in random order, check them, and time them.

    Args:
        seed: Of all orders. tell: Called with how many samples are done.

    Raises:
        ModelError: a contender gives other logits than the network. ExitifyError: it computes in another precision.
    """
    rng = np.random.default_rng(seed)
    with all_loaded(race, rng) as loaded:
        _check(race, loaded)
        times, right = _time(race, loaded, rng, tell)
        engines = tuple(one.engine for one in loaded)
        return Round(times, right, engines, loaded[0].precision, library_versions(engines))


@contextlib.contextmanager
def all_loaded(race: Race, rng: np.random.Generator) -> Iterator[list[Loaded]]:
    """All contenders, loaded in random order and given back at the end."""
    loaded: dict[int, Loaded] = {}
    try:
        for i in rng.permutation(len(race.contenders)):
            loaded[int(i)] = race.contenders[i].load(race.threads)
        yield [loaded[i] for i in range(len(loaded))]
    finally:
        for one in loaded.values():
            one.close()


def _check(race: Race, loaded: Sequence[Loaded]) -> None:
    """Refuse a contender that stands for the whole network and computes something else, or in another precision."""
    inputs = race.samples.inputs(slice(len(race.expected)))
    for contender, one in zip(race.contenders, loaded):
        if contender.role not in ("baseline", "again", "against"):
            continue
        if one.precision != loaded[0].precision:
            raise ExitifyError(
                f"the artifact's library computes in {loaded[0].precision}, and {contender.name} in {one.precision}",
                f"compile it with --precision {one.precision}, or leave {contender.name} out of --against",
            )
        got = np.stack([np.array(one.logits(one.run(inputs[i : i + 1]))).reshape(-1) for i in range(len(inputs))])
        gap = difference(got, race.expected)
        if not gap <= TOLERANCE:
            raise ModelError(
                f"{contender.name} is not the artifact's network: on {len(inputs)} samples its logits differ by {gap:.2g} of the largest, "
                f"more than {TOLERANCE:g}",
                "give the model that was transformed: --model MODEL" if isinstance(contender, InTorch) else "report this with the model",
            )


def difference(got: Array, expected: Array) -> float:
    """The largest difference over the largest magnitude expected; infinite for other shapes, NaN where something is."""
    if got.shape != expected.shape:
        return math.inf
    return float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def _time(race: Race, loaded: Sequence[Loaded], rng: np.random.Generator, tell: Tell) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    warm = race.samples.inputs(slice(WARM_UP))
    for i, one in itertools.product(range(len(warm)), loaded):
        one.run(warm[i : i + 1])
    count = len(race.labels)
    times, right = np.zeros((len(loaded), count)), np.zeros(len(loaded), np.int64)
    with _no_collection():
        for i, label in enumerate(race.labels):
            if i % BLOCK == 0:
                tell(i)
            x = race.samples.inputs(slice(i, i + 1))
            for k in rng.permutation(len(loaded)):
                run = loaded[k].run
                started = time.perf_counter_ns()
                run(x)
                between = time.perf_counter_ns()
                result = run(x)
                ended = time.perf_counter_ns()
                times[k, i] = min(between - started, ended - between) / 1e6
                right[k] += int(np.argmax(loaded[k].logits(result)) == label)
    tell(count)
    return times, right


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection, which in a process with torch takes many answers' time and hits one contender."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
