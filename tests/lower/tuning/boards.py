"""Trackers and boards on the loopback, as processes of this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exitify.lower.tuning.measure import RpcRunner
from tests.emulator import EmulatedPython

HERE = "127.0.0.1"
ROOT = Path(__file__).parent.parent.parent.parent
TRACKER = "from exitify.lower.tuning.tracker import serve_tracker; serve_tracker('127.0.0.1', {port})"
BOARD = "from exitify.board import serve; serve._RETRY = serve._AFTER_CLIENT = 0.3; serve.serve(('127.0.0.1', {port}), {key!r}, host='127.0.0.1')"


@dataclass
class Served:
    """A process that serves; `said` is filled with the lines that it prints."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, words: str, timeout: float = 120) -> str:
        """The first line with these words, once it is printed."""

        def found() -> str | None:
            return next((line for line in self.said if words in line), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() or self.process.poll() is not None, timeout), self.said
            assert found(), self.said
            return found() or ""

    def end(self) -> int:
        """Ctrl-C, and its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def die(self) -> None:
        """As when the power is gone, its sessions too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line.rstrip("\n"))
                self._changed.notify_all()
        self.process.wait()
        with self._changed:
            self._changed.notify_all()


@contextlib.contextmanager
def serving(*command: str, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A process of its own group, killed in the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background ignores Ctrl-C, and so would what they start.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    served = Served(process)
    try:
        yield served
    finally:
        served.die()


@contextlib.contextmanager
def tracker(port: int = 0) -> Iterator[tuple[Served, int]]:
    """A tracker, and its port."""
    with serving(sys.executable, "-c", TRACKER.format(port=port)) as served:
        line = served.wait_for("boards register at port")
        yield served, int(line.split("port ")[1].split()[0])


@contextlib.contextmanager
def boards(port: int, key: str, count: int, python: EmulatedPython | None = None) -> Iterator[Sequence[Served]]:
    """So many boards, registered: this machine, or an emulated one."""
    arguments = ("-c", BOARD.format(port=port, key=key))
    command = python.command(*arguments) if python else [sys.executable, *arguments]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # boards that are killed leave what was uploaded
        environment = python.environment(TMPDIR=folder) if python else {**os.environ, "TMPDIR": folder}
        found = [stack.enter_context(serving(*command, environment=environment)) for _ in range(count)]
        for board in found:
            board.wait_for("registered at")
        yield found


def address(board: Served) -> str:
    """Where a board of `boards` said that it is."""
    return board.said[0].split(" as ")[1].split(";")[0]


class Counted(RpcRunner):
    """Boards, with a count of the rounds: a search asks for the places before each, and once more before its finals."""

    asked = 0

    @property
    def places(self) -> int:
        self.asked += 1
        return super().places

    @property
    def rounds(self) -> int:
        return self.asked - 1
