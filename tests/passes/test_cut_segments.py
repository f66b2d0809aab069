"""Segments: they cover the network once, add up to its cost, and one after the other they are the network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.errors import PlanError
from exitify.heads import head_cost
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.cost import node_costs, value_cost
from exitify.passes.cut_segments import CutSegments
from exitify.plan import Cost, Plan
from exitify.program import Program, carriers
from exitify.records import dumps, from_json, loads
from tests.helpers import captured, cuttable_places, images, run_segments, with_exits
from tests.models import ZOO


def assert_segments_are_the_network(program: Program, batch: int = 2) -> None:
    # the same kernels on the same numbers: equal, not close
    x = images(batch)
    values = run_segments(program, x)
    with torch.no_grad():
        expected = program(x, all_exits=True)
    for name in program.plan.exit_names[:-1]:
        assert torch.equal(values[f"{name}.logits"], expected[name])
    assert torch.equal(values[program.plan.output], expected.final)
    for name, value in values.items():
        said = program.plan.values[name]
        assert (tuple(value.shape), str(value.dtype)) == ((batch, *said.shape), f"torch.{said.dtype}")


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ZOO)
def test_segments_one_after_another_are_the_network_with_an_exit_at_every_place(name, batch):
    assert_segments_are_the_network(with_exits(captured(name), ",".join(cuttable_places(name))), batch)


@settings(max_examples=30)
@given(st.sampled_from(sorted(ZOO)), st.data())
def test_segments_one_after_another_are_the_network_with_exits_anywhere(name, data):
    places = data.draw(st.lists(st.sampled_from(cuttable_places(name)), min_size=1, max_size=3, unique=True))
    kind = data.draw(st.sampled_from(["linear", "mlp"]))
    assert_segments_are_the_network(with_exits(captured(name), ",".join(places), kind))


@pytest.mark.parametrize(
    ("name", "place", "crossing"), [("identity", "relu_1", {"relu", "relu_1"}), ("transformer", "block1_norm1", {"add", "block1_norm1"})]
)
def test_an_exit_inside_a_residual_branch_lets_the_shortcut_cross_too(name, place, crossing):
    program = with_exits(captured(name), place)
    first, last = program.plan.segment("trunk_exit1"), program.plan.segment("trunk_final")
    assert set(first.outputs) == set(last.inputs) == crossing
    assert_segments_are_the_network(program)


def test_a_shortcut_that_an_exit_does_not_need_is_not_computed_for_it():
    program = with_exits(captured("projection"), "block1.conv2")
    nodes = program.plan.segment("trunk_exit1").nodes
    assert not [node for node in nodes if "downsample" in node]
    assert program.plan.segment("trunk_final").inputs == ("x", "block1_conv2_1")
    assert_segments_are_the_network(program)


@pytest.mark.parametrize("name", ZOO)
def test_segments_hold_each_computing_node_once_and_in_order(name):
    program = with_exits(captured(name), ",".join(cuttable_places(name)))
    held = [node for segment in program.plan.segments for node in segment.nodes]
    assert len(held) == len(set(held))
    assert set(held) == set(carriers(program.graph, "x")) - {"x"}
    order = {node.name: i for i, node in enumerate(program.graph.nodes)}
    assert all(list(segment.nodes) == sorted(segment.nodes, key=order.__getitem__) for segment in program.plan.segments)


@pytest.mark.parametrize("name", ZOO)
def test_costs_of_the_trunk_add_up_to_the_networks(name):
    program = with_exits(captured(name), ",".join(cuttable_places(name)))
    trunk = sum((segment.cost for segment in program.plan.segments if segment.kind == "trunk"), Cost())
    costs = node_costs(program)
    full = value_cost(program, costs, "fc")
    assert trunk.macs == full.macs == program.plan.full_macs
    # What depends on sizes alone (a class token, once for each image) belongs to no segment.
    free = set(costs) - {node for segment in program.plan.segments for node in segment.nodes}
    assert trunk + sum((costs[node] for node in free), Cost()) == full


@pytest.mark.parametrize("name", ZOO)
def test_reaching_an_exit_costs_what_its_value_costs_and_its_head(name):
    place = cuttable_places(name)[-2]
    program = with_exits(captured(name), place)
    point = program.plan.exits[0]
    value = value_cost(program, node_costs(program), point.after).macs
    full = program.plan.full_macs
    head = point.head.width * point.head.classes  # linear
    assert program.plan.macs_at(["exit1"]) == {"exit1": value + head, "final": full + head}


def test_costs_by_hand_on_a_plain_network():
    plan = with_exits(captured("plain"), "relu").plan
    stem, body, classifier, head = 8 * 3 * 9 * 256, 16 * 8 * 9 * 64, 16 * 5, 8 * 5
    assert plan.segment("trunk_exit1").cost == Cost(stem, 8 * 3 * 9 + 8 + 16, 3 * 4 * 8 * 256)
    assert plan.segment("head_exit1").cost == Cost(head, 45, 4 * (8 + 5))
    assert plan.segment("trunk_final").cost == Cost(body + classifier, 16 * 8 * 9 + 16 + 85, 2 * 4 * 16 * 64 + 4 * 16 + 4 * 5)
    assert plan.macs_at(["exit1"]) == {"exit1": stem + head, "final": stem + head + body + classifier}


def test_a_head_is_a_segment_that_takes_its_classifier_and_temperature_as_inputs():
    program = with_exits(captured("identity"), "block1", "conv")
    head = program.plan.segment("head_exit1")
    point = program.plan.exits[0]
    assert (head.kind, head.inputs) == ("head", (point.after,))
    assert head.outputs == ("exit1.logits", "exit1.z", "exit1.scores")
    assert head.parameters == ("exit_heads.exit1.classifier.weight", "exit_heads.exit1.classifier.bias", "exit_heads.exit1.temperature")
    assert set(head.parameters) - set(program.state_dict()) == {point.temperature}  # a profile's, not a weight
    assert head.cost == head_cost(point.head)


def test_the_text_of_a_plan_with_segments():
    assert with_exits(captured("identity"), "relu,relu_1").plan.text() == (
        "plan x -> fc\n"
        "  exit exit1 after relu (relu) at 0.086: linear 8x16x16 -> 8 -> 5\n"
        "  exit exit2 after relu_1 (block1) at 0.314: linear 8x16x16 -> 8 -> 5\n"
        "  trunk trunk_exit1: x -> relu | 3 nodes, 55296 MACs\n"
        "  head head_exit1: relu -> exit1.logits, exit1.z, exit1.scores | 1 nodes, 40 MACs\n"
        "  trunk trunk_exit2: relu -> relu_1 | 3 nodes, 147456 MACs\n"
        "  head head_exit2: relu_1 -> exit2.logits, exit2.z, exit2.scores | 1 nodes, 40 MACs\n"
        "  trunk trunk_final: relu, relu_1 -> fc | 14 nodes, 442408 MACs\n"
    )


@pytest.mark.parametrize("name", ZOO)
def test_without_exits_the_network_is_one_segment(name):
    program = CutSegments()(captured(name))
    (segment,) = program.plan.segments
    assert (segment.name, segment.kind, segment.inputs, segment.outputs) == ("trunk_final", "trunk", ("x",), ("fc",))
    assert_segments_are_the_network(program)


@pytest.mark.parametrize("name", ZOO)
def test_cutting_again_cuts_the_same(name):
    program = with_exits(captured(name), cuttable_places(name)[len(cuttable_places(name)) // 2])
    assert CutSegments()(program).plan == program.plan


@pytest.mark.parametrize("name", ZOO)
def test_the_plan_of_a_cut_network_survives_json(name):
    plan = with_exits(captured(name), ",".join(cuttable_places(name))).plan
    assert from_json(Plan, loads(dumps(plan), "plan"), "plan") == plan


def test_an_exit_on_the_input_needs_no_trunk():
    program = with_exits(captured("plain"), "x")
    assert [segment.name for segment in program.plan.segments] == ["head_exit1", "trunk_final"]
    assert program.plan.macs_at(["exit1"])["exit1"] == 3 * 5
    assert_segments_are_the_network(program)


def test_a_cut_through_a_value_whose_first_dimension_is_not_the_batch_is_refused():
    program = captured("transformer")
    query = next(node.args[0] for node in program.graph.nodes if node.target is torch.nn.functional.scaled_dot_product_attention)
    with_query = AttachHeads()(ChooseExits(query.name, "linear")(program))
    with pytest.raises(PlanError, match="cannot cut at 'permute': the batch is not its first dimension\n  hint: exit after a whole block"):
        CutSegments()(with_query)  # keys and values are still needed, and come out of one tensor (3, N, heads, tokens, width)


def test_exits_without_heads_are_refused():
    with pytest.raises(PlanError, match="exit 'exit1' has no head\n  hint: apply the pass attach-heads first"):
        CutSegments()(ChooseExits("block1")(captured("identity")))


def test_what_no_exit_enabled_needs_is_not_run():
    plan = with_exits(captured("projection"), "block1.conv2,block2").plan
    (first, *_rest) = plan.stretches(["exit1"])
    assert first.segments == ("trunk_exit1", "head_exit1")
    assert "head_exit1" not in [name for stretch in plan.stretches(["exit2"]) for name in stretch.segments]


def test_stretches_of_a_real_plan_execute_in_order_for_every_subset():
    program = with_exits(captured("projection"), "block1.conv2,block1,block2.conv1")
    x = images(2)
    whole = run_segments(program, x)
    for enabled in [(), ("exit1",), ("exit2",), ("exit3",), ("exit1", "exit3"), ("exit1", "exit2", "exit3")]:
        names = [name for stretch in program.plan.stretches(enabled) for name in stretch.segments]
        kept = program.replace(plan=dataclasses.replace(program.plan, segments=tuple(map(program.plan.segment, names))))
        values = run_segments(kept, x)
        assert all(torch.equal(values[name], whole[name]) for name in values)
        assert torch.equal(values["fc"], whole["fc"])
