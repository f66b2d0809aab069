"""Where exits stand, and with which head."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from exitify.errors import PlanError
from exitify.heads import check_kind, head_cost, head_spec
from exitify.passes.base import Pass
from exitify.passes.cost import device_of
from exitify.passes.dataflow import dataflow
from exitify.passes.exit_places import Place, Places, skippable
from exitify.passes.own_head import OwnHead, own_head
from exitify.plan import ExitPoint, HeadSpec, boundary_macs
from exitify.program import Program, in_mode

OVERHEAD_SHARE = 0.12
"""`auto` places as many exits as heads and boundaries together may add to a run that takes none of them, …"""

MOST_EXITS = 6
"""… but no more than these. Calibration switches off those that do not pay; they then cost nothing."""

HEAD_SHARE = 0.02
"""A convolutional head may cost this share of the network; where it would cost more, the head is linear."""

WIDE_DETOUR = 0.1
"""So far, in shares of the cost, a narrow place may be from where an exit is wanted and still be taken before a wide one."""

EARLIEST, LATEST = 0.05, 0.95
"""Exits outside this span of the network's cost are not considered: too early to know, or too late to save."""


@dataclass(frozen=True)
class Considered:
    """A place that was looked at, and what became of it.

    share: Cost of reaching it, as a share of the network's.
    verdict: `exit`, or why it is not one.
    crossing, crossing_bytes: How many tensors a cut there hands on, and their bytes for one sample.
    """

    value: str
    place: str
    share: float
    verdict: str
    crossing: int = 1
    crossing_bytes: int = 0


@dataclass(frozen=True)
class ChooseExits(Pass):
    """Decide after which values the network may stop.

    `auto` and a number take values spaced evenly by cost with heads and boundaries counted; of neighbours with the same cost the
    last. They are values through which everything passes, and, where a network has none for long (columns, branches, dense
    connections), the ends of modules that use nearly all that is computed up to them. `auto` places as many as heads and boundaries
    are worth, which may be none. Names, of modules (`layer2.3`) or graph nodes, may be any value: what else is still needed
    crosses the cut too. No exit stands inside of what may be left out.

    Attributes:
        exits: `auto`, `none`, a number, or names separated by commas; after a name may follow the kind of its head, `layer2.3:conv`.
        head: `auto` (convolutional where a feature map is large enough and the network is too), `linear`, `conv`, `deep`, `mlp`
            (or with a width, `conv128`), or `own`, built as the network's own is.
    """

    name: ClassVar[str] = "choose-exits"
    exits: str = "auto"
    head: str = "auto"

    def apply(self, program: Program) -> Program:
        points, _ = self.decide(program)
        return program.replace(plan=replace(program.plan, exits=points, segments=()))

    def decide(self, program: Program) -> tuple[tuple[ExitPoint, ...], list[Considered]]:
        """Return the exits and everything that was considered."""
        if program.plan.exits:
            raise PlanError("this network has exits already", "transform the original model")
        if self.head != "auto":
            check_kind(self.head)
        places = Places(program)
        chooser = HeadChooser(places)
        if self.exits not in ("auto", "none") and not self.exits.isdecimal():
            chosen, considered = self._named(places, chooser)
        else:
            chosen, considered = self._spaced(places, chooser)
        points = tuple(ExitPoint(f"exit{i}", place.value, place.place, head) for i, (place, head) in enumerate(chosen, 1))
        return points, considered

    def _named(self, places: Places, chooser: HeadChooser) -> tuple[list[tuple[Place, HeadSpec]], list[Considered]]:
        program, kinds = places.program, dict[str, str]()
        for item in self.exits.split(","):
            name, colon, kind = item.strip().rpartition(":")
            value = _find_value(program, name if colon else kind)
            if kinds.get(value, kind if colon else self.head) != (kind if colon else self.head):
                raise PlanError(
                    f"two heads are asked for after {value!r}: {kinds[value]} and {kind}", "an exit has one; exit elsewhere for the other"
                )
            kinds[value] = kind if colon else self.head
        within = skippable(program)
        for value in kinds.keys() & within.keys():
            hint = "exit after a whole stage or its mandatory blocks, or leave out others: --skips"
            raise PlanError(f"cannot exit after {value!r}: it lies in what {within[value]} may leave out", hint)
        found = sorted((places.at(value) for value in kinds), key=lambda place: (place.share, places.order[place.value]))
        chosen = [(place, chooser.head(kinds[place.value], place.value)) for place in found]
        return chosen, [considered(place, "exit") for place in found]

    def _spaced(self, places: Places, chooser: HeadChooser) -> tuple[list[tuple[Place, HeadSpec]], list[Considered]]:
        looked_at, verdicts = sensible_places(places)
        heads: dict[str, HeadSpec] = {}
        for place in looked_at:
            if place.value not in verdicts:
                try:
                    heads[place.value] = chooser.head(self.head, place.value)
                except PlanError as error:
                    verdicts[place.value] = error.problem
        by_value = {place.value: place for place in looked_at}
        full = max(places.full.macs, 1)
        overhead = {value: (head_cost(head).macs + boundary_macs(by_value[value].crossing_bytes)) / full for value, head in heads.items()}
        count = self._count(overhead)
        shares = {value: by_value[value].share for value in heads}
        wide = {value for value in heads if len(by_value[value].crossing) > 1}
        chosen = _evenly(shares, count, wide)
        while self.exits == "auto" and sum(overhead[value] for value in chosen) > OVERHEAD_SHARE:  # heads dearer than the mean
            count -= 1
            chosen = _evenly(shares, count, wide)
        for value in heads:
            verdicts[value] = "exit" if value in chosen else f"not among the {count} spaced evenly" if count else self._why_none(overhead)
        return [(by_value[value], heads[value]) for value in chosen], [considered(place, verdicts[place.value]) for place in looked_at]

    def _count(self, overhead: dict[str, float]) -> int:
        if self.exits == "none":
            return 0
        if self.exits == "auto":
            mean = sum(overhead.values()) / len(overhead) if overhead else math.inf
            return min(MOST_EXITS, len(overhead), int(OVERHEAD_SHARE / mean))
        if int(self.exits) > len(overhead):
            raise PlanError(
                f"{self.exits} exits asked for, and the network has {len(overhead)} places for one", "`--exits auto`, or a smaller number"
            )
        return int(self.exits)

    def _why_none(self, overhead: dict[str, float]) -> str:
        if self.exits != "auto":
            return "no exits asked for"
        return f"an exit would add {min(overhead.values()):.0%} to every run that passes it, over {OVERHEAD_SHARE:.0%}"


def sensible_places(places: Places) -> tuple[list[Place], dict[str, str]]:
    """All places that are looked at, in order, and of some why no exit stands there."""
    narrow = places.narrow()
    found = sorted([*narrow, *places.wide(narrow)], key=lambda place: places.order[place.value])
    within = skippable(places.program)
    shares = {place.value: place.share for place in found}
    verdicts: dict[str, str] = {}
    following_values = [*(place.value for place in found[1:]), places.program.plan.output]
    for place, following in zip(found, following_values):
        value, share = place.value, place.share
        if value not in places.program.values:
            verdicts[value] = "its first dimension is not the batch"
        elif others := [name for name in place.crossing if name not in places.program.values]:
            verdicts[value] = f"{others[0]} would cross there, and its first dimension is not the batch"
        elif value in within:
            verdicts[value] = f"it lies in what {within[value]} may leave out"
        elif not EARLIEST <= share <= LATEST:
            verdicts[value] = f"outside {EARLIEST:.0%} to {LATEST:.0%} of the cost"
        elif shares.get(following) == share and following in places.program.values:
            verdicts[value] = f"{following} comes at the same cost"
    return found, verdicts


class HeadChooser:
    """Which head reads which value of one network."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.program = places.program
        self.classes = self.program.values[self.program.plan.output].shape[-1]

    @functools.cached_property
    def own(self) -> OwnHead | None:
        """The network's own head, None where it is of a kind that cannot stand elsewhere."""
        return own_head(self.program)

    def head(self, kind: str, value: str) -> HeadSpec:
        """The head of this kind for a value; `auto` chooses by its share of the network's cost.

        Raises:
            PlanError: no head, or none of this kind, reads the value.
        """
        if value == self.program.plan.output:
            raise PlanError(f"cannot exit after {value!r}: it is the network's own answer", "exit after an earlier block")
        if kind != "auto":
            return self._spec(kind, value)
        spec = self._spec("linear", value)
        sides = {"nchw": spec.shape[1:], "nhwc": spec.shape[:2]}.get(spec.layout, ())
        if sides and min(sides) >= 4:
            larger = self._spec("conv", value)
            if head_cost(larger).macs <= HEAD_SHARE * self.places.full.macs:
                return larger
        return spec

    @functools.cached_property
    def _told_by_first_token(self) -> set[str]:
        """Values whose first token depends on the input: before any attention a class token is the same for all."""
        found: set[str] = set()

        class Compare(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if isinstance(result, torch.Tensor) and result.ndim == 3 and len(result) == 2 and not torch.equal(result[0, 0], result[1, 0]):
                    found.add(n.name)
                return result

        looks = [self.program.values[name] for name in self.program.plan.inputs]
        generator = torch.Generator().manual_seed(0)
        x = [torch.randn(2, *look.shape, generator=generator).to(getattr(torch, look.dtype)).to(device_of(self.program)) for look in looks]
        with in_mode(self.program, training=False), torch.no_grad():
            Compare(self.program, graph=self.program.graph).run(*x)
        return found

    def _spec(self, kind: str, value: str) -> HeadSpec:
        shape = self.program.values[value].shape
        layout = self.places.layout_of(value)
        if kind == "own" and len(shape) == 2 and self.own is not None and "first" in self.own.steps and value in self._told_by_first_token:
            layout = "class_token"
        steps, width = (self.own.steps, self.own.width) if kind == "own" and self.own is not None else (None, 0)
        return head_spec(kind, self.program.values[value], value, self.classes, layout=layout, own=steps, own_width=width)


def considered(place: Place, verdict: str) -> Considered:
    """A place with what became of it."""
    return Considered(place.value, place.place, place.share, verdict, len(place.crossing), place.crossing_bytes)


def _evenly(shares: dict[str, float], count: int, wide: Collection[str] = ()) -> list[str]:
    """`count` values nearest to evenly spaced shares, no two the same, in the order given; wide cuts only where no narrow one is near."""
    chosen: list[str] = []
    for i in range(1, count + 1):
        free = [value for value in shares if value not in chosen]
        chosen.append(min(free, key=lambda value: abs(shares[value] - i / (count + 1)) + (WIDE_DETOUR if value in wide else 0.0)))
    return sorted(chosen, key=list(shares).index)


def _find_value(program: Program, name: str) -> str:
    """The value a user means: a graph node, or the last value computed in a module."""
    computed = set(dataflow(program))
    if name in computed:
        if name not in program.values:
            raise PlanError(f"cannot exit after {name!r}: its first dimension is not the batch", "exit after a block of the network")
        return name
    inside = [v for v, place in program.places.items() if v in program.values and v in computed and (place == name or place.startswith(f"{name}."))]
    if name and inside:
        return inside[-1]
    places = list(dict.fromkeys(place for v, place in program.places.items() if place and v in program.values))
    close = [place for place in places if name.split(".")[0] in place][:6] or places[:6]
    raise PlanError(f"cannot exit after {name!r}: the network has no module or value of that name", f"for instance {', '.join(close)}")
