"""Tensors in safetensors files: the library reads ours, and we read nothing but ours."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from exitify.artifact.tensors import ALIGNMENT, MOST_DIMENSIONS, read_tensors, tensor_spans, write_tensors
from exitify.errors import MalformedManifest
from tests.artifact.clauses import refused

DTYPES = [np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
TENSORS = {"b": np.arange(3, dtype=np.float32), "a.weight": np.arange(6, dtype=np.int64).reshape(2, 3), "scalar": np.array(7, np.uint8)}
FILE = write_tensors(TENSORS)

arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)))
tensor_sets = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__" and not name.startswith(".padding.")), arrays, max_size=6
)


def read(data: bytes) -> dict[str, np.ndarray]:
    return read_tensors(memoryview(data), "w.safetensors")


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(header: Any, body: bytes | None = None) -> bytes:
    """A file with this header, filled up as ours are, and the tensors of `FILE` or other bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + (FILE[8 + int.from_bytes(FILE[:8], "little") :] if body is None else body)


def entry(shape: list[int], start: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_file_is_this():
    header = (
        b'{"a.weight":{"dtype":"I64","shape":[2,3],"data_offsets":[0,48]},".padding.48":{"dtype":"U8","shape":[16],"data_offsets":[48,64]},'
        b'"b":{"dtype":"F32","shape":[3],"data_offsets":[64,76]},".padding.76":{"dtype":"U8","shape":[52],"data_offsets":[76,128]},'
        b'"scalar":{"dtype":"U8","shape":[],"data_offsets":[128,129]},".padding.129":{"dtype":"U8","shape":[63],"data_offsets":[129,192]}}'
    )
    body = TENSORS["a.weight"].tobytes() + bytes(16) + TENSORS["b"].tobytes() + bytes(52) + b"\x07" + bytes(63)
    assert with_header(header, body) == FILE


def test_without_tensors_there_is_a_header_alone():
    assert write_tensors({}) == (56).to_bytes(8, "little") + b"{}" + b" " * 54
    assert read(write_tensors({})) == {}


@given(tensor_sets)
def test_what_was_written_is_read(tensors):
    found = read(write_tensors(tensors))
    assert sorted(found) == sorted(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)


@given(tensor_sets)
def test_the_safetensors_library_reads_ours(tensors):
    loaded = safetensors.numpy.load(write_tensors(tensors))
    assert {name for name in loaded if not name.startswith(".padding.")} == set(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert not any(loaded[name].any() for name in loaded if name.startswith(".padding."))


@given(tensor_sets, st.randoms())
def test_the_order_in_which_tensors_are_given_does_not_matter(tensors, random):
    shuffled = list(tensors)
    random.shuffle(shuffled)
    assert write_tensors({name: tensors[name] for name in shuffled}) == write_tensors(tensors)


@given(tensor_sets)
def test_every_tensor_stands_at_a_multiple_of_64(tensors):
    data = write_tensors(tensors)
    spans = tensor_spans(memoryview(data), "w.safetensors")
    assert len(data) % ALIGNMENT == 0
    for name, (dtype, shape, start, end) in spans.items():
        assert start % ALIGNMENT == 0
        assert data[start:end] == tensors[name].tobytes()
        assert (dtype, shape) == (tensors[name].dtype, tensors[name].shape)


def test_memory_layout_does_not_matter():
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert write_tensors({"t": base.T}) == write_tensors({"t": base.T.copy()})
    assert same(read(write_tensors({"t": base[::2, ::3]}))["t"], base[::2, ::3])


def test_tensors_are_read_in_place_and_cannot_be_written():
    buffer = bytearray(FILE)
    tensor = read_tensors(memoryview(buffer), "w.safetensors")["b"]
    start = tensor_spans(memoryview(buffer), "w.safetensors")["b"][2]
    buffer[start : start + 4] = np.float32(-1).tobytes()
    assert tensor[0] == -1
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 0


def test_the_writer_refuses_reserved_names():
    for name in ("__metadata__", ".padding.", ".padding.64"):
        with pytest.raises(MalformedManifest, match="a tensor cannot be called"):
            write_tensors({name: np.zeros(1, np.float32)})


@pytest.mark.parametrize("dtype", [np.complex64, np.uint16, ">f4", "U3", object])
def test_the_writer_refuses_dtypes_that_it_could_not_read(dtype):
    with pytest.raises(MalformedManifest, match=r"tensor 't' has dtype .*, which an artifact cannot hold"):
        write_tensors({"t": np.zeros(2, dtype)})


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", FILE[:7], (2**63).to_bytes(8, "little") + FILE[8:], len(FILE).to_bytes(8, "little") + FILE[8:], (64 * 2**20 + 1).to_bytes(8, "little")],
    ids=["empty", "cut in the length", "longer than memory", "longer than the file", "longer than allowed"],
)
def test_a_header_that_does_not_fit_is_refused(data):
    with refused("the header fits the file and has at most 67108864 bytes", match="w.safetensors is no safetensors file: its header has"):
        read(data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"b":', "not JSON that exitify reads"),
        (b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}', "NaN is not a JSON number"),
        (b'{"b":1,"b":1}', "an object names a key twice"),
        (b"[" * 100000, "not JSON that exitify reads"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "not JSON that exitify reads"),
        (b"\xff\xfe", "not JSON that exitify reads"),
        ([1, 2], "its header is not an object"),
        ({"b": 1}, "tensor 'b' is described by 1"),
        ({"b": {}}, "tensor 'b' is described by {}"),
        ({"b": {**entry([1], 0, 1), "more": 1}}, "tensor 'b' is described by"),
        ({"__metadata__": {"format": "pt"}}, "tensor '__metadata__' is described by"),
        ({"b": entry([1], 0, 1, "BF16")}, "tensor 'b' is described by"),
        ({"b": {**entry([1], 0, 1), "dtype": ["U8"]}}, "tensor 'b' is described by"),
        ({"b": {**entry([1], 0, 1), "shape": 1}}, "tensor 'b' has the shape or place 1"),
        ({"b": entry([-1], 0, 1)}, r"tensor 'b' has the shape or place \[-1\]"),
        ({"b": entry([True], 0, 1)}, r"tensor 'b' has the shape or place \[True\]"),
        ({"b": entry([1.0], 0, 1)}, r"tensor 'b' has the shape or place \[1.0\]"),  # type: ignore[list-item]
        ({"b": entry([2**48], 0, 1)}, "tensor 'b' has the shape or place"),
        ({"b": {**entry([1], 0, 1), "data_offsets": [0, 1, 2]}}, r"tensor 'b' has the place \[0, 1, 2\]"),
        ({"b": entry([1], 1, 0)}, r"tensor 'b' has the place \[1, 0\]"),
    ],
)
def test_a_header_that_describes_no_tensors_is_refused(header, message):
    with refused("the header is a JSON object of dtype, shape and data_offsets by name", match=message):
        read(with_header(header))


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [0, *[2**16] * 3], [1] * (MOST_DIMENSIONS + 1)], ids=["empty and huge", "2^48", "too many"])
def test_a_shape_that_no_array_can_have_is_refused(shape):
    header = {"b": entry(shape, 0, 0 if 0 in shape else 1)}
    with refused("a shape has at most 16 dimensions and, empty ones left out, less than 2^48 elements", match="which no array can have"):
        read(with_header(header, b""))


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry([4], 0, 4), "b": entry([4], 8, 12)}, 12),
        ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, 6),
        ({"a": entry([4], 0, 4), "b": entry([4], 0, 4)}, 4),
        ({"a": entry([4], 4, 8)}, 8),
        ({"a": entry([4], 0, 5)}, 5),
        ({"a": entry([4], 0, 4, "F32")}, 4),
        ({"a": entry([4], 0, 4)}, 5),
        ({"a": entry([4], 0, 4)}, 3),
        ({}, 64),
    ],
    ids=["gap", "overlap", "the same place", "gap at the start", "too long", "too short", "bytes behind", "cut off", "hidden bytes"],
)
def test_gaps_overlaps_and_wrong_lengths_are_refused(header, size):
    with refused("tensors follow each other without gap or overlap and fill the file", match="spans bytes|bytes of tensors, its header describes"):
        read(with_header(header, bytes(size)))


_TEXT = FILE[8 : 8 + int.from_bytes(FILE[:8], "little")].rstrip()


@pytest.mark.parametrize(
    "data",
    [
        safetensors.numpy.save(TENSORS),
        with_header(json.dumps(header_of(FILE)).encode()),
        with_header(b" " + _TEXT),
        with_header(_TEXT + b" " * 64),
        len(_TEXT).to_bytes(8, "little") + _TEXT + FILE[8 + int.from_bytes(FILE[:8], "little") :],
        FILE.replace(b'".padding.48"', b'".padding.47"'),
        FILE.replace(b'"b"', b'"z"'),
        FILE.replace(b'".padding.48"', b'"another.48."'),
    ],
    ids=["the library's", "spaces", "a space first", "more filling", "no filling", "padding by another name", "not sorted", "padding as a tensor"],
)
def test_every_other_form_of_the_same_tensors_is_refused(data):
    assert safetensors.numpy.load(data).keys()
    with refused("names, order, alignment and spaces are those that writing would give", match="not laid out as ours are"):
        read(data)


def test_bytes_hidden_in_the_padding_are_refused():
    hidden = bytearray(FILE)
    hidden[-1] = 1
    with refused("padding is zero", match=r"the padding '\.padding\.129' is not zero"):
        read(bytes(hidden))


# --- fuzz -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(FILE)), st.binary(max_size=20)
)
def test_mutated_bytes_are_refused_or_hold_other_numbers_in_the_same_places(changes, at, inserted):
    data = bytearray(FILE)
    for position, byte in changes:
        data[position] = byte
    data[at:at] = inserted
    try:
        tensors = read(bytes(data))
    except MalformedManifest:
        return
    assert write_tensors(tensors) == bytes(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["U8", "F32", "a", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "b"]), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.integers(0, 64))
def test_arbitrary_headers_raise_nothing_else(header, size):
    try:
        read(with_header(header, bytes(size)))
    except MalformedManifest:
        return
    assert header == {}


def test_a_flipped_bit_anywhere_but_in_a_number_is_refused():
    spans = tensor_spans(memoryview(FILE), "w.safetensors").values()
    for position in range(len(FILE)):
        if any(start <= position < end for *_, start, end in spans):
            continue
        for bit in range(8):
            data = bytearray(FILE)
            data[position] ^= 1 << bit
            try:
                tensors = read(bytes(data))
            except MalformedManifest:
                continue
            assert write_tensors(tensors) == bytes(data)  # another letter in a name, still in order
            assert sorted(tensors) != sorted(TENSORS) or any(tensors[name].dtype != TENSORS[name].dtype for name in TENSORS)
