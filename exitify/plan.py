"""The plan: where a network may stop, what it may leave out, and the pieces it is compiled, stored and run in.

A value beside the graph (docs/decisions.md says why not in its metadata), in the standard library alone: the device reads it too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from exitify.errors import PlanError

FINAL = "final"
"""The name of the network's own answer, the last exit."""

SCORES = ("top1", "entropy", "margin", "renyi_entropy")
"""What a head's `scores` holds, in order: largest probability, entropy (nats), gap between the two largest, entropy of p²/Σp²."""

DIMENSIONS = {"nchw": 3, "nhwc": 3, "tokens": 2, "class_token": 2, "vector": 1}
"""How many dimensions a value of each layout has, without the batch."""

_NUMBER = r"[0-9]{1,6}(\.[0-9]{1,12})?(e-?[0-9]{1,2})?"
_STEP = re.compile(
    rf"mean|max|first|relu6?|gelu|gelu_tanh|silu|hardswish|leaky_relu|tanh|(layer_norm|batch_norm|dropout):{_NUMBER}"
    rf"|group_norm:[1-9][0-9]{{0,3}}:{_NUMBER}|linear:[1-9][0-9]{{0,4}}"
)
"""A step of a head of the kind `own`; `exitify.heads` makes them."""

MOST_STEPS, MOST_HIDDEN = 16, 2**26
"""A head has no more steps, and no more weights in hidden layers."""

PATHS = ("identity", "learned", "layer_norm", "boosted", "ensemble")
"""How a head may use an earlier exit's logits (see `HeadSpec.path`)."""

BOUNDARY_MACS = 2_000_000
"""What an exit costs beside its head's multiply-adds, as multiply-adds: 40 µs at 50 GMAC/s, one x86 core.

A third of it is the boundary, an engine call and tensors that leave it; the rest is the head's many small operators,
which take longer than their multiply-adds say (docs/measurements.md).
"""

BYTE_MACS = 6
"""What each byte that crosses a boundary costs, as multiply-adds: it is written, turned to another memory layout and read again."""


def boundary_macs(crossing_bytes: int) -> int:
    """What a boundary costs that hands on so many bytes, as multiply-adds."""
    return BOUNDARY_MACS + BYTE_MACS * crossing_bytes


Mask = tuple[bool, ...]
"""One flag a skip path, True where it is left out."""


@dataclass(frozen=True)
class Value:
    """What a named tensor looks like.

    shape: Its shape without the batch dimension.
    dtype: NumPy's name, `float32` for instance.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of one sample."""
        bits = re.search(r"\d+$", self.dtype)  # `float32`, `bfloat16`, `uint8`; `bool` alone says none
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    macs: Multiply-adds, torch's flop formulas / 2.
    parameters: Weights read.
    moved_bytes: Bytes of the tensors written.
    """

    macs: int = 0
    parameters: int = 0
    moved_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.parameters + other.parameters, self.moved_bytes + other.moved_bytes)


@dataclass(frozen=True)
class HeadSpec:
    """A head's shape: enough to build it again.

    kind: `linear` (pool, classify), `conv` (two 3x3 convolutions of stride 2 with norms first), `deep` (one of stride 1 before
        these), `mlp` (one hidden layer), or `own`, as the network's own head is built.
    layout: How the value is laid out: `nchw`, `nhwc`, `tokens` (N, T, C), `class_token` (the same, and the first token
        answers) or `vector` (N, C).
    shape: The value's shape without the batch.
    pool: Side of the pooling window that comes first, 1 for none; it has no weights.
    width: Channels inside, and features that the classifier reads of the value; for `linear` those of the value.
    steps: For `own`: what comes before the classifier, as `exitify.heads.STEPS` names it (`mean`, `layer_norm:1e-06`).
    path: How it uses an earlier exit's logits l, empty where it does not. Its classifier reads them beside its features: as
        they are (`identity`), as `relu(norm(linear(l)))` of its width (`learned`), or as `layer_norm(l)`. Or they are added to
        what it says: as they are (`boosted`), or times a factor that is trained (`ensemble`, a geometric mean of probabilities).
        Losses reach earlier heads through `learned` alone.
    """

    kind: Literal["linear", "conv", "deep", "mlp", "own"]
    layout: Literal["nchw", "nhwc", "tokens", "class_token", "vector"]
    shape: tuple[int, ...]
    pool: int
    width: int
    classes: int
    steps: tuple[str, ...] = ()
    path: Literal["", "identity", "learned", "layer_norm", "boosted", "ensemble"] = ""

    @property
    def features(self) -> int:
        """How many numbers its classifier reads, those of an earlier exit counted."""
        return self.width + {"identity": self.classes, "layer_norm": self.classes, "learned": self.width}.get(self.path, 0)

    @property
    def text(self) -> str:
        """How a user asks for this head: its kind, and its width where that may be chosen."""
        return f"{self.kind}{self.width}" if self.kind in ("conv", "deep", "mlp") else self.kind

    @property
    def channels(self) -> int:
        """How many numbers the value has at each of its positions."""
        return self.shape[0] if self.layout == "nchw" else self.shape[-1]

    def __str__(self) -> str:
        pool = f" pool {self.pool}" if self.pool > 1 else ""
        steps = f" {', '.join(self.steps)}" if self.steps else ""
        path = f" with {self.path}" if self.path else ""
        return f"{self.kind}{pool}{steps} {'x'.join(map(str, self.shape))} -> {self.width}{path} -> {self.classes}"


def steps_problem(head: HeadSpec) -> str:
    """What is wrong with a head's steps on the value that it reads; empty where nothing is."""
    if head.kind != "own":
        return ", ".join(head.steps)
    wrong = [step for step in head.steps if not _STEP.fullmatch(step)]
    if wrong or len(head.steps) > MOST_STEPS:
        return ", ".join(wrong) or f"{len(head.steps)} steps"
    pools = [step for step in head.steps if step in ("mean", "max", "first")]
    if len(pools) != (head.layout != "vector"):
        return f"{len(pools)} pools on a value of the layout {head.layout}"
    channels, hidden, is_map = head.channels, 0, head.layout != "vector"
    for step in head.steps:
        name, *options = step.split(":")
        if name in ("batch_norm", "group_norm") and is_map and head.layout != "nchw":
            return f"{step} on channels that come last"
        if name == "group_norm" and channels % int(options[0]):
            return f"{step} on {channels} channels"
        if name == "dropout" and float(options[0]) > 1:
            return step
        if name == "linear":
            hidden, channels = hidden + channels * int(options[0]), int(options[0])
            if is_map or hidden > MOST_HIDDEN:
                return step
        is_map = is_map and step not in pools
    return "" if channels == head.width else f"they end in {channels} numbers, and its classifier reads {head.width}"


@dataclass(frozen=True)
class ExitPoint:
    """A place where the network may stop.

    name: `exit1` for instance; its weights stand under `exit_heads.<name>`.
    after: The value that its head reads.
    place: The module that computes this value, as the user knows it (`layer2.3`).
    previous: The earlier exit whose logits its head reads too, as `head.path` says; empty for none. That exit's head then
        runs before this one's, taken or not.

    Whether it is taken, and when, a profile says; an exit no profile enables is not run at all.
    """

    name: str
    after: str
    place: str
    head: HeadSpec
    previous: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that its head reads."""
        return (self.after, f"{self.previous}.logits") if self.previous else (self.after,)

    @property
    def logits(self) -> str:
        """Name of the head's first output, `(N, classes)` before the temperature."""
        return f"{self.name}.logits"

    @property
    def features(self) -> str:
        """Name of the head's second output, what its classifier reads, `(N, head.features)`."""
        return f"{self.name}.z"

    @property
    def scores(self) -> str:
        """Name of the head's third output, `(N, 4)`: `SCORES`, at the temperature."""
        return f"{self.name}.scores"

    @property
    def weight(self) -> str:
        """Name of the classifier's weight, `(classes, head.features)`, an input of the head's segment."""
        return f"exit_heads.{self.name}.classifier.weight"

    @property
    def bias(self) -> str:
        """Name of the classifier's bias, `(classes,)`, an input of the head's segment."""
        return f"exit_heads.{self.name}.classifier.bias"

    @property
    def temperature(self) -> str:
        """Name of the temperature, a scalar > 0, an input of the head's segment; a profile sets it."""
        return f"exit_heads.{self.name}.temperature"


@dataclass(frozen=True)
class SkipPath:
    """Residual blocks at the end of a stage that may be left out.

    The stage runs from `start` to `after`: first its mandatory sub-path, up to `before`, then its skippable one. When that
    is left out, `before` stands in for `after`, and norms in the mandatory sub-path take their second set.

    name: `skip1` for instance.
    stage: What the user knows the stage by (`layer1`).
    blocks: The modules that may be left out (`layer1.2`).
    norms: Nodes whose norm has two sets; the second stands under `skip_norms.<its own name>`.
    drop_paths: Nodes of the mandatory sub-path that drop residual branches at random in training, which they do not do
        while the skippable sub-path is left out.
    """

    name: str
    stage: str
    blocks: tuple[str, ...]
    start: str
    before: str
    after: str
    norms: tuple[str, ...] = ()
    drop_paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A piece of the graph that is compiled and stored as one unit.

    kind: `trunk` always runs, `block` is the identity when left out, `head` may end the run.
    nodes: The graph's nodes in it; segments share none.
    inputs: Values it reads. outputs: Values that others read.
    parameters: Tensors that it takes as inputs at run time, so that they can change without a new segment.
    follows: The skip path that leaves this block out, or whose flag chooses this trunk's norm set; empty for none.
    """

    name: str
    kind: Literal["trunk", "block", "head"]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    cost: Cost
    follows: str = ""

    @property
    def has_two_norm_sets(self) -> bool:
        """Whether its norms depend on a skip path."""
        return self.kind == "trunk" and self.follows != ""


@dataclass(frozen=True)
class Stretch:
    """Segments that run in a row with no decision between them: one call of an engine.

    exit: The exit decided upon afterwards, `final` for the last stretch.
    skipped: The skip paths that are left out, of those that one of the segments follows.
    """

    segments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    exit: str
    cost: Cost
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Exits and skip paths (decisions) and segments (what follows from them), over named values.

    input: The value that the caller gives. more_inputs: Others, where the network reads several.
    output: The network's own logits, `(N, classes)`.
    exits, skips: In the order in which a run comes to them.
    values: Shape and dtype of every value that crosses between segments, of the input and of all outputs.
    """

    input: str
    output: str
    exits: tuple[ExitPoint, ...] = ()
    segments: tuple[Segment, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    skips: tuple[SkipPath, ...] = ()
    more_inputs: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """All values that the caller gives, in order."""
        return (self.input, *self.more_inputs)

    def exit(self, name: str) -> ExitPoint:
        """The exit of that name.

        Raises:
            PlanError: there is none; the hint lists those there are.
        """
        for point in self.exits:
            if point.name == name:
                return point
        names = ", ".join(point.name for point in self.exits)
        raise PlanError(f"there is no exit {name!r}", f"this network has {names or 'no early exits'}, and {FINAL}")

    @property
    def classes(self) -> int:
        """How many classes the network knows."""
        return self.values[self.output].shape[-1]

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Names of the exits, first to last, then `final`."""
        return (*(point.name for point in self.exits), FINAL)

    @functools.cached_property
    def _segment_of(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    @functools.cached_property
    def _producer(self) -> dict[str, Segment]:
        return {value: segment for segment in self.segments for value in segment.outputs}

    def segment(self, name: str) -> Segment:
        """The segment of that name (KeyError: a bug, names come from the plan)."""
        return self._segment_of[name]

    def head(self, point: ExitPoint) -> Segment:
        """The segment that computes this exit's logits."""
        return self._producer[point.logits]

    def mask(self, skip: str | Sequence[bool] | None) -> Mask:
        """One bool a skip path, True where it is left out.

        Args:
            skip: Bools; or text, `0110` for instance, `all` or `none`; None is `none`.

        Raises:
            PlanError: it is not of this network's length, or of other values.
        """
        count = len(self.skips)
        if skip is None or (isinstance(skip, str) and skip in ("none", "all")):
            return (skip == "all",) * count
        flags: list[object] = [{"0": False, "1": True}.get(letter, letter) for letter in skip] if isinstance(skip, str) else list(skip)
        if len(flags) != count or not all(flag in (0, 1) for flag in flags):
            shown = repr(skip) if isinstance(skip, str) else repr(tuple(flags))
            if not count:
                raise PlanError(f"there is nothing to skip for the mask {shown}: this network has no skip paths", "transform with `--skips auto`")
            names = ", ".join(f"{path.name} ({path.stage})" for path in self.skips)
            raise PlanError(f"the mask {shown} is not one 0 or 1 for each of the {count} skip paths", f"they are, in order, {names}")
        return tuple(bool(flag) for flag in flags)

    def left_out(self, skip: str | Sequence[bool] | None) -> tuple[SkipPath, ...]:
        """The skip paths that a mask leaves out (see `mask`)."""
        return tuple(path for path, flag in zip(self.skips, self.mask(skip)) if flag)

    def stretches(self, enabled: Collection[str], skip: str | Sequence[bool] | None = None) -> tuple[Stretch, ...]:
        """What to run, in order, when just these exits may be taken and the mask's skip paths are left out.

        Reaching an exit costs the least it can: a stretch holds what its exit needs that is not computed yet, and
        boundaries at exits that are not enabled vanish.

        Raises:
            PlanError: an exit that the plan does not have, or a mask of another length.
        """
        for name in set(enabled) - set(self.exit_names):
            self.exit(name)  # there is none of that name: refused, not ignored
        skipped = {path.name for path in self.left_out(skip)}
        goals: list[tuple[str, tuple[str, ...]]] = [
            (point.name, (point.logits, point.features, point.scores)) for point in self.exits if point.name in enabled
        ]
        goals.append((FINAL, (self.output,)))
        done: set[str] = set()
        groups = []
        for exit_name, wanted in goals:
            needed = self._ancestors(wanted) - done
            groups.append((exit_name, wanted, [s for s in self.segments if s.name in needed]))
            done |= needed
        stretches: list[Stretch] = []
        read_later: set[str] = set()
        for exit_name, wanted, segments in reversed(groups):
            made = {value for segment in segments for value in segment.outputs}
            read = _unique(value for segment in segments for value in segment.inputs if value not in made)
            kept = _unique(value for segment in segments for value in segment.outputs if value in read_later or value in wanted)
            parameters = _unique(name for segment in segments for name in segment.parameters)
            cost = sum((segment.cost for segment in segments if not _is_left_out(segment, skipped)), Cost())
            followed = _unique(segment.follows for segment in segments if segment.follows in skipped)
            stretches.append(Stretch(tuple(s.name for s in segments), read, kept, parameters, exit_name, cost, followed))
            read_later |= set(read)
        return tuple(reversed(stretches))

    def macs_at(self, enabled: Collection[str], skip: str | Sequence[bool] | None = None) -> dict[str, int]:
        """Multiply-adds of a run that ends at each of these exits, the heads tried on the way counted."""
        total, result = 0, {}
        for stretch in self.stretches(enabled, skip):
            total += stretch.cost.macs
            result[stretch.exit] = total
        return result

    def crossing_bytes(self, point: ExitPoint) -> int:
        """Bytes of one sample that the rest of the network reads when it goes on behind this exit."""
        before = self._ancestors((point.after,))
        made = {*self.inputs, *(value for name in before for value in self.segment(name).outputs)}
        read = {value for segment in self.segments if segment.kind != "head" and segment.name not in before for value in segment.inputs}
        return sum(self.values[value].size_bytes for value in made & read)

    def maps_between(self, segments: Collection[str]) -> set[str]:
        """Feature maps, `(C, H, W)` in float32, that these segments alone make and read."""
        made = {name for segment in self.segments if segment.name in segments for name in segment.outputs}
        read_by_others = {name for segment in self.segments if segment.name not in segments for name in segment.inputs}
        maps = {name for name, value in self.values.items() if len(value.shape) == 3 and value.dtype == "float32"}
        return (made & maps) - read_by_others - {self.input, self.output}

    @property
    def full_macs(self) -> int:
        """Multiply-adds of the network without any exit, nothing left out."""
        return self.macs_at(())[FINAL]

    def _ancestors(self, values: Collection[str]) -> set[str]:
        """Names of the segments that these values need."""
        needed: set[str] = set()
        open_values = list(values)
        while open_values:
            segment = self._producer.get(open_values.pop())
            if segment is not None and segment.name not in needed:
                needed.add(segment.name)
                open_values.extend(segment.inputs)
        return needed

    def check(self) -> None:
        """Hold the plan against itself.

        Raises:
            PlanError: a name is used twice or not known, a segment reads what comes later, an exit lacks its head.
        """
        _refuse_twice("segment", [segment.name for segment in self.segments])
        _refuse_twice("exit", [point.name for point in self.exits])
        _refuse_twice("skip path", [path.name for path in self.skips])
        _refuse_twice("value", [*self.inputs, *(value for segment in self.segments for value in segment.outputs)])
        _refuse_twice("node", [node for segment in self.segments for node in segment.nodes])
        known = set(self.inputs)
        for segment in self.segments:
            for value in segment.inputs:
                if value not in known:
                    raise PlanError(f"segment {segment.name!r} reads {value!r}, which nothing before it computes")
            known |= set(segment.outputs)
        if not self.segments:
            return
        for value in known | {self.output}:
            if value not in self.values:
                raise PlanError(f"the plan does not say what {value!r} looks like")
        if self.output not in known:
            raise PlanError(f"no segment computes the network's output {self.output!r}")
        for point in self.exits:
            self._check_exit(point, known)
        for path in self.skips:
            self._check_skip(path)
        for segment in self.segments:
            is_block = segment.kind == "block"
            if segment.follows not in ("", *(path.name for path in self.skips)) or (is_block and not segment.follows):
                raise PlanError(f"segment {segment.name!r} follows {segment.follows!r}, which is no skip path of this network")
            if segment.follows and segment.kind == "head":
                raise PlanError(f"the head {segment.name!r} follows a skip path; heads have one set of norms")

    def _check_skip(self, path: SkipPath) -> None:
        if not path.name.isidentifier() or path.name in self.exit_names:
            raise PlanError(f"a skip path cannot be called {path.name!r}", "use letters, digits and _, and no exit's name")
        blocks = [segment for segment in self.segments if segment.kind == "block" and segment.follows == path.name]
        if [(block.inputs, block.outputs, block.parameters) for block in blocks] != [((path.before,), (path.after,), ())]:
            raise PlanError(f"skip path {path.name!r} is not one segment that computes {path.after!r} from {path.before!r} alone")
        if self.values[path.before] != self.values[path.after]:
            raise PlanError(f"{path.before!r} cannot stand in for {path.after!r}: they look different")

    def _check_exit(self, point: ExitPoint, known: set[str]) -> None:
        if point.name == FINAL or not point.name.isidentifier():
            raise PlanError(f"an exit cannot be called {point.name!r}", "use letters, digits and _, and not the name 'final'")
        answer = self._producer.get(self.output)
        if answer is not None and answer.name in self._ancestors((point.logits,)):
            raise PlanError(f"exit {point.name!r} needs the network's own output", "exit before it")
        problem = steps_problem(point.head)
        if problem:
            raise PlanError(f"the head of exit {point.name!r} has steps that no head has: {problem}")
        read = self.values.get(point.after)
        dimensions = DIMENSIONS[point.head.layout]
        sizes = (*point.head.shape, point.head.pool, point.head.width, point.head.classes)
        if read is None or read.shape != point.head.shape or len(point.head.shape) != dimensions or min(sizes) < 1:
            raise PlanError(f"the head of exit {point.name!r} does not fit the value {point.after!r} that it reads")
        if (point.head.path not in ("", *PATHS)) or bool(point.previous) != bool(point.head.path):
            raise PlanError(f"the head of exit {point.name!r} reads {point.previous or 'no exit'!r} by the path {point.head.path or 'none'!r}")
        if point.previous:
            before = [other for other in self.exits[: self.exits.index(point)] if other.name == point.previous]
            if not before or before[0].head.classes != point.head.classes:
                raise PlanError(f"the head of exit {point.name!r} reads {point.previous!r}, which is no earlier exit of as many classes")
        shapes = {point.logits: (point.head.classes,), point.features: (point.head.features,), point.scores: (len(SCORES),)}
        for value, shape in shapes.items():
            if value not in known or self.values[value].shape != shape:
                raise PlanError(f"no segment computes {value!r} with shape {shape}, as exit {point.name!r} needs")

    def text(self) -> str:
        """The plan as lines of text, the same for the same plan: for people, and for golden tests."""
        full = max(self.full_macs, 1) if self.segments else 1
        lines = [f"plan {', '.join(self.inputs)} -> {self.output}"]
        reach = self.macs_at([point.name for point in self.exits]) if self.segments else {}
        for point in self.exits:
            share = f" at {reach[point.name] / full:.3f}" if reach else ""
            reads = f", reads {point.previous}" if point.previous else ""
            lines.append(f"  exit {point.name} after {point.after} ({point.place}){share}: {point.head}{reads}")
        for path in self.skips:
            switched = f", {len(path.norms)} norms switch" if path.norms else ""
            lines.append(f"  skip {path.name} {path.stage}: {', '.join(path.blocks)} | {path.before} for {path.after}{switched}")
        for segment in self.segments:
            moved = f"{', '.join(segment.inputs)} -> {', '.join(segment.outputs)}"
            follows = f" follows {segment.follows}" if segment.follows else ""
            lines.append(f"  {segment.kind} {segment.name}{follows}: {moved} | {len(segment.nodes)} nodes, {segment.cost.macs} MACs")
        return "\n".join(lines) + "\n"


def mask_text(mask: Mask) -> str:
    """A mask as people write it, `0110`."""
    return "".join("1" if flag else "0" for flag in mask)


def _is_left_out(segment: Segment, skipped: Collection[str]) -> bool:
    return segment.kind == "block" and segment.follows in skipped


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in order of first appearance."""
    return tuple(dict.fromkeys(names))


def _refuse_twice(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PlanError(f"the {what} name {name!r} is used twice")
        seen.add(name)
