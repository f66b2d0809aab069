"""The heads: pool without weights, features, one linear classifier."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from exitify.errors import PlanError
from exitify.plan import DIMENSIONS, Cost, HeadSpec, Value, steps_problem

KINDS = ("linear", "conv", "deep", "mlp", "own")
_KIND = re.compile(r"(linear|conv|deep|mlp|own)|(conv|deep|mlp)([1-9]\d{0,3})")


class ExitHead(nn.Module):
    """A classifier on a value inside the network.

    `pool` has no weights, so a training run records its output once. `body` makes features of it, and `path`, where the head
    reads an earlier exit's logits too, joins these to them (`Path`). `classifier` is one linear layer on the result `z`,
    `(N, spec.features)`: its gradient has a closed form, which is what lets a device update it.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.pool, self.body = _parts(spec)
        self.path = Path(spec)
        self.classifier = nn.Linear(spec.features, spec.classes)

    def forward(self, value: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(N, classes)` of a value `(N, *spec.shape)` and, where the head has a path, of the earlier exit's `(N, classes)`."""
        if torch.is_grad_enabled() and not isinstance(self.pool, _MeanOver):
            value = value.clone()  # the backward pass reads it, and the network may have overwritten it in place by then
        return self.after_pool(self.pool(value), previous)

    def after_pool(self, pooled: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(N, classes)` of the pool's output."""
        logits: torch.Tensor = self.path.added(self.classifier(self.path.joined(self.body(pooled), previous)), previous)
        return logits


class Path(nn.Module):
    """How a head uses an earlier exit's logits.

    `identity` is the knowledge path of inline subnetwork collaboration (Li et al. 2019, section 3.3), whose gradients are
    discarded; `learned` is what its public code does, where they are not. `layer_norm` is the cascade of Zero Time Waste
    (Wojcik et al. 2021). `boosted` lets a head learn what the earlier ones leave (Yu et al. 2023); `ensemble`, with its factor
    and the classifier's bias, is a weighted geometric mean of all probabilities so far, which a softmax of the sum is.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.kind = spec.path
        if spec.path == "learned":
            self.inside = nn.Sequential(nn.Linear(spec.classes, spec.width), nn.BatchNorm1d(spec.width), nn.ReLU())
        if spec.path == "layer_norm":
            self.inside = nn.Sequential(nn.LayerNorm(spec.classes))
        if spec.path == "ensemble":
            self.factor = nn.Parameter(torch.ones(()))

    def joined(self, features: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """What the classifier reads."""
        if self.kind not in ("identity", "learned", "layer_norm"):
            return features
        assert previous is not None
        if self.kind != "learned":
            previous = previous.detach()
        return torch.cat((features, previous if self.kind == "identity" else self.inside(previous)), dim=1)

    def added(self, logits: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        """What the head says."""
        if self.kind not in ("boosted", "ensemble"):
            return logits
        assert previous is not None
        return logits + (previous.detach() if self.kind == "boosted" else self.factor * previous.detach())

    def extra_repr(self) -> str:
        return self.kind


class HeadWithScores(nn.Module):
    """A head as the device runs it: logits, features, and the scores that policies read."""

    temperature: torch.Tensor

    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.pool, self.body, self.path, self.classifier = head.pool, head.body, head.path, head.classifier
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, value: torch.Tensor, previous: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `(N, classes)`, z `(N, features)`, scores `(N, 4)` as `exitify.plan.SCORES` names them."""
        z = self.path.joined(self.body(self.pool(value)), previous)
        logits = self.path.added(self.classifier(z), previous)
        return logits, z, scores_of(logits / self.temperature)


def scores_of(logits: torch.Tensor) -> torch.Tensor:
    """Scores `(N, 4)`, as `exitify.plan.SCORES` names them, of logits `(N, classes)` at their temperature."""
    log_p = functional.log_softmax(logits, dim=1)
    p = log_p.exp()
    log_q = functional.log_softmax(log_p + log_p, dim=1)  # p² / Σp²
    entropy = -(p * log_p).sum(dim=1, keepdim=True)
    renyi_entropy = -(log_q.exp() * log_q).sum(dim=1, keepdim=True)
    top = p.topk(2, dim=1).values
    return torch.cat((top[:, :1], entropy, top[:, :1] - top[:, 1:], renyi_entropy), dim=1)


# --- parts ----------------------------------------------------------------------------------------------------------


class _Over(nn.Module):
    """Something over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


class _MeanOver(_Over):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.mean(dim=self.dims)


class _MaxOver(_Over):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.amax(dim=self.dims)


class _FirstToken(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value[:, 0]


class _ChannelsFirst(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.permute(0, 3, 1, 2)


class _LayerNormOverChannels(nn.LayerNorm):
    """Layer norm of `(N, C, H, W)` over C, at each position."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.LayerNorm calls it
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


POSITIONS = {"nchw": (2, 3), "nhwc": (1, 2), "tokens": (1,)}
"""The dimensions that are positions, by layout."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
}

STEPS = ("mean", "max", "first", "layer_norm:EPS", "batch_norm:EPS", "group_norm:GROUPS:EPS", "linear:WIDTH", "dropout:P", *ACTIVATIONS)
"""What a head of the kind `own` may be made of, in front of its classifier."""


def _parts(spec: HeadSpec) -> tuple[nn.Module, nn.Module]:
    """Pool and body."""
    if spec.kind == "own":
        return _own_parts(spec)
    channels = spec.channels
    if spec.kind in ("conv", "deep"):
        pooled: list[nn.Module] = [_ChannelsFirst()] if spec.layout == "nhwc" else []
        pooled += [nn.AvgPool2d(spec.pool)] if spec.pool > 1 else []
        first = _convolution(channels, spec.width, stride=1) if spec.kind == "deep" else ()
        two = (*_convolution(spec.width if first else channels, spec.width), *_convolution(spec.width, spec.width))
        body = nn.Sequential(*first, *two, _MeanOver(2, 3))
        return (pooled[0] if len(pooled) == 1 else nn.Sequential(*pooled) if pooled else nn.Identity()), body
    pool = _step("first" if spec.layout == "class_token" else "mean", spec.layout, channels) if spec.layout != "vector" else nn.Identity()
    if spec.kind == "linear":
        return pool, nn.Identity()
    return pool, nn.Sequential(nn.Linear(channels, spec.width), nn.ReLU())


def _own_parts(spec: HeadSpec) -> tuple[nn.Module, nn.Module]:
    layout, channels = "tokens" if spec.layout == "class_token" else spec.layout, spec.channels
    pool: list[nn.Module] = []
    body: list[nn.Module] = []
    for step in spec.steps:
        made = _step(step, layout, channels)
        has_weights = any(True for _ in made.parameters())
        (body if body or has_weights or isinstance(made, nn.Dropout) else pool).append(made)
        if step in ("mean", "max", "first"):
            layout = "vector"
        if step.startswith("linear:"):
            channels = int(step.removeprefix("linear:"))
    return (pool[0] if len(pool) == 1 else nn.Sequential(*pool) if pool else nn.Identity()), nn.Sequential(*body)


def _step(step: str, layout: str, channels: int) -> nn.Module:
    name, *options = step.split(":")
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    if name == "mean":
        return _MeanOver(*POSITIONS[layout])
    if name == "max":
        return _MaxOver(*POSITIONS[layout])
    if name == "first":
        return _FirstToken()
    if name == "dropout":
        return nn.Dropout(float(options[0]))
    if name == "linear":
        return nn.Linear(channels, int(options[0]))
    if name == "layer_norm":
        return (_LayerNormOverChannels if layout == "nchw" else nn.LayerNorm)(channels, eps=float(options[0]))
    if name == "batch_norm":
        return (nn.BatchNorm2d if layout == "nchw" else nn.BatchNorm1d)(channels, eps=float(options[0]))
    if name == "group_norm":
        return nn.GroupNorm(int(options[0]), channels, eps=float(options[1]))
    raise PlanError(f"a head has no step {step!r}", f"there are {', '.join(STEPS)}")


def _convolution(channels_in: int, channels_out: int, stride: int = 2) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


# --- which head for which value -------------------------------------------------------------------------------------


def looks_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether a map's three sides look like `(H, W, C)`: the first two alike, and the last not."""
    return shape[0] == shape[1] != shape[2]


def check_kind(kind: str) -> None:
    """Refuse a head that there is not.

    Raises:
        PlanError: it is none of `KINDS`, with or without a width.
    """
    if _KIND.fullmatch(kind) is None:
        raise PlanError(f"there is no head {kind!r}", f"there are auto, {', '.join(KINDS)}, and conv128 for another width")


def head_spec(
    kind: str, value: Value, name: str, classes: int, *, layout: str = "", own: tuple[str, ...] | None = None, own_width: int = 0
) -> HeadSpec:
    """Return a head of this kind for a value.

    Args:
        kind: One of `KINDS`; `conv`, `deep` and `mlp` may have a width, `conv128`.
        value: What it reads, called `name`. classes: How many it tells apart.
        layout: How the value is laid out (see `HeadSpec`), by default as its shape looks.
        own: The steps of the network's own head, None where it cannot stand elsewhere; own_width: what its classifier
            reads, 0 for the value's channels.

    Raises:
        PlanError: no head, or not this one, reads a value of this shape.
    """
    shape = value.shape
    shown = f"(N, {', '.join(map(str, shape))})"
    check_kind(kind)
    asked = _KIND.fullmatch(kind)
    assert asked is not None
    kind = asked[1] or asked[2]
    if not layout:
        layout = {3: "nhwc" if len(shape) == 3 and looks_channels_last(shape) else "nchw", 2: "tokens", 1: "vector"}.get(len(shape), "")
    if not layout or len(shape) != DIMENSIONS[layout] or value.dtype != "float32":
        raise PlanError(f"cannot exit after {name!r}: its value is {value.dtype} {shown}, and a head reads "
                        "float32 (N, C, H, W), (N, H, W, C), (N, T, C) or (N, C)",
                        "exit after a block of the network")  # fmt: skip
    if kind in ("conv", "deep") and layout not in ("nchw", "nhwc"):
        raise PlanError(f"a {kind} head cannot read {name!r}, of shape {shown}", "`--head linear` or `--head mlp`")
    channels = shape[0] if layout == "nchw" else shape[-1]
    if kind == "own":
        steps = _own_steps(own, layout, name)
        spec = HeadSpec("own", cast(Any, layout), shape, 1, own_width or channels, classes, steps)
        if problem := steps_problem(spec):
            raise PlanError(f"the network's own head cannot stand after {name!r}: {problem}", "`--head linear`, `conv` or `mlp`")
        return spec
    width = int(asked[3]) if asked[3] else channels if kind == "linear" else 64 if classes <= 100 else 512 if kind == "mlp" else 128
    sides = shape[1:] if layout == "nchw" else shape[:2]
    pool = max(1, round(min(sides) / 8)) if kind in ("conv", "deep") else 1
    return HeadSpec(cast(Any, kind), cast(Any, layout), shape, pool, width, classes)


def _own_steps(own: tuple[str, ...] | None, layout: str, name: str) -> tuple[str, ...]:
    """The own head's steps, as they are on a value of this layout."""
    if own is None:
        raise PlanError(
            "the network's own head cannot stand elsewhere: it is more than norms, a pool and linear layers", "`--head linear`, `conv` or `mlp`"
        )
    pools = [step for step in own if step in ("mean", "max", "first")]
    if layout == "vector":
        return tuple(step for step in own if step not in pools)
    if layout == "class_token":
        return own if pools == ["first"] else tuple("first" if step in pools else step for step in own)
    if not pools:
        raise PlanError(f"the network's own head reads a vector, and {name!r} is none", "`--head linear`, `conv` or `mlp`")
    return tuple("mean" if step == "first" else step for step in own)


@functools.lru_cache(4096)
def head_cost(spec: HeadSpec) -> Cost:
    """What a head costs, measured on one built from its spec without weights."""
    with torch.device("meta"):
        head = ExitHead(spec).eval()
        value, previous = torch.zeros(1, *spec.shape), torch.zeros(1, spec.classes)
    with FlopCounterMode(display=False) as counter:
        head(value, previous)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    return Cost(counter.get_total_flops() // 2, parameters, 4 * (spec.features + spec.classes))
