"""Heads that read what an earlier exit said: what they compute, where gradients go, what they cost, and the way to a device."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import exitify
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import ExitSetting
from exitify.calibration.calibrate import Outputs, excess_error, recorded_outputs
from exitify.calibration.thresholds import NEVER, judge, optimise
from exitify.errors import PlanError
from exitify.heads import ExitHead, HeadWithScores, head_cost
from exitify.passes.cascade_exits import CascadeExits
from exitify.plan import FINAL, PATHS, ExitPoint, HeadSpec, Plan, boundary_macs
from exitify.program import Program
from exitify.runtime.session import Session
from exitify.train import heads as training
from exitify.train.heads import HeadTraining, train_heads
from tests import digits
from tests.helpers import captured, with_exits

PLACES = "stage1,stage2,stage3"
WIDTH, CLASSES = 6, 5


def spec(path: str) -> HeadSpec:
    return replace(HeadSpec("linear", "vector", (WIDTH,), 1, WIDTH, CLASSES), path=path)


def cascade(path: str, head: str = "conv16") -> Program:
    """The small network for digits with three exits, each reading the one before it; norms of fresh heads are not as they start."""
    torch.manual_seed(0)
    x = torch.zeros(1, *digits.loaded().contract.shape)
    program = exitify.transform(digits.network(), x, exits=PLACES, head=head, cascade=path)
    for module in program.exit_heads.modules():  # type: ignore[union-attr]
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return program.eval()


def artifact_of(program: Program) -> Artifact:
    return exitify.export(program, contract=digits.loaded().contract)


# --- what a head computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_head_uses_the_earlier_logits_as_its_path_says(path: str) -> None:
    torch.manual_seed(0)
    head = ExitHead(spec(path)).eval()
    z, previous = torch.randn(4, WIDTH), torch.randn(4, CLASSES) * 3
    weight, bias = head.classifier.weight, head.classifier.bias
    if path == "identity":
        expected = torch.cat((z, previous), 1) @ weight.T + bias
    elif path == "learned":
        linear, norm, _ = head.path.inside
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        inside = previous @ linear.weight.T + linear.bias
        inside = (inside - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        expected = torch.cat((z, inside.clamp(min=0)), 1) @ weight.T + bias
    elif path == "layer_norm":
        mean, variance = previous.mean(1, keepdim=True), previous.var(1, unbiased=False, keepdim=True)
        expected = torch.cat((z, (previous - mean) / (variance + 1e-5).sqrt()), 1) @ weight.T + bias
    else:
        if path == "ensemble":
            nn.init.constant_(head.path.factor, 0.7)
        expected = z @ weight.T + bias + previous * (0.7 if path == "ensemble" else 1.0)
    torch.testing.assert_close(head(z, previous), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_the_device_form_gives_the_same_logits_and_what_its_classifier_reads(path: str) -> None:
    head = ExitHead(spec(path)).eval()
    value, previous = torch.randn(3, WIDTH), torch.randn(3, CLASSES)
    logits, z, _ = HeadWithScores(head).eval()(value, previous)
    assert torch.equal(logits, head(value, previous))
    assert z.shape == (3, spec(path).features)
    added = previous if path in ("boosted", "ensemble") else torch.zeros(3, CLASSES)  # factors begin at 1
    torch.testing.assert_close(logits, head.classifier(z) + added)


@pytest.mark.parametrize("path", PATHS)
def test_losses_reach_the_earlier_head_through_the_learned_path_alone(path: str) -> None:
    head = ExitHead(spec(path)).train()
    previous = torch.randn(4, CLASSES, requires_grad=True)
    head(torch.randn(4, WIDTH), previous).square().sum().backward()
    assert (previous.grad is not None) == (path == "learned")
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_an_ensemble_is_the_weighted_geometric_mean_of_the_exits_probabilities() -> None:
    """Zero Time Waste, equation 4: p_k ~ b_k prod_j p_j^w_j; here in two steps, each with the factor of all before."""
    torch.manual_seed(0)
    heads = [ExitHead(spec("")), ExitHead(spec("ensemble")), ExitHead(spec("ensemble"))]
    for head, factor in zip(heads[1:], (0.6, 1.3)):
        nn.init.constant_(head.path.factor, factor)
    values = [torch.randn(4, WIDTH) for _ in heads]
    alone = [functional.softmax(head.classifier(value), 1) for head, value in zip(heads, values)]
    logits = heads[0](values[0])
    for head, value in zip(heads[1:], values[1:]):
        logits = head(value, logits)
    product = alone[0] ** (0.6 * 1.3) * alone[1] ** 1.3 * alone[2]
    torch.testing.assert_close(functional.softmax(logits, 1), product / product.sum(1, keepdim=True))


def test_a_head_costs_what_its_path_adds() -> None:
    plain = head_cost(spec("")).macs
    assert plain == WIDTH * CLASSES
    assert {path: head_cost(spec(path)).macs - plain for path in PATHS} == {
        "identity": CLASSES * CLASSES,
        "learned": CLASSES * WIDTH + WIDTH * CLASSES,
        "layer_norm": CLASSES * CLASSES,
        "boosted": 0,
        "ensemble": 0,
    }


# --- in a network -------------------------------------------------------------------------------------------------------


def test_the_plan_names_the_exit_that_each_head_reads() -> None:
    plan = cascade("identity").plan
    assert [(point.previous, point.head.path) for point in plan.exits] == [("", ""), ("exit1", "identity"), ("exit2", "identity")]
    assert plan.head(plan.exits[2]).inputs == (plan.exits[2].after, "exit2.logits")
    assert "with identity -> 10, reads exit1" in plan.text()


def test_reaching_an_exit_costs_all_heads_before_it() -> None:
    plan = cascade("identity").plan
    costs = {point.name: plan.head(point).cost.macs for point in plan.exits}
    alone, all_of_them = plan.macs_at(["exit3"]), plan.macs_at(["exit1", "exit2", "exit3"])
    assert alone["exit3"] == all_of_them["exit3"]
    plain = cascade("none").plan
    assert (
        plain.macs_at(["exit1", "exit2", "exit3"])["exit3"] - plain.macs_at(["exit3"])["exit3"]
        == costs["exit1"] + plain.head(plain.exits[1]).cost.macs
    )


@pytest.mark.parametrize("path", ["none", "identity"])
def test_a_search_pays_for_the_heads_that_a_run_passes_whether_they_are_on_or_off(path: str) -> None:
    plan = cascade(path).plan
    rng, names = np.random.default_rng(0), [point.name for point in plan.exits]
    outputs = Outputs(rng.standard_normal((4, 60, 10)).astype(np.float32), rng.integers(0, 10, 60))
    recorded = recorded_outputs(outputs, np.ones(4), plan, "top1", excess_error(outputs, np.ones(4)))
    boundaries = np.array([boundary_macs(plan.crossing_bytes(point)) for point in plan.exits])
    for on in itertools.product([False, True], repeat=3):
        cost = recorded.cost(np.where(on, 0.5, NEVER)) * plan.full_macs
        enabled = [name for name, is_on in zip(names, on) if is_on]
        passed = np.cumsum(np.where(on, boundaries, 0))
        for name, macs in plan.macs_at(enabled).items():
            k = plan.exit_names.index(name)
            assert cost[k] == pytest.approx(macs + passed[min(k, 2)])


def test_a_search_with_tied_heads_ends_where_no_single_threshold_is_better() -> None:
    plan = cascade("identity").plan
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4, 40, 10)) * np.array([1, 2, 3, 6])[:, None, None]
    labels = logits[-1].argmax(1)
    outputs = Outputs(logits.astype(np.float32), labels)
    recorded = recorded_outputs(outputs, np.ones(4), plan, "top1", excess_error(outputs, np.ones(4)))
    assert recorded.head_cost is not None
    price = 0.5
    found = optimise(recorded, price, np.full(3, NEVER))

    def objective(thresholds: np.ndarray) -> float:
        loss, cost = judge(recorded, thresholds)
        return cost + price * loss

    for k in range(3):
        for threshold in (NEVER, *recorded.confidence[k]):
            other = found.copy()
            other[k] = threshold
            assert objective(found) <= objective(other) + 1e-9


@pytest.mark.parametrize("path", ["identity", "learned"])
def test_a_static_network_that_stops_at_an_exit_holds_the_heads_before_it(path: str) -> None:
    import onnxruntime

    program = cascade(path)
    model = exitify.export_static(artifact_of(program), exit="exit3")
    x = digits.samples_of("test").inputs(slice(0, 3))
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {program.plan.input: x})
    with torch.no_grad():
        expected = program(torch.from_numpy(x), all_exits=True)["exit3"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_the_artifact_says_what_the_program_says_at_every_exit(path: str, tmp_path: Path) -> None:
    program = cascade(path)
    artifact = Artifact.open(artifact_of(program).save(tmp_path / "net.exitify"))
    x = digits.samples_of("test").inputs(slice(0, 7))
    with torch.no_grad():
        expected = program(torch.from_numpy(x), all_exits=True)
    found = Session(artifact).record(x)
    for name, logits in zip(expected.names, expected.logits):
        np.testing.assert_allclose(found.logits[name], logits.numpy(), rtol=1e-4, atol=1e-4)
    assert {name: array.shape for name, array in found.features.items()} == {p.name: (7, p.head.features) for p in artifact.plan.exits}


@pytest.mark.parametrize("path", ["identity", "learned", "ensemble"])
def test_an_exit_that_is_off_still_feeds_the_one_behind_it_alone_and_in_a_batch(path: str) -> None:
    program = cascade(path)
    artifact = artifact_of(program)
    x = digits.samples_of("test").inputs(slice(0, 40))
    sure = torch.from_numpy(Session(artifact).record(x).logits["exit2"] / 1.5).softmax(1).max(1).values
    off = ExitSetting(False, 0.0, 1.0)
    exits = {"exit1": off, "exit2": ExitSetting(True, float(sure.median()) + 1e-6, 1.5), "exit3": off}
    artifact = artifact.with_profile("default", replace(digits.profile(artifact, {}), exits=exits))
    session = Session(artifact)
    answers, batch = [session.run(one) for one in x], session.run_batch(x)
    assert {answer.exit for answer in answers} == {"exit2", FINAL}
    with torch.no_grad():
        expected = program(torch.from_numpy(x), all_exits=True)["exit2"].numpy()
    for one, other, logits in zip(answers, batch, expected):
        assert (one.exit, one.macs) == (other.exit, other.macs)
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-4)
        if one.exit == "exit2":
            np.testing.assert_allclose(one.logits, logits, rtol=1e-4, atol=1e-4)
            assert one.macs == artifact.plan.macs_at(["exit2"])["exit2"]


@pytest.mark.parametrize("path", PATHS)
def test_a_compiled_library_says_the_same(path: str) -> None:
    pytest.importorskip("tvm")
    from exitify.lower.pipeline import compile_artifact
    from exitify.targets import load_target

    artifact = compile_artifact(artifact_of(cascade(path, head="linear")), load_target("host"))
    x = digits.samples_of("test").inputs(slice(0, 4))
    found, expected = (Session(artifact, engine=engine).record(x) for engine in ("tvm", "onnxruntime"))
    for name in expected.logits:
        np.testing.assert_allclose(found.logits[name], expected.logits[name], rtol=1e-4, atol=1e-4)


def test_a_recipe_with_a_cascade_replays() -> None:
    from exitify.passes import make_pass

    program = cascade("learned")
    again = exitify.capture(digits.network(), torch.zeros(1, *digits.loaded().contract.shape))
    for text in program.recipe:
        again = make_pass(text)(again)
    assert again.plan == program.plan


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["identity", "learned", "boosted"])
def test_heads_of_a_cascade_train_from_the_artifact_alone(path: str, tmp_path: Path) -> None:
    artifact = exitify.export(cascade(path), contract=digits.loaded().contract, heads_trained=False)
    trained, reports = train_heads(artifact, digits.samples_of("train"), HeadTraining(epochs=6, copies=1, batch=50), work=tmp_path, threads=1)
    assert len({report.epoch for report in reports}) == 1  # a head is right for the earlier ones as they were in the same epoch
    assert reports[-1].accuracy > 0.8
    before, after = (Session(one).record(digits.samples_of("test").inputs(slice(0, 200))) for one in (artifact, trained))
    labels = digits.samples_of("test").labels[:200]
    accuracy = [(found.logits["exit3"].argmax(1) == labels).mean() for found in (before, after)]
    assert accuracy[1] > accuracy[0] + 0.5


@pytest.mark.parametrize("path", ["identity", "learned"])
def test_one_step_is_the_gradient_of_the_sum_of_all_losses(path: str, tmp_path: Path) -> None:
    """Stepped head by head or at once, the heads' gradients are those that autograd gives for the whole."""
    torch.manual_seed(0)
    heads = {"exit1": ExitHead(spec("")), "exit2": ExitHead(spec(path))}
    points = (ExitPoint("exit1", "a", "a", spec("")), ExitPoint("exit2", "b", "b", spec(path), "exit1"))
    side_by_side = training._Heads(Plan("x", "y", points), heads, dict.fromkeys(heads, torch.Size((WIDTH,))))
    options = HeadTraining(distillation=0.0, batch=8)
    values, targets = [torch.randn(8, WIDTH).half() for _ in heads], np.arange(8) % CLASSES

    class File:
        def chunks(self, generator):
            yield values, torch.zeros(8, CLASSES), np.arange(8)

    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    first = heads["exit1"].train()(values[0].float())
    second = heads["exit2"].train()(values[1].float(), first)
    y = torch.from_numpy(targets)
    expected = torch.autograd.grad(functional.cross_entropy(first, y) + functional.cross_entropy(second, y), parameters)
    optimizer = torch.optim.SGD(parameters, 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    training._train_epoch(side_by_side, File(), targets, optimizer, schedule, options, 0)  # type: ignore[arg-type]
    for start, parameter, gradient in zip(before, parameters, expected):
        torch.testing.assert_close(start - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_an_unknown_path_is_refused_with_those_there_are() -> None:
    with pytest.raises(PlanError, match="there is no path 'sideways'") as refused:
        CascadeExits("sideways").apply(captured("identity"))
    assert "identity, learned" in str(refused.value.hint)


def test_heads_that_are_in_place_cannot_be_tied() -> None:
    with pytest.raises(PlanError, match="heads are in place already"):
        CascadeExits()(with_exits(captured("identity"), "1"))


def test_a_plan_whose_head_reads_a_later_or_unknown_exit_is_refused() -> None:
    plan = cascade("identity").plan
    for wrong in ("exit3", "exit9", FINAL):
        bad = replace(plan, exits=(plan.exits[0], replace(plan.exits[1], previous=wrong), plan.exits[2]))
        with pytest.raises(PlanError):
            bad.check()
    bad = replace(plan, exits=(plan.exits[0], replace(plan.exits[1], previous=""), plan.exits[2]))
    with pytest.raises(PlanError, match="reads 'no exit' by the path 'identity'"):
        bad.check()


def test_a_device_does_not_learn_where_one_head_changes_what_another_reads() -> None:
    from exitify.adapt.learner import Learner
    from exitify.errors import StateError

    artifact = artifact_of(cascade("identity"))
    artifact = artifact.with_profile("default", digits.profile(artifact, {"exit1": 0.5, "exit2": 0.5, "exit3": 0.5}))
    with pytest.raises(StateError, match="exit2, exit3 read what earlier exits say"):
        Learner(artifact, "default")
