"""The first step: a trained model in, a Program with exits and skip paths out."""

from __future__ import annotations

from torch import nn

from exitify.passes.attach_heads import AttachHeads
from exitify.passes.base import Pass
from exitify.passes.cascade_exits import CascadeExits
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.choose_skips import ChooseSkips
from exitify.passes.cut_segments import CutSegments
from exitify.passes.switch_norms import SwitchNorms
from exitify.program import Program
from exitify.tracing import Example, capture


def transform(
    model: nn.Module,
    example: Example,
    *,
    exits: str | int = "auto",
    skips: str | int = "none",
    head: str = "auto",
    cascade: str = "none",
    source: str = "",
    scores: str | int | None = None,
) -> Program:
    """Return the model as a Program with fresh heads and second sets of norms, ready to be trained in any loop.

    Args:
        model: A trained network that returns class scores `(N, classes)`, alone or among other things.
        example: What it reads, `(N, ...)`: one tensor, several in order, or by the names of `forward`'s arguments.
        exits: `auto`, `none`, how many, or names of modules or graph nodes separated by commas, each with the kind
            of its head if wanted, `layer2.3:conv`.
        skips: `auto`, `none`, how many blocks at the end of each stage may be left out, or names of blocks.
        head: `auto`, `linear`, `conv`, `deep`, `mlp` (`conv128`: of that width), or `own`, built as the network's own head.
        cascade: How each head but the first uses the logits of the exit before it: `none`, `identity`, `learned`, `layer_norm`,
            `boosted` or `ensemble` (see `exitify.plan.HeadSpec`).
        source: How the user named the model, for the record.
        scores: Where its class scores are in what it returns, when that is not plain (see `capture`).

    Raises:
        ModelError: the model cannot be traced. PlanError: an exit or a skip path cannot stand where it was asked for.
    """
    return place(capture(model, example, source=source, scores=scores), exits=exits, skips=skips, head=head, cascade=cascade)


def place(program: Program, *, exits: str | int = "auto", skips: str | int = "none", head: str = "auto", cascade: str = "none") -> Program:
    """The captured network with skip paths, exits and their heads, cut into segments."""
    has_skips = str(skips) != "none"
    steps: list[Pass] = [ChooseSkips(skips=str(skips))] if has_skips else []
    steps += [ChooseExits(exits=str(exits), head=head), *([CascadeExits(cascade)] if cascade != "none" else []), AttachHeads()]
    steps += [*([SwitchNorms()] if has_skips else []), CutSegments()]
    for step in steps:
        program = step(program)
    return program
