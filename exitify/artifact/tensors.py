"""Tensors in safetensors files, each at a multiple of 64 bytes, read in place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.errors import MalformedManifest, RecordError
from exitify.records import loads

ALIGNMENT = 64
LONGEST_HEADER = 64 * 2**20
MOST_DIMENSIONS = 16
MOST_ELEMENTS = 2**48
AGAIN = "get the artifact again"
PADDING = ".padding."
"""What the names of the zero tensors between the others begin with: safetensors allows no gaps."""

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
_NAMES: dict[np.dtype[Any], str] = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Span:
    """A tensor's name in the file, and what the header says of it; `start` and `end` count from the first tensor's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_tensors(tensors: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Return a safetensors file: tensors by name in sorted order, header and tensors padded to 64 bytes.

    Raises:
        MalformedManifest: a dtype that safetensors does not know here, or a reserved name.
    """
    looks: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise MalformedManifest(f"tensor {name!r} has dtype {tensor.dtype}, which an artifact cannot hold", "store it as float32")
        looks[name] = _NAMES[tensor.dtype], tensor.shape
    spans = _layout(looks)
    chunks = [np.ascontiguousarray(tensors[span.name]).tobytes() if span.name in tensors else bytes(span.end - span.start) for span in spans]
    return _header(spans) + b"".join(chunks)


def _layout(looks: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[_Span]:
    """Where tensors of these dtypes and shapes stand, padding among them."""
    spans: list[_Span] = []
    at = 0
    for name in sorted(looks):
        if name.startswith(PADDING) or name == "__metadata__":
            raise MalformedManifest(f"a tensor cannot be called {name!r}", "rename it")
        dtype, shape = looks[name]
        end = at + np.dtype(_DTYPES[dtype]).itemsize * math.prod(shape)
        spans.append(_Span(name, dtype, shape, at, end))
        at = end + -end % ALIGNMENT
        if at > end:
            spans.append(_Span(f"{PADDING}{end}", "U8", (at - end,), end, at))
    return spans


def _header(spans: Iterable[_Span]) -> bytes:
    """The file up to the first tensor: the header's length, and the header."""
    entries = {span.name: {"dtype": span.dtype, "shape": list(span.shape), "data_offsets": [span.start, span.end]} for span in spans}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_tensors(data: memoryview, where: str) -> dict[str, NDArray[np.generic]]:
    """Return the tensors as read-only arrays over `data`, padding left out.

    Raises:
        MalformedManifest: the bytes are not those that `write_tensors` would give for the same tensors.
    """
    spans = tensor_spans(data, where)
    result: dict[str, NDArray[np.generic]] = {}
    for name, (dtype, shape, start, end) in spans.items():
        array = np.frombuffer(data[start:end], dtype).reshape(shape)
        array.flags.writeable = False
        result[name] = array
    return result


def tensor_spans(data: memoryview, where: str) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...], int, int]]:
    """Return dtype, shape, first byte and end of each tensor, counted from the start of the file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LONGEST_HEADER, len(data) - 8):
        raise MalformedManifest(f"{where} is no safetensors file: its header has {length} bytes, the file {len(data)}", AGAIN)
    body = 8 + length
    try:
        header = loads(bytes(data[8:body]), where)
    except RecordError as error:
        raise MalformedManifest(error.problem, error.hint or AGAIN) from error
    if not isinstance(header, dict):
        raise MalformedManifest(f"{where} is no safetensors file: its header is not an object", AGAIN)
    spans = [_span(name, entry, where) for name, entry in header.items()]
    end = 0
    for span in spans:
        size = np.dtype(_DTYPES[span.dtype]).itemsize * math.prod(span.shape)
        if span.start != end or span.end - span.start != size:
            raise MalformedManifest(f"{where}: tensor {span.name[:80]!r} spans bytes {span.start} to {span.end}, not {end} to {end + size}", AGAIN)
        end = span.end
    if body + end != len(data):
        raise MalformedManifest(f"{where} has {len(data) - body} bytes of tensors, its header describes {end}", AGAIN)
    tensors = [span for span in spans if not span.name.startswith(PADDING)]
    if bytes(data[:body]) != _header(_layout({span.name: (span.dtype, span.shape) for span in tensors})):
        raise MalformedManifest(f"{where} is not laid out as ours are: sorted by name, each at a multiple of {ALIGNMENT} bytes", AGAIN)
    for span in spans:
        if span.name.startswith(PADDING) and any(data[body + span.start : body + span.end]):
            raise MalformedManifest(f"{where}: the padding {span.name!r} is not zero", AGAIN)
    return {span.name: (np.dtype(_DTYPES[span.dtype]), span.shape, body + span.start, body + span.end) for span in tensors}


def _span(name: str, entry: object, where: str) -> _Span:
    where = f"{where}: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in tuple(_DTYPES):
        raise MalformedManifest(f"{where} is described by {str(entry)[:80]}", AGAIN)
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in numbers):
            raise MalformedManifest(f"{where} has the shape or place {str(numbers)[:80]}", AGAIN)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedManifest(f"{where} has the place {str(offsets)[:80]}", AGAIN)
    if len(shape) > MOST_DIMENSIONS or math.prod(size for size in shape if size) >= MOST_ELEMENTS:  # also where one size is 0
        raise MalformedManifest(f"{where} has the shape {str(shape)[:80]}, which no array can have", AGAIN)
    return _Span(name, entry["dtype"], tuple(shape), offsets[0], offsets[1])
