"""JEI-DNN: gates that learn where to stop, and heads that learn from the samples that stop at them.

Source: Regol, Chataoui and Coates 2024, "Jointly-Learned Exit and Inference for a Dynamic Neural Network", ICLR.

Here K is the number of early exits and L = K + 1 counts the network's own answer, the last exit, which has no gate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.nn import functional

from exitify.errors import DataError, PlanError
from exitify.heads import scores_of
from exitify.losses import cross_entropies
from exitify.passes.cost import device_of
from exitify.plan import SCORES, Plan
from exitify.program import HEADS, ExitOutputs, in_mode
from exitify.train.skip_distillation import program_of

Mode = Literal["paper", "normalised", "released"]
"""How a head's loss is weighted by the probability that a sample leaves there (see `head_loss`)."""

ClassWeights = Literal["cumulative", "released"]
"""What a gate's positive samples are counted by (see `positive_weights`)."""

Phase = Literal["warmup", "gates", "heads"]
"""What a batch trains."""

MOST_POSITIVE_WEIGHT = 5.0
"""The released code's bound; the paper gives none, and a gate with hardly a positive sample, or hardly a negative one, needs one."""

PATIENCE, MOST_WARMUP_EPOCHS = 2, 6
"""Of the dynamic warm-up: epochs without a better accuracy after which a head rests, and epochs at most."""


class JeiDnn(nn.Module):
    """The loss of a network's heads and of the gates that decide, for each sample, at which of them it leaves.

    A gate is one linear layer on what a head says of its own certainty (`plan.SCORES`). First the heads are warmed up on all
    samples. Then, in turn, `switch_every` batches train the gates to leave where cross-entropy plus `cost_weight` times the
    cost is least, and as many train each head on the samples that leave there. One line in a loop:

        method = JeiDnn(net, cost_weight=1.0, warmup=3 * len(loader))
        optimizer = Adam([*(p for p in net.parameters() if p.requires_grad), *method.parameters()], 0.01)
        ...
        loss = method(x, y)

    `parameters()` are the gates' alone. `optimizer.zero_grad()` leaves no gradients, so whichever half does not train rests;
    with `set_to_none=False` weight decay and momentum would move it. The paper freezes the backbone (`net.freeze_backbone()`);
    where it is not frozen, the last exit's term in Eq. 14 trains it. Where heads are trained on recorded features,
    `method.loss(outputs, y)` takes their logits. Batches count in train() where gradients are on: a validation loop under
    `torch.no_grad()` moves no phase. DistributedDataParallel around the model does not average the gates' gradients.

    Args:
        network: A Program with exits, or what wraps one; or a plan alone, for `loss`.
        cost_weight: λ of Eq. 5, what the whole network's cost is worth in nats of cross-entropy; the paper's runs from 0.01 to 10.
        warmup: How many batches warm the heads up, 0 for heads that are trained already; or `dynamic`: until
            `end_warmup_epoch` has seen every head's accuracy stop growing.
        mode: Weights of the heads' losses; the paper's are the default.
        switch_every: Batches after which gates and heads change places, on across epochs as in algorithm 1; the released
            code's number. It starts each epoch with the gates, which `new_epoch` does.
        class_weights: How positive samples are weighted after `reweight`; None weighs them as the others. The paper speaks of the
            class imbalance of the gates' binary tasks, which is `cumulative`.
        costs: What leaving at each exit costs, the last one among them, in any unit; None takes Eq. 18's from the plan.
        heads: By exit, for the dynamic warm-up of a plan alone; a Program's own otherwise.

    Attributes:
        gates: `nn.Linear(4, 1)` by early exit's name. They start at random: seed torch to get the same again.
        positive_weights: Of each gate's positive samples, `(K,)`; ones until `reweight`.

    Raises:
        PlanError: there are no early exits, or an option is not one of those there are.
    """

    costs: torch.Tensor
    positive_weights: torch.Tensor

    def __init__(
        self,
        network: nn.Module | Plan,
        *,
        cost_weight: float,
        warmup: int | Literal["dynamic"],
        mode: Mode = "paper",
        switch_every: int = 200,
        class_weights: ClassWeights | None = "cumulative",
        costs: Mapping[str, float] | None = None,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        program = None if isinstance(network, Plan) else program_of(network)
        plan = network if isinstance(network, Plan) else program_of(network).plan
        if not plan.exits:
            raise PlanError("the network has no early exits to learn gates for", 'exitify.transform(model, example, exits="auto")')
        _check_choice("mode", mode, get_args(Mode))
        _check_choice("way to weigh classes", class_weights, (*get_args(ClassWeights), None))
        _check_cost_weight(cost_weight)
        if warmup != "dynamic" and (isinstance(warmup, str) or warmup < 0):
            raise PlanError(f"a warm-up of {warmup!r} is no number of batches", "give a number from 0 up, or 'dynamic'")
        if switch_every < 1:
            raise PlanError(f"gates and heads cannot change places every {switch_every} batches", "give a number from 1 up")
        if heads is None and program is not None:
            heads = dict(program.get_submodule(HEADS).named_children())
        self.names = plan.exit_names
        if warmup == "dynamic" and (heads is None or set(heads) != set(self.names[:-1])):
            raise PlanError("a dynamic warm-up sets heads back to their best weights, and some are missing", "give heads={exit's name: module}")
        self.cost_weight, self.warmup, self.mode = cost_weight, warmup, mode
        self.switch_every, self.class_weights = switch_every, class_weights
        self.gates = nn.ModuleDict({name: nn.Linear(len(SCORES), 1) for name in self.names[:-1]})
        self.register_buffer("positive_weights", torch.ones(len(self.gates)))
        relative = _relative(costs, self.names) if costs is not None else relative_costs(plan)
        self.register_buffer("costs", torch.tensor([relative[name] for name in self.names]), persistent=False)
        if program is not None:
            self.to(device_of(program))
        # In a tuple and a dict, and so no children: their parameters are the user's to train.
        self._network = () if isinstance(network, Plan) else (network,)
        self._heads = dict(heads or {})
        self._is_warm = warmup == 0
        self._batches = 0  # of this warm-up, then since gates and heads began to change places
        self._accuracies: dict[str, list[float]] = {name: [] for name in self.gates}
        self._best: dict[str, dict[str, torch.Tensor]] = {}
        self._resting: list[nn.Parameter] = []

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the next batch trains."""
        if not self._is_warm:
            return "warmup"
        return "heads" if self._batches // self.switch_every % 2 else "gates"

    def forward(self, x: Any, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar; while gates are trained the network runs as a device runs it, in eval().

        Raises:
            PlanError: the method was made from a plan alone.
        """
        return self.loss(self._at_rest(x) if self.phase == "gates" else self._run(x), y)

    def loss(self, outputs: ExitOutputs, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch whose logits are known, a scalar.

        Raises:
            PlanError: the outputs are not of these exits.
        """
        self._check(outputs)
        phase = self.phase
        if self.training and torch.is_grad_enabled():
            self._batches += 1
            if phase == "warmup" and self._batches == self.warmup:
                self._is_warm, self._batches = True, 0
        if phase == "warmup":
            return self._warmup_loss(outputs, y)
        losses = cross_entropies(outputs.logits, y)
        if phase == "gates":
            best = best_exits(losses.detach(), self.costs, self.cost_weight)
            return gate_loss(self._gate_logits(outputs), best, self.positive_weights)
        return head_loss(losses, self.probabilities(outputs), self.mode)

    def _warmup_loss(self, outputs: ExitOutputs, y: torch.Tensor) -> torch.Tensor:
        """Eq. 17 without its learning rate, which is the optimizer's; heads that rest are left out."""
        count = len(self.gates)
        terms = [
            (count - i) * functional.cross_entropy(logits.float(), y)
            for i, (name, logits) in enumerate(zip(self.gates, outputs.logits))
            if not _has_peaked(self._accuracies[name])
        ]
        return torch.stack(terms).sum()

    def new_epoch(self) -> None:
        """Begin with the gates again, as the released code does at each epoch's start; in the warm-up nothing changes."""
        if self._is_warm:
            self._batches = 0

    def end_warmup_epoch(self, accuracies: Mapping[str, float]) -> None:
        """Judge the heads after an epoch of the dynamic warm-up (`accuracies` computes what is needed).

        A head whose accuracy has not grown for PATIENCE epochs gets its best weights back and rests until the others have
        come as far, or MOST_WARMUP_EPOCHS are over. Then all have their best weights and are trained on.

        Args:
            accuracies: By early exit's name, on validation samples, in [0, 1].

        Raises:
            PlanError: the warm-up is not dynamic, or is over. DataError: an exit's accuracy is missing, or is none.
        """
        if self.warmup != "dynamic" or self._is_warm:
            raise PlanError("there is no dynamic warm-up going on", "JeiDnn(..., warmup='dynamic'), and call this while method.phase is 'warmup'")
        for name in self.gates:
            if not 0 <= accuracies.get(name, math.nan) <= 1:
                raise DataError(f"the accuracy of {name} is {accuracies.get(name)}, not in [0, 1]", "give one of every early exit")
        for name, history in self._accuracies.items():
            if _has_peaked(history):
                continue
            history.append(float(accuracies[name]))
            if history.index(max(history)) == len(history) - 1:
                self._best[name] = copy.deepcopy(self._heads[name].state_dict())
            if _has_peaked(history):
                self._heads[name].load_state_dict(self._best[name])
                self._rest(name)
        histories = list(self._accuracies.values())
        if all(map(_has_peaked, histories)) or max(map(len, histories)) == MOST_WARMUP_EPOCHS:
            self._end_warmup()

    def _rest(self, name: str) -> None:
        trained = [parameter for parameter in self._heads[name].parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._resting += trained

    def _end_warmup(self) -> None:
        for name, best in self._best.items():  # those that rest too: statistics of their norms do not
            self._heads[name].load_state_dict(best)
        for parameter in self._resting:
            parameter.requires_grad_(True)
        self._best, self._resting, self._is_warm, self._batches = {}, [], True, 0

    # --- validation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accuracies(self, batches: Iterable[tuple[Any, torch.Tensor]]) -> dict[str, float]:
        """Accuracy of every exit, by name, on batches `(x, y)`; x may be `ExitOutputs`.

        Raises:
            PlanError: outputs are not of these exits. DataError: there are no samples.
        """
        right, samples = torch.zeros(len(self.names), dtype=torch.float64), 0
        for outputs, y in self._validated(batches):
            right += torch.stack([(logits.argmax(1) == y).sum() for logits in outputs.logits]).cpu()
            samples += len(y)
        _check_samples(samples)
        return dict(zip(self.names, (right / samples).tolist()))

    @torch.no_grad()
    def reweight(self, batches: Iterable[tuple[Any, torch.Tensor]]) -> None:
        """Weigh the gates' positive samples by validation batches `(x, y)`, as after each epoch; x may be `ExitOutputs`.

        Raises:
            PlanError: outputs are not of these exits. DataError: there are no samples.
        """
        counts = torch.zeros(len(self.names), dtype=torch.int64)
        for outputs, y in self._validated(batches):
            best = best_exits(cross_entropies(outputs.logits, y), self.costs, self.cost_weight)
            counts += torch.bincount(best, minlength=len(self.names)).cpu()
        _check_samples(int(counts.sum()))
        self.positive_weights.copy_(positive_weights(counts, self.class_weights))

    def probabilities(self, outputs: ExitOutputs) -> torch.Tensor:
        """P(G = l), that a sample leaves at each exit, `(N, L)`."""
        return exit_probabilities(self._gate_logits(outputs).sigmoid())

    @torch.no_grad()
    def chosen_exits(self, outputs: ExitOutputs) -> torch.Tensor:
        """Where each sample leaves, `(N,)`, counted from 0: at the first exit with P(E) of at least a half (section 5)."""
        self._check(outputs)
        return (stop_probabilities(self.probabilities(outputs)) >= 0.5).int().argmax(dim=1)

    def gate_settings(self) -> dict[str, tuple[float, ...]]:
        """Each gate's four weights, in the order of `plan.SCORES`, and its bias: `ExitSetting.gate`, for the temperature 1."""
        return {name: _five(*gate.parameters()) for name, gate in self.gates.items()}

    # --- inside -----------------------------------------------------------------------------------------------------

    def _run(self, x: Any) -> ExitOutputs:
        if not self._network:
            raise PlanError("a plan alone cannot run", "method.loss(outputs, y), or make the method from the Program")
        outputs: ExitOutputs = self._network[0](x, all_exits=True)
        return outputs

    def _at_rest(self, x: Any) -> ExitOutputs:
        with in_mode(nn.ModuleList(self._network), training=False), torch.no_grad():
            return self._run(x)

    def _validated(self, batches: Iterable[tuple[Any, torch.Tensor]]) -> Iterable[tuple[ExitOutputs, torch.Tensor]]:
        for x, y in batches:
            outputs = x if isinstance(x, ExitOutputs) else self._at_rest(x)
            self._check(outputs)
            yield outputs, y

    def _gate_logits(self, outputs: ExitOutputs) -> torch.Tensor:
        return torch.cat([gate(gate_features(outputs[name])) for name, gate in self.gates.items()], dim=1)

    def _check(self, outputs: ExitOutputs) -> None:
        if outputs.names != self.names:
            raise PlanError(f"the outputs are of {', '.join(outputs.names)}", f"this method's exits are {', '.join(self.names)}")

    def get_extra_state(self) -> dict[str, Any]:
        """How far the method has come, for `state_dict()`."""
        return {"is_warm": self._is_warm, "batches": self._batches, "accuracies": copy.deepcopy(self._accuracies), "best": dict(self._best)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for parameter in self._resting:
            parameter.requires_grad_(True)
        self._is_warm, self._batches, self._resting = state["is_warm"], state["batches"], []
        self._accuracies, self._best = copy.deepcopy(state["accuracies"]), dict(state["best"])
        for name, history in self._accuracies.items():
            if not self._is_warm and _has_peaked(history):
                self._rest(name)


# --- the paper's equations ------------------------------------------------------------------------------------------


def gate_features(logits: torch.Tensor) -> torch.Tensor:
    """What a gate reads, `(N, 4)`: `plan.SCORES` of logits `(N, classes)`, as a head computes them at the temperature 1.

    Appendix 9.9, with entropies as they are usually signed. No gradient reaches the logits: that is the second term of
    Eq. 14, which the paper leaves out (appendix 9.7).
    """
    return scores_of(logits.detach().float())


def exit_probabilities(g: torch.Tensor) -> torch.Tensor:
    """P(G = l), `(N, L)`, of the gates' outputs `(N, K)` in [0, 1]: Eqs. 7 and 8; the last exit takes what is left."""
    left = _left(g)
    return torch.cat((torch.minimum(g, left[:, :-1]), left[:, -1:]), dim=1)


def stop_probabilities(probabilities: torch.Tensor) -> torch.Tensor:
    """P(E_l), that a sample which came as far leaves at l, `(N, L)`, of P(G = l): Eq. 4 solved for it.

    The product over earlier exits of 1 - P(E_j) is 1 minus the sum of their P(G = j). Where nothing is left of it no sample
    comes by, and an early exit's is 0, as in `exitify.runtime.policies`; the last exit's is always 1.
    """
    left = _left(probabilities[:, :-1])
    stop = torch.where(left > 0, probabilities / left, 0.0).clamp(0, 1)
    return torch.cat((stop[:, :-1], torch.ones_like(stop[:, -1:])), dim=1)


def _left(shares: torch.Tensor) -> torch.Tensor:
    """What the shares before it leave of 1 to each column, and to one column more."""
    return (1 - functional.pad(shares.cumsum(dim=1), (1, 0))).clamp(min=0)


def best_exits(losses: torch.Tensor, costs: torch.Tensor, cost_weight: float) -> torch.Tensor:
    """l*, `(N,)` from 0: where loss plus weighted cost is least (section 4.1); the earliest of equals.

    Args:
        losses: `(N, L)`. costs: `(L,)`, the last one 1.
    """
    return (losses + cost_weight * costs).argmin(dim=1)


def gate_loss(gate_logits: torch.Tensor, best: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the gates, a sum over them and a mean over samples (Eq. 16): gate j should open where j >= l*.

    Args:
        gate_logits: `(N, K)`. best: l*, `(N,)`. weights: Of each gate's positive samples, `(K,)`.
    """
    targets = torch.arange(gate_logits.shape[1], device=best.device) >= best[:, None]
    loss = functional.binary_cross_entropy_with_logits(gate_logits, targets.to(gate_logits.dtype), pos_weight=weights, reduction="none")
    return loss.sum(dim=1).mean()


def head_loss(losses: torch.Tensor, probabilities: torch.Tensor, mode: Mode = "paper") -> torch.Tensor:
    """The heads' loss with the gates at rest, a scalar: no gradient reaches the probabilities.

    `paper`: the sum over exits of P(G = l) times the loss, a mean over samples (Eq. 14). `normalised` and `released` scale each
    sample's weighted losses to the sum of its losses, over early exits alone, and take the mean over these too. `released` is the
    public code: the scale has a gradient there, their product is the sum of the losses whatever the gates say, and so heads
    are trained on the unweighted mean. `normalised` holds the scale constant.

    Args:
        losses: `(N, L)`. probabilities: P(G = l), `(N, L)`.
    """
    weighted = probabilities.detach() * losses
    if mode == "paper":
        return weighted.sum(dim=1).mean()
    weighted, total = weighted[:, :-1], losses[:, :-1].sum(dim=1, keepdim=True)
    scale = total / weighted.sum(dim=1, keepdim=True).clamp(min=torch.finfo(losses.dtype).tiny)
    return (weighted * (scale.detach() if mode == "normalised" else scale)).mean()


def positive_weights(counts: torch.Tensor, class_weights: ClassWeights | None) -> torch.Tensor:
    """How much a positive sample weighs against a negative one at each gate, `(K,)`: negatives by positives, within bounds.

    `cumulative` counts what a gate's targets are: its positives are samples whose best exit is this or an earlier one; the bounds are
    1/5 and 5. `released` is the public code, whose positives are those best at exactly this exit, so that late gates' weigh
    more; its bound is 5 alone, and a gate at which all samples are best does not learn.

    Args:
        counts: How many samples are best at each exit, `(L,)`.
    """
    if class_weights is None:
        return torch.ones(len(counts) - 1)
    positives = (counts.cumsum(dim=0) if class_weights == "cumulative" else counts)[:-1].float()
    least = 1 / MOST_POSITIVE_WEIGHT if class_weights == "cumulative" else 0.0
    return ((counts.sum() - positives) / positives.clamp(min=0.1)).clamp(least, MOST_POSITIVE_WEIGHT)


def gate_operations(classes: int) -> int:
    """What a gate and its features cost, as the paper counts (tables 2 and 3): 96 for 10 classes, 906 for 100.

    Maximum, margin, entropy, entropy of p²/Σp², and the linear layer with its bias, in this order.
    """
    return classes + (classes + 1) + 2 * classes + 5 * classes + (len(SCORES) + 1)


def relative_costs(plan: Plan) -> dict[str, float]:
    """IC_norm by exit: multiply-adds up to it, heads and gates tried on the way counted, against the last exit's (Eq. 18).

    Raises:
        PlanError: the plan has no segments, and so no costs.
    """
    if not plan.segments:
        raise PlanError("the plan does not say what its exits cost", "apply the pass cut-segments, or give costs=")
    reached = plan.macs_at(plan.exit_names)
    gates = [*range(1, len(plan.exits) + 1), len(plan.exits)]  # the last exit has none
    return _relative({name: reached[name] + count * gate_operations(plan.classes) for name, count in zip(plan.exit_names, gates)}, plan.exit_names)


# --- gates alone ----------------------------------------------------------------------------------------------------


def fit_gates(
    logits: ArrayLike,
    labels: ArrayLike,
    costs: Sequence[float],
    cost_weight: float,
    *,
    class_weights: ClassWeights | None = "cumulative",
    temperatures: Sequence[float] | None = None,
    weight_decay: float = 5e-4,
) -> tuple[tuple[float, ...], ...]:
    """Gates for heads that stay as they are (the paper's ablation, appendix 9.6), from recorded outputs.

    Each gate's loss is convex: L-BFGS finds its one minimum, the same every time.

    Args:
        logits: `(K + 1, N, classes)`, the network's own last, of samples that it was not trained on.
        labels: Classes, `(N,)`.
        costs: Of leaving at each exit, the last one among them, in any unit.
        cost_weight: λ of Eq. 5.
        class_weights: See `positive_weights`.
        temperatures: Divide the logits of each exit, `(K + 1,)`: those that the profile will have; None is 1 everywhere.
        weight_decay: Half of it times the squares of a gate's numbers is added to its loss; the paper's number.

    Returns:
        Each gate's four weights, in the order of `plan.SCORES`, and its bias: `ExitSetting.gate`.

    Raises:
        DataError: shapes, labels or numbers do not fit. PlanError: costs, weights or an option make no sense.
    """
    values, y = np.asarray(logits), np.asarray(labels)
    _check_recorded(values, y)
    _check_choice("way to weigh classes", class_weights, (*get_args(ClassWeights), None))
    _check_cost_weight(cost_weight)
    if not weight_decay > 0:
        raise PlanError(f"a weight decay of {weight_decay} leaves gates without bounds", "give a number over 0, such as 5e-4")
    names = tuple(str(i) for i in range(len(values)))
    if len(costs) != len(names):
        raise PlanError(f"{len(costs)} costs are given for {len(names)} exits", "give one an exit, the network's own last")
    relative = _relative(dict(zip(names, costs)), names)
    scales = [1.0] * len(names) if temperatures is None else list(temperatures)
    if len(scales) != len(names) or not all(0 < scale < math.inf for scale in scales):
        raise PlanError(f"the temperatures {scales} are not one number over 0 for each of {len(names)} exits")
    at_temperature = [torch.from_numpy(np.asarray(value, np.float32)) / scale for value, scale in zip(values, scales)]
    losses = cross_entropies(at_temperature, torch.from_numpy(y.astype(np.int64)))
    best = best_exits(losses, torch.tensor([relative[name] for name in names]), cost_weight)
    weights = positive_weights(torch.bincount(best, minlength=len(names)), class_weights).double()
    fitted = []
    for i, weight in enumerate(weights):
        features = gate_features(at_temperature[i]).double()
        fitted.append(_fit_gate(features, (best <= i).double(), weight, weight_decay))
    return tuple(fitted)


def _fit_gate(features: torch.Tensor, targets: torch.Tensor, positive_weight: torch.Tensor, weight_decay: float) -> tuple[float, ...]:
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.binary_cross_entropy_with_logits(features @ weight + bias, targets, pos_weight=positive_weight)
        value = value + weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _five(weight, bias)


# --- small things ---------------------------------------------------------------------------------------------------


def _five(weight: torch.Tensor, bias: torch.Tensor) -> tuple[float, ...]:
    return (*weight.detach().flatten().tolist(), bias.item())


def _has_peaked(accuracies: Sequence[float]) -> bool:
    """Whether the last PATIENCE of these are no better than one before."""
    return bool(accuracies) and len(accuracies) - 1 - accuracies.index(max(accuracies)) >= PATIENCE


def _relative(costs: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    if set(costs) != set(names) or not all(0 < cost < math.inf for cost in costs.values()):
        given = ", ".join(f"{name} {cost}" for name, cost in costs.items())
        raise PlanError(f"the costs {given or 'given'} are not one number over 0 for each exit", f"the exits are {', '.join(names)}")
    return {name: costs[name] / costs[names[-1]] for name in names}


def _check_choice(what: str, choice: object, choices: tuple[object, ...]) -> None:
    if choice not in choices:
        raise PlanError(f"there is no {what} {choice!r}", f"there are {', '.join(map(str, choices))}")


def _check_cost_weight(cost_weight: float) -> None:
    if not 0 <= cost_weight < math.inf:
        raise PlanError(f"a cost cannot weigh {cost_weight}", "give a number from 0 up, such as 1.0")


def _check_samples(count: int) -> None:
    if not count:
        raise DataError("there are no validation samples", "give batches (x, y)")


def _check_recorded(logits: NDArray[Any], labels: NDArray[Any]) -> None:
    if logits.ndim != 3 or len(logits) < 2 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise DataError(
            f"the logits have shape {logits.shape}, not (exits, samples, classes)", "give at least one early exit's and the network's own"
        )
    if labels.shape != logits.shape[1:2] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[2]:
        raise DataError(f"the labels, {labels.dtype} {labels.shape}, are not a class of {logits.shape[2]} for each of {logits.shape[1]} samples")
    if not np.isfinite(logits).all():
        raise DataError("the logits are not all finite", "look for what made them infinite before gates learn from them")
