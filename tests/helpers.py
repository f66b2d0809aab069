"""What several test files do with a network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from exitify.errors import PlanError
from exitify.heads import HeadWithScores, head_spec
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.cut_segments import CutSegments
from exitify.plan import Segment
from exitify.program import HEADS, Program, carriers, compile_graph, extract
from exitify.tracing import capture
from tests.models import SHAPE, ZOO, warm_up

RELATIVE, ABSOLUTE = 1e-5, 1e-5
"""Where the same operations run on the same numbers but memory is laid out otherwise, so that torch may pick another kernel.

float32 has 1.2e-7; sums of a few hundred terms leave two digits of slack."""


def images(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *SHAPE)


def captured(name: str) -> Program:
    """A network of the zoo, with used norm statistics, as a Program in eval()."""
    return capture(warm_up(ZOO[name]()), images()).eval()


def with_exits(program: Program, exits: str, head: str = "linear") -> Program:
    """All three passes."""
    return CutSegments()(AttachHeads()(ChooseExits(exits, head)(program)))


def places_for_exits(program: Program) -> list[str]:
    """Every value of a network that a head can read, the answer apart."""
    found = []
    for name in carriers(program.graph, program.plan.input):
        if name in program.values and name != program.plan.output:
            try:
                head_spec("linear", program.values[name], name, 5)
            except PlanError:
                continue
            found.append(name)
    return found


@functools.cache
def cuttable_places(network: str) -> tuple[str, ...]:
    """Those of `places_for_exits` at which a network of the zoo can also be cut: not inside attention, where values have other dimensions first."""
    found = []
    with torch.random.fork_rng(devices=[]):  # a test draws the same numbers whether or not it is the first to ask
        program = captured(network)
        for name in places_for_exits(program):
            try:
                with_exits(program, name)
            except PlanError:
                continue
            found.append(name)
    return tuple(found)


def segment_function(program: Program, segment: Segment) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One segment as a function of its inputs, from the graph alone."""
    if segment.kind == "head":
        exit_name = segment.name.removeprefix("head_")
        return HeadWithScores(program.get_submodule(f"{HEADS}.{exit_name}"))
    nodes = {node.name: node for node in program.graph.nodes}
    graph = extract(program.graph, [nodes[name] for name in segment.outputs], [nodes[name] for name in segment.inputs])
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == list(segment.inputs)
    function = compile_graph(graph)
    return lambda *inputs: function(program, *inputs)


def run_segments(program: Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every segment after the other, each from values that the plan hands it; all values by name."""
    program.eval()
    values = {program.plan.input: x}
    with torch.no_grad():
        for segment in program.plan.segments:
            outputs = segment_function(program, segment)(*(values[name] for name in segment.inputs))
            values.update(zip(segment.outputs, outputs, strict=True))
    return values


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=RELATIVE, atol=ABSOLUTE)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that training could change."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_in_both_modes(program: Program, model: nn.Module, x: torch.Tensor, seed: int) -> None:
    """To the bit; and training does something else than eval(), so that both were looked at."""
    assert torch.equal(program(x), model(x))
    torch.manual_seed(seed)
    expected = model.train()(x)
    torch.manual_seed(seed)
    assert torch.equal(program.train()(x).final, expected)
    assert not torch.equal(expected, model.eval()(x))
