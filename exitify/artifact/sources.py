"""Which weights a compiled library was computed from: their hashes, then and now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, graph_path


def source_hashes(artifact: Artifact, segments: Iterable[str]) -> dict[str, str]:
    """sha256 of each weight in the graphs of these segments, by name; what a segment takes as an argument is not among them."""
    tensors = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    every_path = {path.name for path in artifact.plan.skips}
    graphs = [artifact.graph(segment, skipped) for segment in segments for skipped in ((), every_path)]
    names = sorted({name for graph in graphs for name in graph.external})
    return {name: hashlib.sha256(tensors[name].tobytes()).hexdigest() for name in names}


def graph_hashes(artifact: Artifact, segment: str) -> tuple[str, str]:
    """sha256 of a segment's graph, and of the one with its norms' second set (empty where there is none)."""
    files = artifact.manifest.files
    second = files.get(graph_path(segment, second=True))
    return files[graph_path(segment)].sha256, second.sha256 if second else ""
