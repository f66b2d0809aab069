"""The network's own head, read off its graph: the same answers, and the same parts on another value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.revcol_t.model import RevCol
from exitify.errors import PlanError
from exitify.heads import ExitHead, head_spec
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.own_head import OwnHead, own_head
from exitify.program import Program
from exitify.tracing import capture
from tests.helpers import assert_close, captured
from tests.models import CLASSES, SHAPE, ZOO


class Tail(nn.Module):
    """A convolution, a second one, and the head that a test gives."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).sigmoid())


class NormFirst(nn.Module):
    """Over channels that come last, as Swin's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16, eps=1e-6), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 1).flatten(1))


POOL = nn.AdaptiveAvgPool2d(1), nn.Flatten()
HEADS = {
    "linear": (nn.Sequential(*POOL, nn.Linear(16, CLASSES)), ("mean",), 0),
    "dropout": (nn.Sequential(*POOL, nn.Dropout(0.2), nn.Linear(16, CLASSES)), ("mean", "dropout:0.2"), 0),
    "norm then pool": (nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), *POOL, nn.Linear(16, CLASSES)), ("batch_norm:1e-05", "relu", "mean"), 0),
    "pool then norm": (nn.Sequential(*POOL, nn.LayerNorm(16, eps=1e-6), nn.Linear(16, CLASSES)), ("mean", "layer_norm:1e-06"), 0),
    "group norm": (nn.Sequential(nn.GroupNorm(4, 16), *POOL, nn.Linear(16, CLASSES)), ("group_norm:4:1e-05", "mean"), 0),
    "largest": (nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)), ("max",), 0),
    "hidden": (
        nn.Sequential(*POOL, nn.Linear(16, 12), nn.Hardswish(), nn.Dropout(0.1), nn.Linear(12, CLASSES)),
        ("mean", "linear:12", "hardswish", "dropout:0.1"), 12,
    ),
    "two hidden": (
        nn.Sequential(*POOL, nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, CLASSES)),
        ("mean", "linear:12", "gelu", "linear:9", "silu"), 9,
    ),
}  # fmt: skip


def program_of(head: nn.Module) -> Program:
    return capture(Tail(head).eval(), torch.randn(1, *SHAPE))


@pytest.mark.parametrize("name", HEADS)
def test_the_steps_of_the_own_head_are_read(name):
    head, steps, width = HEADS[name]
    assert own_head(program_of(head)) == OwnHead("sigmoid", steps, width)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_these_steps_with_the_networks_weights_answers_as_the_network(name):
    model = Tail(HEADS[name][0]).eval()
    program = capture(model, torch.randn(1, *SHAPE))
    found = own_head(program)
    assert found is not None
    spec = head_spec("own", program.values[found.value], found.value, CLASSES, own=found.steps, own_width=found.width)
    built = ExitHead(spec).eval()
    weights = list(model.head.state_dict().values())
    assert [tensor.shape for tensor in built.state_dict().values()] == [tensor.shape for tensor in weights]
    built.load_state_dict(dict(zip(built.state_dict(), weights)))
    x = torch.randn(3, *SHAPE)
    assert_close(built(model.second(model.first(x).relu()).sigmoid()), model(x))


def test_a_norm_over_channels_that_come_last_is_one_over_channels():
    found = own_head(program_of(NormFirst()))
    assert found is not None
    assert found.steps == ("layer_norm:1e-06", "mean")


@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_zoo_lends_its_head_to_its_exits(name):
    program = captured(name)
    places = [place.value for place in ChooseExits("1").decide(program)[1] if place.verdict in ("exit", "not among the 1 spaced evenly")]
    head = ChooseExits(places[-1], "own")(program).plan.exits[0].head
    assert head.kind == "own"
    assert head.steps in {("mean",), ("layer_norm:1e-05", "first")}


def test_the_head_of_revcols_columns_has_the_papers_parameters():
    model = RevCol(channels=(8, 16, 24, 512), blocks=(1, 1, 1, 1), columns=2, classes=1000).eval()
    program = ChooseExits("columns.0", "own")(capture(model, torch.randn(1, 3, 64, 64)))
    head = ExitHead(program.plan.exits[0].head)
    assert program.plan.exits[0].head.steps == ("mean", "layer_norm:1e-06")
    assert sum(parameter.numel() for parameter in head.parameters()) == 514_024


class KeepsPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16 * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("head", [KeepsPlaces, Convolves])
def test_a_head_of_another_kind_is_refused_by_name(head):
    program = program_of(head())
    assert own_head(program) is None
    with pytest.raises(PlanError, match=r"the network's own head cannot stand elsewhere: .*\n  hint: `--head linear`, `conv` or `mlp`"):
        ChooseExits("relu", "own")(program)


@pytest.mark.parametrize("steps", [("softmax",), ("layer_norm",)])
def test_steps_that_no_head_has_are_refused(steps):
    spec = head_spec("own", captured("plain").values["relu"], "relu", CLASSES, own=("mean",))
    with pytest.raises((PlanError, IndexError)):
        ExitHead(type(spec)(**{**vars(spec), "steps": steps}))


def test_where_the_own_heads_norm_cannot_stand_the_place_is_turned_down_and_not_the_network():
    class Narrow(Tail):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.GroupNorm(16, 16), *POOL, nn.Linear(16, CLASSES)))
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)

    program = capture(Narrow().eval(), torch.randn(1, *SHAPE))
    with pytest.raises(
        PlanError, match=r"the network's own head cannot stand after 'relu': group_norm:16:1e-05 on 8 channels\n  hint: `--head linear`"
    ):
        ChooseExits("relu", "own")(program)
    verdicts = {place.value: place.verdict for place in ChooseExits("auto", "own").decide(program)[1]}
    assert "cannot stand after 'relu'" in verdicts["relu"]
