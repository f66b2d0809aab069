"""Second sets of norms: exactly the mandatory sub-paths', copies at first, and no one else's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import PlanError
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.choose_skips import ChooseSkips
from exitify.passes.cut_segments import CutSegments
from exitify.passes.switch_norms import SwitchNorms
from exitify.program import SKIP_NORMS, Program
from exitify.tracing import capture
from tests.helpers import captured, images, state
from tests.models import SHAPE, EncoderBlock, warm_up
from tests.residual_models import Encoders, InARow, PreActivation, captured_from, exported


def switched(program: Program, skips: str = "auto") -> Program:
    return SwitchNorms()(ChooseSkips(skips)(program))


def program_of(model: nn.Module) -> Program:
    return capture(warm_up(model), images())


def second_tensors(program: Program) -> dict[str, torch.Tensor]:
    """Tensors of the second sets, under the names of the first."""
    return {name.removeprefix(f"{SKIP_NORMS}."): tensor for name, tensor in program.state_dict().items() if name.startswith(f"{SKIP_NORMS}.")}


def second_owners(program: Program) -> list[str]:
    """The modules whose norms have two sets, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in second_tensors(program)))


def added_parameters(program: Program) -> int:
    return sum(p.numel() for name, p in program.named_parameters() if name.startswith(f"{SKIP_NORMS}."))


def test_a_resnet_50_grows_by_26112_parameters(torchvision):
    # Kang 2024's code: 25,557,032 become 25,583,144.
    before = captured_from(torchvision, "resnet50")
    after = switched(before)
    assert sum(p.numel() for p in before.parameters()) == 25_557_032
    assert sum(p.numel() for p in after.parameters()) == 25_583_144
    assert added_parameters(after) == 26_112


def test_a_vision_transformer_of_width_768_grows_by_24576_parameters():
    # Two norms in each of eight mandatory blocks; one token and a narrow MLP leave the count as it is in ViT-B/16.
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(768), nn.LayerNorm(768)
            self.narrow, self.wide = nn.Linear(768, 4), nn.Linear(4, 768)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm1(x)
            x = x + F.scaled_dot_product_attention(y, y, y)
            return x + self.wide(self.narrow(self.norm2(x)))

    model = Encoders(0)
    model.patches, model.fc = nn.Conv2d(3, 768, 16), nn.Linear(768, 5)
    model.layers = nn.Sequential(*(Block() for _ in range(12)), nn.LayerNorm(768))
    assert added_parameters(switched(program_of(model))) == 24_576


def test_the_stems_projections_and_skippable_norms_have_one_set(torchvision):
    program = switched(captured_from(torchvision, "resnet50"))
    expected = [f"layer{stage}.{block}.bn{i}" for stage, mandatory in enumerate([2, 2, 3, 2], 1) for block in range(mandatory) for i in (1, 2, 3)]
    assert sorted(second_owners(program)) == sorted(expected)
    assert [len(path.norms) for path in program.plan.skips] == [6, 6, 9, 6]


def test_each_norm_switches_with_its_own_stage():
    program = switched(program_of(CifarResNet(3)))
    assert [path.norms for path in program.plan.skips] == [
        tuple(f"layer{stage}_{block}_bn{i}" for block in (0, 1) for i in (1, 2)) for stage in (1, 2, 3)
    ]


def test_norms_in_front_of_a_projection_switch_with_the_stage_that_it_begins():
    program = switched(program_of(PreActivation()))
    assert [path.norms for path in program.plan.skips] == [
        tuple(f"stage{stage}_{block}_bn{i}" for block in (0, 1) for i in (1, 2)) for stage in (1, 2)
    ]


def test_the_final_norm_of_a_transformer_has_one_set(torchvision):
    program = switched(captured_from(torchvision, "vit"))
    blocks = [i for i in range(12) if i % 3 != 2]
    expected = [f"encoder.layers.encoder_layer_{i}.ln_{j}" for i in blocks for j in (1, 2)]
    assert sorted(second_owners(program)) == sorted(expected)
    assert added_parameters(program) == 8 * 2 * 2 * 16


def test_the_norm_that_merges_patches_switches_with_the_stage_behind_it(torchvision):
    program = switched(captured_from(torchvision, "swin"))
    first, second, third, fourth = (path.norms for path in program.plan.skips)
    assert first == ("features_1_0_norm1", "features_1_0_norm2")
    assert second == ("features_2_norm", "features_3_0_norm1", "features_3_0_norm2")
    assert third == ("features_4_norm", *(f"features_5_{i}_norm{j}" for i in range(3) for j in (1, 2)))
    assert fourth == ("features_6_norm", "features_7_0_norm1", "features_7_0_norm2")
    owners = second_owners(program)
    assert "norm" not in owners
    assert "features.0.2" not in owners


def test_norms_that_are_functions_switch_too(torchvision):
    program = switched(captured_from(torchvision, "convnext"))
    assert [path.norms for path in program.plan.skips][1] == ("layer_norm_1", "features_3_0_block_2", "features_3_1_block_2")
    owners = second_owners(program)
    assert {"features.2.0", "features.4.0", "features.6.0"} <= set(owners)  # LayerNorm2d between the stages
    assert not {"features.0.1", "classifier.0"} & set(owners)


def test_norms_of_an_exported_network_switch_with_their_statistics():
    program = switched(capture(exported(CifarResNet(2)), images()))
    assert [len(path.norms) for path in program.plan.skips] == [2, 2, 2]
    tensors = second_tensors(program)
    assert {name for name in tensors if name.startswith("layer1.")} == {
        f"layer1.0.bn{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    x = images(2)
    before = program(x, skip="all")
    with torch.no_grad():
        program.get_buffer(f"{SKIP_NORMS}.layer1.0.bn1.running_mean").add_(1)
    assert not torch.equal(program(x, skip="all"), before)


class Normed(nn.Module):
    """A residual block around a norm of the user's choice."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.norm(x))


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm2d(8), lambda: nn.GroupNorm(2, 8), lambda: nn.LayerNorm((8, 16, 16)), lambda: nn.RMSNorm((8, 16, 16))]
)
def test_norms_of_every_kind_switch(norm):
    program = switched(capture(InARow(8, *(Normed(norm()) for _ in range(3))).eval(), images()))
    assert second_owners(program) == ["blocks.0.norm", "blocks.1.norm"]
    assert type(program.get_submodule(f"{SKIP_NORMS}.blocks.0.norm")) is type(norm())


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        lambda: nn.LayerNorm((8, 16, 16), elementwise_affine=False),
        nn.Identity,
        lambda: nn.InstanceNorm2d(8),
    ],
)
def test_where_a_norm_has_nothing_to_switch_there_is_one_set(norm):
    program = switched(capture(InARow(8, *(Normed(norm()) for _ in range(2))).eval(), images()))
    assert [path.norms for path in program.plan.skips] == [()]
    assert SKIP_NORMS not in program._modules
    assert not CutSegments()(program).plan.segment("trunk_skip1").has_two_norm_sets


@pytest.mark.parametrize("build", [lambda: CifarResNet(2), PreActivation, lambda: InARow(8, *(Normed(nn.GroupNorm(2, 8)) for _ in range(3)))])
def test_a_second_set_is_a_copy_under_the_same_path_and_shares_nothing(build):
    program = switched(program_of(build()))
    first, second = program.state_dict(), second_tensors(program)
    assert second
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.items())
    assert not {tensor.data_ptr() for tensor in second.values()} & {first[name].data_ptr() for name in second}
    assert len({tensor.data_ptr() for tensor in second.values()}) == len(second)


def test_before_it_is_trained_a_second_set_changes_nothing():
    plain = ChooseSkips()(program_of(CifarResNet(3)))
    program = SwitchNorms()(plain)
    x = images(2)
    for mask in ("000", "100", "011", "111"):
        assert torch.equal(program(x, skip=mask), plain(x, skip=mask))


def test_a_frozen_norms_second_set_is_frozen_and_modes_are_the_first_sets():
    model = warm_up(CifarResNet(2))
    model.layer1[0].bn1.weight.requires_grad_(False)
    program = switched(capture(model, images()))
    assert not program.get_parameter(f"{SKIP_NORMS}.layer1.0.bn1.weight").requires_grad
    assert program.get_parameter(f"{SKIP_NORMS}.layer1.0.bn1.bias").requires_grad
    assert not program.get_submodule(f"{SKIP_NORMS}.layer1.0.bn1").training
    assert program.train().get_submodule(f"{SKIP_NORMS}.layer1.0.bn1").training


def test_the_program_given_is_left_alone():
    program = ChooseSkips()(program_of(CifarResNet(2)))
    plan, before, names = program.plan, state(program), [node.name for node in program.graph.nodes]
    result = SwitchNorms()(program)
    assert program.plan is plan
    assert SKIP_NORMS not in program._modules
    assert [node.name for node in program.graph.nodes] == [node.name for node in result.graph.nodes] == names
    assert state(program).keys() == before.keys()
    assert all(result.get_parameter(name) is p for name, p in program.named_parameters())


def test_one_block_called_twice_has_a_second_set_for_its_mandatory_call_alone():
    program = switched(captured("shared"))
    (path,) = program.plan.skips
    assert path.norms == ("block_conv1_1", "block_conv2_1")
    assert second_owners(program) == ["block.conv1.1", "block.conv2.1"]


def test_where_nothing_stands_before_the_blocks_left_out_no_norm_switches():
    program = switched(program_of(CifarResNet(3)), "layer1.0")
    assert [path.norms for path in program.plan.skips] == [()]
    assert SKIP_NORMS not in program._modules


def test_blocks_that_are_kept_behind_those_left_out_have_one_set():
    program = switched(program_of(CifarResNet(4)), "layer2.1")
    (path,) = program.plan.skips
    assert path.norms == ("layer2_0_bn1", "layer2_0_bn2")


def test_without_skip_paths_nothing_is_added():
    program = captured("identity")
    result = SwitchNorms()(program)
    assert result.plan == program.plan
    assert SKIP_NORMS not in result._modules


def test_drop_paths_of_mandatory_blocks_alone_are_named(torchvision):
    paths = switched(captured_from(torchvision, "convnext")).plan.skips
    assert paths[0].drop_paths == ("features_1_0_stochastic_depth", "features_1_1_stochastic_depth")
    assert [len(path.drop_paths) for path in paths] == [2, 2, 5, 2]


def test_norms_switch_once():
    program = switched(program_of(CifarResNet(2)))
    with pytest.raises(PlanError, match="this network's norms switch already\n  hint: transform the original model"):
        SwitchNorms()(program)


def test_a_network_with_a_member_of_that_name_is_refused():
    model = warm_up(CifarResNet(2))
    model.skip_norms = nn.Identity()
    with pytest.raises(PlanError, match="the network has a module 'skip_norms' already\n  hint: rename it in the model"):
        switched(capture(model, images()))


def test_a_second_set_that_is_missing_is_found_out():
    program = switched(program_of(CifarResNet(2)))
    program.verify()
    broken = copy.deepcopy(program)
    del broken._modules[SKIP_NORMS]._modules["layer2"]
    with pytest.raises(PlanError, match="skip path 'skip2' switches 'layer2_0_bn1', which has no second set of norms"):
        broken.verify()


def test_the_trunk_of_a_stage_has_two_sets_and_what_may_be_left_out_one():
    program = CutSegments()(AttachHeads()(ChooseExits("layer1,layer2.0.conv1", "linear")(switched(program_of(CifarResNet(3))))))
    follows = {segment.name: segment.follows for segment in program.plan.segments if segment.has_two_norm_sets}
    assert follows == {"trunk_skip1": "skip1", "trunk_skip2": "skip2", "trunk_skip3": "skip3"}
    assert [(s.kind, s.follows) for s in program.plan.segments if s.name == "trunk_exit2"] == [("trunk", "")]  # a convolution, no norm yet


def test_second_sets_of_encoder_blocks_are_layer_norms():
    model = Encoders(0)
    model.layers = nn.Sequential(*(EncoderBlock(8, 2) for _ in range(3)))
    program = switched(capture(model.eval(), torch.randn(1, *SHAPE)))
    assert second_owners(program) == [f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
