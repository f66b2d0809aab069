"""The pieces that are compiled, stored and run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx

from exitify.errors import PlanError
from exitify.heads import head_cost
from exitify.passes.base import Pass
from exitify.passes.cost import node_costs
from exitify.passes.dataflow import ancestry, dataflow
from exitify.plan import SCORES, Cost, Plan, Segment, Value
from exitify.program import HEADS, Program

BLOCK = "block "
"""What the goal of a skippable sub-path begins with; no exit and no skip path has a space in its name."""


@dataclass(frozen=True)
class CutSegments(Pass):
    """Cut the graph at its exits, and before and after what may be left out.

    The trunk segment of an exit is what this exit needs that is not computed yet (its ancestors, less those of earlier
    exits), so reaching an exit costs the least it can; a head is a segment of its own, and so is a skippable sub-path.
    What crosses a cut may be several values; each must have the batch as its first dimension.
    """

    name: ClassVar[str] = "cut-segments"

    def apply(self, program: Program) -> Program:
        flow = dataflow(program)
        order = [node.name for node in program.graph.nodes if node.name in flow and node.name not in program.plan.inputs]
        heads = {point.name: program.head_node(point.name).name for point in program.plan.exits}
        owned: set[str] = set()
        pieces: list[_Piece] = []
        for goal, value in _goals(program, flow):
            needed = ancestry(flow, value, owned | set(program.plan.inputs))
            pieces.append(_Piece(goal, tuple(name for name in order if name in needed)))
            owned |= needed
        readers = _readers(program, pieces)
        costs = node_costs(program)
        segments: list[Segment] = []
        for piece in pieces:
            if piece.nodes:
                segments.append(_segment(program, piece, readers, costs))
            if piece.goal in heads:
                segments.append(_head(program.plan, piece.goal, heads[piece.goal]))
        crossing = {value for segment in segments for value in (*segment.inputs, *segment.outputs)} | {*program.plan.inputs, program.plan.output}
        values = {name: value for name, value in program.values.items() if name in crossing}
        for point in program.plan.exits:
            shapes = {point.logits: (point.head.classes,), point.features: (point.head.features,), point.scores: (len(SCORES),)}
            values.update({name: Value(shape, "float32") for name, shape in shapes.items()})
        return program.replace(plan=replace(program.plan, segments=tuple(segments), values=values))


@dataclass(frozen=True)
class _Piece:
    """What is computed on the way to a goal: an exit's name, `final`, or a skip path's mandatory sub-path or the blocks behind it."""

    goal: str
    nodes: tuple[str, ...]


def _goals(program: Program, flow: nx.DiGraph) -> list[tuple[str, str]]:
    """What is computed when, by name and value: exits in their order, skip paths before the first exit that needs them."""
    goals: list[tuple[str, str]] = []
    paths = [
        (f"{BLOCK}{path.name}" if value == path.after else path.name, value) for path in program.plan.skips for value in (path.before, path.after)
    ]
    for name, value in [*((point.name, point.after) for point in program.plan.exits), ("final", program.plan.output)]:
        needed = nx.ancestors(flow, value) | {value}
        while paths and paths[0][1] in needed:
            goals.append(paths.pop(0))
        goals.append((name, value))
    return goals


def _readers(program: Program, pieces: list[_Piece]) -> dict[str, set[str]]:
    """Which segments read each value, sizes counted: a segment works a size out from the tensor itself."""
    owner = {name: piece.goal for piece in pieces for name in piece.nodes}
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
            if source.name in owner or source.name in program.plan.inputs:
                readers.setdefault(source.name, set()).add(reader)
            else:
                pending.extend(source.all_input_nodes)
    return readers


def _segment(program: Program, piece: _Piece, readers: dict[str, set[str]], costs: dict[str, Cost]) -> Segment:
    goal, inside = piece.goal, set(piece.nodes)
    inputs = tuple(n.name for n in program.graph.nodes if n.name not in inside and goal in readers.get(n.name, ()))
    outputs = tuple(n for n in piece.nodes if readers.get(n, set()) - {goal})
    for value in (*inputs, *outputs):
        if value not in program.values:
            raise PlanError(f"cannot cut at {value!r}: the batch is not its first dimension", "exit after a whole block of the network")
    cost = sum((costs[n] for n in piece.nodes), Cost())
    if goal.startswith(BLOCK):
        path = goal.removeprefix(BLOCK)
        return Segment(f"block_{path}", "block", piece.nodes, inputs, outputs, (), cost, path)
    switching = {path.name for path in program.plan.skips if inside & set(path.norms)}
    if len(switching) > 1:
        raise PlanError(
            f"norms of {' and '.join(sorted(switching))} stand in one piece of the network", "choose the skip paths by name, fewer of them"
        )
    return Segment(f"trunk_{goal}", "trunk", piece.nodes, inputs, outputs, (), cost, "".join(switching))


def _head(plan: Plan, exit_name: str, node: str) -> Segment:
    point = plan.exit(exit_name)
    outputs, parameters = (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
    return Segment(f"head_{exit_name}", "head", (node,), point.inputs, outputs, parameters, head_cost(point.head))
