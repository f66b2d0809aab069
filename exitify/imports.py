"""Objects of the user's own code, by name: `package.module:name`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exitify.errors import ExitifyError, one_line


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Put the current directory first on `sys.path` for a while, so that the user's own modules are found."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def import_object(name: str, kind: type[ExitifyError]) -> Any:
    """Return what `package.module:name` names.

    Args:
        name: A module's dotted name, a colon, and the name of something in it (dots allowed).
        kind: The error to raise.

    Raises:
        ExitifyError: of that kind: the module is missing or fails (the message says where), or has nothing of that name.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        hint = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise kind(f"{name!r} is not of the form package.module:name", f"a module is written without slashes and .py: {hint}:{attribute or 'name'}")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise kind(f"there is no module {error.name!r}", "it must be installed, or lie in the current directory") from error
        raise kind(
            f"the module {module_name!r} fails{place_of(error)}: {one_line(error)}",
            "it must be importable: python -c 'import …' shows the whole error",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(part, names, 1)
            raise kind(
                f"the module {module_name!r} ({getattr(sys.modules[module_name], '__file__', None)}) has no {attribute!r}",
                f"did you mean {close[0]!r}?" if close else "check the name after the colon",
            )
        found = getattr(found, part)
    return found


def place_of(error: BaseException) -> str:
    """Return ` at FILE:LINE` of the last line that ran, for messages; empty when not known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    ours = (str(Path(__file__).parent) + os.sep, importlib.__file__, "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
