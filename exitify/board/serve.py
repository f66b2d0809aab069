"""The board's side of tuning: it registers at a tracker, and runs the kernels that a client uploads.

Sessions are TVM's own (`rpc.ServerLoop` of its runtime library), each in a process of its own. What accepts them is written here: TVM's
own server needs packages that its wheel does not bring, and ends when a kernel crashes. Of a board it needs the wheels of TVM, and no compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import secrets
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from exitify.board.tracker import GET_PENDING, PUT, UPDATE_INFO, Tracker, listen, receive, say_at_once
from exitify.errors import EngineError, ExitifyError, first_line
from exitify.runtime.engines.cuda import NoGpu, accept_kernels, load_sidecar
from exitify.runtime.engines.tvm_library import runtime_library

_MAGIC, _MISMATCH = 0xFF271, 0xFF273
"""What client and server of TVM's RPC greet each other with (`tvm/rpc/base.py`)."""
_LOOK = 2.0
"""Seconds between two questions to the tracker whether somebody was sent here."""
_UNUSED = 10.0
"""Seconds after which a client that the tracker sent here, and that did not come, is waited for no longer."""
_GREETING = 10.0
"""Seconds that a client has for its greeting."""
_AFTER_CLIENT = 2.0
"""Seconds that a session goes on without its client; a kernel that never ends would go on for ever."""
_RETRY = 5.0
"""Seconds between two tries to find the tracker again."""


def serve(
    tracker: tuple[str, int],
    key: str,
    *,
    host: str = "0.0.0.0",  # noqa: S104
    port: int = 0,
    address: str = "",
    threads: int = 1,
    say: Callable[[str], None] = say_at_once,
) -> None:
    """Measure for whoever the tracker sends here, until Ctrl-C or SIGTERM.

    A client can run any code on the board, and anybody who reaches the tracker can be one: only for a network of your own.

    Args:
        tracker: Host and port.
        key: What boards of one kind register under: the same module in the same power mode, or their times cannot be compared.
        host: The address to listen at; by default every one that the board has. port: 0: one that is free.
        address: Under which clients reach the board, where it is not the one that the tracker sees.
        threads: That one kernel may use.
        say: Called with each line for people.

    Raises:
        ExitifyError: the tracker does not answer within 10 s, the key is none, or the address cannot be listened at.
        EngineError: TVM's runtime is not installed.
    """
    if not key or any(character.isspace() for character in key):
        raise ExitifyError(f"{key!r} is no key", "one word, the same for all boards of a kind: orin")
    runtime = _runtime()
    with listen(host, port, "choose another --port") as listener, _ended_by_sigterm():
        board = _Board(tracker, key, listener, address, runtime, threads, say)
        try:
            try:
                board.register()
            except OSError as error:
                problem = f"no tracker answers at {tracker[0]}:{tracker[1]}: {first_line(error)}"
                raise ExitifyError(
                    problem, "start `exitify board tracker` on the machine that compiles, and see that its port can be reached"
                ) from error
            say(f"{key}: registered at {tracker[0]}:{tracker[1]} as {board.place}; Ctrl-C ends it")
            board.serve()
        except KeyboardInterrupt:
            say(f"{key}: ended, no longer registered")
        finally:
            board.leave()


@dataclass
class _Board:
    """A board at its tracker.

    address: Empty for the one that the tracker sees. runtime: TVM's library. word: What the next client must know; the tracker tells it one.
    """

    tracker: tuple[str, int]
    key: str
    listener: socket.socket
    address: str
    runtime: Path
    threads: int
    say: Callable[[str], None]
    word: str = ""
    place: str = ""
    _tracker: Tracker | None = field(default=None)

    def register(self) -> None:
        """Connect to the tracker, and offer the board there.

        Raises:
            OSError: it does not answer.
        """
        self.leave()
        self._tracker = Tracker(*self.tracker)
        port = self.listener.getsockname()[1]
        self.place = f"{self.address or self._tracker.own_address}:{port}"
        self._tracker.ask(UPDATE_INFO, {"key": f"server:{self.key}", "addr": [self.address or None, port]})
        self._offer()

    def leave(self) -> None:
        """Be registered no longer."""
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def serve(self) -> None:
        """Serve one client after the other; wait for the tracker when it is gone."""
        while True:
            try:
                connection, client, limit = self._client()
                with connection:
                    self._session(connection, client, limit)
                self._offer()
            except OSError as error:
                self.say(f"{self.key}: the tracker is gone ({first_line(error)}): trying again every {_RETRY:g} s")
                self._find_again()
                self.say(f"{self.key}: registered again")

    def _find_again(self) -> None:
        while True:
            try:
                return self.register()
            except OSError:
                time.sleep(_RETRY)

    def _offer(self) -> None:
        """Tell the tracker that the board is free, and what its next client must know."""
        assert self._tracker is not None
        self.word = f"{self.key}:{secrets.token_hex(8)}"
        self._tracker.ask(PUT, self.key, [self.listener.getsockname()[1], self.word], self.address or None)

    def _client(self) -> tuple[socket.socket, str, float]:
        """The next client's connection, where it is, and how many seconds it may stay; 0: as many as it likes."""
        assert self._tracker is not None
        sent = 0.0
        while True:
            if select.select([self.listener], [], [], _LOOK)[0]:
                greeted = self._greet()
                if greeted is not None:
                    return greeted
            elif self.word in self._tracker.ask(GET_PENDING):
                sent = 0.0
            else:
                sent = sent or time.monotonic()
                if time.monotonic() - sent > _UNUSED:
                    self._offer()
                    sent = 0.0

    def _greet(self) -> tuple[socket.socket, str, float] | None:
        """A connection, if it is from a client that the tracker sent."""
        connection, client = self.listener.accept()
        connection.settimeout(_GREETING)
        try:
            magic, length = struct.unpack("<ii", receive(connection, 8))
            words = receive(connection, length).decode().split() if magic == _MAGIC and 0 < length <= 1024 else []
            if words[:1] == [f"client:{self.word}"]:
                limit = next((float(word.removeprefix("-timeout=")) for word in words[1:] if word.startswith("-timeout=")), 0.0)
                answer = f"server:{self.key}".encode()
                connection.sendall(struct.pack("<ii", _MAGIC, len(answer)) + answer)
                connection.settimeout(None)
                return connection, str(client[0]), limit
            connection.sendall(struct.pack("<i", _MISMATCH))
        except (OSError, ValueError):
            pass
        connection.close()
        return None

    def _session(self, connection: socket.socket, client: str, limit: float) -> None:
        """Let a process serve a client until that leaves, is late, or a kernel crashes."""
        self.say(f"{self.key}: {client} measures here")
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="exitify-board-") as folder:
                process = multiprocessing.get_context("fork").Process(
                    target=_serve_session, args=(connection, self.listener, Path(folder), self.runtime, self.threads), daemon=True
                )
                process.start()
                try:
                    outcome = _outcome(process, connection, limit)
                finally:
                    process.kill()
                    process.join()
        except OSError as error:  # no room for a file, or for a process
            outcome = f"could not be served: {first_line(error)},"
        self.say(f"{self.key}: {client} {outcome} after {time.monotonic() - started:.0f} s; free again")


def _outcome(process: BaseProcess, connection: socket.socket, limit: float) -> str:
    """Wait for a session's end; how it ended, in words."""
    watched = select.poll()
    watched.register(connection, select.POLLRDHUP)
    started, left = time.monotonic(), 0.0
    while process.exitcode is None:
        process.join(0.2)
        now = time.monotonic()
        if not left and watched.poll(0):
            left = now
        if left and now - left > _AFTER_CLIENT:
            return "left while a kernel was still running: that was ended"
        if limit and now - started > limit:
            return "was late and was sent away"
    if process.exitcode < 0:
        return f"lost its session to {signal.Signals(-process.exitcode).name}, of a kernel most likely,"
    return "left"


def _serve_session(connection: socket.socket, listener: socket.socket, folder: Path, runtime: Path, threads: int) -> None:
    """Be the process of one session: nothing that a kernel does harms the next one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listener.close()
    # As kernels are timed on the machine that compiles: so many threads, which no other process's are tied to one core with.
    os.environ.update(TVM_NUM_THREADS=str(threads), TVM_BIND_THREADS="0", OMP_NUM_THREADS="1")
    import tvm_ffi

    ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    with contextlib.suppress(NoGpu):  # then there is none for clients either, and they say so
        load_sidecar(runtime.parent)
        accept_kernels()

    def place(name: str) -> str:
        return str(folder / Path(name).name)

    def load(name: str) -> tvm_ffi.Module:
        return tvm_ffi.load_module(place(name))

    tvm_ffi.register_global_func("tvm.rpc.server.workpath", place, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.load_module", load, override=True)
    with contextlib.suppress(Exception):  # a client that is gone
        tvm_ffi.get_global_func("rpc.ServerLoop")(connection.fileno())


def _runtime() -> Path:
    """TVM's runtime library; the session's process loads it, this one does not."""
    try:
        if importlib.util.find_spec("tvm_ffi") is None:
            raise ModuleNotFoundError(name="apache-tvm-ffi")
        return runtime_library()
    except ModuleNotFoundError as error:
        raise EngineError("TVM's runtime is not installed here", "pip install 'exitify[tvm]'") from error


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which service managers end programs, is as Ctrl-C: no session is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
