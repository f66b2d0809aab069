"""A program is an ordinary module: it trains, evaluates, copies and saves; its graph and its plan fit each other."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import fx, nn

from exitify.errors import PlanError
from exitify.plan import Cost, Segment
from exitify.program import HEADS, ExitOutputs, Program, carriers, compile_graph, copy_graph, extract, in_mode
from exitify.tracing import capture
from tests.helpers import captured, cuttable_places, images, run_segments, state, with_exits
from tests.models import CLASSES, ZOO, warm_up


def two_exits(name: str, head: str = "linear") -> Program:
    """A network of the zoo with exits at a third and two thirds of its values."""
    places = cuttable_places(name)
    return with_exits(captured(name), f"{places[len(places) // 3]},{places[2 * len(places) // 3]}", head)


def node_named(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)


@pytest.mark.parametrize("name", ZOO)
def test_in_train_a_program_returns_every_exits_logits(name):
    program = two_exits(name).train()
    got = program(images(3))
    assert isinstance(got, ExitOutputs)
    assert got.names == ("exit1", "exit2", "final")
    assert [logits.shape for logits in got.logits] == [(3, CLASSES)] * 3
    assert got["exit2"] is got.logits[1]
    assert got.final is got["final"] is got.logits[2]


@pytest.mark.parametrize("name", ZOO)
def test_in_eval_a_program_with_exits_returns_what_the_model_returned(name):
    model = warm_up(ZOO[name]())
    program = with_exits(capture(model, images()), ",".join(cuttable_places(name)))
    x = images(2)
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize("name", ZOO)
def test_all_exits_overrides_the_mode(name):
    program = two_exits(name)
    x = images(2)
    with torch.no_grad():
        everything = program(x, all_exits=True)
        assert everything.names == ("exit1", "exit2", "final")
        assert torch.equal(everything.final, program(x))
        assert isinstance(program.train()(x, all_exits=False), torch.Tensor)


def test_an_unknown_exit_has_no_logits():
    with pytest.raises(ValueError, match="not in tuple"):
        two_exits("plain").eval()(images(), all_exits=True)["exit3"]


@pytest.mark.parametrize("name", ZOO)
def test_a_deep_copy_computes_the_same_and_shares_nothing(name):
    program = two_exits(name)
    duplicate = copy.deepcopy(program)
    x = images(2)
    before = program(x, all_exits=True)
    assert all(torch.equal(a, b) for a, b in zip(duplicate(x, all_exits=True).logits, before.logits, strict=True))
    assert not {id(p) for p in program.parameters()} & {id(p) for p in duplicate.parameters()}
    assert not {id(m) for m in program.modules()} & {id(m) for m in duplicate.modules()}
    assert not {id(node) for node in program.graph.nodes} & {id(node) for node in duplicate.graph.nodes}
    with torch.no_grad():
        for tensor in duplicate.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(program(x, all_exits=True).logits, before.logits, strict=True))


def test_a_deep_copy_keeps_plan_recipe_and_what_is_frozen():
    program = two_exits("identity").freeze_backbone()
    duplicate = copy.deepcopy(program).train()
    assert (duplicate.plan, duplicate.recipe, duplicate.values) == (program.plan, program.recipe, program.values)
    assert not duplicate.block1.training
    assert duplicate.exit_heads.training


@pytest.mark.parametrize("name", ZOO)
def test_a_state_dict_saved_and_loaded_gives_the_same_answers(name):
    program = two_exits(name, "mlp" if name == "transformer" else "conv" if name == "identity" else "linear")
    other = copy.deepcopy(program)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    x = images(2)
    file = io.BytesIO()
    torch.save(program.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(x), program(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(other(x, all_exits=True).logits, program(x, all_exits=True).logits, strict=True))


def pickled(program: Program) -> Program:
    """Written by torch.save and read."""
    stream = io.BytesIO()
    torch.save(program, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled], ids=["copied", "pickled"])
def test_of_a_compiled_program_the_copy_computes_with_its_own_weights(again):
    program, x = two_exits("identity").eval(), images()
    expected = program(x)
    program.compile(backend="eager")  # in place: calls go through what compile() made, which is bound to this program
    program(x)
    other = again(program)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(program(x), expected)
    assert not torch.allclose(other(x), expected)


def test_a_program_pickled_and_read_gives_the_same_answers():
    program = two_exits("transformer")
    x = images(2)
    expected = program(x)  # compiles the graph: functions made by exec cannot be pickled
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.verify()
    assert again.plan == program.plan
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", ZOO)
def test_a_training_step_with_a_frozen_backbone_changes_the_heads_alone(name):
    program = two_exits(name).freeze_backbone().train()
    before = state(program)
    optimizer = torch.optim.SGD([p for p in program.parameters() if p.requires_grad], lr=0.1)
    loss = sum(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])) for logits in program(images(3)).logits[:-1])
    loss.backward()
    optimizer.step()
    assert {name.split(".")[0] for name, p in program.named_parameters() if p.grad is not None} == {HEADS}
    after = program.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    heads = {key for key in before if key.startswith(f"{HEADS}.")}
    assert changed == heads  # norm statistics and counters of the backbone are in `before` too


@pytest.mark.parametrize("name", ["dropout", "stochastic"])
def test_dropout_and_stochastic_depth_of_a_frozen_backbone_rest(name):
    program = two_exits(name).freeze_backbone().train()
    x = images(4)
    first, second = program(x), program(x)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))


def test_norms_inside_a_head_learn_while_the_backbone_is_frozen():
    program = two_exits("identity", "conv").freeze_backbone().train()
    before = state(program)
    program(images(4))
    changed = {key for key, tensor in program.state_dict().items() if not torch.equal(before[key], tensor)}
    assert changed
    assert all(key.startswith(f"{HEADS}.") and ("running" in key or "tracked" in key) for key in changed)


def test_freezing_keeps_the_mode_and_outlasts_changes_of_mode_and_passes():
    assert not captured("identity").freeze_backbone().training
    program = captured("identity").train().freeze_backbone()
    assert program.training
    assert not program.eval().train().block1.training
    assert not with_exits(program, "block1").train().block1.training


def test_a_child_that_is_none_does_not_hinder_freezing():
    model = warm_up(ZOO["plain"]())
    model.auxiliary = nn.Linear(1, 1)
    model.auxiliary = None
    assert capture(model, images()).freeze_backbone().train().training


def test_a_full_training_step_reaches_every_weight():
    program = two_exits("in_place", "conv").train()
    sum(logits.square().sum() for logits in program(images(3)).logits).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in program.parameters())


def test_replace_shares_every_weight_and_changes_only_what_it_is_told():
    program = two_exits("shared")
    other = program.replace(source="timm:shared")
    assert (other.source, program.source) == ("timm:shared", "")
    assert all(a is b for a, b in zip(program.parameters(), other.parameters(), strict=True))
    assert other.plan is program.plan
    assert other.training == program.training


def test_replace_adds_members_without_adding_them_to_the_one_given():
    program = captured("plain")
    other = program.replace(members={"extra": nn.Linear(2, 2)})
    assert "extra.weight" in other.state_dict()
    assert not hasattr(program, "extra")


def test_buffers_outside_the_state_dict_stay_outside():
    model = warm_up(ZOO["plain"]())
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    program = capture(model, images()).replace()
    assert "scratch" in dict(program.named_buffers())
    assert "scratch" not in program.state_dict()


def test_a_program_prints_its_plan():
    program = two_exits("plain")
    assert str(program) == program.plan.text()


def test_in_mode_gives_each_module_its_own_mode_back_even_after_an_error():
    model = ZOO["plain"]().train()
    model.norm.eval()
    seen = []

    def fails() -> None:
        with in_mode(model, training=False):
            seen.extend(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert not any(seen)
    assert [module.training for module in (model, model.norm, model.stem)] == [True, False, True]


def test_a_copied_graph_has_the_same_text_and_none_of_the_nodes():
    program = two_exits("transformer")
    graph, became = copy_graph(program.graph)
    assert str(graph) == str(program.graph)
    assert not set(graph.nodes) & set(program.graph.nodes)
    assert {node.name: new.name for node, new in became.items()} == {node.name: node.name for node in program.graph.nodes}


def test_extracting_keeps_what_the_outputs_need_and_nothing_else():
    program = captured("identity")
    part = extract(program.graph, [node_named(program, "add")], [node_named(program, "relu")])
    names = ["relu", "block1_conv1_0", "block1_conv1_1", "relu_1", "block1_conv2_0", "block1_conv2_1", "add", "output"]
    assert [node.name for node in part.nodes] == names
    part.lint()


def test_an_extracted_part_runs_on_its_own():
    program = captured("identity")
    part = compile_graph(extract(program.graph, [node_named(program, "relu_2")], [node_named(program, "relu")]))
    x = images(2).mean(1, keepdim=True).expand(-1, 8, -1, -1)
    assert torch.equal(part(program, x)[0], program.get_submodule("block1")(x))


def test_carriers_leave_out_what_does_not_depend_on_the_inputs_values():
    program = captured("transformer")
    carrying = carriers(program.graph, "x")
    by_name = {node.name: node for node in program.graph.nodes}
    assert carrying[:2] == ["x", "patches"]
    assert carrying[-1] == "fc"
    assert "expand" not in carrying  # the class token, once for each image: only the number of images is read
    assert not [name for name in carrying if by_name[name].op == "get_attr"]
    assert not [name for name in carrying if by_name[name].target is getattr]
    assert "cat" in carrying


class ReadsTypeEarlyAndLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype, device, (_, _, height, _) = x.dtype, x.device, x.shape
        x = self.first(x).to(dtype) + height
        x = self.second(x).to(device=device, dtype=dtype) - height
        return self.fc(x.mean((2, 3)))


def test_types_devices_and_sizes_of_the_input_do_not_hinder_a_cut():
    model = ReadsTypeEarlyAndLate().eval()
    program = with_exits(capture(model, images()), "second")
    x = images(2)
    assert program.plan.segment("trunk_final").inputs == ("x", "second")  # x for its sizes
    assert torch.equal(run_segments(program, x)["fc"], model(x))


def changed_plan(program: Program, **changes: object) -> Program:
    return program.replace(plan=dataclasses.replace(program.plan, **changes))


def without_last_node(program: Program) -> Program:
    segments = list(program.plan.segments)
    segments[-1] = dataclasses.replace(segments[-1], nodes=segments[-1].nodes[:-1])
    return changed_plan(program, segments=tuple(segments))


def with_a_node_too_many(program: Program) -> Program:
    segments = list(program.plan.segments)
    segments[-1] = dataclasses.replace(segments[-1], nodes=(*segments[-1].nodes, "nowhere"))
    return changed_plan(program, segments=tuple(segments))


def exit_after(program: Program, value: str) -> Program:
    return changed_plan(program, exits=(dataclasses.replace(program.plan.exits[0], after=value), *program.plan.exits[1:]))


@pytest.mark.parametrize(
    ("breaks", "problem"),
    [
        (lambda p: changed_plan(p, input="image", segments=()), "the plan names 'image', which the graph does not compute"),
        (lambda p: changed_plan(p, output="answer", segments=()), "the plan names 'answer', which the graph does not compute"),
        (lambda p: exit_after(p, "nowhere"), "the head of exit 'exit1' does not fit the value 'nowhere' that it reads"),
        (without_last_node, "no segment computes 'fc'"),
        (with_a_node_too_many, "segment 'trunk_final' holds 'nowhere', which the graph does not compute"),
        (lambda p: changed_plan(p, segments=(*p.plan.segments, p.plan.segments[0])), "the segment name 'trunk_exit1' is used twice"),
    ],
)
def test_a_plan_that_does_not_fit_the_graph_is_refused(breaks, problem):
    program = two_exits("identity")
    program.verify()
    with pytest.raises(PlanError, match=problem):
        breaks(program).verify()


def test_a_segment_without_nodes_of_the_graph_is_no_cover():
    program = captured("plain")
    empty = Segment("trunk_final", "trunk", (), ("x",), ("fc",), (), Cost())
    with pytest.raises(PlanError, match="no segment computes 'stem'"):
        changed_plan(program, segments=(empty,)).verify()


def test_an_exit_without_a_head_is_refused_with_the_pass_that_is_missing():
    from exitify.passes.choose_exits import ChooseExits

    program = ChooseExits("block1")(captured("identity"))
    with pytest.raises(PlanError, match="exit 'exit1' has no head\n  hint: apply the pass attach-heads first"):
        program.train()(images())
