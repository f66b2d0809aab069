"""Which node depends on which, as the passes see it: tensors that come from the input, nothing else."""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
import torch
from torch import fx

from exitify.program import Program, carriers

CALLER = "the caller"
"""What gives all inputs; no node has a space in its name."""


def dataflow(program: Program) -> nx.DiGraph:
    """Return the graph of the tensors computed from the input, as `exitify.program.carriers` tells them."""
    names = set(carriers(program.graph, *program.plan.inputs))
    flow = nx.DiGraph()
    flow.add_nodes_from(node.name for node in program.graph.nodes if node.name in names)
    for node in program.graph.nodes:
        if node.name in names:
            flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes if source.name in names)
    return flow


def ancestry(flow: nx.DiGraph, value: str, without: Collection[str] = ()) -> set[str]:
    """The value and all that it is computed from, going back no further than to `without`, which is left out."""
    found: set[str] = set()
    pending = [value]
    while pending:
        name = pending.pop()
        if name not in found and name not in without:
            found.add(name)
            pending.extend(flow.predecessors(name))
    return found


def strictly_between(flow: nx.DiGraph, before: str, after: str) -> set[str]:
    """What is computed on the way from one value to another, neither of them counted."""
    found: set[str] = nx.ancestors(flow, after) - nx.ancestors(flow, before) - {before}
    return found


def cut_values(program: Program) -> list[str]:
    """Values through which everything passes on the way from input to output, in order: the dominators of the output."""
    flow = dataflow(program)
    flow.add_edges_from((CALLER, name) for name in program.plan.inputs)
    immediate = nx.immediate_dominators(flow, CALLER)
    chain, name = [], immediate[program.plan.output]
    while name != CALLER:
        chain.append(name)
        name = immediate[name]
    return chain[::-1]


def function_name(node: fx.Node) -> str:
    """`add` of `operator.add` and `torch.add` and `Tensor.add`, `aten.add.Tensor` of an exported graph's."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", ""))


def bare_name(node: fx.Node) -> str:
    """The same without namespace and overload: `add` of an exported graph's, too."""
    return function_name(node).removeprefix("aten.").split(".")[0]
