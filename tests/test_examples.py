"""The examples run as they stand. What pages show is run by test_documents.py."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scikit-learn's digits are the examples' data: pip install 'exitify[demo]'")

import exitify
from examples.digits import run as digits

ROOT = Path(__file__).parent.parent


def test_the_digits_example_ends_in_a_table_and_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "digits.exitify"
    monkeypatch.setattr(sys, "argv", ["run", "--epochs", "1", "--output", str(output)])
    digits.main()
    printed = capsys.readouterr().out
    for row in ("right answers", "mean time", "slow time (p95)", "stopped at final"):
        assert row in printed
    assert "default" in exitify.Artifact.open(output).profiles
    assert "Easiest and hardest pictures" in output.with_suffix(".html").read_text()


def test_every_folder_of_code_is_named_in_a_folder_guide():
    guide = (ROOT / "README.md").read_text()
    inner = (ROOT / "exitify" / "README.md").read_text()
    for folder in ("exitify", "passes", "targets", "examples", "benchmarks", "docs", "tests"):
        assert f"{folder}/" in guide
    for folder in (path for path in (ROOT / "exitify").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"{folder.name}/" in inner
