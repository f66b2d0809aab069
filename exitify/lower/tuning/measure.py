"""Timing kernels away from this process: a worker on this machine, or a board behind TVM's RPC."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import tirx

from exitify.errors import ExitifyError, first_line
from exitify.lower.library import silent_stderr
from exitify.lower.linking import link_with, linker
from exitify.lower.processors import Machine
from exitify.targets import processor


class NotMeasured(Exception):
    """A kernel could not be compiled, crashed, or took too long; the text says which."""


class Runner(Protocol):
    """Where kernels are timed."""

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        """Median seconds a call of each scheduled kernel, timed in turn.

        Raises:
            NotMeasured: one of them failed.
        """

    def close(self) -> None:
        """Give back what it holds."""


class LocalRunner(Runner):
    """A worker process on this machine, replaced when it crashes or is late."""

    def __init__(self, machine: Machine, *, threads: int = 1, patience: float = 60.0) -> None:
        """Start nothing yet.

        Args:
            machine: What to compile for; this one. threads: That one kernel may use. patience: Seconds for one request.
        """
        self.machine, self.threads, self.patience = machine, threads, patience
        self._process: subprocess.Popen[str] | None = None

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        modules = [tvm.ir.save_json(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})) for kernel in kernels]
        answer = self._ask({"kernels": modules, "target": self.machine.description, "repeats": repeats})
        if "failure" in answer:
            raise NotMeasured(answer["failure"])
        return answer["seconds"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(self._line(process))
        except (BrokenPipeError, ValueError) as error:
            self.close()
            raise NotMeasured("the worker crashed") from error
        except TimeoutError as error:
            self.close()
            raise NotMeasured(f"it took more than {self.patience:g} s") from error
        except KeyboardInterrupt:
            self.close()
            raise

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "TVM_NUM_THREADS": str(self.threads), "TVM_BIND_THREADS": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "exitify.lower.tuning.worker"]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
        )
        try:
            started = self._line(self._process).strip() == "ready"
        except TimeoutError:
            started = False
        if not started:
            self.close()
            raise ExitifyError("the process that measures kernels does not start", "see whether `python -m exitify.lower.tuning.worker` does")
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], self.patience)
        if not ready:
            raise TimeoutError
        return process.stdout.readline()


class RpcRunner(Runner):
    """A board behind TVM's RPC: compiled and linked here, run there, nothing but TVM's runtime on the board."""

    def __init__(self, machine: Machine, host: str, port: int, key: str) -> None:
        """Connect to a tracker.

        Raises:
            ExitifyError: nobody answers there, or no board is registered under the key.
        """
        self.machine, self.place = machine, (host, port, key)
        self._command = linker(machine.triple.split("-")[0], processor.architecture())
        self._uploaded = 0
        self._remote = self._request()

    def seconds(self, kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        try:
            return self._timed([self._compiled(kernel) for kernel in kernels], kernels, repeats)
        except Exception as error:
            self._remote = self._request()  # a kernel that crashed took the board's session with it
            raise NotMeasured(first_line(error)) from error

    def close(self) -> None:
        self._remote = None

    def _request(self) -> Any:
        host, port, key = self.place
        hint = "start `python -m tvm.exec.rpc_tracker` here and `python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY` there"
        try:
            socket.create_connection((host, port), timeout=10).close()  # TVM itself would try for ever
            tracker = tvm.rpc.connect_tracker(host, port)
            if key not in tracker.summary()["queue_info"]:
                raise ExitifyError(f"no board is registered as {key!r} at {host}:{port}", hint)
            return tracker.request(key, priority=0, session_timeout=0)
        except ExitifyError:
            raise
        except Exception as error:
            raise ExitifyError(f"no board answers at {host}:{port}: {first_line(error)}", hint) from error

    def _compiled(self, kernel: tirx.PrimFunc) -> Any:
        """The kernel on the board. Each under a name of its own: a library that is loaded must not be written over."""
        self._uploaded += 1
        name = f"kernel{self._uploaded}.so"
        module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
        with tempfile.TemporaryDirectory(prefix="exitify-") as folder, silent_stderr():
            path = Path(folder) / name
            tvm.compile(module, target=self.machine.target).export_library(str(path), fcompile=link_with(self._command))
            self._remote.upload(str(path))
        return self._remote.load_module(name)

    def _timed(self, modules: Sequence[Any], kernels: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        device = self._remote.cpu()
        timers = [module.time_evaluator("main", device, number=1, repeat=1, min_repeat_ms=5) for module in modules]
        looks = [[(tuple(int(size) for size in p.shape), str(p.dtype)) for p in kernel.params] for kernel in kernels]
        arguments = [[tvm.runtime.tensor(np.ones(shape, dtype), device) for shape, dtype in look] for look in looks]
        times: list[list[float]] = [[] for _ in timers]
        for _ in range(repeats):
            for timer, given, found in zip(timers, arguments, times):
                found.append(timer(*given).mean)
        return [sorted(found)[len(found) // 2] for found in times]


def parse_rpc(text: str) -> tuple[str, int, str]:
    """`HOST:PORT/KEY` as its parts.

    Raises:
        ExitifyError: it has another form.
    """
    address, _, key = text.partition("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not key:
        raise ExitifyError(f"--rpc {text!r} is no HOST:PORT/KEY", "127.0.0.1:9190/orin: a tracker, and the key that the board registered under")
    return host, int(port), key
