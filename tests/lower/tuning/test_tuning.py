"""The search, its database, the processes that measure: on kernels of a small network."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import tirx

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import TunedKernel
from exitify.errors import ExitifyError
from exitify.lower.library import Kernels, lower_segments
from exitify.lower.pipeline import _found, compile_artifact
from exitify.lower.processors import Machine, machine_of
from exitify.lower.tuning import space, worker
from exitify.lower.tuning.database import BrokenRecord, Database, Known, choice_text
from exitify.lower.tuning.measure import LocalRunner, NotMeasured, RpcRunner, Runner, parse_rpc
from exitify.lower.tuning.search import tune, unheard
from exitify.lower.tuning.tasks import Task, calls_of, task_key, tasks_of
from exitify.runtime.session import Session
from exitify.targets import load_target
from tests.artifacts import exported, inputs


@functools.cache
def here() -> Machine:
    return machine_of(load_target("host"))


@functools.cache
def kernels(name: str = "identity") -> Kernels:
    artifact = exported(name)[1]
    return lower_segments(artifact, artifact.plan.segments, here())


def tasks(name: str = "identity") -> list[Task]:
    return tasks_of(kernels(name), here())


@functools.cache
def defaults() -> frozenset[str]:
    """The text of every kernel of the network, scheduled by default."""
    return frozenset(str(space.apply(task.kernel, None, here())) for task in tasks())


class Pretend(Runner):
    """Seconds from a table instead of a clock: a kernel's text decides, so that the default can be made fast or slow."""

    def __init__(self, default: float = 2.0, other: float = 1.0, final_other: float | None = None, fail: bool = False) -> None:
        self.default, self.other, self.final_other, self.fail = default, other, other if final_other is None else final_other, fail
        self.defaults = defaults()
        self.asked: list[int] = []

    def seconds(self, scheduled: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
        self.asked.append(len(scheduled))
        is_default = [str(kernel) in self.defaults for kernel in scheduled]
        if self.fail and not all(is_default):
            raise NotMeasured("it crashed")
        other = self.other if len(scheduled) == 1 else self.final_other
        return [self.default if default else other for default in is_default]

    def close(self) -> None:
        self.asked.append(-1)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_each_different_kernel_is_one_task_and_calls_are_counted():
    found = tasks()
    assert len({task.key for task in found}) == len(found) <= len(kernels().kernels)
    assert all(task.calls > 0 for task in found)
    head = [task for task in found if task.name.startswith("scores")]
    assert sum(task.calls for task in head) == len(exported("identity")[1].plan.exits)


def test_a_key_depends_on_the_kernel_and_the_machine_and_not_on_names():
    task = tasks()[0]
    renamed = tvm.script.from_source(task.kernel.script(name="other")).with_attr("tirx.noalias", True)
    assert task_key(renamed, here()) == task_key(task.kernel, here())
    elsewhere = machine_of(load_target("aarch64-cpu"))
    assert task_key(task.kernel, elsewhere) != task.key
    assert len({task.key for task in tasks()}) == len(tasks())


def test_keys_are_the_same_in_another_process():
    code = "from tests.lower.tuning.test_tuning import tasks; print(sorted(task.key for task in tasks()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == str(sorted(task.key for task in tasks()))


# --- database -------------------------------------------------------------------------------------------------------


def test_what_is_added_is_read_back(tmp_path: Path):
    database = Database(tmp_path / "db")
    assert database.read("k").trials == 0
    database.measured("k", None, 1e-3)
    database.measured("k", {"convolution": {"pixels": 8}}, 5e-4)
    database.measured("k", {"trace": [1]}, math.inf, "it crashed")
    database.searched("k", {"convolution": {"pixels": 8}}, 30)
    known = database.read("k")
    assert known.seconds == {"null": 1e-3, choice_text({"convolution": {"pixels": 8}}): 5e-4, choice_text({"trace": [1]}): math.inf}
    assert (known.trials, known.searched, known.best) == (3, 30, {"convolution": {"pixels": 8}})


def test_the_search_with_the_largest_budget_decides(tmp_path: Path):
    database = Database(tmp_path)
    database.searched("k", {"trace": [1]}, 30)
    database.searched("k", {"trace": [2]}, 20)
    assert (database.read("k").searched, database.read("k").best) == (30, {"trace": [1]})
    database.searched("k", None, 30)
    assert database.read("k").best is None


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_off_costs_nothing_else(tmp_path: Path, cut: int):
    database = Database(tmp_path)
    database.measured("k", None, 1e-3)
    whole = (tmp_path / "k.jsonl").read_bytes()
    database.measured("k", {"trace": [1]}, 2e-3)
    with open(tmp_path / "k.jsonl", "r+b") as stream:
        stream.truncate(len(whole) + cut)
    assert database.read("k").trials == 1
    database.measured("k", {"trace": [2]}, 3e-3)
    assert database.read("k").trials == 2
    assert (tmp_path / "k.jsonl").read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["{", "[]", '{"seconds": 1}', '{"choice": null, "seconds": "fast"}', "5", '{"searched": "x", "best": null}'])
def test_a_broken_record_is_refused_with_file_and_line(tmp_path: Path, line: str):
    database = Database(tmp_path)
    database.measured("k", None, 1e-3)
    with open(tmp_path / "k.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(BrokenRecord, match=r"k\.jsonl:2 is no tuning record: .*\n  hint: delete that line, or the file"):
        database.read("k")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "db").write_text("a file")
    with pytest.raises(ExitifyError, match=r"cannot (read|write) .*\n  hint: .*--db DIR"):
        Database(tmp_path / "db").measured("k", None, 1.0)


# --- search ---------------------------------------------------------------------------------------------------------


def test_the_default_is_measured_first_and_every_trial_is_recorded(tmp_path: Path):
    database, runner, seen = Database(tmp_path), Pretend(), []
    done = tune(tasks(), here(), database, runner, 40, lambda *said: seen.append(said))
    assert done == len(seen) == sum(database.read(task.key).trials for task in tasks()) == 40
    for task in tasks():
        first = json.loads((tmp_path / f"{task.key}.jsonl").read_text().splitlines()[0])
        assert first["choice"] is None
        assert database.read(task.key).searched == 40
    assert seen[-1][:2] == (40, 40)
    assert seen[-1][3] <= seen[-1][2]


def test_a_choice_replaces_the_default_only_when_it_is_faster_measured_in_turn(tmp_path: Path):
    cases = {"faster": Pretend(2.0, 1.0), "by noise": Pretend(2.0, 1.0, final_other=1.99), "slower": Pretend(1.0, 2.0), "failing": Pretend(fail=True)}
    for name, runner in cases.items():
        database = Database(tmp_path / name)
        tune(tasks(), here(), database, runner, 40, unheard)
        chosen = [database.read(task.key).best for task in tasks() if database.read(task.key).trials > 1]
        assert chosen
        assert all((best is not None) == (name == "faster") for best in chosen), name


def test_known_tasks_cost_nothing_and_a_larger_budget_goes_on(tmp_path: Path):
    database = Database(tmp_path)
    assert tune(tasks(), here(), database, Pretend(), 20, unheard) == 20
    assert tune(tasks(), here(), database, Pretend(), 20, unheard) == 0
    assert tune(tasks()[:3], here(), database, Pretend(), 20, unheard) == 0
    assert tune(tasks(), here(), database, Pretend(), 30, unheard) == 10


def test_a_search_that_was_interrupted_goes_on_where_it_was(tmp_path: Path):
    database = Database(tmp_path)

    def interrupt(done: int, *_: object) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tasks(), here(), database, Pretend(), 20, interrupt)
    assert sum(database.read(task.key).trials for task in tasks()) == 7
    assert all(database.read(task.key).searched == 0 for task in tasks())
    assert tune(tasks(), here(), database, Pretend(), 20, unheard) == 13


def test_no_candidate_is_measured_twice(tmp_path: Path):
    database = Database(tmp_path)
    small = [task for task in tasks() if task.name.startswith("fused_convolution")][:1]
    choices = len(list(space.convolution.choices(small[0].kernel, here().vectors)))
    assert tune(small, here(), database, Pretend(), 1000, unheard) == choices
    lines = [json.loads(line) for line in (tmp_path / f"{small[0].key}.jsonl").read_text().splitlines()]
    asked = [choice_text(line["choice"]) for line in lines if "seconds" in line]
    assert len(asked) == len(set(asked)) == choices


def test_every_choice_computes_what_the_default_computes():
    """All of a strided, a plain and a pointwise convolution's choices, on numbers."""
    random = np.random.default_rng(0)
    for task in [task for task in tasks() if "convolution" in task.name][:4]:
        looks = [(tuple(int(size) for size in p.shape), str(p.dtype)) for p in task.kernel.params]
        given = [tvm.runtime.tensor(random.standard_normal(shape).astype(dtype)) for shape, dtype in looks[:-1]]
        results = []
        for choice in [None, *({"convolution": vars(c)} for c in space.convolution.choices(task.kernel, here().vectors)[1:7])]:
            module = tvm.IRModule({"main": space.apply(task.kernel, choice, here()).with_attr("global_symbol", "main")})
            out = tvm.runtime.empty(*looks[-1])
            tvm.compile(module, target=here().target)["main"](*given, out)
            results.append(out.numpy())
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-4)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_a_worker_times_kernels_and_survives_a_bad_one(tmp_path: Path):
    task = next(task for task in tasks() if "convolution" in task.name)
    good = space.apply(task.kernel, None, here())
    runner = LocalRunner(here())
    try:
        both = runner.seconds([good, good], 3)
        assert len(both) == 2
        assert all(0 < seconds < 0.1 for seconds in both)
        os.kill(runner._process.pid, signal.SIGKILL)
        with pytest.raises(NotMeasured, match="the worker crashed"):
            runner.seconds([good], 3)
        assert runner.seconds([good], 3)[0] > 0
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"0": "32K", "1": "32K", "2": "1024K", "3": "32768K"}, 32 << 20),
        ({"0": "64K"}, 64 << 10),
        ({"3": "480M"}, 64 << 20),
        ({"0": "much"}, 32 << 20),
        ({}, 32 << 20),
    ],
    ids=["a desktop's", "one alone", "a server's", "unreadable", "unknown"],
)
def test_the_last_cache_is_what_the_system_says_within_reason(sizes: dict[str, str], expected: int, tmp_path: Path):
    for index, size in sizes.items():
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert worker.last_cache.__wrapped__(tmp_path) == expected


def test_a_kernel_is_timed_with_weights_that_no_cache_holds(monkeypatch):
    monkeypatch.setattr(worker, "last_cache", lambda: 1 << 20)
    sets = worker._argument_sets([((1, 8), "float32"), ((64, 1024), "float32"), ((3,), "float32"), ((1, 64), "float32")])
    assert 8 <= len(sets) <= 9  # 256 KiB of weights each, twice the cache
    assert len({(id(first), id(last)) for first, *_, last in sets}) == 1
    assert len({np.from_dlpack(weight).ctypes.data for _, weight, _, _ in sets}) == len(sets)
    for _, weight, bias, _ in sets[1:]:
        np.testing.assert_array_equal(np.from_dlpack(weight), np.from_dlpack(sets[0][1]))
        np.testing.assert_array_equal(np.from_dlpack(bias), np.from_dlpack(sets[0][2]))
    assert len(worker._argument_sets([((8,), "float32"), ((1,), "float32"), ((8,), "float32")])) == worker.MOST


def test_a_worker_that_is_late_is_replaced():
    task = tasks()[0]
    runner = LocalRunner(here())
    try:
        runner.seconds([space.apply(task.kernel, None, here())], 1)
        first = runner._process.pid
        runner.patience = 0.0
        with pytest.raises(NotMeasured, match="it took more than 0 s"):
            runner.seconds([space.apply(task.kernel, None, here())], 1)
        runner.patience = 60.0
        assert runner.seconds([space.apply(task.kernel, None, here())], 1)[0] > 0
        assert runner._process.pid != first
    finally:
        runner.close()


@pytest.mark.parametrize("text", ["", "here", "host/key", "host:port/key", ":9190/key", "host:9190", "host:9190/"])
def test_an_rpc_address_of_another_form_is_refused(text: str):
    with pytest.raises(ExitifyError, match="is no HOST:PORT/KEY"):
        parse_rpc(text)


def test_a_board_that_does_not_answer_is_refused():
    assert parse_rpc("127.0.0.1:1/orin") == ("127.0.0.1", 1, "orin")
    with pytest.raises(ExitifyError, match=r"no board answers at 127.0.0.1:1: .*\n  hint: start"):
        RpcRunner(here(), "127.0.0.1", 1, "orin")


def test_a_target_that_is_not_here_needs_a_board(tmp_path: Path):
    _, artifact = exported("identity")
    with pytest.raises(ExitifyError, match=r"kernels for aarch64-cpu cannot be measured on this machine\n  hint: give a board: --rpc"):
        compile_artifact(artifact, load_target("aarch64-cpu"), trials=5, database=Database(tmp_path))


# --- the whole way --------------------------------------------------------------------------------------------------


def test_a_tuned_artifact_answers_as_the_untuned_one_and_a_second_compile_measures_nothing(tmp_path: Path):
    """Two trials a kernel, really measured, MetaSchedule's programs for kernels without choices among them."""
    _, artifact = exported("depthwise")
    database = Database(tmp_path)
    trials = 2 * len(tasks("depthwise"))
    seen: list[int] = []
    tuned = compile_artifact(artifact, load_target("host"), trials=trials, database=database, report=lambda done, *_: seen.append(done))
    assert len(seen) == trials
    assert tuned.targets["host"].trials == trials
    kernels = tuned.targets["host"].kernels
    assert sum(kernel.trials for kernel in kernels.values()) == trials
    assert {kernel.calls for kernel in kernels.values()} == {task.calls for task in tasks("depthwise")}
    assert all(kernel.history[0] == (1, kernel.default_ms) and kernel.chosen_ms <= kernel.default_ms for kernel in kernels.values())
    again: list[int] = []
    second = compile_artifact(artifact, load_target("host"), trials=trials, database=database, report=lambda done, *_: again.append(done))
    assert not again
    assert second.targets["host"].kernels == kernels  # the history is the database's, whoever measured it
    assert second.files["targets/host/library.so"] == tuned.files["targets/host/library.so"]
    traces = [
        line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines() if '"trace"' in line and '"seconds": null' not in line
    ]
    assert traces  # programs of MetaSchedule that ran
    expected, found = Session(artifact), Session(tuned, engine="tvm")
    for x in inputs(3):
        np.testing.assert_allclose(found.run(x).logits, expected.run(x).logits, rtol=1e-4, atol=1e-4)


def test_readings_of_several_machines_make_a_history_that_an_artifact_can_hold() -> None:
    """Folders are put together file by file: what was measured again may contradict what was chosen by it."""
    choice = {"convolution": {"width": 8}}
    slower = Known({choice_text(None): 2e-3, choice_text(choice): 3e-3}, 10, choice)
    assert _found(slower, 4, choice) == TunedKernel(4, 2, ((1, 2.0),), 2.0)
    failed = Known({choice_text(None): 2e-3, choice_text(choice): math.inf}, 10, choice)
    assert _found(failed, 4, choice) == TunedKernel(4, 2, ((1, 2.0),), 2.0)
    unmade = Known({choice_text(None): 2e-3, choice_text(choice): 1e-3}, 10, choice)
    assert _found(unmade, 4, None) == TunedKernel(4, 2, ((1, 2.0), (2, 1.0)), 2.0)  # this release cannot make that schedule
    assert _found(unmade, 4, choice) == TunedKernel(4, 2, ((1, 2.0), (2, 1.0)), 1.0)
    assert _found(Known({choice_text(choice): 1e-3}), 4, None) is None
    assert _found(unmade, 0, choice) is None  # of a batch's functions alone


def test_a_run_of_one_sample_is_counted_without_the_functions_for_batches() -> None:
    alone = kernels()
    batched = lower_segments(exported("identity")[1], exported("identity")[1].plan.segments, here(), batches=(2, 4))
    assert batched.in_batches
    assert sum(calls_of(batched.module, batched.weights).values()) == sum(calls_of(alone.module).values())
    assert sum(calls_of(batched.module).values()) > 2 * sum(calls_of(alone.module).values())


@pytest.mark.parametrize("after", [1, 9])
def test_a_tuning_that_is_killed_loses_no_record(tmp_path: Path, after: int):
    path = exported("identity")[1].save(tmp_path / "net.exitify")
    db = tmp_path / "db"
    command = [sys.executable, "-m", "exitify", "compile", str(path), "--trials", "16", "--db", str(db)]

    def lines() -> list[str]:
        return [line for file in db.glob("*.jsonl") for line in file.read_text().split("\n")[:-1]]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(lines()) < after and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    before = lines()
    assert len(before) >= after
    assert not Artifact.open(path).targets
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert set(before) <= set(lines())
    assert sum('"seconds"' in line for line in lines()) == 16
    assert Artifact.open(path).targets["host"].trials == 16


def test_ctrl_c_while_tuning_is_two_lines_and_leaves_the_artifact_as_it_was(tmp_path: Path):
    path = exported("identity")[1].save(tmp_path / "net.exitify")
    whole = path.read_bytes()
    db = tmp_path / "db"
    command = [sys.executable, "-m", "exitify", "compile", str(path), "--trials", "500", "--db", str(db)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(db.glob("*.jsonl")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert err.splitlines()[-2:] == [
        "exitify: interrupted; nothing was changed",
        "  hint: give the same command again; `train` and `compile --trials` go on where they were",
    ]
    assert "Traceback" not in err
    assert path.read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["db", "net.exitify"]


def test_ctrl_c_that_tvm_swallowed_still_ends_the_search(tmp_path: Path):
    """Inside of TVM's callbacks a KeyboardInterrupt becomes an error of TVM's, and would count as a candidate that failed."""

    class Swallowing(Pretend):
        def seconds(self, scheduled: Sequence[tirx.PrimFunc], repeats: int) -> list[float]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt as error:
                raise RuntimeError("swallowed") from error
            raise AssertionError

    database = Database(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(tasks(), here(), database, Swallowing(), 20, unheard)
    assert signal.getsignal(signal.SIGINT) is before
    assert all(database.read(task.key).trials == 0 for task in tasks())
