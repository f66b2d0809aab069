"""Weights of samples at each exit that are learnt so that exits are good at the samples that will leave at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitify.calibration.quotas import geometric_shares
from exitify.errors import DataError, PlanError
from exitify.losses import per_sample
from exitify.passes.cost import device_of
from exitify.program import ExitOutputs
from exitify.train.skip_distillation import program_of

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and labels."""

Mean = Literal["exit", "batch"]
"""Over what the weights' mean is 1: over the samples at each exit, or over samples and exits."""


class SampleWeights:
    """The loss of all exits in which a small network says how much each sample counts at each exit.

    At test time easy samples leave early and hard ones late, but plain training shows every exit all of them. Here sample n
    counts 1 + a_nk at exit k, where a = limit tanh(network(the sample's losses at all exits)), less its mean over the batch.
    The network learns what makes exits good at the samples that they will be asked about: after a step of SGD on
    the weighted loss of one half of a batch, which is undone, the samples of the other half are dealt out to the exits,
    those that an exit is surest of first and a geometric share to each, and each counts at its own exit alone. The gradient of that
    loss goes back through the step to the network. One line in a loop, the labels' loss and the learning of weights in one:

        method = SampleWeights(net, step=0.1)
        ...
        loss = method(x, y)

    Source: Han et al. 2022, "Learning to Weight Samples for Dynamic Early-exiting Networks", ECCV, arXiv:2209.08310. From the paper: weights
    from all exits' losses, one hidden layer, bounded around 1 with mean 1, the virtual step, the meta-loss on samples dealt out
    by confidence with shares that grow or shrink by one ratio. From its public code: tanh, 500 hidden units, Adam with
    1e-4 for rate and decay, how samples are dealt out (floor(N share) of those left, the last exit takes the rest), that
    each exit's part is a mean over its own samples and the parts are added, and the learning every 1 batch (CIFAR) or 100 (ImageNet).

    Our reading, where the paper leaves room or the code does otherwise:
    - The virtual step is plain SGD, the paper's equation; the code's has the optimizer's momentum and weight decay too.
    - The whole batch is trained on in one step, with weights the network gives after it has learnt; halves change their parts from one
      time to the next. The code trains on each half in a step of its own, with the other as the judge, in every batch.
    - The mean is 1 at each exit, so that no exit gains on others; `mean="batch"` is what the code's ImageNet script says.
    - Norm statistics are not moved by the virtual passes, and confidence is judged as the network is in `train()`.
    - In several processes the network's gradients are averaged; weights have mean 1, and halves are dealt out, in each process for itself.

    With its mean taken off, a lies within twice the limit: for limits above 0.5 a weight can be negative.

    Args:
        model: A Program with exits, or what wraps one, in `train()`.
        limit: How far from 1 a weight may go before means are taken off, in [0, 1]: 0.3 in the code's ImageNet script. 0: `losses.joint`.
        step: Learning rate of the virtual step: the real one, as a number, or the optimizer that has it, in which each group has its own.
        ratio: Share of the samples that leave at an exit by that of the exit before, above 0: 0.75 in the code's ImageNet script.
        every: How many batches go by from one time that the network learns to the next.
        hidden: Units of its hidden layer. learning_rate, weight_decay: Of its own optimizer, Adam.
        mean: See `Mean`.
        parameters: Names of those that the virtual step moves; by default all that require gradients. Heads alone need far less memory.

    Attributes:
        network: From losses `(N, exits)` to as many numbers. optimizer: Its own.

    Raises:
        PlanError: the model has no exits, or an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        limit: float = 0.8,
        step: float | torch.optim.Optimizer = 0.1,
        ratio: float = 0.75,
        every: int = 1,
        hidden: int = 500,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        mean: Mean = "exit",
        parameters: Sequence[str] | None = None,
    ) -> None:
        program = program_of(model)
        if not program.plan.exits:
            raise PlanError("the network has no early exits, so there is nothing to weigh between", "exitify.transform(model, example)")
        if mean not in get_args(Mean):
            raise PlanError(f"there is no mean over each {mean!r}", f"there are {', '.join(get_args(Mean))}")
        for name, value, holds, wanted in (
            ("limit", limit, 0 <= limit <= 1, "in [0, 1]"),
            ("ratio", ratio, 0 < ratio < np.inf, "above 0"),
            ("every", every, every >= 1, "at least 1"),
            ("hidden", hidden, hidden >= 1, "at least 1"),
            ("step", step, isinstance(step, torch.optim.Optimizer) or 0 < step < np.inf, "above 0, or an optimizer"),
        ):
            if not holds:
                raise PlanError(f"{name} is {value}", f"it must be {wanted}")
        known = dict(program.named_parameters())
        for name in parameters or ():
            if name not in known:
                raise PlanError(f"the network has no parameter {name!r} to move", "names as in named_parameters()")
        count = len(program.plan.exit_names)
        self.model, self.program = model, program
        self.limit, self.step, self.every, self.mean, self.parameters = limit, step, every, mean, parameters
        self.shares = geometric_shares(ratio, count)
        self.network = nn.Sequential(nn.Linear(count, hidden), nn.ReLU(), nn.Linear(hidden, count)).to(device_of(program))
        if _processes() > 1:
            for parameter in self.network.parameters():
                distributed.broadcast(parameter.data, 0)
        self.optimizer = torch.optim.Adam(self.network.parameters(), learning_rate, weight_decay=weight_decay)
        self.batches = 0

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The weighted loss of a batch, a scalar; every so many batches the network learns first.

        Raises:
            DataError: labels that the network does not have, or less than two samples to learn from.
            PlanError: no parameter requires gradients.
        """
        if self.limit and self.batches % self.every == 0 and torch.is_grad_enabled():
            if len(x) < 2:
                raise DataError(f"a batch of {len(x)} has no two halves", "give larger batches, or drop the last one of an epoch")
            halves = list(zip(x.chunk(2), y.chunk(2)))
            if self.batches // self.every % 2:
                halves.reverse()
            self.learn(*halves)
        self.batches += torch.is_grad_enabled()
        losses = per_sample(self.model(x, all_exits=True), y)
        with torch.no_grad():
            weights = self.weights(losses)
        return (weights * losses).mean(0).sum()

    def weights(self, losses: torch.Tensor) -> torch.Tensor:
        """How much each sample counts at each exit, `(N, exits)`, from its losses there, of the same shape; no gradient reaches these."""
        like = next(self.network.parameters())
        said = torch.tanh(self.network(losses.detach().to(like.dtype))).to(losses.dtype)
        return 1 + self.limit * (said - (said.mean(0) if self.mean == "exit" else said.mean()))

    def learn(self, first: Batch, second: Batch) -> torch.Tensor:
        """One step of the weights' network, for a virtual one on the first batch that is judged on the second; returns the meta-loss."""
        loss = self.meta_loss(first, second)
        own = list(self.network.parameters())
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own)):
            if _processes() > 1:
                distributed.all_reduce(gradient)
            parameter.grad = gradient / _processes()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def meta_loss(self, first: Batch, second: Batch) -> torch.Tensor:
        """The loss on the second batch after a virtual step on the first, a scalar whose gradient reaches the weights' network."""
        everything = dict(self.program.named_parameters())
        names = [name for name in everything if everything[name].requires_grad and (self.parameters is None or name in self.parameters)]
        if not names:
            raise PlanError("no parameter requires gradients, so a virtual step moves nothing", "unfreeze the heads at least")
        moved = {name: everything[name] for name in names}
        with sdpa_kernel(SDPBackend.MATH):  # the other ways to compute attention have no second derivative
            losses = per_sample(self._run(moved, first[0]), first[1])
            weighted = (self.weights(losses) * losses).mean(0).sum()
            gradients = torch.autograd.grad(weighted, list(moved.values()), create_graph=True, allow_unused=True)
            after = {
                name: parameter if gradient is None else parameter - self._rate(parameter) * gradient
                for (name, parameter), gradient in zip(moved.items(), gradients)
            }
            outputs = self._run(after, second[0])
        losses = per_sample(outputs, second[1])
        confidence = torch.stack([logits.detach().float().softmax(1).amax(1) for logits in outputs.logits])
        leaves_here = nn.functional.one_hot(deal_out(confidence, self.shares), len(self.shares))
        return (torch.where(leaves_here > 0, losses, 0).sum(0) / leaves_here.sum(0).clamp(min=1)).sum()

    def _run(self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> ExitOutputs:
        """The network with these in place of its parameters; the statistics of its norms stay as they are."""
        statistics = {name: buffer.clone() for name, buffer in self.program.named_buffers()}
        outputs: ExitOutputs = functional_call(self.program, {**statistics, **tensors}, (x,), {"all_exits": True})
        return outputs

    def _rate(self, parameter: nn.Parameter) -> float:
        if not isinstance(self.step, torch.optim.Optimizer):
            return self.step
        rates = [group["lr"] for group in self.step.param_groups if any(other is parameter for other in group["params"])]
        return float(rates[0]) if rates else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: the network, its optimizer, and how many batches there were."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches = state["batches"]


def deal_out(confidence: torch.Tensor, shares: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> torch.Tensor:
    """Return the exit at which each sample leaves, `(N,)`.

    In turn each exit takes, of the samples left, the floor(N share) that it is surest of, of equally sure ones the first; the
    last exit takes the rest.

    Args:
        confidence: `(exits, N)`, higher is surer. shares: Of each exit; they sum to 1.
    """
    exits, count = confidence.shape
    leaves = torch.full((count,), exits - 1, device=confidence.device)
    left = torch.ones(count, dtype=torch.bool, device=confidence.device)
    for k in range(exits - 1):
        order = torch.where(left, confidence[k], -torch.inf).sort(descending=True, stable=True).indices
        taken = order[: int(count * shares[k])]
        leaves[taken] = k
        left[taken] = False
    return leaves


def _processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
