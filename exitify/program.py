"""Program = torch.fx graph + Plan, as an ordinary `nn.Module` that a user trains, evaluates and saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from exitify.errors import ModelError, PlanError
from exitify.gradient_equilibrium import Equilibrium, equilibrate
from exitify.plan import FINAL, Mask, Plan, Value

HEADS = "exit_heads"
"""Where the heads' weights stand. Not `heads`: torchvision's vision transformers already have a child of that name."""

SKIP_NORMS = "skip_norms"
"""Where the second set of norms stands, each under its own path: `skip_norms.layer1.0.bn1`."""


@dataclass(frozen=True)
class ExitOutputs:
    """Logits of every exit, `(N, classes)` each, the network's own last.

    names: The exits' names, the last one `final`.
    logits: One tensor an exit, in the same order.
    stages: What each stage with a skip path gave to what follows it, in the plan's order: with the path left out, what
        stands in for it.
    output: What the original model returned: the last logits, or a tuple, dict or dataclass with whatever else is in it.
    """

    names: tuple[str, ...]
    logits: tuple[torch.Tensor, ...]
    stages: tuple[torch.Tensor, ...] = ()
    output: Any = None

    @property
    def final(self) -> torch.Tensor:
        """The network's own logits."""
        return self.logits[-1]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.logits[self.names.index(name)]


class Program(nn.Module):
    """A captured network with its plan.

    Holds the very modules and parameters of the model it came from, under the same names; heads stand under
    `exit_heads`, second sets of norms under `skip_norms`. In `train()` it returns `ExitOutputs`; in `eval()` what the original returned, unless
    `all_exits=True`. Graph and plan are never changed in place: a pass returns a new Program that shares the weights.

    Attributes:
        graph: One node a module call or function; the plan's values are its node names.
        plan: Exits and segments.
        values: Shape and dtype of every tensor in the graph, by node name, without the batch.
        places: The module in which each node is computed, by node name, as the user knows it.
        recipe: The passes applied so far, each as the text that makes it again.
        source: The model as the user named it, empty when it came as an object.
        equilibrium: Which gradients are scaled while training, see `exitify.passes.equilibrate_gradients`; empty for none.
    """

    _OWN = ("graph", "plan", "values", "places", "recipe", "source", "equilibrium")
    equilibrium: Equilibrium = ""  # of a Program pickled before there was such a thing, too

    def __init__(
        self,
        members: nn.Module,
        graph: fx.Graph,
        plan: Plan,
        *,
        values: Mapping[str, Value],
        places: Mapping[str, str],
        recipe: tuple[str, ...] = (),
        source: str = "",
        equilibrium: Equilibrium = "",
    ) -> None:
        super().__init__()
        for name in (*members._modules, *members._parameters, *members._buffers):
            if name in self._OWN or hasattr(Program, name) or name in ("_functions", "_frozen"):
                raise ModelError(f"the model has a member called {name!r}, a name that Program uses itself", "rename it in the model")
        self._modules.update(members._modules)
        self._parameters.update(members._parameters)
        self._buffers.update(members._buffers)
        self._non_persistent_buffers_set |= members._non_persistent_buffers_set
        self.graph, self.plan, self.values, self.places = graph, plan, dict(values), dict(places)
        self.recipe, self.source, self.equilibrium = recipe, source, equilibrium
        self._functions: dict[tuple[bool, Mask, Equilibrium], Callable[..., Any]] = {}
        self._frozen: set[str] = set()
        self.training = members.training

    def replace(self, *, members: Mapping[str, nn.Module] | None = None, **changes: Any) -> Program:
        """Return a Program with these parts changed and everything else, weights above all, shared.

        Args:
            members: Child modules to add.
            **changes: `graph`, `plan`, `values`, `places`, `recipe`, `source` or `equilibrium`.
        """
        shell = nn.Module()
        shell._modules.update({**self._modules, **(members or {})})
        shell._parameters.update(self._parameters)
        shell._buffers.update(self._buffers)
        shell._non_persistent_buffers_set |= self._non_persistent_buffers_set
        shell.training = self.training
        own = {name: changes.get(name, getattr(self, name)) for name in self._OWN}
        result = Program(shell, own.pop("graph"), own.pop("plan"), **own)
        result._frozen = set(self._frozen)
        return result

    def forward(self, *inputs: torch.Tensor, skip: str | Sequence[bool] | None = None, all_exits: bool | None = None, **named: torch.Tensor) -> Any:
        """Run the network.

        Args:
            *inputs, **named: What the original model takes; of several what the example that it was captured with gave.
            skip: Which skip paths to leave out, one bool each in the plan's order, or text (see `Plan.mask`); None leaves none out.
            all_exits: True returns `ExitOutputs`, False the original output; None means True in `train()`, False in `eval()`.

        Raises:
            PlanError: the mask is not one of this network.
        """
        wants_all = self.training if all_exits is None else all_exits
        mask = self.plan.mask(skip)
        equilibrium: Equilibrium = self.equilibrium if wants_all and self.training else ""
        key = (wants_all, mask, equilibrium)
        if key not in self._functions:
            graph = self.masked_graph(mask)
            if equilibrium:
                self._equilibrate(graph, equilibrium)
            self._functions[key] = compile_graph(self._with_exits(graph) if wants_all else self._without_exits(graph))
        result = self._functions[key](self, *inputs, **named)
        if not wants_all:
            return result
        names = self.plan.exit_names
        return ExitOutputs(names, tuple(result[: len(names)]), tuple(result[len(names) : -1]), result[-1])

    def freeze_backbone(self) -> Program:
        """Leave only the heads to be trained: no gradients elsewhere, and norm statistics, dropout and drop-path at rest too."""
        self._frozen = {name for name, module in self._modules.items() if module is not None and name != HEADS}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(f"{HEADS}."))
        return self.train(self.training)

    def train(self, mode: bool = True) -> Program:
        """Set the mode; frozen parts stay in `eval()`."""
        super().train(mode)
        for name in self._frozen:
            self._modules[name].eval()  # type: ignore[union-attr]
        return self

    def _node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

    def head_node(self, exit_name: str) -> fx.Node:
        """The node that calls this exit's head.

        Raises:
            PlanError: the plan's exit has no head yet.
        """
        calls = [node.name for node in self.graph.nodes if node.op == "call_module" and node.target == f"{HEADS}.{exit_name}"]
        if not calls:
            raise PlanError(f"exit {exit_name!r} has no head", "apply the pass attach-heads first")
        return self._node(calls[0])

    def masked_graph(self, skip: str | Sequence[bool] | None) -> fx.Graph:
        """The graph with a mask's skip paths left out, their norms switched; nodes keep their names."""
        graph, renamed = copy_graph(self.graph)
        nodes = {node.name: new for node, new in renamed.items()}
        for path in self.plan.left_out(skip):
            for name in path.norms:
                _switch(graph, nodes[name])
            for name in path.drop_paths:
                nodes[name].replace_all_uses_with(nodes[name].all_input_nodes[0])
                graph.erase_node(nodes[name])
            nodes[path.after].replace_all_uses_with(nodes[path.before])
            for node in reversed(graph.nodes):
                if node.op not in ("placeholder", "output") and not node.users and not str(node.target).startswith(f"{HEADS}."):
                    graph.erase_node(node)
        return graph

    def _equilibrate(self, graph: fx.Graph, equilibrium: Equilibrium) -> None:
        nodes = {node.name: node for node in graph.nodes}
        heads = [nodes[self.head_node(point.name).name] for point in self.plan.exits]
        equilibrate(graph, heads, nodes[self.plan.output], set(carriers(graph, *self.plan.inputs)), equilibrium)

    def _with_exits(self, graph: fx.Graph) -> fx.Graph:
        nodes = {node.name: node for node in graph.nodes}
        exits = [nodes[self.head_node(name).name] for name in self.plan.exit_names if name != FINAL]
        stages = [nodes[path.after] if path.after in nodes else nodes[path.before] for path in self.plan.skips]
        output = next(node for node in graph.nodes if node.op == "output").args[0]
        whole = extract(graph, [*exits, nodes[self.plan.output], *stages, *_nodes_in(output)])
        own = {node.name: node for node in whole.nodes}
        last = own["output"]
        listed: Any = last.args[0]
        last.args = ((*listed[: len(listed) - len(_nodes_in(output))], fx.node.map_arg(output, lambda node: own[node.name])),)
        return whole

    def _without_exits(self, graph: fx.Graph) -> fx.Graph:
        for node in reversed(graph.nodes):
            if node.op == "call_module" and str(node.target).startswith(f"{HEADS}."):
                graph.erase_node(node)
        return graph

    def verify(self) -> None:
        """Hold graph, plan and members against each other.

        Raises:
            PlanError: a plan's name is not in the graph, an exit lacks its head, segments do not cover the graph once.
        """
        self.graph.lint()
        self.plan.check()
        nodes = {node.name: node for node in self.graph.nodes}
        second = {name.removeprefix(f"{SKIP_NORMS}.") for name in self.state_dict() if name.startswith(f"{SKIP_NORMS}.")}
        for name in (*self.plan.inputs, self.plan.output):
            if name not in nodes:
                raise PlanError(f"the plan names {name!r}, which the graph does not compute")
        for node in self.graph.nodes:
            if node.op == "call_module":
                self.get_submodule(str(node.target))
        for point in self.plan.exits:
            if point.after not in nodes:
                raise PlanError(f"exit {point.name!r} stands after {point.after!r}, which the graph does not compute")
        for path in self.plan.skips:
            for name in (path.start, path.before, path.after, *path.norms, *path.drop_paths):
                if name not in nodes:
                    raise PlanError(f"skip path {path.name!r} names {name!r}, which the graph does not compute")
            for name in path.norms:
                for tensor in norm_tensors(self, name):
                    if tensor not in second:
                        raise PlanError(f"skip path {path.name!r} switches {name!r}, which has no second set of norms")
        self._verify_cover(nodes)

    def _verify_cover(self, nodes: Mapping[str, fx.Node]) -> None:
        if not self.plan.segments:
            return
        owner = {name: segment.name for segment in self.plan.segments for name in segment.nodes}
        for name in owner:
            if name not in nodes:
                raise PlanError(f"segment {owner[name]!r} holds {name!r}, which the graph does not compute")
        for name in carriers(self.graph, *self.plan.inputs):
            if name not in self.plan.inputs and name not in owner:
                raise PlanError(f"no segment computes {name!r}")

    def __str__(self) -> str:
        return self.plan.text()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}, "_compiled_call_impl": None}  # what compile() made is bound to this one, and no data

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        own = {"graph": copy_graph(self.graph)[0]}
        state = {key: own[key] if key in own else copy.deepcopy(value, memo) for key, value in self.__getstate__().items()}
        duplicate.__dict__.update(state)
        return duplicate


def norm_tensors(program: Program, name: str) -> tuple[str, ...]:
    """Names of the parameters and buffers that a norm's node reads."""
    node = program._node(name)
    if node.op == "call_module":
        return tuple(f"{node.target}.{tensor}" for tensor in program.get_submodule(str(node.target)).state_dict())
    return tuple(str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


def _nodes_in(output: Any) -> list[fx.Node]:
    """The nodes in what a graph returns."""
    found: list[fx.Node] = []
    fx.node.map_arg(output, found.append)
    return found


def _switch(graph: fx.Graph, node: fx.Node) -> None:
    """Let a norm read its second set."""
    if node.op == "call_module":
        node.target = f"{SKIP_NORMS}.{node.target}"
        return
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            with graph.inserting_before(node):
                node.replace_input_with(source, graph.get_attr(f"{SKIP_NORMS}.{source.target}"))


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return a graph with the same nodes under the same names, and which node became which."""
    result = fx.Graph(tracer_cls=graph._tracer_cls)
    renamed: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, renamed)
    for node in graph.nodes:
        if node.op == "output":
            renamed[node] = result.output(output)
    return result, renamed


def carriers(graph: fx.Graph, *starts: str) -> list[str]:
    """Return `starts` and, in order, the nodes computed from what they hold.

    Left out: parameters and what is computed from them alone, and what reads only a tensor's size, type or device:
    every segment can work those out for itself. A node that uses a size is a carrier only if it reads a carrier too.
    """
    carrying: dict[str, None] = {}
    for node in graph.nodes:
        is_start = node.op == "placeholder" and node.name in starts
        is_computed = node.op not in ("output", "placeholder", "get_attr") and not _reads_no_values(node)
        if is_start or (is_computed and any(source.name in carrying for source in node.all_input_nodes)):
            carrying[node.name] = None
    return list(carrying)


def _reads_no_values(node: fx.Node) -> bool:
    """Whether this node asks a tensor for its size, type or device."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and "sym_size" in str(node.target)


def extract(graph: fx.Graph, outputs: Iterable[fx.Node], inputs: Iterable[fx.Node] = ()) -> fx.Graph:
    """Return the part of a graph that computes `outputs` from `inputs` (and from placeholders, where no input stands before).

    Placeholders stay, all of them when `inputs` is empty, so that the result is called as the original is.
    """
    wanted, given = list(outputs), set(inputs)
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            if node not in given:
                pending.extend(node.all_input_nodes)
    result = fx.Graph(tracer_cls=graph._tracer_cls)
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in given:
            made[node] = result.placeholder(node.name)
        elif (node in needed and node.op != "output") or (not given and node.op == "placeholder"):
            made[node] = result.node_copy(node, lambda n: made[n])
    result.output(tuple(made[node] for node in wanted))
    return result


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Return the graph as a function of `self` (whoever holds the modules and parameters) and its placeholders."""
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, "<exitify program>", "exec"), scope)  # noqa: S102 - source generated by torch.fx from the graph
    return scope["forward"]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in that mode; afterwards each of its modules in its own again."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was
