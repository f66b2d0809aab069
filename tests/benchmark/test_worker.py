"""A function in a process of its own: what comes back, and that nothing stays behind."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exitify.benchmark.worker import NotHandedOver, WorkerFailed, call_alone
from exitify.errors import DataError

Tell = Callable[[int], None]


def whoami(text: str, tell: Tell) -> tuple[int, str]:
    print("this goes to stderr", text)
    tell(1)
    tell(2)
    return os.getpid(), text


def refuse(tell: Tell) -> None:
    raise DataError("7 is no sample", "give 8")


def lack(tell: Tell) -> None:
    raise ModuleNotFoundError("No module named 'openvino'", name="openvino")


def die(code: int, tell: Tell) -> None:
    print("the last words", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def write_and_wait(path: Path, tell: Tell) -> None:
    path.write_text(str(os.getpid()))
    tell(0)
    time.sleep(600)


def names_of_path(tell: Tell) -> list[str]:
    return sys.path


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_returns_what_the_function_returns_from_another_process() -> None:
    told: list[int] = []
    process, text = call_alone(whoami, "x" * 200_000, tell=told.append)
    assert process != os.getpid()
    assert text == "x" * 200_000
    assert told == [1, 2]
    assert not is_running(process)


def test_an_error_comes_back_as_it_was_raised() -> None:
    with pytest.raises(DataError, match="7 is no sample") as caught:
        call_alone(refuse)
    assert (caught.value.problem, caught.value.hint) == ("7 is no sample", "give 8")


def test_a_missing_package_comes_back_by_its_name() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        call_alone(lack)
    assert caught.value.name == "openvino"


def test_a_process_that_dies_is_an_error_with_its_last_words() -> None:
    with pytest.raises(WorkerFailed, match="ended with 3: the last words"):
        call_alone(die, 3)


def test_what_cannot_be_pickled_is_not_handed_over() -> None:
    with pytest.raises(NotHandedOver, match="cannot be pickled"):
        call_alone(whoami, threading.Lock())


def test_what_cannot_be_loaded_there_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a class of a notebook's, which is `__main__` in one process and missing in the other."""

    class OfMain:
        """Large, so that the process ends before it has read all of it."""

        weights = b""

    OfMain.__module__, OfMain.__qualname__ = "__main__", "OfMain"
    monkeypatch.setattr(sys.modules["__main__"], "OfMain", OfMain, raising=False)
    given = OfMain()
    given.weights = bytes(2**22)
    with pytest.raises(NotHandedOver, match=r"cannot be loaded there: .*OfMain"):
        call_alone(whoami, given)


def test_a_file_beside_the_user_stands_in_for_no_module_of_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "json", "pickle"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the current directory')")
    monkeypatch.chdir(tmp_path)
    path = call_alone(names_of_path)
    assert "" not in path
    assert path.index(str(tmp_path)) > max(i for i, entry in enumerate(path) if entry.endswith(f"python{sys.version_info[0]}.{sys.version_info[1]}"))


def test_an_interruption_leaves_no_process_behind(tmp_path: Path) -> None:
    def press(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_alone(write_and_wait, tmp_path / "pid", tell=press)
    assert not is_running(int((tmp_path / "pid").read_text()))


class TwoArguments(Exception):
    """Made from more than it is pickled with, as torch's own errors of compilers are."""

    def __init__(self, backend: str, inner: str) -> None:
        super().__init__(f"{backend}: {inner}")


def fails_so(_: object) -> None:
    raise TwoArguments("inductor", "no C++ compiler")


def test_an_error_that_cannot_be_read_here_is_told_in_words() -> None:
    with pytest.raises(WorkerFailed, match="TwoArguments: inductor: no C\\+\\+ compiler"):
        call_alone(fails_so)
