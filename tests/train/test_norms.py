"""Statistics of second norms: measured on all samples alike, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import DataError, PlanError
from exitify.pipeline import transform
from exitify.program import SKIP_NORMS, Program
from exitify.train.norms import reestimate_norms
from tests.helpers import assert_close, captured, images, state
from tests.models import SHAPE, warm_up
from tests.residual_models import Encoders, InARow, PreActivation, exported

UNEVEN = (5, 2, 7, 3)


def with_skips(model: nn.Module, exits: str = "none") -> Program:
    return transform(warm_up(model), images(), exits=exits, skips="auto", head="linear")


def batches(sizes: tuple[int, ...] = UNEVEN) -> list[torch.Tensor]:
    return [torch.randn(size, *SHAPE) * (1 + i) - i for i, size in enumerate(sizes)]  # unlike each other


def second(program: Program, place: str) -> nn.Module:
    return program.get_submodule(f"{SKIP_NORMS}.{place}")


def moments(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means, and variances with n - 1, of every channel, in float64."""
    rows = h.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1)


def test_statistics_are_those_of_the_smaller_network_over_all_batches():
    model = warm_up(CifarResNet(3))
    program = transform(model, images(), exits="none", skips="auto")
    given = batches()
    assert reestimate_norms(program, given) == sum(UNEVEN)

    # The network without its skippable blocks, each mandatory norm replaced by the batch's own mean and variance, as in train().
    found: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}

    def normed(place: str, norm: nn.BatchNorm2d, h: torch.Tensor) -> torch.Tensor:
        found.setdefault(place, []).append((len(h), *moments(h)))
        return F.batch_norm(h, None, None, norm.weight, norm.bias, training=True)

    with torch.no_grad():
        for x in given:
            h = F.relu(model.bn1(model.conv1(x)))  # the stem's norm stays as it is
            for layer in ("layer1", "layer2", "layer3"):
                for i, block in enumerate(model.get_submodule(layer)[:2]):
                    y = F.relu(normed(f"{layer}.{i}.bn1", block.bn1, block.conv1(h)))
                    y = normed(f"{layer}.{i}.bn2", block.bn2, block.conv2(y))
                    if block.changes_shape:
                        extra = block.new_channels // 2
                        h = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
                    h = F.relu(y + h)
    assert len(found) == 12
    for place, rows in found.items():
        norm = second(program, place)
        for statistic, values in ((norm.running_mean, [mean for _, mean, _ in rows]), (norm.running_var, [var for _, _, var in rows])):
            weighted = sum(size * value for (size, _, _), value in zip(rows, values, strict=True)) / sum(UNEVEN)
            assert_close(statistic, weighted.float())


def test_the_mean_over_uneven_batches_is_the_mean_over_all_samples():
    model = warm_up(CifarResNet(2))
    program = transform(model, images(), exits="none", skips="auto")
    given = batches()
    reestimate_norms(program, given)
    with torch.no_grad():
        before_first_norm = model.layer1[0].conv1(F.relu(model.bn1(model.conv1(torch.cat(given)))))
    assert_close(second(program, "layer1.0.bn1").running_mean, moments(before_first_norm)[0].float())


def test_one_batch_of_everything_gives_its_variance_too():
    model = warm_up(PreActivation())
    program = transform(model, images(), exits="none", skips="auto")
    x = torch.randn(9, *SHAPE)
    reestimate_norms(program, [x])
    with torch.no_grad():
        mean, variance = moments(model.stem(x))
    norm = second(program, "stage1.0.bn1")
    assert_close(norm.running_mean, mean.float())
    assert_close(norm.running_var, variance.float())


def test_what_was_measured_before_does_not_count():
    program = with_skips(CifarResNet(2))
    given = batches()
    reestimate_norms(program, batches())
    reestimate_norms(program, given)
    once = copy.deepcopy(program)
    for module in once.get_submodule(SKIP_NORMS).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(100.0)
    reestimate_norms(once, given)
    assert all(torch.equal(a, b) for a, b in zip(program.state_dict().values(), once.state_dict().values(), strict=True))


def test_only_statistics_of_second_norms_change():
    program = with_skips(CifarResNet(3), "layer1,layer2.0")
    before = state(program)
    reestimate_norms(program, batches())
    changed = {key for key, tensor in program.state_dict().items() if not torch.equal(tensor, before[key])}
    places = [f"{SKIP_NORMS}.layer{stage}.{i}.bn{j}" for stage in (1, 2, 3) for i in (0, 1) for j in (1, 2)]
    assert changed == {f"{place}.{kind}" for place in places for kind in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(p.grad is None for p in program.parameters())


def test_measured_norms_make_the_smaller_network_see_normed_values():
    program = with_skips(CifarResNet(2))
    x = torch.randn(64, *SHAPE) * 3 + 1
    before = program(x, skip="all")
    reestimate_norms(program, [x])
    after, expected = program(x, skip="all"), copy.deepcopy(program).train()
    for module in expected.modules():
        module.training = isinstance(module, nn.BatchNorm2d) and module in set(expected.get_submodule(SKIP_NORMS).modules())
    # n - 1 against n in the variance: one part in 64 * 16 at the least
    torch.testing.assert_close(after, expected(x, skip="all", all_exits=False), rtol=0.01, atol=0.01)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_momenta_come_back(training):
    program = with_skips(CifarResNet(2)).train(training)
    norms = [module for module in program.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    second(program, "layer1.0.bn1").momentum = 0.3
    second(program, "layer1.0.bn2").momentum = None
    modes, momenta = {m: m.training for m in program.modules()}, {n: n.momentum for n in norms}
    reestimate_norms(program, batches())
    assert {m: m.training for m in program.modules()} == modes
    assert {n: n.momentum for n in norms} == momenta

    def breaks_off():
        yield images(4)
        raise RuntimeError("no more pictures")

    with pytest.raises(RuntimeError, match="no more pictures"):
        reestimate_norms(program, breaks_off())
    assert {m: m.training for m in program.modules()} == modes
    assert {n: n.momentum for n in norms} == momenta


def test_batches_may_carry_labels():
    program = with_skips(CifarResNet(2))
    given = batches()
    others = [copy.deepcopy(program) for _ in range(2)]
    assert reestimate_norms(program, given) == 17
    for other, form in zip(others, (tuple, list), strict=True):
        assert reestimate_norms(other, (form((x, torch.zeros(len(x)))) for x in given)) == 17
        assert all(torch.equal(a, b) for a, b in zip(program.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_frozen_network_can_be_measured():
    program = with_skips(CifarResNet(2), "layer1").freeze_backbone().train()
    reestimate_norms(program, batches())
    assert not second(program, "layer1.0.bn1").training


@pytest.mark.parametrize("build", [lambda: Encoders(3), lambda: InARow(8, *(Grouped() for _ in range(3)))])
def test_norms_without_statistics_have_nothing_to_measure(build):
    program = with_skips(build())
    before = state(program)
    assert reestimate_norms(program, batches()) == 17
    assert all(torch.equal(tensor, before[key]) for key, tensor in program.state_dict().items())


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x))


def test_a_network_without_skip_paths_is_refused():
    with pytest.raises(PlanError, match="the network has no skip paths, and so one set of norms"):
        reestimate_norms(captured("identity"), batches())


@pytest.mark.parametrize("sizes", [(), (1,)])
def test_too_few_samples_are_refused(sizes):
    with pytest.raises(DataError, match=f"norms cannot be measured on {len(sizes)} samples\n  hint: give some batches of training inputs"):
        reestimate_norms(with_skips(CifarResNet(2)), batches(sizes))


def test_norms_of_an_exported_network_that_stayed_functions_are_refused():
    model = warm_up(CifarResNet(2))
    model.layer1[0].bn1.register_buffer("other", torch.zeros(()))  # which makes it no norm of torch's
    program = transform(exported(model), images(), exits="none", skips="auto")
    before = state(program)
    with pytest.raises(PlanError, match=r"norms of an exported network cannot be measured: they are fixed in eval\(\)"):
        reestimate_norms(program, batches())
    assert all(torch.equal(tensor, before[key]) for key, tensor in program.state_dict().items())


def test_layer_norms_of_an_exported_network_have_nothing_to_measure():
    program = transform(
        exported(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), *(Residual() for _ in range(3)), nn.Linear(8, 5))), images(), skips="auto"
    )
    assert program.plan.skips[0].norms
    assert reestimate_norms(program, batches()) == 17


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))
