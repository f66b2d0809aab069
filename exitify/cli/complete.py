"""What a shell offers when Tab is pressed. Nothing here may fail or print: then there is just nothing to offer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

LARGEST = 2**28
"""Bytes of an artifact that is opened, and hashed, between two key strokes."""


def one_of(*words: str) -> Callable[[str], list[str]]:
    """These words."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return offered


def some_of(*words: str) -> Callable[[str], list[str]]:
    """These words, separated by commas, each once."""

    def offered(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in given]

    return offered


def target(incomplete: str) -> list[str]:
    """A board's name, or what stands for the one at hand."""
    from exitify.targets import ALIASES, target_names

    return [name for name in (*target_names(), *ALIASES) if name.startswith(incomplete)]


def profile(ctx: typer.Context, incomplete: str) -> list[str]:
    """A profile of the artifact that stands before."""
    return [name for name in (*_names(ctx, "profiles/", ".json"), "none") if name.startswith(incomplete)]


def stored_profile(ctx: typer.Context, incomplete: str) -> list[str]:
    """The same without `none`, which takes no exit."""
    return [name for name in _names(ctx, "profiles/", ".json") if name.startswith(incomplete)]


def times(ctx: typer.Context, incomplete: str) -> list[str]:
    """A record of times in the artifact that stands before."""
    return [name for name in _names(ctx, "times/", ".json") if name.startswith(incomplete)]


def engine(ctx: typer.Context, incomplete: str) -> list[str]:
    """An engine, and each library of the artifact that stands before."""
    libraries = [f"tvm:{name}" for name in _names(ctx, "targets/", "/compiled.json")]
    known = ("auto", "onnxruntime", "onnxruntime:cuda", "onnxruntime:tensorrt", "reference", "tvm", *libraries)
    return [name for name in known if name.startswith(incomplete)]


def _names(ctx: typer.Context, before: str, after: str) -> Iterator[str]:
    from exitify.artifact.artifact import Artifact

    path = ctx.params.get("artifact") or next(iter(ctx.args), None)  # the option that is being completed keeps arguments from being read
    with contextlib.suppress(Exception):
        if path is not None and Path(path).stat().st_size <= LARGEST:
            for name in Artifact.open(path).files:
                if name.startswith(before) and name.endswith(after):
                    yield name[len(before) : -len(after)]
