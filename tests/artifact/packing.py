"""Artifacts as bytes, put together by hand: what a stranger could have written."""

from __future__ import annotations

import io

from exitify.artifact import container
from exitify.artifact.artifact import MANIFEST, Artifact, parse_artifact
from exitify.records import dumps


def files_of(artifact: Artifact) -> dict[str, bytes]:
    """Every file, the manifest first."""
    return {MANIFEST: dumps(artifact.manifest), **{path: bytes(data) for path, data in artifact.files.items()}}


def packed(files: dict[str, bytes]) -> bytes:
    """The container's bytes."""
    stream = io.BytesIO()
    container.write(stream, files)
    return stream.getvalue()


def reopened(artifact: Artifact) -> Artifact:
    """The artifact written and read, with every check of reading."""
    return parse_artifact(packed(files_of(artifact)))
