"""Where a network could stop: narrow places everywhere, wide ones where it has no narrow ones for long, priced by what crosses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.revcol_t.model import RevCol, revcol_t
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.cost import value_cost
from exitify.passes.exit_places import Places
from exitify.pipeline import transform
from exitify.plan import BOUNDARY_MACS, BYTE_MACS, boundary_macs
from exitify.program import Program
from exitify.tracing import capture
from tests.helpers import assert_close, captured, run_segments
from tests.models import CLASSES, SHAPE, ZOO


class UNet(nn.Module):
    """A way down and a way up that reads all of the way down again; `(N, 3, 16, 16)`."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (self._stage(a, b) for a, b in ((3, 8), (8, 16), (16, 32)))
        self.up2, self.up1 = self._stage(48, 16), self._stage(24, 8)
        self.fc = nn.Linear(8, CLASSES)

    @staticmethod
    def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
        first, second = (nn.Conv2d(c, channels_out, 3, padding=1) for c in (channels_in, channels_out))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.up2(torch.cat((F.interpolate(x, scale_factor=2), second), 1))
        return self.fc(self.up1(torch.cat((F.interpolate(x, scale_factor=2), first), 1)).mean((2, 3)))


class Branches(nn.Module):
    """Two resolutions side by side that exchange after every unit, as in HRNet."""

    def __init__(self, units: int = 4) -> None:
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.units = nn.ModuleList(Exchange() for _ in range(units))
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.stem(x).relu()
        coarse = self.split(fine).relu()
        for unit in self.units:
            fine, coarse = unit(fine, coarse)
        return self.fc(torch.cat((fine.mean((2, 3)), coarse.mean((2, 3))), 1))


class Exchange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.down = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine, coarse = self.fine(fine).relu(), self.coarse(coarse).relu()
        return fine + F.interpolate(self.up(coarse), scale_factor=2), coarse + self.down(F.avg_pool2d(fine, 2))


def program_of(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Program:
    return capture(model.eval(), torch.randn(1, *shape))


def wide(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> dict[str, int]:
    """Places of wide cuts, each with how many tensors cross."""
    places = Places(program_of(model, shape))
    return {place.place: len(place.crossing) for place in places.wide(places.narrow())}


def test_in_a_network_of_columns_exits_stand_where_columns_end_and_five_tensors_cross():
    found = wide(RevCol(channels=(8, 16, 24, 32), blocks=(1, 1, 2, 1), columns=4, classes=CLASSES), (3, 64, 64))
    assert {f"columns.{i}": found.get(f"columns.{i}") for i in range(3)} == {f"columns.{i}": 5 for i in range(3)}


def test_a_network_of_columns_takes_three_exits_whose_segments_are_the_network():
    torch.manual_seed(0)
    model = RevCol(channels=(8, 16, 24, 32), blocks=(1, 1, 2, 1), columns=4, classes=CLASSES).eval()
    x = torch.randn(2, 3, 64, 64)
    program = transform(model, x, exits=3, head="own")
    assert [point.place for point in program.plan.exits] == ["columns.0", "columns.1", "columns.2"]
    trunks = [segment for segment in program.plan.segments if segment.kind == "trunk"]
    assert [len(segment.inputs) for segment in trunks] == [1, 5, 5, 5]
    values = run_segments(program, x)
    assert_close(values[program.plan.output], model(x))
    outputs = program(x, all_exits=True)
    for point in program.plan.exits:
        assert_close(values[point.logits], outputs[point.name])


@pytest.mark.slow
def test_revcol_t_itself_takes_three_exits_of_514024_parameters_each():
    model = revcol_t().eval()
    x = torch.randn(1, 3, 224, 224)
    program = transform(model, x, exits=3, head="own")
    assert [point.place for point in program.plan.exits] == ["columns.0", "columns.1", "columns.2"]
    assert [program.plan.head(point).cost.parameters for point in program.plan.exits] == [514_024] * 3
    assert [len(segment.inputs) for segment in program.plan.segments if segment.kind == "trunk"] == [1, 5, 5, 5]
    assert_close(run_segments(program, x)[program.plan.output], model(x))


def test_the_way_down_of_a_u_shape_hands_on_all_that_the_way_up_reads_again():
    found = wide(UNet())
    assert found["down2"] == 2
    assert found["bottom"] == 3


def test_where_branches_run_side_by_side_an_exit_on_one_leaves_the_other_to_be_computed():
    found = wide(Branches())
    assert found
    assert {found[f"units.{i}"] for i in range(3)} == {3}  # what the exit reads, and both values that the finer branch is then made of
    assert all(place.startswith(("units", "split", "relu")) for place in found)


@pytest.mark.parametrize("name", ZOO)
def test_inside_of_a_residual_branch_is_no_place(name):
    places = Places(captured(name))
    assert places.wide(places.narrow()) == []


@pytest.mark.parametrize("name", ZOO)
def test_the_share_of_a_place_is_the_cost_of_computing_it(name):
    places = Places(captured(name))
    for place in places.narrow():
        assert place.share == pytest.approx(value_cost(places.program, places.costs, place.value).macs / places.full.macs)


@pytest.mark.parametrize("model", [UNet, Branches])
def test_what_crosses_a_cut_is_what_the_rest_reads(model):
    program = program_of(model())
    places = Places(program)
    for place in places.wide(places.narrow()):
        placed = transform(model().eval(), torch.randn(1, *SHAPE), exits=place.value)
        last = placed.plan.segments[-1]
        assert set(last.inputs) - set(place.crossing) <= {program.plan.input}
        assert place.crossing_bytes == sum(program.values[value].size_bytes for value in place.crossing)


def test_bytes_that_cross_are_priced_and_reported():
    assert boundary_macs(1000) == BOUNDARY_MACS + BYTE_MACS * 1000
    considered = ChooseExits("1").decide(program_of(Branches()))[1]
    assert {place.crossing for place in considered} >= {1, 3}
    assert all(place.crossing_bytes > 0 for place in considered if place.verdict == "exit")


class Mixed(nn.Module):
    """A square of three sides alike, so that only the layers tell what its channels are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        x = self.norm(x.permute(0, 2, 3, 1)).relu()
        return self.fc(x.mean((1, 2)))


def test_which_side_is_channels_is_told_by_the_layers_before_and_not_by_the_shape():
    program = program_of(Mixed(), (3, 8, 12))  # 8x8x12, and 8x12x8: shapes that say the other way round, or nothing
    places = Places(program)
    assert places.layout_of("relu") == "nchw"
    program = program_of(Mixed(), (3, 6, 12))
    places = Places(program)
    assert (places.layout_of("relu"), places.layout_of("relu_1")) == ("nchw", "nhwc")
    assert [point.head.layout for point in ChooseExits("relu,relu_1", "linear")(program).plan.exits] == ["nchw", "nhwc"]


def test_a_plan_tells_the_same_bytes_that_cross_as_the_place_did():
    for model, shape in (
        (UNet(), SHAPE),
        (Branches(), SHAPE),
        (RevCol(channels=(8, 16, 24, 32), blocks=(1, 1, 2, 1), columns=4, classes=CLASSES), (3, 64, 64)),
    ):
        program = program_of(model, shape)
        places = Places(program)
        for place in [*places.narrow(), *places.wide(places.narrow())]:
            if 0.05 < place.share < 0.95 and len(program.values[place.value].shape) == 3:
                plan = transform(model, torch.randn(1, *shape), exits=place.value, head="linear").plan
                assert plan.crossing_bytes(plan.exits[0]) == place.crossing_bytes, place
