"""Augmented pictures against shifts and mirrors made pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.train.augment import augment


def noise(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Pictures without a black pixel, so that black is what came in from outside."""
    return np.random.default_rng(count).integers(1, 256, (count, height, width, channels), np.uint8)


def shifted(picture: np.ndarray, down: int, right: int, *, mirrored: bool) -> np.ndarray:
    """What stands at (r, c) came from (r + down, c + right); outside is black; then the columns may be turned round."""
    height, width, _ = picture.shape
    result = np.zeros_like(picture)
    for row in range(height):
        for column in range(width):
            source = row + down, column + right
            if 0 <= source[0] < height and 0 <= source[1] < width:
                result[row, width - 1 - column if mirrored else column] = picture[source]
    return result


def ways(picture: np.ndarray, result: np.ndarray, margin: int) -> set[tuple[int, int, bool]]:
    """Every shift up to the margin, mirrored or not, that makes the one of the other."""
    span = range(-margin, margin + 1)
    return {(d, r, m) for d in span for r in span for m in (False, True) if np.array_equal(shifted(picture, d, r, mirrored=m), result)}


def test_none_gives_the_same_pictures() -> None:
    pictures = noise(3, 8, 8)
    assert augment(pictures, "none", np.random.default_rng(0)) is pictures


@pytest.mark.parametrize("how", ["none", "crop", "crop+flip"])
@given(count=st.integers(1, 4), height=st.integers(1, 20), width=st.integers(1, 20), channels=st.sampled_from([1, 3]))
def test_shape_and_type_stay(how: str, count: int, height: int, width: int, channels: int) -> None:
    pictures = noise(count, height, width, channels)
    result = augment(pictures, how, np.random.default_rng(0))  # type: ignore[arg-type]
    assert result.shape == pictures.shape
    assert result.dtype == np.uint8


@pytest.mark.parametrize(("height", "width", "margin"), [(16, 16, 2), (8, 24, 1), (5, 7, 1), (32, 16, 2)])
def test_a_crop_is_a_shift_with_black_coming_in(height: int, width: int, margin: int) -> None:
    """So no pixel wraps around to the other side. The margin is an eighth of the shorter side, at least 1."""
    pictures = noise(30, height, width)
    seen = set()
    for picture, result in zip(pictures, augment(pictures, "crop", np.random.default_rng(0)), strict=True):
        (way,) = ways(picture, result, margin + 1)
        assert not way[2]
        assert max(abs(way[0]), abs(way[1])) <= margin
        seen.add(way[:2])
    assert {d for d, _ in seen} == {r for _, r in seen} == set(range(-margin, margin + 1))


def test_a_flip_is_a_shift_and_then_a_mirror_for_half_of_the_pictures() -> None:
    pictures = noise(60, 16, 16)
    found = [ways(p, r, 2) for p, r in zip(pictures, augment(pictures, "crop+flip", np.random.default_rng(0)), strict=True)]
    assert all(len(way) == 1 for way in found)
    mirrored = sum(way.pop()[2] for way in found)
    assert 15 <= mirrored <= 45  # 30 expected, four standard deviations


def test_a_crop_is_never_mirrored() -> None:
    pictures = np.tile(np.arange(1, 17, dtype=np.uint8)[None, None, :, None], (40, 16, 1, 1))
    steps = np.diff(augment(pictures, "crop", np.random.default_rng(0)).astype(int)[:, 8, 3:-3, 0], axis=1)
    assert (steps == 1).all()


def test_the_pictures_given_are_left_alone() -> None:
    pictures = noise(10, 16, 16)
    before = pictures.copy()
    augment(pictures, "crop+flip", np.random.default_rng(0))
    assert np.array_equal(pictures, before)


def test_the_generator_alone_decides() -> None:
    pictures = noise(10, 16, 16)
    first, again, other = (augment(pictures, "crop+flip", np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
