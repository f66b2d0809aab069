"""RevCol: columns that read each other's levels (Cai et al. 2022, arXiv:2212.11696).

Every column computes four levels, from fine to coarse, and reads the stem's output and the four levels of the column
before it: an exit after a column cuts five tensors. A column can be reversed, so that training need not store what its
levels were; `forward` here stores it as any network does, and `Column.reverse` is for whoever needs the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

LEAST_ALPHA = 1e-3
"""`reverse` divides by alpha."""
DROP_RATE = 0.1
"""Of a column's last block; rising from 0 at its first."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `(N, C, H, W)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """In train mode, zeros in place of a sample with probability `rate`, and the others scaled up to the same mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = 1 - self.rate
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(kept) / kept

    def extra_repr(self) -> str:
        return f"{self.rate:.3g}"


class Block(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, arXiv:2201.03545) with a 3x3 convolution."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.activation = nn.GELU()
        self.project = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop = StochasticDepth(drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(self.activation(self.expand(y)))
        return x + self.drop(y.permute(0, 3, 1, 2))


class Level(nn.Module):
    """One resolution of a column: `alpha` times the same level of the column before, and what the neighbours bring.

    Args:
        channels: Of this level.
        drop_rates: One for each block.
        below: Channels of the finer level of this column; None where the stem's output takes its place.
        above: Channels of the coarser level of the column before; None where there is none.
        is_first: Whether there is no column before.
    """

    def __init__(self, channels: int, drop_rates: Sequence[float], below: int | None, above: int | None, *, is_first: bool) -> None:
        super().__init__()
        self.down = nn.Identity() if below is None else nn.Sequential(nn.Conv2d(below, channels, 2, 2), ChannelNorm(channels, eps=1e-6))
        if above is not None and not is_first:
            self.up = nn.Sequential(nn.Conv2d(above, channels, 1), ChannelNorm(channels, eps=1e-6), nn.Upsample(scale_factor=2, mode="nearest"))
        self.blocks = nn.Sequential(*(Block(channels, rate) for rate in drop_rates))
        self.alpha = None if is_first else nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, below: torch.Tensor, above: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor:
        fresh = self.fresh(below, above)
        return fresh if before is None else self.factor() * before + fresh

    def reverse(self, value: torch.Tensor, below: torch.Tensor, above: torch.Tensor | None) -> torch.Tensor:
        """The same level of the column before, from this one's `value`."""
        return (value - self.fresh(below, above)) / self.factor()

    def fresh(self, below: torch.Tensor, above: torch.Tensor | None) -> torch.Tensor:
        """What the neighbours bring: the finer level of this column, the coarser one of the column before."""
        x = self.down(below)
        return self.blocks(x if above is None else x + self.up(above))

    def factor(self) -> torch.Tensor:
        """`alpha`, no closer to zero than LEAST_ALPHA, with its sign; gradients reach `alpha` also where it is closer."""
        assert self.alpha is not None
        kept = torch.where(self.alpha < 0, self.alpha.clamp(max=-LEAST_ALPHA), self.alpha.clamp(min=LEAST_ALPHA))
        return kept.detach() + (self.alpha - self.alpha.detach())


class Column(nn.Module):
    """A sub-network: `level0` to `level3`."""

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        drop_rates = iter(torch.linspace(0, DROP_RATE, sum(blocks), device="cpu").tolist())
        neighbours = zip([None, *channels], channels, [*channels[1:], None])
        for i, (below, own, above) in enumerate(neighbours):
            level = Level(own, [next(drop_rates) for _ in range(blocks[i])], below, above, is_first=is_first)
            self.add_module(f"level{i}", level)

    def forward(self, stem: torch.Tensor, before: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """This column's levels, from the stem's output and the levels of the column before; the first column has none before it."""
        same = [None] * len(self._modules) if before is None else before
        below, levels = stem, []
        for level, above, own in zip(self.children(), [*same[1:], None], same):
            below = level(below, above, own)
            levels.append(below)
        return tuple(levels)

    def reverse(self, stem: torch.Tensor, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The levels of the column before, from this column's: the coarsest first, each finer one with its help.

        In train mode stochastic depth draws anew, and in the opposite order: whoever trains with this repeats each level's draws.
        """
        if self.is_first:
            raise ValueError("no column stands before the first")
        above, before = None, []
        for level, below, value in reversed(list(zip(self.children(), [stem, *levels], levels))):
            above = level.reverse(value, below, above)
            before.append(above)
        return tuple(reversed(before))


class Head(nn.Module):
    """Class scores from the coarsest level."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x.mean(dim=(2, 3))))


class RevCol(nn.Module):
    """Images `(N, 3, H, W)`, sides multiples of 32, to logits `(N, classes)`.

    Args:
        channels: Of each level, fine to coarse.
        blocks: ConvNeXt blocks of each level.
        columns: How many.
        classes: How many.
    """

    def __init__(
        self, channels: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 4, 2), columns: int = 4, classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 4, 4), ChannelNorm(channels[0], eps=1e-6))
        self.columns = nn.ModuleList(Column(channels, blocks, is_first=i == 0) for i in range(columns))
        self.head = Head(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        levels = None
        for column in self.columns:
            levels = column(stem, levels)
        return self.head(levels[-1])


def revcol_t(classes: int = 1000) -> nn.Module:
    """RevCol-T with random weights: 30.46 M parameters; 4.52 G multiply-adds at 224x224, a quarter of them in each column."""
    return RevCol(classes=classes)


revcol_t.input_shape = (3, 224, 224)
revcol_t.preprocess = "imagenet"
