"""What the pages take for granted: a trained model, pictures, an artifact and what a device has learnt, by the names that the pages use."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import exitify
from exitify.adapt.report import adapt
from exitify.adapt.session import LearningSession
from exitify.adapt.stream import open_stream
from exitify.data import load_samples
from exitify.models import LoadedModel, load_model
from exitify.pictures import pixels_to_inputs
from exitify.train.heads import HeadTraining
from tests.cli import console
from tests.conftest import cannot_emulate
from tests.documents.blocks import Block

SIZES = {"train": 160, "held_out": 700, "unseen": 100, "camera": 300}
"""Of 1,797 digits. A promise of a point of accuracy needs 684 held-out ones."""
SMALL = "my_model:build"
LARGE = {"torchvision:resnet18": SMALL}
"""Networks that take long, and what stands in for them where time is short."""
PROGRAMS = ("exitify", "python", "torchrun")
"""What a shell block may call."""


@functools.cache
def made() -> Path:
    """A folder with everything in it, made once a process and copied for each page."""
    folder = Path(tempfile.mkdtemp(prefix="exitify-documents-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(Path(__file__).parent / "my_model.py", folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _fill(folder)
    finally:
        os.chdir(before)
        sys.modules.pop("my_model", None)
    return folder


def _fill(folder: Path) -> None:
    model = load_model(SMALL)
    pictures = _digits()
    for name, (x, y) in pictures.items():
        for i, (picture, label) in enumerate(zip(x, y)):
            place = folder / name / ("" if name == "camera" else model.contract.classes[label])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i:03}.png")
    x, y = pictures["unseen"]
    for name in ("picture.png", "picture.jpg"):
        Image.fromarray(x[0]).save(folder / name)
    arrays = {f"{kind}_{part}": rows for part, name in (("train", "train"), ("test", "held_out")) for kind, rows in zip("xy", pictures[name])}
    np.savez(folder / "digits.npz", **arrays)
    inputs = pixels_to_inputs(x[..., None], model.contract)
    np.save(folder / "images.npy", np.repeat(inputs, 3, axis=0))
    np.save(folder / "frames.npy", np.repeat(inputs[:5], 4, axis=0))

    _train(model, *pictures["train"])
    save_file(model.module.state_dict(), folder / "my_model.safetensors")
    shutil.copy(folder / "my_model.safetensors", folder / "resnet18.safetensors")
    dimensions = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model.module, (torch.zeros(2, *model.contract.shape),), dynamic_shapes=dimensions), folder / "model.pt2")

    program = exitify.transform(model.module, model.example, exits="layer1,layer2,layer3", source=SMALL)
    artifact = exitify.export(program, contract=model.contract, heads_trained=False)
    artifact, _ = exitify.train_heads(artifact, load_samples("train", model.contract, classes=10), HeadTraining(epochs=10, copies=2, batch=20))
    artifact = exitify.calibrate(artifact, load_samples("held_out", model.contract, classes=10), max_drop=0.03)
    artifact.save(folder / "net.exitify")

    session = LearningSession(artifact, in_background=False, seed=0)
    adapt(session, open_stream("camera", model.contract), save_to=folder / "device.state")
    for name in ("a.state", "b.state"):
        shutil.copy(folder / "device.state", folder / name)


def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Grey pictures of 32x32 bytes and labels, in parts that share none."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the pages' pictures are scikit-learn's digits: pip install 'exitify[demo]'")
    scans = datasets.load_digits()
    x = np.kron(scans.images * 15, np.ones((1, 4, 4))).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.split(order, np.cumsum(list(SIZES.values())))
    return {name: (x[rows], scans.target[rows].astype(np.int64)) for name, rows in zip(SIZES, parts)}


def _train(model: LoadedModel, x: np.ndarray, y: np.ndarray) -> None:
    network, inputs, labels = model.module, torch.from_numpy(pixels_to_inputs(x[..., None], model.contract)), torch.from_numpy(y)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    network.train()
    for _ in range(12):
        for rows in torch.split(torch.randperm(len(inputs)), 50):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()


class World:
    """One page's copy of it: files in the current directory, names in a scope, and a way to run the page's blocks there.

    torchvision: To run commands with its networks as they stand, but for two epochs; without it a small network stands in for them.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, torchvision: ModuleType | None = None) -> None:
        shutil.copytree(made(), folder, dirs_exist_ok=True)
        if torchvision is not None:
            save_file(torchvision.models.resnet18().state_dict(), folder / "resnet18.safetensors")
            np.save(folder / "frames.npy", np.repeat(np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32), 3, axis=0))
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.folder, self.is_large, self.scope = folder, torchvision is not None, _scope()

    def close(self) -> None:
        """Forget the modules that came from the folder."""
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}{os.sep}"):
                del sys.modules[name]

    def run(self, block: Block) -> None:
        """Run a block, or write the file that it is; a failure names page and line."""
        if block.file:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")  # tracebacks show the page's own lines
            with self._process_group() if "DistributedDataParallel" in block.text else contextlib.nullcontext():
                exec(code, self.scope)
        else:
            for words in block.commands():
                self._command(words, block.place)

    @contextlib.contextmanager
    def _process_group(self) -> Iterator[None]:
        """A group of this process alone, as `torchrun` makes one of several."""
        torch.distributed.init_process_group("gloo", init_method=f"file://{self.folder}/group", rank=0, world_size=1)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Grad strides do not match")  # DistributedDataParallel's, of a 1x1 convolution: it could be faster
                yield
        finally:
            torch.distributed.destroy_process_group()

    def _command(self, words: list[str], place: str) -> None:
        if self.is_large and words[:2] == ["exitify", "train"]:
            words = [*words, "--epochs", "2"]
        elif not self.is_large:
            words = [LARGE.get(word, word) for word in words]
        program, *arguments = words
        if program == "exitify":
            done = console.exitify(*arguments, folder=self.folder)
            if done.code == 1 and "no linker for" in done.err:
                cannot_emulate(done.err)
            assert done.code == 0, f"{place}: {' '.join(words)}\n{done.out}{done.err}"
            return
        assert program in PROGRAMS, f"{place}: {program} is not one of {', '.join(PROGRAMS)}; mark the block as not run"
        command = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *arguments]
        there = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False)
        assert there.returncode == 0, f"{place}: {' '.join(words)}\n{there.stdout}{there.stderr}"


def _scope() -> dict[str, Any]:
    """Names that pages use and do not make."""
    model = load_model(SMALL, weights=Path("my_model.safetensors"))
    train, held_out = (load_samples(part, model.contract, classes=10) for part in ("train", "held_out"))
    spread = slice(None, None, 20)
    x, y = torch.from_numpy(train.inputs(spread)), torch.from_numpy(train.labels[spread])
    network = exitify.transform(model.module, model.example, exits="layer1,layer2,layer3")
    return {
        "onnxruntime": onnxruntime,
        "torch": torch,
        "zipfile": zipfile,
        "exitify": exitify,
        "artifact": exitify.Artifact.open("net.exitify"),
        "model": model.module,
        "network": model.module,
        "example": model.example,
        "net": network,
        "contract": model.contract,
        "train": train,
        "held_out": held_out,
        "loader": [(x, y)],
        "images": x,
        "labels": y,
        "train_images": [x],
        "optimizer": torch.optim.SGD(network.parameters(), 0.01),
        "camera": held_out.inputs(slice(3)),
        "picture": held_out.inputs([0]),
        "x": held_out.inputs([0]),
        "y": y,
        "step": 1,
        "steps": 10,
    }
