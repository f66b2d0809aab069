"""Skip-aware self-distillation: the network trains its own shallower self, in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from exitify.errors import PlanError
from exitify.heads import looks_channels_last
from exitify.plan import SkipPath
from exitify.program import ExitOutputs, Program, norm_tensors

Features = Literal["pooled", "positions", "none"]
"""How a stage's output becomes a distribution over its channels: averaged over positions first, at every position, or not at all."""


class SkipAwareDistillation:
    """The loss of a network that is trained with all its skip paths and with none of them.

    `loss = a CE(super) + (1 - a) [T² KL(super || base) + sum over stages of KL(super's output || base's output)]`, where
    super is the network and base the network with every skip path left out. Super is a teacher here: no gradient reaches
    it through the divergences; base sees no labels. Every divergence is a mean over the batch.

    One line in a loop, `loss = method(x, y)`; or, where one backward pass may not follow two forward passes
    (DistributedDataParallel, with `find_unused_parameters=True`; exits' heads, which no loss reaches, then need
    `requires_grad_(False)` before the model is wrapped) and to save memory:
    `for loss in method.losses(x, y): loss.backward()`, which gives the same gradients.

    Source: Kang and Lee 2024, algorithm 1 and equation 2. The paper does not say how a feature map becomes a distribution; its
    public code averages over positions and takes a softmax over channels, as `features="pooled"` does.

    Args:
        model: A Program with skip paths, or what wraps one, in `train()`.
        alpha: Weight of the labels against the distillation.
        features: The explicit form; `none` is the implicit one, with logits alone.
        temperature: Of the logits' divergence.
        distil: False trains super and base on the labels, half each (the paper's ablation, section 4.5).
        criterion: Loss of logits `(N, classes)` and labels; None is the cross-entropy.

    Raises:
        PlanError: the model has no skip paths.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 0.5,
        features: Features = "pooled",
        temperature: float = 1.0,
        distil: bool = True,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        program = program_of(model)
        plan = program.plan
        if not plan.skips:
            raise PlanError("the network has no skip paths to distil", 'exitify.transform(model, example, skips="auto")')
        if features not in get_args(Features):
            raise PlanError(f"there is no way {features!r} to compare features", f"there are {', '.join(get_args(Features))}")
        self.model, self.plan = model, plan
        self.alpha, self.features, self.temperature, self.distil = alpha, features, temperature, distil
        self.criterion = criterion or functional.cross_entropy
        self._channels_last = [len(program.values[path.after].shape) == 3 and _has_channels_last(program, path) for path in plan.skips]

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar."""
        first, second = self.losses(x, y)
        return first + second

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield super's loss, then base's, whose forward pass runs when it is asked for: their gradients add up to the loss's."""
        full: ExitOutputs = self.model(x, all_exits=True)
        label_weight = self.alpha if self.distil else 0.5
        yield label_weight * self.criterion(full.final, y)
        base: ExitOutputs = self.model(x, skip="all", all_exits=True)
        if not self.distil:
            yield 0.5 * self.criterion(base.final, y)
            return
        t = self.temperature
        divergence = t * t * _divergence(full.final.detach() / t, base.final / t)
        if self.features != "none":
            for last, teacher, student in zip(self._channels_last, full.stages, base.stages):
                divergence = divergence + _divergence(*(_over_channels(h, last, self.features) for h in (teacher.detach(), student)))
        yield (1 - self.alpha) * divergence


def program_of(model: nn.Module) -> Program:
    """The Program inside of what wraps it."""
    while not isinstance(model, Program):
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise PlanError(f"{type(model).__name__} is no exitify Program, nor wraps one", "exitify.transform(model, example) makes one")
        model = inner
    return model


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last dimension, a mean over the others, in float32."""
    classes = teacher.shape[-1]
    log_p, log_q = (logits.reshape(-1, classes).float().log_softmax(1) for logits in (teacher, student))
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _over_channels(h: torch.Tensor, channels_last: bool, features: Features) -> torch.Tensor:
    """A stage's output with its channels last: `(N, C)` averaged over positions, or `(N, positions, C)`."""
    if h.ndim == 4 and not channels_last:
        h = h.flatten(2).transpose(1, 2)
    h = h.reshape(len(h), -1, h.shape[-1])
    return h.mean(dim=1, dtype=torch.float32) if features == "pooled" else h


def _has_channels_last(program: Program, path: SkipPath) -> bool:
    """Whether the stage's output is a map `(H, W, C)` and not `(C, H, W)`.

    Its norms have a number for each channel; where that does not tell, or nothing switches, its sides do.
    """
    shape = program.values[path.after].shape
    members = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    sizes = {members[tensor].numel() for norm in path.norms for tensor in norm_tensors(program, norm)}
    first, last = shape[0] in sizes, shape[-1] in sizes
    return last if first != last else looks_channels_last(shape)
