"""Residual networks, tiny ones written here and torchvision's, for the tests of skip paths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from exitify.program import Program
from exitify.tracing import capture
from tests.models import CLASSES, SHAPE, EncoderBlock


class PreActivationBlock(nn.Module):
    """Norms and activations before the convolutions, nothing behind the addition (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels_in), nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels_in != channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreActivation(nn.Module):
    """Stages of 3 and 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(*(PreActivationBlock(8, 8) for _ in range(3)))
        self.stage2 = nn.Sequential(PreActivationBlock(8, 16, 2), *(PreActivationBlock(16, 16) for _ in range(3)))
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stage2(self.stage1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class InARow(nn.Module):
    """Blocks between a stem and a classifier of their channels."""

    def __init__(self, channels: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.fc = nn.Conv2d(3, channels, 3, padding=1), nn.Sequential(*blocks), nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Encoders(nn.Module):
    """Transformer blocks on patches."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, CLASSES)
        self.layers = nn.Sequential(*(EncoderBlock(8, 2) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def exported(model: nn.Module) -> nn.Module:
    """What comes out of a .pt2."""
    batch = ({0: torch.export.Dim("batch", max=64)},)
    return torch.export.export(model.eval(), (torch.randn(2, *SHAPE),), dynamic_shapes=batch).module()


def vit(module: ModuleType) -> nn.Module:
    return module.models.VisionTransformer(32, 16, 12, 2, 16, 32, num_classes=CLASSES)


def swin(module: ModuleType) -> nn.Module:
    return module.models.SwinTransformer([4, 4], 8, [2, 2, 6, 2], [1, 1, 2, 2], [2, 2], num_classes=CLASSES)


def convnext(module: ModuleType) -> nn.Module:
    block = module.models.convnext.CNBlockConfig
    return module.models.ConvNeXt([block(8, 16, 3), block(16, 24, 3), block(24, 32, 9), block(32, None, 3)], num_classes=CLASSES)


TORCHVISION: dict[str, Callable[[ModuleType], nn.Module]] = {
    "resnet18": lambda t: t.models.resnet18(weights=None),
    "resnet50": lambda t: t.models.resnet50(weights=None),
    "resnet101": lambda t: t.models.resnet101(weights=None),
    "mobilenet_v2": lambda t: t.models.mobilenet_v2(weights=None),
    "efficientnet_b0": lambda t: t.models.efficientnet_b0(weights=None),
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "alexnet": lambda t: t.models.alexnet(weights=None, num_classes=CLASSES),
    "densenet": lambda t: t.models.DenseNet(8, (2, 2), 8, num_classes=CLASSES),
    "shufflenet": lambda t: t.models.shufflenet_v2_x0_5(weights=None),
}
"""Constructors from torchvision; the transformers and ConvNeXt are narrow."""


@functools.cache
def captured_from(torchvision: ModuleType, name: str) -> Program:
    """One of these, fresh, as a Program in eval(). Shared by all tests: passes leave it alone, and so must they."""
    size = 64 if name == "alexnet" else 32
    with torch.random.fork_rng(devices=[]):  # a test draws the same numbers whether or not it is the first to ask
        return capture(TORCHVISION[name](torchvision).eval(), torch.randn(1, 3, size, size))
