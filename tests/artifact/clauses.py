"""FORMAT.md as the tests read it: each clause, and the class of the error that answers its breach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import exitify.artifact
from exitify import errors
from exitify.errors import ArtifactError

FORMAT_MD = (Path(exitify.artifact.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")

CLAUSES: dict[str, type[ArtifactError]] = {}
for table in re.findall(r"\| must hold \| otherwise \|\n\|---\|---\|\n((?:\|.*\n)+)", FORMAT_MD):
    for row in table.splitlines():
        clause, kind = (cell.strip() for cell in row.strip("|").split("|"))
        assert clause not in CLAUSES, clause
        CLAUSES[clause] = getattr(errors, kind)


@contextmanager
def refused(clause: str, match: str) -> Iterator[None]:
    """The body raises the very class that FORMAT.md names for this clause, with this in its message and a hint."""
    with pytest.raises(CLAUSES[clause], match=match) as raised:
        yield
    assert type(raised.value) is CLAUSES[clause]
    assert raised.value.hint
