"""Random crops and flips of pictures, before features are recorded."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Augmentation = Literal["none", "crop", "crop+flip"]


def augment(pictures: NDArray[np.uint8], how: Augmentation, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return the pictures shifted by up to an eighth of their side (black comes in), and half of them mirrored.

    Args:
        pictures: `(N, H, W, C)`.
        how: `none`, `crop`, or `crop+flip` (not for digits and letters).
        generator: Where the randomness comes from.
    """
    if how == "none":
        return pictures
    count, height, width, _ = pictures.shape
    margin = max(1, min(height, width) // 8)
    padded = np.pad(pictures, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    top, left = generator.integers(0, 2 * margin + 1, (2, count))
    rows = (top[:, None] + np.arange(height))[:, :, None]
    columns = left[:, None] + np.arange(width)
    if how == "crop+flip":
        mirrored = np.flatnonzero(generator.random(count) < 0.5)
        columns[mirrored] = columns[mirrored, ::-1]
    moved: NDArray[np.uint8] = padded[np.arange(count)[:, None, None], rows, columns[:, None, :]]
    return moved
