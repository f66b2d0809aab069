"""A function in a new interpreter of its own: nothing that this process holds, loaded or fragmented is there."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from exitify.errors import ExitifyError, one_line

_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from exitify.benchmark.worker import main; main()"
"""Without the empty entry that -c puts first: a file in the current directory must not stand in for one of Python's own modules."""

Tell = Callable[[int], None]


class NotHandedOver(ExitifyError):
    """An argument cannot go to another process: a module of a class that cannot be imported there, for instance."""


class WorkerFailed(ExitifyError):
    """The process ended before it gave a result."""


class _There(Exception):
    """Where in the other process an error was raised, as its traceback says."""


def call_alone(function: Callable[..., Any], *arguments: Any, tell: Tell = lambda done: None) -> Any:
    """What `function(*arguments, tell)` returns in a process of its own, which ends with this call however that ends.

    `multiprocessing` is not asked because it runs the caller's script again in each of its processes, unguarded ones from their first line.

    Args:
        function: A module's own. arguments: All pickled. tell: What the function's last argument leads to.

    Raises:
        NotHandedOver, WorkerFailed: see there. Whatever the function raises.
    """
    try:
        request = pickle.dumps((function, arguments))
    except Exception as error:  # whatever an object of the user's raises
        raise NotHandedOver(f"it cannot be pickled: {one_line(error)}") from error
    path = os.pathsep.join([*filter(None, sys.path), os.getcwd()])
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and program
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, or refused what it has read: that is told below
                process.stdin.write(request)
                process.stdin.close()
            try:
                while True:
                    kind, value = pickle.load(process.stdout)  # noqa: S301 - from our own process, through a pipe of its own
                    if kind != "told":
                        break
                    tell(value)
            except (EOFError, pickle.UnpicklingError):
                process.wait()
                said.seek(0)
                last = (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise WorkerFailed(f"a process of the benchmark ended with {process.returncode}: {last}", "is there enough memory?") from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # what it did not read
                process.stdin.close()
    if kind == "refused":
        raise NotHandedOver(value)
    if kind == "raised":
        raised, text = value
        raise raised from _There(text)
    return value


def main() -> None:
    """Be that process: the request on stdin, pickled pairs on what was stdout; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    try:
        function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - from `call_alone`, through a pipe of its own
    except Exception as error:
        send("refused", f"it cannot be loaded there: {one_line(error)}")
        return
    try:
        send("returned", function(*arguments, lambda done: send("told", done)))
    except Exception as error:
        send("raised", (_portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """The error, if it can be read on the other side: many are made from other arguments than they are pickled with. Else what it says."""
    try:
        read: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was written a moment ago
    except Exception:
        return WorkerFailed(one_line(error), "the process's own traceback stands above, with -vv")
    return read
