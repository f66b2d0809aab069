"""From a trained `nn.Module` to a Program: one torch.fx node a module call, the same parameters, both modes alive."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from exitify.errors import ModelError, first_line
from exitify.exported import exported_place, raise_to_modules
from exitify.plan import Plan, Value
from exitify.program import Program, copy_graph, in_mode
from exitify.tracer import BATCHES, DROPOUTS, Shapes, left_as_it_was, seeded, trace

Example = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


def capture(model: nn.Module, example: Example, *, source: str = "", scores: str | int | None = None) -> Program:
    """Return `model` as a Program without exits.

    The program holds the model's own modules and parameters under their own names. Calls that depend on the mode
    (dropout, stochastic depth, anything that computes something else while `self.training`) stay module calls, so `train()`
    and `eval()` go on working. Batch size stays free. Both are checked here, against the model itself.

    Args:
        model: A network that returns class scores `(N, classes)`, alone or among other things.
        example: What it reads, `(N, ...)`: one tensor, several in order, or by the names of `forward`'s arguments.
        source: How the user named the model, for the record.
        scores: Where in what the model returns its class scores are, when that is not plain: a key, or a number in a
            tuple; of nested ones `outer.inner`.

    Raises:
        ModelError: the model cannot be traced (the message names module and line), or what was traced is not the model.
    """
    inputs, by_name = _by_argument(model, example), isinstance(example, Mapping)
    was_training = model.training and not _is_exported(model)  # an exported graph has one mode, and says True all the same
    with in_mode(model, training=False), torch.no_grad():
        expected = {batch: _call(model, _with_batch(inputs, batch), by_name=by_name) for batch in (1, 3)}
        at = _where_scores_are(expected[3], 3, scores)
        for batch, answer in expected.items():
            _refuse_other_scores(_follow(answer, at), batch)
        members, graph, places = _from_exported(model, inputs) if _is_exported(model) else _trace(model, inputs)
        read = [node.name for node in graph.nodes if node.op == "placeholder" and node.users]
        if not read:
            raise ModelError("the model computes nothing from its input", "give a network that reads what it is given")
        result = _scores_node(graph, at)
        with left_as_it_was(members):
            values = _describe_values(members, graph, inputs)
        plan = Plan(read[0], result.name, values={name: values[name] for name in (*read, result.name)}, more_inputs=tuple(read[1:]))
        program = Program(members, graph, plan, values=values, places=places, source=source)
        program.eval()
        for batch, answer in expected.items():
            _require_same(_call(program, _with_batch(inputs, batch)), answer, f"eval() at batch {batch}")
    if not _is_exported(model):
        _check_train_mode(model, program, inputs, by_name)
    program.training = was_training
    for name in program._modules.keys() - model._modules.keys():
        program.get_submodule(name).train(was_training)  # the others are the model's own, and have their modes again
    return program


# --- what goes in, and what comes out -------------------------------------------------------------------------------


def _by_argument(model: nn.Module, example: Example) -> dict[str, torch.Tensor]:
    """The example by the names of `forward`'s arguments, in their order."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a torch.nn.Module", "give the module itself, not its state_dict or a function")
    signature = inspect.signature(model.forward)
    given: tuple[tuple[Any, ...], Mapping[str, Any]] = (
        ((), example) if isinstance(example, Mapping) else (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})
    )
    try:
        bound = signature.bind(*given[0], **given[1])
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__}.forward{signature} cannot be called with the example: {error}", "give one tensor an argument"
        ) from error
    inputs = dict(bound.arguments)
    for name, parameter in signature.parameters.items():  # *images, in an exported graph for instance
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in inputs:
            raise ModelError(f"{type(model).__name__}.forward takes any number of inputs (*{name})", "wrap it in a module with named inputs")
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in inputs:
            raise ModelError(f"{type(model).__name__}.forward has no argument {next(iter(inputs[name]))!r} of its own", "give what it names")
    for name, tensor in inputs.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim < 2:
            raise ModelError(
                f"the example input must be {'tensors' if len(inputs) > 1 else 'one tensor'} with a batch dimension"
                + (f", and {name!r} is not" if len(inputs) > 1 else ""),
                "for an image network: torch.zeros(1, 3, 224, 224)",
            )
        if name in ("skip", "all_exits"):
            raise ModelError(f"an input called {name!r} is a name that Program uses itself", "rename it in the model")
    return inputs


def _with_batch(inputs: Mapping[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    """The example with that many rows."""
    return {name: tensor[:1].expand(batch, *tensor.shape[1:]).clone() for name, tensor in inputs.items()}


def _call(model: nn.Module, inputs: Mapping[str, torch.Tensor], *, by_name: bool = False) -> Any:
    try:
        return model(**inputs) if by_name else model(*inputs.values())
    except Exception as error:
        shapes = " and ".join("x".join(map(str, x.shape[1:])) for x in inputs.values())
        raise ModelError(
            f"the model fails on an input of shape {shapes} at batch {len(next(iter(inputs.values())))}: {first_line(error)}",
            "check --input-shape (without the batch); a .pt2 must be exported with a dynamic batch dimension",
        ) from error


def _where_scores_are(result: Any, batch: int, scores: str | int | None) -> tuple[Any, ...]:
    """The keys that lead to the class scores in what the model returns."""
    found = dict(_tensors(result))
    if scores is not None:
        for path in found:
            if ".".join(map(str, path)) == str(scores):
                return path
        there_are = ", ".join(".".join(map(str, path)) for path in found)
        raise ModelError(f"the model returns nothing called {scores!r}", f"it returns {there_are or 'no tensors'}")
    if () in found:
        return ()
    look_right = [
        path for path, tensor in found.items() if tensor.ndim == 2 and len(tensor) == batch and tensor.shape[1] > 1 and tensor.is_floating_point()
    ]
    named = [path for path in look_right if path[-1] == "logits"]
    if len(named) == 1 or len(look_right) == 1:
        return (named if len(named) == 1 else look_right)[0]
    shown = ", ".join(f"{'.'.join(map(str, path))} {tuple(tensor.shape)}" for path, tensor in found.items()) or type(result).__name__
    raise ModelError(
        f"the model returns {shown}, and which of it are the class scores (N, classes) is not plain",
        "say it: --scores NAME, a key or a number (scores=… in Python)",
    )


def _tensors(result: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in what a model returns, each with the keys that lead to it."""
    if isinstance(result, torch.Tensor):
        yield path, result
    for key, value in _items(result):
        yield from _tensors(value, (*path, key))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(enumerate(value)) if isinstance(value, (tuple, list)) else []


def _follow(result: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        result = dict(_items(result))[key]
    return result


def _refuse_other_scores(scores: Any, batch: int) -> None:
    if scores.ndim != 2 or scores.shape[0] != batch:
        raise ModelError(
            f"the model returns {tuple(scores.shape)}, and exits need class scores of shape (N, classes)",
            "wrap it so that it returns the class scores alone",
        )
    if scores.shape[1] < 2:
        raise ModelError("the model has a single output; exits need at least two class scores", "turn the sigmoid output into two classes")


def _scores_node(graph: fx.Graph, path: tuple[Any, ...]) -> fx.Node:
    """The node that computes what this path leads to."""
    found: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    for key in path:
        is_made = isinstance(found, fx.Node) and isinstance(found.target, type)  # a dataclass is made by a call of its class
        found = (dict(found.kwargs) if is_made else dict(_items(found)))[key]
    if not isinstance(found, fx.Node):
        raise ModelError("the class scores are not computed from the input", "give a network that reads what it is given")
    return found


# --- the graph ------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[nn.Module, fx.Graph, dict[str, str]]:
    whole: set[str] = set()
    while True:
        graph, constants = trace(model, inputs, whole)
        members = _shell(model)
        for name, constant in constants.items():  # neither parameters nor buffers of the model: no state_dict holds them
            members.register_buffer(name, constant, persistent=False)
        with left_as_it_was(members):
            hidden = _written_through_views(members, graph, inputs)
        if not hidden:
            break
        if "" in hidden:
            raise ModelError(
                f"{type(model).__name__} writes to a tensor through a view of it ({hidden['']}), and reads it afterwards",
                "write it without in-place operations, or move that part into a submodule of its own; it is then kept as one piece",
            )
        whole |= hidden.keys()
    with left_as_it_was(members):
        _put_numbers_in(members, graph, inputs)
    _read_what_was_written(members, graph)
    _keep_dropouts(members, graph)
    _drop_unused(graph)
    return members, graph, {node.name: _place(node) for node in graph.nodes}


def _put_numbers_in(members: nn.Module, graph: fx.Graph, inputs: Mapping[str, torch.Tensor]) -> None:
    """Replace sizes that a module kept whole returns beside its tensors by what they are: numbers cannot cross a cut."""
    picked = [
        node
        for node in graph.nodes
        if node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "call_module"
        and isinstance(node.args[1], int)
    ]
    shapes = Shapes(members, inputs)
    for node in picked:
        try:
            known = shapes.answer(node)
        except Exception:  # noqa: S112 - a tensor, or what only running tells
            continue
        node.replace_all_uses_with(known)
        graph.erase_node(node)


def _written_through_views(members: nn.Module, graph: fx.Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Modules that overwrite a view while something else that shares its memory is read later, each with the operation.

    The graph does not tell that such a reader depends on the write, so no cut may fall between them.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    writers = [node for node in graph.nodes if node.args and isinstance(node.args[0], fx.Node) and _writes_in_place(members, node)]
    if not writers:
        return {}
    shapes = Shapes(members, inputs)
    memory: dict[int, list[fx.Node]] = {}
    own: dict[fx.Node, int] = {}
    try:
        for node in graph.nodes:
            if node.op not in ("output", "get_attr") and isinstance(value := shapes.values(node)[0], torch.Tensor):
                own[node] = value.untyped_storage()._cdata
                memory.setdefault(own[node], []).append(node)
    except Exception:  # what has no form without numbers is not looked into; the answers are compared all the same
        return {}
    found: dict[str, str] = {}
    for writer in writers:
        written = writer.args[0]
        assert isinstance(written, fx.Node)
        for other in memory.get(own.get(written, -1), ()):
            is_later = any(order[user] > order[writer] for user in other.users)
            if order[other] < order[writer] and other is not written and is_later:
                found[_place(writer) if writer.op != "call_module" else _place(writer).rpartition(".")[0]] = writer.name
    return found


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


def _from_exported(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[nn.Module, fx.Graph, dict[str, str]]:
    """An exported program's graph over modules, without the guards on its example shapes."""
    assert isinstance(model, fx.GraphModule)
    graph, _ = copy_graph(model.graph)
    members = _shell(model)
    members._modules.pop("_guards_fn", None)
    outputs = next(node for node in graph.nodes if node.op == "output")
    codegen: Any = model.graph._codegen
    if isinstance(outputs.args[0], (tuple, list)) and isinstance(codegen, fx.graph._PyTreeCodeGen):  # back as the network returns them
        outputs.args = (pytree.tree_unflatten(list(outputs.args[0]), cast(Any, codegen.pytree_info.out_spec)),)
    graph.set_codegen(fx.graph.CodeGen())
    for node in [node for node in graph.nodes if node.target == "_guards_fn"]:
        graph.erase_node(node)
    hidden = _written_through_views(members, graph, inputs)
    if hidden:
        raise ModelError(
            f"the exported network writes to a tensor through a view of it ({next(iter(hidden.values()))}), and reads it afterwards",
            "give the module itself, or write that part without in-place operations",
        )
    _read_what_was_written(members, graph)
    _drop_unused(graph)
    raise_to_modules(members, graph)
    return members, graph, {node.name: exported_place(node) for node in graph.nodes}


def _describe_values(members: nn.Module, graph: fx.Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, Value]:
    """Shape and dtype of each node whose first dimension is the batch, found at two batch sizes."""
    try:
        shapes = Shapes(members, inputs)
        seen = {node.name: shapes.values(node) for node in graph.nodes if node.op != "output"}
        batches: tuple[int, ...] = BATCHES
        found = [{name: _look(values[i]) for name, values in seen.items() if isinstance(values[i], torch.Tensor)} for i in range(len(batches))]
    except Exception:  # what has no form without numbers is run with them
        batches = (2, 3)
        found = [_shapes(members, graph, _with_batch(inputs, batch)) for batch in batches]
    return {
        name: Value(shape[1:], dtype)
        for name, (shape, dtype) in found[0].items()
        if shape[:1] == batches[:1] and name in found[1] and found[1][name][0] == (batches[1], *shape[1:])
    }


def _look(tensor: torch.Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _shapes(members: nn.Module, graph: fx.Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op != "output":
                shapes[n.name] = _look(result)
            return result

    try:
        Recorder(members, graph=graph).run(*inputs.values())
    except Exception as error:
        raise ModelError(
            f"the traced network fails at batch {len(next(iter(inputs.values())))}, where the model does not: {first_line(error)}",
            "a part of its forward depends on the batch size or on values; move it into a submodule of its own",
        ) from error
    return shapes


def _check_train_mode(model: nn.Module, program: Program, inputs: Mapping[str, torch.Tensor], by_name: bool) -> None:
    """Run copies of both in train() with one seed: dropout masks and batch statistics must come out the same."""
    original, captured = copy.deepcopy(model).train(), copy.deepcopy(program).train()
    noise = torch.Generator().manual_seed(0)  # the user's generator stays where it is
    wide = {
        name: torch.cat([x, torch.randn(x.shape, generator=noise).to(x)]) if x.is_floating_point() else torch.cat([x, x])
        for name, x in _with_batch(inputs, 1).items()
    }
    answers = []
    for module, named in ((original, by_name), (functools.partial(captured, all_exits=False), False)):
        with seeded(), torch.no_grad():
            answers.append(module(**wide) if named else module(*wide.values()))
    if [path for path, _ in _tensors(answers[0])] != [path for path, _ in _tensors(answers[1])]:
        raise ModelError("the model returns something else in train() than in eval()", "build it without auxiliary outputs (aux_logits=False)")
    _require_same(answers[1], answers[0], "train()")


def _require_same(got: Any, expected: Any, where: str) -> None:
    found = dict(_tensors(got))
    for path, tensor in _tensors(expected):
        if not torch.allclose(found[path], tensor, rtol=1e-4, atol=1e-5, equal_nan=True):
            gap = float((found[path] - tensor).abs().max())
            raise ModelError(
                f"in {where} the traced network differs from the model by {gap:.2g}",
                "a part of its forward depends on the mode or on values; move it into a submodule of its own",
            )
