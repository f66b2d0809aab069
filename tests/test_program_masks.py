"""Masks: a program that leaves blocks out is the network without them, its norms exchanged, in both modes."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import PlanError
from exitify.pipeline import transform
from exitify.plan import FINAL, Segment, mask_text
from exitify.program import HEADS, SKIP_NORMS, ExitOutputs, Program, compile_graph, copy_graph, extract
from tests.helpers import assert_close, captured, images, segment_function, state
from tests.models import CLASSES, ZOO, warm_up
from tests.residual_models import TORCHVISION, Encoders, PreActivation, exported


def with_skips(model: nn.Module, exits: str = "none", skips: str = "auto", example: torch.Tensor | None = None) -> Program:
    """Transformed, and with second sets of norms that are not the first."""
    program = transform(model, images() if example is None else example, exits=exits, skips=skips, head="linear")
    for name, tensor in program.state_dict().items():
        if name.startswith(f"{SKIP_NORMS}.") and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)  # variances are positive
    return program


def all_masks(program: Program) -> list[tuple[bool, ...]]:
    return list(itertools.product([False, True], repeat=len(program.plan.skips)))


def norms_under(program: Program, place: str) -> nn.Module:
    return program.get_submodule(f"{SKIP_NORMS}.{place}")


def reduced_cifar(program: Program, model: CifarResNet, mask: Sequence[bool]) -> nn.Module:
    """The same network with shorter stages, whose norms are the program's second ones."""
    result = copy.deepcopy(model)
    for layer, flag in zip(("layer1", "layer2", "layer3"), mask, strict=True):
        if flag:
            blocks = list(result.get_submodule(layer).children())
            kept = blocks[: (len(blocks) + 1) // 2]
            for i, block in enumerate(kept):
                block.bn1, block.bn2 = (copy.deepcopy(norms_under(program, f"{layer}.{i}.bn{j}")) for j in (1, 2))
            setattr(result, layer, nn.Sequential(*kept))
    return result


def reduced_encoders(program: Program, model: Encoders, mask: Sequence[bool]) -> nn.Module:
    """Groups of two blocks, the second left out, the first with the program's second norms."""
    result, kept = copy.deepcopy(model), []
    for i, block in enumerate(result.layers.children()):
        if mask[i // 2]:
            if i % 2:
                continue
            block.norm1, block.norm2 = (copy.deepcopy(norms_under(program, f"layers.{i}.norm{j}")) for j in (1, 2))
        kept.append(block)
    result.layers = nn.Sequential(*kept)
    return result


def reduced_pre_activation(program: Program, model: PreActivation, mask: Sequence[bool]) -> nn.Module:
    result = copy.deepcopy(model)
    for layer, flag in zip(("stage1", "stage2"), mask, strict=True):
        if flag:
            kept = list(result.get_submodule(layer).children())[:2]
            for i, block in enumerate(kept):
                block.bn1, block.bn2 = (copy.deepcopy(norms_under(program, f"{layer}.{i}.bn{j}")) for j in (1, 2))
            setattr(result, layer, nn.Sequential(*kept))
    return result


REDUCED: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module]]] = {
    "cifar": (lambda: CifarResNet(3), reduced_cifar),
    "encoders": (lambda: Encoders(8), reduced_encoders),
    "pre_activation": (PreActivation, reduced_pre_activation),
}
"""Networks, and how each looks with some of its blocks gone: built without a graph."""


@pytest.mark.parametrize("name", REDUCED)
def test_every_mask_is_the_network_without_those_blocks_and_with_the_other_norms(name):
    build, reduce = REDUCED[name]
    model = warm_up(build())
    program = with_skips(model)
    x, answers = images(3), []
    for mask in all_masks(program):
        answers.append(program(x, skip=mask))
        assert torch.equal(answers[-1], reduce(program, model, mask)(x))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(answers, 2))


@pytest.mark.parametrize("name", REDUCED)
def test_in_train_too_every_mask_is_the_smaller_network(name):
    build, reduce = REDUCED[name]
    model = warm_up(build())
    program = with_skips(model)
    x = images(3)
    for mask in all_masks(program):
        trained, other = copy.deepcopy(program).train(), reduce(program, model, mask).train()
        got, expected = trained(x, skip=mask), other(x)
        assert torch.equal(got.final, expected)
        got.final.square().sum().backward()
        expected.square().sum().backward()
        gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        assert sum(g.square().sum() for g in gradients.values()) > 0
        assert len(gradients) == sum(1 for _ in other.parameters())  # what is left out, and the norms not in use, get none


def second_set(program: Program, place: str, norm: nn.Module) -> nn.Module:
    """A norm with the tensors of its second set, for programs whose norms are functions."""
    result, tensors = copy.deepcopy(norm), program.state_dict()
    for name, tensor in result.state_dict().items():
        tensor.copy_(tensors.get(f"{SKIP_NORMS}.{place}.{name}", tensor))
    return result


def test_norms_that_are_functions_are_exchanged_as_modules_are(torchvision):
    model = TORCHVISION["convnext"](torchvision).eval()
    x = torch.randn(2, 3, 32, 32)
    program = with_skips(model, example=x)
    reduced = copy.deepcopy(model)
    reduced.features[2][0] = second_set(program, "features.2.0", model.features[2][0])  # LayerNorm2d, between the stages
    reduced.features[3] = reduced.features[3][:2]
    for i, block in enumerate(reduced.features[3]):
        block.block[2] = second_set(program, f"features.3.{i}.block.2", block.block[2])
    assert torch.equal(program(x, skip="0100"), reduced(x))


def test_an_exported_networks_masks_are_those_of_its_module():
    model = warm_up(CifarResNet(2))
    program = with_skips(exported(model))
    x = images(3)
    for mask in all_masks(program):
        reduced = copy.deepcopy(model)
        for layer, flag in zip((reduced.layer1, reduced.layer2, reduced.layer3), mask, strict=True):
            if flag:
                del layer[1]
        for stage, flag in enumerate(mask, 1):
            block = reduced.get_submodule(f"layer{stage}.0")
            if flag:
                block.bn1, block.bn2 = (second_set(program, f"layer{stage}.0.bn{j}", block.get_submodule(f"bn{j}")) for j in (1, 2))
        assert_close(program(x, skip=mask), reduced(x))  # an exported mean is another kernel


@functools.cache
def network(name: str) -> Program:
    """Networks with skip paths for tests of the plan; no test changes them."""
    with torch.random.fork_rng(devices=[]):
        return {
            "cifar": lambda: with_skips(warm_up(CifarResNet(4)), "layer1,layer2.0,layer3.1", "2"),
            "inside": lambda: with_skips(warm_up(CifarResNet(3)), "layer1.0.bn1,layer2.0.conv2,layer3.0", "auto"),
            "pieces": lambda: with_skips(warm_up(CifarResNet(4)), "layer1.1", "layer1.0,layer1.2,layer2.3,layer3.1,layer3.3"),
            "encoders": lambda: with_skips(warm_up(Encoders(8)), "layers.1,layers.4"),
            "in_place": lambda: with_skips(warm_up(ZOO["in_place"]()), "block1"),
        }[name]()


NETWORKS = st.sampled_from(["cifar", "inside", "pieces", "encoders", "in_place"])


def a_mask(data: st.DataObject, program: Program) -> tuple[bool, ...]:
    count = len(program.plan.skips)
    return tuple(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))


def some_exits(data: st.DataObject, program: Program) -> tuple[str, ...]:
    return tuple(data.draw(st.sets(st.sampled_from(program.plan.exit_names[:-1]))))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar": lambda t: CifarResNet(3),
    "encoders": lambda t: Encoders(8),
    "in_place": lambda t: ZOO["in_place"](),
    "shared": lambda t: ZOO["shared"](),
    "convnext": TORCHVISION["convnext"],
    "swin": TORCHVISION["swin"],
    "mobilenet_v2": lambda t: t.models.MobileNetV2(num_classes=CLASSES, width_mult=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_leaving_nothing_out_is_the_original_in_both_modes(name, torchvision):
    model = MODELS[name](torchvision).eval()
    x = torch.randn(3, 3, 32, 32)
    program = transform(model, x, exits="none", skips="auto")
    assert program.plan.skips
    nothing = (None, "none", "0" * len(program.plan.skips))
    for skip in nothing:
        assert torch.equal(program(x, skip=skip), model(x))
    original = copy.deepcopy(model).train()
    torch.manual_seed(1)
    expected = original(x)
    for skip in nothing:
        trained = copy.deepcopy(program).train()
        torch.manual_seed(1)
        assert torch.equal(trained(x, skip=skip).final, expected)
        after = trained.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in original.state_dict().items())


def running(program: Program, prefix: str) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in program.state_dict().items() if key.startswith(prefix) and "running" in key}


def test_a_mask_in_train_moves_the_statistics_of_the_norms_in_use_and_of_no_others():
    program = with_skips(warm_up(CifarResNet(3))).train()
    before = state(program)
    program(images(4), skip="010")
    changed = {key for key, tensor in program.state_dict().items() if not torch.equal(tensor, before[key])}
    places = {key.rpartition(".")[0] for key in changed}
    assert places == {
        "bn1",
        *(f"layer1.{i}.bn{j}" for i in range(3) for j in (1, 2)),
        *(f"{SKIP_NORMS}.layer2.{i}.bn{j}" for i in range(2) for j in (1, 2)),
        *(f"layer3.{i}.bn{j}" for i in range(3) for j in (1, 2)),
    }
    assert all(key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for key in changed)


def test_leaving_nothing_out_leaves_second_sets_alone():
    program = with_skips(warm_up(CifarResNet(3))).train()
    before = running(program, SKIP_NORMS)
    program(images(4)).final.sum().backward()
    assert all(torch.equal(tensor, before[key]) for key, tensor in running(program, SKIP_NORMS).items())
    assert all(p.grad is None for name, p in program.named_parameters() if name.startswith(SKIP_NORMS))


def test_stochastic_depth_of_mandatory_blocks_rests_while_their_stage_is_left_out(torchvision):
    model = TORCHVISION["convnext"](torchvision)
    for name, module in model.named_modules():
        if name.endswith("stochastic_depth"):
            module.p = 0.5 if name.startswith(("features.3.0", "features.3.1")) else 0.0  # the second stage's mandatory blocks
    x = torch.randn(8, 3, 32, 32)
    program = transform(model.eval(), x, exits="none", skips="auto").train()
    for mask in ("0000", "1000", "1011"):
        assert not torch.equal(program(x, skip=mask).final, program(x, skip=mask).final)
    for mask in ("0100", "1100", "1111"):
        assert torch.equal(program(x, skip=mask).final, program(x, skip=mask).final)


def test_stochastic_depth_of_a_skippable_block_works_as_ever_until_it_is_left_out(torchvision):
    model = TORCHVISION["convnext"](torchvision)
    for name, module in model.named_modules():
        if name.endswith("stochastic_depth"):
            module.p = 0.5 if name.startswith("features.3.2") else 0.0
    x = torch.randn(8, 3, 32, 32)
    program = transform(model.eval(), x, exits="none", skips="auto").train()
    assert not torch.equal(program(x, skip="1011").final, program(x, skip="1011").final)
    assert torch.equal(program(x, skip="0100").final, program(x, skip="0100").final)


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        (None, (False, False, False)),
        ("none", (False, False, False)),
        ("all", (True, True, True)),
        ("010", (False, True, False)),
        ((False, True, False), (False, True, False)),
        ([True, False, True], (True, False, True)),
        ((1, 0, 0), (True, False, False)),
        (np.array([True, False, False]), (True, False, False)),
    ],
)
def test_a_mask_is_text_or_one_flag_a_path(given, mask):
    plan = network("cifar").plan
    assert plan.mask(given) == mask
    assert all(type(flag) is bool for flag in plan.mask(given))
    assert plan.mask(mask_text(mask)) == mask
    assert [path.name for path in plan.left_out(given)] == [name for name, flag in zip(("skip1", "skip2", "skip3"), mask, strict=True) if flag]


@pytest.mark.parametrize(
    ("skip", "shown"),
    [
        ("01", "'01'"),
        ("0101", "'0101'"),
        ("01x", "'01x'"),
        ("", "''"),
        ("ALL", "'ALL'"),
        ((True,), r"\(True,\)"),
        ((), r"\(\)"),
        ((0, 1, 2), r"\(0, 1, 2\)"),
        (("a", True, False), r"\('a', True, False\)"),
        ((None, True, False), r"\(None, True, False\)"),
    ],
)
def test_a_mask_of_another_length_or_other_values_is_refused(skip, shown):
    program = network("cifar")
    hint = r"they are, in order, skip1 \(layer1\), skip2 \(layer2\), skip3 \(layer3\)"
    problem = f"the mask {shown} is not one 0 or 1 for each of the 3 skip paths\n  hint: {hint}"
    with pytest.raises(PlanError, match=problem):
        program(images(), skip=skip)
    with pytest.raises(PlanError, match=problem):
        program.plan.stretches((), skip)


def test_a_network_without_skip_paths_has_nothing_to_leave_out():
    program = captured("identity")
    x = images(2)
    for skip in (None, "none", "all", "", ()):
        assert torch.equal(program(x, skip=skip), program(x))
    with pytest.raises(
        PlanError, match="there is nothing to skip for the mask '1': this network has no skip paths\n  hint: transform with `--skips auto`"
    ):
        program(x, skip="1")


def test_stages_are_what_each_gives_to_the_next_and_what_stands_in_for_it():
    program = with_skips(warm_up(CifarResNet(3)), "layer1")
    x = images(2)
    for mask in all_masks(program):
        outputs = program(x, skip=mask, all_exits=True)
        assert isinstance(outputs, ExitOutputs)
        assert (outputs.names, len(outputs.logits), len(outputs.stages)) == (("exit1", FINAL), 2, 3)
        assert [tuple(stage.shape[1:]) for stage in outputs.stages] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
        assert torch.equal(program.get_submodule("linear")(outputs.stages[2].mean((2, 3))), outputs.final)
        assert torch.equal(program.get_submodule(f"{HEADS}.exit1")(outputs.stages[0]), outputs["exit1"])


def test_a_head_behind_a_stage_reads_what_stands_in_for_it():
    program = with_skips(warm_up(CifarResNet(3)), "layer1,layer2.1")
    x = images(2)
    answers = {mask: program(x, skip=mask, all_exits=True) for mask in ("000", "100", "110", "010")}
    assert not torch.equal(answers["100"]["exit1"], answers["000"]["exit1"])
    assert torch.equal(answers["100"]["exit1"], answers["110"]["exit1"])
    assert torch.equal(answers["010"]["exit1"], answers["000"]["exit1"])
    assert not torch.equal(answers["100"]["exit2"], answers["110"]["exit2"])  # the norms before it


@pytest.mark.parametrize("name", ["cifar", "inside", "pieces", "encoders", "in_place"])
def test_masked_graphs_keep_the_names_of_nodes_and_compute_nothing_in_vain(name):
    program = network(name)
    names = {node.name for node in program.graph.nodes}
    before = str(program.graph)
    for mask in all_masks(program):
        graph = program.masked_graph(mask)
        graph.lint()
        left = {node.name for node in graph.nodes if node.op != "get_attr"}
        assert left <= names
        assert not left & {path.after for path in program.plan.left_out(mask)}
        assert all(node.users for node in graph.nodes if node.op != "output" and not str(node.target).startswith(f"{HEADS}."))
    assert str(program.graph) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: through_a_file(p)])
def test_a_copy_answers_every_mask_as_its_original_does(duplicate):
    program = with_skips(warm_up(CifarResNet(2)), "layer1")
    x = images(2)
    expected = [program(x, skip=mask, all_exits=True) for mask in all_masks(program)]
    other = duplicate(program)
    other.verify()
    assert other.plan == program.plan
    for mask, answer in zip(all_masks(program), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(other(x, skip=mask, all_exits=True).logits, answer.logits, strict=True))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert torch.equal(program(x, skip="all"), expected[-1].final)


def through_a_file(program: Program) -> Program:
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    result: Program = torch.load(file, weights_only=False)
    return result


def test_a_state_dict_carries_both_sets_of_norms():
    program, other = with_skips(warm_up(CifarResNet(2))), with_skips(warm_up(CifarResNet(2)))
    x = images(2)
    assert not torch.equal(program(x, skip="all"), other(x, skip="all"))
    other.load_state_dict(program.state_dict(), strict=True)
    assert all(torch.equal(program(x, skip=mask), other(x, skip=mask)) for mask in all_masks(program))


def test_heads_of_a_frozen_network_are_trained_under_any_mask_and_nothing_else_is():
    program = with_skips(warm_up(CifarResNet(2)), "layer1,layer2").freeze_backbone().train()
    before = state(program)
    optimizer = torch.optim.SGD([p for p in program.parameters() if p.requires_grad], lr=0.1)
    for mask in (None, "all", "010"):
        outputs = program(images(4), skip=mask)
        sum(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])) for logits in outputs.logits[:-1]).backward()
    optimizer.step()
    changed = {key for key, tensor in program.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key.split(".")[0] for key in changed} == {HEADS}
    assert all(p.grad is None for name, p in program.named_parameters() if not name.startswith(HEADS))


@given(NETWORKS, st.data())
def test_a_mask_saves_what_its_blocks_cost(name, data):
    plan = network(name).plan
    mask = a_mask(data, network(name))
    blocks = {segment.follows: segment.cost.macs for segment in plan.segments if segment.kind == "block"}
    assert all(macs > 0 for macs in blocks.values())
    saved = sum(blocks[path.name] for path, flag in zip(plan.skips, mask, strict=True) if flag)
    assert plan.macs_at((), mask) == {FINAL: plan.full_macs - saved}


@given(NETWORKS, st.data())
def test_with_exits_too_a_mask_saves_the_blocks_before_each_of_them(name, data):
    program = network(name)
    plan, mask, enabled = program.plan, a_mask(data, program), some_exits(data, program)
    full, less = plan.macs_at(enabled), plan.macs_at(enabled, mask)
    seen = 0
    for stretch in plan.stretches(enabled):
        segments = [plan.segment(segment) for segment in stretch.segments]
        seen += sum(s.cost.macs for s in segments if s.kind == "block" and s.follows in {path.name for path in plan.left_out(mask)})
        assert less[stretch.exit] == full[stretch.exit] - seen


@given(NETWORKS, st.data())
def test_stretches_run_the_same_segments_in_the_same_order_under_every_mask(name, data):
    program = network(name)
    plan, mask, enabled = program.plan, a_mask(data, program), some_exits(data, program)
    stretches = plan.stretches(enabled, mask)
    assert [s for stretch in stretches for s in stretch.segments] == [s for stretch in plan.stretches(enabled) for s in stretch.segments]
    assert [stretch.exit for stretch in stretches] == [point for point in plan.exit_names if point in {*enabled, FINAL}]
    known = {plan.input}
    for stretch in stretches:
        assert stretch.segments
        assert set(stretch.inputs) <= known
        made = {value for segment in stretch.segments for value in plan.segment(segment).outputs}
        assert set(stretch.outputs) <= made
        known |= set(stretch.outputs)


def switched_segment(program: Program, segment: Segment, skipped: set[str]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A segment as a mask would have it: the identity, or with its second norms."""
    if segment.kind == "block" and segment.follows in skipped:
        return lambda *inputs: inputs
    if segment.follows not in skipped:
        return segment_function(program, segment)
    graph, _ = copy_graph(program.graph)
    nodes: dict[str, fx.Node] = {node.name: node for node in graph.nodes}
    for path in program.plan.skips:
        for norm in path.norms if path.name == segment.follows else ():
            nodes[norm].target = f"{SKIP_NORMS}.{nodes[norm].target}"
    function = compile_graph(extract(graph, [nodes[value] for value in segment.outputs], [nodes[value] for value in segment.inputs]))
    return lambda *inputs: function(program, *inputs)


@pytest.mark.parametrize("name", ["cifar", "inside", "pieces", "encoders"])
def test_stretches_executed_one_after_another_are_the_program_under_that_mask(name):
    program = network(name)
    x, exits = images(2), program.plan.exit_names[:-1]
    with torch.no_grad():
        for mask in all_masks(program):
            skipped = {path.name for path in program.plan.left_out(mask)}
            expected, kept = program(x, skip=mask, all_exits=True), {program.plan.input: x}
            for stretch in program.plan.stretches(exits, mask):
                assert set(stretch.skipped) == skipped & {program.plan.segment(s).follows for s in stretch.segments}
                values = {value: kept[value] for value in stretch.inputs}
                for segment in map(program.plan.segment, stretch.segments):
                    outputs = switched_segment(program, segment, skipped)(*(values[value] for value in segment.inputs))
                    values.update(zip(segment.outputs, outputs, strict=True))
                kept.update({value: values[value] for value in stretch.outputs})
            for point in program.plan.exits:
                assert torch.equal(kept[point.logits], expected[point.name])
            assert torch.equal(kept[program.plan.output], expected.final)
