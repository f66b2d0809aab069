"""Frozen dataclasses to and from JSON, strictly: every field named, every type checked, nothing else accepted."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import json
import math
import types
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from exitify.errors import RecordError

T = TypeVar("T")


def to_json(record: Any) -> Any:
    """Return `record` as plain JSON values: dataclasses as objects, tuples as arrays."""
    if dataclasses.is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, collections.abc.Mapping):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, (tuple, list)):
        return [to_json(value) for value in record]
    return record


def dumps(record: Any) -> bytes:
    """Return `record` as JSON text whose bytes depend on its values alone."""
    return (json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def loads(text: bytes, where: str) -> Any:
    """Return the JSON values in `text`; NaN, infinities, duplicate keys and bottomless nesting are errors."""
    try:
        values = json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
        if b"\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # refuses half a surrogate pair, which could not be written again
        return values
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON that exitify reads: {error}") from error


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Return `data` as a `kind`.

    Args:
        kind: A dataclass, or a type made of dataclasses, `tuple[X, ...]`, `Mapping[str, X]`, `X | None`, `Literal`, str, int, float, bool.
        data: Values from `json.loads`.
        where: What the document is called, for errors.

    Raises:
        RecordError: a field is missing, unknown, or of another type; the message names its place.
    """
    return cast(T, _decode(kind, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(cast(type, kind), data, where)
    if origin is tuple:
        return _decode_tuple(get_args(kind), data, where)
    if origin in (dict, collections.abc.Mapping):
        _require(isinstance(data, dict), "an object", data, where)
        return {key: _decode(get_args(kind)[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin in (Union, types.UnionType):
        return _decode_optional(get_args(kind), data, where)
    if origin is Literal:
        _require(isinstance(data, str) and data in get_args(kind), f"one of {', '.join(get_args(kind))}", data, where)
        return data
    if kind is float:
        number = isinstance(data, (int, float)) and not isinstance(data, bool) and abs(data) < 1e300
        _require(number and math.isfinite(data), "a finite number", data, where)
        return float(data)
    if kind is int:
        _require(isinstance(data, int) and not isinstance(data, bool) and abs(data) < 2**63, "an integer", data, where)
        return data
    _require(type(data) is kind, {bool: "true or false", str: "a string"}.get(kind, str(kind)), data, where)
    return data


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), "an object", data, where)
    hints = _type_hints(kind)
    for key in data:
        if key not in hints:
            raise RecordError(f"{where} has an unknown field {key!r}", f"it has {', '.join(hints)}")
    for key in hints:
        if key not in data:
            raise RecordError(f"{where} lacks the field {key!r}")
    return kind(**{key: _decode(hint, data[key], f"{where}.{key}") for key, hint in hints.items()})


def _decode_tuple(items: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _require(isinstance(data, list), "an array", data, where)
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], value, f"{where}[{i}]") for i, value in enumerate(data))
    _require(len(data) == len(items), f"an array of {len(items)}", data, where)
    return tuple(_decode(item, value, f"{where}[{i}]") for i, (item, value) in enumerate(zip(items, data)))


def _decode_optional(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in choices:
        return None
    kinds = [choice for choice in choices if choice is not type(None)]
    assert len(kinds) == 1, f"{where}: only X | None is supported"
    return _decode(kinds[0], data, where)


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _require(holds: bool, expected: str, data: Any, where: str) -> None:
    if not holds:
        try:
            shown = repr(data)
        except (ValueError, RecursionError):  # thousands of digits, or of brackets
            shown = f"an over-long {type(data).__name__}"
        raise RecordError(f"{where} is {shown[:60] + '…' if len(shown) > 60 else shown}, not {expected}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object names a key twice")
    return result
