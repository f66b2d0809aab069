"""The whole network trained with its exits, on a small real task."""

from __future__ import annotations

import copy
import functools
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import exitify
from examples.cifar_resnet56.model import CifarResNet
from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, build_artifact
from exitify.artifact.manifest import Conditions, SegmentTimes
from exitify.artifact.tensors import write_tensors
from exitify.data import Samples, load_samples
from exitify.errors import DataError, ModelError, PlanError
from exitify.files import NotWritten
from exitify.passes.equilibrate_gradients import EquilibrateGradients
from exitify.plan import FINAL
from exitify.program import HEADS, SKIP_NORMS, Program
from exitify.runtime.session import Session
from exitify.train import end_to_end
from exitify.train.augment import augment
from exitify.train.end_to_end import METHODS, EpochReport, Method, TrainingOptions, learning_rate, parameter_groups, replay, train_network
from exitify.train.sample_weights import SampleWeights
from tests import digits, skipping
from tests.cli import console
from tests.cli.console import contents, refused

QUICK = TrainingOptions(epochs=3, batch=36)
"""Six steps an epoch on 240 samples, 24 of which are set aside."""

EXITS = "stage1,stage2"


class Tiny(nn.Module):
    """Norms with statistics, and dropout: whatever an interruption could lose."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(1, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, kernel, 2, padding=kernel // 2), nn.BatchNorm2d(12), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.stage3(self.stage2(self.stage1(x))).mean((2, 3))))


def tiny() -> Tiny:
    """With weights that are the same in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().eval()


@functools.cache
def fresh() -> Artifact:
    """The network untrained, two exits with untrained heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        program = exitify.transform(tiny(), torch.zeros(1, 1, 16, 16), exits=EXITS, source="tests:tiny")
    return exitify.export(program, contract=digits.loaded().contract, heads_trained=False)


@functools.cache
def samples() -> Samples:
    return digits.samples_of("train").subset(slice(0, 240))


def ready_samples(folder: Path) -> Samples:
    """The same as inputs that the network reads as they are."""
    np.savez(folder / "ready.npz", x=samples().inputs(slice(None)), y=samples().labels)
    return load_samples(str(folder / "ready.npz"), fresh().manifest.input, classes=10)


def train(work: Path, options: TrainingOptions = QUICK, **given: Any) -> tuple[Artifact, list[EpochReport]]:
    artifact, model = given.pop("artifact", fresh()), given.pop("model", tiny())
    return train_network(artifact, given.pop("samples", samples()), model, options, work=work, threads=1, **given)


def content(artifact: Artifact) -> dict[str, bytes]:
    return {path: bytes(data) for path, data in artifact.files.items()}


def tensors(artifact: Artifact) -> dict[str, np.ndarray]:
    return {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}


@pytest.fixture(autouse=True)
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network's graphs are those it has already, whatever its weights: a second and a half less for each training.

    `undisturbed` is exported in truth, and compared with what is not.
    """
    real = end_to_end.export

    def export(program: Program, **given: Any) -> Artifact:
        if program.source != "tests:tiny":
            return real(program, **given)
        written = {name: tensor.numpy() for name, tensor in program.state_dict().items()}
        files = {
            path: write_tensors({name: written[name] for name in fresh().tensors(path)}) if path in (WEIGHTS_FILE, HEADS_FILE) else data
            for path, data in fresh().files.items()
        }
        return build_artifact(replace(fresh().manifest, heads_trained=given["heads_trained"]), files)

    monkeypatch.setattr(end_to_end, "export", export)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[EpochReport]]:
    """A quick training from start to end."""
    return train(tmp_path_factory.mktemp("undisturbed"))


# --- what comes of it


def test_network_and_heads_learn(tmp_path: Path) -> None:
    options, test = TrainingOptions(epochs=3, batch=60, learning_rate=0.02), digits.samples_of("test")
    trained, reports = train(
        tmp_path, options, artifact=digits.fresh_artifact(), model=digits.network(), samples=digits.samples_of("train").subset(slice(0, 600))
    )
    before, after = (Session(artifact).record(test.inputs(slice(None))).logits for artifact in (digits.fresh_artifact(), trained))
    accuracy = {name: [float((logits[name].argmax(1) == test.labels).mean()) for logits in (before, after)] for name in before}
    assert max(accuracy["exit1"][0], accuracy["exit2"][0]) < 0.3
    assert min(accuracy["exit1"][1], accuracy["exit2"][1]) > 0.8
    assert accuracy[FINAL][1] > accuracy[FINAL][0] - 0.02
    assert accuracy["exit2"][1] == pytest.approx(reports[-1].accuracy["exit2"], abs=0.1)  # 60 and 397 samples


def test_every_weight_of_the_network_and_its_heads_is_trained(undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    before, after = tensors(fresh()), tensors(undisturbed[0])
    assert list(before) == list(after)
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_the_artifact_is_the_same_but_for_its_weights(undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    before, after = fresh().manifest, undisturbed[0].manifest
    assert (after.input, after.model, after.plan) == (before.input, before.model, before.plan)
    assert after.model.source == "tests:tiny"
    assert (before.heads_trained, after.heads_trained) == (False, True)
    assert after.training_data == samples().identity()
    assert after.model_id != before.model_id


def test_it_is_saved_and_read_again(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    assert content(Artifact.open(undisturbed[0].save(tmp_path / "net.exitify"))) == content(undisturbed[0])


def test_what_was_made_for_the_former_network_is_dropped(tmp_path: Path) -> None:
    old = fresh().with_profile("old", digits.profile(fresh(), {"exit1": 0.5}))
    segments = {segment.name: 0.1 for segment in fresh().plan.segments}
    old = old.with_times("here", SegmentTimes(fresh().manifest.model_id, "onnxruntime", 1, Conditions("x", "", ""), 3, 1.0, segments))
    trained, _ = train(tmp_path, replace(QUICK, epochs=1), artifact=old)
    assert (trained.profiles, trained.times) == ({}, {})
    assert list(old.profiles) == ["old"]


def test_a_report_is_what_the_network_says_on_samples_set_aside(undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    trained, reports = undisturbed
    _, held_out = end_to_end._split(samples(), QUICK, 1)
    recorded = Session(trained).record(samples().inputs(held_out)).logits
    labels = samples().labels[held_out]
    assert [report.epoch for report in reports] == [0, 1, 2]
    assert list(reports[-1].accuracy) == list(reports[-1].losses) == ["exit1", "exit2", FINAL]
    for name, logits in recorded.items():
        assert reports[-1].accuracy[name] == pytest.approx((logits.argmax(1) == labels).mean())
        assert reports[-1].losses[name] == pytest.approx(float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))), rel=1e-4)


def test_each_epoch_has_a_line_in_the_log_and_a_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    called: list[EpochReport] = []
    with caplog.at_level(logging.INFO, end_to_end.__name__):
        _, reports = train(tmp_path, replace(QUICK, epochs=2), each_epoch=called.append)
    assert called == reports
    lines = [record.getMessage() for record in caplog.records if record.name == end_to_end.__name__]
    assert len(lines) == 2
    assert lines[1] == str(reports[1])
    for text in ("epoch 2: loss ", "exit1 ", f"{FINAL} {reports[1].accuracy[FINAL]:.2%} (loss {reports[1].losses[FINAL]:.4f})"):
        assert text in lines[1]


def test_the_model_given_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny()
    model.stage1.train()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    train(tmp_path, replace(QUICK, epochs=1), model=model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_training_begins_with_the_artifacts_weights_whatever_the_model_has(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    other = tiny()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert content(train(tmp_path, model=other)[0]) == content(undisturbed[0])


def test_an_exported_model_is_trained_too(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    module = torch.export.export(tiny(), (torch.zeros(2, 1, 16, 16),), dynamic_shapes=({0: batch},)).module()
    program = exitify.transform(module, torch.zeros(1, 1, 16, 16), exits=1)
    artifact = exitify.export(program, contract=digits.loaded().contract, heads_trained=False)
    assert artifact.manifest.model.source == ""
    trained, reports = train(tmp_path, artifact=artifact, model=module)
    assert reports[-1].loss < reports[0].loss
    assert trained.plan == artifact.plan


# --- how it is trained


@pytest.mark.parametrize(("schedule", "share"), [("cosine", 0.0), ("step", 0.4)])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, schedule: Any, share: float) -> None:
    """Written down once more with torch's own schedules and no part of what is tested; augmentation as documented."""
    options = replace(QUICK, schedule=schedule, augmentation="crop", distillation=share, softening=2.0, seed=5)
    trained, reports = train(tmp_path, options)
    model = tiny()
    program = exitify.transform(model, torch.zeros(1, 1, 16, 16), exits=EXITS)
    program.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors(fresh()).items()})
    teacher = copy.deepcopy(program).eval()
    order = np.random.default_rng(5).permutation(240)
    rows = order[24:]
    norms = {f"{name}.{kind}" for name, module in program.named_modules() if isinstance(module, nn.BatchNorm2d) for kind in ("weight", "bias")}
    spared = [parameter for name, parameter in program.named_parameters() if name in norms or name.endswith("bias")]
    decaying = [parameter for name, parameter in program.named_parameters() if name not in norms and not name.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": decaying, "weight_decay": 5e-4}, {"params": spared}], 0.05, momentum=0.9, nesterov=True)
    if schedule == "cosine":
        rates: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    else:
        rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9, 14])  # of 18 steps: 1/2, and the first at or after 3/4
    losses = []
    for epoch in range(3):
        generator = np.random.default_rng((5, epoch, 0))
        torch.manual_seed(int(generator.integers(2**63)))
        program.train()
        for step in np.random.default_rng((5, epoch)).permutation(rows).reshape(6, 36):
            pixels = augment(samples().pixels(step), "crop", generator)
            x = torch.from_numpy(((pixels / 255 - 0.3) / 0.4).astype(np.float32).transpose(0, 3, 1, 2))
            optimizer.zero_grad()
            y, answer = torch.from_numpy(samples().labels[step]), (teacher(x).detach() / 2).softmax(1)
            loss = torch.zeros(())
            for logits in program(x).logits:
                divergence = (answer * (answer.log() - (logits / 2).log_softmax(1))).sum(1).mean()
                loss = loss + (1 - share) * F.cross_entropy(logits, y) + share * 4 * divergence
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            rates.step()
        program.eval()
    for name, tensor in program.state_dict().items():
        np.testing.assert_allclose(tensors(trained)[name], tensor.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
    assert [report.loss for report in reports] == pytest.approx(np.reshape(losses, (3, 6)).mean(1), rel=1e-4)


def test_norms_and_biases_do_not_decay_and_shared_weights_are_trained_once() -> None:
    network = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 1),
            "batch": nn.BatchNorm2d(4),
            "group": nn.GroupNorm(2, 4),
            "layer": nn.LayerNorm((4, 5, 5)),  # its parameters have three dimensions
            "linear": nn.Linear(4, 4),
            "embedding": nn.Embedding(3, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    network["again"] = nn.Linear(4, 4)
    network["again"].weight = network["linear"].weight
    network.token = nn.Parameter(torch.zeros(1, 1, 4))
    decaying, spared = parameter_groups(network, 0.1)
    names = {parameter: name for name, parameter in network.named_parameters()}
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[parameter] for parameter in decaying["params"]} == {"conv.weight", "linear.weight", "embedding.weight", "token"}
    assert {names[parameter] for parameter in spared["params"]} == {
        "conv.bias", "linear.bias", "again.bias", "batch.weight", "batch.bias", "group.weight", "group.bias", "layer.weight", "layer.bias",
    }  # fmt: skip


@given(done=st.floats(0, 1, exclude_max=True))
def test_rates_fall_from_the_peak(done: float) -> None:
    cosine, step = (learning_rate(TrainingOptions(learning_rate=0.2, schedule=schedule), done) for schedule in ("cosine", "step"))
    assert cosine == pytest.approx(0.2 * math.cos(math.pi * done / 2) ** 2, abs=1e-12)
    assert step == pytest.approx(0.2 * 10.0 ** -((done >= 0.5) + (done >= 0.75)))


def test_bf16_computes_products_in_it_and_keeps_weights(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    trained, reports = train(tmp_path, replace(QUICK, precision="bf16"))
    before, half, full = tensors(fresh()), tensors(trained), tensors(undisturbed[0])
    assert {name: tensor.dtype for name, tensor in half.items()} == {name: tensor.dtype for name, tensor in before.items()}
    assert reports[0].loss == pytest.approx(undisturbed[1][0].loss, rel=0.02)  # 8 bits, six steps
    moved = {name: np.linalg.norm(full[name] - before[name]) for name in before if before[name].ndim > 1}
    gaps = [np.linalg.norm(half[name] - full[name]) / moved[name] for name in moved]
    assert 1e-4 < max(gaps) < 0.5


def test_the_precision_is_that_of_the_forward_pass_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two losses each is computed under autocast, and goes back outside of it."""
    seen: list[tuple[str, bool]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
            seen.append(("forward", torch.is_autocast_enabled("cpu")))
            return value.clone()

        @staticmethod
        def backward(_context: Any, *gradients: torch.Tensor) -> Any:
            seen.append(("backward", torch.is_autocast_enabled("cpu")))
            return gradients[0]

    def two(model: nn.Module, _optimizer: torch.optim.Optimizer) -> Any:
        return lambda x, y, done, criterion: (criterion(Watched.apply(model(x).final), y) for _ in range(2))

    monkeypatch.setitem(METHODS, "two", Method(two))  # type: ignore[attr-defined]
    train(tmp_path, TrainingOptions("two", epochs=1, batch=200, precision="bf16"))
    assert seen == [("forward", True), ("backward", False)] * 2


def test_ready_inputs_are_not_augmented(tmp_path: Path) -> None:
    ready, options = ready_samples(tmp_path), replace(QUICK, epochs=1)
    one, other = (train(tmp_path / how, replace(options, augmentation=how), samples=ready)[0] for how in ("none", "crop"))
    assert content(one) == content(other)


def test_pictures_are_augmented(tmp_path: Path) -> None:
    options = replace(QUICK, epochs=1)
    one, other, auto = (train(tmp_path / how, replace(options, augmentation=how))[0] for how in ("none", "crop", "auto"))
    assert content(one) != content(other)
    assert content(other) == content(auto)  # grey: not mirrored


# --- the methods


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.learns == "exits"])
def test_a_method_trains_all_exits(tmp_path: Path, name: str) -> None:
    trained, reports = train(tmp_path, replace(QUICK, method=name))
    assert reports[-1].loss < reports[0].loss or name == "ramp"  # whose weights grow
    assert reports[-1].losses[FINAL] < math.log(10)
    assert trained.manifest.heads_trained
    assert trained.manifest.model == fresh().manifest.model


def test_equilibrium_is_joint_with_other_gradients(tmp_path: Path) -> None:
    """One step from the same weights: what heads get is the same, what the network gets is scaled."""
    options = TrainingOptions(epochs=1, batch=200, weight_decay=0.0, augmentation="none")
    (joint, _), (equilibrium, _) = (train(tmp_path, replace(options, method=name)) for name in ("joint", "equilibrium"))
    program = EquilibrateGradients()(replay(fresh(), tiny()))
    before, ours, theirs = tensors(fresh()), tensors(joint), tensors(equilibrium)
    assert program.equilibrium
    for name in before:
        if name.startswith(HEADS) or name.startswith("fc."):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    weight = "stage3.0.weight"  # behind all exits but the last one
    np.testing.assert_allclose(theirs[weight] - before[weight], ours[weight] - before[weight], rtol=1e-3, atol=1e-7)
    assert not np.allclose(ours["stage1.0.weight"], theirs["stage1.0.weight"], rtol=1e-3)


def test_one_more_method_is_one_more_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def last_only(outputs: exitify.ExitOutputs, y: torch.Tensor, plan: exitify.Plan, done: float, criterion: Any) -> torch.Tensor:
        seen.append(done)
        return F.cross_entropy(outputs.final, y)

    monkeypatch.setitem(METHODS, "last", Method(end_to_end.of_outputs(last_only)))  # type: ignore[attr-defined]
    trained, _ = train(tmp_path, replace(QUICK, method="last"))
    assert seen == pytest.approx([step / 18 for step in range(18)])
    assert bytes(trained.files[HEADS_FILE]) == bytes(fresh().files[HEADS_FILE])  # no gradient, so no decay either
    assert bytes(trained.files[WEIGHTS_FILE]) != bytes(fresh().files[WEIGHTS_FILE])


@pytest.fixture(scope="module")
def learnt_to_skip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[EpochReport], Artifact]:
    """A network with skip paths and exits, trained to leave the paths out; and as it was before."""
    _, artifact = skipping.skipping()
    folder = tmp_path_factory.mktemp("skips")
    labels = np.arange(120) % 7
    patterns = np.random.default_rng(0).standard_normal((7, *skipping.SHAPE)).astype(np.float32)
    np.savez(folder / "data.npz", x=patterns[labels] + 0.3 * skipping.pictures(120), y=labels)
    data = load_samples(str(folder / "data.npz"), artifact.manifest.input, classes=7)
    options = TrainingOptions("skip-distillation", epochs=4, batch=36, learning_rate=0.02)
    trained, reports = train_network(artifact, data, CifarResNet(2, classes=7), options, work=folder, threads=1)
    return trained, reports, artifact


def test_skip_distillation_trains_the_network_and_its_second_norms(learnt_to_skip: tuple[Artifact, list[EpochReport], Artifact]) -> None:
    trained, reports, before = learnt_to_skip
    assert list(reports[-1].accuracy) == [*before.plan.exit_names, "base"]
    assert reports[-1].accuracy[FINAL] > 0.5
    assert reports[-1].losses["base"] < reports[0].losses["base"]
    old, new = before.tensors(WEIGHTS_FILE), trained.tensors(WEIGHTS_FILE)
    assert [name for name in old if np.array_equal(old[name], new[name])] == []
    assert any(name.startswith(SKIP_NORMS) for name in old)


def test_skip_distillation_leaves_heads_as_they_are_and_says_that_they_need_training(
    learnt_to_skip: tuple[Artifact, list[EpochReport], Artifact],
) -> None:
    trained, _, before = learnt_to_skip
    assert before.manifest.heads_trained
    assert not trained.manifest.heads_trained
    assert bytes(trained.files[HEADS_FILE]) == bytes(before.files[HEADS_FILE])


def test_training_exits_of_a_network_with_skip_paths_warns_and_leaves_its_second_norms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, artifact = skipping.skipping()
    np.savez(tmp_path / "data.npz", x=skipping.pictures(60), y=np.arange(60) % 7)
    data = load_samples(str(tmp_path / "data.npz"), artifact.manifest.input, classes=7)
    trained, _ = train_network(artifact, data, CifarResNet(2, classes=7), TrainingOptions(epochs=1, batch=27), work=tmp_path, threads=1)
    assert "joint does not train skip paths" in caplog.text
    before, after = artifact.tensors(WEIGHTS_FILE), trained.tensors(WEIGHTS_FILE)
    left = {name for name in before if np.array_equal(before[name], after[name])}
    assert left == {name for name in before if name.startswith(SKIP_NORMS)}


# --- the same again


def test_another_seed_gives_another_network(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    assert content(train(tmp_path, replace(QUICK, seed=1))[0]) != content(undisturbed[0])


def test_torchs_own_generator_decides_nothing_and_is_left_as_it_was(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]]) -> None:
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    trained, reports = train(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert content(trained) == content(undisturbed[0])
    assert reports == undisturbed[1]


def interrupt(at: int) -> Callable[[str, int, int], None]:
    """A progress callback that presses Ctrl-C before that step."""

    def progress(_text: str, done: int, _total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("step", [2, 6, 15])
def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path: Path, undisturbed: tuple[Artifact, list[EpochReport]], step: int) -> None:
    """In the first epoch, at the start of the second, and within the third."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt(step))
    steps: list[int] = []
    resumed, reports = train(tmp_path, progress=lambda _text, done, total: steps.append(done) if total > 1 else None)
    assert steps[0] == step // 6 * 6  # what was done is not done again
    assert content(resumed) == content(undisturbed[0])
    assert reports == undisturbed[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_weighs_samples_learns_and_goes_on_after_an_interruption(tmp_path: Path, precision: Any) -> None:
    options = replace(QUICK, method="sample-weights", epochs=2, precision=precision)
    straight, reports = train(tmp_path / "straight", options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "interrupted", options, progress=interrupt(9))
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)["losses"]
    assert state["batches"] == 6
    torch.manual_seed(options.seed)
    drawn = SampleWeights(replay(fresh(), tiny())).network.state_dict()
    assert not any(torch.equal(state["network"][name], tensor) for name, tensor in drawn.items())
    resumed, again = train(tmp_path / "interrupted", options)
    assert content(resumed) == content(straight)
    assert again == reports


def test_other_options_start_anew_and_leave_the_interrupted_training_be(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt(8))
    (waiting,) = tmp_path.iterdir()
    steps: list[int] = []
    train(tmp_path, replace(QUICK, learning_rate=0.04, epochs=1), progress=lambda _text, done, total: steps.append(done))
    assert steps[0] == 0
    assert list(tmp_path.iterdir()) == [waiting]


def test_the_artifact_is_saved_before_the_checkpoint_is_removed(tmp_path: Path) -> None:
    options = replace(QUICK, epochs=1)
    with pytest.raises(NotWritten):
        train(tmp_path / "work", options, save_to=tmp_path / "missing" / "net.exitify")
    steps: list[int] = []
    train(tmp_path / "work", options, save_to=tmp_path / "net.exitify", progress=lambda _text, done, total: steps.append(total))
    assert steps == [1]  # no step was made again
    assert Artifact.open(tmp_path / "net.exitify").manifest.heads_trained
    assert list((tmp_path / "work").iterdir()) == []


def test_the_default_work_folder_is_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    train_network(
        fresh(), samples(), tiny(), replace(QUICK, epochs=1), threads=1, progress=lambda *_: seen.append(Path("exitify-train").is_dir())
    )  # fmt: skip
    assert seen[-1]
    assert list(tmp_path.iterdir()) == []


def test_torchs_threads_are_put_back_also_after_an_interruption(tmp_path: Path) -> None:
    before, during = torch.get_num_threads(), []

    def progress(_text: str, done: int, _total: int) -> None:
        during.append(torch.get_num_threads())
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(fresh(), samples(), tiny(), QUICK, work=tmp_path, threads=before + 1, progress=progress)
    assert during == [before + 1] * 2
    assert torch.get_num_threads() == before


# --- what goes wrong


def nan_from(start: float) -> Method:
    """A loss that is no number from that share of the training on."""
    return Method(
        end_to_end.of_outputs(lambda outputs, y, plan, done, criterion: F.cross_entropy(outputs.final, y) * (math.nan if done >= start else 1))
    )


def test_a_loss_that_diverges_is_refused_and_the_checkpoint_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "odd", nan_from(0.5))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"the loss diverged in epoch 2; the checkpoint before it is kept in \S+\n  hint: .*--learning-rate 0\.005"):
        train(tmp_path, replace(QUICK, method="odd"))
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)
    assert [report["epoch"] for report in state["reports"]] == [0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["model"].values())


def test_a_rate_that_is_too_high_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the loss diverged in epoch 1\n  hint: lower the learning rate"):
        train(tmp_path, replace(QUICK, learning_rate=1e25))
    assert list(tmp_path.rglob("*")) == []


def test_a_loss_that_diverges_ends_the_epoch_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "odd", nan_from(0.0))  # type: ignore[attr-defined]
    monkeypatch.setattr(end_to_end, "FINITE_EVERY", 2)
    steps: list[int] = []
    with pytest.raises(DataError, match="diverged in epoch 1"):
        train(tmp_path, replace(QUICK, method="odd"), progress=lambda _text, done, _total: steps.append(done))
    assert steps == [0, 1]


def never(*_: Any) -> None:
    raise AssertionError("training began")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"method": "boosting"},
        r"there is no method 'boosting'\n  hint: there are joint, ramp, equilibrium, one-for-all, sample-weights, skip-distillation",
    ),
    "schedule": ({"schedule": "linear"}, "there is no schedule 'linear'\n  hint: there are cosine, step"),
    "augmentation": ({"augmentation": "flip"}, "there is no augmentation 'flip'"),
    "epochs": ({"epochs": 0}, "epochs is 0\n  hint: it must be at least 1"),
    "rate": ({"learning_rate": 0.0}, "learning_rate is 0.0\n  hint: it must be above 0"),
    "no rate": ({"learning_rate": math.nan}, "learning_rate is nan"),
    "momentum": ({"momentum": 1.0}, "momentum is 1.0"),
    "decay": ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
    "validation": ({"validation": 1.0}, "validation is 1.0"),
    "distillation": ({"distillation": 1.5}, r"distillation is 1.5\n  hint: it must be from 0 to 1"),
    "softening": ({"softening": 0.0}, "softening is 0.0"),
    "precision": ({"precision": "fp16"}, r"there is no precision 'fp16'\n  hint: there are fp32, bf16"),
    "batch of one": ({"batch": 1}, r"a batch of 1 cannot be shared by 1 processes with at least two samples each\n  hint: .*--batch 2$"),
    "batch": ({"batch": 217}, "240 samples are too few: 24 of them set aside leave 216 for batches of 217"),
    "nothing aside": ({"validation": 0.001}, "240 samples are too few: 0 of them set aside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_are_refused_before_training(tmp_path: Path, name: str) -> None:
    changes, problem = REFUSED[name]
    with pytest.raises(DataError, match=problem):
        train(tmp_path, replace(QUICK, **changes), progress=never)
    assert list(tmp_path.iterdir()) == []


def test_methods_are_refused_where_there_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the artifact has no exits to train with joint\n  hint: transform with `--exits auto`"):
        train(tmp_path, artifact=digits.artifact_without_exits(), model=digits.network(), progress=never)
    with pytest.raises(PlanError, match="the artifact has no skip paths to train with skip-distillation\n  hint: transform with `--skips auto`"):
        train(tmp_path, replace(QUICK, method="skip-distillation"), progress=never)
    options = replace(QUICK, method="skip-distillation", distillation=0.5)
    with pytest.raises(DataError, match="skip-distillation distils from the network as it becomes"):
        train(tmp_path, options, artifact=skipping.skipping()[1], progress=never)
    with pytest.raises(DataError, match="sample-weights weighs what samples lose on their labels\n  hint: leave out --distillation"):
        train(tmp_path, replace(QUICK, method="sample-weights", distillation=0.5), progress=never)


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="there is no CUDA device"):
        train(tmp_path, device="cuda", progress=never)
    with pytest.raises(ModelError, match="there is no device 'tpu'\n  hint: there are cpu and cuda"):
        train(tmp_path, device="tpu", progress=never)


class Sharper(Tiny):
    """The same modules and weights; another function of them, and not in the graph's shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.stage3(self.stage2(self.stage1(x))).mean((3, 2)))) + 0 * self.fc.bias


def leaky() -> nn.Module:
    model = tiny()
    model.stage1[2] = nn.LeakyReLU(0.5)
    return model


def with_more() -> nn.Module:
    model = tiny()
    model.extra = nn.Parameter(torch.zeros(3))
    return model


def renamed() -> nn.Module:
    model = tiny()
    return nn.Sequential(model.stage1, model.stage2, model.stage3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.dropout, model.fc)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "places have other names": (renamed, "recipe does not replay on Sequential: .*stage1"),
    "more operations": (Sharper, "recipe gives Sharper other segments than it has"),
    "another width": (lambda: digits.loaded().module, "recipe gives DigitsNet other exits than it has: exit1 after .*, instead of exit1 after "),
    "a weight of another shape": (lambda: Tiny(kernel=5), r"'stage2.0.weight' is \(12, 8, 3, 3\) in the artifact and \(12, 8, 5, 5\) in the model"),
    "a weight more": (with_more, "the artifact has no weight 'extra', which the model has"),
    "another function": (leaky, "the model's exit1 differs from the artifact's by .* with the same weights"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_before_training(tmp_path: Path, name: str) -> None:
    make, problem = OTHERS[name]
    with pytest.raises(ModelError, match=rf"{problem}.*\n  hint: give the model that the artifact was made from, tests:tiny"):
        train(tmp_path, model=make(), progress=never)


def test_replay_gives_the_artifacts_network() -> None:
    program = replay(fresh(), Tiny())
    assert program.recipe == fresh().manifest.model.recipe
    x = samples().inputs(slice(0, 5))
    recorded = Session(fresh()).record(x).logits
    with torch.no_grad():
        outputs = program.eval()(torch.from_numpy(x), all_exits=True)
    for exit_name, logits in zip(outputs.names, outputs.logits):
        np.testing.assert_allclose(recorded[exit_name], logits.numpy(), rtol=1e-4, atol=1e-5)


# --- on the command line

MODEL = ("--model", "tests.digits_net:build")
TRAINING = ("--epochs", 2, "--batch", 45, "--threads", 1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: an artifact with a profile, data, and the network's weights."""
    folder = tmp_path_factory.mktemp("workshop")
    artifact = digits.trained_artifact()
    artifact.with_profile("careful", digits.profile(artifact, {"exit1": 0.5})).save(folder / "net.exitify")
    digits.write_npz(folder / "train.npz", "train", slice(0, 200))
    safetensors.torch.save_file(digits.network().state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def printed(workshop: Path) -> str:
    """What a training of the whole network prints; it writes out.exitify."""
    done = console.exitify("train", "net.exitify", "--data", "train.npz", *MODEL, *TRAINING, "-o", "out.exitify", folder=workshop)
    assert (done.code, done.err) == (0, "")
    return done.out


def test_train_with_a_model_trains_the_network_and_prints_what_came_of_it(workshop: Path, printed: str) -> None:
    for text in ("epoch 1: loss ", "epoch 2: loss ", "Exits, on training samples set aside", "Dropped the profile careful", "another model_id"):
        assert text in printed
    before, trained = digits.trained_artifact(), Artifact.open(workshop / "out.exitify")
    assert bytes(trained.files[WEIGHTS_FILE]) != bytes(before.files[WEIGHTS_FILE])
    assert (trained.manifest.input, trained.manifest.model) == (before.manifest.input, before.manifest.model)
    assert trained.profiles == {}
    assert not list(workshop.glob("*.train"))


def test_the_python_it_prints_does_the_same(workshop: Path, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed.splitlines()[-1]
    assert text.startswith("In Python: exitify.train.end_to_end.train_network(exitify.Artifact.open('net.exitify'), samples, ")
    shutil.copy(workshop / "net.exitify", tmp_path)
    monkeypatch.chdir(tmp_path)
    samples = load_samples(str(workshop / "train.npz"), digits.loaded().contract, classes=10)
    trained, _ = eval(text.removeprefix("In Python: "), {"exitify": exitify, "samples": samples, "TrainingOptions": TrainingOptions})
    assert content(trained) == content(Artifact.open(workshop / "out.exitify"))


def test_train_with_a_model_has_a_document_for_machines(workshop: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.exitify"
    document = console.exitify(
        "train", "net.exitify", "--data", "train.npz", *MODEL, "--epochs", 1, "--weights", "weights.safetensors", "--method", "equilibrium",
        "--distillation", 0.5, "-o", output, "--json", folder=workshop,
    ).document  # fmt: skip
    assert document["model_id"] == Artifact.open(output).manifest.model_id
    assert [report["epoch"] for report in document["epochs"]] == [0]
    assert list(document["epochs"][0]["accuracy"]) == ["exit1", "exit2", FINAL]


NOT_TAKEN: dict[str, tuple[tuple[object, ...], str]] = {
    "a method without a model": (("--method", "joint"), "--method joint is no way to train heads alone"),
    "a batch without a model": (("--batch", 20), "--batch serves training of the whole network"),
    "a device without a model": (("--device", "cuda"), "--device serves training of the whole network"),
    "copies with a model": ((*MODEL, "--copies", 2), "--copies serves training of the heads alone"),
    "a precision without a model": (("--precision", "bf16"), "--precision serves training of the whole network"),
    "an unknown method": ((*MODEL, "--method", "boosting"), "there is no method 'boosting'"),
    "another model": (("--model", "tests.digits_net:build_for_five"), "recipe gives DigitsNet other exits than it has"),
    "other weights": ((*MODEL, "--weights", "other.safetensors"), r"other\.safetensors has another 'fc\.bias' than the artifact"),
    "a missing model": (("--model", "nothing:here"), "nothing"),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_the_command_refuses(workshop: Path, name: str) -> None:
    arguments, problem = NOT_TAKEN[name]
    safetensors.torch.save_file({**digits.network().state_dict(), "fc.bias": torch.zeros(10)}, workshop / "other.safetensors")
    before = contents(workshop)
    refused(console.exitify("train", "net.exitify", "--data", "train.npz", *arguments, folder=workshop), problem)
    assert contents(workshop) == before
