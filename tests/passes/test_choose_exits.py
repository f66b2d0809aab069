"""Where exits stand: as asked, evenly, where they pay, or nowhere, and in each case the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exitify.errors import PlanError
from exitify.heads import head_cost, head_spec
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import HEAD_SHARE, MOST_EXITS, OVERHEAD_SHARE, ChooseExits
from exitify.passes.cost import node_costs, value_cost
from exitify.passes.dataflow import cut_values, dataflow
from exitify.passes.exit_places import Places
from exitify.plan import Cost, ExitPoint, HeadSpec, Value, boundary_macs
from exitify.program import Program, extract
from exitify.tracing import capture
from tests.helpers import captured
from tests.models import CLASSES, ZOO


class Tower(nn.Module):
    """Equal blocks of convolutions, 9.4 M multiply-adds each at 32 x 32: large enough for exits to pay."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(32 if i else 3, 32, 3, padding=1), nn.ReLU()) for i in range(blocks)))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def tower(blocks: int) -> Program:
    return capture(Tower(blocks).eval(), torch.randn(1, 3, 32, 32))


def chosen(program: Program, exits: str, head: str = "auto") -> list[str]:
    return [point.after for point in ChooseExits(exits, head)(program).plan.exits]


def verdicts(program: Program, exits: str) -> dict[str, str]:
    return {place.value: place.verdict for place in ChooseExits(exits).decide(program)[1]}


@pytest.mark.parametrize("name", ZOO)
def test_on_a_tiny_network_auto_answers_none_and_says_why(name):
    points, considered = ChooseExits("auto").decide(captured(name))
    assert points == ()
    reasons = {place.verdict for place in considered if "every run" in place.verdict}
    assert reasons
    assert all(
        reason.startswith("an exit would add ") and reason.endswith(f"% to every run that passes it, over {OVERHEAD_SHARE:.0%}") for reason in reasons
    )


@pytest.mark.parametrize("name", ZOO)
def test_none_places_none_and_says_that_none_were_asked_for(name):
    program = captured(name)
    assert ChooseExits("none")(program).plan == program.plan
    assert "no exits asked for" in verdicts(program, "none").values()
    assert verdicts(program, "0") == verdicts(program, "none")


def added_share(program: Program, exits: tuple[ExitPoint, ...]) -> float:
    crossing = {point.after: Places(program).at(point.after).crossing_bytes for point in exits}
    return sum(head_cost(point.head).macs + boundary_macs(crossing[point.after]) for point in exits) / full_macs(program)


def full_macs(program: Program) -> int:
    return value_cost(program, node_costs(program), program.plan.output).macs


@pytest.mark.parametrize("blocks", [4, 7, 20])
def test_auto_adds_no_more_than_the_share_to_a_run_that_takes_no_exit(blocks):
    program = tower(blocks)
    points, considered = ChooseExits("auto").decide(program)
    assert 1 <= len(points) <= MOST_EXITS
    assert added_share(program, points) <= OVERHEAD_SHARE
    assert [place.value for place in considered if place.verdict == "exit"] == [point.after for point in points]


def test_auto_adds_no_more_than_the_share_where_the_chosen_heads_are_dearer_than_the_mean(torchvision):
    program = capture(torchvision.models.regnet_x_400mf(weights=None).eval(), torch.randn(1, 3, 224, 224))
    points, _ = ChooseExits("auto").decide(program)
    assert added_share(program, points) <= OVERHEAD_SHARE
    one_more, _ = ChooseExits(str(len(points) + 1)).decide(program)
    assert (
        len(points) == MOST_EXITS or added_share(program, one_more) > 0.99 * OVERHEAD_SHARE
    )  # places spaced by one more are others, and these cheaper


def test_auto_places_more_exits_in_a_larger_network_and_no_more_than_the_most():
    counts = [len(ChooseExits("auto").decide(tower(blocks))[0]) for blocks in (1, 4, 10, 20)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, MOST_EXITS)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_number_places_that_many_at_the_places_nearest_to_even_shares(count):
    program = tower(9)
    points, considered = ChooseExits(str(count)).decide(program)
    share = {place.value: place.share for place in considered}
    assert len(points) == count
    for i, point in enumerate(points, 1):
        goal = i / (count + 1)
        assert abs(share[point.after] - goal) == min(abs(other - goal) for other in share.values())


def test_of_values_at_the_same_cost_the_last_is_taken():
    found = verdicts(captured("identity"), "1")
    assert found["stem_0"] == "stem_1 comes at the same cost"
    assert found["add"] == "relu_2 comes at the same cost"
    assert found["relu_2"] == "exit"


def test_values_too_early_or_too_late_are_not_considered_for_a_number():
    found = verdicts(captured("identity"), "1")
    assert found["relu_4"] == "outside 5% to 95% of the cost"
    assert chosen(captured("identity"), "2") == ["relu", "relu_2"]


@pytest.mark.parametrize("name", ZOO)
def test_auto_and_numbers_consider_only_values_that_alone_make_the_rest(name):
    program = captured(name)
    nodes = {node.name: node for node in program.graph.nodes}
    considered = [place.value for place in ChooseExits("1").decide(program)[1]]
    assert considered
    for value in considered:
        rest = extract(program.graph, [nodes["fc"]], [nodes[value]])
        assert [node.name for node in rest.nodes if node.op == "placeholder"] == [value]


@pytest.mark.parametrize("name", ZOO)
def test_cut_values_are_those_on_every_way_from_input_to_output(name):
    program = captured(name)
    flow = dataflow(program)
    carrying = list(flow)

    def reaches(without: str) -> bool:
        seen, pending = set(), ["x"]
        while pending:
            node = pending.pop()
            if node not in seen and node != without:
                seen.add(node)
                pending.extend(flow.successors(node))
        return "fc" in seen

    assert cut_values(program) == [node for node in carrying if node != "fc" and (node == "x" or not reaches(node))]


def test_shares_are_the_cost_of_reaching_the_value():
    program = captured("identity")
    share = {place.value: place.share for place in ChooseExits("1").decide(program)[1]}
    stem, convolution, classifier = 8 * 3 * 9 * 256, 8 * 8 * 9 * 256, 8 * CLASSES
    full = stem + 4 * convolution + classifier
    assert share["relu"] == pytest.approx(stem / full)
    assert share["relu_2"] == pytest.approx((stem + 2 * convolution) / full)


def test_a_module_means_its_last_value_and_a_node_means_itself():
    program = captured("identity")
    assert chosen(program, "block1") == ["relu_2"]
    assert chosen(program, "block1.conv1") == ["block1_conv1_1"]
    assert chosen(program, "block1.conv1.0") == chosen(program, "block1_conv1_0") == ["block1_conv1_0"]
    assert chosen(captured("shared"), "block") == ["relu_4"]  # its last call


def test_exits_are_numbered_by_what_they_cost_and_named_places_keep_their_names():
    points = ChooseExits(" block2.conv1 ,stem, block1,block1")(captured("identity")).plan.exits
    assert [(point.name, point.place, point.after) for point in points] == [
        ("exit1", "stem", "stem_1"),
        ("exit2", "block1", "relu_2"),
        ("exit3", "block2.conv1", "block2_conv1_1"),
    ]


def test_the_place_of_an_exit_is_the_outermost_module_that_ends_there_or_the_values_own_name():
    def place(network: str, value: str) -> str:
        return ChooseExits(value)(captured(network)).plan.exits[0].place

    assert place("identity", "relu_2") == "block1"
    assert place("identity", "block1_conv2_1") == "block1.conv2"
    assert place("identity", "block1_conv2_0") == "block1.conv2.0"
    assert place("identity", "add") == "block1"  # inside it, and no module of its own
    assert place("plain", "relu") == "relu"  # computed by no module but the network
    assert place("plain", "mean") == "mean"


def test_an_exit_may_stand_inside_a_residual_branch():
    assert chosen(captured("identity"), "relu_1") == ["relu_1"]


def test_choosing_exits_forgets_segments_cut_before():
    from exitify.passes.cut_segments import CutSegments

    program = CutSegments()(captured("plain"))
    assert program.plan.segments
    assert ChooseExits("1")(program).plan.segments == ()


@pytest.mark.parametrize(
    ("name", "exits", "head", "problem"),
    [
        ("identity", "99", "auto", "99 exits asked for, and the network has 2 places for one\n  hint: `--exits auto`, or a smaller number"),
        ("identity", "block9", "auto", "cannot exit after 'block9': the network has no module or value of that name\n  hint: for instance "),
        ("identity", "block1,", "auto", "cannot exit after ''"),
        ("identity", "-1", "auto", "cannot exit after '-1'"),
        ("identity", "²", "auto", "cannot exit after '²'"),
        ("identity", "fc", "auto", "cannot exit after 'fc': it is the network's own answer\n  hint: exit after an earlier block"),
        ("identity", "block1", "lstm", "there is no head 'lstm'\n  hint: there are auto, linear, conv, deep, mlp"),
        ("transformer", "block1", "conv", r"a conv head cannot read 'add_2', of shape \(N, 17, 16\)\n  hint: `--head linear` or `--head mlp`"),
        ("identity", "mean,block1", "conv", "cannot exit after 'mean': the network has no module"),
        ("plain", "mean", "conv", r"a conv head cannot read 'mean', of shape \(N, 16\)"),
        ("transformer", "permute", "auto", "cannot exit after 'permute': its first dimension is not the batch\n  hint: exit after a block"),
        ("transformer", "expand", "auto", "cannot exit after 'expand'"),
        ("transformer", "getitem_3", "auto", "cannot exit after 'getitem_3'"),
    ],
)
def test_a_place_that_cannot_be_one_is_refused(name, exits, head, problem):
    with pytest.raises(PlanError, match=problem):
        ChooseExits(exits, head)(captured(name))


def test_the_hint_for_an_unknown_name_lists_places_that_look_like_it():
    with pytest.raises(PlanError) as caught:
        ChooseExits("block1.conv9")(captured("identity"))
    assert caught.value.hint == "for instance block1.conv1.0, block1.conv1.1, block1, block1.conv2.0, block1.conv2.1"


def test_exits_are_chosen_once():
    program = ChooseExits("1")(captured("identity"))
    with pytest.raises(PlanError, match="this network has exits already\n  hint: transform the original model"):
        ChooseExits("1")(program)
    with pytest.raises(PlanError, match="this network has exits already"):
        ChooseExits("none")(AttachHeads()(program))


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x.permute(0, 2, 3, 1)).relu()).mean((1, 2)))


@pytest.mark.parametrize("kind", ["linear", "conv", "mlp", "own"])
def test_a_head_reads_a_value_with_its_channels_last(kind):
    program = ChooseExits("first", kind)(capture(ChannelsLast().eval(), torch.randn(1, 3, 16, 16)))
    head = program.plan.exits[0].head
    assert (head.layout, head.channels) == ("nhwc", 8)
    assert AttachHeads()(program)(torch.randn(2, 3, 16, 16), all_exits=True)["exit1"].shape == (2, CLASSES)


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3, 4)))


def test_a_value_that_no_head_reads_is_refused_with_its_shape():
    program = capture(Volumes().eval(), torch.randn(1, 1, 6, 6, 6))
    with pytest.raises(PlanError, match=r"cannot exit after 'conv': its value is float32 \(N, 4, 4, 4, 4\), and a head reads float32 \(N, C, H, W\)"):
        ChooseExits("conv")(program)


def test_a_value_that_is_not_float32_is_refused_with_its_type():
    with pytest.raises(PlanError, match=r"cannot exit after 'ids': its value is int64 \(N, 7\), and a head reads float32"):
        head_spec("linear", Value((7,), "int64"), "ids", CLASSES)


@pytest.mark.parametrize(
    ("kind", "shape", "classes", "spec"),
    [
        ("linear", (24, 8, 8), 10, HeadSpec("linear", "nchw", (24, 8, 8), 1, 24, 10)),
        ("linear", (17, 24), 10, HeadSpec("linear", "tokens", (17, 24), 1, 24, 10)),
        ("linear", (24,), 10, HeadSpec("linear", "vector", (24,), 1, 24, 10)),
        ("mlp", (17, 24), 10, HeadSpec("mlp", "tokens", (17, 24), 1, 64, 10)),
        ("mlp", (17, 24), 1000, HeadSpec("mlp", "tokens", (17, 24), 1, 512, 1000)),
        ("conv", (24, 32, 32), 10, HeadSpec("conv", "nchw", (24, 32, 32), 4, 64, 10)),
        ("conv", (24, 32, 16), 1000, HeadSpec("conv", "nchw", (24, 32, 16), 2, 128, 1000)),
        ("deep", (24, 32, 32), 10, HeadSpec("deep", "nchw", (24, 32, 32), 4, 64, 10)),
        ("deep96", (24, 8, 8), 10, HeadSpec("deep", "nchw", (24, 8, 8), 1, 96, 10)),
        ("conv", (24, 2, 2), 10, HeadSpec("conv", "nchw", (24, 2, 2), 1, 64, 10)),
    ],
)
def test_the_spec_of_a_head_follows_from_its_kind_and_its_value(kind, shape, classes, spec):
    assert head_spec(kind, Value(shape, "float32"), "value", classes) == spec


def test_the_cost_of_a_linear_head_is_its_classifiers():
    assert head_cost(HeadSpec("linear", "nchw", (24, 8, 8), 1, 24, 10)) == Cost(240, 250, 4 * 34)


def test_the_cost_of_a_convolutional_head_is_that_of_its_convolutions():
    # pooled 32 -> 8, convolved at stride 2: 8 -> 4 -> 2
    first, second = 64 * 24 * 9, 64 * 64 * 9
    cost = head_cost(HeadSpec("conv", "nchw", (24, 32, 32), 4, 64, 10))
    assert cost.macs == first * 16 + second * 4 + 640
    assert cost.parameters == first + second + 2 * 2 * 64 + 650


def test_auto_takes_a_convolutional_head_where_it_costs_little_and_a_linear_one_elsewhere():
    large, small = tower(20), captured("identity")
    kinds = {point.head.kind for point in ChooseExits("3")(large).plan.exits}
    assert kinds == {"conv"}
    assert all(head_cost(point.head).macs <= HEAD_SHARE * full_macs(large) for point in ChooseExits("3")(large).plan.exits)
    assert {point.head.kind for point in ChooseExits("2")(small).plan.exits} == {"linear"}
    assert ChooseExits("block1")(captured("transformer")).plan.exits[0].head.layout == "tokens"


def test_the_head_asked_for_is_the_head_given():
    for kind in ("linear", "conv", "deep", "mlp"):
        assert {point.head.kind for point in ChooseExits("2", kind)(captured("identity")).plan.exits} == {kind}


def test_the_text_of_a_plan_with_exits_chosen():
    assert ChooseExits("block1,relu_3", "conv")(captured("identity")).plan.text() == (
        "plan x -> fc\n"
        "  exit exit1 after relu_2 (block1): conv pool 2 8x16x16 -> 64 -> 5\n"
        "  exit exit2 after relu_3 (block2): conv pool 2 8x16x16 -> 64 -> 5\n"
    )


def test_a_network_without_multiply_adds_has_no_place_worth_an_exit():
    program = capture(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Tanh()).eval(), torch.randn(1, 4))
    assert verdicts(program, "auto") == {"_0": "outside 5% to 95% of the cost", "_1": "outside 5% to 95% of the cost"}


class Pixels(nn.Module):
    """Two streams side by side, of which one has batch and patches in one dimension, as in TNT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.pixels = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.patches = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        pixels = patches.reshape(-1, 8)
        for pixel, patch in zip(self.pixels, self.patches):
            pixels = pixels + pixel(pixels)
            patches = patches + patch(patches + pixels.reshape(x.shape[0], -1, 8))
        return self.fc((patches + pixels.reshape(x.shape[0], -1, 8)).mean(1))


def test_no_exit_stands_where_something_without_the_batch_in_front_would_cross():
    found = ChooseExits("none").decide(capture(Pixels().eval(), torch.randn(1, 3, 16, 16)))[1]
    assert any("would cross there, and its first dimension is not the batch" in place.verdict for place in found)


def test_before_any_attention_tokens_are_read_by_their_mean_since_the_class_token_is_the_same_for_all():
    program = captured("transformer")
    assert ChooseExits("block1", "linear")(program).plan.exits[0].head.layout == "tokens"
    layouts = {point.after: point.head.layout for point in ChooseExits("add,block1", "own")(program).plan.exits}
    assert layouts == {"add": "tokens", "add_2": "class_token"}
