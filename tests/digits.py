"""One small task, from pictures to an artifact with trained heads, made once a process and shared by several test files.

What is made here does not depend on the test that asks first: every random number has its own generator, and torch's global
one is put back.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import exitify
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import ExitSetting, InputContract, Profile, Promise
from exitify.data import Samples, load_samples
from exitify.models import LoadedModel, load_model
from exitify.pictures import pixels_to_inputs
from exitify.train.heads import HeadTraining, train_heads
from tests.digits_net import DigitsNet

EXITS = "stage2,stage3"
SIZES = {"train": 900, "calibration": 500, "test": 397}
OPTIONS = HeadTraining(epochs=4, copies=2, batch=50)


@functools.cache
def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Digits of 16x16 bytes `(N, 16, 16, 1)` and labels, in three parts that share none."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come from scikit-learn: pip install scikit-learn")
    digits = datasets.load_digits()
    x = np.kron(digits.images * 15, np.ones((1, 2, 2))).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(x))
    ends = np.cumsum(list(SIZES.values()))
    parts = np.split(order, ends[:-1])
    return {name: (x[rows], digits.target[rows].astype(np.int64)) for name, rows in zip(SIZES, parts, strict=True)}


def write_npz(path: Path, part: str, rows: slice = slice(None)) -> Path:
    x, y = pictures()[part]
    np.savez(path, x=x[rows], y=y[rows])
    return path


@functools.cache
def loaded() -> LoadedModel:
    """The network, trained for a few seconds, as the command line would load it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model("tests.digits_net:build")
        _train(model.module, *pictures()["train"], model.contract)
    return model


def _train(network: torch.nn.Module, x: np.ndarray, y: np.ndarray, contract: InputContract) -> None:
    inputs, labels = torch.from_numpy(pixels_to_inputs(x, contract)), torch.from_numpy(y)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    network.train()
    for _ in range(4):
        for rows in torch.split(torch.randperm(len(inputs), generator=generator), 60):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()


def network() -> DigitsNet:
    module = loaded().module
    assert isinstance(module, DigitsNet)
    return module


@functools.cache
def fresh_artifact() -> Artifact:
    """Two exits with untrained convolutional heads: their norms have statistics, which training and its interruption must keep."""
    model = loaded()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = exitify.transform(model.module, model.example, exits=EXITS, head="conv", source=model.source)
    return exitify.export(program, contract=model.contract, heads_trained=False)


@functools.cache
def artifact_without_exits() -> Artifact:
    model = loaded()
    return exitify.export(exitify.transform(model.module, model.example, exits="none"), contract=model.contract)


@functools.cache
def samples_of(part: str) -> Samples:
    """A part of the pictures as labelled samples."""
    path = Path(_folder()) / f"{part}.npz"
    return load_samples(str(write_npz(path, part)), loaded().contract, classes=10)


@functools.cache
def _folder() -> str:
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="exitify-digits-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def trained_artifact() -> Artifact:
    """The same with trained heads and no profile."""
    with torch.random.fork_rng():
        trained, _ = train_heads(fresh_artifact(), samples_of("train"), OPTIONS, work=Path(_folder()) / "work", threads=1)
    return trained


def profile(artifact: Artifact, thresholds: dict[str, float]) -> Profile:
    """A profile by hand: exits not named are off."""
    exits = {point.name: ExitSetting(point.name in thresholds, thresholds.get(point.name, 2.0), 1.0) for point in artifact.plan.exits}
    promise = Promise("max-drop", 0.0, 0.0, True, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
    return Profile(artifact.manifest.model_id, "top1", exits, 1.0, "", promise, "onnxruntime", "")
