"""What an artifact remembers of the samples that it was calibrated on: numbers inside the network, so that a device that learns from a few
classes can see what becomes of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.container import Buffer
from exitify.artifact.tensors import read_tensors, write_tensors
from exitify.errors import MalformedManifest
from exitify.plan import Plan

MEMORY_FILE = "memory.safetensors"
LEAST_ROWS_BYTES = 2**21
SHARE_OF_WEIGHTS = 0.04
"""A memory has at most this share of the weights' bytes, or `LEAST_ROWS_BYTES` where that is more."""
_AGAIN = "calibrate again: `exitify calibrate`"
_MODEL, _LABELS, _LOGITS = "model_id", "labels", "final.logits"


@dataclass(frozen=True)
class Memory:
    """Samples as the network sees them, nothing left out and no exit taken.

    features: What each early exit's classifier reads, `(N, width)`, float16. logits: The network's own, `(N, classes)`, float16.
    labels: `(N,)`, int32.
    """

    features: Mapping[str, NDArray[np.float16]]
    logits: NDArray[np.float16]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.intp]) -> Memory:
        """The same of these samples only."""
        return Memory({name: array[rows] for name, array in self.features.items()}, self.logits[rows], self.labels[rows])


def remember(features: Mapping[str, NDArray[np.float16]], logits: NDArray[np.float32], labels: NDArray[np.int64], weights: int) -> Memory:
    """A memory of these samples, as many as may be: from every class alike, one after the other.

    Args:
        features, logits, labels: As `Memory` has them. weights: Bytes of the network's weights.
    """
    a_row = sum(array[:1].nbytes for array in features.values()) + 2 * logits.shape[1] + 4
    count = min(len(labels), max(1, int(max(LEAST_ROWS_BYTES, SHARE_OF_WEIGHTS * weights)) // a_row))
    turn = np.zeros(len(labels), np.intp)  # the how-manieth of its class a sample is
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    rows = np.sort(np.argsort(turn, kind="stable")[:count])
    finite = np.isfinite(logits[rows]).all(axis=1)
    rows = rows[finite]
    largest = np.finfo(np.float16).max
    return Memory(
        {name: np.clip(array[rows], -largest, largest).astype(np.float16) for name, array in features.items()},
        np.clip(logits[rows], -largest, largest).astype(np.float16),
        labels[rows].astype(np.int32),
    )


def write_memory(memory: Memory, model_id: str) -> bytes:
    """A memory as a file, for the network of this identity."""
    identity = np.frombuffer(bytes.fromhex(model_id), np.uint8)
    features = {f"{name}.z": array for name, array in memory.features.items()}
    return write_tensors({**features, _LOGITS: memory.logits, _LABELS: memory.labels, _MODEL: identity})


def read_memory(data: Buffer, plan: Plan, model_id: str) -> Memory:
    """A memory, checked.

    Raises:
        MalformedManifest: it is another network's, or not what FORMAT.md says.
    """
    tensors = read_tensors(memoryview(data), MEMORY_FILE)
    count = len(tensors[_LABELS]) if _LABELS in tensors and tensors[_LABELS].ndim == 1 else 0
    looks = {
        **{f"{point.name}.z": (np.dtype(np.float16), (count, point.head.features)) for point in plan.exits},
        _LOGITS: (np.dtype(np.float16), (count, plan.classes)),
        _LABELS: (np.dtype(np.int32), (count,)),
        _MODEL: (np.dtype(np.uint8), (32,)),
    }
    if {name: (array.dtype, array.shape) for name, array in tensors.items()} != looks or not count:
        raise MalformedManifest(f"{MEMORY_FILE} does not hold the tensors that this network's memory has", _AGAIN)
    if bytes(tensors[_MODEL].tobytes()).hex() != model_id:
        raise MalformedManifest(f"{MEMORY_FILE} was made for another network", _AGAIN)
    labels = tensors[_LABELS]
    numbers = [array for name, array in tensors.items() if name not in (_MODEL, _LABELS)]
    if labels.min() < 0 or labels.max() >= plan.classes or not all(np.isfinite(array).all() for array in numbers):
        raise MalformedManifest(f"{MEMORY_FILE} holds a label that is no class, or a number that is not finite", _AGAIN)
    features = {point.name: cast(NDArray[np.float16], tensors[f"{point.name}.z"]) for point in plan.exits}
    return Memory(features, cast(NDArray[np.float16], tensors[_LOGITS]), cast(NDArray[np.int32], labels))
