"""What heads learn from: gates with them, class means; and recordings that serve several trainings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import exitify
from exitify.artifact.artifact import HEADS_FILE, Artifact, build_artifact
from exitify.errors import DataError, PlanError
from exitify.runtime.answers import Recording
from exitify.runtime.session import Session
from exitify.train import heads as training
from exitify.train.heads import HeadTraining, train_heads
from tests import digits

PLACES = "stage1,stage2"


def fresh(head: str = "conv16", cascade: str = "none", exits: str = PLACES, seed: int = 0) -> Artifact:
    torch.manual_seed(seed)
    x = torch.zeros(1, *digits.loaded().contract.shape)
    program = exitify.transform(digits.network(), x, exits=exits, head=head, cascade=cascade)
    return exitify.export(program, contract=digits.loaded().contract, heads_trained=False)


def train(artifact: Artifact, work: Path, options: HeadTraining, **given: bool) -> Artifact:
    return train_heads(artifact, digits.samples_of("train"), options, work=work, threads=1, **given)[0]


JEI = HeadTraining(epochs=6, copies=1, batch=50, method="jei", cost_weight=0.5)


def test_jei_trains_a_gate_an_exit_and_the_artifact_keeps_them(tmp_path: Path) -> None:
    trained = train(fresh(), tmp_path, JEI)
    gates = trained.manifest.gates
    assert list(gates) == ["exit1", "exit2"]
    assert all(len(gate) == 5 and np.isfinite(gate).all() for gate in gates.values())
    again = Artifact.open(trained.save(tmp_path / "net.exitify"))
    assert again.manifest.gates == gates
    assert digits.trained_artifact().manifest.gates == {}


def test_a_gate_opens_where_its_head_is_right(tmp_path: Path) -> None:
    """What it has learnt: among samples that a head gets right it opens far more often than among the others."""
    trained = train(fresh(), tmp_path, JEI)
    samples = digits.samples_of("test")
    logits = Session(trained).record(samples.inputs(slice(0, len(samples)))).logits["exit2"]
    powers = np.exp(logits - logits.max(1, keepdims=True))
    p = powers / powers.sum(1, keepdims=True)
    q = p**2 / (p**2).sum(1, keepdims=True)
    top = np.sort(p, axis=1)
    features = np.stack([top[:, -1], -(p * np.log(p + 1e-30)).sum(1), top[:, -1] - top[:, -2], -(q * np.log(q + 1e-30)).sum(1)], 1)
    *weights, bias = trained.manifest.gates["exit2"]
    g = 1 / (1 + np.exp(-(features @ weights + bias)))
    right = logits.argmax(1) == samples.labels
    assert 0.5 < right.mean() < 1.0
    assert (g[right][:, None] > g[~right]).mean() > 0.8


def test_an_interrupted_jei_training_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(fresh(), tmp_path / "a", JEI)
    epoch = training._train_epoch
    count = 0

    def interrupted(*given: object, **named: object) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        epoch(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), tmp_path / "b", JEI)
    again = train(fresh(), tmp_path / "b", JEI)
    assert bytes(again.files[HEADS_FILE]) == bytes(whole.files[HEADS_FILE])


def class_means(work: Path) -> tuple[Artifact, np.ndarray, Recording]:
    """An artifact of class means, the rows that they are of, and what it says of all training samples."""
    options = HeadTraining(copies=1, augmentation="none", method="class-means")
    trained = train(fresh("linear"), work, options)
    samples = digits.samples_of("train")
    return trained, training._split(samples, options)[0], Session(trained).record(samples.inputs(slice(0, len(samples))))


def test_class_means_are_the_nearest_mean_of_the_features(tmp_path: Path) -> None:
    trained, rows, recorded = class_means(tmp_path)
    samples = digits.samples_of("train")
    for point in trained.plan.exits:
        z = recorded.features[point.name]
        means = np.stack([z[rows][samples.labels[rows] == c].mean(0) for c in range(10)])
        nearest = ((z[:, None] - means[None]) ** 2).sum(2).argmin(1)
        assert (recorded.logits[point.name].argmax(1) == nearest).mean() > 0.99  # features were recorded in float16
    accuracy = (recorded.logits["exit2"].argmax(1) == samples.labels).mean()
    assert accuracy > 0.5


def test_class_means_give_the_probabilities_of_equal_normal_distributions_around_them(tmp_path: Path) -> None:
    _, rows, recorded = class_means(tmp_path)
    z, labels = recorded.features["exit2"][rows].astype(np.float64), digits.samples_of("train").labels[rows]
    means = np.stack([z[labels == c].mean(0) for c in range(10)])
    variance = ((z - means[labels]) ** 2).mean()
    density = -((z[:, None] - means[None]) ** 2).sum(2) / (2 * variance)
    expected = np.exp(density - density.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    logits = recorded.logits["exit2"][rows]
    found = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), expected, atol=0.02)  # features were recorded in float16


def test_gates_need_an_epoch_after_the_warm_up(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="one epoch is all warm-up"):
        train(fresh(), tmp_path, replace(JEI, epochs=1))


def test_what_others_wait_for_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings share a recording; one that is interrupted goes on after the other has ended."""
    quick = HeadTraining(epochs=2, copies=1, batch=100)
    whole = train(fresh(), tmp_path / "alone", quick)
    epoch = training._train_epoch

    def interrupted(*given: object, **named: object) -> None:
        if given[-1] == 1:
            raise KeyboardInterrupt
        epoch(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), tmp_path / "both", quick)
    monkeypatch.setattr(training, "_train_epoch", epoch)
    train(fresh("conv16", "identity"), tmp_path / "both", quick)
    (folder,) = (tmp_path / "both").iterdir()
    assert len(list(folder.glob("checkpoint-*.pt"))) == 1
    assert bytes(train(fresh(), tmp_path / "both", quick).files[HEADS_FILE]) == bytes(whole.files[HEADS_FILE])
    assert not list((tmp_path / "both").iterdir())


def test_pictures_that_become_other_inputs_are_recorded_anew(tmp_path: Path) -> None:
    quick = HeadTraining(epochs=1, copies=1, batch=100)
    artifact = fresh()
    train(artifact, tmp_path, quick, keep_recorded=True)
    contract = artifact.manifest.input
    assert contract.preprocess is not None
    other = replace(artifact.manifest, input=replace(contract, preprocess=replace(contract.preprocess, mean=(0.9,))))
    train(build_artifact(other, artifact.files), tmp_path, quick, keep_recorded=True)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("head", "cascade"), [("conv16", "none"), ("linear", "identity")])
def test_class_means_for_other_heads_are_refused_by_name(tmp_path: Path, head: str, cascade: str) -> None:
    with pytest.raises(PlanError, match="class means make linear heads, and exit") as refused:
        train(fresh(head, cascade), tmp_path, HeadTraining(method="class-means"))
    assert "--head linear" in str(refused.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_class_without_samples_has_no_mean(tmp_path: Path) -> None:
    samples = digits.samples_of("train")
    nine = samples.subset(np.flatnonzero(samples.labels != 4))
    with pytest.raises(DataError, match="class 4 has no samples"):
        train_heads(fresh("linear"), nine, HeadTraining(copies=1, method="class-means"), work=tmp_path, threads=1)


def test_an_unknown_method_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no way to train heads called 'magic'") as refused:
        train(fresh(), tmp_path, replace(JEI, method="magic"))  # type: ignore[arg-type]
    assert "distillation, jei, class-means" in str(refused.value.hint)


def test_what_was_recorded_serves_other_weights_and_methods_of_heads_at_the_same_places(tmp_path: Path) -> None:
    quick = HeadTraining(epochs=2, copies=1, batch=100)
    as_jei = replace(quick, method="jei")
    others = fresh("conv16", seed=1)
    alone = train(others, tmp_path / "alone", as_jei)
    train(fresh(), tmp_path / "shared", quick, keep_recorded=True)
    (folder,) = (tmp_path / "shared").iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".features"}
    names = {path.name for path in folder.iterdir()}
    both = train(others, tmp_path / "shared", as_jei, keep_recorded=True)
    assert list((tmp_path / "shared").iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == names
    assert bytes(both.files[HEADS_FILE]) == bytes(alone.files[HEADS_FILE])


def test_other_places_or_pools_are_recorded_anew(tmp_path: Path) -> None:
    quick = HeadTraining(epochs=1, copies=1, batch=100)
    train(fresh(), tmp_path, quick, keep_recorded=True)
    train(fresh("linear"), tmp_path, quick, keep_recorded=True)
    train(fresh(exits="stage2,stage3"), tmp_path, quick, keep_recorded=True)
    assert len(list(tmp_path.iterdir())) == 3
