"""Segments as ONNX, read and joined at the level of protobuf fields, without the onnx package.

Segments that run in a row with no decision between them become one model here, on the device, so that a boundary costs
nothing where no exit is taken. Protobuf messages are lists of fields, and a joined graph is the concatenation of its
parts' nodes and initializers with the inputs and outputs named anew; nothing else of ONNX needs to be understood.
Field numbers are those of onnx.proto (IR version 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from exitify.errors import MalformedManifest
from exitify.plan import Value

OPSET = 20
IR_VERSION = 10
"""The newest that ONNX Runtime for Python 3.10 (JetPack 6) is sure to read."""

ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
"""TensorProto.DataType by NumPy's name."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_IR, _MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_OPSET = 1, 2, 7, 8
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 2, 5, 11, 12, 13
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14


@dataclass
class Segment:
    """The parts of one segment's ONNX model.

    nodes: NodeProto messages in order. inputs: names of its inputs. outputs: names of its outputs.
    initializers: TensorProto messages by name. external: where each initializer kept outside stands, by name.
    """

    nodes: list[bytes] = field(default_factory=list)
    initializers: dict[str, bytes] = field(default_factory=dict)
    external: dict[str, External] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class External:
    """An initializer's place: a file beside the model, first byte and length."""

    location: str
    offset: int
    length: int


def parse(data: bytes, where: str) -> Segment:
    """Return the parts of a segment's model.

    Raises:
        MalformedManifest: it is no ONNX model of the kind FORMAT.md allows: one graph of standard operators, without
            subgraphs, functions, or another IR version or opset.
    """
    segment = Segment()
    graphs = 0
    for number, value in _fields(data, where):
        if number == _MODEL_GRAPH:
            graphs += 1
            _parse_graph(segment, _message(value, where), where)
        elif number == _MODEL_IR:
            _require(value == IR_VERSION, where, f"IR version {value!r}, not {IR_VERSION}")
        elif number == _MODEL_OPSET:
            opset = dict(_fields(_message(value, where), where))
            _require(opset.get(1, b"") == b"" and opset.get(2) == OPSET, where, f"an opset other than {OPSET} of ONNX")
        else:
            _require(number == _MODEL_PRODUCER, where, f"field {number} of ModelProto")
    _require(graphs == 1, where, f"{graphs} graphs")
    return segment


def join(segments: Sequence[Segment], inputs: Sequence[str], outputs: Sequence[str], values: Mapping[str, Value]) -> bytes:
    """Return one ONNX model that runs the segments in order.

    Args:
        segments: In an order in which each reads only inputs and what came before.
        inputs: Names of what the caller gives, parameters among them. outputs: Names of what it wants.
        values: What each input and output looks like; a batch dimension comes before it, but for a `Parameter`.
    """
    graph = bytearray()
    initializers: dict[str, bytes] = {}
    for segment in segments:
        for node in segment.nodes:
            graph += _field(_GRAPH_NODE, node)
        for name, tensor in segment.initializers.items():
            initializers.setdefault(name, tensor)
    graph += _field(_GRAPH_NAME, b"exitify")
    for tensor in initializers.values():
        graph += _field(_GRAPH_INITIALIZER, tensor)
    for number, names in ((_GRAPH_INPUT, inputs), (_GRAPH_OUTPUT, outputs)):
        for name in names:
            graph += _field(number, _value_info(name, values[name]))
    opset = _field(1, b"") + _number(2, OPSET)
    return bytes(
        _number(_MODEL_IR, IR_VERSION) + _field(_MODEL_PRODUCER, b"exitify") + _field(_MODEL_GRAPH, bytes(graph)) + _field(_MODEL_OPSET, opset)
    )


@dataclass(frozen=True)
class Parameter(Value):
    """A value without a batch dimension: a tensor that a segment takes as an input."""


def _parse_graph(segment: Segment, graph: bytes, where: str) -> None:
    for number, value in _fields(graph, where):
        if number == _GRAPH_NODE:
            node = _message(value, where)
            _check_node(node, where)
            segment.nodes.append(node)
        elif number == _GRAPH_INITIALIZER:
            tensor = _message(value, where)
            name, external = _parse_tensor(tensor, where)
            segment.initializers[name] = tensor
            if external:
                segment.external[name] = external
        elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            names = segment.inputs if number == _GRAPH_INPUT else segment.outputs
            names.append(_text(dict(_fields(_message(value, where), where)).get(1, b""), where))
        else:
            _require(number in (_GRAPH_NAME, _GRAPH_VALUE), where, f"field {number} of GraphProto")


def _check_node(node: bytes, where: str) -> None:
    for number, value in _fields(node, where):
        if number == _NODE_DOMAIN:
            _require(value in (b"", b"ai.onnx"), where, f"an operator of the domain {value!r}")
        if number == _NODE_ATTRIBUTE:
            inside = {inner for inner, _ in _fields(_message(value, where), where)}
            _require(not inside & {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS}, where, "an operator with a graph inside")


def _parse_tensor(tensor: bytes, where: str) -> tuple[str, External | None]:
    name, entries = "", {}
    for number, value in _fields(tensor, where):
        if number == _TENSOR_NAME:
            name = _text(value, where)
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_message(value, where), where))
            entries[_text(pair.get(1, b""), where)] = _text(pair.get(2, b""), where)
    if not entries:
        return name, None
    _require(set(entries) == {"location", "offset", "length"}, where, f"initializer {name!r} kept outside without a full address")
    digits = entries["offset"].isdecimal() and entries["length"].isdecimal() and len(entries["offset"] + entries["length"]) < 40
    _require(digits, where, f"initializer {name!r} at {entries['offset'][:40]!r}")
    return name, External(entries["location"], int(entries["offset"]), int(entries["length"]))


def _value_info(name: str, value: Value) -> bytes:
    dimensions = b"" if isinstance(value, Parameter) else _field(1, _field(2, b"batch"))
    for size in value.shape:
        dimensions += _field(1, _number(1, size))
    tensor_type = _number(1, ELEMENT_TYPES[value.dtype]) + _field(2, dimensions)
    return _field(1, name.encode()) + _field(2, _field(1, tensor_type))


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number, and an integer or the bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at, where)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at, where)
            yield key >> 3, value
            continue
        _require(kind in (_FIXED64, _BYTES, _FIXED32), where, f"wire type {kind}")
        if kind == _BYTES:
            length, at = _read_varint(data, at, where)
        else:
            length = 8 if kind == _FIXED64 else 4
        _require(at + length <= len(data), where, "a field longer than the message")
        yield key >> 3, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        _require(at < len(data) and shift < 70, where, "a number without an end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _message(value: int | bytes, where: str) -> bytes:
    _require(isinstance(value, bytes), where, "a number in place of a message")
    assert isinstance(value, bytes)
    return value


def _text(value: int | bytes, where: str) -> str:
    try:
        return _message(value, where).decode()
    except UnicodeDecodeError as error:
        raise MalformedManifest(f"{where} holds a name that is not UTF-8") from error


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise MalformedManifest(f"{where} is not a graph that exitify runs: it has {what}", "get the artifact again, or export it with this release")
