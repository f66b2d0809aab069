"""Ten tiny networks, each `(N, 3, 16, 16) -> (N, 5)`, one for each construct that capture and the passes must get right."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5
SHAPE = (3, 16, 16)


def _conv(channels_in: int, channels_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


class Plain(nn.Module):
    """Convolutions in a row; `(N, 8, 16, 16)`, `(N, 16, 8, 8)`, `(N, 16)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.body(x))
        return self.fc(x.mean((2, 3)))


class IdentityBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class IdentityResidual(nn.Module):
    """Two blocks whose shortcut is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.block1, self.block2 = IdentityBlock(8), IdentityBlock(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class ProjectionBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(channels_in, channels_out, stride=2), _conv(channels_out, channels_out)
        self.downsample = _conv(channels_in, channels_out, size=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.downsample(x))


class ProjectionResidual(nn.Module):
    """Two blocks whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = ProjectionBlock(3, 8), ProjectionBlock(8, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


class BottleneckBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.conv, self.expand = (
            _conv(channels, channels // 4, 1),
            _conv(channels // 4, channels // 4),
            _conv(channels // 4, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 inside each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16, stride=2)
        self.blocks = nn.Sequential(BottleneckBlock(16), BottleneckBlock(16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class InPlaceBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        x = self.conv2(self.relu(self.conv1(x)))
        x += identity
        return self.relu(x)


class InPlace(nn.Module):
    """In-place ReLU, one module called twice a block, and `+=`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = InPlaceBlock(8), InPlaceBlock(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean((2, 3)))


class Shared(nn.Module):
    """One block called twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.block = IdentityBlock(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(F.relu(self.stem(x)))
        return self.fc(self.block(x).mean((2, 3)))


class Dropped(nn.Module):
    """Functional dropout that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _conv(3, 8), _conv(8, 16, stride=2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.stem(x)), p=0.3, training=self.training)
        x = F.dropout2d(F.relu(self.body(x)), 0.2, self.training)
        return self.fc(x.mean((2, 3)))


class StochasticDepth(nn.Module):
    """Leaves its branch out at random while training (Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self, branch: nn.Module, p: float) -> None:
        super().__init__()
        self.branch = branch
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        if self.training and self.p > 0:
            kept = torch.rand(x.shape[0], 1, 1, 1) >= self.p
            y = y * kept / (1 - self.p)
        return x + y


class Stochastic(nn.Module):
    """Two branches whose forward reads `self.training`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.block1, self.block2 = StochasticDepth(_conv(8, 8), 0.3), StochasticDepth(_conv(8, 8), 0.5)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block2(F.relu(self.block1(self.stem(x)))).mean((2, 3)))


class EncoderBlock(nn.Module):
    """Attention and MLP by hand, both shapes read from the value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches, a class token and positions that are parameters of the root, two encoder blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.block1, self.block2 = EncoderBlock(16, 2), EncoderBlock(16, 2)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.fc(self.norm(self.block2(self.block1(x)))[:, 0])


class Depthwise(nn.Module):
    """Depthwise and pointwise convolutions with a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8, stride=2)
        self.depthwise, self.pointwise = _conv(8, 8, groups=8), _conv(8, 16, size=1)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pointwise(F.hardswish(self.depthwise(F.hardswish(self.stem(x)))))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.fc(x.mean((2, 3)))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "identity": IdentityResidual,
    "projection": ProjectionResidual,
    "bottleneck": Bottleneck,
    "in_place": InPlace,
    "shared": Shared,
    "dropout": Dropped,
    "stochastic": Stochastic,
    "transformer": Transformer,
    "depthwise": Depthwise,
}
"""Constructors by name. Weights come from torch's global generator: seed it first."""


def warm_up(model: nn.Module, steps: int = 3) -> nn.Module:
    """The model in eval(), its norm statistics no longer those of a fresh one (mean 0, variance 1 would hide a lost buffer)."""
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(4, *SHAPE) * 2 + 0.5)
    return model.eval()
