from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exitify.artifact.manifest import InputContract, Preprocess
from exitify.data import Samples, load_samples
from exitify.errors import DataError
from exitify.pictures import (
    FILTERS,
    FORMATS,
    PRESETS,
    crop_pixels,
    format_preprocess,
    parse_preprocess,
    picture_to_input,
    pixels_to_inputs,
    prepare_pictures,
    resized_size,
)

STEPS = Preprocess(resize=(10,), crop=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
CONTRACT = InputContract((3, 8, 8), preprocess=STEPS)
READY = InputContract((3, 4, 4))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(height * 1000 + width).integers(0, 256, shape, np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def picture_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 15)) -> Path:
    for name, count in counts.items():
        for number in range(count):
            save(root / name / f"{number}.png", noise(size[0] + number, size[1] + len(name)))
    return root


# --- the preprocess text


def test_imagenet_is_the_usual_evaluation_transform() -> None:
    steps, color = parse_preprocess("imagenet")
    assert steps == Preprocess((256,), (224, 224), "bilinear", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert color is None


def test_every_key_of_the_preprocess_text_is_read() -> None:
    text = "mean=0.485,0.456,0.406; std=0.229,0.224,0.225;resize=256x192;crop=224x160;interpolation=bicubic;color=RGB;scale=0.00392156862745098"
    steps, color = parse_preprocess(text)
    assert steps == Preprocess((256, 192), (224, 160), "bicubic", 0.00392156862745098, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert color == "RGB"


def test_keys_after_a_preset_change_it() -> None:
    steps, _ = parse_preprocess("imagenet;resize=232;scale=1/255")
    assert steps.resize == (232,)
    assert steps.mean == PRESETS["imagenet"].mean
    assert steps.scale == 1 / 255


sizes = st.integers(1, 16384)
numbers = st.floats(-1e6, 1e6)
preprocesses = st.builds(
    Preprocess,
    resize=st.none() | st.tuples(sizes) | st.tuples(sizes, sizes),
    crop=st.none() | st.tuples(sizes, sizes),
    interpolation=st.sampled_from(sorted(FILTERS)),
    scale=numbers,
    mean=st.lists(numbers, min_size=1, max_size=3).map(tuple),
    std=st.lists(numbers, min_size=1, max_size=3).map(tuple),
)


@given(preprocesses, st.sampled_from(["RGB", "L", None]))
def test_a_preprocess_and_its_text_are_the_same(steps: Preprocess, color: str | None) -> None:
    assert parse_preprocess(format_preprocess(steps, color)) == (steps, color)


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("", "text is empty", "imagenet"),
        ("imagnet", "no preprocess 'imagnet'", "imagenet"),
        ("resise=3", "unknown part 'resise=3'", "did you mean resize="),
        ("imagenet;crop", "unknown part 'crop'", "did you mean crop="),
        ("blur=3", "unknown part 'blur=3'", "the keys are resize, crop"),
        ("crop=8;crop=9", "names crop twice", "once"),
        ("resize=big", "resize=big, which is no size", "resize=224x192"),
        ("resize=-3", "resize=-3, which is no size", "pixels"),
        ("crop=3x4x5", "crop=3x4x5, which is no size", "pixels"),
        ("mean=0.5,x", "mean with 'x', which is no finite number", "mean=0.485"),
        ("std=nan", "std with 'nan', which is no finite number", "numbers"),
        ("scale=1/0", "scale=1/0, which is no finite number", "1/255"),
        ("scale=1e300/1e-300", "no finite number", "1/255"),
        ("scale=a/2", "scale with 'a'", "numbers"),
        ("interpolation=cubic", "interpolation=cubic", "nearest, bilinear, bicubic, lanczos"),
        ("color=BGR", "color=BGR", "RGB, L"),
    ],
)
def test_a_wrong_preprocess_text_is_refused(text: str, problem: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_preprocess(text)
    assert problem in caught.value.problem
    assert hint in caught.value.hint


# --- geometry


@given(sizes, sizes, st.integers(1, 512))
def test_the_shorter_side_becomes_what_was_asked_for(height: int, width: int, side: int) -> None:
    got = resized_size((height, width), (side,))
    assert min(got) == side
    assert got == tuple(reversed(resized_size((width, height), (side,))))
    longer = side * max(height, width) / min(height, width)
    assert max(got) == math.floor(longer)


@given(sizes, sizes, st.integers(1, 512))
def test_resized_sizes_are_torchvisions(torchvision: ModuleType, height: int, width: int, side: int) -> None:
    theirs = torchvision.transforms.functional._compute_resized_output_size
    assert list(resized_size((height, width), (side,))) == theirs((height, width), [side])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_crops_are_torchvisions(torchvision: ModuleType, height: int, width: int, crop_height: int, crop_width: int) -> None:
    pixels = noise(height, width)
    theirs = torchvision.transforms.functional.center_crop(Image.fromarray(pixels), [crop_height, crop_width])
    assert np.array_equal(crop_pixels(pixels, (crop_height, crop_width)), np.asarray(theirs))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_crop_has_its_size_and_holds_the_centre(height: int, width: int, crop_height: int, crop_width: int) -> None:
    pixels = np.full((2, height, width, 1), 7, np.uint8)
    cropped = crop_pixels(pixels, (crop_height, crop_width))
    assert cropped.shape == (2, crop_height, crop_width, 1)
    assert (cropped[0] == 7).sum() == min(height, crop_height) * min(width, crop_width)


def test_without_resize_and_crop_a_picture_keeps_its_size() -> None:
    assert resized_size((5, 9), None) == (5, 9)
    pixels = noise(5, 9)
    assert crop_pixels(pixels, None) is pixels


# --- one picture


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 231), (97, 240), (256, 256), (60, 80)])
def test_inputs_are_torchvisions(torchvision: ModuleType, tmp_path: Path, size: tuple[int, int], interpolation: str) -> None:
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(crop_size=64, resize_size=73, interpolation=torchvision.transforms.InterpolationMode(interpolation))
    steps = Preprocess((73,), (64, 64), interpolation, mean=tuple(theirs.mean), std=tuple(theirs.std))
    contract = InputContract((3, 64, 64), preprocess=steps)
    path = save(tmp_path / "a.png", noise(*size))
    with Image.open(path) as picture:
        expected = theirs(picture).numpy()
    assert np.abs(picture_to_input(path, contract) - expected).max() < 1e-6
    assert np.abs(prepare_pictures(noise(*size)[None], contract)[0] - expected).max() < 1e-6


@pytest.mark.data
def test_inputs_of_photographs_are_torchvisions(torchvision: ModuleType, data_file: Callable[[str], Path]) -> None:
    theirs = torchvision.models.get_model_weights("resnet18").DEFAULT.transforms()
    contract = InputContract((3, 224, 224), preprocess=PRESETS["imagenet"])
    paths = sorted(data_file("imagenet_sample").glob("*/*.jp*g"))[:3]
    assert paths
    for path in paths:
        with Image.open(path) as picture:
            expected = theirs(picture.convert("RGB")).numpy()
        assert np.abs(picture_to_input(path, contract) - expected).max() < 1e-6


def test_an_input_is_scaled_shifted_and_divided_channels_first() -> None:
    contract = InputContract((3, 2, 2), preprocess=Preprocess(scale=1 / 2, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0)))
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    got = prepare_pictures(pixels, contract)
    expected = np.stack([(pixels[..., c] / 2 - (c + 1)) / (1, 2, 4)[c] for c in range(3)], axis=1)
    assert got.dtype == np.float32
    assert got.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_halving_with_bilinear_is_the_triangle_filter() -> None:
    """Pillow's antialiased halving of a row weighs 1, 3, 3, 1 eighths inside; worked out by hand here."""
    row = np.array([0, 0, 80, 160, 0, 0, 0, 0], np.uint8)
    contract = InputContract((1, 8, 4), color="L", preprocess=Preprocess(resize=(8, 4), scale=1.0))
    got = prepare_pictures(np.tile(row, (8, 1))[None], contract)[0, 0, 0]
    weights = np.array([1, 3, 3, 1]) / 8
    assert got[1] == pytest.approx(weights @ row[1:5], abs=0.5)
    assert got[2] == pytest.approx(weights @ row[3:7], abs=0.5)


def test_a_file_an_open_picture_and_an_array_give_the_same_input(tmp_path: Path) -> None:
    pixels = noise(20, 31)
    path = save(tmp_path / "a.png", pixels)
    inputs = [picture_to_input(path, CONTRACT), picture_to_input(str(path), CONTRACT), picture_to_input(Image.fromarray(pixels), CONTRACT)]
    for got in (*inputs[1:], prepare_pictures(pixels[None], CONTRACT)[0]):
        assert np.array_equal(got, inputs[0])
    assert inputs[0].shape == (3, 8, 8)
    assert inputs[0].dtype == np.float32


@pytest.mark.parametrize(("channels", "color"), [(1, "RGB"), (3, "L"), (4, "RGB"), (4, "L"), (3, "RGB"), (1, "L")])
def test_arrays_and_pillow_agree_on_colours(channels: int, color: str) -> None:
    contract = InputContract(({"RGB": 3, "L": 1}[color], 9, 9), color=color, preprocess=Preprocess())
    pixels = noise(9, 9, channels)
    assert np.array_equal(prepare_pictures(pixels[None], contract)[0], picture_to_input(Image.fromarray(pixels), contract))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_every_8_bit_mode_are_read(mode: str) -> None:
    picture = Image.fromarray(noise(12, 12)).convert("P" if mode == "PA" else mode)
    if mode == "PA":
        picture = picture.convert("PA")
    assert picture_to_input(picture, CONTRACT).shape == (3, 8, 8)


def test_a_palette_with_transparent_entries_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(12, 12)).convert("P").save(path, transparency=bytes(range(16)))
    assert picture_to_input(path, CONTRACT).shape == (3, 8, 8)


def test_a_picture_that_the_camera_stored_turned_is_turned_back(tmp_path: Path) -> None:
    pixels = noise(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    path = save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(picture_to_input(path, CONTRACT), picture_to_input(Image.fromarray(np.rot90(pixels, -1).copy()), CONTRACT))


def test_arrays_of_the_right_size_make_no_round_trip_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "fromarray", lambda *_: pytest.fail("went through Pillow"))
    contract = InputContract((3, 8, 8), preprocess=Preprocess(resize=(10,), crop=(8, 8)))
    assert prepare_pictures(np.zeros((2, 10, 12, 3), np.uint8), contract).shape == (2, 3, 8, 8)
    assert prepare_pictures(np.zeros((2, 10, 12), np.uint8), contract).shape == (2, 3, 8, 8)


def test_no_pictures_give_no_inputs() -> None:
    assert prepare_pictures(np.zeros((0, 30, 40, 3), np.uint8), CONTRACT).shape == (0, 3, 8, 8)


def test_preparing_leaves_the_pictures_alone() -> None:
    pixels = noise(8, 8)[None]
    before = pixels.copy()
    prepare_pictures(pixels, InputContract((3, 8, 8), preprocess=Preprocess()))
    assert np.array_equal(pixels, before)


def test_a_picture_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no picture .*a\.png"):
        picture_to_input(tmp_path / "a.png", CONTRACT)


@pytest.mark.parametrize("name", ["text.png", "cut.png", "cut.jpg", "empty.jpg"])
def test_an_unreadable_picture_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        save(path, noise(64, 64))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text("no picture at all" if name.startswith("text") else "")
    with pytest.raises(DataError, match=rf"{name} cannot be read as a picture"):
        picture_to_input(path, CONTRACT)


def test_an_open_picture_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(64, 64))
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as picture, pytest.raises(DataError, match="the picture cannot be read as a picture"):
        picture_to_input(picture, CONTRACT)


def test_a_document_that_would_start_another_program_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(8, 8)).save(path, format="EPS")
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture"):
        picture_to_input(path, CONTRACT)
    assert "EPS" not in FORMATS


def test_a_picture_of_16_bits_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((8, 8), np.uint16))
    with pytest.raises(DataError, match="more than 8 bits"):
        picture_to_input(path, CONTRACT)


@pytest.mark.parametrize("limit", [100, 60, 30])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = save(tmp_path / "a.png", noise(10, 12))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above the limit, and raises above twice the limit
    with pytest.raises(DataError, match=rf"a\.png has more than {limit} pixels"):
        picture_to_input(path, CONTRACT)


def test_a_thin_picture_that_the_resize_would_blow_up_is_refused() -> None:
    contract = InputContract((3, 256, 256), preprocess=Preprocess(resize=(256,), crop=(256, 256)))
    with pytest.raises(DataError, match=r"\(10000x1 pixels, once resized\) has more than"):
        picture_to_input(Image.fromarray(np.zeros((1, 10000, 3), np.uint8)), contract)


def test_pictures_without_a_preprocess_are_refused() -> None:
    with pytest.raises(DataError, match="without a preprocess") as caught:
        prepare_pictures(np.zeros((1, 4, 4, 3), np.uint8), READY)
    assert "--preprocess" in caught.value.hint


def test_a_picture_of_another_size_than_the_network_reads_is_refused() -> None:
    contract = InputContract((3, 8, 8), preprocess=Preprocess())
    with pytest.raises(DataError, match=r"shape \(3, 9, 8\), and the network reads \(3, 8, 8\)") as caught:
        picture_to_input(Image.fromarray(noise(9, 8)), contract)
    assert "crop=8x8" in caught.value.hint


@pytest.mark.parametrize(
    ("pictures", "problem"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "float32, not uint8"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"transpose\(0, 2, 3, 1\)"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((1, 8, 8, 2), np.uint8), r"shape \(1, 8, 8, 2\)"),
        (np.zeros((1, 0, 8, 3), np.uint8), "have no pixels"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(pictures: np.ndarray, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        prepare_pictures(pictures, CONTRACT)


# --- a folder


def test_a_folder_holds_one_class_a_sub_folder_in_sorted_order(tmp_path: Path) -> None:
    samples = load_samples(str(picture_folder(tmp_path, {"dog": 2, "ant": 3, "cat": 1})), CONTRACT, classes=3)
    assert samples.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert samples.labels.dtype == np.int64
    assert samples.classes == ("ant", "cat", "dog")
    assert len(samples) == 6
    assert samples.are_pictures
    assert "6 samples of 3 classes" in repr(samples)


def test_rows_of_a_folder_are_its_pictures(tmp_path: Path) -> None:
    root = picture_folder(tmp_path, {"a": 2, "b": 1})
    samples = load_samples(str(root), CONTRACT, classes=2)
    expected = np.stack([picture_to_input(root / name, CONTRACT) for name in ("a/0.png", "a/1.png", "b/0.png")])
    assert np.array_equal(samples.inputs(range(3)), expected)
    assert np.array_equal(samples.inputs([2]), expected[2:])
    assert np.array_equal(samples.inputs(np.array([True, False, True])), expected[[0, 2]])
    assert np.array_equal(samples.inputs(slice(1, None)), expected[1:])
    assert samples.inputs([]).shape == (0, 3, 8, 8)
    pixels = samples.pixels([0, 2])
    assert pixels.shape == (2, 8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels_to_inputs(pixels, CONTRACT), expected[[0, 2]])


def test_sub_folders_named_like_classes_stand_for_those(tmp_path: Path) -> None:
    contract = InputContract((3, 8, 8), preprocess=STEPS, classes=("dog", "cat", "ant"))
    samples = load_samples(str(picture_folder(tmp_path, {"ant": 1, "dog": 2})), contract, classes=3)
    assert samples.labels.tolist() == [2, 0, 0]
    assert samples.classes == ("dog", "cat", "ant")


def test_sub_folders_named_otherwise_are_taken_in_order_when_there_is_one_a_class(tmp_path: Path) -> None:
    contract = InputContract((3, 8, 8), preprocess=STEPS, classes=("dog", "cat"))
    samples = load_samples(str(picture_folder(tmp_path, {"n02": 1, "n01": 2})), contract, classes=2)
    assert samples.labels.tolist() == [0, 0, 1]
    assert samples.classes == ("dog", "cat")


def test_pictures_lie_deeper_and_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    root = picture_folder(tmp_path, {"a/2024/may": 1, "a": 1, "b": 1, ".cache": 1, "a/.trash": 1})
    (root / "a" / "notes.txt").write_text("none")
    (root / "a" / ".0.png").write_text("none")
    (root / "readme.md").write_text("none")
    save(root / "b" / "UPPER.JPG", noise(12, 12))
    samples = load_samples(str(root), CONTRACT, classes=2)
    assert samples.labels.tolist() == [0, 0, 1, 1]


def test_a_folder_is_not_decoded_before_it_is_asked_for(tmp_path: Path) -> None:
    root = picture_folder(tmp_path, {"a": 2, "b": 2})
    (root / "b" / "1.png").write_text("no picture")
    samples = load_samples(str(root), CONTRACT, classes=2)
    assert samples.inputs([0, 1, 2]).shape == (3, 3, 8, 8)
    with pytest.raises(DataError, match=r"b/1\.png cannot be read as a picture"):
        samples.inputs(range(4))


def test_pictures_that_come_out_in_another_size_are_named(tmp_path: Path) -> None:
    root = picture_folder(tmp_path, {"a": 2, "b": 1})
    contract = InputContract((3, 12, 16), preprocess=Preprocess())
    samples = load_samples(str(root), contract, classes=2)
    assert samples.inputs([0]).shape == (1, 3, 12, 16)
    with pytest.raises(DataError, match=r"a/1\.png becomes 13x16, and the network reads 12x16"):
        samples.inputs([0, 1])


def test_fewer_unnamed_sub_folders_than_classes_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = load_samples(str(picture_folder(tmp_path, {"a": 1, "b": 1})), CONTRACT, classes=4)
    assert "2 sub-folders and the network 4 classes" in caplog.text
    assert samples.classes == ("a", "b", "2", "3")


def test_numbered_sub_folders_in_the_order_of_letters_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = picture_folder(tmp_path, {str(number): 1 for number in range(11)})
    with caplog.at_level(logging.WARNING):
        load_samples(str(root), CONTRACT, classes=11)
    assert "order of their letters: 0, 1, 10" in caplog.text


@pytest.mark.parametrize(
    ("counts", "names", "problem", "hint"),
    [
        ({}, (), "has no sub-folders", "sub-folder of its own"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, (), "4 sub-folders, and the network 3 classes", "nothing else"),
        ({"a": 2}, (), r"1 class \('a'\)", "at least 2 classes"),
        ({"train": 2, "val": 2}, (), "train and val, which are splits", "/val"),
        ({"dog": 1, "cta": 1}, ("dog", "cat", "ant"), "cta is named like no class, while 1 others are", "did you mean 'cat'"),
        ({"dog": 1, "zebra": 1}, ("dog", "cat", "ant"), "zebra is named like no class", "rename it"),
        ({"x": 1, "y": 1}, ("dog", "cat", "ant"), "none of the 2 sub-folders", "dog, cat, ant"),
        ({"dog": 1, "cat": 1}, ("dog", "cat", "dog"), "more than one class named 'dog'", "npz"),
    ],
)
def test_a_folder_that_does_not_fit_the_classes_is_refused(
    tmp_path: Path, counts: dict[str, int], names: tuple[str, ...], problem: str, hint: str
) -> None:
    contract = InputContract((3, 8, 8), preprocess=STEPS, classes=names)
    with pytest.raises(DataError, match=problem) as caught:
        load_samples(str(picture_folder(tmp_path, counts)), contract, classes=3)
    assert hint in caught.value.hint


def test_a_sub_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (picture_folder(tmp_path, {"a": 1, "b": 1}) / "c").mkdir()
    with pytest.raises(DataError, match=r"/c holds no pictures") as caught:
        load_samples(str(tmp_path), CONTRACT, classes=3)
    assert ".png" in caught.value.hint
    assert ".eps" not in caught.value.hint


def test_a_folder_for_a_network_without_a_preprocess_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without a preprocess"):
        load_samples(str(picture_folder(tmp_path, {"a": 1, "b": 1})), READY, classes=2)


def test_as_few_classes_as_the_caller_allows_are_accepted(tmp_path: Path) -> None:
    samples = load_samples(str(picture_folder(tmp_path, {"a": 2})), CONTRACT, classes=3, least_classes=1)
    assert samples.labels.tolist() == [0, 0]


# --- arrays


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def ready(rows: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 3, 4, 4)).astype(np.float32)


LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_floats_in_an_npz_are_ready_inputs(tmp_path: Path) -> None:
    x = ready()
    samples = load_samples(npz(tmp_path / "a.npz", x=x, y=LABELS), READY, classes=3)
    assert not samples.are_pictures
    assert np.array_equal(samples.inputs([4, 1]), x[[4, 1]])
    assert np.array_equal(samples.pixels(slice(None)), x)
    assert samples.classes == ("0", "1", "2")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_converted(tmp_path: Path, dtype: type) -> None:
    samples = load_samples(npz(tmp_path / "a.npz", x=ready().astype(dtype), y=LABELS), READY, classes=3)
    assert samples.inputs(slice(None)).dtype == np.float32


def test_bytes_in_an_npz_are_pictures(tmp_path: Path) -> None:
    x = np.stack([noise(12, 15)] * 2 + [noise(12, 16)[:, :15]])
    samples = load_samples(npz(tmp_path / "a.npz", x=x, y=np.array([[0], [1], [1]], np.uint8)), CONTRACT, classes=2)
    assert samples.are_pictures
    assert samples.pixels([0, 2]).shape == (2, 8, 8, 3)
    assert np.array_equal(samples.inputs(slice(None)), prepare_pictures(x, CONTRACT))
    assert samples.labels.tolist() == [0, 1, 1]


def test_a_part_of_an_npz_is_named_after_a_hash(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", x_train=ready(), y_train=LABELS, x_test=ready(3), y_test=LABELS[:3])
    assert len(load_samples(f"{path}#test", READY, classes=3)) == 3
    assert len(load_samples(f"{path}#train", READY, classes=3)) == 6
    with pytest.raises(DataError, match="has no x and y; it has x_train") as caught:
        load_samples(path, READY, classes=3)
    assert "a.npz#test or a.npz#train" in caught.value.hint
    with pytest.raises(DataError, match="has no x_val and y_val"):
        load_samples(f"{path}#val", READY, classes=3)


@pytest.mark.parametrize(
    ("x", "y", "problem"),
    [
        (ready(6), LABELS[:5], "6 rows in x and 5 in y"),
        (ready(6), LABELS + 1, "row 2 of .* has the label 3, outside 0 … 2"),
        (ready(6), LABELS - 1, "row 0 of .* has the label -1"),
        (ready(6), LABELS.astype(np.float32), "y in .* is float32"),
        (ready(6), np.eye(6, 3, dtype=np.int64), "one-hot labels: y.argmax"),
        (ready(6), LABELS * 0, r"1 class \('0'\)"),
        (ready(0), LABELS[:0], "which is no set of inputs"),
        (np.float32(3), LABELS, "which is no set of inputs"),
        (ready(6)[:, :, :3], LABELS, r"shape \(3, 3, 4\), and the network reads \(3, 4, 4\)"),
        (ready(6).astype(np.int64), LABELS, "x in .* is int64, and the network reads float32"),
        (np.where(np.arange(6)[:, None, None, None] == 4, np.nan, ready(6)), LABELS, "row 4 of .* holds NaN or infinity"),
        (np.where(np.arange(6)[:, None, None, None] == 5, 1e300, ready(6).astype(np.float64)), LABELS, "row 5 of .* holds NaN or infinity"),
        (np.zeros((6, 4, 4, 3), np.uint8), LABELS, "without a preprocess"),
        (np.array([None] * 6), LABELS, "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, x: np.ndarray, y: np.ndarray, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_samples(npz(tmp_path / "a.npz", x=x, y=y), READY, classes=3)


@pytest.mark.parametrize(
    ("contract", "x", "problem"),
    [
        (InputContract((3, 8, 8), preprocess=Preprocess()), np.zeros((6, 9, 9, 3), np.uint8), "become 9x9, and the network reads 8x8"),
        (InputContract((3, 8, 8), preprocess=Preprocess(crop=(7, 7))), np.zeros((6, 9, 9, 3), np.uint8), "become 7x7"),
        (CONTRACT, np.zeros((6, 3, 8, 8), np.uint8), "transpose"),
    ],
)
def test_pictures_that_do_not_fit_are_refused_at_once(tmp_path: Path, contract: InputContract, x: np.ndarray, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_samples(npz(tmp_path / "a.npz", x=x, y=LABELS), contract, classes=3)


def test_an_npz_with_python_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([Evil()], object), y=LABELS)
    with pytest.raises(DataError, match=r"a\.npz cannot be read"):
        load_samples(str(path), READY, classes=3)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = Path(npz(tmp_path / "a.npz", x=ready(), y=LABELS))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"is no \.npz file"):
        load_samples(str(path), READY, classes=3)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", b"\x93NUMPY nonsense")
        file.writestr("y.npy", b"")
    with pytest.raises(DataError, match="cannot be read"):
        load_samples(str(path), READY, classes=3)


# --- loaders


LOADERS = """
import numpy as np

x = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)
y = np.array([0, 1, 2, 0, 1, 2])

def arrays(): return x, y
def batches():
    for start in (0, 4): yield x[start:start + 4], y[start:start + 4]
def two_batches(): return [(x[:3], y[:3]), (x[3:], y[3:])]
def singles(): return [(x[i], int(y[i])) for i in range(6)]
def tensors():
    import torch
    return torch.from_numpy(x).requires_grad_(), torch.from_numpy(y)
def torch_loader():
    from torch.utils.data import DataLoader, TensorDataset
    import torch
    return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=4)
def fails(): raise RuntimeError("no disk")
def nothing(): return []
def dictionaries(): return [{"x": x}]
def ragged(): return [(x, y), (x[:, :2], y)]
def number(): return 3
thing = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current directory."""
    name = f"user_data_{os.getpid()}_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("loader", ["arrays", "batches", "two_batches", "singles", "tensors", "torch_loader"])
def test_a_loader_may_return_arrays_batches_or_samples(user_module: str, loader: str) -> None:
    path = list(sys.path)
    samples = load_samples(f"{user_module}:{loader}", READY, classes=3)
    assert np.array_equal(samples.inputs(slice(None)), sys.modules[user_module].x)
    assert samples.labels.tolist() == LABELS.tolist()
    assert sys.path == path


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        ("fails", r"fails at .*user_data.*\.py:\d+: RuntimeError: no disk"),
        ("nothing", "yields nothing"),
        ("dictionaries", r"yields a dict, not \(x, y\)"),
        ("ragged", "inputs of different shapes or types"),
        ("number", "fails: TypeError"),
        ("thing", "is a int, not a function"),
        ("array", "did you mean 'arrays'"),
    ],
)
def test_a_loader_that_gives_no_samples_is_refused(user_module: str, loader: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_samples(f"{user_module}:{loader}", READY, classes=3)


def test_a_loaders_missing_module_is_named() -> None:
    with pytest.raises(DataError, match="there is no module 'no_such_module'"):
        load_samples("no_such_module.data:loader", READY, classes=3)


# --- any set


@pytest.mark.parametrize("name", ["nowhere", "nowhere.npz", "nowhere.npz#test"])
def test_a_missing_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no nowhere"):
        load_samples(name, READY, classes=3)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"a\.csv is no set of samples") as caught:
        load_samples(str(tmp_path / "a.csv"), READY, classes=3)
    assert "package.module:loader" in caught.value.hint


def test_class_names_of_another_number_are_refused() -> None:
    with pytest.raises(DataError, match="names 2 classes, and the network has 3"):
        load_samples("x", InputContract((3,), classes=("a", "b")), classes=3)


@pytest.fixture(params=["folder", "pictures", "ready"])
def samples(request: pytest.FixtureRequest, tmp_path: Path) -> Samples:
    if request.param == "folder":
        return load_samples(str(picture_folder(tmp_path, {"a": 3, "b": 4})), CONTRACT, classes=2)
    y = np.array([0, 0, 0, 1, 1, 1, 1])
    if request.param == "pictures":
        return load_samples(npz(tmp_path / "a.npz", x=np.stack([noise(12 + i, 20)[:12] for i in range(7)]), y=y), CONTRACT, classes=2)
    return load_samples(npz(tmp_path / "a.npz", x=ready(7), y=y), READY, classes=2)


def test_batches_are_the_rows_in_order(samples: Samples) -> None:
    batches = list(samples.batches(3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate([x for x, _ in batches]), samples.inputs(slice(None)))
    assert np.array_equal(np.concatenate([y for _, y in batches]), samples.labels)


def test_a_subset_is_these_rows_in_this_order(samples: Samples) -> None:
    part = samples.subset([5, 0, 2])
    assert part.labels.tolist() == samples.labels[[5, 0, 2]].tolist()
    assert np.array_equal(part.inputs(slice(None)), samples.inputs([5, 0, 2]))
    assert np.array_equal(part.subset([2, 0]).inputs([0, 1]), samples.inputs([2, 5]))
    assert np.array_equal(part.subset(np.array([False, True, False])).pixels([0]), samples.pixels([0]))
    assert len(samples) == 7


def test_the_identity_is_that_of_order_labels_and_pixels(samples: Samples) -> None:
    whole = samples.identity()
    assert len(whole) == 64
    assert samples.subset(slice(None)).identity() == whole
    assert samples.subset(slice(None, None, -1)).identity() != whole
    assert samples.subset([0, 1]).identity() != samples.subset([0, 2]).identity()
    other = Samples(samples._source, 1 - samples.labels, samples.classes, samples.contract)
    assert other.identity() != whole


def test_a_folders_identity_moves_with_it_and_changes_with_its_bytes(tmp_path: Path) -> None:
    here, there = (picture_folder(tmp_path / name, {"a": 1, "b": 1}) for name in ("here", "there"))
    first = load_samples(str(here), CONTRACT, classes=2).identity()
    assert load_samples(str(there), CONTRACT, classes=2).identity() == first
    save(there / "b" / "0.png", noise(3, 3))
    assert load_samples(str(there), CONTRACT, classes=2).identity() != first


def test_reading_pictures_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import exitify.data"
    subprocess.run([sys.executable, "-c", code], check=True)
