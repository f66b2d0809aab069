"""A head at every exit of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from exitify.errors import PlanError
from exitify.heads import ExitHead
from exitify.passes.base import Pass
from exitify.program import HEADS, Program, copy_graph


@dataclass(frozen=True)
class AttachHeads(Pass):
    """Insert the heads that the plan names, untrained, as `exit_heads.<exit>`.

    A head is called right after the value that it reads, so a later in-place operation on that value does not reach it;
    one that reads an earlier head's logits too, after both.
    Weights come from torch's global generator: seed it to get the same heads again.
    """

    name: ClassVar[str] = "attach-heads"

    def apply(self, program: Program) -> Program:
        if not program.plan.exits:
            return program.replace()
        if HEADS in program._modules:
            raise PlanError(f"the network has a module {HEADS!r} already", "transform the original model; if the module is its own, rename it")
        graph, renamed = copy_graph(program.graph)
        nodes = {node.name: new for node, new in renamed.items()}
        heads, called = nn.ModuleDict(), dict[str, fx.Node]()
        for point in program.plan.exits:
            heads[point.name] = ExitHead(point.head)
            value = nodes[point.after]
            last = value if value.op != "placeholder" else [node for node in graph.nodes if node.op == "placeholder"][-1]
            read = (value, called[point.previous]) if point.previous else (value,)
            with graph.inserting_after(max(last, *read[1:]) if read[1:] else last):
                called[point.name] = graph.call_module(f"{HEADS}.{point.name}", read)
        heads.train(program.training)
        return program.replace(graph=graph, members={HEADS: heads})
