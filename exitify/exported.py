"""From a torch.export graph to a graph of modules: an exported network that trains as the one it was exported from."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

log = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")
TENSORS = ("weight", "bias", *STATISTICS)
COUNTER = "num_batches_tracked"

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONVOLUTIONS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
FEATURE_DROPOUTS = {2: nn.Dropout, 3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
"""Convolutions by the sides of their kernels, the others by the dimensions of what they read."""


@dataclass(frozen=True)
class _Module:
    """A module of torch.nn that is not made yet."""

    kind: Callable[..., nn.Module]
    options: Mapping[str, Any]

    def make(self) -> nn.Module:
        """Without memory for weights: they come from the file."""
        with torch.device("meta"):
            return self.kind(**self.options)


@dataclass(frozen=True)
class _Function:
    """What a module is told from.

    name: As in aten, without overload. given: All its arguments. tensors: Those that a module holds, by its names for them.
    shape: Of what it reads; empty when the file does not tell.
    """

    name: str
    given: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    shape: tuple[Any, ...]

    @property
    def is_affine(self) -> bool:
        return "weight" in self.tensors or "bias" in self.tensors

    @property
    def features(self) -> Any:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else self.shape[1]


@dataclass(frozen=True)
class _Call:
    """A function's node that can call a module.

    source: What it reads. result: Itself, or the node that takes the first of its results.
    owner: The path of the module that holds its tensors; empty when it has none.
    """

    node: fx.Node
    source: fx.Node
    result: fx.Node
    owner: str
    module: _Module


def raise_to_modules(members: nn.Module, graph: fx.Graph) -> None:
    """Turn, in place, calls of functions over a module's tensors back into calls of that module.

    torch.export writes each layer as a function of its tensors, in the mode of that day: batch norm with its running
    statistics, dropout that drops nothing. Raised again are convolutions, linear layers, embeddings, batch, layer, group,
    instance and RMS norms, dropouts and RReLU. Nodes keep their names; parameters and buffers are the same objects under
    the same names in the same order. The rules:

    1. A function becomes a module where its tensors stand, if they have that module's names (`weight`, `bias`,
       `running_mean`, `running_var`) and nothing else stands there. A convolution over a parameter of the root, or over a
       weight that is computed (weight norm, standardisation), stays a function: it trains as it is.
    2. Calls over the same tensors become calls of one module if they agree in everything else; if not, all stay functions.
    3. What has no tensors gets a module of its own where the file says that it was, if nothing else is there, else
       `raised_<node>`.
    4. A batch norm without the counter of its batches (a strict export leaves it out) counts from 0, under no key of the
       `state_dict`. The momentum 0 is None, the mean over all batches: torch writes both alike.

    What an export in eval() has lost does not come back: stochastic depth, dropout inside of attention, branches that
    depend on the mode. Recurrent layers, and what is inside of `torch.cond` or `torch.no_grad`, stay as in eval(). Layers
    that their network held in eval() while it was trained are trained like the others. After `run_decompositions` no
    dropout is left.

    Args:
        members: What the graph reads. Modules that change are replaced, so that those given stay as they are.
        graph: Of a program exported in eval().
    """
    calls = _raisable(members, graph)
    owners = {call.owner: call.module for call in calls if call.owner}
    modules = {owner: _over(module.make().train(members.training), members.get_submodule(owner)) for owner, module in owners.items()}
    for name, child in members._modules.items():
        members._modules[name] = _replaced(child, name, modules)
    own: dict[str, _Module] = {}
    for call in calls:
        path = call.owner or _path_of_its_own(members, call, own)
        if not call.owner and path not in own:
            own[path] = call.module
            _add(members, path, call.module.make().train(members.training))
        node = call.result
        node.op, node.target, node.args, node.kwargs = "call_module", path, (call.source,), {}
        if call.node is not node:
            graph.erase_node(call.node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    inner = [module.graph for module in members.modules() if isinstance(module, fx.GraphModule)]
    if fixed := [node.name for each in (graph, *inner) for node in each.nodes if _is_fixed_in_eval(node)]:
        log.warning("these parts of the exported network stay as in eval() while it is trained: %s", ", ".join(fixed))


def exported_place(node: fx.Node) -> str:
    """The path of the module in which a node of an exported graph was computed; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]).removeprefix("L['self'].") if paths else ""


# --- which calls ----------------------------------------------------------------------------------------------------


def _raisable(members: nn.Module, graph: fx.Graph) -> list[_Call]:
    calls = [call for node in graph.nodes if (call := _as_call(members, node)) is not None]
    first: dict[str, _Module] = {}
    disagreed = {call.owner for call in calls if call.owner and first.setdefault(call.owner, call.module) != call.module}
    return [call for call in calls if call.owner not in disagreed]


def _as_call(members: nn.Module, node: fx.Node) -> _Call | None:
    name = _function_name(node)
    if name not in _MODULES:
        return None
    given = _arguments(node)
    read = {tensor: given[tensor] for tensor in TENSORS if given.get(tensor) is not None}
    owner = _owner(members, read) if read else ""
    result = node if len(node.target._schema.returns) == 1 else _first_of_several(node)  # type: ignore[union-attr]
    source = next(given[argument] for argument in ("indices", "input", "self") if argument in given)
    if owner is None or result is None or not isinstance(source, fx.Node):
        return None
    value, holder = source.meta.get("val"), members.get_submodule(owner)
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    module = _MODULES[name](_Function(name, given, {tensor: getattr(holder, tensor) for tensor in read}, shape))
    return _Call(node, source, result, owner, module) if module is not None and _is_constant(module.options) else None


def _function_name(node: fx.Node) -> str:
    """`conv2d` of `aten.conv2d.default` and `aten.conv2d.padding`."""
    is_aten = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return str(node.target._schema.name).removeprefix("aten::") if is_aten else ""  # type: ignore[union-attr]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, those left out with their defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return {a.name: a.default_value for a in arguments} | {a.name: value for a, value in zip(arguments, node.args)} | node.kwargs


def _owner(members: nn.Module, read: Mapping[str, Any]) -> str | None:
    """The path of the module that holds these tensors under these names and nothing besides; None when there is none."""
    paths = [str(node.target).rpartition(".") for node in read.values() if isinstance(node, fx.Node) and node.op == "get_attr"]
    owner = paths[0][0] if paths else ""
    if not owner or paths != [(owner, ".", name) for name in read]:
        return None
    holder = members.get_submodule(owner)
    parameters, buffers = ({name for name, tensor in held.items() if tensor is not None} for held in (holder._parameters, holder._buffers))
    statistics = read.keys() & {*STATISTICS}
    buffers -= {COUNTER} if statistics else set()
    is_whole = type(holder) is nn.Module and not holder._modules and parameters == read.keys() - statistics and buffers == statistics
    return owner if is_whole else None


def _first_of_several(node: fx.Node) -> fx.Node | None:
    """The node that takes the first of the results, when nothing reads the others."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0 else None


def _is_constant(options: Mapping[str, Any]) -> bool:
    """Whether no size of the input is among them."""
    values = [one for value in options.values() for one in (value if isinstance(value, tuple) else (value,))]
    return all(value is None or isinstance(value, (bool, int, float, str)) for value in values)


def _is_fixed_in_eval(node: fx.Node) -> bool:
    """Whether this function computed something else in train()."""
    name = _function_name(node)
    given = _arguments(node) if name else {}
    return name == "_native_batch_norm_legit_no_training" or False in [given.get(mode) for mode in ("train", "training", "use_input_stats")]


# --- which modules --------------------------------------------------------------------------------------------------


def _convolution(function: _Function) -> _Module | None:
    weight, given = function.tensors["weight"], function.given
    sides, groups = weight.ndim - 2, given["groups"]
    is_transposed = given.get("transposed", "output_padding" in given)
    kind = (TRANSPOSED_CONVOLUTIONS if is_transposed else CONVOLUTIONS).get(sides)
    if kind is None:
        return None
    channels_in, channels_out = (weight.shape[0], weight.shape[1] * groups) if is_transposed else (weight.shape[1] * groups, weight.shape[0])
    options = {name: _for_each_side(given[name], sides) for name in ("stride", "padding", "dilation")}
    if is_transposed:
        options["output_padding"] = _for_each_side(given["output_padding"], sides)
    options |= {"in_channels": channels_in, "out_channels": channels_out, "kernel_size": tuple(weight.shape[2:])}
    return _Module(kind, options | {"groups": groups, "bias": "bias" in function.tensors})


def _for_each_side(value: Any, sides: int) -> Any:
    if isinstance(value, str):
        return value  # padding="same"
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * sides if len(values) == 1 else values


def _linear(function: _Function) -> _Module | None:
    weight = function.tensors["weight"]
    options = {"in_features": weight.shape[-1], "out_features": weight.shape[0], "bias": "bias" in function.tensors}
    return _Module(nn.Linear, options) if weight.ndim == 2 else None


def _embedding(function: _Function) -> _Module:
    (count, width), given = function.tensors["weight"].shape, function.given
    padding = given["padding_idx"] if given["padding_idx"] >= 0 else None
    options = {"num_embeddings": count, "embedding_dim": width, "padding_idx": padding}
    return _Module(nn.Embedding, options | {name: given[name] for name in ("scale_grad_by_freq", "sparse")})


def _batch_norm(function: _Function) -> _Module | None:
    module = _norm_with_statistics(BATCH_NORMS, function.given.get("training", False), function)
    return _Module(module.kind, {**module.options, "momentum": module.options["momentum"] or None}) if module is not None else None


def _instance_norm(function: _Function) -> _Module | None:
    return _norm_with_statistics(INSTANCE_NORMS, function.given["use_input_stats"], function)


def _norm_with_statistics(kinds: Mapping[int, type[nn.Module]], uses_those_of_input: bool, function: _Function) -> _Module | None:
    kind, given = kinds.get(len(function.shape)), function.given
    is_tracking = {*STATISTICS} <= function.tensors.keys()
    if kind is None or uses_those_of_input == is_tracking:  # in eval() one or the other
        return None
    options = {"num_features": function.features, "eps": given["eps"], "momentum": given["momentum"]}
    return _Module(kind, options | {"affine": function.is_affine, "track_running_stats": is_tracking})


def _norm_of_values(kind: type[nn.Module], function: _Function) -> _Module:
    """Layer and RMS norm."""
    shape = tuple(function.given["normalized_shape"])
    return _Module(kind, {"normalized_shape": shape, "eps": function.given["eps"], "elementwise_affine": function.is_affine})


def _group_norm(function: _Function) -> _Module | None:
    given = function.given
    if not function.tensors and not function.shape:
        return None
    groups = given["num_groups"] if "num_groups" in given else given["group"]
    options = {"num_groups": groups, "num_channels": function.features, "eps": given["eps"], "affine": function.is_affine}
    return _Module(nn.GroupNorm, options)


def _dropout(kind: type[nn.Module], function: _Function) -> _Module | None:
    options = {"p": function.given["p"], "inplace": function.name.endswith("_")}
    return _Module(kind, options) if function.given["train"] is False else None


def _feature_dropout(function: _Function) -> _Module | None:
    kind = FEATURE_DROPOUTS.get(len(function.shape))
    return _dropout(kind, function) if kind is not None else None


def _rrelu(function: _Function) -> _Module | None:
    options = {"lower": function.given["lower"], "upper": function.given["upper"], "inplace": function.name.endswith("_")}
    return _Module(nn.RReLU, options) if function.given["training"] is False else None


_MODULES: dict[str, Callable[[_Function], _Module | None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"), _convolution),
    "linear": _linear,
    "embedding": _embedding,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    "instance_norm": _instance_norm,
    **dict.fromkeys(("layer_norm", "native_layer_norm"), functools.partial(_norm_of_values, nn.LayerNorm)),
    "rms_norm": functools.partial(_norm_of_values, nn.RMSNorm),
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    **dict.fromkeys(("dropout", "dropout_"), functools.partial(_dropout, nn.Dropout)),
    **dict.fromkeys(("alpha_dropout", "alpha_dropout_"), functools.partial(_dropout, nn.AlphaDropout)),
    **dict.fromkeys(("feature_alpha_dropout", "feature_alpha_dropout_"), functools.partial(_dropout, nn.FeatureAlphaDropout)),
    **dict.fromkeys(("feature_dropout", "feature_dropout_"), _feature_dropout),
    **dict.fromkeys(("rrelu", "rrelu_"), _rrelu),
}
"""What tells the module of a function by that name; None where no module computes the same."""


# --- where they stand -----------------------------------------------------------------------------------------------


def _over(module: nn.Module, holder: nn.Module) -> nn.Module:
    """The module over what `holder` holds. They share it: where one is moved to a device, the other is."""
    if module._buffers.get(COUNTER) is not None and holder._buffers.get(COUNTER) is None:
        holder.register_buffer(COUNTER, torch.zeros((), dtype=torch.long, device=holder.running_mean.device), persistent=False)  # type: ignore[arg-type]
    for own, held in ((module._parameters, holder._parameters), (module._buffers, holder._buffers)):
        for name in own:
            held.setdefault(name, None)
    module._parameters, module._buffers = holder._parameters, holder._buffers
    module._non_persistent_buffers_set = holder._non_persistent_buffers_set
    if COUNTER in module._non_persistent_buffers_set:
        module.register_load_state_dict_post_hook(_expect_counter)  # type: ignore[no-untyped-call]
    return module


def _expect_counter(module: nn.Module, keys: Any) -> None:
    """Where a dictionary tells no versions torch adds the counter to it, and then says that it did not expect it."""
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if key.rpartition(".")[2] != COUNTER]


def _replaced(module: nn.Module | None, path: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """A module with what `modules` names put in, the given one as it was."""
    if path in modules:
        return modules[path]
    if type(module) is not nn.Module:
        return module
    result = copy.copy(module)
    result._modules = {name: _replaced(child, f"{path}.{name}", modules) for name, child in module._modules.items()}
    return result


def _path_of_its_own(members: nn.Module, call: _Call, own: Mapping[str, _Module]) -> str:
    path = exported_place(call.result)
    can_stand = own[path] == call.module if path in own else _is_free(members, path)
    return path if can_stand else f"raised_{call.result.name}"


def _is_free(members: nn.Module, path: str) -> bool:
    if not re.fullmatch(r"\w+(\.\w+)*", path):
        return False
    holder: Any = members
    for name in path.split("."):
        if type(holder) is not nn.Module:
            return False
        if not hasattr(holder, name):
            return True
        holder = getattr(holder, name)
    return False


def _add(members: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in members._modules:
            members.add_module(name, nn.Module())
        members = members.get_submodule(name)
    members.add_module(last, module)
