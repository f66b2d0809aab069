"""From a trained `nn.Module` to a Program: one torch.fx node a module call, the same parameters, both modes alive."""

from __future__ import annotations

import copy
import functools
import logging
import os
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from exitify.errors import ModelError, first_line
from exitify.plan import Plan, Value
from exitify.program import Program, copy_graph, in_mode

log = logging.getLogger(__name__)

DROPOUTS = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
}


def capture(model: nn.Module, example: torch.Tensor, *, source: str = "") -> Program:
    """Return `model` as a Program without exits.

    The program holds the model's own modules and parameters under their own names. Calls that depend on the mode
    (dropout, stochastic depth, anything that reads `self.training`) stay module calls, so `train()` and `eval()` go on
    working. Batch size stays free. Both are checked here, against the model itself.

    Args:
        model: A network with one input and one output of class scores `(N, classes)`.
        example: One or more inputs, `(N, ...)`.
        source: How the user named the model, for the record.

    Raises:
        ModelError: the model cannot be traced (the message names module and line), or what was traced is not the model.
    """
    _refuse_other_inputs(model, example)
    was_training = model.training and not _is_exported(model)  # an exported graph has one mode, and says True all the same
    with in_mode(model, training=False), torch.no_grad():
        expected = {batch: _call(model, _with_batch(example, batch)) for batch in (1, 2, 3)}
        members, graph, places = _from_exported(model) if _is_exported(model) else _trace(model)
        source_node, result = _ends(graph)
        values = _describe_values(members, graph, example)
        plan = Plan(source_node.name, result.name, values={name: values[name] for name in (source_node.name, result.name)})
        program = Program(members, graph, plan, values=values, places=places, source=source)
        program.eval()
        for batch, answer in expected.items():
            _require_same(program(_with_batch(example, batch)), answer, f"eval() at batch {batch}")
    if not _is_exported(model):
        _check_train_mode(model, program, example)
    program.training = was_training
    for name in program._modules.keys() - model._modules.keys():
        program.get_submodule(name).train(was_training)  # the others are the model's own, and have their modes again
    return program


def _refuse_other_inputs(model: nn.Module, example: torch.Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a torch.nn.Module", "give the module itself, not its state_dict or a function")
    if not isinstance(example, torch.Tensor) or example.ndim < 2:
        raise ModelError("the example input must be one tensor with a batch dimension", "for an image network: torch.zeros(1, 3, 224, 224)")


def _with_batch(example: torch.Tensor, batch: int) -> torch.Tensor:
    """The example with that many rows."""
    return example[:1].expand(batch, *example.shape[1:]).clone()


def _call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    try:
        result = model(x)
    except Exception as error:
        shape = "x".join(map(str, x.shape[1:]))
        raise ModelError(
            f"the model fails on an input of shape {shape} at batch {x.shape[0]}: {first_line(error)}",
            "check --input-shape (without the batch); a .pt2 must be exported with a dynamic batch dimension",
        ) from error
    if not isinstance(result, torch.Tensor) or result.ndim != 2 or result.shape[0] != x.shape[0]:
        shown = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise ModelError(
            f"the model returns {shown}, and exits need class scores of shape (N, classes)", "wrap it so that it returns the class scores alone"
        )
    if result.shape[1] < 2:
        raise ModelError("the model has a single output; exits need at least two class scores", "turn the sigmoid output into two classes")
    return result


class _ModuleTracer(fx.Tracer):
    """Keeps torch's own modules, and modules whose forward reads `self.training`, as single nodes."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.inside: list[str] = []

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Proxies for what `forward` takes; arguments after the first that can be left out are left out."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in list(enumerate(arguments))[2:]:
            target = str(argument.node.target)
            if argument.node.args or target.startswith("*"):
                arguments[i] = argument.node.args[0] if argument.node.args else {} if target.startswith("**") else ()
                self.graph.erase_node(argument.node)
        return function, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name) or _reads_mode(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def _reads_mode(module: nn.Module) -> bool:
    """Whether its forward reads `self.training` for something other than functional dropout (`_keep_dropouts` mends that)."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "training" not in code.co_names:
        return False
    functional_names = {function.__name__ for function in DROPOUTS} - set(module._modules)  # not `self.dropout(x)`
    return not functional_names & set(code.co_names)


def _trace(model: nn.Module) -> tuple[nn.Module, fx.Graph, dict[str, str]]:
    before = set(vars(model))
    try:
        graph = _trace_what_can_be(model)
        members = _shell(model)
        _hold_constants(members, graph, model)
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)  # where torch.fx keeps the constants that it meets
    _read_what_was_written(members, graph)
    _keep_dropouts(members, graph)
    _drop_unused(graph)
    return members, graph, {node.name: _place(node) for node in graph.nodes}


def _trace_what_can_be(model: nn.Module) -> fx.Graph:
    """Trace, turning the innermost module that cannot be traced into a single node until the rest can."""
    leaves: set[str] = set()
    while True:
        tracer = _ModuleTracer(leaves)
        try:
            return tracer.trace(model)
        except Exception as error:
            piece = next((path for path in reversed(tracer.inside) if path not in leaves), None)
            if piece is None:
                raise ModelError(
                    f"{type(model).__name__} cannot be traced: {first_line(error)}{_user_line(error)}",
                    "move the part that depends on values or shapes into a submodule of its own; it is then kept as one piece",
                ) from error
            log.info("kept as one piece: %s (%s)", piece, first_line(error))
            leaves.add(piece)


def _hold_constants(members: nn.Module, graph: fx.Graph, model: nn.Module) -> None:
    """Tensors that are neither parameters nor buffers of the root become buffers, which no state_dict holds."""
    for node in graph.nodes:
        if node.op == "get_attr" and "." not in str(node.target) and not hasattr(members, str(node.target)):
            members.register_buffer(str(node.target), getattr(model, str(node.target)), persistent=False)


def _shell(model: nn.Module) -> nn.Module:
    """A bare module with the same children, parameters and buffers."""
    shell = nn.Module()
    shell._modules.update(model._modules)
    shell._parameters.update(model._parameters)
    shell._buffers.update(model._buffers)
    shell._non_persistent_buffers_set |= model._non_persistent_buffers_set
    shell.training = model.training
    return shell


def _read_what_was_written(members: nn.Module, graph: fx.Graph) -> None:
    """Let whoever reads a value after it was overwritten in place read the result of that, so that the graph tells what depends on what."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        written = node.args[0] if node.args else None
        if isinstance(written, fx.Node) and _writes_in_place(members, node):
            for reader in [user for user in written.users if order[user] > order[node]]:
                reader.replace_input_with(written, node)


def _writes_in_place(members: nn.Module, node: fx.Node) -> bool:
    """Whether this call overwrites its first argument and returns it."""
    if node.op == "call_module":
        module = members.get_submodule(str(node.target))
        return type(module).__module__.startswith("torch.nn.") and getattr(module, "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        written = node.target._schema.arguments[0].alias_info
        return written is not None and written.is_write
    is_underscored = str(getattr(node.target, "__name__", "")).endswith("_") and getattr(node.target, "__module__", "") != "_operator"
    return node.op == "call_function" and (is_underscored or node.kwargs.get("inplace") is True)  # operator.and_ writes nothing


def _drop_unused(graph: fx.Graph) -> None:
    """Erase what nothing reads; if that had an effect after all, `capture` finds the answers different."""
    for node in reversed(graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)


def _keep_dropouts(members: nn.Module, graph: fx.Graph) -> None:
    """Turn functional dropout, whose mode tracing has frozen, back into module calls."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in DROPOUTS:
            continue
        arguments = dict(zip(("input", "p", "training", "inplace"), node.args), **node.kwargs)
        name = f"traced_{node.name}"
        members.add_module(name, DROPOUTS[node.target](arguments.get("p", 0.5)).train(members.training))
        node.op, node.target, node.args, node.kwargs = "call_module", name, (arguments["input"],), {}


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(node.target) if node.op == "call_module" else (paths[-1] if paths else "")


def _is_exported(model: nn.Module) -> bool:
    """Whether the model comes from `torch.export`."""
    return isinstance(model, fx.GraphModule) and any("aten." in str(node.target) for node in model.graph.nodes)


def _from_exported(model: nn.Module) -> tuple[nn.Module, fx.Graph, dict[str, str]]:
    """An exported program's graph, without the guards on its example shapes."""
    assert isinstance(model, fx.GraphModule)
    graph, _ = copy_graph(model.graph)
    members = _shell(model)
    _read_what_was_written(members, graph)
    _drop_unused(graph)
    members._modules.pop("_guards_fn", None)
    outputs = next(node for node in graph.nodes if node.op == "output")
    if isinstance(outputs.args[0], (tuple, list)):
        outputs.args = (outputs.args[0][0],)
    graph.set_codegen(fx.graph.CodeGen())
    return members, graph, {node.name: _exported_place(node) for node in graph.nodes}


def _exported_place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]).removeprefix("L['self'].") if paths else ""


def _describe_values(members: nn.Module, graph: fx.Graph, example: torch.Tensor) -> dict[str, Value]:
    """Shape and dtype of each node whose first dimension is the batch, found by running two batch sizes."""
    seen = [_shapes(members, graph, _with_batch(example, batch)) for batch in (2, 3)]
    return {
        name: Value(shape[1:], dtype)
        for name, (shape, dtype) in seen[0].items()
        if name in seen[1] and shape[:1] == (2,) and seen[1][name][0] == (3, *shape[1:])
    }


def _shapes(members: nn.Module, graph: fx.Graph, x: torch.Tensor) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op != "output":
                shapes[n.name] = (tuple(result.shape), str(result.dtype).removeprefix("torch."))
            return result

    try:
        Recorder(members, graph=graph).run(x)
    except Exception as error:
        raise ModelError(
            f"the traced network fails at batch {x.shape[0]}, where the model does not: {first_line(error)}",
            "a part of its forward depends on the batch size or on values; move it into a submodule of its own",
        ) from error
    return shapes


def _ends(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """The one input and the one output."""
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1:
        raise ModelError(f"the model has {len(inputs)} inputs; exitify reads networks with one", "wrap it in a module with one input")
    if not isinstance(output, fx.Node):
        raise ModelError("the model returns more than class scores", "wrap it so that it returns the class scores alone")
    return inputs[0], output


def _check_train_mode(model: nn.Module, program: Program, example: torch.Tensor) -> None:
    """Run copies of both in train() with one seed: dropout masks and batch statistics must come out the same."""
    original, captured = copy.deepcopy(model).train(), copy.deepcopy(program).train()
    x = torch.cat([_with_batch(example, 2), torch.randn_like(_with_batch(example, 2))]) if example.is_floating_point() else _with_batch(example, 4)
    answers = []
    for module in (original, functools.partial(captured, all_exits=False)):
        with _seeded(), torch.no_grad():
            answers.append(module(x))
    if isinstance(answers[0], torch.Tensor):
        _require_same(answers[1], answers[0], "train()")
    else:
        raise ModelError("the model returns something else in train() than in eval()", "build it without auxiliary outputs (aux_logits=False)")


@contextmanager
def _seeded() -> Iterator[None]:
    """All generators from which a model may draw, at their starts; afterwards where they were."""
    drawn, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numbers)


def _require_same(got: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        gap = float((got - expected).abs().max())
        raise ModelError(
            f"in {where} the traced network differs from the model by {gap:.2g}",
            "a part of its forward depends on the mode or on values; move it into a submodule of its own",
        )


def _user_line(error: BaseException) -> str:
    """The last line of the model's own code in the traceback."""
    ours = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
