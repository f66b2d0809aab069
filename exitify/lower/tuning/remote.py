"""A process that has kernels timed on a board: `python -m exitify.lower.tuning.remote`, one JSON request a line, one answer a line.

What it compiles may crash LLVM, and a board may never answer; its parent gives it a time, and ends it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exitify.errors import first_line
from exitify.lower.nvrtc import NoCompiler
from exitify.lower.tuning.worker import built, timed_in_turn
from exitify.runtime.engines.cuda import NoGpu


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import tvm  # the slow part, before the first request's time runs

    print("ready", file=answers, flush=True)
    board: _Board | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "connect" in request:
            try:
                board, answer = _Board(*request["connect"]), {}
            except Exception as error:
                answer = {"lost": first_line(error)}
        else:
            assert board is not None
            answer = board.answer(**request)
        print(json.dumps(answer), file=answers, flush=True)
    del board, tvm


class _Board:
    """A session on a board."""

    def __init__(self, host: str, port: int, word: str) -> None:
        import tvm

        self.session = tvm.rpc.connect(host, port, word)
        self.uploaded = 0

    def answer(self, kernels: Sequence[str], target: dict[str, Any], driver: str, linker: Sequence[str], repeats: int) -> dict[str, Any]:
        """The request's answer: `seconds`, or why there are none: `failure`, of the kernels, `lost`, of the board, `gone`, lost before, or `unable`,
        problem and hint, where no kernel could be timed.

        Args:
            kernels: Modules with one scheduled function `main` each, TVM's JSON.
            target: What to compile for, as TVM's target describes itself. driver: CUDA version of its GPU's driver, if it is one.
            linker: The command that links for it.
            repeats: Timings of each, about 5 ms long.
        """
        on_gpu = target["kind"] == "cuda"
        if not self._is_there(on_gpu):
            return {"gone": "it does not answer"}
        try:
            return {"seconds": self._seconds(kernels, target, driver, linker, repeats)}
        except (NoGpu, NoCompiler) as error:  # no kernel's fault
            return {"unable": [error.problem, error.hint]}
        except Exception as error:
            said = str(error).rpartition("Error caught from RPC call:")[2].strip().partition("\n")[0]
            return {"failure" if self._is_there(on_gpu) else "lost": f"{type(error).__name__}: {said}"[:300]}

    def _seconds(self, kernels: Sequence[str], target: dict[str, Any], driver: str, linker: Sequence[str], repeats: int) -> list[float]:
        """Median seconds a call of each kernel, timed in turn so that a slower moment of the board hits them all."""
        import tvm

        modules = [tvm.ir.load_json(text) for text in kernels]
        device = self.session.cuda() if target["kind"] == "cuda" else self.session.cpu()
        if not device.exist:
            raise NoGpu("the board has no GPU that TVM's runtime finds", "`exitify doctor` there says why")
        return timed_in_turn([self._loaded(module, target, driver, linker) for module in modules], modules, device, repeats)

    def _loaded(self, module: Any, target: dict[str, Any], driver: str, linker: Sequence[str]) -> Any:
        """The kernel on the board. Each under a name of its own: a library that is loaded must not be written over."""
        self.uploaded += 1
        name = f"kernel{self.uploaded}.so"
        with tempfile.TemporaryDirectory(prefix="exitify-") as folder:
            self.session.upload(str(built(module, target, driver, linker, Path(folder, name))))
        return self.session.load_module(name)

    def _is_there(self, on_gpu: bool) -> bool:
        """Whether the board still answers, its GPU too: after an illegal address CUDA does not, for as long as the session lasts."""
        try:
            if on_gpu and self.session.cuda().exist:
                self.session.cuda().sync()
            return bool(self.session.get_function("tvm.rpc.server.workpath")("."))
        except Exception:
            return False


if __name__ == "__main__":
    main()
