"""The command line called in this process, as it would run in its own: its streams, its logging, its exit code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from exitify.cli.app import main

COMMAND = (sys.executable, "-m", "exitify")

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""An environment in which output is held back as users have it."""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What `--json` printed: one line, and nothing on stderr."""
        assert (self.code, self.err) == (0, ""), self
        (line,) = self.out.splitlines()
        return json.loads(line)


def exitify(*arguments: object, folder: Path) -> Done:
    """Run a command in this folder. What is no ExitifyError comes out as it is: a traceback is a bug."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for context in (_folder(folder), _own_logging(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            stack.enter_context(context)
        stack.enter_context(mock.patch.object(sys, "argv", ["exitify", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(sys, "excepthook", sys.excepthook))  # typer sets its own
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 0
        else:
            code = 0
    return Done(code, out.getvalue(), err.getvalue())


def refused(done: Done, problem: str) -> None:
    """Exit 1, and exactly two lines: what is wrong, and what to do."""
    assert done.code == 1, done
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 2, done.err
    assert re.match(f"exitify: .*{problem}", lines[0]), lines[0]
    assert re.match(r"  hint: \S", lines[1]), lines[1]


def process(*arguments: object, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=folder, text=True, capture_output=True, timeout=60, check=False, **options)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all that lies in a folder, sub-folders included; what Python compiles for itself is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """A root logger without pytest's handlers, so that the command sets up its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
