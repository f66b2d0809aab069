"""The heads: pool without weights, features, one linear classifier."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from exitify.plan import HeadSpec


class ExitHead(nn.Module):
    """A classifier on a value inside the network.

    `pool` has no weights, so a training run records its output once. `body` makes the features `z`, `(N, width)`.
    `classifier` is one linear layer: its gradient has a closed form, which is what lets a device update it.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.pool = _pool(spec)
        self.body = _body(spec)
        self.classifier = nn.Linear(spec.width, spec.classes)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Logits `(N, classes)` of a value `(N, *spec.shape)`."""
        if torch.is_grad_enabled() and isinstance(self.pool, (nn.Identity, nn.AvgPool2d)):
            value = value.clone()  # the backward pass reads it, and the network may have overwritten it in place by then
        logits: torch.Tensor = self.classifier(self.body(self.pool(value)))
        return logits


class HeadWithScores(nn.Module):
    """A head as the device runs it: logits, features, and the scores that policies read."""

    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.pool, self.body, self.classifier = head.pool, head.body, head.classifier
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `(N, classes)`, z `(N, width)`, scores `(N, 4)` as `exitify.plan.SCORES` names them."""
        z = self.body(self.pool(value))
        logits = self.classifier(z)
        log_p = functional.log_softmax(logits / self.temperature, dim=1)
        p = log_p.exp()
        log_q = functional.log_softmax(log_p + log_p, dim=1)  # p² / Σp²
        entropy = -(p * log_p).sum(dim=1, keepdim=True)
        renyi_entropy = -(log_q.exp() * log_q).sum(dim=1, keepdim=True)
        top = p.topk(2, dim=1).values
        return logits, z, torch.cat((top[:, :1], entropy, top[:, :1] - top[:, 1:], renyi_entropy), dim=1)


class _MeanOverTokens(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.mean(dim=1)


class _GlobalAveragePool(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.mean(dim=(2, 3))


def _pool(spec: HeadSpec) -> nn.Module:
    if spec.layout == "tokens":
        return _MeanOverTokens()
    if spec.layout == "vector":
        return nn.Identity()
    if spec.kind != "conv":
        return _GlobalAveragePool()
    return nn.AvgPool2d(spec.pool) if spec.pool > 1 else nn.Identity()


def _body(spec: HeadSpec) -> nn.Module:
    channels = spec.shape[0] if spec.layout == "nchw" else spec.shape[-1]
    if spec.kind == "linear":
        return nn.Identity()
    if spec.kind == "mlp":
        return nn.Sequential(nn.Linear(channels, spec.width), nn.ReLU())
    return nn.Sequential(*_convolution(channels, spec.width), *_convolution(spec.width, spec.width), _GlobalAveragePool())


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()
