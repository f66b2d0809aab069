"""The command `compile`, and what other commands do with its libraries."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import exitify as package
from exitify.artifact.artifact import Artifact, build_artifact, graph_path
from exitify.lower import pipeline
from exitify.runtime.session import Session
from exitify.targets import FOLDER, processor, target_names
from tests.artifacts import exported, inputs, profile_for
from tests.cli.console import Done, contents, exitify, process, refused
from tests.compiled import thresholds


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact, compiled artifacts, one that TVM cannot take, inputs, and bad files."""
    folder = tmp_path_factory.mktemp("workshop")
    _, plain = exported("dropout")
    plain.with_profile("default", profile_for(plain, {"exit2": thresholds(plain, inputs(8))["exit2"]})).save(folder / "net.exitify")
    np.save(folder / "x.npy", inputs(8))
    odd(plain).save(folder / "odd.exitify")
    for name in ("net", "odd"):
        fallback = ("--fallback", "onnxruntime") if name == "odd" else ()
        assert exitify("compile", f"{name}.exitify", "-o", f"{name}_compiled.exitify", *fallback, folder=folder).code == 0
    made = Artifact.open(folder / "net_compiled.exitify")
    stale(made).save(folder / "stale.exitify")
    whole = (folder / "net.exitify").read_bytes()
    (folder / "cut.exitify").write_bytes(whole[: len(whole) // 2])
    board = (FOLDER / "host.toml").read_text()
    (folder / "board.toml").write_text(board.replace('"host"', '"board"'))
    (folder / "spaces.toml").write_text(board.replace('"host"', '"my board"'))
    (folder / "vax.toml").write_text(board.replace('triple = "native"', 'triple = "vax-dec-ultrix"'))
    (folder / "text.toml").write_text("not a board\n")
    (folder / "empty").mkdir()
    return folder


def odd(artifact: Artifact) -> Artifact:
    """The artifact with an operator in its last segment that TVM's importer does not have."""
    path = graph_path("trunk_final")
    model = onnx.load_model_from_string(bytes(artifact.files[path]))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Celu"
    return build_artifact(artifact.manifest, {**artifact.files, path: model.SerializeToString()})


def stale(artifact: Artifact) -> Artifact:
    """The artifact with another graph than its library was compiled from."""
    path = graph_path("trunk_final")
    model = onnx.load_model_from_string(bytes(artifact.files[path]))
    model.graph.name += "_2"
    files = {name: data for name, data in artifact.files.items() if not name.startswith("profiles/")}
    return build_artifact(artifact.manifest, {**files, path: model.SerializeToString()})


# --- compile --------------------------------------------------------------------------------------------------------


def test_compile_prints_each_segment_and_where_it_runs(workshop: Path, tmp_path: Path) -> None:
    done = exitify("compile", "net.exitify", "-o", tmp_path / "out.exitify", folder=workshop)
    assert (done.code, done.err) == (0, "")
    target = Artifact.open(tmp_path / "out.exitify").targets["host"]
    assert f"Library for host ({target.triple}, {target.cpu})" in done.out
    for segment, made in target.segments.items():
        (row,) = [line for line in done.out.splitlines() if f" {segment} " in line]
        assert " TVM " in row
        assert f" {made.error:.1e} " in row
    assert f"Wrote {tmp_path / 'out.exitify'}. Next: `exitify run {tmp_path / 'out.exitify'} PICTURE --engine tvm`" in done.out


def test_compile_as_json_is_the_record_that_it_stores(workshop: Path, tmp_path: Path) -> None:
    document = exitify("compile", "net.exitify", "-o", tmp_path / "out.exitify", "--json", folder=workshop).document
    stored = exitify("inspect", tmp_path / "out.exitify", "--json", folder=workshop).document["targets"]
    assert list(stored) == ["host"]
    assert document == {"output": str(tmp_path / "out.exitify"), "libraries": [stored["host"]]}
    (document,) = document["libraries"]
    assert document["triple"] == f"{processor.architecture()}-linux-gnu"
    assert set(document["segments"]) == {segment.name for segment in Artifact.open(workshop / "net.exitify").plan.segments}
    assert document["left_to"] == ""
    assert max(segment["error"] for segment in document["segments"].values()) <= document["tolerance"]


def test_compile_replaces_the_artifact_itself_and_keeps_what_it_holds(workshop: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(workshop / "net.exitify", tmp_path / "own.exitify"))
    before = Artifact.open(path)
    assert exitify("compile", "own.exitify", folder=tmp_path).code == 0
    assert exitify("compile", "own.exitify", "--target", workshop / "board.toml", folder=tmp_path).code == 0
    after = Artifact.open(path)
    assert list(after.targets) == ["host", "board"]
    assert after.profiles == before.profiles
    assert after.manifest.model_id == before.manifest.model_id
    assert {name: bytes(data) for name, data in before.files.items()}.items() <= {name: bytes(data) for name, data in after.files.items()}.items()
    assert os.listdir(tmp_path) == ["own.exitify"]


def test_the_python_that_compile_prints_does_the_same(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is deterministic, so that the files can be compared."""
    done = exitify("compile", "odd.exitify", "--fallback", "onnxruntime", "-o", tmp_path / "out.exitify", folder=workshop)
    code = done.out.splitlines()[-1].removeprefix("In Python: ")
    assert code.startswith("exitify.compile_artifact(exitify.Artifact.open('odd.exitify'), exitify.targets.load_target('host')")
    (tmp_path / "out.exitify").rename(tmp_path / "first.exitify")
    monkeypatch.chdir(workshop)
    exec(code, {"exitify": package})
    first, second = ((tmp_path / name).read_bytes() for name in ("first.exitify", "out.exitify"))
    assert first == second == (workshop / "odd_compiled.exitify").read_bytes()


# --- what others do with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["tvm", "tvm:host"])
@pytest.mark.parametrize("batch", [1, 8])
def test_run_answers_from_the_library(workshop: Path, engine: str, batch: int) -> None:
    arguments = ("run", "net_compiled.exitify", "x.npy", "--batch", batch, "--json")
    ours = exitify(*arguments, "--engine", engine, folder=workshop).document
    theirs = exitify(*arguments, folder=workshop).document
    assert (ours["engine"], theirs["engine"]) == ("tvm", "onnxruntime")
    assert [(a["label"], a["exit"], a["macs"]) for a in ours["answers"]] == [(a["label"], a["exit"], a["macs"]) for a in theirs["answers"]]
    assert {a["exit"] for a in ours["answers"]} == {"exit2", "final"}
    np.testing.assert_allclose([a["logits"] for a in ours["answers"]], [a["logits"] for a in theirs["answers"]], rtol=1e-4, atol=1e-5)


def test_run_prints_the_python_that_asks_for_the_library(workshop: Path) -> None:
    done = exitify("run", "net_compiled.exitify", "x.npy", "--engine", "tvm", folder=workshop)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "In Python: exitify.Session.load('net_compiled.exitify', engine='tvm').run(x)"


def test_inspect_shows_the_libraries(workshop: Path, tmp_path: Path) -> None:
    exitify("compile", "net_compiled.exitify", "--target", "board.toml", "-o", tmp_path / "two.exitify", folder=workshop)
    done = exitify("inspect", tmp_path / "two.exitify", folder=workshop)
    assert (done.code, done.err) == (0, "")
    titles = [line.split(" (")[0] for line in done.out.splitlines() if line.startswith("Library for ")]
    assert titles == ["Library for host", "Library for board"]
    assert done.out.count(" TVM ") == 2 * len(Artifact.open(workshop / "net.exitify").plan.segments)


def test_calibrating_again_keeps_the_library_and_it_still_runs(workshop: Path, tmp_path: Path) -> None:
    made = Artifact.open(workshop / "net_compiled.exitify")
    made.with_profile("early", profile_for(made, {"exit1": 0.0})).save(tmp_path / "early.exitify")
    answers = exitify("run", tmp_path / "early.exitify", "x.npy", "--engine", "tvm", "--profile", "early", "--json", folder=workshop).document[
        "answers"
    ]
    assert {answer["exit"] for answer in answers} == {"exit1"}


def test_batches_get_functions_and_say_so(workshop: Path) -> None:
    library = exitify("compile", "net.exitify", "--batch", "2,5", "-o", "batches.exitify", "--json", folder=workshop).document["libraries"][0]
    assert {tuple(made["batches"]) for made in library["segments"].values()} == {(2, 5)}


def test_an_operator_that_tvm_lacks_is_named_and_can_be_left_to_onnx_runtime(workshop: Path) -> None:
    done = exitify("compile", "odd.exitify", folder=workshop)
    refused(done, "TVM cannot take the segment 'trunk_final': .*Celu")
    assert done.err.splitlines()[1] == "  hint: leave such segments to ONNX Runtime: --fallback onnxruntime"
    document = exitify("inspect", "odd_compiled.exitify", "--json", folder=workshop).document["targets"]["host"]
    assert document["left_to"] == "onnxruntime"
    assert "trunk_final" not in document["segments"]
    table = exitify("inspect", "odd_compiled.exitify", folder=workshop).out
    (row,) = [line for line in table.splitlines() if " trunk_final " in line]
    assert " onnxruntime " in row
    found, expected = (
        exitify("run", "odd_compiled.exitify", "x.npy", "--engine", engine, "--json", folder=workshop).document["answers"]
        for engine in ("tvm", "auto")
    )
    np.testing.assert_allclose([a["logits"] for a in found], [a["logits"] for a in expected], rtol=1e-4, atol=1e-5)


# --- exit codes -----------------------------------------------------------------------------------------------------

BAD = {
    "sizes of batches in words": (("compile", "net.exitify", "--batch", "4,x"), "--batch '4,x' is no list of sizes"),
    "a batch of one": (("compile", "net.exitify", "--batch", "1,4"), "batches of 1, 4 cannot be compiled for"),
    "unknown target": (("compile", "net.exitify", "--target", "orin-9000"), "there is no target 'orin-9000'"),
    "no such board file": (("compile", "net.exitify", "--target", "./nothere.toml"), r"there is no target '\./nothere\.toml'"),
    "text as board": (("compile", "net.exitify", "--target", "text.toml"), r"text\.toml is not TOML"),
    "another architecture": (("compile", "net.exitify", "--target", "vax.toml"), "the target 'host' is for 'vax-dec-ultrix'"),
    "a board that no folder can be called": (("compile", "net.exitify", "--target", "spaces.toml"), "a target cannot be called 'my board'"),
    "unknown fallback": (("compile", "net.exitify", "--fallback", "torch"), "there is no fallback 'torch'"),
    "an operator that TVM lacks": (("compile", "odd.exitify"), "TVM cannot take the segment 'trunk_final'"),
    "compile to nowhere": (("compile", "net.exitify", "-o", "nowhere/out.exitify"), "there is no folder nowhere"),
    "compile to a folder": (("compile", "net.exitify", "-o", "empty"), "cannot write empty: it is a folder"),
    "compile a missing artifact": (("compile", "nothere.exitify"), r"cannot open nothere\.exitify"),
    "cut, compiled": (("compile", "cut.exitify"), "cut off"),
    "run without a library": (("run", "net.exitify", "x.npy", "--engine", "tvm"), "the artifact has no compiled library"),
    "run another target": (("run", "net_compiled.exitify", "x.npy", "--engine", "tvm:orin"), "the artifact has no library for 'orin'"),
    "run a stale library": (("run", "stale.exitify", "x.npy", "--engine", "tvm"), "the library for 'host' is stale"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_two_lines_and_nothing_is_changed(workshop: Path, case: str) -> None:
    arguments, problem = BAD[case]
    before = contents(workshop)
    refused(exitify(*arguments, folder=workshop), problem)
    assert contents(workshop) == before


def test_an_unknown_target_is_refused_with_those_there_are(workshop: Path) -> None:
    hint = exitify("compile", "net.exitify", "--target", "orin-9000", folder=workshop).err.splitlines()[1]
    assert hint == f"  hint: there are {', '.join([*target_names(), 'orin'])}, and your own ./my-board.toml"


@pytest.mark.parametrize(
    "case", ["unknown target", "unknown fallback", "compile to nowhere", "compile to a folder", "a board that no folder can be called"]
)
def test_what_cannot_end_well_is_refused_before_any_work(workshop: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr(pipeline, "lower_segments", work)
    arguments, problem = BAD[case]
    refused(exitify(*arguments, folder=workshop), problem)


def test_a_linker_that_is_none_is_refused(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EXITIFY_{processor.architecture().upper()}_LD", "/nowhere/ld")
    before = contents(workshop)
    refused(exitify("compile", "net.exitify", folder=workshop), "is '/nowhere/ld', which is no program")
    assert contents(workshop) == before


def test_a_failing_linker_is_an_error_that_names_it(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EXITIFY_{processor.architecture().upper()}_LD", "false")
    before = contents(workshop)
    refused(exitify("compile", "net.exitify", folder=workshop), "linking with false failed")
    assert contents(workshop) == before


def test_a_library_that_computes_something_else_is_refused_and_not_written(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "segment_errors", lambda *_: [("trunk_exit1", 1e-7), ("trunk_final", 0.25)])
    before = contents(workshop)
    refused(
        exitify("compile", "net.exitify", folder=workshop), r"'trunk_final' differs from the reference by 0\.25 of its magnitude, more than 0\.0001"
    )
    assert contents(workshop) == before


def test_an_interrupted_compile_changes_nothing(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "build", press)
    before = contents(workshop)
    refused(exitify("compile", "net.exitify", folder=workshop), "interrupted; nothing was changed")
    assert contents(workshop) == before


def test_a_process_of_its_own_says_no_more_than_the_table(workshop: Path, tmp_path: Path) -> None:
    """TVM and LLVM write to the process's streams past Python."""
    done = process("compile", "net.exitify", "-o", tmp_path / "out.exitify", "--json", folder=workshop)
    assert Done(done.returncode, done.stdout, done.stderr).document["libraries"][0]["target"] == "host"
    assert (tmp_path / "out.exitify").read_bytes() == (workshop / "net_compiled.exitify").read_bytes()


def test_a_wrong_usage_ends_with_two(workshop: Path) -> None:
    for arguments in (("compile",), ("compile", "net.exitify", "--trials", "-1"), ("compile", "net.exitify", "--fast")):
        done = exitify(*arguments, folder=workshop)
        assert (done.code, done.out) == (2, "")
        assert "Usage: exitify compile" in done.err


def test_the_session_of_a_compiled_artifact_is_the_same_from_python(workshop: Path) -> None:
    answers = exitify("run", "net_compiled.exitify", "x.npy", "--engine", "tvm", "--json", folder=workshop).document["answers"]
    session = Session.load(workshop / "net_compiled.exitify", engine="tvm")
    assert [answer["logits"] for answer in answers] == [session.run(x).logits.astype(float).tolist() for x in inputs(8)]
