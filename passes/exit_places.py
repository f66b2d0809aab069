"""Where a network could stop: what computing each place costs, and what would cross the cut."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import nn

from exitify.passes.cost import node_costs
from exitify.passes.dataflow import bare_name, cut_values, dataflow, strictly_between
from exitify.plan import Cost
from exitify.program import Program

WIDE_SHARE = 0.15
"""Where more than this share of the cost lies between two values that everything passes, cuts of several tensors are looked at …"""

MODULE_SHARE = 0.3
"""… behind each outermost module in it; of one that is more than this share behind each of its parts."""

BRANCH_VALUES = 3
"""A cut in front of an addition that hands on the stretch's beginning and less than so many others (a branch, its gate) lies in a residual
branch: no place, the block's end is one."""

WHOLE_SHARE = 0.8
"""A wide cut has to use this share of what is computed up to it: elsewhere half of a network would be left behind."""


@dataclass(frozen=True)
class Place:
    """A value after which the network could stop.

    place: The module that ends there, as the user knows it.
    share: Cost of computing it and nothing else, as a share of the network's.
    crossing: The values that the rest of the network reads when it goes on from there; the value itself, if the rest reads it.
    crossing_bytes: Their size for one sample.
    """

    value: str
    place: str
    share: float
    crossing: tuple[str, ...]
    crossing_bytes: int


class Places:
    """A program's values, with what it costs to reach each and what crosses a cut there."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flow = dataflow(program)
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.order = {name: i for i, name in enumerate(self.nodes)}
        self.costs = node_costs(program)
        self.full = self._total(self._needed([program.plan.output]))
        self.ends = _module_ends(program)

    def narrow(self) -> list[Place]:
        """Values through which everything passes, in order: a cut there is one tensor wide."""
        found, needed, macs = [], set[str](), 0
        for value in cut_values(self.program):
            new = self._needed([value], needed)
            macs += self._total(new).macs
            needed |= new
            if value not in self.program.plan.inputs:
                found.append(Place(value, self.place_of(value), macs / max(self.full.macs, 1), (value,), self._bytes([value])))
        return found

    def wide(self, narrow: Sequence[Place]) -> list[Place]:
        """Ends of modules where the network has no narrow place for long: a cut there is several tensors wide."""
        found: list[Place] = []
        ends = [Place(self.program.plan.input, "", 0.0, (), 0), *narrow, Place(self.program.plan.output, "", 1.0, (), 0)]
        for before, after in itertools.pairwise(ends):
            if after.share - before.share > WIDE_SHARE:
                between = strictly_between(self.flow, before.value, after.value)
                places = [self.at(value) for value in self._ends_between(sorted(between, key=self.order.__getitem__))]
                is_branch = self._adds(after.value)
                found += [place for place in places if not (is_branch and before.value in place.crossing and len(place.crossing) <= BRANCH_VALUES)]
        return found

    def at(self, value: str) -> Place:
        """Any value as a place."""
        needed = self._needed([value])
        crossing = self._crossing(needed & set(self.flow))
        return Place(value, self.place_of(value), self._total(needed).macs / max(self.full.macs, 1), crossing, self._bytes(crossing))

    def place_of(self, value: str) -> str:
        """The outermost module whose last value this is; else the one that computes it, else its own name."""
        return self.ends.get(value) or self.program.places[value] or value

    def layout_of(self, value: str) -> str:
        """How a value of three dimensions is laid out, told by the nearest layer before it; empty where its shape alone tells."""
        shape = self.program.values[value].shape
        if len(shape) != 3 or shape[0] == shape[-1]:
            return ""
        pending, seen = [value], set[str]()
        while pending and len(seen) < 64:
            name = pending.pop(0)
            if name in seen:
                continue
            seen.add(name)
            node = self.nodes[name]
            if node.op == "call_module" and self.program.values.get(name) is not None and len(self.program.values[name].shape) == 3:
                module = self.program.get_submodule(str(node.target))
                if isinstance(module, nn.modules.conv._ConvNd) and module.out_channels in (shape[0], shape[-1]):
                    return "nchw" if module.out_channels == shape[0] else "nhwc"
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_features in (shape[0], shape[-1]):
                    return "nchw" if module.num_features == shape[0] else "nhwc"
                width = (
                    module.out_features if isinstance(module, nn.Linear) else module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else 0
                )
                if width in (shape[0], shape[-1]):
                    return "nhwc" if width == shape[-1] else "nchw"
            pending += [source.name for source in node.all_input_nodes if source.name in self.flow]
        return ""

    def _adds(self, value: str) -> bool:
        """Whether a value is a sum of two."""
        return bare_name(self.nodes[value]) in ("add", "add_", "iadd")

    def _ends_between(self, names: Sequence[str]) -> list[str]:
        """The last values of modules in a stretch that use nearly all that is computed up to them."""
        inside = set(names)
        ends: list[str] = []
        pending = [""]
        while pending:
            outer = pending.pop()
            for module, own in self._children(outer, names).items():
                is_whole = {name for name in self.flow if _is_inside(self.program.places[name], module)} <= inside
                share = self._total(own).macs / max(self.full.macs, 1)
                if not is_whole or (share > MODULE_SHARE and len(own) > 1):
                    pending.append(module)
                else:
                    ends += [next((name for name in reversed(own) if name in self.program.values), "")]
        return [value for value in sorted(filter(None, dict.fromkeys(ends)), key=self.order.__getitem__) if self._uses_most(value, names)]

    def _children(self, outer: str, names: Iterable[str]) -> dict[str, list[str]]:
        """The modules directly in one, with the nodes of theirs that are among these."""
        depth = len(outer.split(".")) if outer else 0
        found: dict[str, list[str]] = {}
        for name in names:
            parts = self.program.places[name].split(".")
            if len(parts) > depth and parts[0] and parts[:depth] == (outer.split(".") if outer else []):
                found.setdefault(".".join(parts[: depth + 1]), []).append(name)
        return found

    def _uses_most(self, value: str, names: Sequence[str]) -> bool:
        until = {name for name in names if self.order[name] <= self.order[value]}
        used = (nx.ancestors(self.flow, value) | {value}) & until
        return self._total(used).macs >= WHOLE_SHARE * max(self._total(until).macs, 1)

    def _needed(self, values: Iterable[str], without: Collection[str] = ()) -> set[str]:
        """What has to be computed for these values, sizes and constants included."""
        needed: set[str] = set()
        pending = list(values)
        while pending:
            name = pending.pop()
            if name not in needed and name not in without:
                needed.add(name)
                pending.extend(source.name for source in self.nodes[name].all_input_nodes)
        return needed

    def _crossing(self, needed: Collection[str]) -> tuple[str, ...]:
        read = {name for name in needed for user in self.flow.successors(name) if user not in needed}
        return tuple(sorted(read, key=self.order.__getitem__))

    def _bytes(self, values: Iterable[str]) -> int:
        return sum(self.program.values[value].size_bytes for value in values if value in self.program.values)

    def _total(self, names: Iterable[str]) -> Cost:
        none = Cost()
        costs = [self.costs.get(name, none) for name in names]
        return Cost(sum(c.macs for c in costs), sum(c.parameters for c in costs), sum(c.moved_bytes for c in costs))


def skippable(program: Program) -> dict[str, str]:
    """Values that are not computed while a skip path is left out, each with the path's name."""
    flow = dataflow(program)
    return {value: path.name for path in program.plan.skips for value in strictly_between(flow, path.before, path.after)}


def _module_ends(program: Program) -> dict[str, str]:
    """The outermost module that each value is the last of, for those that are the last of one."""
    last: dict[str, str] = {}
    for value, place in program.places.items():
        if value in program.values and place:
            parts = place.split(".")
            for depth in range(1, len(parts) + 1):
                last[".".join(parts[:depth])] = value
    ends: dict[str, str] = {}
    for module, value in last.items():
        if value not in ends or len(module.split(".")) < len(ends[value].split(".")):
            ends[value] = module
    return ends


def _is_inside(place: str, module: str) -> bool:
    return f"{place}.".startswith(f"{module}.")
