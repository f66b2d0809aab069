"""What each node costs: multiply-adds, parameters, bytes written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from exitify.plan import Cost, Value
from exitify.program import Program, extract, in_mode


def node_costs(program: Program) -> dict[str, Cost]:
    """Return each node's cost for one sample, by running the graph once at batch 1.

    Multiply-adds are torch's own flop formulas (convolution, matmul, attention) divided by 2; norms, activations and
    additions count as zero there, and show in the bytes.
    """
    costs: dict[str, Cost] = {}
    own = {name: parameter.numel() for name, parameter in program.named_parameters()}

    class Meter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            if n.op in ("call_module", "call_function", "call_method"):
                costs[n.name] = Cost(counter.get_total_flops() // 2, _parameters_read(program, n, own), _bytes(result))
            return result

    with in_mode(program, training=False), torch.no_grad(), _attention_as_products():
        Meter(program, graph=program.graph).run(*(example_input(program.values[name]).to(device_of(program)) for name in program.plan.inputs))
    return costs


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """Attention as two matrix products: torch has no formula for the CPU's fused kernels, and would count them as zero."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)


def value_cost(program: Program, costs: dict[str, Cost], name: str) -> Cost:
    """What it costs to compute this value and nothing else."""
    node = next(node for node in program.graph.nodes if node.name == name)
    needed = extract(program.graph, [node]).nodes
    return sum((costs.get(n.name, Cost()) for n in needed), Cost())


def device_of(program: Program) -> torch.device:
    """Where the program's weights are; the CPU when it has none."""
    return next((tensor.device for tensor in program.state_dict().values()), torch.device("cpu"))


def example_input(value: Value, batch: int = 1) -> torch.Tensor:
    """Zeros that look like this value."""
    return torch.zeros(batch, *value.shape, dtype=getattr(torch, value.dtype))


def _parameters_read(program: Program, node: fx.Node, own: dict[str, int]) -> int:
    if node.op == "call_module":
        return sum(parameter.numel() for parameter in program.get_submodule(str(node.target)).parameters())
    read = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
    return sum(own.get(name, 0) for name in read)


def _bytes(result: Any) -> int:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
