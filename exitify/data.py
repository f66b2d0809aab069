"""Pictures and labelled samples: from files to what the network reads, with numpy and Pillow alone."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import logging
import math
import os
import re
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from exitify.artifact.manifest import InputContract, Preprocess
from exitify.errors import DataError, ExitifyError

log = logging.getLogger(__name__)

Color: TypeAlias = Literal["RGB", "L"]
Rows: TypeAlias = "Sequence[int] | NDArray[Any] | slice"

PRESETS = {"imagenet": Preprocess(resize=(256,), crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))}
"""Names that stand for a whole preprocess text."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
KEYS = ("resize", "crop", "interpolation", "color", "scale", "mean", "std")
FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"})
"""Formats that are decoded: pixels only. Left out are those for which Pillow starts another program (EPS: Ghostscript)."""

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
WANTED = "a folder with one sub-folder a class, a .npz with x and y, or package.module:loader"


# --- the preprocess text --------------------------------------------------------------------------------------------


def parse_preprocess(text: str) -> tuple[Preprocess, Color | None]:
    """Return the steps that `text` writes down, and the colour if it names one.

    Args:
        text: `key=value` pairs separated by `;`, optionally after the preset `imagenet`: `imagenet`,
            `imagenet;resize=232`, `mean=0.5;std=0.5;resize=256;crop=224x192;interpolation=bicubic;color=L;scale=1/255`.
            `resize`: pixels of the shorter side, or `HEIGHTxWIDTH`. `crop`: pixels, or `HEIGHTxWIDTH`.
            What is not named stays at `Preprocess`'s default.

    Raises:
        DataError: a key is unknown or named twice, or a value is no number, size or name of the allowed ones.
    """
    items = [item.strip() for item in text.split(";") if item.strip()]
    if not items:
        raise DataError("the preprocess text is empty", "give imagenet, or pairs such as mean=0.5;std=0.5")
    steps = Preprocess()
    if "=" not in items[0]:
        if items[0] not in PRESETS:
            raise DataError(f"there is no preprocess {items[0]!r}", f"give {', '.join(PRESETS)}, or pairs such as mean=0.5;std=0.5")
        steps = PRESETS[items.pop(0)]
    color: Color | None = None
    seen: set[str] = set()
    for item in items:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            raise DataError(
                f"the preprocess has an unknown part {item!r}", f"did you mean {close[0]}=…?" if close else f"the keys are {', '.join(KEYS)}"
            )
        if key in seen:
            raise DataError(f"the preprocess names {key} twice", "give it once")
        seen.add(key)
        if key == "color":
            color = cast(Color, _choice(key, value, ("RGB", "L")))
        else:
            steps = replace(steps, **{key: _step(key, value)})
    return steps, color


def format_preprocess(steps: Preprocess, color: Color | None = None) -> str:
    """Return the text that `parse_preprocess` reads as these steps."""
    parts = {
        "resize": steps.resize and "x".join(map(str, steps.resize)),
        "crop": steps.crop and _short_size(steps.crop),
        "interpolation": steps.interpolation,
        "color": color,
        "scale": repr(steps.scale),
        "mean": ",".join(map(repr, steps.mean)),
        "std": ",".join(map(repr, steps.std)),
    }
    return ";".join(f"{key}={value}" for key, value in parts.items() if value)


def _step(key: str, value: str) -> Any:
    if key in ("resize", "crop"):
        if not re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6})?", value):
            raise DataError(f"the preprocess has {key}={value}, which is no size", f"give pixels, {key}=224, or height and width, {key}=224x192")
        size = tuple(map(int, value.split("x")))
        return size * 2 if key == "crop" and len(size) == 1 else size
    if key == "interpolation":
        return _choice(key, value, tuple(FILTERS))
    if key == "scale":
        above, over, below = value.partition("/")
        divisor = _number(key, below) if over else 1.0
        factor = _number(key, above) / divisor if divisor else math.inf
        if not math.isfinite(factor):
            raise DataError(f"the preprocess has scale={value}, which is no finite number", "give the factor on the bytes 0 … 255, scale=1/255")
        return factor
    return tuple(_number(key, number) for number in value.split(","))


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"the preprocess has {key} with {text!r}, which is no finite number", "write numbers as in mean=0.485,0.456,0.406;std=0.229,0.224,0.225"
        )
    return number


def _choice(key: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise DataError(f"the preprocess has {key}={value}", f"{key} is one of {', '.join(choices)}")
    return value


def _short_size(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


# --- one picture ----------------------------------------------------------------------------------------------------


def picture_to_input(picture: Image.Image | str | os.PathLike[str], contract: InputContract) -> NDArray[np.float32]:
    """Return a picture as the network reads it, float32 of shape `contract.shape`.

    The steps and their rounding are torchvision's (Pillow backend): colour, shorter side resized, centre cut out,
    scale, mean, std. A picture that the camera stored turned (EXIF) is turned back first.

    Args:
        picture: A file's path, or an open picture.
        contract: With a preprocess.

    Raises:
        DataError: the file is missing or unreadable, the picture has more than 8 bits or too many pixels, the contract has
            no preprocess, or what comes out has another shape than the contract's.
    """
    inputs: NDArray[np.float32] = pixels_to_inputs(_picture_pixels(picture, contract)[None], contract)[0]
    return inputs


def prepare_pictures(pictures: NDArray[np.uint8], contract: InputContract) -> NDArray[np.float32]:
    """Return pictures in memory as the network reads them, float32 `(N, *contract.shape)`.

    Args:
        pictures: Bytes `(N, H, W, C)` or, grey, `(N, H, W)`; C is 1, 3, or 4 (the alpha channel is dropped).
        contract: With a preprocess. Pictures that need no resize are never converted to Pillow's and back.

    Raises:
        DataError: another dtype or shape, the contract has no preprocess, or what comes out has another shape than the contract's.
    """
    return pixels_to_inputs(_array_pixels(pictures, contract), contract)


def pixels_to_inputs(pixels: NDArray[np.uint8], contract: InputContract) -> NDArray[np.float32]:
    """Return the last steps alone: scale, mean and std.

    Args:
        pixels: Bytes `(N, H, W, C)` already resized and cropped, as `Samples.pixels` gives them (augmented or not).
        contract: With a preprocess.

    Returns:
        float32 `(N, *contract.shape)`.

    Raises:
        DataError: the contract has no preprocess, or the pixels have another shape than it wants.
    """
    steps = _steps_of(contract)
    got = (pixels.shape[3], *pixels.shape[1:3])
    if got != contract.shape:
        raise DataError(
            f"a picture becomes an input of shape {got}, and the network reads {contract.shape}",
            f"a preprocess with crop={'x'.join(map(str, contract.shape[1:]))} cuts every picture to size",
        )
    mean, std = (np.asarray(numbers, np.float32) for numbers in (steps.mean, steps.std))
    inputs = pixels.astype(np.float32)
    inputs *= np.float32(steps.scale)
    inputs -= mean
    inputs /= std
    channels_first: NDArray[np.float32] = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    return channels_first


def resized_size(size: tuple[int, int], resize: tuple[int, ...] | None) -> tuple[int, int]:
    """Return `(height, width)` after the resize: one number is the shorter side, the longer follows, rounded down."""
    if resize is None:
        return size
    if len(resize) == 2:
        return resize[0], resize[1]
    longer = int(resize[0] * max(size) / min(size))
    return (resize[0], longer) if size[0] <= size[1] else (longer, resize[0])


def crop_pixels(pixels: NDArray[np.uint8], crop: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Return the centre of pictures `(..., H, W, C)`, padded with black where they are smaller than `crop` (height, width)."""
    if crop is None:
        return pixels
    for axis, wanted in ((-3, crop[0]), (-2, crop[1])):
        missing = wanted - pixels.shape[axis]
        if missing > 0:
            padding = [(0, 0)] * pixels.ndim
            padding[axis] = (missing // 2, (missing + 1) // 2)
            pixels = np.pad(pixels, padding)
    top, left = (round((pixels.shape[axis] - wanted) / 2) for axis, wanted in ((-3, crop[0]), (-2, crop[1])))
    return pixels[..., top : top + crop[0], left : left + crop[1], :]


def _steps_of(contract: InputContract) -> Preprocess:
    if contract.preprocess is None:
        raise DataError(
            "pictures cannot become inputs: the model came without a preprocess",
            "give --preprocess (imagenet, or mean=…;std=…;resize=…;crop=…), or float32 arrays that are ready",
        )
    return contract.preprocess


def _picture_pixels(picture: Image.Image | str | os.PathLike[str], contract: InputContract) -> NDArray[np.uint8]:
    """Bytes `(H, W, C)` after colour, resize and crop."""
    steps = _steps_of(contract)
    place = "the picture" if isinstance(picture, Image.Image) else os.fspath(picture)
    image = _read(picture, contract.color, place)
    height, width = resized_size((image.height, image.width), steps.resize)
    _refuse_bomb(height, width, f"{place} ({image.width}x{image.height} pixels, once resized)")
    if (width, height) != image.size:
        image = image.resize((width, height), FILTERS[steps.interpolation])
    pixels: NDArray[np.uint8] = np.asarray(image)
    return crop_pixels(pixels[:, :, None] if pixels.ndim == 2 else pixels, steps.crop)


def _read(picture: Image.Image | str | os.PathLike[str], color: Color, place: str) -> Image.Image:
    """The picture, decoded."""
    if not isinstance(picture, Image.Image) and not os.path.isfile(place):
        raise DataError(f"there is no picture {place}", "relative paths start in the current directory")
    try:
        if isinstance(picture, Image.Image):
            return _in_color(picture, color, place)
        with Image.open(place, formats=_openable()) as image:
            return _in_color(image, color, place)
    except ExitifyError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(place) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        hint = f"remove it, or save it again as one of {', '.join(sorted(FORMATS))}"
        raise DataError(f"{place} cannot be read as a picture: {_one_line(error)}", hint) from error


def _in_color(image: Image.Image, color: Color, place: str) -> Image.Image:
    """The picture upright and in 8 bits a channel."""
    _refuse_bomb(image.height, image.width, place)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{place} has more than 8 bits a channel (Pillow's mode {image.mode})", "convert it to 8 bits as it was done for training")
    image = ImageOps.exif_transpose(image)
    if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    return image.convert(color)


def _refuse_bomb(height: int, width: int, place: str) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise _bomb(place)


def _bomb(place: str) -> DataError:
    return DataError(f"{place} has more than {Image.MAX_IMAGE_PIXELS} pixels", "make it smaller first; a file like this can fill the memory")


def _openable() -> tuple[str, ...]:
    return tuple(sorted(set(_suffixes().values())))


@functools.lru_cache(maxsize=1)
def _suffixes() -> dict[str, str]:
    """Suffix to format, for the formats this Pillow can open."""
    Image.init()
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in FORMATS and name in Image.OPEN}


def _array_pixels(pictures: NDArray[np.uint8], contract: InputContract) -> NDArray[np.uint8]:
    """Bytes `(N, H, W, C)` after colour, resize and crop."""
    steps = _steps_of(contract)
    _refuse_other_pictures(pictures)
    pixels = pictures[..., None] if pictures.ndim == 3 else pictures
    channels = {"RGB": 3, "L": 1}[contract.color]
    size = (pixels.shape[1], pixels.shape[2])
    wanted = resized_size(size, steps.resize)
    if len(pixels) and (wanted != size or pixels.shape[3] not in (1, channels)):
        return np.stack([_picture_pixels(_as_image(picture), contract) for picture in pixels])
    if pixels.shape[3] != channels:
        pixels = np.repeat(pixels[..., :1], channels, axis=3)
    return crop_pixels(pixels if len(pixels) else np.zeros((0, *wanted, channels), np.uint8), steps.crop)


def _as_image(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture[:, :, 0] if picture.shape[2] == 1 else picture))


def _refuse_other_pictures(pictures: NDArray[Any]) -> None:
    shape = pictures.shape
    if pictures.dtype != np.uint8:
        raise DataError(f"pictures are {pictures.dtype}, not uint8", "give the bytes 0 … 255")
    if pictures.ndim in (3, 4) and 0 in shape[1:3]:
        raise DataError(f"pictures of shape {shape} have no pixels", "give pictures of at least 1x1")
    if pictures.ndim == 3 or (pictures.ndim == 4 and shape[3] in (1, 3, 4)):
        return
    turned = pictures.ndim == 4 and shape[1] in (1, 3, 4)
    raise DataError(
        f"pictures have the shape {shape}, and (N, height, width, channels) is read",
        "turn them: x.transpose(0, 2, 3, 1)" if turned else "grey pictures may also be (N, height, width)",
    )


# --- a labelled set -------------------------------------------------------------------------------------------------


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
        return _array_pixels(x, contract) if x.dtype == np.uint8 else x

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
            decoded = [_picture_pixels(path, contract) for path in paths]
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                decoded = list(pool.map(lambda path: _picture_pixels(path, contract), paths))
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


# --- a folder -------------------------------------------------------------------------------------------------------


def _from_folder(root: Path, contract: InputContract, classes: int) -> Samples:
    _steps_of(contract)
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
            raise DataError(f"{root / folder} holds no pictures", f"remove it, or fill it; pictures end in {', '.join(sorted(_suffixes()))}")
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
        found += [Path(inside, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in _suffixes()]
    return sorted(found)


# --- arrays ---------------------------------------------------------------------------------------------------------


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
            f"{path} cannot be read: {_one_line(error)}", "save it with numpy.savez(path, x=…, y=…), x and y being plain arrays of numbers"
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
                f"{name} fails{place_of(error)}: {_one_line(error)}", "it is called without arguments, and returns (x, y), or batches of them"
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
    steps = _steps_of(contract)
    _refuse_other_pictures(x)
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


# --- objects by name ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Put the current directory first on `sys.path` for a while, so that the user's own modules are found."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def import_object(name: str, kind: type[ExitifyError]) -> Any:
    """Return what `package.module:name` names.

    Args:
        name: A module's dotted name, a colon, and the name of something in it (dots allowed).
        kind: The error to raise.

    Raises:
        ExitifyError: of that kind: the module is missing or fails (the message says where), or has nothing of that name.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        hint = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise kind(f"{name!r} is not of the form package.module:name", f"a module is written without slashes and .py: {hint}:{attribute or 'name'}")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise kind(f"there is no module {error.name!r}", "it must be installed, or lie in the current directory") from error
        raise kind(
            f"the module {module_name!r} fails{place_of(error)}: {_one_line(error)}",
            "it must be importable: python -c 'import …' shows the whole error",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(part, names, 1)
            raise kind(
                f"the module {module_name!r} ({getattr(sys.modules[module_name], '__file__', None)}) has no {attribute!r}",
                f"did you mean {close[0]!r}?" if close else "check the name after the colon",
            )
        found = getattr(found, part)
    return found


def place_of(error: BaseException) -> str:
    """Return ` at FILE:LINE` of the last line that ran, for messages; empty when not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    ours = (str(Path(__file__).parent) + os.sep, importlib.__file__, "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
