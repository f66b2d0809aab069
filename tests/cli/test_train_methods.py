"""`exitify transform --cascade` and `exitify train --method`: heads that read each other, gates, class means, on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from exitify.artifact.artifact import Artifact
from tests.cli.console import exitify, refused
from tests.cli.test_cli import fill

MODEL = ("digits_net:build", "--weights", "weights.safetensors", "--exits", "stage1,stage2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = fill(tmp_path_factory.mktemp("methods"))
    assert exitify("transform", *MODEL, "--head", "linear", "-o", "linear.exitify", folder=path).code == 0
    return path


def test_gates_trained_on_the_command_line_decide_on_it(folder: Path) -> None:
    trained = exitify("train", "linear.exitify", "--data", "train.npz", "--method", "jei", "--cost-weight", 0.5, "--epochs", 3, "--copies", 1, "-o",
                      "gates.exitify", folder=folder)  # fmt: skip
    assert "HeadTraining(epochs=3, copies=1, method='jei', cost_weight=0.5)" in trained.out
    assert list(Artifact.open(folder / "gates.exitify").manifest.gates) == ["exit1", "exit2"]
    for policy in ("gates", "jei"):
        done = exitify("calibrate", "gates.exitify", "--data", "test.npz", "--max-drop", 0.02, "--policy", policy, "--profile", policy, folder=folder)
        assert done.code == 0
    profile = Artifact.open(folder / "gates.exitify").profile("gates")
    assert (profile.policy, {len(setting.gate) for setting in profile.exits.values()}) == ("gates", {5})
    assert {setting.temperature for setting in profile.exits.values()} == {1.0}
    assert exitify("run", "gates.exitify", "x.npy", "--profile", "jei", "--json", folder=folder).document["profile"] == "jei"


def test_class_means_need_linear_heads(folder: Path) -> None:
    assert exitify("train", "linear.exitify", "--data", "train.npz", "--method", "class-means", "-o", "means.exitify", folder=folder).code == 0
    assert exitify("transform", *MODEL, "--head", "conv", "-o", "conv.exitify", folder=folder).code == 0
    refused(exitify("train", "conv.exitify", "--data", "train.npz", "--method", "class-means", folder=folder), "class means make linear heads")


def test_a_cascade_is_asked_for_and_shown(folder: Path) -> None:
    made = exitify("transform", *MODEL, "--cascade", "identity", "-o", "tied.exitify", folder=folder)
    assert "cascade='identity'" in made.out
    assert [point.previous for point in Artifact.open(folder / "tied.exitify").plan.exits] == ["", "exit1"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("train", "linear.exitify", "--data", "train.npz", "--method", "joint"), "--method joint is no way to train heads alone"),
        (("train", "linear.exitify", "--data", "train.npz", "--method", "magic"), "--method magic is no way to train heads alone"),
        (
            ("train", "linear.exitify", "--data", "train.npz", "--method", "jei", "--distillation", 0.5),
            "--distillation is no part of --method jei",
        ),
        (("train", "linear.exitify", "--data", "train.npz", "--cost-weight", 2), "--cost-weight weighs the network's cost for gates"),
        (("transform", *MODEL, "--cascade", "sideways", "-o", "n.exitify"), "there is no path 'sideways'"),
        (
            ("transform", "digits_net:build", "--data", "train.npz", "--cascade", "identity", "-o", "n.exitify"),
            "--data tries heads by themselves",
        ),
        (("calibrate", "linear.exitify", "--data", "test.npz", "--max-drop", 0.02, "--policy", "gates"), "heads are untrained"),
    ],
    ids=["of the network", "unknown", "distillation", "cost", "path", "searched", "untrained"],
)
def test_what_does_not_go_together_is_refused(folder: Path, arguments: tuple[object, ...], problem: str) -> None:
    refused(exitify(*arguments, folder=folder), problem)
    assert not (folder / "n.exitify").exists()
