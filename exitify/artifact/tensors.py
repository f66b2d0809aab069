"""Tensors in safetensors files, each at a multiple of 64 bytes, read in place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from exitify.errors import MalformedManifest, RecordError
from exitify.records import loads

ALIGNMENT = 64
LONGEST_HEADER = 64 * 2**20
PADDING = ".padding."
"""What the names of the zero tensors between the others begin with: safetensors allows no gaps."""

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def write_tensors(tensors: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Return a safetensors file: tensors by name in sorted order, header and tensors padded to 64 bytes.

    Raises:
        MalformedManifest: a dtype that safetensors does not know here, or a reserved name.
    """
    header: dict[str, object] = {}
    chunks: list[bytes] = []
    at = 0
    for name in sorted(tensors):
        if name.startswith(PADDING) or name == "__metadata__":
            raise MalformedManifest(f"a tensor cannot be called {name!r}")
        tensor = np.ascontiguousarray(tensors[name]).reshape(np.shape(tensors[name]))
        if tensor.dtype not in _NAMES:
            raise MalformedManifest(f"tensor {name!r} has dtype {tensor.dtype}, which an artifact cannot hold")
        data = tensor.tobytes()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
        gap = -at % ALIGNMENT
        if gap:
            header[f"{PADDING}{at}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            chunks.append(bytes(gap))
            at += gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def read_tensors(data: memoryview, where: str) -> dict[str, NDArray[np.generic]]:
    """Return the tensors as read-only arrays over `data`, padding left out.

    Raises:
        MalformedManifest: the header is not what FORMAT.md says (gaps, overlaps, wrong lengths, unknown dtypes).
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
        raise MalformedManifest(f"{where} is no safetensors file: its header has {length} bytes, the file {len(data)}")
    try:
        header = loads(bytes(data[8 : 8 + length]), where)
    except RecordError as error:
        raise MalformedManifest(error.problem, error.hint) from error
    if not isinstance(header, dict):
        raise MalformedManifest(f"{where} is no safetensors file: its header is not an object")
    body = 8 + length
    spans: dict[str, tuple[np.dtype[np.generic], tuple[int, ...], int, int]] = {}
    expected = 0
    for name, entry in header.items():
        dtype, shape, start, end = _entry(entry, f"{where}: tensor {name[:80]!r}")
        if start != expected or end - start != dtype.itemsize * math.prod(shape):
            raise MalformedManifest(f"{where}: tensor {name[:80]!r} spans bytes {start} to {end}, which does not fit its shape or its place")
        expected = end
        if not name.startswith(PADDING):
            spans[name] = (dtype, shape, body + start, body + end)
    if body + expected != len(data):
        raise MalformedManifest(f"{where} has {len(data) - body} bytes of tensors, its header describes {expected}")
    return spans


def _entry(entry: object, where: str) -> tuple[np.dtype[np.generic], tuple[int, ...], int, int]:
    is_entry = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if not is_entry or entry["dtype"] not in _DTYPES:  # type: ignore[index]
        raise MalformedManifest(f"{where} is described by {str(entry)[:80]}")
    numbers = (entry["shape"], entry["data_offsets"])  # type: ignore[index]
    for sequence in numbers:
        if not isinstance(sequence, list) or not all(type(n) is int and 0 <= n < 2**48 for n in sequence):
            raise MalformedManifest(f"{where} has the shape or place {str(sequence)[:80]}")
    shape, offsets = numbers
    if len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > 16:
        raise MalformedManifest(f"{where} has the place {offsets}")
    return np.dtype(_DTYPES[entry["dtype"]]), tuple(shape), offsets[0], offsets[1]  # type: ignore[index]
