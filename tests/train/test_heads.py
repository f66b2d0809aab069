"""Training heads from the artifact alone, on a small real task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact
from exitify.calibration.calibrate import record_outputs
from exitify.data import load_samples
from exitify.errors import DataError, PlanError
from exitify.files import NotWritten
from exitify.plan import FINAL
from exitify.train import heads as training
from exitify.train.heads import HeadReport, HeadTraining, load_heads, train_heads
from exitify.train.record import FeatureFile, record
from tests import digits

QUICK = HeadTraining(epochs=3, copies=2, batch=100)


def content(artifact: Artifact) -> dict[str, bytes]:
    return {path: bytes(data) for path, data in artifact.files.items()}


def train(work: Path, options: HeadTraining = QUICK, **given: Any) -> tuple[Artifact, list[HeadReport]]:
    return train_heads(digits.fresh_artifact(), given.pop("samples", digits.samples_of("train")), options, work=work, threads=1, **given)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[HeadReport]]:
    """A quick training from start to end."""
    return train(tmp_path_factory.mktemp("undisturbed"))


# --- what comes of it


def test_trained_heads_know_what_fresh_ones_do_not() -> None:
    fresh, trained = (record_outputs(artifact, digits.samples_of("test")) for artifact in (digits.fresh_artifact(), digits.trained_artifact()))
    chance = (fresh.logits.argmax(axis=2) == fresh.labels).mean(axis=1)
    accuracy = (trained.logits.argmax(axis=2) == trained.labels).mean(axis=1)
    assert max(chance[:2]) < 0.3
    assert accuracy[0] > 0.7
    assert accuracy[1] > 0.9
    assert accuracy[2] == chance[2]


def test_the_network_itself_is_the_same_to_the_byte() -> None:
    fresh, trained = content(digits.fresh_artifact()), content(digits.trained_artifact())
    assert list(fresh) == list(trained)
    assert {path for path in fresh if fresh[path] != trained[path]} == {HEADS_FILE}
    statistics = [name for name in digits.fresh_artifact().tensors(WEIGHTS_FILE) if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 8  # of the four norms: they are among the bytes compared


def test_every_tensor_of_every_head_is_trained() -> None:
    fresh, trained = digits.fresh_artifact().tensors(HEADS_FILE), digits.trained_artifact().tensors(HEADS_FILE)
    assert list(fresh) == list(trained)
    assert len(fresh) == 2 * 14  # two convolutions, two norms of five tensors, and a classifier
    assert [name for name in fresh if np.array_equal(fresh[name], trained[name])] == []
    assert all(np.isfinite(tensor).all() for tensor in trained.values())


def test_the_artifact_says_that_its_heads_are_trained_and_what_it_is_now() -> None:
    fresh, trained = digits.fresh_artifact().manifest, digits.trained_artifact().manifest
    assert (fresh.heads_trained, trained.heads_trained) == (False, True)
    assert fresh.plan == trained.plan
    assert fresh.model_id != trained.model_id  # profiles bind to it


def test_a_trained_artifact_is_read_again(tmp_path: Path) -> None:
    path = digits.trained_artifact().save(tmp_path / "net.exitify")
    assert content(Artifact.open(path)) == content(digits.trained_artifact())


def test_profiles_are_dropped(tmp_path: Path) -> None:
    calibrated = digits.fresh_artifact().with_profile("old", digits.profile(digits.fresh_artifact(), {"exit1": 0.5}))
    trained, _ = train_heads(calibrated, digits.samples_of("train"), replace(QUICK, epochs=1), work=tmp_path, threads=1)
    assert trained.profiles == {}
    assert list(calibrated.profiles) == ["old"]


def test_a_report_says_how_good_each_head_is_on_samples_set_aside(undisturbed: tuple[Artifact, list[HeadReport]]) -> None:
    trained, reports = undisturbed
    samples = digits.samples_of("train")
    _, held_out = training._split(samples, QUICK)
    outputs = record_outputs(trained, samples.subset(held_out))
    accuracy = (outputs.logits.argmax(axis=2) == outputs.labels).mean(axis=1)
    assert [report.exit for report in reports] == ["exit1", "exit2"]
    # Features are stored in float16: an answer whose two largest scores are equal to three digits may turn.
    assert [report.accuracy for report in reports] == pytest.approx(accuracy[:2].tolist(), abs=1.5 / len(held_out))


def test_a_head_is_kept_as_it_was_after_the_epoch_with_the_least_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([{"exit1": 2.0, "exit2": 9.0}, {"exit1": 1.0, "exit2": 8.0}, {"exit1": 1.5, "exit2": 7.0}])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(heads: Any, *_: Any) -> dict[str, tuple[float, float]]:
        seen.append({name: head.classifier.weight.detach().clone() for name, head in heads.modules.items()})
        return {name: (loss, len(seen) / 10) for name, loss in next(losses).items()}

    monkeypatch.setattr(training, "_evaluate", evaluate)
    trained, reports = train(tmp_path)
    assert reports == [HeadReport("exit1", 0.2, 1), HeadReport("exit2", 0.3, 2)]
    tensors = trained.tensors(HEADS_FILE)
    for name, epoch in (("exit1", 1), ("exit2", 2)):
        np.testing.assert_array_equal(tensors[trained.plan.exit(name).weight], seen[epoch][name].numpy())
    assert not torch.equal(seen[1]["exit1"], seen[2]["exit1"])


# --- the same again


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, undisturbed: tuple[Artifact, list[HeadReport]]) -> None:
    again, reports = train(tmp_path)
    assert content(again) == content(undisturbed[0])
    assert reports == undisturbed[1]


def test_another_seed_gives_other_heads(tmp_path: Path, undisturbed: tuple[Artifact, list[HeadReport]]) -> None:
    other, _ = train(tmp_path, replace(QUICK, seed=1))
    assert content(other)[HEADS_FILE] != content(undisturbed[0])[HEADS_FILE]


def test_torchs_own_generator_decides_nothing(tmp_path: Path, undisturbed: tuple[Artifact, list[HeadReport]]) -> None:
    torch.manual_seed(12345)
    trained, _ = train(tmp_path)
    assert content(trained) == content(undisturbed[0])


def test_torchs_threads_are_put_back_also_after_an_interruption(tmp_path: Path) -> None:
    before, during = torch.get_num_threads(), []

    def progress(text: str, done: int, _total: int) -> None:
        if text == "training heads":
            during.append(torch.get_num_threads())
            if done == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_heads(digits.fresh_artifact(), digits.samples_of("train"), QUICK, work=tmp_path, threads=before + 1, progress=progress)
    assert during == [before + 1] * 2
    assert torch.get_num_threads() == before


# --- interrupted


def interrupt(stage: str, done: int) -> Callable[[str, int, int], None]:
    """A progress callback that presses Ctrl-C there."""

    def progress(text: str, now: int, _total: int) -> None:
        if text == stage and now == done:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        ("recording features (train-0)", 0),
        ("recording features (train-0)", 500),
        ("recording features (train-1)", 250),
        ("recording features (validation)", 0),
        ("training heads", 0),
        ("training heads", 2),
        ("training heads", 3),
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Artifact, list[HeadReport]], stage: str, done: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt(stage, done))
    first: dict[str, int] = {}
    resumed, reports = train(tmp_path, progress=lambda text, now, _: first.setdefault(text, now) and None)
    assert first[stage] == done  # what was done is not done again
    assert content(resumed) == content(undisturbed[0])
    assert reports == undisturbed[1]


def test_a_recording_that_broke_off_inside_a_block_goes_on_before_it(tmp_path: Path, undisturbed: tuple[Artifact, list[HeadReport]]) -> None:
    """As when the machine loses power: the file ends anywhere."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt("recording features (train-1)", 0))
    (file,) = tmp_path.rglob("train-0.features")
    row_bytes = file.stat().st_size // 810
    with open(file, "r+b") as stream:
        stream.truncate(row_bytes * 600 + 7)
    first: dict[str, int] = {}
    resumed, _ = train(tmp_path, progress=lambda text, now, _: first.setdefault(text, now) and None)
    assert first["recording features (train-0)"] == 500
    assert content(resumed) == content(undisturbed[0])


def test_another_rate_starts_anew_on_what_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt("training heads", 1))
    first: dict[str, int] = {}
    other = replace(QUICK, learning_rate=0.04)
    trained, _ = train(tmp_path, other, progress=lambda text, now, _: first.setdefault(text, now) and None)
    assert first["training heads"] == 0
    assert all(done > 0 for text, done in first.items() if text.startswith("recording"))
    assert content(trained) == content(train(tmp_path / "anew", other)[0])


def test_another_seed_records_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt("training heads", 1))
    first: dict[str, int] = {}
    train(tmp_path, replace(QUICK, seed=1), progress=lambda text, now, _: first.setdefault(text, now) and None)
    assert set(first.values()) == {0}
    assert len(list(tmp_path.iterdir())) == 1  # the interrupted one still waits


def test_the_artifact_is_saved_before_what_was_recorded_for_it_is_removed(tmp_path: Path) -> None:
    with pytest.raises(NotWritten):
        train(tmp_path / "work", save_to=tmp_path / "missing" / "net.exitify")
    assert list((tmp_path / "work").rglob("checkpoint-*.pt"))
    first: dict[str, int] = {}
    train(tmp_path / "work", save_to=tmp_path / "net.exitify", progress=lambda text, now, _: first.setdefault(text, now) and None)
    assert first["training heads"] > 0
    assert Artifact.open(tmp_path / "net.exitify").manifest.heads_trained
    assert not list((tmp_path / "work").iterdir())


def test_the_work_folder_is_empty_at_the_end(tmp_path: Path) -> None:
    train(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_the_default_work_folder_is_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    train_heads(
        digits.fresh_artifact(), digits.samples_of("train"), replace(QUICK, epochs=1), threads=1,
        progress=lambda *_: seen.append(Path("exitify-train").is_dir()),
    )  # fmt: skip
    assert all(seen)
    assert list(tmp_path.iterdir()) == []


# --- what is recorded


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> FeatureFile:
    """300 training pictures in a random order, not augmented: two blocks, the second not full."""
    heads = load_heads(digits.fresh_artifact())
    rows = np.random.default_rng(0).permutation(900)[:300]
    file = FeatureFile(tmp_path_factory.mktemp("recorded") / "file", rows, (32 * 64, 64 * 64), (0, 1), 10)
    record(digits.fresh_artifact(), heads, digits.samples_of("train"), file, "none", seed=0, threads=1, progress=lambda *_: None)
    return file


def read(file: FeatureFile, seed: int = 0, size: int = 128) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Features by exit, logits, and rows, all chunks together."""
    chunks = list(file.chunks(np.random.default_rng(seed), size))
    features = [torch.cat([chunk[0][number] for chunk in chunks]).numpy() for number in range(2)]
    return features, torch.cat([chunk[1] for chunk in chunks]).numpy(), np.concatenate([chunk[2] for chunk in chunks])


def test_what_heads_read_is_what_torch_computes(recorded: FeatureFile) -> None:
    features, logits, rows = read(recorded)
    network = digits.network()
    seen = {}
    hooks = [getattr(network, stage).register_forward_hook(lambda _m, _i, value, s=stage: seen.update({s: value})) for stage in ("stage2", "stage3")]
    try:
        with torch.no_grad():
            answer = network(torch.from_numpy(digits.samples_of("train").inputs(rows)))
    finally:
        for hook in hooks:
            hook.remove()
    np.testing.assert_allclose(logits, answer.numpy(), rtol=1e-4, atol=1e-4)
    for feature, stage in zip(features, ("stage2", "stage3"), strict=True):
        # float16 keeps 11 bits, 5e-4; another engine's float32 adds little.
        np.testing.assert_allclose(feature, seen[stage].flatten(1).numpy(), rtol=1e-3, atol=1e-3)


def test_every_row_comes_once_and_in_another_order_each_epoch(recorded: FeatureFile) -> None:
    (features, _, rows), (other_features, _, other_rows) = read(recorded, seed=0), read(recorded, seed=1)
    assert sorted(rows) == sorted(other_rows) == sorted(recorded.rows)
    assert rows.tolist() != other_rows.tolist()
    back = dict(zip(other_rows, other_features[1], strict=True))
    assert all(np.array_equal(feature, back[row]) for row, feature in zip(rows, features[1], strict=True))


def test_each_epoch_reads_the_next_copy_in_an_order_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, orders = FeatureFile.chunks, []

    def spy(file: FeatureFile, generator: np.random.Generator, *size: int) -> Iterator[tuple[Any, ...]]:
        for chunk in chunks(file, generator, *size):
            orders.append((file.path.stem, chunk[2].tolist()))
            yield chunk

    monkeypatch.setattr(FeatureFile, "chunks", spy)
    train(tmp_path, HeadTraining(epochs=4, copies=2, batch=250))
    trained_on = [(name, rows) for name, rows in orders if name != "validation"]
    assert [name for name, _ in trained_on] == ["train-0", "train-1", "train-0", "train-1"]
    assert len({tuple(rows) for _, rows in trained_on}) == 4
    assert len({tuple(sorted(rows)) for _, rows in trained_on}) == 1


def test_a_feature_file_has_the_size_it_names(recorded: FeatureFile) -> None:
    assert recorded.row_bytes == 2 * (32 * 64 + 64 * 64) + 4 * 10
    assert recorded.path.stat().st_size == 300 * recorded.row_bytes


def test_a_file_that_cannot_be_written_is_named_with_the_space_it_needs(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "missing" / "file", np.arange(10), (32 * 64, 64 * 64), (0, 1), 10)
    heads = load_heads(digits.fresh_artifact())
    with pytest.raises(DataError, match=r"cannot write .*missing/file: No such file") as caught:
        record(digits.fresh_artifact(), heads, digits.samples_of("train"), file, "none", seed=0, threads=1, progress=lambda *_: None)
    assert "GiB" in caught.value.hint


Recording = list[tuple[str, np.ndarray, str, int]]


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """What would be recorded: file name, rows, augmentation and seed of each call. Training is left out."""
    calls: Recording = []

    def spy(_a: Any, _h: Any, _s: Any, file: FeatureFile, how: str, *, seed: int, **_: Any) -> None:
        calls.append((file.path.stem, file.rows, how, seed))

    monkeypatch.setattr(training, "record", spy)
    monkeypatch.setattr(training, "_fit", lambda *_: ({}, []))
    return calls


def test_validation_samples_are_never_trained_on_nor_augmented(tmp_path: Path, recordings: Recording) -> None:
    train(tmp_path, HeadTraining(copies=3, augmentation="crop"))
    *copies, (name, held_out, how, _) = recordings
    assert (name, how, len(held_out)) == ("validation", "none", 90)
    assert [(name, how) for name, _, how, _ in copies] == [("train-0", "crop"), ("train-1", "crop"), ("train-2", "crop")]
    for _, rows, _, _ in copies:
        assert sorted([*rows, *held_out]) == list(range(900))
    assert len({seed for *_, seed in recordings}) == 4
    assert copies[0][1].tolist() != copies[1][1].tolist()


def test_no_more_copies_are_recorded_than_epochs_read_them(tmp_path: Path, recordings: Recording) -> None:
    train(tmp_path, HeadTraining(epochs=2, copies=5))
    assert [name for name, *_ in recordings] == ["train-0", "train-1", "validation"]


@pytest.mark.parametrize(("color", "how"), [("L", "crop"), ("RGB", "crop+flip")])
def test_auto_mirrors_pictures_in_colour_alone(tmp_path: Path, recordings: Recording, color: str, how: str) -> None:
    fresh = digits.fresh_artifact()
    manifest = replace(fresh.manifest, input=replace(fresh.manifest.input, color=color))
    train_heads(replace(fresh, manifest=manifest), digits.samples_of("train"), HeadTraining(copies=1), work=tmp_path, threads=1)
    assert recordings[0][2] == how


def test_inputs_that_are_ready_are_not_augmented(tmp_path: Path) -> None:
    """Floats are no pictures: with one copy or two, each epoch reads the same numbers."""
    pictures = digits.samples_of("train")
    np.savez(tmp_path / "ready.npz", x=pictures.inputs(slice(0, 100)), y=pictures.labels[:100])
    ready = load_samples(str(tmp_path / "ready.npz"), pictures.contract, classes=10)
    file = FeatureFile(tmp_path / "file", np.arange(100), (32 * 64, 64 * 64), (0, 1), 10)
    other = FeatureFile(tmp_path / "other", np.arange(100), (32 * 64, 64 * 64), (0, 1), 10)
    heads = load_heads(digits.fresh_artifact())
    record(digits.fresh_artifact(), heads, ready, file, "crop+flip", seed=1, threads=1, progress=lambda *_: None)
    record(digits.fresh_artifact(), heads, pictures.subset(range(100)), other, "none", seed=2, threads=1, progress=lambda *_: None)
    assert file.path.read_bytes() == other.path.read_bytes()


# --- the loss and the schedule


@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softening", [1.0, 3.0])
def test_the_loss_is_hintons(distillation: float, softening: float) -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(0, 3, (2, 7, 10))
    labels = generator.integers(0, 10, 7)

    def probabilities(scores: np.ndarray) -> np.ndarray:
        powers = np.exp(scores)
        return powers / powers.sum()

    expected = 0.0
    for mine, other, label in zip(student, teacher, labels, strict=True):
        soft_mine, soft_other = probabilities(mine / softening), probabilities(other / softening)
        divergence = sum(q * np.log(q / p) for q, p in zip(soft_other, soft_mine, strict=True))
        expected += (1 - distillation) * -np.log(probabilities(mine)[label]) + distillation * softening**2 * divergence
    options = HeadTraining(distillation=distillation, softening=softening)
    loss = training._loss(torch.from_numpy(student), torch.from_numpy(labels), torch.from_numpy(teacher), options)
    assert float(loss) == pytest.approx(expected / 7, rel=1e-9)


@pytest.mark.parametrize("batch", [64, 999, 5000])
def test_any_batch_size_fits_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Rows are read in chunks, and a chunk may end in a smaller batch: the schedule must have as many steps."""
    rates = []
    train_epoch = training._train_epoch

    def spy(*given: Any, **named: Any) -> None:
        train_epoch(*given, **named)
        rates.append(given[3].param_groups[0]["lr"])

    monkeypatch.setattr(training, "_train_epoch", spy)
    monkeypatch.setattr(training, "ROWS_A_CHUNK", 200, raising=True)
    monkeypatch.setattr(FeatureFile.chunks, "__defaults__", (200,))
    train(tmp_path, HeadTraining(epochs=2, copies=1, batch=batch))
    assert rates[0] > 100 * rates[1]  # down to its end, and not beyond


def test_one_row_left_over_is_no_batch(tmp_path: Path) -> None:
    """A norm cannot be estimated from it. 901 samples less the 90 set aside are nine batches of 90, and one."""
    x, y = digits.pictures()["train"]
    np.savez(tmp_path / "odd.npz", x=np.concatenate([x, x[:1]]), y=np.concatenate([y, y[:1]]))
    samples = load_samples(str(tmp_path / "odd.npz"), digits.loaded().contract, classes=10)
    trained, _ = train(tmp_path / "work", HeadTraining(epochs=1, copies=1, batch=90), samples=samples)
    assert trained.manifest.heads_trained


# --- refusals


def test_an_artifact_without_exits_is_refused(tmp_path: Path) -> None:
    fresh = digits.fresh_artifact()
    bare = replace(fresh, manifest=replace(fresh.manifest, plan=replace(fresh.plan, exits=())))
    assert bare.plan.exit_names == (FINAL,)
    with pytest.raises(PlanError, match="no exits to train") as caught:
        train_heads(bare, digits.samples_of("train"), work=tmp_path / "work")
    assert "--exits" in caught.value.hint
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("count", [14, 27])
def test_too_few_samples_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(DataError, match=f"{count} samples are too few to train heads") as caught:
        train(tmp_path / "work", HeadTraining(), samples=digits.samples_of("train").subset(range(count)))
    assert "at least 50" in caught.value.hint
    assert not (tmp_path / "work").exists()


def test_as_many_samples_as_the_refusal_asks_for_are_enough(tmp_path: Path) -> None:
    trained, _ = train(tmp_path, HeadTraining(epochs=1, copies=1), samples=digits.samples_of("train").subset(range(50)))
    assert trained.manifest.heads_trained


def test_an_unknown_augmentation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no augmentation 'flip'") as caught:
        train(tmp_path / "work", HeadTraining(augmentation="flip"))
    assert "auto, none, crop, crop+flip" in caught.value.hint
    assert not (tmp_path / "work").exists()


def test_a_training_that_diverges_is_refused_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training the head of exit1 diverged") as caught:
        train(tmp_path, replace(QUICK, learning_rate=1e30))
    assert "--learning-rate" in caught.value.hint
