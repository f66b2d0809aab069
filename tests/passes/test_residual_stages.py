"""Stages are read from the graph alone: whoever wrote the network, in whatever mode, at whatever batch."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.passes.choose_skips import ChooseSkips
from exitify.passes.residual_stages import Stage, drops_path, find_stages, is_norm, mandatory_nodes
from exitify.plan import SkipPath
from exitify.program import Program
from exitify.tracing import capture
from tests.helpers import captured
from tests.models import CLASSES, SHAPE, IdentityBlock, warm_up
from tests.residual_models import Encoders, InARow, PreActivation, captured_from, exported


def stages_of(model: nn.Module, size: int = 16, batch: int = 1) -> tuple[Stage, ...]:
    return find_stages(capture(model.eval(), torch.randn(batch, 3, size, size)))


def shortcuts(stages: tuple[Stage, ...]) -> dict[str, str]:
    """By stage, its blocks' shortcuts: `i` identity, `p` projection, `-` none."""
    letters = {"identity": "i", "projection": "p", "none": "-"}
    return {stage.name: "".join(letters[block.shortcut] for block in stage.blocks) for stage in stages}


def places(stages: tuple[Stage, ...]) -> list[tuple[str, ...]]:
    return [tuple(block.place for block in stage.blocks) for stage in stages]


FOUND: dict[str, dict[str, str]] = {
    "resnet18": {"layer1": "ii", "layer2": "pi", "layer3": "pi", "layer4": "pi"},
    "resnet50": {"layer1": "pii", "layer2": "piii", "layer3": "piiiii", "layer4": "pii"},
    "resnet101": {"layer1": "pii", "layer2": "piii", "layer3": "p" + 22 * "i", "layer4": "pii"},
    "mobilenet_v2": {
        "features.2 to features.3": "-i",
        "features.4 to features.6": "-ii",
        "features.7 to features.10": "-iii",
        "features.11 to features.13": "-ii",
        "features.14 to features.16": "-ii",
    },
    "efficientnet_b0": {"features.2": "-i", "features.3": "-i", "features.4": "-ii", "features.5": "-ii", "features.6": "-iii"},
    "vit": {"encoder.layers": 12 * "i"},
    "swin": {"features.1": "ii", "features.3": "ii", "features.5": "iiiiii", "features.7": "ii"},
    "convnext": {"features.1": "iii", "features.3": "iii", "features.5": 9 * "i", "features.7": "iii"},
    "alexnet": {},
    "densenet": {},
    "shufflenet": {},
}
"""What stages networks of torchvision have, and their shortcuts."""


@pytest.mark.parametrize("name", FOUND)
def test_the_stages_of_networks_that_others_wrote(name, torchvision):
    stages = find_stages(captured_from(torchvision, name))
    assert shortcuts(stages) == FOUND[name]
    assert [stage.isotropic for stage in stages] == [name == "vit"] * len(stages)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_cifar_resnet_has_three_stages_whose_later_ones_begin_with_a_projection(depth):
    rest = "i" * (depth - 1)
    layers = {"layer1": f"i{rest}", "layer2": f"p{rest}", "layer3": f"p{rest}"}
    assert shortcuts(stages_of(CifarResNet(depth))) == (layers if depth > 1 else {f"{name}.0": kind for name, kind in layers.items()})


def test_blocks_read_and_give_what_stands_before_and_after_them_the_activation_behind_the_addition_included():
    first, second, third = stages_of(CifarResNet(2))
    assert [(block.place, block.entry, block.exit) for block in first.blocks] == [("layer1.0", "relu", "relu_2"), ("layer1.1", "relu_2", "relu_4")]
    assert [(block.place, block.entry, block.exit) for block in second.blocks] == [("layer2.0", "relu_4", "relu_6"), ("layer2.1", "relu_6", "relu_8")]
    assert [stage.start for stage in (first, second, third)] == ["relu", "relu_4", "relu_8"]


def test_where_nothing_follows_the_addition_blocks_end_with_it():
    first, second = stages_of(PreActivation())
    assert shortcuts((first, second)) == {"stage1": "iii", "stage2": "piii"}
    assert [(block.entry, block.exit) for block in first.blocks] == [("stem", "add"), ("add", "add_1"), ("add_1", "add_2")]
    assert [block.exit for block in second.blocks] == ["add_3", "add_4", "add_5", "add_6"]
    assert second.start == "add_2"  # so that the norm in front of the projection belongs to its stage


def test_a_block_without_a_shortcut_belongs_to_the_stage_that_it_begins(torchvision):
    stage = stages_of(torchvision.models.MobileNetV2(num_classes=CLASSES, width_mult=0.25), 32)[1]
    assert [(block.place, block.shortcut) for block in stage.blocks] == [("features.2", "none"), ("features.3", "identity")]
    assert (stage.start, stage.blocks[0].exit, stage.blocks[1].exit) == ("add", "features_2_conv_3", "add_1")


def test_layers_between_two_stages_belong_to_the_later_one(torchvision):
    stages = find_stages(captured_from(torchvision, "swin"))
    assert [stage.start for stage in stages] == ["features_0_2", *(stage.blocks[-1].exit for stage in stages[:-1])]
    assert [stage.blocks[0].entry for stage in stages[1:]] == ["features_2_reduction", "features_4_reduction", "features_6_reduction"]


def test_attention_and_what_follows_it_are_one_block(torchvision):
    (stage,) = find_stages(captured_from(torchvision, "vit"))
    assert [(block.place, block.entry, block.exit) for block in stage.blocks[:2]] == [
        ("encoder.layers.encoder_layer_0", "encoder_dropout", "add_2"),
        ("encoder.layers.encoder_layer_1", "add_2", "add_4"),
    ]
    (stage,) = find_stages(captured("transformer"))
    assert [(block.place, block.entry, block.exit) for block in stage.blocks] == [("block1", "add", "add_2"), ("block2", "add_2", "add_4")]


@pytest.mark.parametrize("build", [lambda: CifarResNet(2), PreActivation])
def test_neither_batch_nor_mode_changes_the_stages(build):
    model = warm_up(build())
    expected = find_stages(capture(model, torch.randn(1, *SHAPE)))
    assert expected
    for batch in (1, 3):
        assert find_stages(capture(model.eval(), torch.randn(batch, *SHAPE))) == expected
        assert find_stages(capture(model.train(), torch.randn(batch, *SHAPE))) == expected


@pytest.mark.parametrize("build", [lambda: CifarResNet(2), PreActivation, lambda: InARow(8, IdentityBlock(8), IdentityBlock(8))])
def test_an_exported_network_has_the_stages_of_its_module(build):
    model = build()
    before, after = stages_of(model), find_stages(capture(exported(model), torch.randn(1, *SHAPE)))
    assert places(after) == places(before)
    assert shortcuts(after) == shortcuts(before)
    assert [stage.isotropic for stage in after] == [stage.isotropic for stage in before]


def test_an_exported_transformer_has_the_stages_of_its_module():
    program = capture(exported(warm_up(Encoders(2))), torch.randn(1, *SHAPE))
    assert places(find_stages(program)) == places(stages_of(Encoders(2)))


@pytest.mark.parametrize("name", ["plain", "dropout", "depthwise", "stochastic"])
def test_a_network_without_residual_additions_has_no_stages(name):
    assert find_stages(captured(name)) == ()  # the last has them inside of pieces that tracing leaves whole


def test_projections_alone_are_stages_of_one_block():
    stages = find_stages(captured("projection"))
    assert shortcuts(stages) == {"block1": "p", "block2": "p"}


def test_in_place_additions_are_residual_too():
    (stage,) = find_stages(captured("in_place"))
    assert [(block.entry, block.exit, block.shortcut) for block in stage.blocks] == [
        ("stem", "block1_relu_1", "identity"),
        ("block1_relu_1", "block2_relu_1", "identity"),
    ]


class Methods(nn.Module):
    """A block that adds as told."""

    def __init__(self, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(4, 4, 3, padding=1), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(self.conv(x), x)


@pytest.mark.parametrize(
    "add", [torch.add, lambda y, x: y.add(x), lambda y, x: y.add_(x), operator.iadd, lambda y, x: x + y, lambda y, x: torch.add(y, x, alpha=1)]
)
def test_however_an_addition_is_written_it_is_one(add):
    (stage,) = stages_of(InARow(4, Methods(add), Methods(add)))
    assert [block.shortcut for block in stage.blocks] == ["identity", "identity"]


@pytest.mark.parametrize(
    "add",
    [
        lambda y, x: x * y,
        lambda y, x: x - y,
        lambda y, x: y + 1,
        lambda y, x: y + x.mean((2, 3), keepdim=True),
        lambda y, x: torch.cat((y, x), 1)[:, :4],
    ],
)
def test_what_only_looks_like_a_residual_addition_is_none(add):
    assert stages_of(InARow(4, Methods(add), Methods(add))) == ()


def test_a_block_whose_value_is_not_treated_as_the_others_are_has_no_identity_shortcut():
    class LastBare(IdentityBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv2(F.relu(self.conv1(x))) + x

    assert shortcuts(stages_of(InARow(8, IdentityBlock(8), IdentityBlock(8), LastBare(8)))) == {"blocks": "iip"}


def test_weights_between_two_additions_part_stages_and_norms_do_not():
    blocks = [Methods(torch.add) for _ in range(4)]
    assert shortcuts(stages_of(InARow(4, *blocks[:2], nn.BatchNorm2d(4), *blocks[2:]))) == {"blocks": "iiii"}
    parted = stages_of(InARow(4, *blocks[:2], nn.Conv2d(4, 4, 1), *blocks[2:]))
    assert shortcuts(parted) == {"blocks.0 to blocks.1": "ii", "blocks.3 to blocks.4": "ii"}
    assert parted[1].start == "add_1"


def test_another_size_parts_stages():
    blocks = [Methods(torch.add) for _ in range(4)]
    assert shortcuts(stages_of(InARow(4, *blocks[:2], nn.MaxPool2d(2), *blocks[2:]))) == {"blocks.0 to blocks.1": "ii", "blocks.3 to blocks.4": "ii"}


def test_a_transformer_whose_blocks_are_not_alike_is_one_block():
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.scaled_dot_product_attention(x, x, x)

    model = Encoders(2)
    model.layers.append(Attention())
    (stage,) = stages_of(model)
    assert [(block.entry, block.exit) for block in stage.blocks] == [("transpose", "add_4")]


class AddedOutside(nn.Module):
    """Branches that are single layers, added by whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.fc(x)


def test_a_block_that_is_no_module_is_named_by_its_values():
    (stage,) = find_stages(capture(AddedOutside().eval(), torch.randn(1, 8)))
    assert [block.place for block in stage.blocks] == ["stem to add", "add to add_1"]


def test_one_block_called_twice_is_two_blocks_of_one_name():
    (stage,) = find_stages(captured("shared"))
    assert [(block.place, block.entry, block.exit) for block in stage.blocks] == [("block", "relu", "relu_2"), ("block", "relu_2", "relu_4")]


def skips_of(program: Program) -> tuple[SkipPath, ...]:
    return ChooseSkips()(program).plan.skips


def test_mandatory_nodes_run_from_the_stages_start_to_where_it_may_end_and_leave_projections_out(torchvision):
    program = captured_from(torchvision, "resnet18")
    first, second = (mandatory_nodes(program, path) for path in skips_of(program)[:2])
    assert first == ["layer1_0_conv1", "layer1_0_bn1", "layer1_0_relu", "layer1_0_conv2", "layer1_0_bn2", "add", "layer1_0_relu_1"]
    assert second == ["layer2_0_conv1", "layer2_0_bn1", "layer2_0_relu", "layer2_0_conv2", "layer2_0_bn2", "add_2", "layer2_0_relu_1"]


def test_mandatory_nodes_hold_what_joins_two_stages(torchvision):
    program = captured_from(torchvision, "swin")
    nodes = mandatory_nodes(program, skips_of(program)[1])
    assert {"features_2_norm", "features_2_reduction", "features_3_0_norm1"} <= set(nodes)
    assert not [name for name in nodes if name.startswith(("features_1", "features_3_1"))]


def test_norms_and_what_drops_paths_are_known_as_modules_and_as_functions(torchvision):
    program = captured_from(torchvision, "convnext")
    nodes = {node.name: node for node in program.graph.nodes}
    assert {name for name in nodes if is_norm(program, nodes[name])} >= {"layer_norm", "features_1_0_block_2", "layer_norm_1"}
    assert not is_norm(program, nodes["features_1_0_block_3"])
    dropping = [name for name in nodes if drops_path(program, nodes[name])]
    assert len(dropping) == 18
    assert dropping[0] == "features_1_0_stochastic_depth"

    from_export = capture(exported(CifarResNet(1)), torch.randn(1, *SHAPE))
    assert sum(is_norm(from_export, node) for node in from_export.graph.nodes) == 7


def test_torchs_own_encoder_layers_in_a_row_are_blocks():
    """Tracing leaves each whole, so that its norms do not switch."""
    layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)))
    model = nn.Sequential(nn.Linear(5, 8), layers, nn.Flatten(), nn.Linear(48, 3)).eval()
    program = capture(model, torch.randn(1, 6, 5))
    (stage,) = find_stages(program)
    assert [block.place for block in stage.blocks] == ["1.0", "1.1", "1.2", "1.3"]
    assert {block.shortcut for block in stage.blocks} == {"identity"}


class Mixing(nn.Module):
    """Two additions in one module, tokens first, then channels; `flat`: with positions in one row between them."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(6), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.channels = nn.LayerNorm(6), nn.Linear(6, 6)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x))
        if self.flat:
            x = x.reshape(x.shape[0], -1, 6)
        x = x + self.channels(self.norm2(x))
        return x.reshape(x.shape[0], 4, -1, 6) if self.flat else x


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("exports", [False, True])
def test_additions_that_one_module_makes_of_its_parts_are_one_block(flat, exports):
    model = nn.Sequential(*(Mixing(flat) for _ in range(4)), nn.Flatten(), nn.Linear(4 * 5 * 6, 3)).eval()
    x = torch.randn(2, 4, 5, 6)
    if exports:
        model = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    (stage,) = find_stages(capture(model, x))
    assert [block.place for block in stage.blocks] == ["0", "1", "2", "3"]


def test_additions_made_for_several_blocks_by_the_module_around_them_are_blocks_each():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.out = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for branch in self.branches:
                x = x + branch(x).relu()
            return self.out(x)

    (stage,) = find_stages(capture(Around().eval(), torch.randn(1, 6)))
    assert [block.place for block in stage.blocks] == [f"branches.{i}" for i in range(4)]
