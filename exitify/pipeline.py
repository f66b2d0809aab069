"""The first step: a trained model in, a Program with exits out."""

from __future__ import annotations

import torch
from torch import nn

from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.cut_segments import CutSegments
from exitify.program import Program
from exitify.tracing import capture


def transform(model: nn.Module, example: torch.Tensor, *, exits: str | int = "auto", head: str = "auto", source: str = "") -> Program:
    """Return the model as a Program with fresh heads, ready to be trained in any loop.

    Args:
        model: A trained network with one input and class scores `(N, classes)` as output.
        example: One or more inputs, `(N, ...)`.
        exits: `auto`, `none`, how many, or names of modules or graph nodes separated by commas.
        head: `auto`, `linear`, `conv` or `mlp`.
        source: How the user named the model, for the record.

    Raises:
        ModelError: the model cannot be traced. PlanError: an exit cannot stand where it was asked for.
    """
    return add_exits(capture(model, example, source=source), exits=exits, head=head)


def add_exits(program: Program, *, exits: str | int = "auto", head: str = "auto") -> Program:
    """Return a captured program with fresh heads, cut into segments (see `transform`)."""
    for step in (ChooseExits(exits=str(exits), head=head), AttachHeads(), CutSegments()):
        program = step(program)
    return program
