"""Gradient Equilibrium: the gradient of a tensor is the mean of the gradients of the exits that need it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

import torch
from torch import fx

Equilibrium = Literal["", "all", "last"]
"""Which tensors: none, every one that an exit shares with a later one, or only those that heads read."""


class _ScaleGradient(torch.autograd.Function):
    """The identity forward; backward, times a factor."""

    @staticmethod
    def forward(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x.detach()  # not a view to autograd: what comes next may overwrite it in place, as it could without us

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(value: Any, factor: float) -> Any:
    """The value itself, whose gradient is multiplied by `factor` on its way back; of a tuple or list, each tensor's."""
    if isinstance(value, (tuple, list)):
        parts = [scale_gradient(part, factor) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return _ScaleGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return value


def equilibrate(graph: fx.Graph, heads: Sequence[fx.Node], answer: fx.Node, carrying: Collection[str], tensors: Equilibrium) -> None:
    """Insert, in place, what scales gradients: see `exitify.passes.equilibrate_gradients`.

    Let m(a) be how many exits, the last one counted, are computed from the tensor a. A node that reads a, and which m(b)
    exits need, hands back its gradient times m(b)/m(a); a head hands it back times 1/m(a). Along any way from a loss to a
    these factors multiply to 1/m(a).

    Args:
        graph: With heads. heads: Their nodes, each of which reads its value first. answer: The network's own logits.
        carrying: Names of the nodes that hold tensors computed from the input (see `exitify.program.carriers`).
        tensors: `last` scales what heads read alone.
    """
    values = [cast(fx.Node, head.args[0]) for head in heads]
    needs = Counter(node for value in (*values, answer) for node in _ancestry(value, carrying))
    position = {node: i for i, node in enumerate(graph.nodes)}
    reading = dict(zip(heads, values))
    for node in [node for node in needs if tensors == "all" or node in values]:
        readers: dict[int, list[fx.Node]] = {}
        for user in node.users:
            exits = 1 if reading.get(user) is node else needs.get(user, needs[node])
            if exits != needs[node]:
                readers.setdefault(exits, []).append(user)
        for exits, users in readers.items():
            # Not right behind the node: placeholders stand together, and what overwrites a tensor in place comes before its later readers.
            with graph.inserting_before(min(users, key=position.__getitem__)):
                scaled = graph.call_function(scale_gradient, (node, exits / needs[node]))
            for user in users:
                user.replace_input_with(node, scaled)


def _ancestry(value: fx.Node, carrying: Collection[str]) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in found and node.name in carrying:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found
