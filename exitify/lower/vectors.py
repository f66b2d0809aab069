"""What a processor's vector unit holds, and the accumulators that fill it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exitify.lower import ranking

if TYPE_CHECKING:
    from exitify.lower.convolution import Shape


@dataclass(frozen=True)
class Tile:
    """What a convolution or a product keeps in registers: so many output channels, in vectors, for so many pixels of a row."""

    filters: int
    pixels: int


@dataclass(frozen=True)
class Vectors:
    """A vector unit.

    lanes: float32 values in a register. registers: How many there are.
    """

    lanes: int
    registers: int

    def of(self, dtype: str) -> Vectors:
        """The same registers with values of another type. A sum in float16 takes three: its own, and two for the float32 that it is added to."""
        return Vectors(2 * self.lanes, (self.registers - 6) // 3 + 4) if dtype == "float16" else self

    @property
    def accumulators(self) -> int:
        """Most registers that a tile takes: with more LLVM spills (28 of 32 halved the speed of a 3x3 convolution on a Zen 4 core)."""
        return min(self.registers - 4, 16)

    def tile(self, shape: Shape) -> Tile:
        """The tile of a convolution: of those that are possible the one that takes least time, as `exitify.lower.ranking` estimates."""
        blocks = -(-shape.filters // self.lanes)
        widths = [width for width in (1, 2, 3, 4) if blocks % width == 0]
        widths = [width for width in widths if shape.channels_read(width * self.lanes)] or widths[:1]  # its caller asks which channels it reads, too
        possible = [(width, pixels) for width in widths for pixels in range(1, self.accumulators // width + 1)]
        width, pixels = min(possible, key=lambda tile: ranking.price(shape, tile[0], tile[1], self.lanes, self.registers))
        return Tile(width * self.lanes, pixels)

    def product_tile(self, rows: int, columns: int, samples: int = 1) -> Tile:
        """The tile of a matrix product, `filters` columns for `pixels` rows; one row is a stream of weights, in several sums at once.

        With rows of several samples it has the columns that one sample's has, so that the same packed weight serves both.
        """
        if rows == samples:
            widths: tuple[int, ...] = (4,) if columns >= self.lanes * 4 else (1,)
        elif samples > 1:
            widths = (self.product_tile(rows // samples, columns).filters // self.lanes,)
        else:
            widths = (1, 2)
        tiles = [Tile(self.lanes * k, pixels) for k in widths for pixels in range(1, min(self.accumulators // k, rows) + 1)]
        return min(tiles, key=lambda tile: self._price(tile, rows, columns))

    def _price(self, tile: Tile, rows: int, columns: int) -> float:
        """A product's relative time: what is computed beyond its rows and columns, loads a multiplication, additions that wait for each other."""
        vectors = tile.filters // self.lanes
        computed = math.ceil(columns / tile.filters) * tile.filters / columns * math.ceil(rows / tile.pixels) * tile.pixels / rows
        loads = 0.25 * (vectors + tile.pixels) / (vectors * tile.pixels)
        waiting = 0.5 * max(0.0, 1 - vectors * tile.pixels / 6)
        return computed * (1.05 + loads + waiting)
