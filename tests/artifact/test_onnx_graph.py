"""Graphs at the level of protobuf fields: the onnx package agrees, and what is not plain is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, graph_path, parameter_values
from exitify.artifact.onnx_graph import ELEMENT_TYPES, Graph, Parameter, join, merge, parse, value_info
from exitify.errors import MalformedManifest
from exitify.plan import Value
from tests.artifact.clauses import refused
from tests.artifacts import EXITS, exported, inputs

VECTOR = Value((4,), "float32")


def embedded(artifact: Artifact, model: bytes) -> ModelProto:
    """The model with its external tensors inside."""
    proto = onnx.load_model_from_string(model)
    tensors = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return proto


def run(model: ModelProto, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in model.graph.output], session.run(None, {value.name: given[value.name] for value in model.graph.input})))


def parameters(artifact: Artifact) -> dict[str, np.ndarray]:
    heads = artifact.tensors(HEADS_FILE)
    return {name: heads.get(name, np.array(1.5, np.float32)) for name in parameter_values(artifact.plan)}


def subsets(artifact: Artifact) -> list[tuple[str, ...]]:
    names = [point.name for point in artifact.plan.exits]
    return [chosen for count in range(len(names) + 1) for chosen in itertools.combinations(names, count)]


# --- against the onnx package ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_a_parsed_segment_is_what_the_onnx_package_sees(name):
    _, artifact = exported(name)
    for segment in artifact.plan.segments:
        proto = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)]))
        parsed = artifact.graph(segment.name)
        assert list(parsed.inputs) == [value.name for value in proto.graph.input]
        assert list(parsed.outputs) == [value.name for value in proto.graph.output]
        assert [NodeProto.FromString(node) for node in parsed.nodes] == list(proto.graph.node)
        assert list(parsed.initializers) == [tensor.name for tensor in proto.graph.initializer]
        assert {name: NodeProto.FromString(node) for name, node in parsed.made.items()} == {o: node for node in proto.graph.node for o in node.output}
        for tensor in proto.graph.initializer:
            if not tensor.external_data:
                assert tensor.name not in parsed.external
                continue
            info, found = ExternalDataInfo(tensor), parsed.external[tensor.name]
            assert (found.location, found.offset, found.length) == (info.location, info.offset, info.length)
            assert (found.shape, ELEMENT_TYPES[found.dtype]) == (tuple(tensor.dims), tensor.data_type)


@pytest.mark.parametrize("name", EXITS)
def test_a_segment_joined_with_none_is_itself(name):
    _, artifact = exported(name)
    looks = {**artifact.plan.values, **parameter_values(artifact.plan)}
    for segment in artifact.plan.segments:
        original = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)]))
        graph = artifact.graph(segment.name)
        joined = onnx.load_model_from_string(join([graph], list(graph.inputs), list(graph.outputs), looks))
        original.graph.name = joined.graph.name
        assert joined == original


@pytest.mark.parametrize("name", EXITS)
def test_joined_segments_compute_what_they_compute_one_after_another(name):
    _, artifact = exported(name)
    plan = artifact.plan
    values = {plan.input: inputs(3), **parameters(artifact)}
    for segment in plan.segments:
        values.update(run(embedded(artifact, bytes(artifact.files[graph_path(segment.name)])), values))
    for enabled in subsets(artifact):
        for stretch in plan.stretches(enabled):
            graphs = [artifact.graph(segment) for segment in stretch.segments]
            looks = {**plan.values, **parameter_values(plan)}
            model = embedded(artifact, join(graphs, [*stretch.inputs, *stretch.parameters], stretch.outputs, looks))
            onnx.checker.check_model(model, full_check=True)
            found = run(model, values)
            assert list(found) == list(stretch.outputs)
            for output, array in found.items():
                # Norms are folded into convolutions on one side of a cut and not on the other.
                np.testing.assert_allclose(array, values[output], rtol=1e-4, atol=1e-5)


def test_a_computation_that_two_segments_repeat_comes_once():
    _, artifact = exported("transformer")
    graphs = [artifact.graph(segment.name) for segment in artifact.plan.segments]
    nodes, _ = merge(graphs, "the model")
    assert len(nodes) < sum(len(graph.nodes) for graph in graphs)
    names = [name for node in nodes for name in NodeProto.FromString(node).output]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("value", [VECTOR, Value((3, 16, 16), "uint8"), Parameter((5, 8), "float32"), Parameter((), "float32"), Value((), "bool")])
def test_values_are_described_as_the_onnx_package_does(value):
    shape = [*([] if isinstance(value, Parameter) else ["batch"]), *value.shape]
    assert value_info("höhe", value) == helper.make_tensor_value_info("höhe", ELEMENT_TYPES[value.dtype], shape).SerializeToString()


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_element_types_are_those_of_onnx(dtype):
    assert helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) == ELEMENT_TYPES[dtype]


# --- what is refused ------------------------------------------------------------------------------------------------


def small_model() -> ModelProto:
    """Relu(x + w) with w in another file, as `export` writes it."""
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.safetensors"), ("offset", "128"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Add", ["x", "w"], ["h"], name="add"), helper.make_node("Relu", ["h"], ["y"], name="relu")]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])] for name in "xy"]
    graph = helper.make_graph(nodes, "small", *ends, [outside])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, producer_name="exitify")


def test_the_small_model_is_read():
    segment = parse(small_model().SerializeToString(), "small.onnx")
    assert (list(segment.inputs), list(segment.outputs), list(segment.made), list(segment.external)) == (["x"], ["y"], ["h", "y"], ["w"])


def test_the_standard_domain_has_two_spellings():
    model = small_model()
    model.graph.node[0].domain = "ai.onnx"
    assert parse(model.SerializeToString(), "small.onnx").made.keys() == {"h", "y"}


def test_an_initializer_inside_may_say_so():
    model = small_model()
    inside = numpy_helper.from_array(np.ones(4, np.float32), "w")
    inside.data_location = TensorProto.DEFAULT
    model.graph.initializer[0].CopyFrom(inside)
    assert parse(model.SerializeToString(), "small.onnx").external == {}


def set_field(path: str, value: object) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        *owners, last = path.split(".")
        target = model
        for part in owners:
            target = target[int(part)] if part.isdecimal() else getattr(target, part)
        setattr(target, last, value)

    return change


def add_attribute(**fields: object) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.node[0].attribute.append(AttributeProto(name="a", **fields))


def edit_outside(key: str, value: str | None) -> Callable[[ModelProto], None]:
    """Set an entry of the external data, or remove it."""

    def change(model: ModelProto) -> None:
        entries = model.graph.initializer[0].external_data
        found = next(entry for entry in entries if entry.key == key)
        if value is None:
            entries.remove(found)
        else:
            found.value = value

    return change


def if_node(model: ModelProto) -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, ["batch", 4])])
    model.graph.node[1].CopyFrom(helper.make_node("If", ["h"], ["y"], then_branch=branch, else_branch=branch))


def loop_node(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[1].CopyFrom(helper.make_node("Loop", ["h"], ["y"], body=body))


FIELDS = "a graph is a protobuf message of the fields named above"
VERSIONS = "the IR version is 10 and the opset 20, each said once"
DOMAIN = "operators are of the standard domain"
ATTRIBUTES = "attributes are numbers, strings and tensors held inside: no graphs"
NAMES = "each name in a graph is given or computed once, before it is read"
OUTSIDE = "external data has location, offset and length, each once"
EVERYWHERE = "a name means the same in every graph, and in every graph with its norms' second set"

REFUSALS: list[tuple[str, str, Callable[[ModelProto], object]]] = [
    (VERSIONS, "IR version 9, not 10", set_field("ir_version", 9)),
    (VERSIONS, "IR version 11, not 10", set_field("ir_version", 11)),
    (VERSIONS, "0 IR versions", lambda model: model.ClearField("ir_version")),
    (VERSIONS, "an opset other than 20", set_field("opset_import.0.version", 21)),
    (VERSIONS, "an opset other than 20", set_field("opset_import.0.domain", "com.microsoft")),
    (VERSIONS, "an opset other than 20", lambda model: model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))),
    (VERSIONS, "2 opsets", lambda model: model.opset_import.append(helper.make_opsetid("", 20))),
    (VERSIONS, "0 opsets", lambda model: model.ClearField("opset_import")),
    (FIELDS, "0 graphs", lambda model: model.ClearField("graph")),
    (FIELDS, "field 25 of ModelProto", lambda model: model.functions.append(onnx.FunctionProto(name="f"))),
    (FIELDS, "field 20 of ModelProto", lambda model: model.training_info.add()),
    (FIELDS, "field 14 of ModelProto", lambda model: model.metadata_props.add(key="k", value="v")),
    (FIELDS, "field 6 of ModelProto", set_field("doc_string", "hello")),
    (FIELDS, "field 10 of GraphProto", set_field("graph.doc_string", "hello")),
    (FIELDS, "field 13 of GraphProto", lambda model: model.graph.value_info.append(model.graph.input[0])),
    (FIELDS, "field 14 of GraphProto", lambda model: model.graph.quantization_annotation.add()),
    (FIELDS, "field 15 of GraphProto", lambda model: model.graph.sparse_initializer.add()),
    (FIELDS, "field 6 of NodeProto", set_field("graph.node.0.doc_string", "hello")),
    (FIELDS, "field 8 of NodeProto", set_field("graph.node.0.overload", "o")),
    (FIELDS, "field 9 of NodeProto", lambda model: model.graph.node[0].metadata_props.add(key="k", value="v")),
    (DOMAIN, "an operator of the domain b'com.microsoft'", set_field("graph.node.0.domain", "com.microsoft")),
    (DOMAIN, "an operator of the domain b'ai.onnx.ml'", set_field("graph.node.1.domain", "ai.onnx.ml")),
    (ATTRIBUTES, "an operator with a graph inside", if_node),
    (ATTRIBUTES, "an operator with a graph inside", loop_node),
    (ATTRIBUTES, "an operator with a graph inside", add_attribute(graphs=[onnx.GraphProto()])),
    (ATTRIBUTES, "another attribute than numbers", add_attribute(sparse_tensor=onnx.SparseTensorProto())),
    (ATTRIBUTES, "another attribute than numbers", add_attribute(tp=onnx.TypeProto())),
    (ATTRIBUTES, "another attribute than numbers", add_attribute(ref_attr_name="r")),
    (ATTRIBUTES, "an attribute kept in another file", lambda model: add_attribute(t=model.graph.initializer[0])(model)),
    (ATTRIBUTES, "an attribute kept in another file", lambda model: add_attribute(tensors=[model.graph.initializer[0]])(model)),
    (NAMES, "a node that reads 'nobody', which nothing before it computes", lambda model: model.graph.node[0].input.append("nobody")),
    (NAMES, "a node that reads 'h', which nothing before it computes", lambda model: model.graph.node.reverse()),
    (NAMES, "two values 'x'", lambda model: model.graph.node[0].output.append("x")),
    (NAMES, "two values 'w'", lambda model: model.graph.node[0].output.append("w")),
    (NAMES, "two values 'h'", lambda model: model.graph.node[1].output.append("h")),
    (NAMES, "two values 'h'", lambda model: model.graph.node.insert(0, model.graph.node[0])),
    (NAMES, "a node without an output", lambda model: model.graph.node.append(NodeProto(op_type="Relu", input=["h"]))),
    (NAMES, "a node without an output", lambda model: model.graph.node.append(NodeProto(op_type="Relu", input=["h"], output=[""]))),
    (NAMES, "two initializers 'w'", lambda model: model.graph.initializer.append(model.graph.initializer[0])),
    (NAMES, "'x' twice among its inputs or outputs", lambda model: model.graph.input.append(model.graph.input[0])),
    (NAMES, "'y' twice among its inputs or outputs", lambda model: model.graph.output.append(model.graph.output[0])),
    (NAMES, "an input that is an initializer too", lambda model: model.graph.input.append(helper.make_tensor_value_info("w", 1, [4]))),
    (NAMES, "an input or initializer without a name", set_field("graph.input.0.name", "")),
    (NAMES, "an output 'x' that no node computes", set_field("graph.output.0.name", "x")),
    (NAMES, "an output 'nobody' that no node computes", set_field("graph.output.0.name", "nobody")),
    (OUTSIDE, "initializer 'w' kept outside without a full address", edit_outside("offset", None)),
    (OUTSIDE, "initializer 'w' kept outside without a full address", edit_outside("location", None)),
    (OUTSIDE, "kept outside without a full address", lambda model: model.graph.initializer[0].external_data.add(key="checksum", value="0")),
    (OUTSIDE, "kept outside without a full address", lambda model: model.graph.initializer[0].ClearField("external_data")),
    (OUTSIDE, "kept outside without a full address", lambda model: model.graph.initializer[0].ClearField("data_location")),
    (OUTSIDE, "initializer 'w' with two places", lambda model: model.graph.initializer[0].external_data.add(key="offset", value="0")),
    (OUTSIDE, "with offset '-1'", edit_outside("offset", "-1")),
    (OUTSIDE, "with offset '0x80'", edit_outside("offset", "0x80")),
    (OUTSIDE, "with length '016'", edit_outside("length", "016")),
    (OUTSIDE, "with length '١٦'", edit_outside("length", "١٦")),
    (OUTSIDE, "with length '9{40}'", edit_outside("length", "9" * 5000)),
    (OUTSIDE, "initializer 'w' of element type 16", set_field("graph.initializer.0.data_type", TensorProto.BFLOAT16)),
]


@pytest.mark.parametrize(("clause", "message", "change"), REFUSALS, ids=[f"{i}-{message}" for i, (_, message, _) in enumerate(REFUSALS)])
def test_a_model_that_is_not_plain_is_refused(clause, message, change):
    model = small_model()
    nodes = list(model.graph.node)
    change(model)
    if len(model.graph.node) == 2 and message.startswith("a node that reads 'h'"):
        assert list(model.graph.node) == nodes[::-1]
    with refused(clause, match=f"small.onnx is not a graph that exitify runs: it has .*{message}"):
        parse(model.SerializeToString(), "small.onnx")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 IR versions"),
        (small_model().SerializeToString()[:-3], "a field longer than the message"),
        (b"\x0a", "a number without an end"),
        (b"\xff" * 20, "a number without an end"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x38\x01", "a number in place of a message"),
        (b"\x08\x0a" + b"\x3a\x04\x0a\x02\x0a\x00" * 2, "a node without an output"),
        (small_model().SerializeToString() + b"\x3a\x00", "2 graphs"),
        (small_model().SerializeToString().replace(b"\x01x", b"\x01\xff"), "a name that is not UTF-8"),
        (small_model().SerializeToString() + b"\xf2\x01\x00", "field 30 of ModelProto"),
    ],
)
def test_bytes_that_are_no_such_message_are_refused(data, message):
    with refused(FIELDS, match=f"small.onnx .*{message}"):
        parse(data, "small.onnx")


def one_node(op: str, reads: list[str], writes: str, **tensors: float) -> Graph:
    """A segment of one node, its first name its input."""
    graph = helper.make_graph(
        [helper.make_node(op, reads, [writes])],
        "one",
        [helper.make_tensor_value_info(reads[0], 1, ["batch", 4])],
        [helper.make_tensor_value_info(writes, 1, ["batch", 4])],
        [numpy_helper.from_array(np.full(4, value, np.float32), name) for name, value in tensors.items()],
    )
    return parse(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString(), "one.onnx")


def two_nodes(inner: str) -> Graph:
    """Neg(Relu(x)), with a name for what only this segment knows."""
    nodes = [helper.make_node("Relu", ["x"], [inner]), helper.make_node("Neg", [inner], ["y"])]
    ends = [[helper.make_tensor_value_info(name, 1, ["batch", 4])] for name in "xy"]
    graph = helper.make_graph(nodes, "two", *ends)
    return parse(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString(), "two.onnx")


@pytest.mark.parametrize(
    ("segments", "name"),
    [
        ((one_node("Relu", ["x"], "y"), one_node("Neg", ["x"], "y")), "y"),
        ((one_node("Add", ["x", "w"], "y", w=1), one_node("Mul", ["y", "w"], "z", w=2)), "w"),
        ((one_node("Relu", ["x"], "w"), one_node("Mul", ["y", "w"], "z", w=2)), "w"),
        ((one_node("Mul", ["y", "w"], "z", w=2), one_node("Relu", ["w"], "v")), "w"),
        ((two_nodes("inner"), one_node("Relu", ["inner"], "z")), "inner"),
    ],
    ids=["two computations", "two tensors", "a computation and a tensor", "an input and a tensor", "what was inside, as an input"],
)
def test_segments_that_mean_different_things_by_a_name_are_refused(segments, name):
    with refused(EVERYWHERE, match=f"two meanings of the name '{name}'"):
        merge(segments, "the model")
    with refused(EVERYWHERE, match=f"two meanings of the name '{name}'"):
        join(segments, ["x"], ["y"], {"x": VECTOR, "y": VECTOR})


def test_segments_may_share_a_tensor():
    segments = (one_node("Add", ["x", "w"], "y", w=1), one_node("Mul", ["y", "w"], "z", w=1))
    model = onnx.load_model_from_string(join(segments, ["x"], ["z"], {"x": VECTOR, "z": VECTOR}))
    onnx.checker.check_model(model, full_check=True)
    assert run(model, {"x": np.ones((2, 4), np.float32)})["z"].tolist() == [[2.0] * 4] * 2


# --- fuzz -----------------------------------------------------------------------------------------------------------

SMALL = small_model().SerializeToString()


def parses(data: bytes) -> bool:
    try:
        parse(data, "fuzz.onnx")
    except MalformedManifest:
        return False
    return True


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=5), st.integers(0, len(SMALL)), st.binary(max_size=8))
def test_mutated_models_are_refused_or_read(changes, at, inserted):
    data = bytearray(SMALL)
    for position, byte in changes:
        data[position] = byte
    data[at:at] = inserted
    assert parses(bytes(data)) or bytes(data) != SMALL


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    assert not parses(data)


def test_every_flipped_bit_of_a_head_is_refused_or_read():
    _, artifact = exported("depthwise")
    data = bytearray(bytes(artifact.files[graph_path("head_exit1")]))
    assert parses(bytes(data))
    read = 0
    for position in range(0, len(data), 3):
        data[position] ^= 1 << position % 8
        read += parses(bytes(data))
        data[position] ^= 1 << position % 8
    assert 0 < read < len(data) // 3
