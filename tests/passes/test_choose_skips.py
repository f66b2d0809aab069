"""Skip paths: where the rule puts them, where a user may, and why not elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import PlanError
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.choose_skips import ChooseSkips, ConsideredBlock
from exitify.passes.cut_segments import CutSegments
from exitify.pipeline import transform
from exitify.plan import FINAL, Plan
from exitify.program import Program
from exitify.records import dumps, from_json, loads
from exitify.tracing import capture
from tests.helpers import captured, images
from tests.models import CLASSES, ZOO, IdentityBlock
from tests.residual_models import Encoders, InARow, PreActivation, captured_from, exported

SIZE = 16


def cifar(depth: int = 3) -> Program:
    return capture(CifarResNet(depth).eval(), torch.randn(1, 3, SIZE, SIZE))


def program_of(model: nn.Module, size: int = SIZE) -> Program:
    return capture(model.eval(), torch.randn(1, 3, size, size))


def left_out(program: Program, skips: str = "auto") -> list[tuple[str, ...]]:
    return [path.blocks for path in ChooseSkips(skips)(program).plan.skips]


def verdicts(program: Program, skips: str = "auto") -> dict[str, str]:
    return {block.place: block.verdict for block in ChooseSkips(skips).decide(program)[1]}


def counts(program: Program) -> list[tuple[int, int]]:
    """By skip path, how many blocks are mandatory and how many may be left out, in the order of the verdicts."""
    found, mandatory = [], 0
    considered = ChooseSkips().decide(program)[1]
    for i, block in enumerate(considered):
        if not block.verdict.startswith("skip"):
            mandatory += block.verdict == "mandatory"
            continue
        if i + 1 == len(considered) or considered[i + 1].verdict != block.verdict:
            found.append((mandatory, sum(other.verdict == block.verdict for other in considered)))
            mandatory = 0
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [(1, 1)] * 4),
        ("resnet50", [(2, 1), (2, 2), (3, 3), (2, 1)]),
        ("resnet101", [(2, 1), (2, 2), (12, 11), (2, 1)]),
        ("mobilenet_v2", [(1, 1), (2, 1), (2, 2), (2, 1), (2, 1)]),
        ("efficientnet_b0", [(1, 1), (1, 1), (2, 1), (2, 1), (2, 2)]),
        ("vit", [(2, 1)] * 4),
        ("swin", [(1, 1), (1, 1), (3, 3), (1, 1)]),
        ("convnext", [(2, 1), (2, 1), (5, 4), (2, 1)]),
        ("densenet", []),
        ("shufflenet", []),
    ],
)
def test_mandatory_and_skippable_blocks_are_those_of_the_paper(name, expected, torchvision):
    assert counts(captured_from(torchvision, name)) == expected


def test_of_twelve_like_blocks_every_third_may_be_left_out(torchvision):
    blocks = left_out(captured_from(torchvision, "vit"))
    assert blocks == [(f"encoder.layers.encoder_layer_{i}",) for i in (2, 5, 8, 11)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 13])
def test_of_a_stage_the_smaller_half_may_be_left_out_and_of_eight_like_blocks_or_more_a_third_of_each_quarter(count):
    pieces = left_out(program_of(Encoders(count)))
    if count < 8:
        mandatory = max(1, min(count - 1, -(-count // 2)))
        assert pieces == ([tuple(f"layers.{i}" for i in range(mandatory, count))] if count > 1 else [])
        return
    sizes = [count // 4 + (i < count % 4) for i in range(4)]
    ends = [sum(sizes[: i + 1]) for i in range(4)]
    assert pieces == [tuple(f"layers.{i}" for i in range(end - max(1, size // 3), end)) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_stage_of_blocks_keeps_the_larger_half(count):
    expected = [tuple(f"layer{stage}.{i}" for i in range(-(-count // 2), count)) for stage in (1, 2, 3)]
    assert left_out(cifar(count)) == (expected if count > 1 else [])


def test_before_and_after_are_values_of_one_kind_and_the_activation_goes_with_the_block():
    for program, expected in [
        (cifar(), [("relu", "relu_4", "relu_6"), ("relu_6", "relu_10", "relu_12"), ("relu_12", "relu_16", "relu_18")]),
        (program_of(PreActivation()), [("stem", "add_1", "add_2"), ("add_2", "add_4", "add_6")]),
        (captured("in_place"), [("stem", "block1_relu_1", "block2_relu_1")]),
        (captured("transformer"), [("add", "add_2", "add_4")]),
    ]:
        paths = ChooseSkips()(program).plan.skips
        assert [(path.start, path.before, path.after) for path in paths] == expected
        assert all(program.values[path.before] == program.values[path.after] for path in paths)


def test_in_mobilenet_a_block_ends_with_its_addition(torchvision):
    paths = ChooseSkips()(captured_from(torchvision, "mobilenet_v2")).plan.skips
    assert [(path.start, path.before, path.after) for path in paths] == [
        ("features_1_conv_2", "features_2_conv_3", "add"),
        ("add", "add_1", "add_2"),
        ("add_2", "add_3", "add_5"),
        ("add_5", "add_6", "add_7"),
        ("add_7", "add_8", "add_9"),
    ]


@pytest.mark.parametrize(
    ("skips", "expected"),
    [
        ("1", [("layer1.3",), ("layer2.3",), ("layer3.3",)]),
        ("2", [("layer1.2", "layer1.3"), ("layer2.2", "layer2.3"), ("layer3.2", "layer3.3")]),
        ("3", [tuple(f"layer{stage}.{i}" for i in (1, 2, 3)) for stage in (1, 2, 3)]),
        ("99", [tuple(f"layer{stage}.{i}" for i in (1, 2, 3)) for stage in (1, 2, 3)]),
        ("layer2.1", [("layer2.1",)]),
        ("layer3.3, layer1.2", [("layer1.2",), ("layer3.3",)]),
        ("layer1.0,layer1.1,layer1.3", [("layer1.0", "layer1.1"), ("layer1.3",)]),
        ("none", []),
    ],
)
def test_a_number_is_how_many_of_each_stage_and_names_are_those_blocks(skips, expected):
    assert left_out(cifar(4), skips) == expected


def test_a_number_takes_only_blocks_that_their_input_can_stand_in_for(torchvision):
    program = captured_from(torchvision, "mobilenet_v2")
    expected = [("features.3",), ("features.5", "features.6"), ("features.8", "features.9", "features.10"), *ENDS]
    assert left_out(program, "3") == expected


ENDS = [("features.12", "features.13"), ("features.15", "features.16")]


def test_paths_are_numbered_as_a_run_comes_to_them_and_pieces_of_a_stage_follow_each_other():
    paths = ChooseSkips("layer1.0,layer1.2,layer2.3")(cifar(4)).plan.skips
    assert [(path.name, path.stage, path.start, path.before, path.after) for path in paths] == [
        ("skip1", "layer1", "relu", "relu", "relu_2"),
        ("skip2", "layer1", "relu_2", "relu_4", "relu_6"),
        ("skip3", "layer2", "relu_8", "relu_14", "relu_16"),
    ]


def test_one_block_called_twice_may_be_left_out_once():
    program = captured("shared")
    for skips in ("auto", "1", "9"):
        (path,) = ChooseSkips(skips)(program).plan.skips
        assert (path.blocks, path.before, path.after) == (("block",), "relu_2", "relu_4")
    with pytest.raises(PlanError, match="cannot leave out all blocks of 'block'"):
        ChooseSkips("block")(program)


class BareBlock(IdentityBlock):
    """Without the activation that follows the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x


@pytest.mark.parametrize("skips", ["auto", "1", "2"])
def test_a_block_whose_value_differs_in_kind_from_its_input_is_kept(skips):
    program = program_of(InARow(8, *(IdentityBlock(8) for _ in range(3)), BareBlock(8)))
    assert left_out(program, skips) == ([] if skips == "1" else [("blocks.2",)])
    assert left_out(program_of(InARow(8, IdentityBlock(8), IdentityBlock(8), BareBlock(8))), "1") == []


@pytest.mark.parametrize("name", ["plain", "dropout", "depthwise", "stochastic"])
@pytest.mark.parametrize("skips", ["auto", "2", "none"])
def test_a_network_without_residual_blocks_keeps_its_plan(name, skips):
    program = captured(name)
    assert ChooseSkips(skips)(program).plan == program.plan
    assert ChooseSkips(skips).decide(program) == ((), [])


def test_a_block_that_reads_the_size_of_an_earlier_value_stays():
    program = capture(exported(Encoders(2)), images())  # torch.export asks the image how many there are, once for all blocks
    paths, considered = ChooseSkips().decide(program)
    why_not = "it reads the size of 'x', which its input does not tell"
    assert (paths, [block.verdict for block in considered]) == ((), ["mandatory", why_not])
    with pytest.raises(PlanError, match=f"cannot leave out 'layers.1': {why_not}"):
        ChooseSkips("layers.1")(program)


def test_blocks_alone_in_their_stage_stay_and_the_verdict_says_so(torchvision):
    assert verdicts(captured("projection")) == {"block1": "alone in its stage", "block2": "alone in its stage"}
    assert verdicts(captured("projection"), "2") == verdicts(captured("projection"))
    assert verdicts(program_of(torchvision.models.MobileNetV2(num_classes=CLASSES, width_mult=0.25), 32))["features.1"] == "alone in its stage"


def test_verdicts_name_the_path_or_say_why_there_is_none():
    program = cifar(2)
    blocks = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)]
    assert verdicts(program) == dict(zip(blocks, ["mandatory", "skip1", "mandatory", "skip2", "mandatory", "skip3"], strict=True))
    asked = ["not asked for", "skip1", "not asked for", "not asked for", "not asked for", "not asked for"]
    assert verdicts(program, "layer1.1") == dict(zip(blocks, asked, strict=True))
    assert ChooseSkips("none").decide(program) == ((), [])


def test_what_was_considered_says_stage_and_share():
    considered = ChooseSkips().decide(captured("identity"))[1]
    convolution = 2 * 8 * 8 * 9 * 256
    share = convolution / (2 * convolution + 8 * 3 * 9 * 256 + 8 * CLASSES)
    assert considered == [
        ConsideredBlock("block1 to block2", "block1", pytest.approx(share), "mandatory"),
        ConsideredBlock("block1 to block2", "block2", pytest.approx(share), "skip1"),
    ]


class OnTheAnswer(nn.Module):
    """Residual blocks on the class scores themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first, self.second = nn.Linear(4, CLASSES), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        x = x + self.first(x)
        return x + self.second(x)


def test_the_block_that_gives_the_answer_stays():
    program = capture(OnTheAnswer().eval(), torch.randn(1, 4))
    paths, considered = ChooseSkips().decide(program)
    assert paths == ()
    assert [block.verdict for block in considered] == ["mandatory", "it gives the network's own answer"]
    name = considered[1].place
    with pytest.raises(
        PlanError, match=f"cannot leave out '{name}': it gives the network's own answer\n  hint: choose other blocks, or --skips auto"
    ):
        ChooseSkips(name)(program)


@pytest.mark.parametrize(
    ("skips", "problem"),
    [
        (
            "layer9",
            "cannot leave out 'layer9': no residual block has this name\n  hint: those that can be left out: layer1.0, layer1.1, layer2.1, layer3.1",
        ),
        ("layer1", "cannot leave out 'layer1': no residual block has this name"),
        ("layer1.1,", "cannot leave out '': no residual block has this name"),
        ("", "cannot leave out '': no residual block has this name"),
        ("-1", "cannot leave out '-1': no residual block has this name"),
        (
            "layer2.0",
            "cannot leave out 'layer2.0': its input does not stand in for its output\n  hint: those that can be left out: layer1.0, layer1.1",
        ),
        ("layer1.0,layer1.1", "cannot leave out all blocks of 'layer1'\n  hint: a stage keeps at least one"),
        ("0", "--skips 0 leaves nothing out\n  hint: `--skips none`, or a number from 1"),
    ],
)
def test_blocks_that_cannot_be_left_out_are_refused(skips, problem):
    with pytest.raises(PlanError) as caught:
        ChooseSkips(skips)(cifar(2))
    assert str(caught.value).startswith(problem)


def test_where_nothing_can_be_left_out_the_hint_says_none():
    with pytest.raises(PlanError, match="no residual block has this name\n  hint: those that can be left out: none"):
        ChooseSkips("stem")(captured("plain"))
    with pytest.raises(PlanError, match="its input does not stand in for its output\n  hint: those that can be left out: none"):
        ChooseSkips("block1")(captured("projection"))


def test_skip_paths_are_chosen_once():
    program = ChooseSkips()(cifar(2))
    for skips in ("auto", "none", "1"):
        with pytest.raises(PlanError, match="this network has skip paths already\n  hint: transform the original model"):
            ChooseSkips(skips)(program)


def test_an_exit_inside_of_what_may_be_left_out_is_refused():
    program = ChooseSkips()(cifar(3))
    for name, value in [("layer2.2.conv1", "layer2_2_conv1"), ("relu_11", "relu_11"), ("layer2_2_bn2", "layer2_2_bn2")]:
        with pytest.raises(
            PlanError,
            match=f"cannot exit after '{value}': it lies in what skip2 may leave out\n"
            "  hint: exit after a whole stage or its mandatory blocks, or leave out others: --skips",
        ):
            ChooseExits(f"layer1,{name}")(program)


def test_exits_stand_before_and_after_what_may_be_left_out_and_auto_passes_it_by():
    program = ChooseSkips("2")(cifar(4))
    assert [point.after for point in ChooseExits("layer1.1,layer1.3,layer2.0.conv1")(program).plan.exits] == ["relu_4", "relu_8", "layer2_0_conv1"]
    found = {place.value: place.verdict for place in ChooseExits("3").decide(program)[1]}
    assert found["relu_6"] == "it lies in what skip1 may leave out"
    assert "skip" not in found["relu_4"] + found["relu_8"]


def test_choosing_skip_paths_leaves_the_program_given_alone_and_forgets_segments():
    program = CutSegments()(cifar(2))
    before = program.plan
    result = ChooseSkips()(program)
    assert program.plan is before
    assert (result.plan.segments, len(result.plan.skips)) == ((), 3)
    assert result.recipe == (*program.recipe, "choose-skips{skips=auto}")
    assert all(a is b for a, b in zip(program.parameters(), result.parameters(), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_the_plan_of_a_network_with_skip_paths_survives_json(name):
    plan = transform(captured_model(name), images(), exits="none", skips="auto").plan
    assert from_json(Plan, loads(dumps(plan), "plan"), "plan") == plan


def captured_model(name: str) -> nn.Module:
    return ZOO[name]().eval()


def test_the_text_of_a_plan_with_exits_and_skip_paths():
    program = transform(CifarResNet(2).eval(), torch.randn(1, 3, SIZE, SIZE), exits="layer1,layer2.0", skips="auto", head="linear")
    assert str(program) == (
        "plan x -> linear\n"
        "  exit exit1 after relu_4 (layer1) at 0.374: linear 16x16x16 -> 16 -> 10\n"
        "  exit exit2 after relu_6 (layer2.0) at 0.508: linear 32x8x8 -> 32 -> 10\n"
        "  skip skip1 layer1: layer1.1 | relu_2 for relu_4, 2 norms switch\n"
        "  skip skip2 layer2: layer2.1 | relu_6 for relu_8, 2 norms switch\n"
        "  skip skip3 layer3: layer3.1 | relu_10 for relu_12, 2 norms switch\n"
        "  trunk trunk_skip1 follows skip1: x -> relu_2 | 10 nodes, 1290240 MACs\n"
        "  block block_skip1 follows skip1: relu_2 -> relu_4 | 7 nodes, 1179648 MACs\n"
        "  head head_exit1: relu_4 -> exit1.logits, exit1.z, exit1.scores | 1 nodes, 160 MACs\n"
        "  trunk trunk_skip2 follows skip2: relu_4 -> relu_6 | 9 nodes, 884736 MACs\n"
        "  head head_exit2: relu_6 -> exit2.logits, exit2.z, exit2.scores | 1 nodes, 320 MACs\n"
        "  block block_skip2 follows skip2: relu_6 -> relu_8 | 7 nodes, 1179648 MACs\n"
        "  trunk trunk_skip3 follows skip3: relu_8 -> relu_10 | 9 nodes, 884736 MACs\n"
        "  block block_skip3 follows skip3: relu_10 -> relu_12 | 7 nodes, 1179648 MACs\n"
        "  trunk trunk_final: relu_12 -> linear | 2 nodes, 640 MACs\n"
    )
    assert program.recipe == (
        "choose-skips{skips=auto}",
        "choose-exits{exits=layer1,layer2.0 head=linear}",
        "attach-heads",
        "switch-norms",
        "cut-segments",
    )


def test_the_full_cost_is_that_of_the_network_and_a_mask_saves_its_blocks():
    plan = transform(CifarResNet(2).eval(), torch.randn(1, 3, SIZE, SIZE), exits="none", skips="auto").plan
    block = 2 * 16 * 16 * 9 * SIZE * SIZE
    assert plan.full_macs == CutSegments()(cifar(2)).plan.full_macs
    assert plan.macs_at((), "100")[FINAL] == plan.full_macs - block
    assert plan.macs_at((), "all")[FINAL] == plan.full_macs - 3 * block
