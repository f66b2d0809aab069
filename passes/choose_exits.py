"""Where exits stand, and with which head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from exitify.errors import PlanError
from exitify.heads import head_cost, head_spec
from exitify.passes.base import Pass
from exitify.passes.cost import node_costs, value_cost
from exitify.passes.dataflow import cut_values, dataflow, strictly_between
from exitify.plan import BOUNDARY_MACS, Cost, ExitPoint, HeadSpec
from exitify.program import Program

OVERHEAD_SHARE = 0.12
"""`auto` places as many exits as heads and boundaries together may add to a run that takes none of them, …"""

MOST_EXITS = 6
"""… but no more than these. Calibration switches off those that do not pay; they then cost nothing."""

HEAD_SHARE = 0.02
"""A convolutional head may cost this share of the network; where it would cost more, the head is linear."""

EARLIEST, LATEST = 0.05, 0.95
"""Exits outside this span of the network's cost are not considered: too early to know, or too late to save."""


@dataclass(frozen=True)
class Considered:
    """A place that was looked at, and what became of it.

    share: Cost of reaching it, as a share of the network's.
    verdict: `exit`, or why it is not one.
    """

    value: str
    place: str
    share: float
    verdict: str


@dataclass(frozen=True)
class ChooseExits(Pass):
    """Decide after which values the network may stop.

    `auto` and a number take values through which everything passes, spaced evenly by cost with heads counted; of
    neighbours with the same cost the last. `auto` places as many as heads and boundaries are worth, which may be none.
    Names, of modules (`layer2.3`) or graph nodes, may be any value: what else is still needed crosses the cut too. No exit
    stands inside of what may be left out.

    Attributes:
        exits: `auto`, `none`, a number, or names separated by commas.
        head: `auto` (convolutional where a feature map is large enough and the network is too), `linear`, `conv`, `mlp`.
    """

    name: ClassVar[str] = "choose-exits"
    exits: str = "auto"
    head: str = "auto"

    def apply(self, program: Program) -> Program:
        points, _ = self.decide(program)
        return program.replace(plan=replace(program.plan, exits=points, segments=()))

    def decide(self, program: Program) -> tuple[tuple[ExitPoint, ...], list[Considered]]:
        """Return the exits and everything that was considered."""
        if program.plan.exits:
            raise PlanError("this network has exits already", "transform the original model")
        costs = node_costs(program)
        full = value_cost(program, costs, program.plan.output)
        if self.exits not in ("auto", "none") and not self.exits.isdecimal():
            values = [_find_value(program, name.strip()) for name in self.exits.split(",")]
            shares = {value: value_cost(program, costs, value).macs / max(full.macs, 1) for value in values}
            chosen = sorted(dict.fromkeys(values), key=lambda value: (shares[value], list(program.values).index(value)))
            heads = [self._head_for(program, value, full) for value in chosen]
            considered = [Considered(value, _ends_module(program, value), shares[value], "exit") for value in chosen]
            for value, name in _skippable(program).items():
                if value in chosen:
                    hint = "exit after a whole stage or its mandatory blocks, or leave out others: --skips"
                    raise PlanError(f"cannot exit after {value!r}: it lies in what {name} may leave out", hint)
        else:
            chosen, heads, considered = self._spaced(program, costs, full)
        points = tuple(ExitPoint(f"exit{i}", value, _ends_module(program, value), head) for i, (value, head) in enumerate(zip(chosen, heads), 1))
        return points, considered

    def _spaced(self, program: Program, costs: dict[str, Cost], full: Cost) -> tuple[list[str], list[HeadSpec], list[Considered]]:
        shares: dict[str, float] = {}
        verdicts: dict[str, str] = {}
        heads: dict[str, HeadSpec] = {}
        candidates = [value for value in cut_values(program) if value != program.plan.input]
        for value in candidates:
            shares[value] = value_cost(program, costs, value).macs / max(full.macs, 1)
        skippable = _skippable(program)
        for value, following in zip(candidates, [*candidates[1:], program.plan.output]):
            if value not in program.values:
                verdicts[value] = "its first dimension is not the batch"
            elif value in skippable:
                verdicts[value] = f"it lies in what {skippable[value]} may leave out"
            elif not EARLIEST <= shares[value] <= LATEST:
                verdicts[value] = f"outside {EARLIEST:.0%} to {LATEST:.0%} of the cost"
            elif shares.get(following) == shares[value] and following in program.values:
                verdicts[value] = f"{following} comes at the same cost"
            else:
                try:
                    heads[value] = self._head_for(program, value, full)
                except PlanError as error:
                    verdicts[value] = error.problem
        overhead = {value: (head_cost(head).macs + BOUNDARY_MACS) / max(full.macs, 1) for value, head in heads.items()}
        count = self._count(overhead)
        chosen = _evenly(list(heads), shares, count)
        while self.exits == "auto" and sum(overhead[value] for value in chosen) > OVERHEAD_SHARE:  # heads dearer than the mean
            count -= 1
            chosen = _evenly(list(heads), shares, count)
        for value in heads:
            verdicts[value] = "exit" if value in chosen else f"not among the {count} spaced evenly" if count else self._why_none(overhead)
        considered = [Considered(value, _ends_module(program, value), shares[value], verdicts[value]) for value in candidates]
        return chosen, [heads[value] for value in chosen], considered

    def _count(self, overhead: dict[str, float]) -> int:
        if self.exits == "none":
            return 0
        if self.exits == "auto":
            mean = sum(overhead.values()) / len(overhead) if overhead else math.inf
            return min(MOST_EXITS, len(overhead), int(OVERHEAD_SHARE / mean))
        if int(self.exits) > len(overhead):
            raise PlanError(
                f"{self.exits} exits asked for, and the network has {len(overhead)} places for one", "`--exits auto`, or a smaller number"
            )
        return int(self.exits)

    def _why_none(self, overhead: dict[str, float]) -> str:
        if self.exits != "auto":
            return "no exits asked for"
        return f"an exit would add {min(overhead.values()):.0%} to every run that passes it, over {OVERHEAD_SHARE:.0%}"

    def _head_for(self, program: Program, value: str, full: Cost) -> HeadSpec:
        classes = program.values[program.plan.output].shape[-1]
        if self.head not in ("auto", "linear", "conv", "mlp"):
            raise PlanError(f"there is no head {self.head!r}", "there are auto, linear, conv, mlp")
        if value == program.plan.output:
            raise PlanError(f"cannot exit after {value!r}: it is the network's own answer", "exit after an earlier block")
        if self.head != "auto":
            return head_spec(self.head, program.values[value], value, classes)
        spec = head_spec("linear", program.values[value], value, classes)
        if spec.layout == "nchw" and min(spec.shape[1:]) >= 4:
            larger = head_spec("conv", program.values[value], value, classes)
            if head_cost(larger).macs <= HEAD_SHARE * full.macs:
                return larger
        return spec


def _skippable(program: Program) -> dict[str, str]:
    """Values that are not computed while a skip path is left out, each with the path's name."""
    flow = dataflow(program)
    return {value: path.name for path in program.plan.skips for value in strictly_between(flow, path.before, path.after)}


def _evenly(candidates: list[str], shares: dict[str, float], count: int) -> list[str]:
    """`count` candidates nearest to evenly spaced shares, no two the same."""
    chosen: list[str] = []
    for i in range(1, count + 1):
        free = [value for value in candidates if value not in chosen]
        chosen.append(min(free, key=lambda value: abs(shares[value] - i / (count + 1))))
    return sorted(chosen, key=candidates.index)


def _ends_module(program: Program, value: str) -> str:
    """The outermost module whose last value this is; else the one that computes it, else its own name."""
    place = program.places[value]
    parts = place.split(".") if place else []
    for depth in range(1, len(parts) + 1):
        outer = ".".join(parts[:depth])
        inside = [v for v, inner in program.places.items() if v in program.values and f"{inner}.".startswith(f"{outer}.")]
        if inside and inside[-1] == value:
            return outer
    return place or value


def _find_value(program: Program, name: str) -> str:
    """The value a user means: a graph node, or the last value computed in a module."""
    computed = set(dataflow(program))
    if name in computed:
        if name not in program.values:
            raise PlanError(f"cannot exit after {name!r}: its first dimension is not the batch", "exit after a block of the network")
        return name
    inside = [v for v, place in program.places.items() if v in program.values and v in computed and (place == name or place.startswith(f"{name}."))]
    if name and inside:
        return inside[-1]
    places = list(dict.fromkeys(place for v, place in program.places.items() if place and v in program.values))
    close = [place for place in places if name.split(".")[0] in place][:6] or places[:6]
    raise PlanError(f"cannot exit after {name!r}: the network has no module or value of that name", f"for instance {', '.join(close)}")
