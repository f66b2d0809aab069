"""Losses of all exits together, one line in any training loop: `loss = exitify.losses.joint(net(x), y)`.

Each is a function of an `ExitOutputs` and labels that returns a scalar to be differentiated. docs/training.md says which
helps when. Logits in half precision count as float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from exitify.errors import DataError, PlanError
from exitify.plan import Plan
from exitify.program import ExitOutputs, Program

__all__ = ["GeometricEnsemble", "boosted", "geometric_ensemble", "joint", "one_for_all", "per_sample", "ramp"]

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A scalar loss of logits `(N, classes)` and labels; the cross-entropy by default."""

Weights = Literal["uniform"] | Sequence[float] | Mapping[str, float]
"""A weight for each exit: all 1; in the order of the exits, the last one's last; or by name, `final` among them."""

Schedule = Literal["paper", "released"]
Reduction = Literal["batchmean", "released"]


def joint(outputs: ExitOutputs, y: torch.Tensor, weights: Weights = "uniform", criterion: Criterion | None = None) -> torch.Tensor:
    """Return the weighted sum of the exits' losses.

    Uniform weights are MSDNet's and the first phase of Li et al. 2019 (equation 1 with each λ = 1), there with Gradient
    Equilibrium (`exitify.passes.equilibrate_gradients`).

    Args:
        outputs: What a Program returns in `train()`.
        y: Labels `(N,)`, or what else the criterion reads.
        weights: None below 0; an exit whose weight is 0 is left out.
        criterion: Of each exit; by default the cross-entropy.

    Raises:
        PlanError: weights for other exits than there are, or none that counts. DataError: labels that the network does not have.
    """
    _check(outputs, y)
    by_exit = _weights(outputs.names, weights)
    loss_of = criterion or functional.cross_entropy
    losses = [weight * loss_of(_full(logits), y) for weight, logits in zip(by_exit, outputs.logits) if weight]
    return torch.stack(losses).sum()


def per_sample(outputs: ExitOutputs, y: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every sample at every exit, `(N, exits)`.

    Raises:
        DataError: labels that the network does not have.
    """
    _check(outputs, y)
    return cross_entropies(outputs.logits, y)


def cross_entropies(logits: Sequence[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each sample at each exit, `(N, exits)`, of logits `(N, classes)` each; labels are not looked at."""
    return torch.stack([functional.cross_entropy(_full(each), y, reduction="none") for each in logits], dim=1)


def ramp(network: Program | Plan, progress: float, schedule: Schedule = "paper") -> tuple[float, ...]:
    """Return weights for `joint` that rise while a network is trained from the start, so that early exits do not spoil it at first.

    An exit's weight goes from 0.01 to its cost, C, in a straight line; the last exit's is 1 (Kaya et al. 2019,
    arXiv:1810.07052, section 4). C is the exit's multiply-adds, heads before it counted, as a share of the network's
    without exits, at most 1. `released` is what the public code does, `min(C, 0.01 + progress C)`.

    Args:
        network: With segments.
        progress: Share of the training that is over, in [0, 1].

    Raises:
        PlanError: a progress outside [0, 1], an unknown schedule, or a network that is not cut into segments.
    """
    plan = network.plan if isinstance(network, Program) else network
    if not isinstance(plan, Plan):
        raise PlanError(f"{type(plan).__name__} has no plan to take costs from", "give the Program, or its plan")
    if schedule not in get_args(Schedule):
        raise PlanError(f"there is no schedule {schedule!r}", f"there are {', '.join(get_args(Schedule))}")
    if not 0 <= progress <= 1:
        raise PlanError(f"a progress of {progress} is not in [0, 1]", "steps done / steps in all")
    if not plan.segments:
        raise PlanError("what an exit costs is not known before the network is cut into segments", "apply the pass cut-segments")
    reached, full = plan.macs_at([point.name for point in plan.exits]), max(plan.full_macs, 1)
    costs = [min(reached[point.name] / full, 1.0) for point in plan.exits]
    if schedule == "released":
        return (*(min(cost, 0.01 + progress * cost) for cost in costs), 1.0)
    return (*(0.01 + progress * (cost - 0.01) for cost in costs), 1.0)


def one_for_all(
    outputs: ExitOutputs,
    y: torch.Tensor,
    distillation: float = 0.1,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    *,
    teacher: torch.Tensor | None = None,
    criterion: Criterion | None = None,
) -> torch.Tensor:
    """Return the loss of one-for-all distillation: the last exit teaches the others.

    `CE(last) + Σ over the others of [(1 - g) CE + g T² KL(teacher || exit)]`, both distributions at temperature T, the
    teacher without gradients (Li et al. 2019, equations 7 and 8, with g = 1 - α; T = 1 and g = 0.1 are the script's).

    Args:
        outputs: What a Program returns in `train()`.
        y: Labels `(N,)`.
        distillation: g, in [0, 1].
        temperature: T > 0.
        reduction: Of the divergence: `batchmean`, a mean over samples; `released`, the public code's mean over samples and
            classes, which is that divided by the number of classes and makes g next to nothing on many.
        teacher: Logits `(N, classes)`, by default the last exit's own.
        criterion: In place of the cross-entropy.

    Raises:
        PlanError: an option outside its range. DataError: labels or a teacher of another network.
    """
    if not 0 <= distillation <= 1:
        raise PlanError(f"a distillation weight of {distillation} is not in [0, 1]", "0.1 as in the paper's script")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise PlanError(f"a temperature of {temperature} is no positive number", "1 as in the paper's script")
    if reduction not in get_args(Reduction):
        raise PlanError(f"there is no reduction {reduction!r}", f"there are {', '.join(get_args(Reduction))}")
    _check(outputs, y)
    teacher = outputs.final if teacher is None else teacher
    if teacher.shape != outputs.final.shape:
        raise DataError(
            f"the teacher's logits are {tuple(teacher.shape)}, and the network's {tuple(outputs.final.shape)}", "of the same batch and classes"
        )
    loss_of = criterion or functional.cross_entropy
    target = (_full(teacher.detach()) / temperature).log_softmax(1)
    scale = temperature * temperature / (teacher.shape[1] if reduction == "released" else 1)
    losses = [loss_of(_full(outputs.final), y)]
    for logits in map(_full, outputs.logits[:-1]):
        divergence = functional.kl_div((logits / temperature).log_softmax(1), target, log_target=True, reduction="batchmean")
        losses.append((1 - distillation) * loss_of(logits, y) + distillation * scale * divergence)
    return torch.stack(losses).sum()


def boosted(
    outputs: ExitOutputs, y: torch.Tensor, *, added: bool = True, reweighting: float = 1.0, criterion: Criterion | None = None
) -> torch.Tensor:
    """Return the loss of heads each of which learns what the earlier ones leave.

    Early exit k answers with F_k = f_k + t F_(k-1), f_k its own head's part, and is trained on CE(F_k) with F_(k-1) held
    fixed: what earlier heads get right already asks little of it, what they get wrong much (Yu et al. 2023,
    arXiv:2211.16726).

    Of that method this is the additive model, all heads trained on one batch, and, without `added`, prediction reweighting
    by a constant t. Its gradient rescaling is `exitify.passes.equilibrate_gradients`. Not as in the paper: the network's
    own last answer is trained as it is and adds nothing, for it must stay what it was. With `added` the number is that of
    `joint`: heads of `cascade="boosted"` hold the earlier logits fixed themselves.

    Args:
        outputs: What a Program returns in `train()`.
        y: Labels `(N,)`.
        added: Logits are sums already, made with `transform(..., cascade="boosted")`. False: they are the heads' own parts,
            and whoever runs them must add them up as here, as heads of the same weights and that cascade do.
        reweighting: t, in (0, 1], without `added`.
        criterion: In place of the cross-entropy.

    Raises:
        PlanError: t outside its range, or given for logits that are sums already. DataError: labels that the network does not have.
    """
    if not 0 < reweighting <= 1:
        raise PlanError(f"a reweighting of {reweighting} is not in (0, 1]", "1 leaves the earlier exits' sum as it is")
    if added and reweighting != 1:
        raise PlanError("logits that were added up already cannot be weighed again", 'added=False; or cascade="ensemble", which trains factors')
    if added:
        return joint(outputs, y, criterion=criterion)
    total, sums = None, []
    for logits in outputs.logits[:-1]:
        total = logits if total is None else logits + reweighting * total.detach()
        sums.append(total)
    return joint(dataclasses.replace(outputs, logits=(*sums, outputs.final)), y, criterion=criterion)


# --- geometric ensembles -------------------------------------------------------------------------------------------------


def geometric_ensemble(logits: Sequence[torch.Tensor], weights: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return log-probabilities `(N, classes)` of each exit together with those before it.

    p_k ~ b_k Π over j <= k of p_j^w_kj, normalised, all of it in logarithms (Wojcik et al. 2021, arXiv:2106.05409, section 3).

    Args:
        logits: Of each exit, `(N, classes)`; probabilities' logarithms do as well.
        weights: w, `(exits, exits)`; what stands above its diagonal is not read.
        bias: log b, `(exits, classes)`.
    """
    log_p = torch.stack([_full(one).log_softmax(1) for one in logits])
    mixed = torch.einsum("kj,jnc->knc", weights.tril().to(log_p), log_p) + bias[:, None].to(log_p)
    return tuple(mixed.log_softmax(2))


class GeometricEnsemble(nn.Module):
    """Learns how much each exit should count on those before it: weights > 0 and a bias for each class, at every exit.

    Trained after the heads, on samples of its own or theirs, with `loss(net(x, all_exits=True), y)`: logits are held fixed.
    Fresh, exit k is the plain geometric mean of exits 1 to k. The public code's weights are exp(v)/k, and v begins near 0;
    so do these. It builds no ensemble for the network's own last exit: give `exits` without it.

    A `recursive` ensemble, w_kj = c_k w_(k-1)j for j < k, folds into heads that add (`transform(..., cascade="ensemble")`), which
    compute W z + b + c l with l the earlier exit's logits: its unnormalised E_k = w_kk l_k + B_k + c_k (E_(k-1) - B_(k-1)),
    with B the biases, has W' = w_kk W, b' = w_kk b + B_k - c_k B_(k-1) and c = c_k, since a softmax does not see
    the sums that normalise the parts. `scales` gives the c_k. Such heads may as well be trained as they are.

    Args:
        exits: How many, the first ones of a network.
        classes: How many the network tells apart.
        recursive: Only ensembles that heads can hold: exits + exits weights in place of exits (exits + 1) / 2.

    Raises:
        PlanError: no exit, or no class.
    """

    def __init__(self, exits: int, classes: int, *, recursive: bool = False) -> None:
        super().__init__()
        if exits < 1 or classes < 1:
            raise PlanError(f"there is no ensemble of {exits} exits for {classes} classes", "give numbers from 1")
        count = torch.arange(1, exits + 1, dtype=torch.float32)
        self.recursive = recursive
        self.bias = nn.Parameter(torch.zeros(exits, classes))
        if recursive:
            self.log_own = nn.Parameter(-count.log())
            self.log_scales = nn.Parameter((count[:-1] / count[1:]).log())
        else:
            self.log_weights = nn.Parameter(-count.log()[:, None].expand(exits, exits).clone())

    @property
    def scales(self) -> torch.Tensor:
        """c_2 and on, `(exits - 1,)`, of a recursive ensemble."""
        return self.log_scales.exp()

    @property
    def weights(self) -> torch.Tensor:
        """w, `(exits, exits)`, none above the diagonal."""
        if not self.recursive:
            return self.log_weights.exp().tril()
        so_far = functional.pad(self.log_scales.cumsum(0), (1, 0))
        return (self.log_own + so_far[:, None] - so_far).exp().tril()

    def forward(self, outputs: ExitOutputs) -> ExitOutputs:
        """The outputs with log-probabilities of the ensembles in place of its exits' logits; later exits are left alone."""
        count = len(self.bias)
        if count > len(outputs.logits) or self.bias.shape[1] != outputs.final.shape[1]:
            there = f"{len(outputs.logits)} exits and {outputs.final.shape[1]} classes"
            raise PlanError(
                f"an ensemble of {count} exits and {self.bias.shape[1]} classes does not fit a network of {there}", "make one of its exits"
            )
        together = geometric_ensemble(outputs.logits[:count], self.weights, self.bias)
        return dataclasses.replace(outputs, logits=(*together, *outputs.logits[count:]))

    def loss(self, outputs: ExitOutputs, y: torch.Tensor) -> torch.Tensor:
        """The sum of its exits' cross-entropies, a scalar, for weights and biases alone.

        Raises:
            PlanError: it was made for other exits. DataError: labels that the network does not have.
        """
        _check(outputs, y)
        fixed = dataclasses.replace(outputs, logits=tuple(logits.detach() for logits in outputs.logits))
        return torch.stack([functional.nll_loss(log_p, y) for log_p in self(fixed).logits[: len(self.bias)]]).sum()


# --- checks --------------------------------------------------------------------------------------------------------------


def _full(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _weights(names: Sequence[str], weights: Weights) -> list[float]:
    if isinstance(weights, str):
        if weights != "uniform":
            raise PlanError(f"there are no weights {weights!r}", "uniform, a number for each exit, or a mapping by their names")
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise PlanError(f"weights are for {', '.join(weights) or 'no exit'}, and the exits are {', '.join(names)}", "give one for each")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise PlanError(f"{len(weights)} weights do not fit {len(names)} exits", f"they are, in order, {', '.join(names)}")
    numbers = [float(weight) for weight in weights]
    for name, number in zip(names, numbers):
        if not (number >= 0 and math.isfinite(number)):
            raise PlanError(f"exit {name!r} has the weight {number}, which is no number from 0", "0 leaves an exit out")
    if not any(numbers):
        raise PlanError("every exit has the weight 0", f"train one of {', '.join(names)}")
    return numbers


def _check(outputs: ExitOutputs, y: torch.Tensor) -> None:
    """Refuse what is no output of all exits, and labels that it has no logits for.

    Labels on a GPU are not read: that would make the processor wait for it at every step.
    """
    if not isinstance(outputs, ExitOutputs):
        raise DataError(f"a loss of all exits was given a {type(outputs).__name__}", "net.train(), or net(x, all_exits=True)")
    count, classes = outputs.final.shape
    if len(y) != count:
        raise DataError(f"{len(y)} labels do not fit {count} samples", "one for each sample of the batch")
    if y.device.type != "cpu" or y.is_floating_point() or y.ndim != 1 or torch.compiler.is_compiling():
        return
    wrong = y[((y < 0) & (y != -100)) | (y >= classes)]  # -100: a sample that torch's cross-entropy leaves out
    if len(wrong):
        raise DataError(
            f"{int(wrong[0])} is the label of a sample, and the network knows the classes 0 to {classes - 1}", "number them as the network does"
        )
