"""Tuning a network for the Orin on emulated boards of that processor, through the tracker, as on real ones. Their timings mean nothing."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact
from exitify.lower.library import lower_segments
from exitify.lower.pipeline import compile_artifact
from exitify.lower.processors import machine_of
from exitify.lower.tuning.database import Database
from exitify.lower.tuning.tasks import Task, tasks_of
from exitify.runtime.session import Session
from exitify.targets import load_target, processor
from tests.artifacts import exported, inputs
from tests.emulator import EmulatedPython
from tests.lower.tuning.boards import HERE, Counted, address, boards, tracker

BOARD = "orin-nano-8gb"
NETWORK = "identity"

pytestmark = pytest.mark.skipif(processor.architecture() != "x86_64", reason="what is foreign here is another machine's own")

ANSWER = """
import json, sys
import numpy as np
from exitify import Session

session = Session.load(sys.argv[1], engine="tvm")
print(json.dumps([session.run(x).logits.tolist() for x in np.load(sys.argv[2])]))
"""


@dataclass(frozen=True)
class Tuned:
    """An artifact tuned on so many boards: the folder of its measurements, how many rounds it took, and which board answered what."""

    artifact: Artifact
    folder: Path
    addresses: list[str]
    rounds: int
    answered: list[tuple[str, int]]


def tasks() -> list[Task]:
    artifact, machine = exported(NETWORK)[1], machine_of(load_target(BOARD))
    return tasks_of(lower_segments(artifact, artifact.plan.segments, machine), machine)


@pytest.fixture(scope="module")
def trials() -> int:
    """The default of every kernel of the network, and one more candidate for each."""
    return 2 * len(tasks())


@pytest.fixture(scope="module")
def tuned(orin: EmulatedPython, aarch64_linker: list[str], trials: int, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tuned]:
    """The same network on one board and on two."""
    assert aarch64_linker
    board, found = load_target(BOARD), {}
    with tracker() as (_, port):
        for count in (1, 2):
            folder = tmp_path_factory.mktemp(f"boards{count}")
            with (
                boards(port, f"orin{count}", count, orin) as served,
                contextlib.closing(Counted(machine_of(board), HERE, port, f"orin{count}")) as runner,
            ):
                artifact = compile_artifact(exported(NETWORK)[1], board, trials=trials, database=Database(folder), runner=runner)
                found[count] = Tuned(artifact, folder, [address(one) for one in served], runner.rounds, runner.answered)
            measured = Counter(place for place, kernels in runner.answered if kernels == 1)
            print(f"{count} emulated boards: {runner.rounds} rounds for {trials} candidates of {len(tasks())} kernels, {dict(measured)}")
    return found


def test_two_boards_take_half_the_rounds_of_one(tuned: dict[int, Tuned], trials: int) -> None:
    assert {count: found.rounds for count, found in tuned.items()} == {1: trials, 2: trials // 2}
    for count, found in tuned.items():
        measured = Counter(place for place, kernels in found.answered if kernels == 1)
        failed = trials - measured.total()
        assert set(measured) == set(found.addresses)
        assert all(abs(number - trials // count) <= failed for number in measured.values())


@pytest.mark.parametrize("count", [1, 2])
def test_every_kernel_of_the_network_was_measured_there(tuned: dict[int, Tuned], trials: int, count: int) -> None:
    known = {task.name: Database(tuned[count].folder).read(task.key) for task in tasks()}
    assert sum(one.trials for one in known.values()) == trials == tuned[count].artifact.targets[BOARD].trials
    assert all(one.searched == trials and np.isfinite(one.seconds["null"]) for one in known.values())


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_tuned_there_answers_there_as_the_reference_does_here(
    tuned: dict[int, Tuned], orin: EmulatedPython, tmp_path: Path, count: int
) -> None:
    path, x = tuned[count].artifact.save(tmp_path / "net.exitify"), inputs(3)
    np.save(tmp_path / "x.npy", x)
    done = orin.run("-c", ANSWER, path, tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
    session = Session(tuned[count].artifact, engine="reference")
    for said, sample in zip(json.loads(done.stdout), x):
        expected = session.run(sample).logits
        assert np.abs(np.array(said) - expected).max() <= 1e-4 * np.abs(expected).max()
