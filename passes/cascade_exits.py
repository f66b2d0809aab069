"""Heads that read what an earlier exit said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from exitify.errors import PlanError
from exitify.passes.base import Pass
from exitify.plan import PATHS, ExitPoint
from exitify.program import Program


@dataclass(frozen=True)
class CascadeExits(Pass):
    """Let each exit's head but the first use the logits of the exit before it.

    Reaching an exit then costs the heads of all exits before it, whether or not they may be taken.

    Attributes:
        path: How: `identity`, `learned`, `layer_norm`, `boosted` or `ensemble` (see `exitify.plan.HeadSpec`).
    """

    name: ClassVar[str] = "cascade-exits"
    path: str = "identity"

    def apply(self, program: Program) -> Program:
        if self.path not in PATHS:
            raise PlanError(f"there is no path {self.path!r} from head to head", f"there are {', '.join(PATHS)}")
        if program.plan.segments or any(str(node.target).startswith("exit_heads.") for node in program.graph.nodes):
            raise PlanError("this network's heads are in place already", "transform the original model, with `--cascade`")
        points: list[ExitPoint] = []
        for point in program.plan.exits:
            if points:
                point = replace(point, previous=points[-1].name, head=replace(point.head, path=cast(Any, self.path)))
            points.append(point)
        return program.replace(plan=replace(program.plan, exits=tuple(points)))
