"""Timing kernels away from this process: a worker on this machine, or boards behind TVM's RPC."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import tvm
from tvm import tirx

from exitify.board.tracker import REQUEST, Tracker, parse_place
from exitify.errors import ExitifyError, first_line
from exitify.lower.graphics import GpuMachine
from exitify.lower.linking import linker
from exitify.lower.processors import Machine
from exitify.targets import processor

parse_rpc = parse_place
"""`--rpc HOST:PORT/KEY` as its parts."""

log = logging.getLogger(__name__)

_STARTED, _PROMISED, _CONNECTED = 60.0, 3.0, 30.0
"""Seconds in which a process starts, in which the tracker names a board that it called free, and in which that board takes its client."""


class NotMeasured(Exception):
    """A kernel could not be compiled, crashed, or took too long; the text says which."""


class Runner(Protocol):
    """Where kernels are timed."""

    @property
    def places(self) -> int:
        """How many calls of `seconds` it takes at once, from as many threads."""
        return 1

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        """Median seconds a call of each scheduled kernel, timed in turn, all in one place.

        Raises:
            NotMeasured: one of them failed.
        """

    def close(self) -> None:
        """Give back what it holds; what another thread still measures there fails."""


class Worker:
    """A process that answers one JSON line with another, replaced when it crashes or is late."""

    module: ClassVar[str]

    def __init__(self, environment: Mapping[str, str], patience: float) -> None:
        """Start nothing yet.

        Args:
            environment: Variables that it has beside this process's. patience: Seconds for one request.
        """
        self.environment, self.patience = environment, patience
        self._process: subprocess.Popen[str] | None = None
        self._is_ready = False

    def ask(self, request: Mapping[str, Any], patience: float | None = None) -> dict[str, Any]:
        """The answer.

        Raises:
            NotMeasured: none came.
            ExitifyError: it does not start.
        """
        patience = self.patience if patience is None else patience
        self.start()
        process = self.wait()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(_line(process, patience))
        except (BrokenPipeError, ValueError) as error:
            self.close()
            raise NotMeasured("the worker crashed") from error
        except TimeoutError as error:
            self.close()
            raise NotMeasured(f"it took more than {patience:g} s") from error
        except KeyboardInterrupt:
            self.close()
            raise

    def start(self) -> None:
        """Start the process if there is none, without waiting for it."""
        if self._process is None:
            # In a session of its own, so that Ctrl-C reaches this process alone.
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process, self._is_ready = None, False

    def kill(self) -> None:
        """End the process from another thread than the one that asks it, which then finds it crashed."""
        if self._process is not None:
            self._process.kill()

    def wait(self) -> subprocess.Popen[str]:
        """The process that was started, once it can be asked.

        Raises:
            ExitifyError: it does not start.
        """
        assert self._process is not None
        try:
            self._is_ready = self._is_ready or _line(self._process, _STARTED).strip() == "ready"
        except TimeoutError:
            pass
        except KeyboardInterrupt:
            self.close()
            raise
        if not self._is_ready:
            self.close()
            raise ExitifyError("the process that measures kernels does not start", f"see whether `python -m {self.module}` does")
        return self._process


def _line(process: subprocess.Popen[str], patience: float) -> str:
    """What the process says next."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], patience)
    if not ready:
        raise TimeoutError
    return process.stdout.readline()


class LocalRunner(Worker, Runner):
    """A worker process on this machine."""

    module = "exitify.lower.tuning.worker"

    def __init__(self, machine: Machine | GpuMachine, *, threads: int = 1, patience: float = 60.0) -> None:
        """Start nothing yet.

        Args:
            machine: What to compile for; this one. threads: That one kernel may use. patience: Seconds for one request.
        """
        super().__init__({"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0", "OMP_NUM_THREADS": "1"}, patience)
        self.machine = machine

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        answer = self.ask(_request(kernels, self.machine, repeats))
        if "unable" in answer:
            raise ExitifyError(*answer["unable"])
        if "failure" in answer:
            if isinstance(self.machine, GpuMachine):
                self.close()  # after an illegal address CUDA answers nothing in that process any more
            raise NotMeasured(answer["failure"])
        return answer["seconds"]


class _Board(Worker):
    """A board, and the process that holds its session. `address` is empty until it is connected."""

    module = "exitify.lower.tuning.remote"
    address = ""

    def connect(self, host: str, port: int, word: str) -> None:
        """Open the session.

        Raises:
            NotMeasured: the board does not answer.
        """
        self.address = f"{host}:{port}"
        answer = self.ask({"connect": [host, port, word]}, _CONNECTED)
        if "lost" in answer:
            raise NotMeasured(answer["lost"])


class RpcRunner(Runner):
    """Every board that is registered at TVM's tracker under a key: one place each, held until the runner is closed.

    Kernels are compiled and linked here, by a process for each board; there is nothing but TVM's runtime on the boards. One that registers
    later is used from the next round on. What a board that is lost was measuring is measured on another once more.

    A key is for one kind of board: a search ranks candidates by times of all of them, which are comparable only if they are the same module
    in the same power mode. What it chooses is timed against the default in one call of `seconds`, on one board.
    """

    def __init__(self, machine: Machine | GpuMachine, host: str, port: int, key: str, *, patience: float = 60.0, grace: float = 20.0) -> None:
        """Take every board that is free.

        Args:
            machine: What to compile for. host, port: The tracker's. key: What the boards are registered under.
            patience: Seconds for one call of `seconds`; a board that takes longer is lost.
            grace: Seconds to wait for a board when there is none.

        Raises:
            ExitifyError: nobody answers there, no board is registered under the key, or others hold them all.
        """
        self.machine, self.place, self.patience, self.grace = machine, (host, port, key), patience, grace
        self.answered: list[tuple[str, int]] = []
        """For each call of `seconds` that was answered the board's address, and how many kernels it timed in turn."""
        linker(machine.host.architecture, processor.architecture())  # none is an error before a board is taken
        self._idle: list[_Board] = []
        self._busy: list[_Board] = []
        self._changed = threading.Condition()
        self._gathering = threading.Lock()
        self._closed = False
        try:
            registered = self._gather()
            if not registered:
                raise ExitifyError(f"no board is registered as {key!r} at {host}:{port}", self._hint)
            self._give_back(self._take())
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> int:
        """How many boards there are now: the tracker is asked for new ones."""
        with contextlib.suppress(ExitifyError):  # those that are held need no tracker
            self._gather()
        with self._changed:
            return max(1, len(self._idle) + len(self._busy))

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        """As every runner's.

        Raises:
            NotMeasured: a kernel failed, or the boards were lost that measured it, twice.
            ExitifyError: no board is left.
        """
        request = _request(kernels, self.machine, repeats)
        lost: list[str] = []
        while len(lost) < 2:
            board = self._take()
            try:
                answer = board.ask(request)
            except NotMeasured as error:
                answer = {"lost": str(error)}
            except BaseException:
                self._drop(board)
                raise
            if "seconds" in answer:
                self.answered.append((board.address, len(kernels)))
                self._give_back(board)
                return answer["seconds"]
            if "unable" in answer:
                self._give_back(board)
                raise ExitifyError(*answer["unable"])
            if "failure" in answer:
                self._give_back(board)
                raise NotMeasured(answer["failure"])
            self._drop(board)
            if not self._closed:
                log.warning("the board %s is lost: %s", board.address, *answer.values())
            if "lost" in answer:  # not before this was asked
                lost.append(answer["lost"])
        raise NotMeasured(f"two boards were lost by it, or one twice: {lost[-1]}")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for board in self._busy:
                board.kill()
            self._changed.notify_all()
        for board in idle:
            board.close()

    def _take(self) -> _Board:
        """A board that is idle, from now on busy; waits for one.

        Raises:
            NotMeasured: the runner is closed. ExitifyError: there is no board at all.
        """
        ends = time.monotonic() + self.grace
        while True:
            with self._changed:
                if self._closed:
                    raise NotMeasured("the boards were given back")
                if self._idle:
                    board = self._idle.pop(0)
                    self._busy.append(board)
                    return board
                if self._busy:
                    self._changed.wait(1)
                    ends = time.monotonic() + self.grace
                    continue
            try:
                registered = self._gather()
            except ExitifyError:
                if time.monotonic() > ends:
                    raise
            else:
                if time.monotonic() > ends and not (self._idle or self._busy):
                    raise self._none_left(registered)
            time.sleep(0.2)

    def _none_left(self, registered: int) -> ExitifyError:
        host, port, key = self.place
        where = f"as {key!r} at {host}:{port}"
        if registered:
            hint = "somebody else measures on them, or they do not answer: see what `exitify board serve` says there"
            return ExitifyError(f"no board is free: {registered} registered {where}, all in use", hint)
        return ExitifyError(f"no board is left: none is registered {where}", f"{self._hint}; what was measured is kept")

    def _give_back(self, board: _Board) -> None:
        with self._changed:
            self._busy.remove(board)
            self._idle.append(board)
            self._changed.notify()
        if self._closed:
            self.close()

    def _drop(self, board: _Board) -> None:
        with self._changed:
            self._busy.remove(board)
            self._changed.notify()
        board.close()

    @property
    def _hint(self) -> str:
        _, port, key = self.place
        return f"start `exitify board tracker` here and `exitify board serve HOST:{port}/{key}` on each board"

    def _gather(self) -> int:
        """Take every board that is free; return how many are registered, those that others hold among them.

        Raises:
            ExitifyError: nobody answers at the tracker's address.
        """
        host, port, key = self.place
        with self._gathering:
            try:
                with contextlib.closing(Tracker(host, port)) as tracker:
                    registered, free = tracker.boards(key)
                    if free:
                        self._connect(tracker, key, free)
                    return registered
            except OSError as error:
                raise ExitifyError(f"no board answers at {host}:{port}: {first_line(error)}", self._hint) from error

    def _connect(self, tracker: Tracker, key: str, free: int) -> None:
        """Take up to so many boards."""
        boards = [_Board({}, self.patience) for _ in range(free)]
        try:
            for board in boards:
                board.start()
            for board in boards:
                board.wait()  # before the tracker is asked: a board does not wait long for whom it was promised to
            while boards:
                try:
                    _, (host, port, word) = tracker.ask(REQUEST, key, "", 0, patience=_PROMISED)
                except TimeoutError:  # somebody else was faster
                    return
                board = boards.pop()
                try:
                    board.connect(host, port, word)
                except NotMeasured as error:
                    log.warning("the board %s does not answer: %s", board.address, error)
                    board.close()
                    continue
                with self._changed:
                    self._busy.append(board)
                self._give_back(board)
                log.info("measuring on the board %s", board.address)
        finally:
            for board in boards:
                board.close()


def _request(kernels: Sequence[tirx.PrimFunc], machine: Machine | GpuMachine, repeats: int) -> dict[str, Any]:
    """What a process is asked: modules with one function `main` each, as TVM's JSON, and what to build them with."""
    driver = "" if isinstance(machine, Machine) else machine.driver
    command = linker(machine.host.architecture, processor.architecture())
    texts = [tvm.ir.save_json(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})) for kernel in kernels]
    return {"kernels": texts, "target": machine.description, "driver": driver, "linker": command, "repeats": repeats}
