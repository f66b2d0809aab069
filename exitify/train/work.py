"""What trainings share: names for what they keep on disk, checkpoints that are whole or not there, a number of threads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exitify.files import written_whole
from exitify.records import dumps


def name_of(settings: object) -> str:
    """The same name for the same settings, a record."""
    return hashlib.sha256(dumps(settings)).hexdigest()[:16]


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write it in place of the one before, in a folder made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as stream:
        torch.save(state, stream)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
