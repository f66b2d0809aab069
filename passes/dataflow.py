"""Which node depends on which, as the passes see it: tensors that come from the input, nothing else."""

from __future__ import annotations

import operator

import networkx as nx
from torch import fx

from exitify.program import Program

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem, operator.truediv, int, min, max}


def dataflow(program: Program) -> nx.DiGraph:
    """Return the graph of the tensors computed from the input.

    Left out: parameters and what is computed from them alone, and sizes (`x.shape[0]`, `x.size(1) // 2`), since every
    segment can work those out for itself. A node that uses a size depends on the tensor whose size it is only if it
    reads that tensor too.
    """
    flow = nx.DiGraph()
    for node in program.graph.nodes:
        if node.name == program.plan.input:
            flow.add_node(node.name)
        if node.op in ("output", "placeholder", "get_attr") or is_size(node):
            continue
        read = [source.name for source in node.all_input_nodes if source.name in flow]
        if read:
            flow.add_edges_from((source, node.name) for source in read)
    return flow


def is_size(node: fx.Node) -> bool:
    """Whether this node gives a tensor's size, or a number computed from sizes."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if "sym_size" in str(node.target):
        return True
    return bool(node.all_input_nodes) and node.target in _ARITHMETIC and all(is_size(source) for source in node.all_input_nodes)


def cut_values(program: Program) -> list[str]:
    """Values through which everything passes on the way from input to output, in order: the dominators of the output."""
    flow = dataflow(program)
    immediate = nx.immediate_dominators(flow, program.plan.input)
    chain, name = [], program.plan.output
    while name != program.plan.input:
        name = immediate[name]
        chain.append(name)
    return chain[::-1]
