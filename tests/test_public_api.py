"""The public names and their signatures, against a golden text: a change is seen, and meant."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from pathlib import Path

import exitify
from exitify.progress import silent

GOLDEN = Path(__file__).parent / "golden" / "api.txt"
AGAIN = "python -m tests.test_public_api"


class _Text(str):
    """A text that shows itself without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(value: object, *, returns: bool = True) -> str:
    """As in the source: annotations without quotes, a function that is a default by its name."""
    found = inspect.signature(value)  # type: ignore[arg-type]
    parameters = [
        parameter.replace(annotation=unquoted(parameter.annotation), default=_Text("silent") if parameter.default is silent else parameter.default)
        for parameter in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=unquoted(found.return_annotation) if returns else inspect.Signature.empty))


def unquoted(annotation: object) -> object:
    return _Text(annotation) if isinstance(annotation, str) else annotation


def described() -> str:
    """Each public name with its signature; classes with their public fields, properties and methods."""
    return "\n".join(line for name in sorted(exitify.__all__) for line in lines_of(name, getattr(exitify, name))) + "\n"


def lines_of(name: str, value: object) -> list[str]:
    """A name's lines; a module's are those of its own public names."""
    if isinstance(value, str):
        return [f"{name}: str"]
    if inspect.ismodule(value):
        return [line for own in sorted(value.__all__) for line in lines_of(f"{name}.{own}", getattr(value, own))]
    if inspect.isclass(value):
        return [f"class {name}{signature(value, returns=False)}", *members(value)]
    return [f"{name}{signature(value)}"]


def members(kind: type) -> list[str]:
    """What a class defines itself; dataclass fields are in its signature."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    lines = []
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_") or name in fields:
            continue
        if isinstance(member, (staticmethod, classmethod)):
            lines.append(f"    {type(member).__name__} {name}{signature(getattr(kind, name))}")
        elif inspect.isfunction(member):
            lines.append(f"    {name}{signature(member)}")
        elif type(member).__name__ in ("property", "cached_property"):
            function = getattr(member, "fget", None) or getattr(member, "func", None)
            lines.append(f"    {name}: {inspect.signature(function).return_annotation}")
    return lines


def test_the_public_names_and_signatures_are_the_golden_ones() -> None:
    golden, now = GOLDEN.read_text(), described()
    difference = "\n".join(difflib.unified_diff(golden.splitlines(), now.splitlines(), "golden", "now", lineterm="", n=0))
    assert now == golden, f"the public API changed:\n{difference}\nif that is meant: {AGAIN}"


if __name__ == "__main__":
    GOLDEN.write_text(described())
