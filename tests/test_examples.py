"""README's code and the examples run as they stand."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn's digits are the examples' data: pip install 'exitify[demo]'")

import exitify
from examples.digits import run as digits
from examples.digits.model import DigitsNet

ROOT = Path(__file__).parent.parent


@pytest.fixture
def in_a_folder_with_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sets = digits.digits(tmp_path)
    arrays = {f"{part}_{part_of}": values for part_of, samples in (("train", sets["train"]), ("test", sets["calibrate"]))
              for part, values in (("x", samples.pixels(slice(None))[..., 0]), ("y", samples.labels))}  # fmt: skip
    np.savez(tmp_path / "digits.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readmes_python_runs_from_top_to_bottom(in_a_folder_with_digits: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    network, images, labels = DigitsNet().eval(), torch.randn(4, 1, 32, 32), torch.arange(4)
    scope = {"network": network, "images": images, "labels": labels, "example": images[:1], "train_images": [images]}
    scope |= {"loader": [(images, labels)], "optimizer": torch.optim.SGD(network.parameters(), 0.1)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (in_a_folder_with_digits / "net.exitify").exists()
    assert re.search(r"^\d 0\.\d+|^\d 1\.0", capsys.readouterr().out.splitlines()[-1])
    assert scope["outputs"].names[-1] == "final"
    assert scope["scores"].shape == (4, 10)
    assert scope["loss"].item() > 0


def test_the_digits_example_ends_in_a_table_and_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "digits.exitify"
    monkeypatch.setattr(sys, "argv", ["run", "--epochs", "1", "--output", str(output)])
    digits.main()
    printed = capsys.readouterr().out
    for row in ("right answers", "mean time", "slow time (p95)", "stopped at final"):
        assert row in printed
    assert "default" in exitify.Artifact.open(output).profiles


@pytest.mark.parametrize("readme", sorted(path for path in ROOT.rglob("README.md") if not {".venv", "build"} & set(path.parts)), ids=str)
def test_every_link_in_a_readme_leads_somewhere(readme: Path):
    links = re.findall(r"\]\(([^)#]+)\)", readme.read_text())
    missing = [link for link in links if not link.startswith("http") and not (readme.parent / link).exists()]
    assert not missing


def test_every_folder_of_code_is_named_in_a_folder_guide():
    guide = (ROOT / "README.md").read_text()
    inner = (ROOT / "exitify" / "README.md").read_text()
    for folder in ("exitify", "passes", "targets", "examples", "benchmarks", "docs", "tests"):
        assert f"{folder}/" in guide
    for folder in (path for path in (ROOT / "exitify").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"{folder.name}/" in inner
