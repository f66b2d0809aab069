"""From a Program to an artifact: torch ends here."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxscript import optimizer
from torch import fx, nn

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, build_artifact, check_artifact, graph_path
from exitify.artifact.manifest import FORMAT, InputContract, Manifest, ModelOrigin
from exitify.artifact.onnx_graph import ELEMENT_TYPES, IR_VERSION, OPSET
from exitify.artifact.tensors import tensor_spans, write_tensors
from exitify.errors import ArtifactError, DataError, ModelError, first_line
from exitify.heads import HeadWithScores
from exitify.passes.cost import device_of, example_input
from exitify.passes.cut_segments import CutSegments
from exitify.plan import Plan, Segment, Value, mask_text
from exitify.program import HEADS, SKIP_NORMS, Program, copy_graph, in_mode, norm_tensors
from exitify.runtime.session import Session
from exitify.version import __version__

KEPT_INSIDE_BYTES = 1024
"""Constants up to this size stay inside a segment's graph; larger ones, and every weight, stand once in the weights file."""

_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU"}


def export(program: Program, *, contract: InputContract | None = None, heads_trained: bool = True) -> Artifact:
    """Return the program as an artifact: every segment as ONNX (opset 20, norms unfolded), every weight once.

    Args:
        program: With or without exits; in any mode. Cut into segments here if it is not yet.
        contract: What it reads and what its classes are called; by default the shape alone.
        heads_trained: False for fresh heads, which `exitify.train_heads` must train before anyone calibrates.

    Raises:
        DataError: the contract is another network's.
        ModelError: an operation has no ONNX form, or the exported network does not compute what the program does.
    """
    if not program.plan.segments:
        program = CutSegments()(program)
    if program.plan.more_inputs:
        raise ModelError(
            f"the network reads {len(program.plan.inputs)} inputs ({', '.join(program.plan.inputs)}), and an artifact holds networks of one",
            "wrap it in a module that holds the others, as buffers for instance",
        )
    _refuse_other_dtypes(program)
    contract = contract or InputContract(
        shape=program.values[program.plan.input].shape, color="L" if program.values[program.plan.input].shape[0] == 1 else "RGB"
    )
    _check_contract(contract, program.plan)
    if device_of(program).type != "cpu":
        raise ModelError(f"the program is on {device_of(program)}, and is exported on the CPU", "export(program.cpu()); move it back afterwards")
    with in_mode(program, training=False):
        network, same = _whole_network(program)
    cut = _Cut(network, same, program)
    files: dict[str, bytes] = {
        WEIGHTS_FILE: write_tensors({name: tensor for name, tensor in cut.tensors.items() if not name.startswith(f"{HEADS}.")}),
        HEADS_FILE: write_tensors({name: tensor for name, tensor in cut.tensors.items() if name.startswith(f"{HEADS}.")}),
    }
    places = {
        name: (path.removeprefix("model/"), start, end)
        for path in (WEIGHTS_FILE, HEADS_FILE)
        for name, (_, _, start, end) in tensor_spans(memoryview(files[path]), path).items()
    }
    segments = []
    for segment in program.plan.segments:
        model, inputs = cut.segment(segment, places)
        files[graph_path(segment.name)] = model.SerializeToString(deterministic=True)
        if segment.has_two_norm_sets:
            files[graph_path(segment.name, second=True)] = cut.with_second_norms(model, segment, places).SerializeToString(deterministic=True)
        segments.append(replace(segment, inputs=inputs))
    plan = replace(program.plan, segments=tuple(segments))
    manifest = Manifest(FORMAT, __version__, "", ModelOrigin(program.source, program.recipe), contract, plan, heads_trained)
    artifact = build_artifact(manifest, files)
    try:
        check_artifact(artifact)
    except ArtifactError as error:
        raise ModelError(f"the exported network could not be opened again: {error.problem}", "report this with the model") from error
    _compare(artifact, program)
    return artifact


def _check_contract(contract: InputContract, plan: Plan) -> None:
    contract.check()
    value = plan.values[plan.input]
    if (contract.shape, contract.dtype) != (value.shape, value.dtype):
        raise DataError(
            f"the contract says {contract.dtype} {contract.shape}, and the network reads {value.dtype} {value.shape}",
            "give the shape without the batch",
        )
    if contract.classes and len(contract.classes) != plan.classes:
        raise DataError(f"{len(contract.classes)} classes are named, and the network has {plan.classes}", "name them all in order: --classes A,B,…")


def _refuse_other_dtypes(program: Program) -> None:
    weights = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in program.state_dict().items()}
    for name, dtype in {**weights, **{name: value.dtype for name, value in program.plan.values.items()}}.items():
        if dtype not in ELEMENT_TYPES:
            raise ModelError(f"{name!r} is {dtype}, which an artifact cannot hold", "convert the model before: model.float()")


def _whole_network(program: Program) -> tuple[ModelProto, dict[str, list[str]]]:
    """The network with all heads as one ONNX graph whose outputs bear the plan's names, and which of these are one tensor."""
    graph, renamed = copy_graph(program.graph)
    nodes = {node.name: new for node, new in renamed.items()}
    heads = nn.ModuleDict()
    outputs: dict[str, fx.Node] = {}
    for segment in program.plan.segments:
        if segment.kind != "head":
            outputs.update({name: nodes[name] for name in segment.outputs})
    for point in program.plan.exits:
        head = nodes[program.head_node(point.name).name]
        heads[point.name] = HeadWithScores(program.get_submodule(str(head.target))).eval()  # type: ignore[arg-type]
        for i, name in enumerate((point.logits, point.features, point.scores)):
            with graph.inserting_after(head):
                outputs[name] = graph.call_function(operator.getitem, (head, i))
        if point.previous:
            head.args = (head.args[0], outputs[program.plan.exit(point.previous).logits])
    _copy_before_overwriting(graph, nodes, program)
    final = next(node for node in graph.nodes if node.op == "output")
    final.args = (tuple(outputs.values()),)
    module = _untied(fx.GraphModule(program.replace(members={HEADS: heads}), graph).eval(), program)
    weights = program.state_dict().keys()

    def is_no_weight(node: Any) -> bool | None:
        """Leave what is computed from a weight to the engine: folded here, the weight would be stored a second time."""
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    try:
        with _quiet():
            exported = torch.onnx.export(
                module,
                (example_input(program.values[program.plan.input], batch=2),),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=[program.plan.input],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert exported is not None
            optimizer.fold_constants(exported.model, input_size_limit=2**22, output_size_limit=2**22, should_fold=is_no_weight)
            optimizer.remove_unused_nodes(exported.model)
    except Exception as error:
        raise ModelError(f"the network has no ONNX form: {first_line(error)}", "replace the operator named by one that ONNX has") from error
    proto: ModelProto = exported.model_proto
    return proto, _name_outputs(proto, list(outputs), program.plan.input)


def _untied(module: nn.Module, program: Program) -> nn.Module:
    """The module, in a copy if need be, with a tensor of its own for each norm that switches: of a shared one ONNX keeps one name."""
    names = {name for path in program.plan.skips for node in path.norms for name in norm_tensors(program, node)}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    count = Counter(map(id, parameters.values()))
    tied = [name for name in names if name in parameters and count[id(parameters[name])] > 1]
    if not tied:
        return module
    untied = copy.deepcopy(module)
    for name in tied:
        owner, _, last = name.rpartition(".")
        setattr(untied.get_submodule(owner), last, nn.Parameter(parameters[name].detach().clone(), requires_grad=False))
    return untied


def _name_outputs(network: ModelProto, names: Sequence[str], input_name: str) -> dict[str, list[str]]:
    """Let every output bear its name, and return by name which others are the same tensor.

    Dropout does nothing here, and a head may read its features as they are: torch.onnx leaves such values one name. The
    first name is the tensor's then, and the others are copies of it, which engines leave out again.
    """
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, network.graph.output):
        groups.setdefault(value.name, [] if value.name != input_name else [input_name]).append(name)
    new = {name: f"{name}.inside" for node in network.graph.node for name in node.output if name in names}
    new.update({found: group[0] for found, group in groups.items()})
    nodes = [_copy_of(input_name, name) for name in groups.get(input_name, [])[1:]]
    for node, name in zip(network.graph.node, _names_of_modules(network)):
        copied = NodeProto()
        copied.CopyFrom(node)
        copied.name = name
        copied.input[:] = [new.get(name, name) for name in node.input]
        copied.output[:] = [new.get(name, name) for name in node.output]
        nodes.append(copied)
        nodes += [_copy_of(new[name], other) for name in node.output for other in groups.get(name, [])[1:]]
    del network.graph.node[:]
    network.graph.node.extend(nodes)
    same: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for node in nodes:
        if node.op_type == "Identity":
            first[node.output[0]] = first.get(node.input[0], node.input[0])
            same.setdefault(first[node.output[0]], []).append(node.output[0])
    return same


_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch.export says of operations that stand in no module."""


def _copy_of(value: str, name: str) -> NodeProto:
    """A node that gives a value another name."""
    return helper.make_node("Identity", [value], [name], name=f"/{name}/Identity")


def _names_of_modules(network: ModelProto) -> list[str]:
    """A name for every node by which viewers such as Netron group and find them: the module's path, then the operator, `/layer1/0/conv1/Conv`."""
    count: Counter[str] = Counter()
    names = []
    for node in network.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = ["", "", *ast.literal_eval(scopes)][-2].removeprefix(_NO_MODULE)  # torch.onnx puts the operation last
        name = "/".join(["", *filter(None, module.split(".")), node.op_type])
        names.append(f"{name}_{count[name]}" if count[name] else name)
        count[name] += 1
    return names


class _Watch(fx.Interpreter):
    """Runs a graph, and notes which node overwrites which of its arguments in place."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, graph=program.graph)
        self.writes: list[tuple[fx.Node, fx.Node]] = []

    def run_node(self, n: fx.Node) -> Any:
        given = {source: self.env[source] for source in n.all_input_nodes if isinstance(self.env[source], torch.Tensor)}
        versions = {source: tensor._version for source, tensor in given.items()}
        result = super().run_node(n)
        self.writes.extend((n, source) for source, tensor in given.items() if tensor._version != versions[source])
        return result


def _copy_before_overwriting(graph: fx.Graph, nodes: Mapping[str, fx.Node], program: Program) -> None:
    """Let in-place operations write to a copy, so that a value that leaves its segment is what it was when it was computed."""
    watch = _Watch(program)
    with torch.no_grad():
        watch.run(example_input(program.values[program.plan.input]))
    for writer, written in watch.writes:
        with graph.inserting_before(nodes[writer.name]):
            copied = graph.call_method("clone", (nodes[written.name],))
        nodes[writer.name].replace_input_with(nodes[written.name], copied)


class _Cut:
    """The whole graph, taken apart at the plan's values."""

    def __init__(self, network: ModelProto, same: Mapping[str, list[str]], program: Program) -> None:
        self.same = same
        self.nodes: list[NodeProto] = [node for node in network.graph.node if node.op_type != "Constant"]
        self.made_by = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.plan = program.plan
        self.switching = {path.name: {t for name in path.norms for t in norm_tensors(program, name)} for path in program.plan.skips}
        self.owner: dict[int, str] = {}
        self.known = {program.plan.input}
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
        for node in network.graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = _constant(node)
        own = {name: tensor.detach().numpy() for name, tensor in program.state_dict().items()}
        self.inside = {name: array for name, array in constants.items() if array.nbytes <= KEPT_INSIDE_BYTES and name not in own}
        self.tensors = {**own, **{name: array for name, array in constants.items() if name not in self.inside}}
        for name in own.keys() & constants.keys():
            if not np.array_equal(own[name], constants[name]):
                raise ModelError(f"exporting to ONNX changed the weight {name!r}", "report this with the model")

    def segment(self, segment: Segment, places: Mapping[str, tuple[str, int, int]]) -> tuple[ModelProto, tuple[str, ...]]:
        """The segment's model, and which values it really reads."""
        needed: set[int] = set()
        read: dict[str, None] = {}
        given = {name: other for name, others in self.same.items() if name not in segment.inputs for other in others if other in segment.inputs}
        pending = list(segment.outputs)
        while pending:
            name = pending.pop()
            name = given.get(name, name)
            if name in self.known or name in segment.parameters:
                read[name] = None
            elif name in self.made_by and self.made_by[name] not in needed:
                needed.add(self.made_by[name])
                pending.extend(self.nodes[self.made_by[name]].input)
            elif name and name not in self.made_by:
                read[name] = None
        for i in needed:
            owner = self.owner.setdefault(i, segment.name)
            if owner != segment.name and self.nodes[i].op_type in _HEAVY:
                raise ModelError(f"segments {owner!r} and {segment.name!r} both compute {self.nodes[i].name!r}", "report this with the model")
        nodes = self._reading(segment, given, [self.nodes[i] for i in sorted(needed)])
        read = {name: None for name in read if name != self.plan.input or any(name in node.input for node in nodes)}
        self.known.update(segment.outputs)
        order = {name: i for i, name in enumerate(segment.inputs)}
        inputs = tuple(sorted((name for name in read if name in self.plan.values), key=lambda name: order.get(name, len(order))))
        constants = [name for name in read if (name in self.inside or name in self.tensors) and name not in segment.parameters]
        initializers = [self._initializer(name, places) for name in constants]
        missing = set(read) - set(inputs) - set(segment.parameters) - {tensor.name for tensor in initializers}
        assert not missing, f"{segment.name}: nothing gives {missing}"
        head = {point.name: point for point in self.plan.exits}.get(segment.name.removeprefix("head_"))
        shapes: dict[str, tuple[int, ...]] = (
            {} if head is None else {head.weight: (head.head.classes, head.head.features), head.bias: (head.head.classes,), head.temperature: ()}
        )
        graph = helper.make_graph(
            nodes,
            segment.name,
            [
                *(_value_info(name, self.plan.values[name]) for name in inputs),
                *(helper.make_tensor_value_info(n, 1, shapes[n]) for n in segment.parameters),
            ],
            [_value_info(name, self.plan.values[name]) for name in segment.outputs],
            initializers,
        )
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="exitify")
        return model, inputs

    def _reading(self, segment: Segment, given: Mapping[str, str], nodes: Sequence[NodeProto]) -> list[NodeProto]:
        """The segment's nodes, reading what it is given under the name that it is given by.

        A block may read nothing but its one input, and torch.onnx takes the batch's size from the network's. So a block takes
        it from its own; what follows from that size alone then bears the block's name, as other segments compute it from another value.
        """
        sizes: dict[str, str] = {}
        own = []
        for node in nodes:
            copied = NodeProto()
            copied.CopyFrom(node)
            is_size = segment.kind == "block" and node.op_type == "Shape" and node.input[0] == self.plan.input
            computed = [name for name in node.input if name in self.made_by or name in self.known]
            copied.input[:] = segment.inputs[:1] if is_size else [sizes.get(name, given.get(name, name)) for name in node.input]
            if is_size or (computed and sizes.keys() >= set(computed)):
                sizes.update({name: f"{name}:{segment.name}" for name in node.output if name and name not in segment.outputs})
                copied.output[:] = [sizes.get(name, name) for name in node.output]
                copied.name = f"{node.name}:{segment.name}"
            own.append(copied)
        return own

    def with_second_norms(self, model: ModelProto, segment: Segment, places: Mapping[str, tuple[str, int, int]]) -> ModelProto:
        """The segment's model, reading the second set of norms."""
        second = ModelProto()
        second.CopyFrom(model)
        names = {tensor.name: f"{SKIP_NORMS}.{tensor.name}" for tensor in model.graph.initializer if tensor.name in self.switching[segment.follows]}
        for node in second.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        for tensor in second.graph.initializer:
            if tensor.name in names:
                tensor.CopyFrom(self._initializer(names[tensor.name], places))
        return second

    def _initializer(self, name: str, places: Mapping[str, tuple[str, int, int]]) -> TensorProto:
        if name in self.inside:
            return numpy_helper.from_array(self.inside[name], name)
        array = self.tensors[name]
        location, start, end = places[name]
        tensor = TensorProto(name=name, data_type=ELEMENT_TYPES[array.dtype.name], dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", start), ("length", end - start)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _constant(node: NodeProto) -> NDArray[np.generic]:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value, np.float32 if "float" in attribute.name else np.int64)


def _value_info(name: str, value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[value.dtype], ["batch", *value.shape])


def _compare(artifact: Artifact, program: Program) -> None:
    """Run the artifact on ONNX Runtime and the program in torch on one input; every exit must say the same."""
    value = program.values[program.plan.input]
    x = torch.rand(2, *value.shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, value.dtype))
    session = Session(artifact)
    for skip in dict.fromkeys((program.plan.mask("none"), program.plan.mask("all"))):
        with in_mode(program, training=False), torch.no_grad():
            expected = program(x, skip=skip, all_exits=True)
        recorded = session.record(x.numpy(), skip)
        for name, logits in zip(expected.names, expected.logits):
            gap = np.abs(recorded.logits[name] - logits.numpy()).max() / max(float(logits.abs().max()), 1.0)
            if not gap <= 1e-4:
                masked = f" with the mask {mask_text(skip)}" if any(skip) else ""
                raise ModelError(f"the exported network's {name}{masked} differs from the model's by {gap:.2g}", "report this with the model")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress lines and its warnings about its own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
