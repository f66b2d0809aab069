"""Revisions by content: what an artifact's revision is called follows from its bytes, so that whoever asks for one can check it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from exitify.errors import AlteredFile

FILE = "net.exitify"
"""What the artifact is called in a repository."""
BY_CONTENT = re.compile(r"sha256-[0-9a-f]{64}")


def revision_of(path: Path) -> str:
    """`sha256-` and the file's sha256, all of it: of a part of it, whoever publishes could find two files."""
    return f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}"


def check_revision(path: Path, revision: str, place: str) -> None:
    """Hold a file against the revision that it was asked for at, where that says what is in it; a branch or a commit does not.

    Raises:
        AlteredFile: the file is another one.
    """
    if BY_CONTENT.fullmatch(revision) and revision_of(path) != revision:
        raise AlteredFile(f"{place} holds {revision_of(path)}, not {revision}", "the tag or folder was changed: ask whoever published it")
