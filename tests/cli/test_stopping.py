"""`exitify run`: one exit, a deadline, a stream, a batch's budget, and sets of classes, as the session has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exitify.artifact.manifest import Conformal
from exitify.plan import FINAL
from exitify.runtime.session import Session
from tests.artifacts import inputs, with_contract
from tests.cli.console import exitify, refused
from tests.runtime.stopping import NAMES, four_exits, profile_of

CLASSES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a profile by entropy and sets, and a temporal one; ten inputs; frames of two scenes."""
    path = tmp_path_factory.mktemp("stopping")
    artifact = with_contract(four_exits(), classes=CLASSES)
    sets = Conformal(0.1, "general", dict.fromkeys((*NAMES, FINAL), 0.8), 100)
    by_entropy = replace(profile_of("entropy", dict.fromkeys(NAMES, -0.7)), conformal=sets)
    artifact = artifact.with_profile("default", by_entropy).with_profile("video", profile_of("temporal", {"exit1": 0.9}))
    artifact.save(path / "net.exitify")
    np.save(path / "x.npy", inputs(10))
    np.save(path / "frames.npy", np.repeat(inputs(2), 3, axis=0))
    return path


def answers(folder: Path, *arguments: object) -> list[dict]:
    found: list[dict] = exitify("run", "net.exitify", *arguments, "--json", folder=folder).document["answers"]
    return found


@pytest.mark.parametrize("batch", [1, 4])
def test_run_answers_at_the_exit_that_is_named(folder: Path, batch: int) -> None:
    expected = [Session.load(folder / "net.exitify").run(x, exit="exit3") for x in inputs(10)]
    found = answers(folder, "x.npy", "--exit", "exit3", "--batch", batch)
    assert [(answer["exit"], answer["label"], answer["macs"]) for answer in found] == [("exit3", one.label, one.macs) for one in expected]
    document = exitify("run", "net.exitify", "x.npy", "--exit", "final", "--profile", "none", "--json", folder=folder).document
    assert (document["profile"], {answer["exit"] for answer in document["answers"]}) == (None, {FINAL})


def test_run_keeps_a_deadline_that_there_is_time_for(folder: Path) -> None:
    """An hour: then the profile alone decides, but for the first answer, which measures."""
    expected = [Session.load(folder / "net.exitify").run(x).exit for x in inputs(10)]
    assert len(set(expected)) > 1
    assert [answer["exit"] for answer in answers(folder, "x.npy", "--deadline-ms", 3.6e6)] == [FINAL, *expected[1:]]


def test_run_streams_frames_in_order_and_marks_what_was_held(folder: Path) -> None:
    found = answers(folder, "frames.npy", "--stream", "--profile", "video")
    assert [(answer["held"], answer["exit"]) for answer in found] == [(False, FINAL), (True, "exit1"), (True, "exit1")] * 2
    assert [answer["held"] for answer in answers(folder, "frames.npy", "--stream", "--hold", 0.9)] == [False, True, True] * 2
    done = exitify("run", "net.exitify", "frames.npy", "--stream", "--profile", "video", folder=folder)
    assert done.out.count("exit1, held") == 4
    assert done.out.splitlines()[-1] == "In Python: stream = exitify.Session.load('net.exitify', profile='video').stream(); stream.run(x)"


def test_run_keeps_a_batch_within_its_budget(folder: Path) -> None:
    session = Session.load(folder / "net.exitify")
    expected = session.run_batch(inputs(10), budget_macs=0.7)
    found = answers(folder, "x.npy", "--batch", 10, "--budget-macs", 0.7)
    assert [answer["exit"] for answer in found] == [answer.exit for answer in expected]
    assert np.mean([answer["macs"] for answer in found]) <= 0.7 * four_exits().plan.full_macs


def test_run_shows_the_sets_of_classes_where_the_profile_has_them(folder: Path) -> None:
    session = Session.load(folder / "net.exitify")
    expected = [session.run(x).prediction_set for x in inputs(10)]
    assert len({len(labels or ()) for labels in expected}) > 1
    assert [answer["prediction_set"] for answer in answers(folder, "x.npy")] == [list(labels or ()) for labels in expected]
    done = exitify("run", "net.exitify", "x.npy", folder=folder)
    assert "one of" in done.out
    longest = max(expected, key=lambda labels: len(labels or ())) or ()
    assert ", ".join(CLASSES[label] for label in longest) in done.out
    assert {answer["prediction_set"] for answer in answers(folder, "x.npy", "--profile", "none")} == {None}
    assert "one of" not in exitify("run", "net.exitify", "x.npy", "--profile", "none", folder=folder).out


PYTHON = {
    ("--exit", "exit2"): "exitify.Session.load('net.exitify').run(x, exit='exit2')",
    ("--exit", "exit2", "--batch", 5): "session = exitify.Session.load('net.exitify'); session.use(exit='exit2'); session.run_batch(x)",
    ("--deadline-ms", 50): "exitify.Session.load('net.exitify').run(x, deadline_ms=50.0)",
    ("--batch", 5, "--budget-macs", 0.7): "exitify.Session.load('net.exitify').run_batch(x, budget_macs=0.7)",
    ("--stream", "--hold", 0.9): "stream = exitify.Session.load('net.exitify').stream(hold=0.9); stream.run(x)",
}


@pytest.mark.parametrize("arguments", PYTHON)
def test_run_prints_the_python_that_does_the_same(folder: Path, arguments: tuple[object, ...]) -> None:
    done = exitify("run", "net.exitify", "x.npy", *arguments, folder=folder)
    python = done.out.splitlines()[-1].removeprefix("In Python: ")
    assert python == PYTHON[arguments]
    assert "No profile is in use" not in done.out


def test_without_a_profile_what_stops_is_not_said_to_take_no_exit(folder: Path) -> None:
    said = [
        "No profile is in use" in exitify("run", "net.exitify", "x.npy", "--profile", "none", *more, folder=folder).out
        for more in ((), ("--exit", "exit1"), ("--deadline-ms", 50), ("--stream", "--hold", 0.9))
    ]
    assert said == [True, False, False, False]


REFUSED = {
    "an exit that there is not": (("--exit", "exit9"), "there is no exit 'exit9'"),
    "a deadline for a batch": (("--deadline-ms", 5, "--batch", 2), "--deadline-ms is for one answer at a time"),
    "no time": (("--deadline-ms", 0), r"a deadline of 0.0 ms is no time"),
    "a stream in batches": (("--stream", "--batch", 2), "--stream answers frames one by one"),
    "a stream at one exit": (("--stream", "--exit", "exit1"), "--stream answers frames one by one"),
    "a stream with a deadline": (("--stream", "--deadline-ms", 4), "--stream answers frames one by one"),
    "a stream by no similarity": (("--stream",), "the profile 'default' does not say how similar frames must be"),
    "a similarity and no stream": (("--hold", 0.9), "--hold says how alike the frames of a stream must be"),
    "a similarity above one": (("--stream", "--hold", 1.5), "a similarity of 1.5 is none from 0 to 1"),
    "a budget for one": (("--budget-macs", 0.7), "--budget-macs is what the answers of a batch take on average"),
    "a budget below the first exit": (("--budget-macs", 0.01, "--batch", 5), "no answer costs 0.01 of the network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_run_cannot_do_is_refused(folder: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    refused(exitify("run", "net.exitify", "x.npy", *arguments, folder=folder), message)
