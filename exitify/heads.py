"""The heads: pool without weights, features, one linear classifier."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exitify.errors import PlanError
from exitify.plan import Cost, HeadSpec, Value


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


def looks_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether a map's three sides look like `(H, W, C)`: the first two alike, and the last not."""
    return shape[0] == shape[1] != shape[2]


def head_spec(kind: str, value: Value, name: str, classes: int) -> HeadSpec:
    """Return a head of this kind for a value.

    Raises:
        PlanError: no head reads a value of this shape.
    """
    layouts: dict[int, Literal["nchw", "tokens", "vector"]] = {3: "nchw", 2: "tokens", 1: "vector"}
    shape = value.shape
    shown = f"(N, {', '.join(map(str, shape))})"
    if len(shape) not in layouts or value.dtype != "float32":
        raise PlanError(f"cannot exit after {name!r}: its value is {value.dtype} {shown}, and a head reads float32 (N, C, H, W), (N, T, C) or (N, C)",
                        "exit after a block of the network")  # fmt: skip
    if len(shape) == 3 and looks_channels_last(shape):
        raise PlanError(f"cannot exit after {name!r}: its value {shown} has its channels last, and a head reads (N, C, H, W)",
                        "exit where the network has channels first")  # fmt: skip
    layout = layouts[len(shape)]
    if kind == "conv" and layout != "nchw":
        raise PlanError(f"a conv head cannot read {name!r}, of shape {shown}", "`--head linear` or `--head mlp`")
    channels = shape[0] if layout == "nchw" else shape[-1]
    width = channels if kind == "linear" else 64 if classes <= 100 else 128 if kind == "conv" else 512
    pool = max(1, round(min(shape[1:]) / 8)) if kind == "conv" else 1
    assert kind in get_args(Literal["linear", "conv", "mlp"])
    return HeadSpec(kind, layout, shape, pool, width, classes)  # type: ignore[arg-type]


def head_cost(spec: HeadSpec) -> Cost:
    """What a head costs, measured on one built from its spec without weights."""
    with torch.device("meta"):
        head = ExitHead(spec).eval()
        value = torch.zeros(1, *spec.shape)
    with FlopCounterMode(display=False) as counter:
        head(value)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    return Cost(counter.get_total_flops() // 2, parameters, 4 * (spec.width + spec.classes))
