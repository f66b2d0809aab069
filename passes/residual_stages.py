"""The residual stages of a network, read from its graph: blocks, their shortcuts, and where a stage begins."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx, nn

from exitify.passes.dataflow import ancestry, bare_name, cut_values, dataflow, function_name
from exitify.plan import SkipPath
from exitify.program import Program

ADDITIONS = {"add", "add_", "iadd", "aten.add.Tensor", "aten.add_.Tensor"}
NORM_MODULES = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM_FUNCTIONS = {"layer_norm", "group_norm", "batch_norm", "rms_norm"}
DROP_PATHS = {"StochasticDepth", "DropPath", "stochastic_depth", "drop_path"}
"""What drops residual branches at random in training: torchvision's and timm's, as module and as function."""


@dataclass(frozen=True)
class Block:
    """One residual block, or a block of the same build without a shortcut where its stage begins.

    place: The module (`layer1.0`); where there is none, the values `entry` and `exit`.
    entry: The value that it reads. exit: The value that it gives, what follows every addition of the stage included.
    shortcut: What is added to the branch: its input, its input made to fit (or what follows is not what follows the others), or nothing.
    """

    place: str
    entry: str
    exit: str
    shortcut: Literal["identity", "projection", "none"]


@dataclass(frozen=True)
class Stage:
    """Blocks in a row whose values look alike.

    name: The module that holds them (`layer1`), or its first and last block.
    start: Where its mandatory sub-path begins: what an earlier stage gave, so that layers between two stages belong to the
        later one; for the first stage its first block's entry.
    isotropic: Whether all blocks of the network look alike.
    """

    name: str
    blocks: tuple[Block, ...]
    start: str
    isotropic: bool = False


@dataclass(frozen=True)
class _Addition:
    """A residual addition, by where it stands in the chain of values through which everything passes."""

    at: int
    shortcut: Literal["identity", "projection"]
    attends: bool


def find_stages(program: Program) -> tuple[Stage, ...]:
    """Return the residual stages on the way from input to output, in order.

    An addition is residual if one of its operands is the last value before it through which everything passes (an identity
    shortcut), or if both are computed from that value (a projection). Additions in a row belong to one stage while values
    look alike and nothing but what follows every addition stands between them. Additions that one module makes of its own
    parts are one block (a transformer's attention and what follows it).
    """
    chain = _Chain(program)
    runs = _runs(chain)
    stages: list[Stage] = []
    end = ""
    for run in runs:
        blocks = _blocks(chain, run)
        if blocks[0].shortcut == "identity":
            first = _block_without_shortcut(chain, run, blocks[0], end)
            blocks = ([first] if first else []) + blocks
        stages.append(Stage("", tuple(blocks), end or blocks[0].entry, isotropic=len(runs) == 1))
        end = blocks[-1].exit
    names = Counter(_common([block.place for block in stage.blocks]) for stage in stages)
    return tuple(replace(stage, name=_stage_name(stage, names)) for stage in stages)


def _stage_name(stage: Stage, names: Counter[str]) -> str:
    common = _common([block.place for block in stage.blocks])
    first, last = stage.blocks[0].place, stage.blocks[-1].place
    return common if common and names[common] == 1 and len(stage.blocks) > 1 else first if first == last else f"{first} to {last}"


class _Chain:
    """The values through which everything passes, and what is computed between each two of them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flow = dataflow(program)
        self.values = [*cut_values(program), program.plan.output]
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.order = {name: i for i, name in enumerate(self.nodes)}
        self.inside: list[list[str]] = []
        owned: set[str] = set()
        for value in self.values:
            found = ancestry(self.flow, value, owned)
            owned |= found
            self.inside.append(sorted(found, key=self.order.__getitem__))

    @functools.cached_property
    def weighted_in(self) -> dict[str, set[str]]:
        """The nodes that read weights, by each module that they lie in."""
        found: dict[str, set[str]] = {}
        for name in self.flow:
            parts = self.program.places.get(name, "").split(".")
            if self.has_parameters(name):
                for depth in range(1, len(parts) + 1):
                    found.setdefault(".".join(parts[:depth]), set()).add(name)
        return found

    def between(self, after: int, until: int) -> list[str]:
        """Nodes behind the value at one place, up to and with the one at another."""
        return [name for inside in self.inside[after + 1 : until + 1] for name in inside]

    def operands(self, at: int) -> tuple[str, str] | None:
        """The two tensors that the value at this place is the sum of, if it is one."""
        node = self.nodes[self.values[at]]
        tensors = [arg.name for arg in node.args if isinstance(arg, fx.Node) and arg.name in self.flow]
        if function_name(node) not in ADDITIONS or len(tensors) != 2 or not self.look_alike(*tensors):
            return None
        return tensors[0], tensors[1]

    def adds_its_input(self, at: int) -> bool:
        """Whether an operand of the sum at this place is the value before it, as it is or handed through `nn.Identity`."""
        return self.is_encoder_layer(at) or self.values[at - 1] in {self._source(name) for name in self.operands(at) or ()}

    def _source(self, name: str) -> str:
        node = self.nodes[name]
        while node.op == "call_module" and isinstance(self.program.get_submodule(str(node.target)), nn.Identity):
            node = node.all_input_nodes[0]
        return node.name

    def is_encoder_layer(self, at: int) -> bool:
        """Whether the value at this place comes from torch's own encoder layer, which tracing leaves whole: its shortcuts are inside."""
        node = self.nodes[self.values[at]]
        return node.op == "call_module" and isinstance(self.program.get_submodule(str(node.target)), nn.TransformerEncoderLayer)

    def look_alike(self, *names: str) -> bool:
        """Whether these values have one shape and type, with the batch in front."""
        looks = [self.program.values.get(name) for name in names]
        return looks[0] is not None and all(look == looks[0] for look in looks)

    def numbers(self, name: str) -> tuple[int, str]:
        """How many numbers of what type a value has; 0 where the batch is not in front."""
        look = self.program.values.get(name)
        return (math.prod(look.shape), look.dtype) if look is not None else (0, name)

    def has_parameters(self, name: str) -> bool:
        """Whether a node reads weights."""
        node = self.nodes[name]
        if node.op == "call_module":
            return any(True for _ in self.program.get_submodule(str(node.target)).parameters())
        return any(source.op == "get_attr" for source in node.all_input_nodes)

    def kinds(self, names: Sequence[str]) -> tuple[str, ...]:
        """What stands in the nodes that have weights, in order."""
        return tuple(self.kind(name) for name in names if self.has_parameters(name))

    def kind(self, name: str) -> str:
        """A module's class, or a function's name."""
        node = self.nodes[name]
        return type(self.program.get_submodule(str(node.target))).__name__ if node.op == "call_module" else function_name(node)


def _runs(chain: _Chain) -> list[list[_Addition]]:
    """The residual additions, a list a stage."""
    runs: list[list[_Addition]] = []
    for at in range(1, len(chain.values)):
        if chain.operands(at) is None and not chain.is_encoder_layer(at):
            continue
        shortcut: Literal["identity", "projection"] = "identity" if chain.adds_its_input(at) else "projection"
        attends = any("attention" in chain.kind(name).lower() or "softmax" in chain.kind(name).lower() for name in chain.inside[at])
        found = _Addition(at, shortcut, attends)
        if runs and shortcut == "identity" and _continues(chain, runs[-1][-1], found):
            runs[-1].append(found)
        else:
            runs.append([found])
    return runs


def _continues(chain: _Chain, before: _Addition, found: _Addition) -> bool:
    """Whether only operations without weights that keep all numbers, and norms, stand between two additions."""
    entry = found.at - 1
    if len({chain.numbers(chain.values[at]) for at in (*range(before.at, entry + 1), found.at)}) > 1:
        return False
    between = chain.between(before.at, entry)
    return len(between) == entry - before.at and all(not chain.has_parameters(name) or is_norm(chain.program, chain.nodes[name]) for name in between)


def _blocks(chain: _Chain, run: Sequence[_Addition]) -> list[Block]:
    size = _additions_a_block(chain, run)
    last = [run[i + size - 1] for i in range(0, len(run), size)]
    first = [run[i] for i in range(0, len(run), size)]
    tail = chain.between(last[0].at, first[1].at - 1) if len(first) > 1 else []
    blocks = []
    for begin, end in zip(first, last):
        following = list(range(end.at + 1, min(end.at + 1 + len(tail), len(chain.values))))
        is_alike = [chain.kind(chain.values[at]) for at in following] == [chain.kind(name) for name in tail]
        is_alike = is_alike and all(chain.inside[at] == [chain.values[at]] for at in following)
        entry, exit_value = chain.values[begin.at - 1], chain.values[end.at + len(tail) if is_alike else end.at]
        is_identity = is_alike and all(addition.shortcut == "identity" for addition in run if begin.at <= addition.at <= end.at)
        place = _place(chain, chain.between(begin.at - 1, end.at), entry, exit_value)
        blocks.append(Block(place, entry, exit_value, "identity" if is_identity else "projection"))
    return blocks


def _additions_a_block(chain: _Chain, run: Sequence[_Addition]) -> int:
    """How many additions make a block: as many as one module holds, where that is told; else one.

    But where some of them add attention, and no modules tell, as many as there are until attention comes in the same order again.
    """
    places = [_place(chain, chain.inside[addition.at], chain.values[addition.at - 1], chain.values[addition.at]) for addition in run]
    lengths = {len(list(group)) for _, group in itertools.groupby(places)}
    if len(lengths) == 1 and lengths != {1} and not _calls_twice(chain, run[: min(lengths)]):
        return lengths.pop()
    attends = [addition.attends for addition in run]
    if any(attends):
        for size in range(1, len(run) + 1):
            if len(run) % size == 0 and all(attends[i] == attends[i % size] for i in range(len(run))):
                return size
    return 1


def _calls_twice(chain: _Chain, additions: Sequence[_Addition]) -> bool:
    """Whether these additions add what the same module computes: calls of one block, and not its parts."""
    read: list[str] = []
    for name in (name for addition in additions for name in chain.inside[addition.at] if chain.has_parameters(name)):
        node = chain.nodes[name]
        read += [str(node.target)] if node.op == "call_module" else [str(s.target) for s in node.all_input_nodes if s.op == "get_attr"]
    return len(set(read)) < len(read)


def _block_without_shortcut(chain: _Chain, run: Sequence[_Addition], block: Block, end: str) -> Block | None:
    """The block in front of a stage that is built as the stage's others are, but changes the shape, and so adds nothing."""
    entry = run[0].at - 1
    kinds = chain.kinds(chain.inside[run[0].at])
    wanted = _module_class(chain.program, block.place)
    for start in range(entry - 1, -1, -1):
        if chain.values[start + 1] == end:
            break
        nodes = chain.between(start, entry)
        if len(chain.kinds(nodes)) > len(kinds):
            break
        if chain.kinds(nodes) == kinds and wanted is not None:
            place = _place(chain, nodes, chain.values[start], chain.values[entry])
            while place and _module_class(chain.program, place) is not wanted:
                place = place.rpartition(".")[0]
            if place:
                return Block(place, chain.values[start], chain.values[entry], "none")
    return None


def _module_class(program: Program, place: str) -> type | None:
    try:
        return type(program.get_submodule(place)) if place else None
    except AttributeError:
        return None


def _place(chain: _Chain, nodes: Sequence[str], entry: str, exit_value: str) -> str:
    """The module that these nodes make up: the one that adds, where it holds nothing else; else the one that holds the weights."""
    places = chain.program.places
    weighted = [places.get(name, "") for name in nodes if chain.has_parameters(name)]
    common = _common(weighted)
    adds = places.get(nodes[-1], "")
    if len(set(weighted)) == 1 and common.rpartition(".")[0] == adds:
        common = adds  # one layer of the module that adds
    inside = chain.weighted_in.get(adds, set()) if adds else set()
    return adds if inside and inside <= set(nodes) else common or f"{entry} to {exit_value}"


def _common(places: Sequence[str]) -> str:
    """The longest path of modules in which all these lie."""
    shared: list[str] = []
    for parts in zip(*(place.split(".") for place in places)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def mandatory_nodes(program: Program, path: SkipPath) -> list[str]:
    """Nodes of a skip path's mandatory sub-path, in order, without shortcuts that are projections."""
    chain = _Chain(program)
    start, before = chain.values.index(path.start), chain.values.index(path.before)
    left: set[str] = set()
    for at in range(start + 1, before + 1):
        operands = chain.operands(at)
        if operands is not None and not chain.adds_its_input(at):
            outside = chain.flow.nodes - set(chain.inside[at])
            sides = [ancestry(chain.flow, name, outside) for name in operands]
            left |= min(sides, key=lambda side: len(chain.kinds(sorted(side))))
    return [name for name in chain.between(start, before) if name not in left]


def is_norm(program: Program, node: fx.Node) -> bool:
    """Whether this node is a norm: a module, or a function that reads its scale from the network."""
    if node.op == "call_module":
        return isinstance(program.get_submodule(str(node.target)), NORM_MODULES)
    name = bare_name(node)
    return node.op == "call_function" and name in NORM_FUNCTIONS


def drops_path(program: Program, node: fx.Node) -> bool:
    """Whether this node drops residual branches at random while the network is trained."""
    if node.op == "call_module":
        return type(program.get_submodule(str(node.target))).__name__ in DROP_PATHS
    return node.op == "call_function" and function_name(node) in DROP_PATHS
