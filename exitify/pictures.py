"""Pictures: from a file or bytes to what the network reads, with numpy and Pillow alone."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from exitify.artifact.manifest import InputContract, Preprocess
from exitify.errors import DataError, ExitifyError, one_line

Color: TypeAlias = Literal["RGB", "L"]

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
    inputs: NDArray[np.float32] = pixels_to_inputs(picture_pixels(picture, contract)[None], contract)[0]
    return inputs


def prepare_pictures(pictures: NDArray[np.uint8], contract: InputContract) -> NDArray[np.float32]:
    """Return pictures in memory as the network reads them, float32 `(N, *contract.shape)`.

    Args:
        pictures: Bytes `(N, H, W, C)` or, grey, `(N, H, W)`; C is 1, 3, or 4 (the alpha channel is dropped).
        contract: With a preprocess. Pictures that need no resize are never converted to Pillow's and back.

    Raises:
        DataError: another dtype or shape, the contract has no preprocess, or what comes out has another shape than the contract's.
    """
    return pixels_to_inputs(array_pixels(pictures, contract), contract)


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
    steps = steps_of(contract)
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


def steps_of(contract: InputContract) -> Preprocess:
    """Return how pictures become inputs, or refuse when nobody said (DataError)."""
    if contract.preprocess is None:
        raise DataError(
            "pictures cannot become inputs: the model came without a preprocess",
            "give --preprocess (imagenet, or mean=…;std=…;resize=…;crop=…), or float32 arrays that are ready",
        )
    return contract.preprocess


def picture_pixels(picture: Image.Image | str | os.PathLike[str], contract: InputContract) -> NDArray[np.uint8]:
    """Bytes `(H, W, C)` after colour, resize and crop."""
    steps = steps_of(contract)
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
        raise DataError(f"{place} cannot be read as a picture: {one_line(error)}", hint) from error


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
    return tuple(sorted(set(picture_suffixes().values())))


@functools.lru_cache(maxsize=1)
def picture_suffixes() -> dict[str, str]:
    """Suffix to format, for the formats this Pillow can open."""
    Image.init()
    return {suffix: name for suffix, name in Image.registered_extensions().items() if name in FORMATS and name in Image.OPEN}


def array_pixels(pictures: NDArray[np.uint8], contract: InputContract) -> NDArray[np.uint8]:
    """Bytes `(N, H, W, C)` after colour, resize and crop."""
    steps = steps_of(contract)
    refuse_other_pictures(pictures)
    pixels = pictures[..., None] if pictures.ndim == 3 else pictures
    channels = {"RGB": 3, "L": 1}[contract.color]
    size = (pixels.shape[1], pixels.shape[2])
    wanted = resized_size(size, steps.resize)
    if len(pixels) and (wanted != size or pixels.shape[3] not in (1, channels)):
        return np.stack([picture_pixels(_as_image(picture), contract) for picture in pixels])
    if pixels.shape[3] != channels:
        pixels = np.repeat(pixels[..., :1], channels, axis=3)
    return crop_pixels(pixels if len(pixels) else np.zeros((0, *wanted, channels), np.uint8), steps.crop)


def _as_image(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture[:, :, 0] if picture.shape[2] == 1 else picture))


def refuse_other_pictures(pictures: NDArray[Any]) -> None:
    """Refuse arrays that are no pictures `(N, H, W, C)` or `(N, H, W)` of bytes (DataError)."""
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
