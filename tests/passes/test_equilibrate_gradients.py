"""Gradient Equilibrium: gradients against autograd on the network without it, each exit's loss by itself; forward the same bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import exitify
from examples.cifar_resnet56.model import CifarResNet
from exitify.errors import PlanError
from exitify.gradient_equilibrium import scale_gradient
from exitify.passes import make_pass
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.equilibrate_gradients import EquilibrateGradients
from exitify.pipeline import transform
from exitify.program import HEADS, ExitOutputs, Program
from exitify.tracing import capture
from tests.helpers import captured, cuttable_places, images, state, with_exits
from tests.models import CLASSES, ZOO, warm_up
from tests.residual_models import InARow

WIDTH = 6
Gradients = dict[str, torch.Tensor]


class Stage(nn.Module):
    """A layer; the gradient of `probe` is that of the stage's output, summed over the batch."""

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.linear, self.probe = nn.Linear(inputs * WIDTH, WIDTH), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(torch.cat(x, 1))) + self.probe


class Chain(nn.Module):
    """One tensor between any two stages."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stages, self.fc = nn.ModuleList(Stage() for _ in range(depth)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.fc(x)


class TwoScales(nn.Module):
    """A fine and a coarse tensor at each step, both of which go on; heads read the coarse one, as in MSDNet."""

    def __init__(self) -> None:
        super().__init__()
        self.fine1, self.coarse1 = Stage(), Stage()
        self.fine2, self.coarse2 = Stage(), Stage(2)
        self.fine3, self.coarse3 = Stage(), Stage(2)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.fine1(x)
        coarse = self.coarse1(fine)
        next_fine = self.fine2(fine)
        coarse, fine = self.coarse2(coarse, next_fine), next_fine
        fine = self.fine3(fine)
        return self.fc(self.coarse3(coarse, fine))


class SideBranch(nn.Module):
    """A value that nothing behind it needs, which is returned beside the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.second, self.third, self.fc = Stage(), Stage(), Stage(), Stage(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        aside = self.side(x)
        return self.fc(self.third(self.second(x))), aside


class Twice(nn.Module):
    """One stage called twice, or two with the same weights."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first = Stage()
        self.second = self.first if shared else copy.deepcopy(self.first)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x)))


def vectors(model: nn.Module, exits: str) -> Program:
    """A network of vectors with exits, in train() and in float64."""
    scores = 0 if isinstance(model, SideBranch) else None
    return with_exits(capture(model, torch.randn(2, WIDTH), scores=scores), exits).double().train()


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (count,))


def each_loss(outputs: ExitOutputs, y: torch.Tensor) -> list[torch.Tensor]:
    return [functional.cross_entropy(logits, y) for logits in outputs.logits]


def run(program: Program, x: torch.Tensor, skip: str = "none") -> ExitOutputs:
    """A forward pass with random numbers that are always the same."""
    torch.manual_seed(1)
    outputs: ExitOutputs = program(x, skip=skip)
    return outputs


def by_exit(program: Program, x: torch.Tensor, y: torch.Tensor, skip: str = "none") -> list[Gradients]:
    """Each exit's loss differentiated by itself; a parameter that it does not reach is left out."""
    parameters = dict(program.named_parameters())
    found = []
    for loss in each_loss(run(program, x, skip), y):
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        found.append({name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None})
    return found


def together(program: Program, x: torch.Tensor, y: torch.Tensor, skip: str = "none") -> Gradients:
    """The sum of all losses differentiated."""
    parameters = dict(program.named_parameters())
    loss = torch.stack(each_loss(run(program, x, skip), y)).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def assert_means(program: Program, x: torch.Tensor, y: torch.Tensor, skip: str = "none") -> None:
    """With equilibrium the gradient of every parameter is the mean over the exits that need it, and heads' are as they were."""
    alone = by_exit(program, x, y, skip)
    got, plain = together(EquilibrateGradients()(program), x, y, skip), together(program, x, y, skip)
    assert got.keys() == plain.keys()
    for name, gradient in got.items():
        parts = [gradients[name] for gradients in alone if name in gradients]
        if name.startswith(f"{HEADS}."):
            assert torch.equal(gradient, plain[name])
        else:
            torch.testing.assert_close(gradient, torch.stack(parts).mean(0), rtol=1e-8, atol=1e-12)


def places_of(name: str, count: int) -> str:
    """Places for that many exits in a network of the zoo, spread over it; all there are for 0."""
    places = cuttable_places(name)
    return ",".join(dict.fromkeys(places[(i + 1) * len(places) // (count + 1)] for i in range(count)) if count else places)


# --- chains


def test_of_three_exits_the_first_features_gradient_is_a_third_of_the_sum():
    program = vectors(Chain(3), "stages.0,stages.1")
    x, y = batch()
    first, second, third = by_exit(program, x, y)
    got = together(EquilibrateGradients()(program), x, y)
    name = "stages.0.probe"
    torch.testing.assert_close(got[name], (first[name] + second[name] + third[name]) / 3)
    name = "stages.1.probe"
    torch.testing.assert_close(got[name], (second[name] + third[name]) / 2)
    assert name not in first


def test_behind_the_last_early_exit_nothing_is_scaled():
    program = vectors(Chain(3), "stages.0,stages.1")
    x, y = batch()
    got, plain = together(EquilibrateGradients()(program), x, y), together(program, x, y)
    for name in ("stages.2.linear.weight", "stages.2.probe", "fc.weight", "fc.bias"):
        assert torch.equal(got[name], plain[name])


def test_heads_have_the_gradients_that_they_had():
    program = vectors(Chain(4), "stages.0,stages.1,stages.2")
    x, y = batch()
    got, plain = together(EquilibrateGradients()(program), x, y), together(program, x, y)
    heads = [name for name in plain if name.startswith(f"{HEADS}.")]
    assert len(heads) == 6
    assert all(torch.equal(got[name], plain[name]) for name in heads)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=4, unique=True), st.sampled_from(["all", "last"]), st.integers(0, 2**31))
def test_on_a_chain_of_up_to_five_exits_equation_5_holds_for_either_variant(places, tensors, seed):
    torch.manual_seed(seed)
    program = vectors(Chain(6), ",".join(f"stages.{place}" for place in sorted(places)) or "none")
    x, y = batch()
    exits = len(places) + 1
    alone = by_exit(program, x, y)
    got = together(EquilibrateGradients(tensors)(program), x, y)
    for stage in range(6):
        first = sum(place < stage for place in places)  # the exit whose stage this is, counted from 0
        for name in (f"stages.{stage}.probe", f"stages.{stage}.linear.weight"):
            expected = sum(gradients[name] for gradients in alone[first:]) / (exits - first)
            torch.testing.assert_close(got[name], expected, rtol=1e-8, atol=1e-12)


def test_gradients_do_not_grow_with_the_number_of_exits():
    x, y = batch()
    program = vectors(Chain(6), ",".join(f"stages.{i}" for i in range(5)))
    longest = max(float(gradients["stages.0.probe"].norm()) for gradients in by_exit(program, x, y))
    plain, scaled = (float(together(net, x, y)["stages.0.probe"].norm()) for net in (program, EquilibrateGradients()(program)))
    assert plain > longest >= scaled


# --- any graph


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"shared"}))
@pytest.mark.parametrize("count", [2, 0])
def test_on_any_network_a_gradient_is_the_mean_over_the_exits_that_need_it(name, count):
    program = with_exits(captured(name), places_of(name, count)).double().train()
    assert_means(program, images(3).double(), torch.tensor([0, 1, 2]))


def test_a_weight_used_twice_gets_the_sum_of_what_its_uses_get():
    torch.manual_seed(0)
    apart = vectors(Twice(shared=False), "first")
    torch.manual_seed(0)
    shared = with_exits(capture(Twice(shared=True), torch.randn(2, WIDTH)), "tanh").double().train()
    shared.load_state_dict({name: tensor for name, tensor in apart.state_dict().items() if name in shared.state_dict()})
    shared.exit_heads.load_state_dict(apart.exit_heads.state_dict())
    x, y = batch()
    got = together(EquilibrateGradients()(apart), x, y)
    alone = by_exit(apart, x, y)
    expected = (alone[0]["first.linear.weight"] + alone[1]["first.linear.weight"]) / 2 + alone[1]["second.linear.weight"]
    torch.testing.assert_close(got["first.linear.weight"] + got["second.linear.weight"], expected)
    (name,) = [name for name in together(shared, x, y) if name.endswith("linear.weight")]
    found = together(EquilibrateGradients()(shared), x, y)[name]
    again = by_exit(shared, x, y)
    assert not torch.allclose(found, (again[0][name] + again[1][name]) / 2)


def two_scales() -> Program:
    return vectors(TwoScales(), "coarse1,coarse2")


def test_of_a_cut_of_two_tensors_all_are_scaled():
    program = two_scales()
    x, y = batch()
    assert program.plan.segment("trunk_exit2").inputs == ("add", "add_1")  # both scales cross the first cut
    first, second, third = by_exit(program, x, y)
    got = together(EquilibrateGradients("all")(program), x, y)
    for name in ("fine1.probe", "coarse1.probe"):
        torch.testing.assert_close(got[name], (first[name] + second[name] + third[name]) / 3)
    for name in ("fine2.probe", "coarse2.probe"):
        torch.testing.assert_close(got[name], (second[name] + third[name]) / 2)
    for name in ("fine3.probe", "coarse3.probe"):
        torch.testing.assert_close(got[name], third[name])


def rescaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """The same value; a hook scales its gradient."""
    y = x.clone()
    y.register_hook(lambda gradient: gradient * factor)
    return y


def test_of_a_cut_of_two_tensors_last_scales_the_one_that_heads_read_as_the_papers_public_code():
    program = two_scales()
    x, y = batch()
    net, heads, logits = program, [program.exit_heads.exit1, program.exit_heads.exit2], []
    # Twice at each exit: by 1/(k-i+1) before the head, by (k-i) behind it; the finer tensor is never touched.
    f1 = stage(net.fine1, x)
    c1 = rescaled(stage(net.coarse1, f1), 1 / 3)
    logits.append(heads[0](c1))
    c1 = rescaled(c1, 2)
    f2 = stage(net.fine2, f1)
    c2 = rescaled(stage(net.coarse2, c1, f2), 1 / 2)
    logits.append(heads[1](c2))
    c2 = rescaled(c2, 1)
    f3 = stage(net.fine3, f2)
    logits.append(net.fc(stage(net.coarse3, c2, f3)))
    loss = torch.stack([functional.cross_entropy(one, y) for one in logits]).sum()
    parameters = dict(program.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    got = together(EquilibrateGradients("last")(program), x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    both = together(EquilibrateGradients("all")(program), x, y)
    assert not torch.allclose(both["fine1.probe"], got["fine1.probe"])


def stage(members: nn.Module, *x: torch.Tensor) -> torch.Tensor:
    """What a `Stage` computes, from the modules that a Program keeps of it."""
    return torch.tanh(members.linear(torch.cat(x, 1))) + members.probe


def test_an_exit_on_a_side_branch_counts_before_the_branch_and_alone_on_it():
    program = vectors(SideBranch(), "side,second")
    assert [point.place for point in program.plan.exits] == ["side", "second"]
    x, y = batch()
    first, second, third = by_exit(program, x, y)
    assert "side.probe" not in second.keys() | third.keys()
    got = together(EquilibrateGradients()(program), x, y)
    torch.testing.assert_close(got["first.probe"], (first["first.probe"] + second["first.probe"] + third["first.probe"]) / 3)
    torch.testing.assert_close(got["second.probe"], (second["second.probe"] + third["second.probe"]) / 2)
    assert torch.equal(got["side.probe"], first["side.probe"])


# --- forward, skip masks, other modes


@pytest.mark.parametrize("tensors", ["all", "last"])
@pytest.mark.parametrize("name", ZOO)
def test_forward_values_are_the_same_bits(name, tensors):
    program = with_exits(captured(name), places_of(name, 3)).train()
    x = images(3)
    got, plain = run(EquilibrateGradients(tensors)(program), x), run(program, x)
    assert got.names == plain.names
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))
    assert torch.equal(got.output, plain.output)


class GroupedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.norm(self.conv(x)))


def skipping() -> list[Program]:
    """Networks with exits and skip paths, whose second norms are not their first."""
    programs = [
        transform(warm_up(InARow(4, *(GroupedBlock() for _ in range(4)))), images(), exits="blocks.1,blocks.3", skips="auto", head="linear"),
        transform(warm_up(CifarResNet(2)), images(), exits="layer1,layer2.0,layer2.1", skips="auto", head="linear"),
    ]
    for program in programs:
        with torch.no_grad():
            for name, parameter in program.named_parameters():
                if name.startswith("skip_norms."):
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
    return [program.double().train() for program in programs]


@pytest.mark.parametrize(("which", "skip"), [(0, "none"), (0, "all"), (1, "none"), (1, "all"), (1, "100"), (1, "010")])
def test_under_any_skip_mask_gradients_are_means_in_the_network_that_is_left(which, skip):
    program = skipping()[which]
    x, y = images(4).double(), torch.tensor([0, 1, 2, 3])
    assert_means(program, x, y, skip)
    got, plain = run(EquilibrateGradients()(program), x, skip), run(program, x, skip)
    for a, b in zip((*got.logits, *got.stages), (*plain.logits, *plain.stages), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["eval", "without exits"])
def test_elsewhere_than_in_training_all_exits_nothing_is_scaled(how):
    program = vectors(Chain(3), "stages.0,stages.1")
    net = EquilibrateGradients()(program)
    x, _ = batch()
    found = []
    for one in (program, net):
        one.train(how != "eval")
        outputs = one(x, all_exits=how == "eval")
        loss = sum(logits.square().sum() for logits in outputs.logits) if how == "eval" else outputs.square().sum()
        found.append((outputs, torch.autograd.grad(loss, one.get_parameter("stages.0.probe"))[0]))
    (plain, expected), (got, gradient) = found
    assert torch.equal(gradient, expected)
    assert torch.equal(got.final if how == "eval" else got, plain.final if how == "eval" else plain)


def test_training_and_evaluation_take_turns():
    net = EquilibrateGradients()(vectors(Chain(3), "stages.0"))
    x, y = batch()
    probe = net.get_parameter("stages.0.probe")

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(torch.stack(each_loss(net(x, all_exits=True), y)).sum(), probe)[0]

    training, evaluating, again = gradient(), [net.eval(), gradient()][1], [net.train(), gradient()][1]
    torch.testing.assert_close(training * 2, evaluating)
    assert torch.equal(again, training)


def test_a_frozen_backbone_leaves_nothing_to_scale():
    program = with_exits(captured("identity"), "block1").freeze_backbone().train()
    x, y = images(3), torch.tensor([0, 1, 2])
    for gradients in (together_heads(program, x, y), together_heads(EquilibrateGradients()(program), x, y)):
        assert set(gradients) == {f"{HEADS}.exit1.classifier.weight", f"{HEADS}.exit1.classifier.bias"}
    one, other = together_heads(program, x, y), together_heads(EquilibrateGradients()(program), x, y)
    assert all(torch.equal(one[name], other[name]) for name in one)


def together_heads(program: Program, x: torch.Tensor, y: torch.Tensor) -> Gradients:
    program.zero_grad()
    functional.cross_entropy(program(x)["exit1"], y).backward()
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def test_in_mixed_precision_gradients_are_means_too():
    program = vectors(Chain(3), "stages.0,stages.1").float()
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone, got = by_exit(program, x.float(), y), together(EquilibrateGradients()(program), x.float(), y)
    expected = sum(gradients["stages.0.probe"] for gradients in alone) / 3
    torch.testing.assert_close(got["stages.0.probe"], expected, rtol=0.05, atol=0.005)  # bfloat16 has three digits


def test_a_compiled_network_scales_the_same():
    net = EquilibrateGradients()(with_exits(captured("in_place"), places_of("in_place", 2))).train()
    x, y = images(3), torch.tensor([0, 1, 2])
    expected = together(net, x, y)  # makes the function that is compiled next
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    loss = torch.stack(each_loss(compiled(x), y)).sum()
    parameters = dict(net.named_parameters())
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


# --- what a value is made of


def test_gradients_are_scaled_in_tuples_too_and_what_has_none_is_left_alone():
    Pair = namedtuple("Pair", "left right")
    x = torch.ones(3, requires_grad=True)
    whole, fixed = torch.arange(3), torch.ones(3)
    left, right = scale_gradient(Pair(x * 2, [x * 3, whole]), 0.5)
    assert isinstance(scale_gradient(Pair(x, x), 0.5), Pair)
    (left.sum() + right[0].sum()).backward()
    assert x.grad.tolist() == [2.5] * 3
    assert right[1] is whole
    assert scale_gradient(fixed, 0.5) is fixed
    assert scale_gradient(None, 0.5) is None


class Halves(nn.Module):
    """Cut in the middle of a tuple: the first half answers early."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.early, self.late, self.fc = Stage(), nn.Linear(WIDTH // 2, WIDTH), nn.Linear(WIDTH // 2, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.chunk(self.first(x), 2, dim=1)
        return self.fc(torch.relu_(self.early(left)) * self.late(right))


def test_a_tuple_that_crosses_a_cut_is_scaled_part_by_part():
    program = AttachHeads()(ChooseExits("early", "linear")(capture(Halves(), torch.randn(2, WIDTH)))).double().train()
    assert_means(program, *batch())


class Overwritten(nn.Module):
    """A tensor that is overwritten before the exit and read again, as it is then, behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fc = Stage(), Stage(), Stage(), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(torch.relu_(x))
        return self.fc(self.third(y) + x)


class OverwrittenInAModule(Overwritten):
    """The same by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(self.relu(x))
        return self.fc(self.third(y) + x)


class OverwrittenBehind(Overwritten):
    """The value that the exit's head reads is overwritten behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        y = torch.relu_(x)
        return self.fc(self.third(y) + x)


@pytest.mark.parametrize("build", [Overwritten, OverwrittenInAModule, OverwrittenBehind])
def test_what_is_overwritten_in_place_keeps_its_history(build):
    program = vectors(build(), "second")
    x, y = batch()
    assert_means(program, x, y)
    got, plain = run(EquilibrateGradients()(program), x), run(program, x)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


# --- what stays


def test_plan_graph_weights_and_the_program_given_stay_as_they_were():
    program = with_exits(captured("identity"), "block1,block2")
    before = (str(program.graph), program.plan, program.recipe, state(program), list(program._modules))
    net = EquilibrateGradients("last")(program)
    net.train()(images(2))
    assert (str(net.graph), net.plan) == before[:2]
    assert (str(program.graph), program.plan, program.recipe, list(program._modules)) == (*before[:3], before[4])
    assert (program.equilibrium, net.equilibrium) == ("", "last")
    assert net.state_dict().keys() == before[3].keys()
    assert all(a is b for a, b in zip(program.parameters(), net.parameters(), strict=True))


def test_copies_pickles_and_passes_keep_the_equilibrium():
    program = EquilibrateGradients("last")(with_exits(captured("plain"), "norm"))
    copies = [copy.deepcopy(program), pickle.loads(pickle.dumps(program)), program.replace(source="timm:plain"), through_torch(program)]
    assert [one.equilibrium for one in copies] == ["last"] * 4
    assert program.replace(equilibrium="all").equilibrium == "all"
    x, y = images(3), torch.tensor([0, 1, 2])
    expected = together(program.train(), x, y)
    for one in copies:
        got = together(one.train(), x, y)
        assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def through_torch(program: Program) -> Program:
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    loaded: Program = torch.load(file, weights_only=False)
    return loaded


def test_a_program_pickled_before_there_was_an_equilibrium_has_none():
    program = with_exits(captured("plain"), "norm")
    del program.__dict__["equilibrium"]
    again = pickle.loads(pickle.dumps(program))
    assert again.equilibrium == ""
    assert again.replace().train()(images(2)).names == ("exit1", "final")


def test_it_may_come_before_the_exits_are_chosen():
    x, y = images(3), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    early = with_exits(EquilibrateGradients()(captured("identity")), "block1").train()
    torch.manual_seed(0)
    late = EquilibrateGradients()(with_exits(captured("identity"), "block1")).train()
    one, other = together(early, x, y), together(late, x, y)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_exits_there_is_nothing_to_scale():
    program = captured("identity").train()
    net = EquilibrateGradients()(program)
    x, y = images(3), torch.tensor([0, 1, 2])
    one, other = together(program, x, y), together(net, x, y)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_exits_without_heads_are_refused_as_ever():
    net = EquilibrateGradients()(ChooseExits("block1")(captured("identity"))).train()
    with pytest.raises(PlanError, match="exit 'exit1' has no head"):
        net(images())


def test_what_is_exported_is_the_same_to_the_byte():
    plain = with_exits(captured("plain"), "norm")
    first, second = exitify.export(plain), exitify.export(EquilibrateGradients()(plain).train())
    assert first.files.keys() == second.files.keys()
    assert all(bytes(first.files[path]) == bytes(second.files[path]) for path in first.files)
    assert first.manifest.model_id == second.manifest.model_id
    assert first.plan == second.plan


@pytest.mark.parametrize("made", [EquilibrateGradients(), EquilibrateGradients("last")], ids=str)
def test_the_text_of_the_pass_makes_it_again_and_the_recipe_tells(made):
    assert make_pass(str(made)) == made
    assert EquilibrateGradients("last")(captured("plain")).recipe[-1] == "equilibrate-gradients{tensors=last}"


@pytest.mark.parametrize("tensors", ["", "first"])
def test_another_choice_of_tensors_is_refused(tensors):
    with pytest.raises(PlanError, match=f"there is no way '{tensors}' to equilibrate gradients\n  hint: there are all, last"):
        EquilibrateGradients(tensors)(captured("plain"))
