"""The torch.fx tracer: one node a module call, questions about shapes answered, both modes in one graph."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.nn import functional

from exitify.errors import ModelError, first_line

log = logging.getLogger(__name__)

DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}

BATCHES = (1, 250)
"""Batch sizes at which a question about a shape is answered. What is the same at both is a constant; 250 is even and no side of a picture."""

CONSTRUCTORS = ("zeros", "ones", "empty", "rand", "randn")
"""Functions of torch that take sizes one by one, and do so from numbers alone."""

RESHAPING_IN_PLACE = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_")
"""Methods after which questions about a tensor's shape would be answered wrongly."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


Traced = tuple[fx.Graph, dict[str, torch.Tensor]]
"""A graph, and the tensors in it that belong to no module."""


def trace(model: nn.Module, example: Mapping[str, torch.Tensor], whole: Iterable[str] = ()) -> Traced:
    """Return what `model` computes as a graph of module calls, the same in train() and in eval(); and its constants by name.

    Python code that asks about a shape gets the answer for this input's, unless it depends on the batch size: the graph
    holds for any. What cannot be traced (a branch on values, on the batch size) stays one node, the innermost module
    that can; so does the innermost module that computes something else in train() than in eval().

    Args:
        model: In any mode; left as it is.
        example: What `forward` is given, by argument.
        whole: Modules that stay single nodes in any case.

    Raises:
        ModelError: the model itself, outside its submodules, is what cannot be traced. The message names the line.
    """
    graphs: list[tuple[int, Traced, _Search]] = []
    for knows_shapes in (False, True):
        search = _Search(model, example, knows_shapes, whole)
        try:
            traced = search.both_modes()
        except ModelError:
            if knows_shapes and not graphs:
                raise
            continue
        if not search.untraceable:
            return traced
        graphs.append((_weights_inside(model, search.untraceable), traced, search))
    _, traced, search = min(graphs, key=lambda found: found[0])
    for piece, reason in search.untraceable.items():
        log.info("kept as one piece: %s (%s)", piece, reason)
    return traced


def _weights_inside(model: nn.Module, paths: Iterable[str]) -> int:
    return sum(parameter.numel() for path in paths for parameter in model.get_submodule(path).parameters())


class _Search:
    """Traces again and again, with more modules left whole, until what is left can be traced."""

    def __init__(self, model: nn.Module, example: Mapping[str, torch.Tensor], knows_shapes: bool, whole: Iterable[str]) -> None:
        self.model, self.example, self.knows_shapes = model, example, knows_shapes
        self.untraceable: dict[str, str] = {}
        self.moody = set(whole)
        self.drawing: set[str] = set()

    def both_modes(self) -> Traced:
        """The graph, when it is the same in both modes."""
        while True:
            calm, constants, readers = self.one_mode(training=False)
            if not readers:
                return calm, constants
            lively, _, more = self.one_mode(training=True)
            if _same(calm, lively) and not self.drawing:
                return calm, constants
            differing = _innermost(self.drawing) or _innermost_that_differ(calm, lively, readers | more)
            if not differing:
                line = (readers | more).get("", "")
                raise ModelError(
                    f"{type(self.model).__name__} itself computes something else in train() than in eval(){line}",
                    "move what depends on the mode into a submodule of its own; auxiliary outputs: build it without (aux_logits=False)",
                )
            self.moody |= differing

    def one_mode(self, *, training: bool) -> tuple[fx.Graph, dict[str, torch.Tensor], dict[str, str]]:
        """The graph in this mode and its constants, and which modules read the mode, with the line."""
        while True:
            tracer = _Tracer(self.untraceable.keys() | self.moody, self.model, self.example, self.knows_shapes)
            try:
                with (
                    seeded(),
                    _modes(self.model, training),
                    _watched(tracer),
                    left_as_it_was(self.model) as kept,
                    _checkpoints_open(tracer),
                    _sizes_in_tuples(),
                ):
                    graph = tracer.trace(self.model)
                read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
                constants = {name: value for name, value in (vars(self.model) | kept).items() if name in read}
                for place in tracer.checkpoints:
                    log.warning("%s recomputes its activations to save memory (torch.utils.checkpoint); the program keeps them", place or "the model")
                self.drawing = tracer.drawing
                return graph, constants, tracer.readers
            except Exception as error:
                piece = next((path for path in reversed(tracer.inside) if path not in self.untraceable), None)
                if piece is None:
                    raise ModelError(
                        f"{type(self.model).__name__} cannot be traced: {first_line(error)}{line_of(error)}",
                        "move the part that depends on values or shapes into a submodule of its own; it is then kept as one piece",
                    ) from error
                self.untraceable.update(dict.fromkeys(self._alike(piece), first_line(error)))

    def _alike(self, piece: str) -> list[str]:
        """This module and all others of its class, which would fail one after the other."""
        kind = type(self.model.get_submodule(piece))
        if issubclass(kind, CONTAINERS):
            return [piece]
        return [path for path, module in self.model.named_modules() if type(module) is kind and path]


class _Tracer(fx.Tracer):
    """Keeps torch's own modules and the given ones as single nodes; its proxies answer questions about shapes."""

    def __init__(self, leaves: Iterable[str], model: nn.Module, example: Mapping[str, torch.Tensor], knows_shapes: bool) -> None:
        super().__init__()
        self.leaves, self.example, self.knows_shapes = set(leaves), example, knows_shapes
        self.inside: list[str] = []
        self.readers: dict[str, str] = {}
        self.checkpoints: dict[str, None] = {}
        self.drawing: set[str] = set()
        self.is_tracing = self.has_region_without_gradients = False
        self.shapes = Shapes(model, example)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Proxies for what the example gives; everything else that `forward` takes is left at its default."""
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, argument in list(enumerate(arguments))[1:]:
            name = str(argument.node.target)
            if name in self.example:
                argument.node.args = ()  # its default: a program has to be given what its example was
                continue
            arguments[i] = argument.node.args[0] if argument.node.args else {} if name.startswith("**") else ()
            self.graph.erase_node(argument.node)
        return function, arguments

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.shapes.is_asked:  # no part of the trace
            return forward(*args, **kwargs)
        path, before = self.path_of_module(m), _drawn()
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        if _drawn() != before:  # numbers drawn while tracing would be constants of the graph
            self.drawing.add(path)
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; where gradients are switched off the module around becomes one, since a graph has no such regions."""
        if self.is_tracing and not torch.is_grad_enabled():
            if self.inside:
                raise fx.proxy.TraceError("a part of it runs under torch.no_grad()")
            self.has_region_without_gradients = True
        return super().create_node(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        """With gradients, as in training."""
        with torch.enable_grad():
            self.is_tracing = True
            graph = super().trace(*args, **kwargs)
        if self.has_region_without_gradients:
            log.warning("the model switches gradients off for a part of its forward (torch.no_grad); the program does not")
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter's proxy."""
        return attr_val if self.shapes.is_asked else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.shapes.answer(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(self.shapes.answer(obj.node, len))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        return self.shapes.answer(obj.node, lambda value: tuple(value.keys()))

    def read_mode(self, place: str) -> None:
        """Note that the module being traced reads its mode."""
        self.readers.setdefault(self.inside[-1] if self.inside else "", place)


class _Proxy(fx.Proxy):
    """A value in the graph that also answers what follows from the input's shape alone."""

    tracer: _Tracer

    def __getattr__(self, k: str) -> Any:
        if self.tracer.knows_shapes and k in ("shape", "ndim"):
            sizes = self.tracer.shapes.sizes(self)
            return sizes if k == "shape" else len(sizes)
        return _Attribute(self, k)

    def __len__(self) -> int:
        return self.tracer.shapes.answer(self.node, len)

    def __int__(self) -> int:
        return int(self.tracer.shapes.answer(self.node))

    def __index__(self) -> int:
        return self.tracer.shapes.answer(self.node).__index__()

    def __float__(self) -> float:
        return float(self.tracer.shapes.answer(self.node))

    def __contains__(self, item: Any) -> bool:
        return self.tracer.shapes.answer(self.node, lambda value: item in value)


class _Attribute(_Proxy, fx.proxy.Attribute):
    """`x.shape`, or the method that is about to be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in RESHAPING_IN_PLACE:
            raise fx.proxy.TraceError(f"{self.attr} changes the shape of a tensor that others hold")
        if self.tracer.knows_shapes and self.attr in ("size", "dim") and not isinstance(self.root, _Attribute):
            sizes = self.tracer.shapes.sizes(self.root)
            if self.attr == "dim":
                return len(sizes)
            dim = args[0] if args else kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        return super().__call__(*args, **kwargs)


class Shapes:
    """Works out, when asked, what nodes would give for tensors without numbers at each of `BATCHES`."""

    def __init__(self, model: nn.Module, example: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.example = example
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.found: dict[fx.Node, tuple[Any, ...]] = {}
        self.is_asked = False

    def answer(self, node: fx.Node, question: Callable[[Any], Any] = lambda value: value) -> Any:
        """What `question` gives for this node's value, the same at every batch size.

        Raises:
            TraceError: it depends on the batch size, or on values.
        """
        answers = []
        for value in self.values(node):
            try:
                answers.append(question(value))
            except Exception as error:
                raise fx.proxy.TraceError(first_line(error)) from error
        if not all(_is_plain(answer) for answer in answers):
            raise fx.proxy.TraceError(f"what Python does next depends on the values of a tensor ({node.name})")
        if any(type(answer) is not type(answers[0]) or answer != answers[0] for answer in answers):
            raise fx.proxy.TraceError(f"what Python does next depends on the batch size ({node.name} is {' or '.join(map(str, answers))})")
        return answers[0]

    def sizes(self, proxy: fx.Proxy) -> tuple[Any, ...]:
        """The tensor's shape: numbers, and proxies where the batch size decides."""
        seen = self.values(proxy.node)
        if not all(isinstance(value, torch.Tensor) for value in seen) or len({value.ndim for value in seen}) > 1:
            raise fx.proxy.TraceError(f"{proxy.node.name} has no shape that is known before it is computed")
        own = fx.proxy.Attribute(proxy, "shape")
        sides = list(zip(*(value.shape for value in seen)))
        return tuple(side[0] if len(set(side)) == 1 else _Proxy(cast(Any, own)[i].node, proxy.tracer) for i, side in enumerate(sides))

    def values(self, node: fx.Node) -> tuple[Any, ...]:
        """What the node would give, one at each batch size."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self.found]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if current not in self.found:
                self.found[current] = tuple(self._run(current, i) for i in range(len(BATCHES)))
        return self.found[node]

    def _run(self, node: fx.Node, i: int) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self.found[source][i])
        self.is_asked = True
        try:
            with self.mode, torch.no_grad():
                return self._compute(node, i, args, kwargs)
        finally:
            self.is_asked = False

    def _compute(self, node: fx.Node, i: int, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            example = self.example[str(node.target)]
            return torch.empty(BATCHES[i], *example.shape[1:], dtype=example.dtype, device=example.device)
        if node.op == "get_attr":
            return _attribute(self.model, str(node.target))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            with _modes(module, False):  # statistics stay as they are
                return module(*args, **kwargs)
        if node.target is getattr and args[1] in ("requires_grad", "grad_fn", "grad", "is_leaf"):
            raise fx.proxy.TraceError(f"what Python does next depends on {args[1]}, which is not the same in training")
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not isinstance(value, FakeTensor)


# --- around a trace -------------------------------------------------------------------------------------------------


@contextmanager
def _modes(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode; afterwards each in its own again."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def _watched(tracer: _Tracer) -> Iterator[None]:
    """Tell the tracer who reads `self.training`, in whichever method."""

    class Mode:
        def __get__(self, module: nn.Module | None, kind: Any = None) -> Any:
            if module is None:
                return self
            if "training" not in module.__dict__:
                raise AttributeError("training")
            frame = inspect.currentframe()
            caller = frame.f_back if frame is not None else None
            if caller is not None and not _is_torchs(caller.f_code.co_filename):
                tracer.read_mode(f" ({caller.f_code.co_filename}:{caller.f_lineno})")
            return module.__dict__["training"]

        def __set__(self, module: nn.Module, value: bool) -> None:
            module.__dict__["training"] = value

    nn.Module.training = Mode()  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


def _is_torchs(file: str) -> bool:
    return file.startswith((os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)) or file.startswith("<")


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Whatever is kept in modules meanwhile is taken out again; yields, afterwards, what was new in the model itself.

    A forward may cache tables, fill lists and count its calls, and torch.fx puts the constants of the graph there.
    """
    before = [
        (module, dict(vars(module)), {name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, (list, dict, set))})
        for module in model.modules()
    ]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()]
    kept: dict[str, Any] = {}
    try:
        yield kept
    finally:
        for module, attributes, containers in before:
            for name in vars(module).keys() - attributes.keys():
                value = vars(module).pop(name)
                if module is model:
                    kept[name] = value
            vars(module).update(attributes)
            for name, saved in containers.items():
                container = attributes[name]
                container.clear()
                container.extend(saved) if isinstance(container, list) else container.update(saved)
        with torch.no_grad():
            for buffer, version, numbers in buffers:
                if buffer._version != version:
                    buffer.copy_(numbers)


@contextmanager
def _checkpoints_open(tracer: _Tracer) -> Iterator[None]:
    """Let checkpointed regions be traced as what they compute."""
    package = torch.utils.checkpoint
    reentrant, plain = package.CheckpointFunction.apply, package._checkpoint_without_reentrant_generator

    def note() -> None:
        tracer.checkpoints[tracer.inside[-1] if tracer.inside else ""] = None

    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        note()
        return function(*args)

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        note()
        yield

    package.CheckpointFunction.apply = apply  # type: ignore[method-assign]
    package._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        package.CheckpointFunction.apply = reentrant  # type: ignore[method-assign]
        package._checkpoint_without_reentrant_generator = plain


@contextmanager
def _sizes_in_tuples() -> Iterator[None]:
    """Let `torch.zeros(batch, 3)` be recorded as `torch.zeros((batch, 3))` is."""

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_split = len(args) > 1 and any(isinstance(argument, fx.Proxy) for argument in args)
            return function(tuple(args), **kwargs) if is_split else function(*args, **kwargs)

        return call

    with ExitStack() as restored:
        for name in CONSTRUCTORS:
            function = getattr(torch, name)
            restored.callback(setattr, torch, name, function)
            setattr(torch, name, recording(function))
        yield


@contextmanager
def seeded() -> Iterator[None]:
    """All generators, from which a model may draw, at their starts; afterwards where they were."""
    drawn, numbers = random.getstate(), np.random.get_state()
    try:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(0)
            if devices:
                torch.cuda.manual_seed_all(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numbers)


# --- two modes, one graph -------------------------------------------------------------------------------------------


def _same(calm: fx.Graph, lively: fx.Graph) -> bool:
    return _signature(list(calm.nodes)) == _signature(list(lively.nodes))


def _signature(nodes: Sequence[fx.Node]) -> list[Any]:
    """What these nodes compute, without their names; whether functional dropout drops anything is left out."""
    order = {node: i for i, node in enumerate(nodes)}

    def shown(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"node {order[value]}" if value in order else "from outside"
        if isinstance(value, (tuple, list)):
            return tuple(map(shown, value))
        if isinstance(value, dict):
            return tuple((key, shown(item)) for key, item in value.items())
        if isinstance(value, slice):
            return ("slice", shown(value.start), shown(value.stop), shown(value.step))
        return value if isinstance(value, _PLAIN) else repr(value)

    found = []
    for node in nodes:
        args, kwargs = node.args, dict(node.kwargs)
        if node.target in DROPOUTS:
            given = dict(zip(("input", "p", "training", "inplace"), args), **kwargs)
            args, kwargs = (given["input"], given.get("p", 0.5)), {}
        found.append((node.op, str(node.target), shown(args), shown(kwargs)))
    return found


def _innermost_that_differ(calm: fx.Graph, lively: fx.Graph, readers: Iterable[str]) -> set[str]:
    """Of the modules that read their mode, those that compute something else in train() though nothing inside them does."""
    inside = [_by_module(graph) for graph in (calm, lively)]
    differ = {path for path in readers if path and _signature(inside[0].get(path, ())) != _signature(inside[1].get(path, ()))}
    return _innermost(differ)


def _innermost(paths: set[str]) -> set[str]:
    return {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}


def _drawn() -> tuple[Any, ...]:
    """Where the generators stand that a model may draw from."""
    numbers = np.random.get_state(legacy=False)["state"]
    return hash(random.getstate()), numbers["pos"], hash(numbers["key"].tobytes()), hash(torch.get_rng_state().numpy().tobytes())


def _by_module(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for path in {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()}:
            found.setdefault(path, []).append(node)
    return found


def line_of(error: BaseException) -> str:
    """The last line of the model's own code in the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_torchs(frame.filename)]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
