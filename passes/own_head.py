"""How the network's own head is built: what stands between its last feature map and its class scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from exitify.passes.dataflow import bare_name
from exitify.program import Program

SHAPING = {"flatten", "reshape", "view", "squeeze", "contiguous", "permute", "clone"}
"""Functions and methods that move numbers and change none; so are slices that keep all, and `nn.Flatten`, `nn.Identity`."""

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
}
ACTIVATION_FUNCTIONS = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "silu": "silu", "silu_": "silu", "hardswish": "hardswish", "tanh": "tanh"}
AVERAGES = {"mean", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "avg_pool2d"}
LARGEST = {"amax", "adaptive_max_pool2d", "adaptive_max_pool1d"}


@dataclass(frozen=True)
class OwnHead:
    """The steps before the network's classifier (see `exitify.heads.STEPS`), and what they were on.

    value: What the first step reads. width: How many numbers the classifier reads; 0 where those are the value's channels.
    """

    value: str
    steps: tuple[str, ...]
    width: int


def own_head(program: Program) -> OwnHead | None:
    """Read the network's own head off its graph, backwards from its scores; None where it is of another kind.

    It is a classifier that reads a vector, before it norms, activations, dropout and hidden linear layers, and one pool over
    all positions (or the first token). A norm before the pool counts when it does not belong to a convolution, and an
    activation when it stands behind such a norm.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    node: fx.Node | None = _skip_shaping(program, nodes[program.plan.output])
    classifier = _classifier(program, node) if node is not None else None
    if node is None or classifier is None:
        return None
    steps: list[str] = []
    node = _source(program, node)
    while node is not None and node.name in program.values:
        step = _step_of(program, node)
        if step is None:
            break
        if step == "" or step.startswith(("mean", "max", "first")) or not _belongs_to_convolution(program, node):
            steps.append(step)
            node = _source(program, node)
            continue
        break
    if node is None:
        return None
    found = [step for step in reversed(steps) if step]
    pool = next((i for i, step in enumerate(found) if step in ("mean", "max", "first")), None)
    if sum(step in ("mean", "max", "first") for step in found) > 1 or (
        pool is None and len(program.values.get(node.name, program.values[program.plan.output]).shape) > 1
    ):
        return None
    before = found[:pool]
    while before and "norm" not in before[0]:
        before = before[1:]
    kept = (*before, *found[pool or 0 :])
    has_hidden = any(step.startswith("linear:") for step in kept)
    return OwnHead(node.name, tuple(kept), classifier.in_features if has_hidden else 0)


def _source(program: Program, node: fx.Node) -> fx.Node | None:
    """The one value that this node is computed from."""
    read = [source for source in node.all_input_nodes if source.name in program.values]
    return _skip_shaping(program, read[0]) if len(read) == 1 else None


def _skip_shaping(program: Program, node: fx.Node) -> fx.Node | None:
    """The first node, going back, that changes numbers."""
    while _only_shapes(program, node):
        read = [source for source in node.all_input_nodes if source.op not in ("get_attr",)]
        if not read:
            return None
        node = read[0]
    return node


def _only_shapes(program: Program, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = program.get_submodule(str(node.target))
        return isinstance(module, (nn.Flatten, nn.Identity)) or type(module).__name__ == "Permute"
    return bare_name(node) in SHAPING


def _step_of(program: Program, node: fx.Node) -> str | None:
    if node.op == "call_module":
        return _module_step(program, node, program.get_submodule(str(node.target)))
    name, read = bare_name(node), node.args[0] if node.args else None
    if not isinstance(read, fx.Node) or read.name not in program.values:
        return None
    before, after = program.values[read.name].shape, program.values[node.name].shape
    if name in ACTIVATION_FUNCTIONS:
        return ACTIVATION_FUNCTIONS[name]
    if name == "gelu":
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if name in AVERAGES | LARGEST and math.prod(after) in (_channels(program, read, node), math.prod(before)):
        return "mean" if name in AVERAGES else "max"
    if name == "getitem" and len(before) == 2 and _picks_first(node.args[1]):
        return "first"
    if name == "layer_norm":
        return f"layer_norm:{node.args[4] if len(node.args) > 4 else node.kwargs.get('eps', 1e-5)}"
    return None


def _module_step(program: Program, node: fx.Node, module: nn.Module) -> str | None:
    read = node.args[0]
    if not isinstance(read, fx.Node) or read.name not in program.values:
        return None
    if type(module) in ACTIVATION_MODULES:
        return ACTIVATION_MODULES[type(module)]
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if isinstance(module, nn.Dropout):
        return f"dropout:{module.p}" if module.p else ""
    if isinstance(module, nn.Linear):
        return f"linear:{module.out_features}"
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool1d, nn.AvgPool2d)):
        return "mean" if math.prod(program.values[node.name].shape[1:]) == 1 else None
    if isinstance(module, (nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool1d)):
        return "max" if math.prod(program.values[node.name].shape[1:]) == 1 else None
    if isinstance(module, nn.LayerNorm):
        return f"layer_norm:{module.eps}" if len(module.normalized_shape) == 1 else None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return f"batch_norm:{module.eps}"
    if isinstance(module, nn.GroupNorm):
        return f"group_norm:{module.num_groups}:{module.eps}"
    return None


def _channels(program: Program, read: fx.Node, node: fx.Node) -> int:
    """How many numbers are left when all positions of a value are pooled, as this node does it."""
    shape, after = program.values[read.name].shape, program.values[node.name].shape
    return shape[0] if after[0] == shape[0] and len(shape) == 3 else shape[-1]


def _picks_first(index: object) -> bool:
    """Whether an index is `[:, 0]`."""
    return isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and index[1] == 0


def _belongs_to_convolution(program: Program, node: fx.Node) -> bool:
    """Whether this is a batch norm right behind a convolution."""
    if node.op != "call_module" or not isinstance(program.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm):
        return False
    source = node.all_input_nodes[0]
    return source.op == "call_module" and isinstance(program.get_submodule(str(source.target)), nn.modules.conv._ConvNd)


def _classifier(program: Program, node: fx.Node) -> nn.Linear | None:
    module = program.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.Linear) else None
