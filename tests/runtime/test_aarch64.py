"""Libraries for the Orin's processor, compiled on this machine and run there, as QEMU emulates it; and none where it does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact, target_path
from exitify.errors import LibraryRefused
from exitify.lower.pipeline import compile_artifact
from exitify.runtime.answers import Answer
from exitify.runtime.engines.elf import architecture_of
from exitify.runtime.session import Session
from exitify.targets import load_target, processor
from tests.artifacts import inputs, profile_for
from tests.cli.console import exitify
from tests.compiled import HOST, compiled, thresholds
from tests.emulator import OLDER, EmulatedPython

GENERIC, BOARD = "aarch64-cpu", "agx-orin-64gb"
NAMES = ("identity", "depthwise")
COUNT = 12

pytestmark = pytest.mark.skipif(processor.architecture() != "x86_64", reason="what is foreign here is another machine's own")

ANSWER = """
import json, sys
import numpy as np
from exitify import Session
from exitify.errors import ExitifyError

def asked(path, engine, threads):
    try:
        session = Session.load(path, engine=engine, threads=threads)
    except ExitifyError as error:
        return str(error)
    answers = {"run": [session.run(x) for x in xs], "run_batch": session.run_batch(xs)}
    return {
        "target": session.engine.compiled.target,
        "libraries": sorted({line.rpartition("/")[2].strip() for line in open("/proc/self/maps") if "libtvm" in line}),
        **{how: [[a.label, a.exit, a.macs, a.logits.astype(float).tolist()] for a in found] for how, found in answers.items()},
    }

xs = np.load(sys.argv[1])
print(json.dumps([asked(path, engine, threads) for path, engine, threads in json.loads(sys.argv[2])]))
"""


@dataclass(frozen=True)
class There:
    """The emulated machine, with inputs and artifacts that hold libraries for here, for there and for the board."""

    python: EmulatedPython
    folder: Path

    def ask(self, *questions: tuple[str, str, int], **options: Any) -> list[Any]:
        """What sessions say there, by network, engine and threads: answers, or the error."""
        paths = [(str(self.folder / f"{name}.exitify"), engine, threads) for name, engine, threads in questions]
        done = self.python.run("-c", ANSWER, self.folder / "x.npy", json.dumps(paths), **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def open(self, name: str) -> Artifact:
        return Artifact.open(self.folder / f"{name}.exitify")


@pytest.fixture(scope="module")
def there(orin: EmulatedPython, aarch64_linker: list[str], tmp_path_factory: pytest.TempPathFactory) -> There:
    assert aarch64_linker
    folder = tmp_path_factory.mktemp("there")
    np.save(folder / "x.npy", inputs(COUNT))
    for name in NAMES:
        artifact = compiled(name)
        artifact = artifact.with_profile("default", profile_for(artifact, thresholds(artifact, inputs(COUNT))))
        artifact.save(folder / f"{name}.exitify")
        done = exitify("compile", f"{name}.exitify", "--target", GENERIC, folder=folder)
        assert (done.code, done.err) == (0, "")
    artifact = compile_artifact(Artifact.open(folder / "identity.exitify"), load_target(BOARD))
    artifact.save(folder / "identity.exitify")
    return There(orin, folder)


@pytest.fixture(scope="module")
def said(there: There) -> dict[tuple[str, str, int], Any]:
    """Everything that the tests ask there, in one process: starting it takes seconds."""
    questions = [
        ("identity", "tvm", 1),
        ("identity", "tvm", 2),
        ("depthwise", "tvm", 1),
        ("identity", f"tvm:{BOARD}", 1),
        ("identity", "tvm:host", 1),
    ]
    return dict(zip(questions, there.ask(*questions)))


def assert_answers_are(found: list[list[Any]], expected: list[Answer]) -> None:
    assert [(label, exit_name, macs) for label, exit_name, macs, _ in found] == [(a.label, a.exit, a.macs) for a in expected]
    for (*_, logits), answer in zip(found, expected):
        assert np.abs(np.array(logits) - answer.logits).max() <= 1e-4 * np.abs(answer.logits).max()


@pytest.mark.parametrize(("name", "engine"), [("identity", "tvm"), ("depthwise", "tvm"), ("identity", f"tvm:{BOARD}")])
def test_a_library_answers_there_as_this_machines_engines_answer(name: str, engine: str, there: There, said: dict[Any, Any]) -> None:
    found = said[name, engine, 1]
    assert found["target"] == (engine.partition(":")[2] or GENERIC)
    for here in ("tvm:host", "onnxruntime"):
        session = Session(there.open(name), engine=here)
        expected = [session.run(x) for x in inputs(COUNT)]
        assert len({answer.exit for answer in expected}) > 1
        assert_answers_are(found["run"], expected)
        assert_answers_are(found["run_batch"], expected)


def test_two_threads_there_say_the_same_bits_as_one(said: dict[Any, Any]) -> None:
    assert said["identity", "tvm", 2] == said["identity", "tvm", 1]


def test_nothing_of_tvm_but_its_runtime_is_there(said: dict[Any, Any]) -> None:
    libraries = said["identity", "tvm", 1]["libraries"]
    assert "libtvm_runtime.so" in libraries
    assert not [name for name in libraries if "compiler" in name]


def test_this_machines_library_is_refused_there_by_name(said: dict[Any, Any]) -> None:
    expected = "the library for 'host' is for x86_64, and this machine is aarch64\n  hint: compile for this machine: --target host"
    assert said["identity", "tvm:host", 1] == expected


@pytest.mark.parametrize("target", [GENERIC, BOARD])
def test_that_machines_library_is_refused_here_by_name(target: str, there: There) -> None:
    with pytest.raises(LibraryRefused, match=f"^the library for '{target}' is for aarch64, and this machine is x86_64\n"):
        Session(there.open("identity"), engine=f"tvm:{target}")
    session = Session(there.open("identity"), engine="tvm")
    assert session.engine.compiled.target == HOST  # type: ignore[attr-defined]


def test_a_processor_without_the_boards_arithmetic_is_told_so_and_runs_what_needs_none(there: There) -> None:
    board, generic = there.ask(("identity", f"tvm:{BOARD}", 1), ("identity", "tvm", 1), cpu=OLDER)
    assert board == f"the library for '{BOARD}' needs a processor with asimddp, asimdhp\n  hint: compile on this machine: --target host"
    assert generic["target"] == GENERIC
    assert_answers_are(generic["run"], [Session(there.open("identity")).run(x) for x in inputs(COUNT)])


def test_libraries_are_shared_objects_for_that_machine_that_need_no_other(there: There) -> None:
    """No C library, so that the linker alone is enough to make them."""
    artifact = there.open("identity")
    for target in (GENERIC, BOARD):
        library = bytes(artifact.files[target_path(target, "library.so")])
        assert architecture_of(library) == "aarch64"
        assert artifact.targets[target].triple == "aarch64-linux-gnu"
    assert artifact.targets[GENERIC].features == ("asimd",)
    assert artifact.targets[BOARD].features == ("asimd", "asimddp", "asimdhp")


def test_the_command_line_there_runs_the_library(there: There) -> None:
    done = there.python.run("-m", "exitify", "run", there.folder / "depthwise.exitify", there.folder / "x.npy", "--engine", "tvm", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    session = Session(there.open("depthwise"))
    assert document["engine"] == "tvm"
    assert [(a["label"], a["exit"]) for a in document["answers"]] == [(a.label, a.exit) for a in map(session.run, inputs(COUNT))]


def test_compiling_for_it_needs_no_other_program_than_a_linker(there: There, monkeypatch: pytest.MonkeyPatch, aarch64_linker: list[str]) -> None:
    """No compiler of C, for instance."""
    if len(aarch64_linker) > 1:
        pytest.skip(f"{aarch64_linker} is no program by itself")
    monkeypatch.setenv("EXITIFY_AARCH64_LD", str(shutil.which(aarch64_linker[0])))
    monkeypatch.setenv("PATH", "/nowhere")
    again = compile_artifact(there.open("depthwise"), load_target(GENERIC))
    path = target_path(GENERIC, "library.so")
    assert bytes(again.files[path]) == bytes(there.open("depthwise").files[path])
