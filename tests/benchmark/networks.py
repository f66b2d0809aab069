"""Modules that other processes can import."""

from __future__ import annotations

import torch
from torch import nn


class AmongOthers(nn.Module):
    """A network's logits among other outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        logits = self.network(x)
        return {"features": x.mean((1, 2, 3)), "count": 3, "logits": logits}
