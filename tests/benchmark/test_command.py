"""`exitify bench`: what it writes where, and what it refuses before anything is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import digits
from tests.cli.console import contents, exitify, refused

QUICK = ("--samples", 10, "--rounds", 1, "--no-memory")
BENCH = ("bench", "net.exitify", "--data", "test.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    digits.trained_artifact().save(place / "net.exitify")
    digits.write_npz(place / "test.npz", "test")
    exitify("export", "net.exitify", "--exit", 1, "-o", "small.onnx", folder=place)
    return place


def test_a_smaller_network_stands_in_the_table_with_its_own_accuracy(folder: Path) -> None:
    document = exitify(*BENCH, *QUICK, "--samples", 60, "--smaller", "small.onnx", "--json", folder=folder).document
    found = {timing["name"]: timing for timing in document["timings"]}
    assert list(found) == ["onnxruntime", "onnxruntime again", "small.onnx", "exitify"]
    assert found["small.onnx"]["accuracy"] < found["onnxruntime"]["accuracy"]


def test_markdown_goes_to_a_file_beside_the_table_or_to_stdout_alone(folder: Path, tmp_path: Path) -> None:
    done = exitify(*BENCH, *QUICK, "--markdown", tmp_path / "table.md", folder=folder)
    assert (done.code, done.err) == (0, "")
    written = (tmp_path / "table.md").read_text()
    assert written.startswith("### tests.digits\\_net:build, exits against none\n")
    assert "untransformed, again" in done.out
    assert f"Wrote {tmp_path / 'table.md'}." in done.out
    alone = exitify(*BENCH, *QUICK, "--markdown", "-", folder=folder)
    assert alone.code == 0
    assert alone.out.startswith("### ")
    assert "In Python" not in alone.out


def test_what_is_done_in_python_is_the_same_call(folder: Path) -> None:
    done = exitify(*BENCH, *QUICK, "--smaller", "small.onnx", "--against", "", folder=folder)
    assert done.out.splitlines()[-1] == (
        "In Python: exitify.bench(exitify.Artifact.open('net.exitify'), samples, against=(), smaller='small.onnx', most=10, rounds=1, memory=False)"
    )


def test_openvino_is_timed_where_it_is_installed(folder: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'exitify[openvino]'")
    document = exitify(*BENCH, *QUICK, "--against", "openvino", "--json", folder=folder).document
    assert [timing["engine"] for timing in document["timings"]] == ["onnxruntime", "onnxruntime", "openvino", "onnxruntime"]
    assert "openvino" in document["versions"]
    assert len({timing["accuracy"] for timing in document["timings"]}) == 1


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process of the round, where it is missing."""
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    done = exitify(*BENCH, *QUICK, "--against", "openvino", folder=folder)
    refused(done, "this command needs openvino, which is not installed")
    assert "pip install 'exitify[openvino]'" in done.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--json", "--markdown", "-"), "both want stdout"),
        (("--markdown", "nowhere/table.md"), r"cannot write nowhere/table\.md"),
        (("--smaller", "none.onnx"), r"there is no file none\.onnx"),
        (("--smaller", "test.npz"), r"test\.npz is no ONNX file"),
        (("--against", "onnxruntime,jax"), "no contender 'jax'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused_in_two_lines_and_nothing_is_written(folder: Path, options: tuple[str, ...], problem: str) -> None:
    before = contents(folder)
    refused(exitify(*BENCH, *QUICK, *options, folder=folder), problem)
    assert contents(folder) == before
