"""Which weights a compiled library was computed from: their hashes, then and now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact


def source_hashes(artifact: Artifact, segments: Iterable[str]) -> dict[str, str]:
    """sha256 of each weight in the graphs of these segments, by name; what a segment takes as an argument is not among them."""
    tensors = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    names = sorted({name for segment in segments for name in artifact.graph(segment).external})
    return {name: hashlib.sha256(tensors[name].tobytes()).hexdigest() for name in names}
