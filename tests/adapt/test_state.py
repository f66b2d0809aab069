"""What a device has learnt, on the disk: read as it was written, the old or the new whatever happens, and nothing else accepted."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exitify.adapt import state as module
from exitify.adapt.state import EVENTS, FACTORY, KEPT, LEARNT, RECORD, State, merged
from exitify.artifact import container
from exitify.artifact.artifact import HEADS_FILE, Artifact
from exitify.artifact.manifest import ExitSetting
from exitify.artifact.tensors import write_tensors
from exitify.errors import StateError
from exitify.files import NotWritten
from tests.artifacts import exported


@pytest.fixture
def artifact() -> Artifact:
    return exported("identity")[1]


def moved(artifact: Artifact, by: float) -> dict[str, np.ndarray]:
    return {name: (array + np.float32(by)).astype(np.float32) for name, array in artifact.classifiers().items()}


def learnt(artifact: Artifact, snapshots: int = 2) -> State:
    state = State.fresh(artifact)
    for i in range(snapshots):
        expected = [1.0 / artifact.plan.classes] * artifact.plan.classes
        settings = {point.name: ExitSetting(True, 0.5 + 0.1 * i, 2.0) for point in artifact.plan.exits}
        state = state.keep(
            moved(artifact, 0.01 * (i + 1)), 100 * (i + 1), f"reason {i}", profile="default", settings=settings, left=0.3, expected=expected
        )
        state = state.note("learning", f"event {i}", "exit1")
    seen = tuple(1.5 * i for i in range(artifact.plan.classes))
    return state.with_learnt(moved(artifact, 0.5), 100 * snapshots, answers=1000, trials=3, stopped=True, seen=seen)


def same(one: State, other: State) -> bool:
    tensors = all(np.array_equal(one.tensors[n][name], other.tensors[n][name]) for n in one.tensors for name in one.tensors[n])
    learnt = one.learnt.keys() == other.learnt.keys() and all(np.array_equal(one.learnt[name], other.learnt[name]) for name in one.learnt)
    return one.record == other.record and one.tensors.keys() == other.tensors.keys() and tensors and learnt


def edited(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], object]) -> Path:
    """The state's file with another record, or other files."""
    files = {name: bytes(data) for name, data in container.read(path.read_bytes()).items()}
    document = json.loads(files[RECORD])
    change(document, files)
    with open(path, "wb") as stream:
        container.write(stream, {**files, RECORD: json.dumps(document).encode()} if RECORD in files else files)
    return path


def test_what_was_saved_is_opened(artifact: Artifact, tmp_path: Path) -> None:
    state = learnt(artifact)
    path = state.save(tmp_path / "device.state")
    again = State.open(path, artifact)
    assert same(again, state)
    for name, array in again.current().items():
        assert np.array_equal(array, moved(artifact, 0.02)[name])
    path.write_bytes(b"")  # what was read does not depend on the file
    assert same(again, state)


def test_a_fresh_state_is_the_artifacts_own_heads(artifact: Artifact) -> None:
    state = State.fresh(artifact)
    assert state.record.current == FACTORY
    assert all(
        array is state.artifact.tensors(HEADS_FILE)[name] or np.array_equal(array, artifact.classifiers()[name])
        for name, array in state.current().items()
    )
    assert set(state.drift().values()) == {0.0}


def test_a_state_goes_back_to_any_snapshot_it_keeps_and_to_the_factory(artifact: Artifact) -> None:
    state = learnt(artifact, 3)
    back = state.back_to(1, "worse than promised")
    for name, array in back.current().items():
        assert np.array_equal(array, moved(artifact, 0.01)[name])
    assert back.record.events[-1].reason == "worse than promised; from snapshot 3 to 1"
    assert set(back.back_to(FACTORY, "reset").drift().values()) == {0.0}
    assert (back.learnt, back.record.updates) == ({}, 0), "what was learnt since is not to be trusted either"
    assert back.keep(moved(artifact, 0.5), 400, "again").record.current == 4
    with pytest.raises(StateError, match=r"^the state has no snapshot 9\n  hint: it has 1, 2, 3; 0 is the artifact's own heads$"):
        state.back_to(9, "")


def test_the_oldest_snapshots_and_events_go(artifact: Artifact, tmp_path: Path) -> None:
    state = learnt(artifact, KEPT + 3)
    assert [one.number for one in state.record.snapshots] == list(range(4, KEPT + 4))
    assert set(state.tensors) == set(range(4, KEPT + 4))
    for i in range(EVENTS + 5):
        state = state.note("event", str(i))
    assert len(state.record.events) == EVENTS
    path = state.save(tmp_path / "device.state")
    assert path.stat().st_size < module.most_bytes(artifact)
    assert same(State.open(path, artifact), state)


def test_drift_is_how_far_a_head_has_moved(artifact: Artifact) -> None:
    scaled = {name: (array * np.float32(1.2)).astype(np.float32) for name, array in artifact.classifiers().items()}
    assert State.fresh(artifact).keep(scaled, 1, "").drift() == {point.name: pytest.approx(0.2, rel=1e-4) for point in artifact.plan.exits}


@pytest.mark.parametrize("wrong", ["name", "shape", "dtype", "number"])
def test_what_could_not_be_read_again_is_not_kept(wrong: str, artifact: Artifact) -> None:
    state, (name, array) = learnt(artifact), next(iter(artifact.classifiers().items()))
    given = {"name": {"other": array}, "shape": {name: array[:1]}, "dtype": {name: array.astype(np.float64)}, "number": {name: array * np.nan}}[wrong]
    with pytest.raises(StateError, match="is no classifier of the artifact, or holds a number that is not finite"):
        state.keep(given, 300, "")


def test_what_is_left_out_is_as_in_the_snapshot_in_use(artifact: Artifact, tmp_path: Path) -> None:
    name = next(iter(artifact.classifiers()))
    state = learnt(artifact).keep({name: moved(artifact, 7.0)[name]}, 300, "one head")
    again = State.open(state.save(tmp_path / "device.state"), artifact).current()
    for other, array in again.items():
        assert np.array_equal(array, moved(artifact, 7.0 if other == name else 0.02)[other])


def test_a_device_that_began_again_counts_for_what_it_learns_now(artifact: Artifact) -> None:
    back = State.fresh(artifact).keep(moved(artifact, 9.0), 1000, "").back_to(FACTORY, "")
    learner = State.fresh(artifact).with_learnt(moved(artifact, 1.0), 10)
    for name, array in merged([back, learner]).learnt.items():
        np.testing.assert_allclose(array, artifact.classifiers()[name] + 1.0, rtol=1e-6)


def test_merged_states_are_means_weighed_by_updates(artifact: Artifact) -> None:
    classes = artifact.plan.classes
    seen = [tuple(float(i) for i in range(classes)), tuple(1.0 for _ in range(classes))]
    one, other = (
        State.fresh(artifact).keep(moved(artifact, 3.0), 1, "").with_learnt(moved(artifact, by), updates, seen=counts, answers=7)
        for by, updates, counts in zip((1.0, 5.0), (300, 100), seen)
    )
    both = merged([one, other, State.fresh(artifact)])
    for name, array in both.learnt.items():
        np.testing.assert_allclose(array, artifact.classifiers()[name] + 2.0, rtol=1e-6)
    assert (both.record.updates, both.record.answers, both.record.seen) == (400, 14, tuple(i + 1.0 for i in range(classes)))
    assert both.record.events[-1].reason == "3 states with 300, 100, 0 updates"
    assert both.record.current == FACTORY, "nobody has proven the mean of heads"
    stopped = State.fresh(artifact).with_learnt(moved(artifact, 90.0), 10_000, stopped=True, trials=7)
    without = merged([one, other, stopped])
    assert all(np.array_equal(without.learnt[name], both.learnt[name]) for name in both.learnt)
    assert without.record.trials == 7, "what was spent on trials stays spent"
    assert merged([State.fresh(artifact)] * 2).record == State.fresh(artifact).record
    with pytest.raises(StateError, match="there are no states to merge"):
        merged([])
    with pytest.raises(StateError, match="these states belong to different artifacts"):
        merged([one, State.fresh(exported("shared")[1])])


def test_a_state_of_another_artifact_is_refused_by_name(artifact: Artifact, tmp_path: Path) -> None:
    path = learnt(artifact).save(tmp_path / "device.state")
    with pytest.raises(StateError, match=f"^{path} belongs to another artifact, {artifact.manifest.model_id[:16]}\n  hint: this one is "):
        State.open(path, exported("shared")[1])


def test_an_artifact_without_exits_has_no_state() -> None:
    with pytest.raises(StateError, match="the artifact has no exits that could learn"):
        State.fresh(exported("plain")[1])


def broken(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    name, array = next(iter(tensors.items()))
    changed = np.array(array)
    changed.flat[0] = np.nan
    return {**tensors, name: changed}


CASES: dict[str, tuple[Callable[[Artifact], Callable[[dict[str, Any], dict[str, bytes]], object]], str]] = {
    "a format of tomorrow": (lambda a: lambda d, f: d.update(format=3), "has format 3, and this release reads 2"),
    "no format": (lambda a: lambda d, f: d.pop("format"), "has format None"),
    "another field": (lambda a: lambda d, f: d.update(code="import os"), "is no whole state: .*code"),
    "a field of another type": (lambda a: lambda d, f: d.update(updates="many"), "updates is 'many', not an integer"),
    "fewer than no updates": (lambda a: lambda d, f: d.update(updates=-1), "contradicts itself"),
    "a current snapshot that is not there": (lambda a: lambda d, f: d.update(current=7), "contradicts itself"),
    "a number that will be used again": (lambda a: lambda d, f: d.update(next=1), "contradicts itself"),
    "a snapshot without its tensors": (lambda a: lambda d, f: f.pop("heads/1.safetensors"), "contradicts itself"),
    "tensors of no snapshot": (lambda a: lambda d, f: f.update({"heads/9.safetensors": f["heads/1.safetensors"]}), "contradicts itself"),
    "counts of other classes": (lambda a: lambda d, f: d.update(seen=[1.0]), "contradicts itself"),
    "counts below none": (lambda a: lambda d, f: d.update(seen=[-1.0] * a.plan.classes), "contradicts itself"),
    "settings of no profile": (lambda a: lambda d, f: d["snapshots"][0].update(profile=""), "does not say how each exit decides"),
    "settings of some exits": (lambda a: lambda d, f: d["snapshots"][0]["settings"].pop("exit1"), "does not say how each exit decides"),
    "a temperature of nothing": (
        lambda a: lambda d, f: d["snapshots"][0]["settings"]["exit1"].update(temperature=0.0),
        "holds in snapshot 1 a temperature that there cannot be",
    ),
    "shares of other classes": (lambda a: lambda d, f: d["snapshots"][0].update(expected=[0.5]), "shares of classes that are none"),
    "shares that are none": (
        lambda a: lambda d, f: d["snapshots"][0].update(expected=[0.0] * a.plan.classes),
        "holds in snapshot 1 shares of classes that are none",
    ),
    "more left than there is": (lambda a: lambda d, f: d["snapshots"][0].update(left=1.5), "shares of classes that are none"),
    "heads that learn of other shapes": (
        lambda a: lambda d, f: f.update({LEARNT: write_tensors({name: array[:1] for name, array in a.classifiers().items()})}),
        "holds in the heads that learn other tensors than the artifact's classifiers",
    ),
    "heads that learn that are no numbers": (
        lambda a: lambda d, f: f.update({LEARNT: write_tensors(broken(a.classifiers()))}),
        "holds in the heads that learn a number in .* that is not finite",
    ),
    "a file of another kind": (lambda a: lambda d, f: f.update({"run.py": b"import os"}), "contradicts itself"),
    "no record": (lambda a: lambda d, f: f.pop(RECORD), "is no state: state.json is not its first file"),
    "tensors of other shapes": (
        lambda a: lambda d, f: f.update({"heads/1.safetensors": write_tensors({name: array[:1] for name, array in a.classifiers().items()})}),
        "holds in snapshot 1 other tensors than the artifact's classifiers",
    ),
    "a tensor that is no number": (
        lambda a: lambda d, f: f.update({"heads/1.safetensors": write_tensors(broken(a.classifiers()))}),
        "holds in snapshot 1 a number in .* that is not finite",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_state_of_ours_is_refused(case: str, artifact: Artifact, tmp_path: Path) -> None:
    change, said = CASES[case]
    path = edited(learnt(artifact).save(tmp_path / "device.state"), change(artifact))
    with pytest.raises(StateError, match=said) as raised:
        State.open(path, artifact)
    assert raised.value.hint


def test_every_damaged_byte_and_every_length_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    path = learnt(artifact).save(tmp_path / "device.state")
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(200):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(StateError):
            State.open(path, artifact)
        path.write_bytes(whole[:at])
        with pytest.raises(StateError):
            State.open(path, artifact)


def test_a_state_that_is_too_large_or_missing_is_refused_unread(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "device.state"
    with pytest.raises(StateError, match=f"^cannot read {path}: No such file or directory\n  hint: `exitify adapt --state` makes one$"):
        State.open(path, artifact)
    with open(path, "wb") as stream:
        stream.truncate(module.most_bytes(artifact) + 1)
    with pytest.raises(StateError, match="bytes, and a state of this artifact"):
        State.open(path, artifact)


SAVE = """
import sys
from exitify.adapt.state import State
from exitify.artifact.artifact import Artifact
artifact, path = Artifact.open(sys.argv[1]), sys.argv[2]
state = State.open(path, artifact)
print("ready", flush=True)
updates = 0
while True:
    updates += 1
    moved = {name: array + updates for name, array in artifact.classifiers().items()}
    state = state.keep(moved, updates, "again").note("event", str(updates))
    state.save(path)
"""


def test_killed_at_any_moment_the_state_is_the_old_one_or_the_new(artifact: Artifact, tmp_path: Path) -> None:
    """200 moments; each time it loads, and each snapshot is one that was made, whole.

    A process that is stopped leaves on the disk what one that is killed leaves; every twentieth is killed.
    """
    net, path = artifact.save(tmp_path / "net.exitify"), State.fresh(artifact).save(tmp_path / "device.state")
    draw, kills, last = random.Random(1), 0, 0
    own = artifact.classifiers()
    while kills < 200:
        process = subprocess.Popen([sys.executable, "-c", SAVE, str(net), str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            time.sleep(draw.random() * 0.01)
            process.send_signal(signal.SIGSTOP)
            state = State.open(path, artifact)
            for number, tensors in state.tensors.items():
                updates = next(one.updates for one in state.record.snapshots if one.number == number)
                assert all(np.array_equal(tensors[name], own[name] + updates) for name in own)
            kills += 1
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()
        state = State.open(path, artifact)
        assert state.record.next > last
        last = state.record.next
    assert last > 20


def test_a_disk_that_is_full_leaves_the_state_that_was_there(artifact: Artifact, tmp_path: Path) -> None:
    state = learnt(artifact)
    path = state.save(tmp_path / "device.state")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(NotWritten, match=f"^cannot write {path}: "):
            state.keep(moved(artifact, 1.0), 500, "").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["device.state"]
