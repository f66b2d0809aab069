"""A CIFAR-10 ResNet with exits, skip paths and heads that are trained again: compiled here, run on the Orin's processor as QEMU emulates it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import exitify
from examples.cifar_resnet56.model import resnet20
from exitify.artifact.artifact import HEADS_FILE, Artifact, target_path
from exitify.artifact.manifest import InputContract, Preprocess
from exitify.calibration.calibrate import confidence_of
from exitify.data import load_samples
from exitify.lower.pipeline import compile_artifact
from exitify.plan import mask_text
from exitify.runtime.session import Session
from exitify.targets import load_target, processor
from exitify.train.heads import HeadTraining, train_heads
from exitify.train.norms import reestimate_norms
from tests.artifacts import profile_for
from tests.compiled import thresholds
from tests.emulator import EmulatedPython

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(processor.architecture() != "x86_64", reason="what is foreign here is another machine's own"),
]

IMAGES = 200
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GENERIC, HALF = "aarch64-cpu", "agx-orin-64gb.fp16"
BEFORE, AFTER = "before.exitify", "after.exitify"
"""The network, and the same with its heads trained again on other images: with the libraries of the first."""

ANSWER = """
import json, sys
import numpy as np
from exitify import Session
x = np.load(sys.argv[1])
found = []
for path, engine, profile, mask in json.loads(sys.argv[2]):
    session = Session.load(path, engine=engine, profile=profile)
    answers = [session.run(row, mask or None) for row in x]
    found.append([[answer.exit, answer.label, answer.logits.astype(float).tolist()] for answer in answers])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class There:
    """What the emulated processor said of each image: `(exit, label, logits)`, by artifact, engine, profile and mask."""

    folder: Path
    x: np.ndarray
    said: dict[tuple[str, str, str, str], list[Any]]

    def open(self, name: str) -> Artifact:
        return Artifact.open(self.folder / name)


def network(x: np.ndarray, weights: Path) -> Artifact:
    """ResNet-20 with trained weights, exits and skip paths; the second set of its norms re-estimated on images, its heads fresh."""
    model = resnet20().eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    program = exitify.transform(model, torch.zeros(1, 3, 32, 32), exits="layer2.2,layer3.0,layer3.1", skips="auto", head="linear")
    scaled = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    reestimate_norms(program, scaled.split(100))
    contract = InputContract((3, 32, 32), preprocess=Preprocess(mean=MEAN, std=STD), classes=CLASSES)
    return exitify.export(program, contract=contract, heads_trained=False)


@pytest.fixture(scope="module")
def there(orin: EmulatedPython, aarch64_linker: list[str], data_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> There:
    assert aarch64_linker
    folder = tmp_path_factory.mktemp("there")
    with np.load(data_file("cifar10.npz")) as cifar:
        for name, part, rows in (
            ("train", "train", slice(5000)),
            ("again", "train", slice(5000, 8000)),
            ("shown", "test", slice(IMAGES)),
        ):
            np.savez(folder / f"{name}.npz", x=cifar[f"x_{part}"][rows], y=cifar[f"y_{part}"][rows])
        artifact = network(cifar["x_train"][:1000], data_file("weights/cifar10_resnet20_akamaster.safetensors"))
    contract = artifact.manifest.input
    train, again, images = (load_samples(str(folder / f"{name}.npz"), contract, classes=10) for name in ("train", "again", "shown"))
    x = images.inputs(np.arange(IMAGES))
    np.save(folder / "x.npy", x)
    trained, _ = train_heads(artifact, train, HeadTraining(epochs=6, copies=1), work=folder / "work")
    for board, precision in ((GENERIC, "fp32"), ("agx-orin-64gb", "fp16"), ("host", "fp32")):
        trained = compile_artifact(trained, load_target(board), precision=precision)  # type: ignore[arg-type]
    again_trained, _ = train_heads(trained, again, HeadTraining(epochs=3, copies=1, seed=1), work=folder / "work")
    unskipped, skipped = mask_text(trained.plan.mask(None)), mask_text(trained.plan.mask("all"))
    for name, made in ((BEFORE, trained), (AFTER, again_trained)):
        made.with_profile("default", replace(profile_for(made, thresholds(made, x)), skip=unskipped)).save(folder / name)
    questions = [
        [(BEFORE, f"tvm:{GENERIC}", "default", ""), (AFTER, f"tvm:{GENERIC}", "default", ""), (BEFORE, f"tvm:{GENERIC}", "none", skipped)],
        [(BEFORE, f"tvm:{HALF}", "default", ""), (AFTER, f"tvm:{HALF}", "none", skipped)],
    ]
    with ThreadPoolExecutor() as both:
        found = both.map(lambda asked: ask(orin, folder, asked), questions)
    return There(folder, x, {question: said for answers in found for question, said in answers.items()})


def ask(orin: EmulatedPython, folder: Path, questions: list[tuple[str, str, str, str]]) -> dict[tuple[str, str, str, str], Any]:
    """One process on the emulated processor for all of these."""
    asked = json.dumps([(str(folder / name), *rest) for name, *rest in questions])
    done = orin.run("-c", ANSWER, folder / "x.npy", asked, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(zip(questions, json.loads(done.stdout)))


def scores(artifact: Artifact, logits: dict[str, np.ndarray], profile: str) -> dict[str, np.ndarray]:
    """What the profile holds against each exit's threshold, one an image."""
    made = artifact.profile(profile)
    return {name: confidence_of(logits[name].astype(np.float64) / setting.temperature, made.policy) for name, setting in made.exits.items()}


def test_exits_and_logits_are_this_machines(there: There) -> None:
    """In float32: the same exit unless a score lies within 1e-4 of its threshold, logits within 1e-4 of their largest."""
    for (name, engine, profile, mask), found in there.said.items():
        if engine.endswith(HALF):
            continue
        artifact = there.open(name)
        for here in ("tvm:host", "onnxruntime"):
            session = Session(artifact, engine=here, profile=profile)
            logits = session.record(there.x, mask or None).logits
            sure = scores(artifact, logits, profile) if profile != "none" else {}
            answers = [session.run(row, mask or None) for row in there.x]
            assert profile == "none" or len({answer.exit for answer in answers}) > 1
            for i, ((exit_, label, said), answer) in enumerate(zip(found, answers)):
                if exit_ != answer.exit:
                    parted = min((exit_, answer.exit), key=artifact.plan.exit_names.index)
                    assert abs(sure[parted][i] - artifact.profile(profile).exits[parted].threshold) < 1e-4
                    continue
                assert np.abs(np.array(said) - answer.logits).max() <= 1e-4 * np.abs(answer.logits).max()
                assert label == answer.label


def test_float16_answers_as_float32_does(there: There) -> None:
    """The same exit's logits within 1e-2 of their largest, and at least 99.5 % of the answers the same."""
    for (name, engine, profile, mask), found in there.said.items():
        if not engine.endswith(HALF):
            continue
        session = Session(there.open(name), engine="onnxruntime", profile=profile)
        answers = [session.run(row, mask or None) for row in there.x]
        assert np.mean([label == answer.label for (_, label, _), answer in zip(found, answers)]) >= 0.995
        for (exit_, _, said), answer in zip(found, answers):
            if exit_ == answer.exit:
                assert 0 < np.abs(np.array(said) - answer.logits).max() <= 1e-2 * np.abs(answer.logits).max()


def test_heads_trained_again_keep_their_libraries_and_answer_otherwise(there: There) -> None:
    before, after = there.open(BEFORE), there.open(AFTER)
    for target in (GENERIC, HALF):
        path = target_path(target, "library.so")
        assert bytes(before.files[path]) == bytes(after.files[path])
    assert bytes(before.files[HEADS_FILE]) != bytes(after.files[HEADS_FILE])
    first, second = (there.said[name, f"tvm:{GENERIC}", "default", ""] for name in (BEFORE, AFTER))
    early = [(a, b) for a, b in zip(first, second) if a[0] == b[0] != "final"]
    assert early
    assert all(a[2] != b[2] for a, b in early)
