"""Unlabelled inputs, one after the other: what a device would see."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import InputContract
from exitify.errors import DataError, first_line
from exitify.pictures import picture_suffixes, picture_to_input

WANTED = "a folder with pictures, a .npy with inputs, or a .npz with x (file.npz#test: x_test)"


@dataclass(frozen=True)
class Stream:
    """Inputs in a fixed order. rows: Pictures' paths, or an array whose rows are inputs or pictures."""

    rows: tuple[Path, ...] | NDArray[Any]
    contract: InputContract

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> NDArray[Any]:
        """One input, as `Session.run` takes it.

        Raises:
            DataError: a picture that cannot be read.
        """
        found = self.rows[row]
        return picture_to_input(str(found), self.contract) if isinstance(found, Path) else found


def open_stream(name: str, contract: InputContract) -> Stream:
    """The inputs of that name; labels beside them are not read.

    Args:
        name: A folder with pictures, at any depth, taken in the order of their names; a `.npy` file; a `.npz` file with `x`, `file.npz#test` for
            `x_test`.

    Raises:
        DataError: there is no such thing, or nothing in it.
    """
    path, _, part = name.partition("#")
    place = Path(path)
    if place.is_dir():
        suffixes = picture_suffixes()
        found = tuple(sorted(one for one in place.rglob("*") if one.suffix.lower() in suffixes and one.is_file()))
        if not found:
            raise DataError(f"there are no pictures in {place}", f"give {WANTED}")
        return Stream(found, contract)
    if not place.is_file() or place.suffix not in (".npy", ".npz"):
        raise DataError(f"{name} is no stream", f"give {WANTED}")
    key = f"x_{part}" if part else "x"
    try:
        loaded = np.load(place, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            if key not in loaded:
                raise DataError(f"{place} has no array {key!r}", f"it has {', '.join(loaded)}")
            loaded = loaded[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read: {first_line(error)}", f"give {WANTED}") from error
    rows = np.asarray(loaded)
    if rows.ndim != len(contract.shape) + 1 or not len(rows):
        shape = ", ".join(map(str, contract.shape))
        raise DataError(f"{name} has shape {rows.shape}, and the network reads (N, {shape}), or pictures (N, H, W, C)", "see `exitify inspect`")
    return Stream(rows, contract)
