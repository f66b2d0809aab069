"""Tuning on boards behind a tracker, all of them processes of this machine: who measures what, and what is left when one is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T

from exitify.board.serve import serve
from exitify.board.tracker import Tracker, parse_place
from exitify.errors import ExitifyError
from exitify.lower.tuning import space
from exitify.lower.tuning.database import Database, choice_text
from exitify.lower.tuning.measure import NotMeasured, RpcRunner
from exitify.lower.tuning.search import FINALISTS, tune, unheard
from exitify.lower.tuning.tasks import Task
from exitify.lower.tuning.tracker import serve_tracker
from tests.lower.tuning.boards import HERE, Counted, address, boards, serving, tracker
from tests.lower.tuning.test_tuning import Pretend, here, tasks


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with tracker() as (_, found):
        yield found


def few() -> list[Task]:
    """Kernels with many candidates each."""
    return [task for task in tasks() if "convolution" in task.name][:3]


def default(task: Task | None = None) -> tirx.PrimFunc:
    return space.apply((task or few()[0]).kernel, None, here())


@contextlib.contextmanager
def measuring(port: int, key: str, **options: float) -> Iterator[Counted]:
    runner = Counted(here(), HERE, port, key, **options)
    try:
        yield runner
    finally:
        runner.close()


def registered(port: int, key: str) -> tuple[int, int]:
    """How many boards the tracker knows, and how many of them are free."""
    with contextlib.closing(Tracker(HERE, port)) as asked:
        return asked.boards(key)


def records(folder: Path) -> list[dict[str, object]]:
    """Every measurement, whole lines of the database."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if "choice" in record]


def assert_each_once_and_measured(folder: Path, count: int) -> None:
    """So many records, no candidate twice, none that failed; and the database reads them."""
    found = records(folder)
    assert len(found) == count
    assert all(record["failure"] == "" and record["seconds"] > 0 for record in found)  # type: ignore[operator]
    assert sum(Database(folder).read(task.key).trials for task in tasks()) == count


# --- places without boards ------------------------------------------------------------------------------------------


class Places(Pretend):
    """As `Pretend`, in so many places; counts the rounds."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.count, self.rounds = places, 0

    @property
    def places(self) -> int:
        self.rounds += 1
        return self.count


def test_a_round_has_as_many_candidates_as_there_are_places_and_the_budget_is_kept(tmp_path: Path) -> None:
    for places, rounds in ((1, 40), (3, 14), (40, 1)):
        runner, seen = Places(places), []
        database = Database(tmp_path / str(places))
        assert tune(tasks(), here(), database, runner, 40, lambda *said, seen=seen: seen.append(said[0])) == 40
        assert seen == list(range(1, 41))
        assert runner.rounds == rounds + 1  # and the finals
        assert_each_once_and_measured(tmp_path / str(places), 40)
        for task in tasks():
            lines = (tmp_path / str(places) / f"{task.key}.jsonl").read_text().splitlines()
            if database.read(task.key).trials:
                assert any(json.loads(line).get("choice", 0) is None for line in lines)  # the default


def test_candidates_of_one_round_differ_and_all_are_found(tmp_path: Path) -> None:
    task = few()[0]
    choices = len(list(space.convolution.choices(task.kernel, here().vectors)))
    assert tune([task], here(), Database(tmp_path), Places(7), 1000, unheard) == choices
    assert len({choice_text(record["choice"]) for record in records(tmp_path)}) == choices  # type: ignore[arg-type]


def test_ctrl_c_in_a_round_keeps_what_is_done_and_waits_for_nothing_else(tmp_path: Path) -> None:
    class Half(Places):
        """The first candidate is measured; then comes Ctrl-C, and what the second place measures only ends with the runner."""

        def __init__(self) -> None:
            super().__init__(2)
            self.calls, self.closed = iter(range(2)), threading.Event()

        def seconds(self, scheduled: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
            if next(self.calls) == 0:
                return super().seconds(scheduled, repeats)
            first_is_kept.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            self.closed.wait(60)
            raise NotMeasured("closed")

        def close(self) -> None:
            self.closed.set()

    first_is_kept = threading.Event()
    runner = Half()
    with pytest.raises(KeyboardInterrupt):
        tune(few(), here(), Database(tmp_path), runner, 20, lambda *_: first_is_kept.set())
    assert runner.closed.is_set()
    assert_each_once_and_measured(tmp_path, 1)


def test_what_was_done_when_a_round_fails_is_recorded(tmp_path: Path) -> None:
    class Failing(Places):
        """Three places: the first is recorded at once; until then the second waits to fail, and the third to be measured."""

        def __init__(self) -> None:
            super().__init__(3)
            self.calls, self.first_is_kept, self.ended = iter(range(3)), threading.Event(), threading.Semaphore(0)

        def seconds(self, scheduled: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
            number = next(self.calls)
            if number == 0:
                return super().seconds(scheduled, repeats)
            self.first_is_kept.wait(60)
            self.ended.release()
            if number == 1:
                raise ExitifyError("no board is left")
            return super().seconds(scheduled, repeats)

        def tell(self, done: int, *_: object) -> None:
            if done == 1:
                self.first_is_kept.set()
                assert self.ended.acquire(timeout=60)
                assert self.ended.acquire(timeout=60)
                time.sleep(0.5)  # for both to return

    runner = Failing()
    with pytest.raises(ExitifyError, match="no board is left"):
        tune(few(), here(), Database(tmp_path), runner, 20, runner.tell)
    assert runner.asked[-1] == -1  # closed
    assert_each_once_and_measured(tmp_path, 2)


# --- boards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A search over boards: its records, how many rounds it took, and which board answered what."""

    folder: Path
    addresses: list[str]
    rounds: int
    answered: list[tuple[str, int]]

    @property
    def measured(self) -> Counter[str]:
        """How many candidates by board; a request of several kernels is a task's finals."""
        return Counter(address for address, kernels in self.answered if kernels == 1)


TRIALS = 8


@pytest.fixture(scope="module")
def by_boards(port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tuned]:
    """The same search on one board and on two."""
    tuned = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"boards{count}")
        with boards(port, f"by{count}", count) as found, measuring(port, f"by{count}") as runner:
            assert tune(few(), here(), Database(folder), runner, TRIALS, unheard) == TRIALS
            tuned[count] = Tuned(folder, [address(board) for board in found], runner.rounds, runner.answered)
        print(f"{count} boards: {runner.rounds} rounds for {TRIALS} candidates, {dict(tuned[count].measured)}")
    return tuned


def test_two_boards_take_half_the_rounds_of_one(by_boards: dict[int, Tuned]) -> None:
    assert {count: tuned.rounds for count, tuned in by_boards.items()} == {1: TRIALS, 2: TRIALS // 2}


@pytest.mark.parametrize("count", [1, 2])
def test_boards_measure_as_many_candidates_each_and_every_one_is_recorded(by_boards: dict[int, Tuned], count: int) -> None:
    tuned = by_boards[count]
    assert tuned.measured == dict.fromkeys(tuned.addresses, TRIALS // count)
    assert_each_once_and_measured(tuned.folder, TRIALS)


@pytest.mark.parametrize("count", [1, 2])
def test_the_finals_of_a_task_are_one_request_to_one_board(by_boards: dict[int, Tuned], count: int) -> None:
    known = [Database(by_boards[count].folder).read(task.key) for task in few()]
    assert all(one.searched == TRIALS for one in known)
    better = [sum(seconds < one.seconds["null"] for seconds in one.seconds.values()) for one in known]
    expected = [1 + min(one, FINALISTS) for one in better if one]  # the default with the best few
    assert sorted(kernels for _, kernels in by_boards[count].answered if kernels > 1) == sorted(expected)


def test_a_board_that_dies_loses_nothing_and_one_that_comes_is_used(port: int, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(boards(port, "dies", 2))
        addresses = [address(first), address(second)]

        def watch(done: int, *_: object) -> None:
            if done == 3:  # between two candidates, or in the middle of one
                first.die()
            if done == 6:
                stack.enter_context(boards(port, "dies", 1))

        runner = stack.enter_context(measuring(port, "dies"))
        assert tune(few(), here(), Database(tmp_path), runner, 10, watch) == 10
    assert_each_once_and_measured(tmp_path, 10)
    order = [address for address, kernels in runner.answered if kernels == 1]
    assert set(order[:2]) == set(addresses)
    (third,) = set(order) - set(addresses)
    assert order.count(addresses[0]) < order.count(addresses[1])
    assert order.count(third) >= 2


def test_without_a_board_left_the_search_ends_with_the_reason_and_keeps_its_records(port: int, tmp_path: Path) -> None:
    database = Database(tmp_path)
    with boards(port, "left", 1) as (board,), measuring(port, "left", grace=1) as runner:

        def die(done: int, *_: object) -> None:
            if done == 2:
                board.die()

        with pytest.raises(ExitifyError, match=rf"no board is left: none is registered as 'left' at {HERE}:{port}\n  hint: start `exitify board"):
            tune(few(), here(), database, runner, 4, die)
    assert_each_once_and_measured(tmp_path, 2)


def failing(function: str) -> tirx.PrimFunc:
    """A kernel that calls a function of the C library's."""

    @T.prim_func
    def main(a: T.Buffer((4,), "float32"), b: T.Buffer((4,), "float32")) -> None:
        for i in T.serial(4):
            b[i] = a[i] + T.Cast("float32", T.call_extern("int32", function))

    return main


def test_a_kernel_that_fails_crashes_or_never_ends_costs_one_record_and_no_board(port: int) -> None:
    with boards(port, "bad", 1) as (board,), measuring(port, "bad") as runner:
        with pytest.raises(NotMeasured, match="undefined symbol: missing_function"):
            runner.seconds([failing("missing_function")], 1)
        with pytest.raises(NotMeasured, match="two boards were lost by it, or one twice: InternalError"):
            runner.seconds([failing("abort")], 1)
        board.wait_for("lost its session to SIGABRT, of a kernel most likely")
        runner.patience = 2
        with pytest.raises(NotMeasured, match="two boards were lost by it, or one twice: it took more than 2 s"):
            runner.seconds([failing("pause")], 1)
        board.wait_for("left while a kernel was still running")
        runner.patience = 60
        assert runner.seconds([default()], 1)[0] > 0


def test_boards_that_are_missing_or_in_use_are_named(port: int) -> None:
    with pytest.raises(ExitifyError, match=rf"no board is registered as 'nobody' at {HERE}:{port}\n  hint: start `exitify board tracker`"):
        RpcRunner(here(), HERE, port, "nobody")
    with boards(port, "used", 1), measuring(port, "used") as runner:
        with pytest.raises(ExitifyError, match=r"no board is free: 1 registered as 'used' at .*, all in use\n  hint: somebody else"):
            RpcRunner(here(), HERE, port, "used", grace=0)
        assert runner.places == 1
        runner.close()
        with pytest.raises(NotMeasured, match="given back"):
            runner.seconds([default()], 1)
        wait_until(lambda: registered(port, "used") == (1, 1))


# --- the board's side -----------------------------------------------------------------------------------------------


def test_tvms_own_server_is_a_board_too(port: int) -> None:
    pytest.importorskip("cloudpickle", reason="TVM's server needs cloudpickle")
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", HERE, "--tracker", f"{HERE}:{port}", "--key", "stock"]
    with serving(*command):
        wait_until(lambda: registered(port, "stock") == (1, 1))
        with measuring(port, "stock") as runner:
            assert all(seconds > 0 for seconds in runner.seconds([default(), default()], 2))
        wait_until(lambda: registered(port, "stock") == (1, 1))  # it survives that its client leaves


def test_strangers_are_turned_away_and_tvms_own_client_is_served(port: int) -> None:
    with boards(port, "client", 1) as (board,):
        host, _, own_port = address(board).partition(":")
        for said in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<ii", 0xFF271, -5), struct.pack("<ii", 0xFF271, 12) + b"client:wrong"):
            with socket.create_connection((host, int(own_port))) as stranger:
                stranger.sendall(said)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(100) in (b"", struct.pack("<i", 0xFF273))
        session = tvm.rpc.connect_tracker(HERE, port).request("client", session_timeout=2)
        assert tvm.runtime.tensor(np.arange(4.0), session.cpu()).numpy().tolist() == [0, 1, 2, 3]
        board.wait_for("127.0.0.1 was late and was sent away")


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        threading.Event().wait(0.1)
    raise AssertionError


def test_ctrl_c_ends_a_board_and_its_session_and_the_tracker_forgets_it(port: int) -> None:
    with boards(port, "ends", 2) as (one, two), contextlib.closing(tvm.rpc.connect_tracker(HERE, port)) as asked:
        sessions = [asked.request("ends") for _ in range(2)]
        one.wait_for("ends: 127.0.0.1 measures here")
        two.wait_for("ends: 127.0.0.1 measures here")
        assert one.end() == 0
        two.process.terminate()  # as service managers do
        assert two.process.wait(60) == 0
        wait_until(lambda: registered(port, "ends") == (0, 0))
        for board, session in zip((one, two), sessions):
            board.wait_for("ends: ended, no longer registered")
            with pytest.raises(tvm.error.InternalError):
                session.get_function("tvm.rpc.server.workpath")


def test_a_board_waits_for_a_tracker_that_is_gone_and_registers_again(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        first, port = stack.enter_context(tracker())
        (board,) = stack.enter_context(boards(port, "again", 1))
        assert first.end() == 0
        assert first.said[-1] == "tracker: ended"
        board.wait_for("again: the tracker is gone")
        stack.enter_context(tracker(port))
        board.wait_for("again: registered again")
        assert registered(port, "again") == (1, 1)


def test_a_board_without_tracker_or_key_is_refused(port: int) -> None:
    with pytest.raises(ExitifyError, match=r"no tracker answers at 127.0.0.1:1: .*\n  hint: start `exitify board tracker`"):
        serve((HERE, 1), "orin", host=HERE)
    for key in ("", "two words"):
        with pytest.raises(ExitifyError, match=f"{key!r} is no key"):
            serve((HERE, port), key, host=HERE)
    with pytest.raises(ExitifyError, match=rf"cannot listen at {HERE}:{port}: .*\n  hint: choose another"):
        serve((HERE, port), "orin", host=HERE, port=port)


def test_a_tracker_whose_port_is_taken_is_refused(port: int) -> None:
    with pytest.raises(ExitifyError, match=rf"cannot listen at {HERE}:{port}: .*\n  hint: choose another port"):
        serve_tracker(HERE, port)


@pytest.mark.parametrize("text", ["", "here", "host/key", "host:port/key", ":9190/key", "host:9190", "host:9190/", "host:99999/key", "host:²/key"])
def test_a_place_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ExitifyError, match="is no HOST:PORT/KEY"):
        parse_place(text)
    assert parse_place("[::1]:9190/a/b") == ("[::1]", 9190, "a/b")


def test_waiting_for_a_tracker_that_says_nothing_has_an_end() -> None:
    with socket.create_server((HERE, 0)) as silent, pytest.raises(TimeoutError):
        Tracker(HERE, silent.getsockname()[1], patience=0.2)
