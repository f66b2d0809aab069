"""Segments as ONNX, read and joined at the level of protobuf fields, without the onnx package.

Segments that run in a row with no decision between them become one model here, on the device, so that a boundary costs
nothing where no exit is taken. Protobuf messages are lists of fields, and a joined graph is the concatenation of its
parts' nodes and initializers with the inputs and outputs named anew; nothing else of ONNX needs to be understood.
Field numbers are those of onnx.proto (IR version 10).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from exitify.errors import MalformedManifest
from exitify.plan import Value

OPSET = 20
IR_VERSION = 10
"""The newest that ONNX Runtime for Python 3.10 (JetPack 6) is sure to read."""

ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}
"""TensorProto.DataType by NumPy's name."""
_NAMES = {number: name for name, number in ELEMENT_TYPES.items()}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_IR, _MODEL_PRODUCER, _MODEL_GRAPH, _MODEL_OPSET = 1, 2, 7, 8
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS = 5, 10
_PLAIN_ATTRIBUTE = {1, 2, 3, 4, 5, 7, 8, 9, 10, 20}
"""Name, type, and values that are numbers, strings or tensors: no graphs, sparse tensors or types."""
_TENSOR_DIMENSION, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14


@dataclass
class Graph:
    """The parts of one segment's ONNX model.

    nodes: NodeProto messages in order. made: the node that computes each value, by the value's name.
    initializers: TensorProto messages by name. external: what each initializer kept outside is, by name.
    inputs, outputs: ValueInfoProto messages by name.
    """

    nodes: list[bytes] = field(default_factory=list)
    made: dict[str, bytes] = field(default_factory=dict)
    initializers: dict[str, bytes] = field(default_factory=dict)
    external: dict[str, External] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)
    outputs: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class External:
    """An initializer kept outside: a file beside the model, first byte and length, and what stands there (a key of `ELEMENT_TYPES`)."""

    location: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


def parse(data: bytes, where: str) -> Graph:
    """Return the parts of a segment's model.

    Raises:
        MalformedManifest: it is no ONNX model of the kind FORMAT.md allows: one graph of standard operators, without
            subgraphs, functions, or another IR version or opset.
    """
    segment = Graph()
    seen: list[int] = []
    for number, value in _fields(data, where):
        seen.append(number)
        if number == _MODEL_GRAPH:
            _parse_graph(segment, _message(value, where), where)
        elif number == _MODEL_IR:
            _require(value == IR_VERSION, where, f"IR version {value!r}, not {IR_VERSION}")
        elif number == _MODEL_OPSET:
            opset = dict(_fields(_message(value, where), where))
            _require(opset.pop(1, b"") == b"" and opset == {2: OPSET}, where, f"an opset other than {OPSET} of ONNX")
        else:
            _require(number == _MODEL_PRODUCER, where, f"field {number} of ModelProto")
    for number, what in ((_MODEL_IR, "IR versions"), (_MODEL_OPSET, "opsets"), (_MODEL_GRAPH, "graphs")):
        _require(seen.count(number) == 1, where, f"{seen.count(number)} {what}")
    return segment


def identity(given: str, gives: str, value: Value) -> Graph:
    """A graph that passes a value on under another name."""
    node = _field(_NODE_INPUT, given.encode()) + _field(_NODE_OUTPUT, gives.encode()) + _field(_NODE_OP_TYPE, b"Identity")
    return Graph([node], {gives: node}, {}, {}, {given: value_info(given, value)}, {gives: value_info(gives, value)})


def merge(segments: Iterable[Graph], where: str) -> tuple[list[bytes], dict[str, bytes]]:
    """Return the nodes of all segments in order, and their initializers by name.

    Segments may repeat a small computation; it is the same node then, and comes once.

    Raises:
        MalformedManifest: a name means one thing in one segment and another elsewhere.
    """
    nodes: dict[bytes, None] = {}
    made: dict[str, bytes] = {}
    initializers: dict[str, bytes] = {}
    shared: set[str] = set()
    read: set[str] = set()
    for segment in segments:
        nodes.update(dict.fromkeys(segment.nodes))
        shared.update(segment.outputs)
        read.update(segment.inputs)
        for known, new in ((made, segment.made), (initializers, segment.initializers)):
            for name, what in new.items():
                _require(known.setdefault(name, what) == what, where, f"two meanings of the name {name[:80]!r}")
    for name in (made.keys() & initializers.keys()) | (read & initializers.keys()) | (read & (made.keys() - shared)):
        _require(False, where, f"two meanings of the name {name[:80]!r}")
    return list(nodes), initializers


def join(segments: Sequence[Graph], inputs: Sequence[str], outputs: Sequence[str], values: Mapping[str, Value]) -> bytes:
    """Return one ONNX model that runs the segments in order.

    Args:
        segments: In an order in which each reads only inputs and what came before.
        inputs: Names of what the caller gives, parameters among them. outputs: Names of what it wants.
        values: What each input and output looks like; a batch dimension comes before it, but for a `Parameter`.
    """
    nodes, initializers = merge(segments, "a row of segments")
    graph = bytearray()
    for node in nodes:
        graph += _field(_GRAPH_NODE, node)
    graph += _field(_GRAPH_NAME, b"exitify")
    for tensor in initializers.values():
        graph += _field(_GRAPH_INITIALIZER, tensor)
    for number, names in ((_GRAPH_INPUT, inputs), (_GRAPH_OUTPUT, outputs)):
        for name in names:
            graph += _field(number, value_info(name, values[name]))
    opset = _field(1, b"") + _number(2, OPSET)
    return bytes(
        _number(_MODEL_IR, IR_VERSION) + _field(_MODEL_PRODUCER, b"exitify") + _field(_MODEL_GRAPH, bytes(graph)) + _field(_MODEL_OPSET, opset)
    )


@dataclass(frozen=True)
class Parameter(Value):
    """A value without a batch dimension: a tensor that a segment takes as an input."""


def _parse_graph(segment: Graph, graph: bytes, where: str) -> None:
    links: list[tuple[list[str], list[str]]] = []
    for number, value in _fields(graph, where):
        message = _message(value, where)
        if number == _GRAPH_NODE:
            segment.nodes.append(message)
            links.append(_parse_node(message, where))
        elif number == _GRAPH_INITIALIZER:
            name, external = _parse_tensor(message, where)
            _require(name not in segment.initializers, where, f"two initializers {name[:80]!r}")
            segment.initializers[name] = message
            if external:
                segment.external[name] = external
        elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            named = segment.inputs if number == _GRAPH_INPUT else segment.outputs
            name = _text(dict(_fields(message, where)).get(1, b""), where)
            _require(name not in named, where, f"{name[:80]!r} twice among its inputs or outputs")
            named[name] = message
        else:
            _require(number == _GRAPH_NAME, where, f"field {number} of GraphProto")
    _link(segment, links, where)


def _link(segment: Graph, links: list[tuple[list[str], list[str]]], where: str) -> None:
    """Follow the names: each is given or computed once, before it is read."""
    known = {*segment.inputs, *segment.initializers}
    _require("" not in known, where, "an input or initializer without a name")
    _require(len(known) == len(segment.inputs) + len(segment.initializers), where, "an input that is an initializer too")
    for node, (reads, writes) in zip(segment.nodes, links):
        for name in reads:
            _require(not name or name in known, where, f"a node that reads {name[:80]!r}, which nothing before it computes")
        for name in filter(None, writes):  # an output that is not wanted has no name
            _require(name not in known, where, f"two values {name[:80]!r}")
            known.add(name)
            segment.made[name] = node
        _require(any(writes), where, "a node without an output")
    for name in segment.outputs:
        _require(name in segment.made, where, f"an output {name[:80]!r} that no node computes")


def _parse_node(node: bytes, where: str) -> tuple[list[str], list[str]]:
    """Names of what it reads and of what it computes."""
    reads: list[str] = []
    writes: list[str] = []
    for number, value in _fields(node, where):
        if number in (_NODE_INPUT, _NODE_OUTPUT):
            (reads if number == _NODE_INPUT else writes).append(_text(value, where))
        elif number == _NODE_DOMAIN:
            _require(value in (b"", b"ai.onnx"), where, f"an operator of the domain {value!r:.80}")
        elif number == _NODE_ATTRIBUTE:
            _check_attribute(_message(value, where), where)
        else:
            _require(number in (_NODE_NAME, _NODE_OP_TYPE), where, f"field {number} of NodeProto")
    return reads, writes


def _check_attribute(attribute: bytes, where: str) -> None:
    for number, value in _fields(attribute, where):
        _require(number in _PLAIN_ATTRIBUTE, where, "an operator with a graph inside, or another attribute than numbers, strings and tensors")
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _, external = _parse_tensor(_message(value, where), where)
            _require(external is None, where, "an attribute kept in another file")


def _parse_tensor(tensor: bytes, where: str) -> tuple[str, External | None]:
    name, dtype, shape, is_outside = "", 0, [], False
    entries: dict[str, str] = {}
    for number, value in _fields(tensor, where):
        if number == _TENSOR_NAME:
            name = _text(value, where)
        elif number == _TENSOR_TYPE:
            dtype = _integer(value, where)
        elif number == _TENSOR_DIMENSION:
            shape.append(_integer(value, where))
        elif number == _TENSOR_LOCATION:
            is_outside = value != 0
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_message(value, where), where))
            key = _text(pair.get(1, b""), where)
            _require(key not in entries, where, f"initializer {name[:80]!r} with two places")
            entries[key] = _text(pair.get(2, b""), where)
    if not entries and not is_outside:
        return name, None
    complete = is_outside and set(entries) == {"location", "offset", "length"}
    _require(complete, where, f"initializer {name[:80]!r} kept outside without a full address")
    for key in ("offset", "length"):
        _require(re.fullmatch(r"0|[1-9][0-9]{0,15}", entries[key]) is not None, where, f"initializer {name[:80]!r} with {key} {entries[key][:40]!r}")
    _require(dtype in _NAMES, where, f"initializer {name[:80]!r} of element type {dtype}")
    return name, External(entries["location"], int(entries["offset"]), int(entries["length"]), _NAMES[dtype], tuple(shape))


def value_info(name: str, value: Value) -> bytes:
    """What a graph says of one of its inputs or outputs: a ValueInfoProto."""
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


def _integer(value: int | bytes, where: str) -> int:
    _require(isinstance(value, int), where, "a message in place of a number")
    assert isinstance(value, int)
    return value


def _text(value: int | bytes, where: str) -> str:
    try:
        return _message(value, where).decode()
    except UnicodeDecodeError as error:
        raise MalformedManifest(f"{where} holds a name that is not UTF-8", "get the artifact again") from error


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise MalformedManifest(f"{where} is not a graph that exitify runs: it has {what}", "get the artifact again, or export it with this release")
