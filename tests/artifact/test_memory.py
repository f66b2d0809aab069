"""What an artifact remembers of calibration samples: read as it was written, of every class alike, and nothing else accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact, build_artifact, parse_artifact
from exitify.artifact.memory import MEMORY_FILE, Memory, remember, write_memory
from exitify.artifact.tensors import read_tensors, write_tensors
from tests.artifact.clauses import refused
from tests.artifact.packing import files_of, packed
from tests.artifacts import exported


def memory_for(artifact: Artifact, count: int = 12) -> Memory:
    random, plan = np.random.default_rng(0), artifact.plan
    features = {point.name: random.random((count, point.head.width)).astype(np.float16) for point in plan.exits}
    logits = random.standard_normal((count, plan.classes)).astype(np.float16)
    return Memory(features, logits, (np.arange(count) % plan.classes).astype(np.int32))


@pytest.fixture
def artifact() -> Artifact:
    return exported("identity")[1]


def test_what_is_remembered_is_read_again(artifact: Artifact) -> None:
    memory = memory_for(artifact)
    again = parse_artifact(packed(files_of(artifact.with_memory(memory)))).memory
    assert again is not None
    assert again.features.keys() == memory.features.keys()
    assert all(np.array_equal(again.features[name], memory.features[name]) for name in memory.features)
    assert np.array_equal(again.logits, memory.logits)
    assert np.array_equal(again.labels, memory.labels)
    assert artifact.memory is None


def test_every_class_is_remembered_alike_within_the_bytes_allowed() -> None:
    random = np.random.default_rng(1)
    labels = np.concatenate([np.zeros(3000, np.int64), np.ones(40, np.int64), np.full(9000, 2)])
    random.shuffle(labels)
    features = {"exit1": random.random((len(labels), 512)).astype(np.float16)}
    logits = random.standard_normal((len(labels), 3)).astype(np.float32)
    logits[np.flatnonzero(labels == 1)[0]] = np.nan
    memory = remember(features, logits, labels, weights=0)
    counts = np.bincount(memory.labels)
    assert counts[1] == 39
    assert abs(int(counts[0]) - int(counts[2])) <= 1
    assert 2**21 - 4096 < sum(array.nbytes for array in memory.features.values()) + memory.logits.nbytes + memory.labels.nbytes <= 2**21
    assert len(remember(features, logits, labels, weights=2**30)) == len(labels) - 1


def change(edit: Callable[[dict[str, np.ndarray]], object], artifact: Artifact) -> Artifact:
    tensors = dict(read_tensors(memoryview(write_memory(memory_for(artifact), artifact.manifest.model_id)), MEMORY_FILE))
    edit(tensors)
    return parse_artifact(packed(files_of(build_artifact(artifact.manifest, {**artifact.files, MEMORY_FILE: write_tensors(tensors)}))))


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.pop("exit1.z"),
        lambda tensors: tensors.pop("labels"),
        lambda tensors: tensors.update(more=np.zeros(3, np.float32)),
        lambda tensors: tensors.update({"exit1.z": tensors["exit1.z"].astype(np.float32)}),
        lambda tensors: tensors.update({"exit1.z": tensors["exit1.z"][:, 1:]}),
        lambda tensors: tensors.update({"final.logits": tensors["final.logits"][1:]}),
        lambda tensors: tensors.update({name: array[:0] for name, array in tensors.items() if name != "model_id"}),
    ],
    ids=["no exit", "no labels", "more", "float32", "narrow", "fewer", "none"],
)
def test_other_tensors_are_refused(artifact: Artifact, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    with refused("memory.safetensors has the tensors listed and no others, of one sample or more", match="does not hold the tensors"):
        change(edit, artifact)


def test_the_memory_of_another_network_is_refused(artifact: Artifact) -> None:
    with refused("memory.safetensors has this artifact's model_id", match="was made for another network"):
        change(lambda tensors: tensors.update(model_id=np.zeros(32, np.uint8)), artifact)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(artifact: Artifact, number: float) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["exit1.z"] = np.full_like(tensors["exit1.z"], number)

    with refused("in memory.safetensors labels are classes and all numbers are finite", match="a number that is not finite"):
        change(edit, artifact)


@pytest.mark.parametrize("label", [-1, 10_000])
def test_labels_that_are_no_classes_are_refused(artifact: Artifact, label: int) -> None:
    with refused("in memory.safetensors labels are classes and all numbers are finite", match="a label that is no class"):
        change(lambda tensors: tensors.update(labels=np.full_like(tensors["labels"], label)), artifact)
