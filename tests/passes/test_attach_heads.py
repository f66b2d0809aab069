"""Heads in the graph: where they read, what they are called, what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from exitify.errors import PlanError
from exitify.heads import ExitHead
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.program import HEADS
from exitify.tracing import capture
from tests.helpers import captured, images
from tests.models import CLASSES, ZOO, warm_up


def with_heads(name: str, exits: str, head: str = "linear"):
    return AttachHeads()(ChooseExits(exits, head)(captured(name)))


def test_without_exits_nothing_is_added():
    program = captured("identity")
    result = AttachHeads()(program)
    assert str(result.graph) == str(program.graph)
    assert list(result.state_dict()) == list(program.state_dict())


@pytest.mark.parametrize("head", ["linear", "conv", "mlp"])
def test_heads_stand_under_their_exits_names_as_the_plan_says(head):
    program = with_heads("identity", "block1,block2", head)
    parameters = dict(program.named_parameters())
    for point in program.plan.exits:
        assert isinstance(program.get_submodule(f"{HEADS}.{point.name}"), ExitHead)
        assert parameters[point.weight].shape == (CLASSES, point.head.width)
        assert parameters[point.bias].shape == (CLASSES,)
    added = set(program.state_dict()) - set(captured("identity").state_dict())
    assert all(name.startswith(f"{HEADS}.") for name in added)


def test_each_head_is_called_right_after_the_value_that_it_reads():
    program = with_heads("in_place", "block1.conv1,block2")
    names = [node.name for node in program.graph.nodes]
    for point in program.plan.exits:
        node = program.head_node(point.name)
        assert [source.name for source in node.all_input_nodes] == [point.after]
        assert names.index(node.name) == names.index(point.after) + 1


@pytest.mark.parametrize("training", [True, False])
def test_a_head_reads_the_value_before_a_later_operation_overwrites_it(training):
    model = warm_up(ZOO["in_place"]())
    program = AttachHeads()(ChooseExits("block1.conv1", "linear")(capture(model, images()))).train(training)
    x = images(2)
    value = model.block1.conv1(model.stem(x))
    assert (value < 0).any()  # ReLU would show
    expected = program.get_submodule(f"{HEADS}.exit1")(value)
    assert torch.equal(program(x, all_exits=True)["exit1"], expected)


@pytest.mark.parametrize("head", ["linear", "conv", "mlp"])
def test_a_head_learns_from_a_value_that_a_later_operation_overwrites(head):
    program = with_heads("in_place", "block1.conv1,block2.conv2", head).train()
    sum(logits.sum() for logits in program(images(2)).logits).backward()
    assert all(parameter.grad is not None for parameter in program.parameters())


def test_a_head_may_read_the_input_itself():
    program = with_heads("plain", "x", "conv")
    x = images(2)
    assert torch.equal(program(x, all_exits=True)["exit1"], program.get_submodule(f"{HEADS}.exit1")(x))


@pytest.mark.parametrize("training", [True, False])
def test_new_heads_are_in_the_programs_mode(training):
    program = AttachHeads()(ChooseExits("block1", "conv")(captured("identity").train(training)))
    assert {module.training for module in program.get_submodule(HEADS).modules()} == {training}


def test_the_same_seed_makes_the_same_heads(seed):
    chosen = ChooseExits("block1,block2", "conv")(captured("identity"))
    made = []
    for number in (seed, seed, seed + 1):
        torch.manual_seed(number)
        made.append(AttachHeads()(chosen).get_submodule(HEADS).state_dict())
    first, second, third = made
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["exit1.classifier.weight"], third["exit1.classifier.weight"])


def test_heads_are_attached_once():
    program = with_heads("identity", "block1")
    with pytest.raises(PlanError, match="the network has a module 'exit_heads' already\n  hint: transform the original model"):
        AttachHeads()(program)


def test_a_models_own_module_of_that_name_is_not_overwritten():
    model = warm_up(ZOO["plain"]())
    model.add_module(HEADS, nn.Linear(1, 1))
    chosen = ChooseExits("1")(capture(model, images()))
    with pytest.raises(PlanError, match=r"the network has a module 'exit_heads' already\n  hint: .*rename it"):
        AttachHeads()(chosen)
