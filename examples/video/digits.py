"""A film of digits: real scans, as a camera would see them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from exitify.artifact.manifest import InputContract
from exitify.pictures import steps_of

FIRST = 1350
"""Where, in the order of the digits example, those begin that it judges on: no network or threshold was made with them."""
FRAMES = 30
"""Of each digit: a second."""
DRIFT, LIGHT, NOISE = 0.06, 0.1, 0.01
"""How far a digit drifts while in sight, as a share of the picture; how much its light changes; deviation of the noise, as shares of white."""


def scenes(contract: InputContract) -> Iterator[NDArray[np.uint8]]:
    """Frames `(H, W, 1)` of one digit after another, each drifting some way, in light that comes and goes.

    Args:
        contract: With a preprocess; frames have the size that the network reads.

    Raises:
        DataError: the network reads no pictures.
    """
    steps_of(contract)
    height, width = contract.shape[1:]
    scans = load_digits()
    random = np.random.default_rng(1)
    for row in np.random.default_rng(0).permutation(len(scans.images))[FIRST:]:
        scan = Image.fromarray((scans.images[row] * 255 / 16).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        start, end = random.uniform(-DRIFT / 2, DRIFT / 2, (2, 2)) * (width, height)
        for t in np.linspace(0, 1, FRAMES):
            right, down = start + t * (end - start)
            moved = scan.transform(scan.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down), Image.Resampling.BILINEAR)
            seen = np.asarray(moved, np.float64) * (1 + LIGHT * np.sin(2 * np.pi * t)) + 255 * NOISE * random.standard_normal((height, width))
            yield seen.clip(0, 255).astype(np.uint8)[..., None]
