"""Feature maps in blocks of channels, as compiled libraries keep them: channel c of `(N, C, H, W)` at `[n, c // block, y, x, c % block]`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def in_blocks(array: Array, block: int) -> Array:
    """Return `(N, C, H, W)`, or one number a channel, `(C, 1, 1)`, as `(N, ceil(C / block), H, W, block)`, zeros past the last channel."""
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    images, channels, height, width = array.shape
    padded = np.zeros((images, -(-channels // block) * block, height, width), array.dtype)
    padded[:, :channels] = array
    return np.ascontiguousarray(padded.reshape(images, -1, block, height, width).transpose(0, 1, 3, 4, 2))


def in_rows(array: Array, channels: int) -> Array:
    """Return what is in blocks as `(N, channels, H, W)`."""
    images, blocks, height, width, block = array.shape
    return np.ascontiguousarray(array.transpose(0, 1, 4, 2, 3).reshape(images, blocks * block, height, width)[:, :channels])
