"""Labelled samples: folders of pictures, arrays, loaders."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import InputContract
from exitify.errors import DataError, ExitifyError, one_line
from exitify.imports import current_directory_importable, import_object, place_of
from exitify.pictures import array_pixels, picture_pixels, picture_suffixes, pixels_to_inputs, refuse_other_pictures, resized_size, steps_of
from exitify.plan import Value

log = logging.getLogger(__name__)

Rows: TypeAlias = "Sequence[int] | NDArray[Any] | slice"

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
WANTED = "a folder with one sub-folder a class, a .npz with x and y, or package.module:loader"


class _Source(Protocol):
    """Where the rows of a set come from."""

    def pixels(self, rows: NDArray[np.int64], contract: InputContract) -> NDArray[Any]: ...

    def feed(self, update: Callable[[bytes], None], rows: NDArray[np.int64]) -> None: ...


@dataclass(frozen=True)
class _Array:
    """Rows in memory: bytes are pictures, anything else is ready."""

    x: NDArray[Any]

    def pixels(self, rows: NDArray[np.int64], contract: InputContract) -> NDArray[Any]:
        x = self.x[rows]
        return array_pixels(x, contract) if x.dtype == np.uint8 else x

    def feed(self, update: Callable[[bytes], None], rows: NDArray[np.int64]) -> None:
        update(f"array {self.x.dtype.str} {self.x.shape[1:]}\n".encode())
        for start in range(0, len(rows), 256):
            update(np.ascontiguousarray(self.x[rows[start : start + 256]]).tobytes())


@dataclass(frozen=True)
class _Folder:
    """Rows that stay files until they are asked for."""

    root: Path
    paths: tuple[Path, ...]

    def pixels(self, rows: NDArray[np.int64], contract: InputContract) -> NDArray[Any]:
        paths = [self.paths[row] for row in rows]
        if len(paths) < 2:
            decoded = [picture_pixels(path, contract) for path in paths]
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                decoded = list(pool.map(lambda path: picture_pixels(path, contract), paths))
        for path, picture in zip(paths, decoded):
            if (picture.shape[2], *picture.shape[:2]) != contract.shape:
                raise DataError(
                    f"{path} becomes {picture.shape[0]}x{picture.shape[1]}, and the network reads {contract.shape[1]}x{contract.shape[2]}",
                    f"a preprocess with crop={contract.shape[1]}x{contract.shape[2]} cuts every picture to size",
                )
        return np.stack(decoded) if decoded else np.zeros((0, *contract.shape[1:], contract.shape[0]), np.uint8)

    def feed(self, update: Callable[[bytes], None], rows: NDArray[np.int64]) -> None:
        update(b"folder\n")
        for row in rows:
            path = self.paths[row]
            with path.open("rb") as file:
                update(f"{path.relative_to(self.root).as_posix()}\0{os.fstat(file.fileno()).st_size}\n".encode())
                while chunk := file.read(1 << 20):
                    update(chunk)


class Samples:
    """A labelled set: `len(samples)` rows, each one input and the class it belongs to.

    Pictures in a folder are decoded when asked for, eight at a time; arrays are held in memory. `load_samples` makes it.

    Attributes:
        labels: int64 `(N,)`, each in `[0, len(classes))`.
        classes: Names of the network's classes, in the order of its scores.
        contract: What the inputs are made for.
    """

    def __init__(
        self, source: _Source, labels: NDArray[np.int64], classes: Sequence[str], contract: InputContract, rows: NDArray[np.int64] | None = None
    ) -> None:
        self._source = source
        self._rows = np.arange(len(labels), dtype=np.int64) if rows is None else rows
        self._identity = ""
        self.labels = labels
        self.classes = tuple(classes)
        self.contract = contract

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"<{len(self)} samples of {len(np.unique(self.labels))} classes>"

    @property
    def are_pictures(self) -> bool:
        """Whether `pixels` gives bytes, which can be augmented, and not ready inputs."""
        return isinstance(self._source, _Folder) or (isinstance(self._source, _Array) and self._source.x.dtype == np.uint8)

    def pixels(self, rows: Rows) -> NDArray[Any]:
        """Return pictures as bytes `(N, H, W, C)` after colour, resize and crop; ready inputs as they are.

        Raises:
            DataError: a picture cannot be read (the message names it), or does not come out as the network wants it.
        """
        return self._source.pixels(self._pick(rows), self.contract)

    def inputs(self, rows: Rows) -> NDArray[Any]:
        """Return rows as the network reads them: `(N, *contract.shape)` in `contract.dtype`, float32 for pictures.

        Raises:
            DataError: as `pixels`.
        """
        pixels = self.pixels(rows)
        return pixels_to_inputs(pixels, self.contract) if self.are_pictures else pixels

    def batches(self, size: int) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Yield `(inputs, labels)` in order, `size` rows at a time, the last batch smaller."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield self.inputs(rows), self.labels[rows]

    def subset(self, rows: Rows) -> Samples:
        """Return these rows, in this order, as a set of its own; the pictures are shared."""
        picked = np.atleast_1d(np.arange(len(self))[rows])
        return Samples(self._source, self.labels[picked], self.classes, self.contract, self._rows[picked])

    def identity(self) -> str:
        """Return the sha256 of order, labels and pictures: of a folder its file names, sizes and bytes, wherever it lies."""
        if not self._identity:
            digest = hashlib.sha256(f"{len(self)} samples\n".encode())
            digest.update(self.labels.astype("<i8").tobytes())
            self._source.feed(digest.update, self._rows)
            self._identity = digest.hexdigest()
        return self._identity

    def _pick(self, rows: Rows) -> NDArray[np.int64]:
        return np.atleast_1d(self._rows[rows])


def rows_at_once(value: Value) -> int:
    """How many samples to run at once over a whole set: so many that their inputs fill 16 MiB, between 8 and 250.

    What a network holds of one sample is some tens of times its input.
    """
    return max(8, min(250, 16 * 2**20 // max(value.size_bytes, 1)))


def load_samples(name: str, contract: InputContract, *, classes: int, least_classes: int = 2) -> Samples:
    """Return the labelled set that `name` stands for.

    Args:
        name: A folder with one sub-folder a class; a `.npz` with `x` and `y`, or `file.npz#test` for `x_test` and `y_test`;
            or `package.module:loader`, called without arguments, that returns arrays `(x, y)` or batches of them (torch's
            tensors and loaders will do). Bytes `(N, H, W, C)` are pictures, floats are ready inputs.
            Sub-folders named like the contract's classes stand for those; others are taken in sorted order.
        contract: What the network reads.
        classes: How many classes the network tells apart.
        least_classes: How many of them must occur.

    Raises:
        DataError: nothing is there or it is empty, a label or a shape is not the network's, a number is not finite, there are
            more sub-folders than classes, or pictures are given and the contract has no preprocess.
    """
    contract.check()
    if contract.classes and len(contract.classes) != classes:
        raise DataError(
            f"the input contract names {len(contract.classes)} classes, and the network has {classes}", "give as many names as class scores"
        )
    path, marker, part = name.rpartition("#")
    if not marker or not path.endswith(".npz"):
        path, part = name, ""
    place = Path(path)
    if place.is_dir():
        samples = _from_folder(place, contract, classes)
    elif place.suffix == ".npz":
        samples = _from_npz(place, part, contract, classes)
    elif ":" in name and not place.exists():
        samples = _from_loader(name, contract, classes)
    elif place.exists():
        raise DataError(f"{name} is no set of samples", f"give {WANTED}")
    else:
        raise DataError(f"there is no {name}", f"give {WANTED}; relative paths start in the current directory")
    present = np.unique(samples.labels)
    if len(present) < least_classes:
        shown = ", ".join(repr(samples.classes[label]) for label in present)
        raise DataError(f"{name} holds samples of {len(present)} class ({shown})", f"at least {least_classes} classes must occur")
    return samples


def _names(contract: InputContract, classes: int, found: Sequence[str] = ()) -> tuple[str, ...]:
    return contract.classes or (*found, *map(str, range(len(found), classes)))


def _from_folder(root: Path, contract: InputContract, classes: int) -> Samples:
    steps_of(contract)
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{root} has no sub-folders", "put the pictures of each class into a sub-folder of its own")
    if set(folders) <= SPLITS and not set(folders) & set(contract.classes):
        raise DataError(f"{root} holds {' and '.join(folders)}, which are splits and not classes", f"give one of them: {root / folders[-1]}")
    labels_of = _folder_labels(root, folders, contract, classes)
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        found = _pictures_in(root / folder)
        if not found:
            raise DataError(f"{root / folder} holds no pictures", f"remove it, or fill it; pictures end in {', '.join(sorted(picture_suffixes()))}")
        paths += found
        labels += [labels_of[folder]] * len(found)
    names = _names(contract, classes, folders)
    return Samples(_Folder(root, tuple(paths)), np.asarray(labels, np.int64), names, contract)


def _folder_labels(root: Path, folders: list[str], contract: InputContract, classes: int) -> dict[str, int]:
    if len(folders) > classes:
        raise DataError(f"{root} has {len(folders)} sub-folders, and the network {classes} classes", "give one sub-folder a class and nothing else")
    unknown = [folder for folder in folders if folder not in contract.classes]
    if contract.classes and len(unknown) < len(folders):
        if unknown:
            close = difflib.get_close_matches(unknown[0], contract.classes, 1)
            raise DataError(
                f"the sub-folder {root / unknown[0]} is named like no class, while {len(folders) - len(unknown)} others are",
                f"did you mean {close[0]!r}?" if close else "rename it, or give its pictures to a class of the network",
            )
        double = [folder for folder in folders if contract.classes.count(folder) > 1]
        if double:
            raise DataError(f"the network has more than one class named {double[0]!r}", "give the samples as a .npz with numbers")
        return {folder: contract.classes.index(folder) for folder in folders}
    if len(folders) < classes and contract.classes:
        raise DataError(
            f"none of the {len(folders)} sub-folders of {root} ({folders[0]}, …) is named like one of the {classes} classes",
            f"name them like the classes: {', '.join(contract.classes[:3])}, …",
        )
    if len(folders) < classes:
        log.warning("%s has %d sub-folders and the network %d classes: they are taken as its first %d", root, len(folders), classes, len(folders))
    if all(folder.isdecimal() for folder in folders) and folders != sorted(folders, key=int):
        log.warning("the sub-folders of %s are taken in the order of their letters: %s, …", root, ", ".join(folders[:3]))
    return {folder: number for number, folder in enumerate(folders)}


def _pictures_in(folder: Path) -> list[Path]:
    found = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in picture_suffixes()]
    return sorted(found)


def _from_npz(path: Path, part: str, contract: InputContract, classes: int) -> Samples:
    x_name, y_name = (f"x_{part}", f"y_{part}") if part else ("x", "y")
    if not path.is_file():
        raise DataError(f"there is no {path}", f"give {WANTED}; relative paths start in the current directory")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file", "save it with numpy.savez(path, x=…, y=…)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            if x_name not in names or y_name not in names:
                parts = sorted(name[2:] for name in names if name.startswith("x_") and f"y_{name[2:]}" in names)
                ways = " or ".join(f"{path.name}#{name}" for name in parts)
                raise DataError(
                    f"{path} has no {x_name} and {y_name}; it has {', '.join(names) or 'nothing'}",
                    f"give {ways}" if ways else "save it with numpy.savez(path, x=…, y=…)",
                )
            x, y = arrays[x_name], arrays[y_name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise DataError(
            f"{path} cannot be read: {one_line(error)}", "save it with numpy.savez(path, x=…, y=…), x and y being plain arrays of numbers"
        ) from error
    return _from_arrays(x, y, str(path), contract, classes)


def _from_loader(name: str, contract: InputContract, classes: int) -> Samples:
    with current_directory_importable():
        loader = import_object(name, DataError)
        if not callable(loader):
            raise DataError(
                f"{name} is a {type(loader).__name__}, not a function", "give a function without arguments that returns (x, y), or batches of them"
            )
        try:
            x, y = _collect(loader(), name)
        except ExitifyError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{name} fails{place_of(error)}: {one_line(error)}", "it is called without arguments, and returns (x, y), or batches of them"
            ) from error
    return _from_arrays(x, y, name, contract, classes)


def _collect(result: Any, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """One x and one y from what a loader returned: a pair of arrays, or pairs of batches, or pairs of single samples."""
    if isinstance(result, (tuple, list)) and len(result) == 2 and all(hasattr(part, "shape") for part in result):
        return _as_array(result[0]), _as_array(result[1])
    xs: list[NDArray[Any]] = []
    ys: list[NDArray[Any]] = []
    for batch in result:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{name} yields a {type(batch).__name__}, not (x, y)", "return (x, y) as two arrays, or batches of such pairs")
        x, y = map(_as_array, batch)
        xs.append(x[None] if y.ndim == 0 else x)
        ys.append(np.atleast_1d(y))
    if not xs:
        raise DataError(f"{name} yields nothing", "return (x, y) as two arrays, or batches of such pairs")
    if len({(x.shape[1:], x.dtype) for x in xs}) > 1:
        shapes = ", ".join(sorted({f"{x.dtype} {x.shape[1:]}" for x in xs})[:3])
        raise DataError(f"{name} yields inputs of different shapes or types: {shapes}", "resize and crop them to one size")
    return np.concatenate(xs), np.concatenate(ys)


def _as_array(values: Any) -> NDArray[Any]:
    """A numpy array; a torch tensor gives its own."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _from_arrays(x: NDArray[Any], y: NDArray[Any], name: str, contract: InputContract, classes: int) -> Samples:
    if x.ndim < 2 or len(x) == 0:
        raise DataError(
            f"x in {name} has the shape {x.shape}, which is no set of inputs", f"give x of shape (N, {', '.join(map(str, contract.shape))})"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"y in {name} is {y.dtype} of shape {y.shape}, not one class number a row", "give integers of shape (N,); one-hot labels: y.argmax(1)"
        )
    if len(x) != len(y):
        raise DataError(f"{name} has {len(x)} rows in x and {len(y)} in y", "give one label an input")
    outside = np.flatnonzero((y < 0) | (y >= classes))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"row {row} of {name} has the label {y[row]}, outside 0 … {classes - 1}", f"the network has {classes} classes, counted from 0"
        )
    ready = _checked_pictures(x, name, contract) if x.dtype == np.uint8 and contract.dtype != "uint8" else _checked_inputs(x, name, contract)
    return Samples(_Array(ready), y.astype(np.int64), _names(contract, classes), contract)


def _checked_pictures(x: NDArray[Any], name: str, contract: InputContract) -> NDArray[np.uint8]:
    steps = steps_of(contract)
    refuse_other_pictures(x)
    size = steps.crop or resized_size((x.shape[1], x.shape[2]), steps.resize)
    if size != contract.shape[1:]:
        raise DataError(
            f"the pictures in {name} become {size[0]}x{size[1]}, and the network reads {contract.shape[1]}x{contract.shape[2]}",
            f"a preprocess with crop={contract.shape[1]}x{contract.shape[2]} cuts every picture to size",
        )
    return cast("NDArray[np.uint8]", x)


def _checked_inputs(x: NDArray[Any], name: str, contract: InputContract) -> NDArray[Any]:
    wanted = np.dtype(contract.dtype)
    if x.dtype.kind != wanted.kind and not (x.dtype.kind in "iu" and wanted.kind in "iu"):
        raise DataError(
            f"x in {name} is {x.dtype}, and the network reads {wanted}",
            "give pictures as uint8 (N, height, width, channels), or ready inputs as float32",
        )
    if x.shape[1:] != contract.shape:
        raise DataError(
            f"the inputs in {name} have the shape {x.shape[1:]}, and the network reads {contract.shape}",
            "float arrays are taken as ready: channels first",
        )
    with np.errstate(over="ignore"):
        ready = x.astype(wanted, copy=False)
    for start in range(0, len(ready) if wanted.kind == "f" else 0, 256):
        part = ready[start : start + 256]
        finite = np.isfinite(part).reshape(len(part), -1).all(1)
        if not finite.all():
            raise DataError(f"row {start + int(np.argmin(finite))} of {name} holds NaN or infinity", "clean the inputs first")
    return ready
