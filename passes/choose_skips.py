"""Which residual blocks may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from exitify.errors import PlanError
from exitify.passes.base import Pass
from exitify.passes.dataflow import dataflow, strictly_between
from exitify.passes.exit_places import Places
from exitify.passes.residual_stages import Block, Stage, find_stages
from exitify.plan import SkipPath
from exitify.program import Program

GROUPS, LEAST_BLOCKS = 4, 8
"""A network whose blocks all look alike has no stages; from 8 blocks on it is divided into 4 groups, as a ViT in the paper."""


@dataclass(frozen=True)
class ConsideredBlock:
    """A block that was looked at, and what became of it.

    stage, place: Modules. share: Its cost, as a share of the network's.
    verdict: The skip path that may leave it out, or why none does.
    """

    stage: str
    place: str
    share: float
    verdict: str


@dataclass(frozen=True)
class ChooseSkips(Pass):
    """Divide residual stages into a mandatory sub-path and one that may be left out (Kang and Lee 2024, section 3.1).

    Only blocks with an identity shortcut can be left out: their input stands in for their output. Of a stage of L blocks
    the first min(L - 1, ceil(L / 2)) are mandatory; of a network whose L >= 8 blocks all look alike, the first two thirds
    of each of four groups.

    Attributes:
        skips: `auto`, `none`, how many blocks at the end of each stage, or names of blocks separated by commas.
    """

    name: ClassVar[str] = "choose-skips"
    skips: str = "auto"

    def apply(self, program: Program) -> Program:
        paths, _ = self.decide(program)
        return program.replace(plan=replace(program.plan, skips=paths, segments=()))

    def decide(self, program: Program) -> tuple[tuple[SkipPath, ...], list[ConsideredBlock]]:
        """Return the skip paths and everything that was considered."""
        plan = program.plan
        if plan.skips:
            raise PlanError("this network has skip paths already", "transform the original model")
        if self.skips == "none":
            return (), []
        stages = find_stages(program)
        wanted = self._wanted(stages)
        paths: list[SkipPath] = []
        verdicts: dict[Block, str] = {}
        for stage in stages:
            for start, mandatory, skipped in self._parts(stage, wanted):
                verdicts.update(dict.fromkeys(mandatory, self._why_mandatory(stage)))
                if not skipped:
                    continue
                before, after = skipped[0].entry, skipped[-1].exit
                why_not = _why_not(program, plan.output, before, after)
                if why_not and wanted is None:
                    verdicts.update(dict.fromkeys(skipped, why_not))
                    continue
                if why_not:
                    raise PlanError(f"cannot leave out {skipped[0].place!r}: {why_not}", "choose other blocks, or --skips auto")
                path = SkipPath(f"skip{len(paths) + 1}", stage.name, tuple(block.place for block in skipped), start, before, after)
                verdicts.update(dict.fromkeys(skipped, path.name))
                paths.append(path)
        return tuple(paths), _considered(program, stages, verdicts)

    def _wanted(self, stages: Sequence[Stage]) -> set[Block] | None:
        """The blocks asked for, None where a rule chooses them."""
        if self.skips == "auto":
            return None
        blocks = {block.place: block for stage in stages for block in stage.blocks}
        if self.skips.isdecimal():
            if int(self.skips) < 1:
                raise PlanError(f"--skips {self.skips} leaves nothing out", "`--skips none`, or a number from 1")
            return {block for stage in stages for block in stage.blocks[max(1, len(stage.blocks) - int(self.skips)) :]}
        names = {name.strip() for name in self.skips.split(",")}
        able = ", ".join(place for place, block in blocks.items() if block.shortcut == "identity")
        hint = f"those that can be left out: {able or 'none'}"
        for name in names:
            if name not in blocks:
                raise PlanError(f"cannot leave out {name!r}: no residual block has this name", hint)
            if blocks[name].shortcut != "identity":
                raise PlanError(f"cannot leave out {name!r}: its input does not stand in for its output", hint)
        for stage in stages:
            if all(block.place in names for block in stage.blocks):
                raise PlanError(f"cannot leave out all blocks of {stage.name!r}", "a stage keeps at least one")
        return {block for stage in stages for block in stage.blocks if block.place in names}

    def _parts(self, stage: Stage, wanted: set[Block] | None) -> list[tuple[str, tuple[Block, ...], tuple[Block, ...]]]:
        """The stage as pieces, each of which starts at a value, goes through mandatory blocks and ends with others."""
        blocks, count = stage.blocks, len(stage.blocks)
        if wanted is not None:
            flags = [block in wanted for block in blocks]
        elif stage.isotropic and count >= LEAST_BLOCKS:
            sizes = [count // GROUPS + (i < count % GROUPS) for i in range(GROUPS)]
            flags = [i >= size - max(1, size // 3) for size in sizes for i in range(size)]
        else:
            flags = [i >= max(1, min(count - 1, (count + 1) // 2)) for i in range(count)]
        flags = [flag and block.shortcut == "identity" for flag, block in zip(flags, blocks)]
        parts, start, begin = [], stage.start, 0
        for i in range(count):
            if i + 1 == count or (flags[i] and not flags[i + 1]):
                piece = list(zip(blocks, flags))[begin : i + 1]
                parts.append((start, tuple(b for b, flag in piece if not flag), tuple(b for b, flag in piece if flag)))
                start, begin = blocks[i].exit, i + 1
        return parts

    def _why_mandatory(self, stage: Stage) -> str:
        if len(stage.blocks) == 1:
            return "alone in its stage"
        return "mandatory" if self.skips == "auto" else "not asked for"


def _why_not(program: Program, output: str, before: str, after: str) -> str:
    """Why one value cannot stand in for another, empty if it can."""
    looks = program.values.get(before), program.values.get(after)
    if None in looks:
        return "its first dimension is not the batch"
    if looks[0] != looks[1]:
        return "its input and its output look different"
    if after == output:
        return "it gives the network's own answer"
    flow = dataflow(program)
    computed = strictly_between(flow, before, after) | {after}
    pending = [source for node in program.graph.nodes if node.name in computed for source in node.all_input_nodes]
    while pending:
        source = pending.pop()
        if source.name not in flow:
            pending.extend(source.all_input_nodes)  # a size, worked out from another value
        elif source.name not in computed | {before}:
            return f"it reads the size of {source.name!r}, which its input does not tell"
    return ""


def _considered(program: Program, stages: Sequence[Stage], verdicts: dict[Block, str]) -> list[ConsideredBlock]:
    shares = {place.value: place.share for place in Places(program).narrow()}
    shares |= {program.plan.output: 1.0, **dict.fromkeys(program.plan.inputs, 0.0)}
    return [
        ConsideredBlock(stage.name, block.place, shares[block.exit] - shares[block.entry], verdicts[block])
        for stage in stages
        for block in stage.blocks
    ]
