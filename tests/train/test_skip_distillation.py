"""Skip-aware self-distillation: the loss of the paper, whoever computes it, and gradients that go where they should."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import PlanError
from exitify.pipeline import transform
from exitify.program import SKIP_NORMS, Program
from exitify.train.skip_distillation import SkipAwareDistillation, program_of
from tests.helpers import assert_close, captured, images
from tests.models import CLASSES, warm_up
from tests.residual_models import Encoders, InARow

Gradients = dict[str, torch.Tensor]


def with_skips(model: nn.Module, exits: str = "none") -> Program:
    """A Program in train() whose second norms are not its first, so that super and base differ in more than their depth."""
    program = transform(warm_up(model), images(), exits=exits, skips="auto", head="linear")
    exchange_norms(program)
    return program.train()


def exchange_norms(program: Program) -> None:
    """Give the second sets scales of their own."""
    with torch.no_grad():
        for name, tensor in program.named_parameters():
            if name.startswith(f"{SKIP_NORMS}."):
                tensor.mul_(torch.rand_like(tensor) + 0.5)


def number(loss: torch.Tensor) -> float:
    return float(loss.detach())


class GroupedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.norm(self.conv(x)))


def grouped() -> nn.Module:
    """Maps, and a norm that does not look at the rest of the batch."""
    return InARow(8, *(GroupedBlock() for _ in range(4)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"grouped": grouped, "encoders": lambda: Encoders(4), "cifar": lambda: CifarResNet(2)}


def a_batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count), torch.randint(CLASSES, (count,))


def gradients(program: Program) -> Gradients:
    """Copies of those there are."""
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def assert_same_gradients(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(got[name], gradient)


# --- algorithm 1 again, in float64 and without torch


def log_softmax(h: np.ndarray) -> np.ndarray:
    h = h - h.max(axis=-1, keepdims=True)
    return h - np.log(np.exp(h).sum(axis=-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of logits, a mean over all but the last dimension."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def channels_last(stage: np.ndarray) -> np.ndarray:
    return np.moveaxis(stage, 1, -1) if stage.ndim == 4 else stage


def by_hand(program: Program, x: torch.Tensor, y: torch.Tensor, *, alpha: float, temperature: float, features: str, distil: bool) -> float:
    """The loss from the definition; maps have their channels first here, and tokens last."""
    with torch.no_grad():
        full, base = (copy.deepcopy(program)(x, skip=skip) for skip in ("none", "all"))
    labels = y.numpy()
    teacher, student = (outputs.final.double().numpy() for outputs in (full, base))
    if not distil:
        return 0.5 * cross_entropy(teacher, labels) + 0.5 * cross_entropy(student, labels)
    loss = temperature**2 * divergence(teacher / temperature, student / temperature)
    for p, q in zip(full.stages, base.stages, strict=True):
        maps = [channels_last(h.double().numpy()) for h in (p, q)]
        positions = tuple(range(1, maps[0].ndim - 1))
        if features == "pooled":
            loss += divergence(*(h.mean(axis=positions) for h in maps))
        elif features == "positions":
            loss += divergence(*maps)
    return alpha * cross_entropy(teacher, labels) + (1 - alpha) * loss


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "temperature": 1.0, "features": "pooled", "distil": True},
        {"alpha": 0.2, "temperature": 3.0, "features": "pooled", "distil": True},
        {"alpha": 0.7, "temperature": 1.0, "features": "positions", "distil": True},
        {"alpha": 0.5, "temperature": 2.0, "features": "none", "distil": True},
        {"alpha": 1.0, "temperature": 1.0, "features": "none", "distil": True},
        {"alpha": 0.9, "temperature": 4.0, "features": "pooled", "distil": False},
    ],
)
def test_the_loss_is_that_of_algorithm_1(name, options):
    program = with_skips(NETWORKS[name]())
    x, y = a_batch()
    expected = by_hand(program, x, y, **options)
    loss = SkipAwareDistillation(program, **options)(x, y)
    assert loss.shape == ()
    # float32 sums of a few hundred terms against float64
    assert number(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_defaults_are_half_labels_half_distillation_with_pooled_features():
    program = with_skips(grouped())
    x, y = a_batch()
    assert number(SkipAwareDistillation(program)(x, y)) == pytest.approx(
        by_hand(program, x, y, alpha=0.5, temperature=1.0, features="pooled", distil=True), rel=1e-4
    )


def test_another_criterion_weighs_supers_labels():
    program = with_skips(grouped())
    x, y = a_batch()

    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=0.3)

    first, second = SkipAwareDistillation(program, criterion=smoothed).losses(x, y)
    assert torch.equal(first, 0.5 * smoothed(program(x).final, y))
    assert torch.equal(second, list(SkipAwareDistillation(program).losses(x, y))[1])


@pytest.mark.parametrize("features", ["pooled", "positions"])
def test_maps_with_their_channels_last_are_compared_over_their_channels(features, torchvision):
    model = torchvision.models.SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 1, 2, 2], [2, 2], num_classes=CLASSES)
    program = transform(model.eval(), torch.randn(1, 3, 32, 32), exits="none", skips="auto")
    exchange_norms(program)
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    with torch.no_grad():
        stages = [[h.double().numpy() for h in program(x, skip=skip, all_exits=True).stages] for skip in ("none", "all")]
    assert [stage.shape for stage in stages[0]] == [(3, 8, 8, 12), (3, 4, 4, 24), (3, 2, 2, 48), (3, 1, 1, 96)]
    if features == "pooled":
        stages = [[h.mean(axis=(1, 2)) for h in row] for row in stages]
    expected = 0.5 * sum(divergence(p, q) for p, q in zip(*stages, strict=True))
    got = number(SkipAwareDistillation(program, features=features)(x, y)) - number(SkipAwareDistillation(program, features="none")(x, y))
    assert got == pytest.approx(expected, rel=1e-3)  # a difference of two sums in float32


# --- where gradients go


def test_no_gradient_of_the_divergences_reaches_the_teacher():
    program = with_skips(CifarResNet(2))
    x, y = a_batch()
    first, second = SkipAwareDistillation(program).losses(x, y)
    second.backward()
    own = gradients(program)
    skippable = {name for name, _ in program.named_parameters() if name.startswith(tuple(f"layer{stage}.1." for stage in (1, 2, 3)))}
    exchanged = {name.removeprefix(f"{SKIP_NORMS}.") for name, _ in program.named_parameters() if name.startswith(f"{SKIP_NORMS}.")}
    assert skippable
    assert exchanged
    assert not own.keys() & (skippable | exchanged)
    program.zero_grad()
    first.backward()
    assert skippable | exchanged <= gradients(program).keys()
    assert not [name for name in gradients(program) if name.startswith(f"{SKIP_NORMS}.")]


def test_without_labels_weight_super_learns_nothing():
    program = with_skips(grouped())
    SkipAwareDistillation(program, alpha=0.0)(*a_batch()).backward()
    assert all(float(g.abs().max()) == 0 for name, g in gradients(program).items() if name.startswith(("blocks.2", "blocks.3")))


def test_base_sees_no_labels():
    program = with_skips(grouped())
    x, y = a_batch()
    method = SkipAwareDistillation(program)
    first, second = method.losses(x, y)
    other_first, other_second = method.losses(x, (y + 1) % CLASSES)
    assert not torch.equal(first, other_first)
    assert torch.equal(second, other_second)
    base = list(SkipAwareDistillation(program, distil=False).losses(x, y))[1]
    assert torch.equal(base, 0.5 * functional.cross_entropy(program(x, skip="all").final, y))


@pytest.mark.parametrize("distil", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_two_backward_passes_give_the_gradients_of_one(name, distil):
    program = with_skips(NETWORKS[name]())
    x, y = a_batch()
    together, apart = copy.deepcopy(program), copy.deepcopy(program)
    SkipAwareDistillation(together, distil=distil)(x, y).backward()
    for loss in SkipAwareDistillation(apart, distil=distil).losses(x, y):
        loss.backward()
    assert_same_gradients(gradients(apart), gradients(together))
    assert len(gradients(apart)) == len(list(program.parameters()))  # between them, super and base train everything
    assert all(torch.equal(a, b) for a, b in zip(together.buffers(), apart.buffers(), strict=True))


def test_both_norm_sets_move_their_own_statistics():
    program = with_skips(CifarResNet(2))
    before = {name: tensor.clone() for name, tensor in program.named_buffers()}
    SkipAwareDistillation(program)(*a_batch())
    moved = {name for name, tensor in program.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == before.keys()
    assert int(program.get_buffer("layer1.0.bn1.num_batches_tracked")) == int(before["layer1.0.bn1.num_batches_tracked"]) + 1
    assert int(program.get_buffer("bn1.num_batches_tracked")) == int(before["bn1.num_batches_tracked"]) + 2  # the stem's, by both


def test_heads_of_exits_are_left_alone():
    program = with_skips(CifarResNet(2), "layer1,layer2")
    SkipAwareDistillation(program)(*a_batch()).backward()
    assert not [name for name in gradients(program) if name.startswith("exit_heads")]


@pytest.mark.parametrize("features", ["pooled", "positions", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_of_one_has_a_loss(name, features):
    program = with_skips(NETWORKS[name]())
    x, y = a_batch(1)
    expected = by_hand(program, x, y, alpha=0.5, temperature=1.0, features=features, distil=True)
    assert number(SkipAwareDistillation(program, features=features)(x, y)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_in_half_precision_divergences_are_computed_in_float32():
    program = with_skips(grouped())
    x, y = a_batch()
    expected = SkipAwareDistillation(program)(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SkipAwareDistillation(program)(x, y)
    assert loss.dtype == torch.float32
    assert number(loss) == pytest.approx(number(expected), rel=0.05)  # bfloat16 has three digits


@pytest.mark.parametrize("name", ["encoders", "cifar"])
def test_the_loss_falls_when_trained(name):
    program = with_skips(NETWORKS[name]())
    method = SkipAwareDistillation(program)
    x, y = a_batch(8)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = method(x, y)
        loss.backward()
        optimizer.step()
        losses.append(number(loss))
    assert losses[-1] < losses[0] - 0.1


# --- wrappers and refusals


def test_a_wrapped_program_is_found():
    program = with_skips(grouped())
    wrapped = nn.DataParallel(program)  # on a machine without GPUs it calls the module itself
    assert program_of(wrapped) is program_of(program) is program
    x, y = a_batch()
    assert torch.equal(SkipAwareDistillation(wrapped)(x, y), SkipAwareDistillation(program)(x, y))


def test_what_is_no_program_is_refused():
    with pytest.raises(PlanError, match="Linear is no exitify Program, nor wraps one"):
        SkipAwareDistillation(nn.Linear(2, 2))


def test_a_network_without_skip_paths_is_refused():
    with pytest.raises(PlanError, match="the network has no skip paths to distil"):
        SkipAwareDistillation(captured("plain"))


def test_an_unknown_way_to_compare_features_is_refused():
    with pytest.raises(PlanError, match="there is no way 'attention' to compare features\n  hint: there are pooled, positions, none"):
        SkipAwareDistillation(with_skips(grouped()), features="attention")


# --- several processes


def one_of_two(rank: int, folder: str, program: Program, x: torch.Tensor, y: torch.Tensor) -> None:
    """A process of two: its half of the batch, two steps so that the second finds what the first left behind."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        wrapped = nn.parallel.DistributedDataParallel(program, find_unused_parameters=True)
        method, half = SkipAwareDistillation(wrapped), slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
        for _ in range(2):
            wrapped.zero_grad()
            for loss in method.losses(x[half], y[half]):
                loss.backward()
        torch.save(gradients(program), f"{folder}/gradients{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_have_the_gradients_of_one_with_both_batches(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    program = with_skips(grouped(), "blocks.1")
    program.exit_heads.requires_grad_(False)  # their logits enter no loss
    x, y = a_batch(8)
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), program, x, y), nprocs=2)
    first, second = (torch.load(tmp_path / f"gradients{rank}.pt") for rank in (0, 1))
    SkipAwareDistillation(program)(x, y).backward()
    expected = gradients(program)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_gradients({name: first[name] for name in expected}, expected)


def test_norms_tell_where_a_maps_channels_are(torchvision):
    """Sides alone would not: a map of as many channels as rows, and pictures that are not square."""
    cubic = SkipAwareDistillation(transform(CifarResNet(2), torch.zeros(1, 3, 16, 16), exits="none", skips="auto"))
    assert cubic._channels_last == [False, False, False]
    swin = torchvision.models.swin_transformer.SwinTransformer([4, 4], 24, [2, 2], [1, 2], [2, 2], num_classes=4)
    wide = SkipAwareDistillation(transform(swin.eval(), torch.zeros(1, 3, 32, 64), exits="none", skips="auto"))
    assert wide._channels_last == [True, True]
