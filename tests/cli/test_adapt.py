"""`exitify adapt` and `exitify state`: what a person types on a device, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exitify.adapt.state import State
from exitify.artifact.artifact import Artifact
from exitify.files import written_whole
from tests import digits
from tests.adapt.world import FEW, artifact, stream
from tests.cli.console import exitify


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.exitify; a stream of few classes without labels; labelled digits to judge on; a state that has learnt from the stream."""
    folder = tmp_path_factory.mktemp("adapt")
    artifact().save(folder / "net.exitify")
    x, _ = digits.pictures()["test"]
    np.savez(folder / "stream.npz", x=x[stream(700, FEW)])
    digits.write_npz(folder / "judge.npz", "calibration")
    done = exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", "learnt.state", "--audit", "0.3", folder=folder)
    assert (done.code, done.err) == (0, "")
    return folder


def test_a_stream_is_learnt_from_and_the_state_goes_on(shelf: Path) -> None:
    first = exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", "one.state", "--judge", "judge.npz", "--json", folder=shelf).document
    assert first["answers"] == 700
    assert first["seen"] == list(FEW)
    assert any(event["what"] == "in use" for event in first["events"])
    assert first["after"]["exits"] != first["before"]["exits"]
    assert first["after"]["samples"] == 500
    state = State.open(shelf / "one.state", Artifact.open(shelf / "net.exitify"))
    assert state.record.answers == 700
    assert state.record.current > 0
    again = exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", "one.state", "--judge", "judge.npz", "--json", folder=shelf).document
    assert again["before"]["macs_seen"] == pytest.approx(first["after"]["macs_seen"])
    assert State.open(shelf / "one.state", Artifact.open(shelf / "net.exitify")).record.answers == 1400


def test_a_person_reads_what_was_decided_and_what_it_changed(shelf: Path) -> None:
    done = exitify("adapt", "net.exitify", "--stream", "stream.npz", "--judge", "judge.npz", folder=shelf)
    assert (done.code, done.err) == (0, "")
    for said in (
        "700 answers",
        "Seen: digit 3, digit 5, digit 8",
        "in use",
        "before",
        "after",
        "Nothing was written. Give --state",
        "exitify.LearningSession.load(",
    ):
        assert said in done.out, said


def test_the_same_command_is_the_same_state(shelf: Path) -> None:
    for name in ("a.state", "b.state"):
        assert exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", name, "--shuffle", "--seed", "3", folder=shelf).code == 0
    opened = Artifact.open(shelf / "net.exitify")
    one, other = (State.open(shelf / name, opened) for name in ("a.state", "b.state"))
    assert [(event.what, event.reason) for event in one.record.events] == [(event.what, event.reason) for event in other.record.events]
    assert all(np.array_equal(one.learnt[name], other.learnt[name]) for name in one.learnt)


def test_pictures_in_a_folder_and_arrays_are_the_same_stream(shelf: Path) -> None:
    x, _ = digits.pictures()["test"]
    rows = stream(60, FEW)
    for i, row in enumerate(rows):
        place = shelf / "camera" / f"day{i // 30}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[row, :, :, 0]).save(place / f"{i:04}.png")
    np.save(shelf / "rows.npy", digits.samples_of("test").inputs(rows))
    np.savez(shelf / "parts.npz", x_night=x[rows])
    found = [
        exitify("adapt", "net.exitify", "--stream", name, "--json", folder=shelf).document["drift"]
        for name in ("camera", "rows.npy", "parts.npz#night")
    ]
    assert found[0] == found[1] == found[2]
    assert max(found[0].values()) > 0


def test_log_and_diff_say_why_and_how_far(shelf: Path) -> None:
    log = exitify("state", "log", "net.exitify", "learnt.state", folder=shelf)
    assert log.code == 0
    for said in ("700 answers", "in use: snapshot", "Snapshots", "Decided", "audited inputs"):
        assert said in log.out, said
    record = exitify("state", "log", "net.exitify", "learnt.state", "--json", folder=shelf).document
    assert record["snapshots"][-1]["profile"] == "default"
    diff = exitify("state", "diff", "net.exitify", "learnt.state", "--json", folder=shelf).document
    opened = Artifact.open(shelf / "net.exitify")
    state = State.open(shelf / "learnt.state", opened)
    assert {one["exit"]: one["in_use"] for one in diff} == pytest.approx(state.drift())
    assert {one["exit"]: one["learning"] for one in diff} == pytest.approx(state.drift(learning=True))
    before = opened.profile("default").exits
    assert {one["exit"]: one["theirs"] for one in diff} == {name: one.threshold if one.enabled else None for name, one in before.items()}
    itself = exitify("state", "diff", "net.exitify", "learnt.state", "learnt.state", "--json", folder=shelf).document
    assert all(one["in_use"] == one["learning"] == 0 and one["ours"] == one["theirs"] for one in itself)
    assert "Against the artifact" in exitify("state", "diff", "net.exitify", "learnt.state", folder=shelf).out


def test_reset_goes_back_to_a_snapshot_or_to_the_beginning(shelf: Path) -> None:
    opened = Artifact.open(shelf / "net.exitify")
    (shelf / "r.state").write_bytes((shelf / "learnt.state").read_bytes())
    number = State.open(shelf / "r.state", opened).record.snapshots[0].number
    assert exitify("state", "reset", "net.exitify", "r.state", "--to", number, folder=shelf).code == 0
    assert State.open(shelf / "r.state", opened).record.current == number
    assert exitify("state", "reset", "net.exitify", "r.state", folder=shelf).code == 0
    after = State.open(shelf / "r.state", opened)
    assert (after.record.current, after.record.answers, after.learnt) == (0, 0, {})
    damaged(shelf, "r.state")
    assert exitify("state", "reset", "net.exitify", "r.state", folder=shelf).code == 0
    State.open(shelf / "r.state", opened)


def test_states_of_several_devices_become_one(shelf: Path) -> None:
    assert exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", "second.state", "--seed", "9", "--shuffle", folder=shelf).code == 0
    done = exitify("state", "merge", "net.exitify", "learnt.state", "second.state", "-o", "fleet.state", folder=shelf)
    assert (done.code, done.err) == (0, "")
    opened = Artifact.open(shelf / "net.exitify")
    one, other, both = (State.open(shelf / name, opened) for name in ("learnt.state", "second.state", "fleet.state"))
    assert both.record.updates == one.record.updates + other.record.updates
    weight = one.record.updates / both.record.updates
    for name, array in both.learnt.items():
        np.testing.assert_allclose(array, weight * one.learnt[name] + (1 - weight) * other.learnt[name], rtol=1e-5, atol=1e-6)
    after = exitify("adapt", "net.exitify", "--stream", "stream.npz", "--state", "fleet.state", "--json", folder=shelf).document
    assert any(event["what"] == "in use" for event in after["events"])


def damaged(folder: Path, name: str) -> None:
    data = bytearray((folder / "learnt.state").read_bytes())
    data[len(data) // 2] ^= 1
    with written_whole(folder / name) as file:
        file.write(bytes(data))


ADAPT = ("adapt", "net.exitify", "--stream")
RESET = ("state", "reset", "net.exitify")
REFUSED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "no stream": ((*ADAPT, "nothing"), "nothing is no stream", "give a folder with pictures"),
    "an empty folder": ((*ADAPT, "empty"), "there are no pictures in empty", "give a folder"),
    "another array": ((*ADAPT, "stream.npz#day"), "stream.npz has no array 'x_day'", "it has x"),
    "no arrays": ((*ADAPT, "text.npy"), "text.npy cannot be read", "give a folder"),
    "another shape": ((*ADAPT, "flat.npy"), r"flat.npy has shape \(4, 3\)", "see `exitify inspect`"),
    "other targets": ((*ADAPT, "stream.npz", "--targets", "warm"), "--targets warm is neither", "give hard or soft"),
    "no profile": ((*ADAPT, "stream.npz", "--profile", "none"), "nothing can be learnt without exits", "exitify calibrate"),
    "a damaged state": ((*ADAPT, "stream.npz", "--state", "damaged.state"), "damaged.state is no whole state", "state reset"),
    "a foreign state": ((*ADAPT, "stream.npz", "--state", "foreign.state"), "belongs to another artifact", "state reset"),
    "no folder for the state": ((*ADAPT, "stream.npz", "--state", "no/where.state"), "there is no folder for", "make it"),
    "a log of nothing": (("state", "log", "net.exitify", "nothing.state"), "cannot read nothing.state", "exitify adapt --state"),
    "a snapshot that is not there": ((*RESET, "learnt.state", "--to", 99), "the state has no snapshot 99", "it has"),
    "a reset of nothing": ((*RESET, "nothing.state"), "there is no state nothing.state", "nothing is to be reset"),
    "a reset of what is no state": ((*RESET, "net.exitify"), "net.exitify", ""),
    "a reset of another artifact's state": ((*RESET, "foreign.state"), "foreign.state belongs to another artifact", ""),
    "a merge of different artifacts": (
        ("state", "merge", "net.exitify", "learnt.state", "foreign.state", "-o", "m.state"),
        "foreign.state belongs to another artifact",
        "state reset",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_two_lines(shelf: Path, case: str) -> None:
    (shelf / "empty").mkdir(exist_ok=True)
    (shelf / "text.npy").write_text("no array")
    np.save(shelf / "flat.npy", np.zeros((4, 3), np.float32))
    damaged(shelf, "damaged.state")
    State.fresh(digits.fresh_artifact()).save(shelf / "foreign.state")
    before = {path.name: path.read_bytes() for pattern in ("*.state", "*.exitify") for path in shelf.glob(pattern)}
    arguments, problem, hint = REFUSED[case]
    done = exitify(*arguments, folder=shelf)
    assert done.code == 1
    first, second = done.err.splitlines()
    assert first.startswith("exitify: ")
    assert second.startswith("  hint: ")

    assert re.search(problem, first), first
    assert hint in second
    assert {path.name: path.read_bytes() for pattern in ("*.state", "*.exitify") for path in shelf.glob(pattern)} == before
