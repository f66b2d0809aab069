"""The pieces that are compiled, stored and run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx

from exitify.errors import PlanError
from exitify.heads import head_cost
from exitify.passes.base import Pass
from exitify.passes.cost import node_costs
from exitify.passes.dataflow import dataflow
from exitify.plan import SCORES, Cost, Plan, Segment, Value
from exitify.program import HEADS, Program


@dataclass(frozen=True)
class CutSegments(Pass):
    """Cut the graph at its exits.

    The trunk segment of an exit is what this exit needs that is not computed yet (its ancestors, less those of earlier
    exits), so reaching an exit costs the least it can; a head is a segment of its own. What crosses a cut may be several
    values; each must have the batch as its first dimension.
    """

    name: ClassVar[str] = "cut-segments"

    def apply(self, program: Program) -> Program:
        flow = dataflow(program)
        order = [node.name for node in program.graph.nodes if node.name in flow and node.name != program.plan.input]
        heads = {point.name: program.head_node(point.name).name for point in program.plan.exits}
        owned: set[str] = set()
        trunks: list[tuple[str, tuple[str, ...]]] = []
        for goal, value in [*((point.name, point.after) for point in program.plan.exits), ("final", program.plan.output)]:
            needed = (nx.ancestors(flow, value) | {value}) - owned - {program.plan.input}
            trunks.append((goal, tuple(name for name in order if name in needed)))
            owned |= needed
        readers = _readers(program, trunks)
        costs = node_costs(program)
        segments: list[Segment] = []
        for goal, nodes in trunks:
            if nodes:
                segments.append(_trunk(program, f"trunk_{goal}", nodes, readers, costs))
            if goal in heads:
                segments.append(_head(program.plan, goal, heads[goal]))
        crossing = {value for segment in segments for value in (*segment.inputs, *segment.outputs)} | {program.plan.input, program.plan.output}
        values = {name: value for name, value in program.values.items() if name in crossing}
        for point in program.plan.exits:
            shapes = {point.logits: (point.head.classes,), point.features: (point.head.width,), point.scores: (len(SCORES),)}
            values.update({name: Value(shape, "float32") for name, shape in shapes.items()})
        return program.replace(plan=replace(program.plan, segments=tuple(segments), values=values))


def _readers(program: Program, trunks: list[tuple[str, tuple[str, ...]]]) -> dict[str, set[str]]:
    """Which segments read each value, sizes counted: a segment works a size out from the tensor itself."""
    owner = {name: goal for goal, nodes in trunks for name in nodes}
    readers: dict[str, set[str]] = {program.plan.output: {"caller"}}
    for node in program.graph.nodes:
        reader = f"head {node.target}" if str(node.target).startswith(f"{HEADS}.") else owner.get(node.name)
        if reader is None:
            continue
        pending, seen = list(node.all_input_nodes), set()
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            if source.name in owner or source.name == program.plan.input:
                readers.setdefault(source.name, set()).add(reader)
            else:
                pending.extend(source.all_input_nodes)
    return readers


def _trunk(program: Program, name: str, nodes: tuple[str, ...], readers: dict[str, set[str]], costs: dict[str, Cost]) -> Segment:
    goal, inside = name.removeprefix("trunk_"), set(nodes)
    inputs = tuple(n.name for n in program.graph.nodes if n.name not in inside and goal in readers.get(n.name, ()))
    outputs = tuple(n for n in nodes if readers.get(n, set()) - {goal})
    for value in (*inputs, *outputs):
        if value not in program.values:
            raise PlanError(f"cannot cut at {value!r}: the batch is not its first dimension", "exit after a whole block of the network")
    return Segment(name, "trunk", nodes, inputs, outputs, (), sum((costs[n] for n in nodes), Cost()))


def _head(plan: Plan, exit_name: str, node: str) -> Segment:
    point = plan.exit(exit_name)
    outputs, parameters = (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
    return Segment(f"head_{exit_name}", "head", (node,), (point.after,), outputs, parameters, head_cost(point.head))
