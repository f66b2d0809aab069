"""Images enlarged and reduced in the blocked layout."""

from __future__ import annotations

from typing import Any

from tvm import te, topi

REPEATED = ("nearest_neighbor", "asymmetric", "floor")
"""Method, coordinates and rounding by which each pixel is repeated where sizes are multiples."""


def resized(image: te.Tensor, size: tuple[int, int], attributes: Any) -> te.Tensor:
    """Return `(N, ceil(C / b), H, W, b)` at another height and width; attributes: Of `relax.image.resize2d`."""
    _, _, height, width, block = (int(length) for length in image.shape)
    how = (attributes.method, attributes.coordinate_transformation_mode, attributes.rounding_method)
    if how == REPEATED and size[0] % height == size[1] % width == 0:
        down, across = size[0] // height, size[1] // width
        return te.compute((*image.shape[:2], *size, block), lambda n, c, y, x, v: image[n, c, y // down, x // across, v], name="resize")
    return topi.image.resize2d(
        image,
        [float(edge) for edge in attributes.roi],
        size,
        f"NCHW{block}c",
        *how,
        float(attributes.cubic_alpha),
        int(attributes.cubic_exclude),
        float(attributes.extrapolation_value),
        attributes.out_dtype,
    )
