"""A small network for digits as a user would write it: the command line's tests copy this file into a folder of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class DigitsNet(nn.Module):
    """Four convolutions, `(N, 1, 16, 16) -> (N, 10)`, 5 M multiply-adds: dear enough that stopping early pays."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.stage2 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.stage4 = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.fc = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def build() -> DigitsNet:
    return DigitsNet()


build.input_shape = (1, 16, 16)
build.preprocess = "mean=0.3;std=0.4;color=L"
build.classes = tuple(f"digit {i}" for i in range(10))


def build_without_preprocess() -> DigitsNet:
    return DigitsNet()


def build_for_five() -> nn.Module:
    """Another network: its last layer has five classes."""
    network = DigitsNet()
    network.fc = nn.Linear(96, 5)
    return network
