"""A second set of norms for every mandatory sub-path."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from exitify.errors import PlanError
from exitify.passes.base import Pass
from exitify.passes.residual_stages import drops_path, is_norm, mandatory_nodes
from exitify.program import SKIP_NORMS, Program, norm_tensors


@dataclass(frozen=True)
class SwitchNorms(Pass):
    """Give norms in mandatory sub-paths a second set, used while their own stage's skippable sub-path is left out.

    BatchNorm, LayerNorm, GroupNorm and RMSNorm, as modules or as functions over the network's weights. Not switched: the
    stem's, those of shortcuts that are projections, of skippable blocks, and whatever follows the last stage; layers
    between two stages switch with the later one. A second set starts as a copy of the first, as the network is trained
    (Kang and Lee 2024, section 3.4, trains both from scratch); `exitify.reestimate_norms` gives it statistics of its own.
    """

    name: ClassVar[str] = "switch-norms"

    def apply(self, program: Program) -> Program:
        if any(path.norms for path in program.plan.skips):
            raise PlanError("this network's norms switch already", "transform the original model")
        if SKIP_NORMS in program._modules:
            raise PlanError(f"the network has a module {SKIP_NORMS!r} already", "rename it in the model")
        nodes = {node.name: node for node in program.graph.nodes}
        second = nn.Module()
        paths = []
        for path in program.plan.skips:
            names = mandatory_nodes(program, path)
            norms = tuple(name for name in names if is_norm(program, nodes[name]) and norm_tensors(program, name))
            for name in norms:
                _copy_norm(program, second, nodes[name])
            paths.append(replace(path, norms=norms, drop_paths=tuple(name for name in names if drops_path(program, nodes[name]))))
        plan = replace(program.plan, skips=tuple(paths), segments=())
        return program.replace(plan=plan, members={SKIP_NORMS: second} if second._modules or second._parameters else None)


def _copy_norm(program: Program, second: nn.Module, node: fx.Node) -> None:
    """Add a copy of a norm, or of the tensors that it reads, under the same path."""
    if node.op == "call_module":
        _put(second, str(node.target), copy.deepcopy(program.get_submodule(str(node.target))))
        return
    for path in norm_tensors(program, node.name):
        owner, _, last = path.rpartition(".")
        _put(second, path, copy.deepcopy(getattr(program.get_submodule(owner), last)))


def _put(root: nn.Module, path: str, what: nn.Module | torch.Tensor) -> None:
    *parts, last = path.split(".")
    for part in parts:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(what, nn.Module):
        root.add_module(last, what)
    elif isinstance(what, nn.Parameter):
        root.register_parameter(last, what)
    else:
        root.register_buffer(last, what)
