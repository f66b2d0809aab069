"""Losses of all exits: each against its definition in float64 without torch, where gradients go, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from exitify import losses
from exitify.errors import DataError, PlanError
from exitify.heads import ExitHead
from exitify.passes.choose_exits import ChooseExits
from exitify.plan import HeadSpec
from exitify.program import ExitOutputs
from tests.helpers import assert_close, captured, cuttable_places, images, with_exits
from tests.models import CLASSES

NAMES = ("exit1", "exit2", "final")
WIDTH = 6


def outputs_of(*logits: torch.Tensor) -> ExitOutputs:
    return ExitOutputs((*(f"exit{i + 1}" for i in range(len(logits) - 1)), "final"), logits)


def some(count: int = 7, exits: int = 3, dtype: torch.dtype = torch.float32) -> tuple[ExitOutputs, torch.Tensor]:
    """Logits that want gradients, of three exits, and labels."""
    logits = [(torch.randn(count, CLASSES, dtype=dtype) * 3).requires_grad_() for _ in range(exits)]
    return outputs_of(*logits), torch.randint(CLASSES, (count,))


def log_softmax(h: np.ndarray) -> np.ndarray:
    h = h - h.max(axis=-1, keepdims=True)
    return h - np.log(np.exp(h).sum(axis=-1, keepdims=True))


def numpy_of(logits: torch.Tensor) -> np.ndarray:
    return logits.detach().double().numpy()


def cross_entropy(logits: torch.Tensor | np.ndarray, y: torch.Tensor) -> float:
    h = numpy_of(logits) if isinstance(logits, torch.Tensor) else logits
    return float(-log_softmax(h)[np.arange(len(y)), y.numpy()].mean())


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    """KL(teacher || student) at a temperature, a mean over samples."""
    log_p, log_q = log_softmax(numpy_of(teacher) / temperature), log_softmax(numpy_of(student) / temperature)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def number(loss: torch.Tensor) -> float:
    assert loss.shape == ()
    return float(loss.detach())


def gradients(loss: torch.Tensor, outputs: ExitOutputs) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, outputs.logits, allow_unused=True))


# --- joint


def test_uniform_weights_are_the_plain_sum_of_cross_entropies():
    outputs, y = some()
    expected = sum(cross_entropy(logits, y) for logits in outputs.logits)
    assert number(losses.joint(outputs, y)) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(any))
def test_weights_in_order_or_by_name_weigh_each_exits_loss(weights):
    outputs, y = some()
    expected = sum(weight * cross_entropy(logits, y) for weight, logits in zip(weights, outputs.logits, strict=True))
    loss = losses.joint(outputs, y, weights=weights)
    assert number(loss) == pytest.approx(expected, rel=1e-5, abs=1e-30)
    named = dict(reversed(list(zip(NAMES, weights, strict=True))))
    assert torch.equal(losses.joint(outputs, y, weights=named), loss)


def test_an_exit_of_weight_0_is_left_out_whatever_its_loss():
    outputs, y = some()
    with torch.no_grad():
        outputs.logits[1][0] = torch.nan
    loss = losses.joint(outputs, y, weights=(1, 0, 2))
    assert torch.isfinite(loss)
    found = gradients(loss, outputs)
    assert [gradient is None for gradient in found] == [False, True, False]


def test_another_criterion_takes_the_place_of_the_cross_entropy():
    outputs, y = some()

    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=0.2)

    assert_close(losses.joint(outputs, y, criterion=smoothed), torch.stack([smoothed(logits, y) for logits in outputs.logits]).sum())


def test_logits_in_half_precision_count_as_float32():
    outputs, y = some(dtype=torch.bfloat16)
    loss = losses.joint(outputs, y)
    assert loss.dtype == torch.float32
    assert number(loss) == pytest.approx(sum(cross_entropy(logits, y) for logits in outputs.logits), rel=1e-6)


def test_the_losses_of_samples_average_to_those_of_exits():
    outputs, y = some()
    each = losses.per_sample(outputs, y)
    assert each.shape == (7, 3)
    assert each.mean(0).tolist() == pytest.approx([cross_entropy(logits, y) for logits in outputs.logits], rel=1e-5)
    assert number(each[4, 1]) == pytest.approx(cross_entropy(outputs.logits[1][4:5], y[4:5]), rel=1e-5)


def test_one_line_in_a_loop_trains_every_exit():
    program = with_exits(captured("identity"), "block1").train()
    x, y = images(8), torch.randint(CLASSES, (8,))
    before = losses.per_sample(program(x), y).mean(0)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        losses.joint(program(x), y).backward()
        optimizer.step()
    assert bool((losses.per_sample(program(x), y).mean(0) < before - 0.1).all())


# --- ramp


def three_exits(head: str = "linear"):
    places = cuttable_places("identity")
    return with_exits(captured("identity"), f"{places[3]},{places[9]}", head)


def costs_by_hand(program) -> list[float]:
    """Multiply-adds of trunk and heads up to each exit by those of all trunks."""
    total, found = 0, []
    for segment in program.plan.segments:
        total += segment.cost.macs
        if segment.kind == "head":
            found.append(total)
    full = sum(segment.cost.macs for segment in program.plan.segments if segment.kind != "head")
    return [reached / full for reached in found]


def test_a_ramp_goes_from_a_hundredth_to_each_exits_cost_in_a_straight_line():
    program = three_exits()
    costs = costs_by_hand(program)
    assert 0.01 < costs[0] < costs[1] < 1
    assert losses.ramp(program, 0) == (0.01, 0.01, 1.0)
    assert losses.ramp(program, 1) == pytest.approx((*costs, 1.0))
    assert losses.ramp(program, 0.25) == pytest.approx((*(0.75 * 0.01 + 0.25 * cost for cost in costs), 1.0))


@given(st.floats(0, 1))
def test_the_released_ramp_is_never_below_the_papers_and_reaches_the_cost_sooner(progress):
    program = three_exits()
    costs = costs_by_hand(program)
    released, paper = losses.ramp(program, progress, "released"), losses.ramp(program.plan, progress)
    assert released == pytest.approx((*(min(cost, 0.01 + progress * cost) for cost in costs), 1.0))
    assert all(ours <= theirs + 1e-12 for ours, theirs in zip(paper, released, strict=True))


def test_an_exit_that_costs_more_than_the_network_weighs_as_much_as_its_last():
    program = with_exits(captured("plain"), "body", "mlp9999")
    assert costs_by_hand(program)[0] > 1
    assert losses.ramp(program, 1) == (1.0, 1.0)


def test_a_ramp_gives_weights_for_joint():
    program = three_exits().train()
    y = torch.tensor([0, 1, 2])
    outputs = program(images(3))
    weights = losses.ramp(program, 0.5)
    expected = sum(weight * cross_entropy(logits, y) for weight, logits in zip(weights, outputs.logits, strict=True))
    assert number(losses.joint(outputs, y, weights=weights)) == pytest.approx(expected, rel=1e-5)


# --- one for all


@pytest.mark.parametrize("distillation", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "released"])
def test_one_for_all_is_equations_7_and_8(distillation, temperature, reduction):
    outputs, y = some()
    share = CLASSES if reduction == "released" else 1
    expected = cross_entropy(outputs.final, y)
    for logits in outputs.logits[:-1]:
        kl = divergence(outputs.final, logits, temperature) / share
        expected += (1 - distillation) * cross_entropy(logits, y) + distillation * temperature**2 * kl
    assert number(losses.one_for_all(outputs, y, distillation, temperature, reduction)) == pytest.approx(expected, rel=1e-5)


def test_the_released_reduction_is_torchs_mean_over_samples_and_classes():
    outputs, y = some()
    loss = losses.one_for_all(outputs, y, 1.0, 2.0, "released")
    p = (outputs.final.detach() / 2).softmax(1)
    means = [functional.kl_div((logits / 2).log_softmax(1), p, reduction="none").mean() for logits in outputs.logits[:-1]]
    assert_close(loss, functional.cross_entropy(outputs.final, y) + 4 * (means[0] + means[1]))


def test_without_distillation_one_for_all_is_joint():
    outputs, y = some()
    assert_close(losses.one_for_all(outputs, y, 0.0), losses.joint(outputs, y))


def test_the_script_of_the_paper_is_the_default():
    outputs, y = some()
    assert torch.equal(losses.one_for_all(outputs, y), losses.one_for_all(outputs, y, 0.1, 1.0, "batchmean"))


def test_the_teacher_learns_from_labels_alone():
    outputs, y = some()
    found = gradients(losses.one_for_all(outputs, y, 0.7, 2.0), outputs)
    assert_close(found[-1], torch.autograd.grad(functional.cross_entropy(outputs.final, y), outputs.final)[0])


def test_a_teacher_of_ones_own_is_held_fixed_and_taught_by_no_one():
    outputs, y = some()
    teacher = torch.randn(7, CLASSES, requires_grad=True)
    loss = losses.one_for_all(outputs, y, 1.0, teacher=teacher)
    expected = cross_entropy(outputs.final, y) + sum(divergence(teacher, logits, 1.0) for logits in outputs.logits[:-1])
    assert number(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.grad is None


def test_an_exit_that_says_what_its_teacher_says_has_no_divergence():
    outputs, y = some()
    same = outputs_of(outputs.final, outputs.final, outputs.final)
    assert number(losses.one_for_all(same, y, 1.0, 2.0)) == pytest.approx(cross_entropy(outputs.final, y), rel=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "released"])
def test_gradients_of_one_for_all_are_those_of_finite_differences(reduction):
    outputs, y = some(3, dtype=torch.float64)

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return losses.one_for_all(outputs_of(first, second, outputs.final), y, 0.4, 2.0, reduction)

    assert torch.autograd.gradcheck(loss, outputs.logits[:2])


# --- boosted


def heads_with(path: str) -> list[ExitHead]:
    """Two heads of the same weights whatever the path of the second."""
    torch.manual_seed(3)
    spec = HeadSpec("linear", "vector", (WIDTH,), 1, WIDTH, CLASSES)
    return [ExitHead(spec), ExitHead(dataclasses.replace(spec, path=path))]


def answers(heads: list[ExitHead], values: torch.Tensor, final: torch.Tensor, *, tied: bool) -> ExitOutputs:
    first = heads[0](values[0])
    second = heads[1](values[1], first) if tied else heads[1](values[1])
    return outputs_of(first, second, final)


def test_heads_that_add_learn_what_heads_learn_whose_sums_are_made_here():
    values, (rest, y) = torch.randn(2, 7, WIDTH), some()
    added, apart = heads_with("boosted"), heads_with("")
    first = losses.boosted(answers(added, values, rest.final, tied=True), y)
    second = losses.boosted(answers(apart, values, rest.final, tied=False), y, added=False)
    assert_close(first, second)
    for loss in (first, second):
        loss.backward(inputs=[parameter for head in (*added, *apart) for parameter in head.parameters()])
    for one, other in zip(added, apart, strict=True):
        assert_close(one.classifier.weight.grad, other.classifier.weight.grad)


@pytest.mark.parametrize("reweighting", [1.0, 0.5])
def test_sums_are_weighed_and_trained_as_in_the_papers_public_code(reweighting):
    outputs, y = some()
    ensemble, expected = np.zeros((7, CLASSES)), 0.0
    for logits in outputs.logits[:-1]:
        expected += cross_entropy(numpy_of(logits) + ensemble, y)
        ensemble = (numpy_of(logits) + ensemble) * reweighting
    loss = losses.boosted(outputs, y, added=False, reweighting=reweighting)
    assert number(loss) == pytest.approx(expected + cross_entropy(outputs.final, y), rel=1e-5)


def test_each_exit_is_moved_by_what_the_sum_so_far_leaves_of_the_labels():
    outputs, y = some()
    found = gradients(losses.boosted(outputs, y, added=False), outputs)
    labels = functional.one_hot(y, CLASSES)
    sums = [outputs.logits[0], outputs.logits[0] + outputs.logits[1], outputs.final]
    for gradient, total in zip(found, sums, strict=True):
        assert_close(gradient, (total.softmax(1) - labels) / 7)


# --- geometric ensembles


def ensemble_by_hand(logits: list[np.ndarray], weights: np.ndarray, bias: np.ndarray) -> list[np.ndarray]:
    """Probabilities, multiplied as they are."""
    p, found = [np.exp(log_softmax(h)) for h in logits], []
    for k in range(len(p)):
        product = np.exp(bias[k]) * np.prod([p[j] ** weights[k, j] for j in range(k + 1)], axis=0)
        found.append(product / product.sum(axis=1, keepdims=True))
    return found


def test_a_geometric_ensemble_multiplies_powers_of_probabilities():
    outputs, _ = some()
    weights, bias = torch.rand(3, 3) * 2, torch.randn(3, CLASSES)
    found = losses.geometric_ensemble(outputs.logits, weights, bias)
    expected = ensemble_by_hand([numpy_of(logits) for logits in outputs.logits], weights.numpy(), bias.numpy())
    for log_p, p in zip(found, expected, strict=True):
        np.testing.assert_allclose(log_p.detach().exp().numpy(), p, rtol=1e-4, atol=1e-6)


def test_probabilities_that_vanish_in_float32_still_multiply():
    far = torch.tensor([[0.0, -2000.0, -2000.0]]), torch.tensor([[-3000.0, 0.0, -4000.0]])
    _, together = losses.geometric_ensemble(far, torch.ones(2, 2), torch.zeros(2, 3))
    assert together.tolist() == [[-1000.0, 0.0, -4000.0]]  # logits -3000, -2000, -6000


@given(st.integers(1, 5), st.floats(0.1, 3))
def test_exits_that_agree_keep_their_answer_when_weights_sum_to_1(exits, sharpness):
    logits = torch.randn(4, CLASSES) * sharpness
    weights = torch.rand(exits, exits).tril() + 0.01 * torch.eye(exits)
    weights = weights / weights.sum(1, keepdim=True)
    for log_p in losses.geometric_ensemble([logits] * exits, weights, torch.zeros(exits, CLASSES)):
        assert_close(log_p, logits.log_softmax(1))


@pytest.mark.parametrize("recursive", [False, True])
def test_a_fresh_ensemble_is_the_geometric_mean_of_the_exits_so_far(recursive):
    outputs, _ = some(exits=4)
    together = losses.GeometricEnsemble(3, CLASSES, recursive=recursive)(outputs)
    log_p = [logits.log_softmax(1) for logits in outputs.logits]
    for k in range(3):
        assert_close(together.logits[k], (sum(log_p[: k + 1]) / (k + 1)).log_softmax(1))
    assert together.final is outputs.final
    assert together.names == outputs.names


@pytest.mark.parametrize("recursive", [False, True])
def test_weights_are_positive_and_look_back_alone(recursive):
    ensemble = losses.GeometricEnsemble(4, CLASSES, recursive=recursive)
    for parameter in ensemble.parameters():
        torch.nn.init.normal_(parameter, std=3)
    weights = ensemble.weights
    assert bool((weights[torch.ones(4, 4).tril().bool()] > 0).all())
    assert torch.equal(weights, weights.tril())
    if recursive:
        for k in range(1, 4):
            assert_close(weights[k, :k], ensemble.scales[k - 1] * weights[k - 1, :k])


@pytest.mark.parametrize("recursive", [False, True])
def test_the_ensembles_loss_trains_its_weights_and_biases_alone(recursive):
    outputs, y = some()
    ensemble = losses.GeometricEnsemble(3, CLASSES, recursive=recursive)
    loss = ensemble.loss(outputs, y)
    assert number(loss) == pytest.approx(sum(cross_entropy(log_p, y) for log_p in ensemble(outputs).logits), rel=1e-5)
    loss.backward()
    assert all(logits.grad is None for logits in outputs.logits)
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in ensemble.parameters())


@pytest.mark.parametrize("recursive", [False, True])
def test_gradients_of_an_ensemble_are_those_of_finite_differences(recursive):
    outputs, y = some(4, dtype=torch.float64)
    ensemble = losses.GeometricEnsemble(3, CLASSES, recursive=recursive).double()
    names = [name for name, _ in ensemble.named_parameters()]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        together = torch.func.functional_call(ensemble, dict(zip(names, values, strict=True)), (outputs_of(*(h.detach() for h in outputs.logits)),))
        return torch.stack([functional.nll_loss(log_p, y) for log_p in together.logits]).sum()

    start = [(parameter.detach() + 0.1 * torch.randn_like(parameter)).requires_grad_() for parameter in ensemble.parameters()]
    assert torch.autograd.gradcheck(loss, start)


def test_a_trained_ensemble_does_not_count_on_an_exit_that_guesses():
    y = torch.randint(CLASSES, (400,))
    knows = functional.one_hot(y, CLASSES) * 2.0 + torch.randn(400, CLASSES)
    guesses = torch.randn(400, CLASSES) * 3
    outputs, ensemble = outputs_of(guesses, knows, knows), losses.GeometricEnsemble(2, CLASSES)
    optimizer = torch.optim.Adam(ensemble.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        ensemble.loss(outputs, y).backward()
        optimizer.step()
    weights = ensemble.weights[1].tolist()
    assert weights[0] < 0.1 < 0.5 < weights[1]
    assert cross_entropy(ensemble(outputs).logits[1], y) < cross_entropy(knows, y) + 0.01


def test_a_recursive_ensemble_folds_into_heads_that_add():
    spec = HeadSpec("linear", "vector", (WIDTH,), 1, WIDTH, CLASSES)
    plain = [ExitHead(spec) for _ in range(3)]
    adding = [ExitHead(spec), *(ExitHead(dataclasses.replace(spec, path="ensemble")) for _ in range(2))]
    values, ensemble = torch.randn(3, 7, WIDTH), losses.GeometricEnsemble(3, CLASSES, recursive=True)
    for parameter in ensemble.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        logits = [head(value) for head, value in zip(plain, values, strict=True)]
        together = losses.geometric_ensemble(logits, ensemble.weights, ensemble.bias)
        previous = None
        for k, (head, own) in enumerate(zip(adding, plain, strict=True)):
            weight, bias = ensemble.weights[k, k], ensemble.bias[k]
            if k:
                bias = bias - ensemble.scales[k - 1] * ensemble.bias[k - 1]
                head.path.factor.copy_(ensemble.scales[k - 1])
            head.classifier.weight.copy_(weight * own.classifier.weight)
            head.classifier.bias.copy_(weight * own.classifier.bias + bias)
            previous = head(values[k], previous) if k else head(values[k])
            assert_close(previous.log_softmax(1), together[k])


# --- refusals

LOSSES: dict[str, Callable[[ExitOutputs, torch.Tensor], object]] = {
    "joint": losses.joint,
    "per_sample": losses.per_sample,
    "one_for_all": losses.one_for_all,
    "boosted": losses.boosted,
    "ensemble": lambda outputs, y: losses.GeometricEnsemble(2, CLASSES).loss(outputs, y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_labels_outside_the_classes_are_refused(name):
    outputs, y = some()
    for wrong in (CLASSES, -1):
        y[3] = wrong
        with pytest.raises(DataError, match=f"{wrong} is the label of a sample, and the network knows the classes 0 to 4"):
            LOSSES[name](outputs, y)


@pytest.mark.parametrize("name", LOSSES)
def test_one_exits_logits_are_refused_with_the_way_to_get_them_all(name):
    outputs, y = some()
    with pytest.raises(DataError, match=r"a loss of all exits was given a Tensor\n  hint: net.train\(\)"):
        LOSSES[name](outputs.final, y)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_another_batch_are_refused(name):
    outputs, y = some()
    with pytest.raises(DataError, match="6 labels do not fit 7 samples"):
        LOSSES[name](outputs, y[:6])


def test_samples_that_torch_leaves_out_and_soft_labels_are_no_mistake():
    outputs, y = some()
    soft = functional.one_hot(y, CLASSES).float() * 0.9 + 0.1 / CLASSES
    assert torch.isfinite(losses.joint(outputs, soft))
    left_out = y.clone()
    left_out[0] = -100
    assert_close(losses.joint(outputs, left_out), losses.joint(outputs_of(*(logits[1:] for logits in outputs.logits)), y[1:]))


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ("ramp", "there are no weights 'ramp'\n  hint: uniform"),
        ((1, 2), "2 weights do not fit 3 exits\n  hint: they are, in order, exit1, exit2, final"),
        ({"exit1": 1, "final": 1}, "weights are for exit1, final, and the exits are exit1, exit2, final"),
        ({}, "weights are for no exit"),
        ((1, -1, 1), "exit 'exit2' has the weight -1.0"),
        ((1, 1, float("nan")), "exit 'final' has the weight nan"),
        ((0, 0, 0), "every exit has the weight 0"),
    ],
)
def test_weights_that_do_not_fit_the_exits_are_refused(weights, problem):
    with pytest.raises(PlanError, match=problem):
        losses.joint(*some(), weights=weights)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"distillation": 1.1}, "a distillation weight of 1.1 is not in"),
        ({"distillation": float("nan")}, "a distillation weight of nan is not in"),
        ({"temperature": 0.0}, "a temperature of 0.0 is no positive number"),
        ({"temperature": float("inf")}, "a temperature of inf is no positive number"),
        ({"reduction": "mean"}, "there is no reduction 'mean'\n  hint: there are batchmean, released"),
    ],
)
def test_options_of_one_for_all_outside_their_range_are_refused(options, problem):
    with pytest.raises(PlanError, match=problem):
        losses.one_for_all(*some(), **options)


def test_a_teacher_of_other_classes_is_refused():
    outputs, y = some()
    with pytest.raises(DataError, match=r"the teacher's logits are \(7, 6\), and the network's \(7, 5\)"):
        losses.one_for_all(outputs, y, teacher=torch.zeros(7, 6))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"added": False, "reweighting": 0.0}, "a reweighting of 0.0 is not in"),
        ({"added": False, "reweighting": 1.5}, "a reweighting of 1.5 is not in"),
        ({"reweighting": 0.5}, "logits that were added up already cannot be weighed again"),
    ],
)
def test_a_reweighting_outside_its_range_or_of_sums_is_refused(options, problem):
    with pytest.raises(PlanError, match=problem):
        losses.boosted(*some(), **options)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((1.5,), "a progress of 1.5 is not in"),
        ((float("nan"),), "a progress of nan is not in"),
        ((0.5, "linear"), "there is no schedule 'linear'\n  hint: there are paper, released"),
    ],
)
def test_a_ramp_outside_its_range_is_refused(arguments, problem):
    with pytest.raises(PlanError, match=problem):
        losses.ramp(three_exits(), *arguments)


def test_a_ramp_needs_costs():
    with pytest.raises(PlanError, match="not known before the network is cut into segments\n  hint: apply the pass cut-segments"):
        losses.ramp(ChooseExits("block1")(captured("identity")), 0.5)
    with pytest.raises(PlanError, match="Linear has no plan to take costs from"):
        losses.ramp(torch.nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize(("exits", "classes"), [(0, 5), (3, 0)])
def test_an_ensemble_of_nothing_is_refused(exits, classes):
    with pytest.raises(PlanError, match=f"there is no ensemble of {exits} exits for {classes} classes"):
        losses.GeometricEnsemble(exits, classes)


@pytest.mark.parametrize(("exits", "classes"), [(4, CLASSES), (2, CLASSES + 1)])
def test_an_ensemble_for_another_network_is_refused(exits, classes):
    with pytest.raises(PlanError, match=f"an ensemble of {exits} exits and {classes} classes does not fit a network of 3 exits and 5 classes"):
        losses.GeometricEnsemble(exits, classes)(some()[0])
