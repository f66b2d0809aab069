"""JEI-DNN: each equation against a second way to compute it, and a loop that trains what it should and nothing else."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from exitify.errors import DataError, PlanError
from exitify.heads import ExitHead, HeadWithScores
from exitify.plan import FINAL, SCORES, HeadSpec, Plan
from exitify.program import HEADS, ExitOutputs, Program
from exitify.runtime import policies
from exitify.train import jei_dnn
from exitify.train.jei_dnn import (
    MOST_WARMUP_EPOCHS,
    JeiDnn,
    best_exits,
    cross_entropies,
    exit_probabilities,
    fit_gates,
    gate_features,
    gate_loss,
    gate_operations,
    head_loss,
    positive_weights,
    relative_costs,
    stop_probabilities,
)
from tests.helpers import assert_close, captured, images, state, with_exits
from tests.models import CLASSES

NAMES = ("exit1", "exit2", FINAL)


def network(head: str = "linear") -> Program:
    """Three convolutions, with two early exits."""
    return with_exits(captured("plain"), "norm,body", head).freeze_backbone().train()


def method_for(source: nn.Module | Plan, **options: Any) -> JeiDnn:
    return JeiDnn(source, **{"cost_weight": 0.5, "warmup": 0, **options})


def a_batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return images(count), torch.randint(CLASSES, (count,))


def recorded(count: int = 8, names: tuple[str, ...] = NAMES) -> tuple[ExitOutputs, torch.Tensor]:
    """Logits as if from recorded features: leaves, so that gradients show."""
    logits = tuple((2 * torch.randn(count, CLASSES)).requires_grad_() for _ in names)
    return ExitOutputs(names, logits), torch.randint(CLASSES, (count,))


def gradients(loss: torch.Tensor, outputs: ExitOutputs) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, outputs.logits, allow_unused=True))


# --- what a gate reads


def test_a_gate_reads_what_the_device_computes_at_temperature_one():
    head = HeadWithScores(ExitHead(HeadSpec("linear", "vector", (7,), 1, 7, 10)))
    logits, _, scores = head(5 * torch.randn(64, 7))
    assert torch.equal(gate_features(logits), scores)


def test_a_gate_reads_positive_entropies_in_nats():
    logits = 3 * torch.randn(50, 6)
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    q = p**2 / (p**2).sum(axis=1, keepdims=True)
    ordered = np.sort(p, axis=1)
    by_name = {
        "top1": ordered[:, -1],
        "entropy": -(p * np.log(p)).sum(axis=1),
        "margin": ordered[:, -1] - ordered[:, -2],
        "renyi_entropy": -(q * np.log(q)).sum(axis=1),
    }
    expected = np.stack([by_name[name] for name in SCORES], axis=1)
    np.testing.assert_allclose(gate_features(logits).numpy(), expected, rtol=1e-5, atol=1e-6)  # float32's digits
    assert (expected[:, [1, 3]] > 0).all()


def test_no_gradient_goes_through_what_a_gate_reads():
    assert not gate_features(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_half_precision_is_read_as_float32():
    assert gate_features(torch.randn(3, 4).half()).dtype == torch.float32


# --- where a sample leaves

gates = st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.floats(0, 1), min_size=k, max_size=k), min_size=1, max_size=4))


@given(gates)
def test_exit_probabilities_are_a_distribution_and_those_of_equations_7_and_8(rows):
    g = torch.tensor(rows, dtype=torch.float64)
    got = exit_probabilities(g)
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(dim=1), torch.ones(len(g), dtype=torch.float64))
    for row, probabilities in zip(rows, got.tolist(), strict=True):
        expected = [max(0.0, min(value, 1 - sum(row[:j]))) for j, value in enumerate([*row, 1.0])]
        assert probabilities == pytest.approx(expected, abs=1e-12)


@given(gates)
def test_stop_probabilities_give_the_exit_probabilities_back_by_equation_4(rows):
    probabilities = exit_probabilities(torch.tensor(rows, dtype=torch.float64))
    stop = stop_probabilities(probabilities)
    assert ((stop >= 0) & (stop <= 1)).all()
    comes_by = torch.cat((torch.ones(len(stop), 1), (1 - stop).cumprod(dim=1)[:, :-1]), dim=1)
    torch.testing.assert_close(stop * comes_by, probabilities, rtol=0, atol=1e-9)


@given(gates)
def test_a_stop_probability_is_the_quotient_by_the_product_of_those_who_went_on(rows):
    probabilities = exit_probabilities(torch.tensor(rows, dtype=torch.float64))
    for row, got in zip(probabilities.tolist(), stop_probabilities(probabilities).tolist(), strict=True):
        comes_by = 1.0
        for p, stop in zip(row[:-1], got, strict=False):
            if comes_by < 1e-6:  # the quotient of two roundings says nothing
                break
            assert stop == pytest.approx(min(max(p / comes_by, 0), 1), abs=1e-6)
            comes_by *= 1 - stop
        assert got[-1] == 1


@given(gates)
def test_a_device_with_the_policy_jei_leaves_where_the_method_says(rows):
    g = np.clip(np.array(rows), 1e-6, 1 - 1e-6)
    stop = stop_probabilities(exit_probabilities(torch.tensor(g)))[:, :-1].numpy()
    scores = np.zeros((g.shape[1], len(g), 4))
    scores[:, :, 0] = np.log(g / (1 - g)).T  # a gate that reads its own answer
    device = policies.score_run("jei", scores, np.zeros(scores.shape[:2], int), [(1.0, 0.0, 0.0, 0.0, 0.0)] * g.shape[1])
    comes_by = np.cumprod(1 - stop, axis=1) > 1e-6
    certain = np.concatenate((np.ones((len(g), 1), bool), comes_by[:, :-1]), axis=1)
    np.testing.assert_allclose(device.T[certain], stop[certain], atol=1e-6)


@pytest.mark.parametrize("best", range(4))
def test_gates_that_meet_their_targets_send_every_sample_to_its_best_exit(best):
    """The proof of appendix 9.4, on a case each: g is 0 before the best exit and 1 from there on."""
    g = (torch.arange(3) >= best).float()[None]
    assert torch.equal(exit_probabilities(g), functional.one_hot(torch.tensor([best]), 4).float())
    stop = stop_probabilities(exit_probabilities(g))
    assert (stop >= 0.5).int().argmax(dim=1).item() == best
    assert torch.isfinite(stop).all()


def test_a_sample_leaves_at_the_first_exit_with_a_probability_of_half():
    method = method_for(network())
    outputs, _ = recorded(200)
    probabilities = method.probabilities(outputs).detach()
    chosen = method.chosen_exits(outputs)
    for row, got in zip(probabilities.tolist(), chosen.tolist(), strict=True):
        comes_by, expected = 1.0, len(row) - 1
        for exit_number, p in enumerate(row[:-1]):
            if p / comes_by >= 0.5:
                expected = exit_number
                break
            comes_by *= 1 - p / comes_by
        assert got == expected


def test_where_a_sample_leaves_depends_on_its_own_gates():
    method = method_for(network())
    outputs, _ = recorded(3)
    with torch.no_grad():
        for gate in method.gates.values():
            gate.weight.zero_()
        for first, second, expected in ((9.0, 0.0, 0), (-9.0, 9.0, 1), (-9.0, -9.0, 2)):
            method.gates["exit1"].bias.fill_(first)
            method.gates["exit2"].bias.fill_(second)
            assert method.chosen_exits(outputs).tolist() == [expected] * 3


# --- what gates learn


def test_the_best_exit_is_where_loss_and_weighted_cost_are_least():
    losses, costs = torch.rand(300, 4), torch.tensor([0.2, 0.5, 0.7, 1.0])
    got = best_exits(losses, costs, 0.8).tolist()
    expected = [min(range(4), key=lambda j: row[j] + 0.8 * costs[j].item()) for row in losses.tolist()]
    assert got == expected
    assert set(got) == {0, 1, 2, 3}


def test_without_a_weight_the_least_loss_is_best_and_with_a_great_one_the_first_exit():
    losses, costs = torch.rand(50, 3), torch.tensor([0.1, 0.4, 1.0])
    assert torch.equal(best_exits(losses, costs, 0.0), losses.argmin(dim=1))
    assert best_exits(losses, costs, 100.0).tolist() == [0] * 50


def test_of_two_best_exits_the_earlier_counts():
    assert best_exits(torch.tensor([[1.0, 0.5, 0.5]]), torch.ones(3), 1.0).item() == 1


def test_the_gates_loss_is_a_sum_over_gates_and_a_mean_over_samples():
    logits, best, weights = torch.randn(20, 3), torch.randint(4, (20,)), torch.tensor([0.5, 1.0, 5.0])
    expected = 0.0
    for row, l_star in zip(logits.tolist(), best.tolist(), strict=True):
        for j, (value, weight) in enumerate(zip(row, weights.tolist(), strict=True)):
            g = 1 / (1 + math.exp(-value))
            expected += -weight * math.log(g) if j >= l_star else -math.log(1 - g)
    assert gate_loss(logits, best, weights).item() == pytest.approx(expected / 20, rel=1e-5)


def test_positive_weights_are_negatives_by_positives_of_the_targets_within_a_fifth_and_five():
    best = torch.tensor([0] * 40 + [1] * 30 + [2] * 1 + [3] * 29)
    counts = torch.bincount(best, minlength=4)
    targets = torch.arange(3) >= best[:, None]
    expected = [(~targets[:, j]).sum().item() / targets[:, j].sum().item() for j in range(3)]
    assert positive_weights(counts, "cumulative").tolist() == pytest.approx(expected)
    assert positive_weights(counts, "released").tolist() == pytest.approx([60 / 40, 70 / 30, 5.0])
    assert positive_weights(counts, None).tolist() == [1, 1, 1]
    assert positive_weights(torch.tensor([0, 0, 9]), "cumulative").tolist() == [5.0, 5.0]


def test_a_gate_all_of_whose_samples_are_positive_learns_to_open_except_as_released():
    counts = torch.tensor([9, 0, 0])
    assert positive_weights(counts, "cumulative").tolist() == pytest.approx([0.2, 0.2])
    assert positive_weights(counts, "released").tolist() == [0.0, 5.0]


def test_reweighting_counts_validation_samples_over_all_batches():
    method = method_for(network(), cost_weight=1.0)
    assert method.positive_weights.tolist() == [1.0, 1.0]
    batches = [recorded(30), recorded(50)]
    method.reweight(batches)
    best = torch.cat([best_exits(cross_entropies(outputs.logits, y), method.costs, 1.0) for outputs, y in batches])
    at_most = [(best <= j).sum().item() for j in range(2)]
    assert method.positive_weights.tolist() == pytest.approx([min(max((80 - n) / n, 0.2), 5) for n in at_most])


def test_validation_runs_the_network_as_the_device_does_and_leaves_its_mode_and_norms_alone():
    program = network("conv")
    method, (x, y) = method_for(program), a_batch(40)
    before = state(program)
    method.reweight([(x, y)])
    weights, accuracies = method.positive_weights.clone(), method.accuracies([(x, y)])
    with torch.no_grad():
        outputs = copy.deepcopy(program).eval()(x, all_exits=True)
    method.reweight([(outputs, y)])
    assert torch.equal(method.positive_weights, weights)
    assert accuracies == {name: (outputs[name].argmax(1) == y).sum().item() / 40 for name in NAMES}
    assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in before.items())
    assert program.training
    assert program.get_submodule(HEADS).training


# --- what heads learn


def test_the_papers_loss_weighs_each_sample_by_where_it_leaves():
    losses, probabilities = torch.rand(9, 3), torch.rand(9, 3).softmax(dim=1)
    expected = np.mean([sum(p * loss for p, loss in zip(*rows, strict=True)) for rows in zip(probabilities.tolist(), losses.tolist(), strict=True)])
    assert head_loss(losses, probabilities).item() == pytest.approx(expected, rel=1e-6)


def test_the_papers_gradient_is_equation_14s_first_term_alone():
    """P (softmax - label) / N, worked out by hand: nothing of it comes through the gates."""
    method = method_for(network(), switch_every=1)
    outputs, y = recorded()
    method.loss(outputs, y)  # a batch for the gates
    assert method.phase == "heads"
    found = gradients(method.loss(outputs, y), outputs)
    probabilities = method.probabilities(outputs).detach()
    for j, logits in enumerate(outputs.logits):
        expected = probabilities[:, j : j + 1] * (logits.detach().softmax(1) - functional.one_hot(y, CLASSES)) / len(y)
        assert_close(found[j], expected)


def test_the_papers_gradient_is_that_of_a_loss_whose_probabilities_are_held_fixed():
    """Finite differences in float64."""
    logits = [torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True) for _ in NAMES]
    y = torch.randint(CLASSES, (4,))
    fixed = torch.softmax(torch.randn(4, 3, dtype=torch.float64), dim=1)

    def loss(*logits: torch.Tensor) -> torch.Tensor:
        each = torch.stack([functional.cross_entropy(value, y, reduction="none") for value in logits], dim=1)
        return head_loss(each, fixed)

    assert torch.autograd.gradcheck(loss, logits)


def probabilities_and_losses() -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = exit_probabilities(torch.rand(6, 3, dtype=torch.float64))
    return probabilities, (torch.rand(6, 4, dtype=torch.float64) + 0.1).requires_grad_()


def finite_differences(losses: torch.Tensor, probabilities: torch.Tensor, mode: jei_dnn.Mode) -> torch.Tensor:
    """Of the loss's value: gradients that were cut off count here."""
    found, step = torch.zeros_like(losses), 1e-6
    with torch.no_grad():
        for i, j in itertools.product(*map(range, losses.shape)):
            shift = torch.zeros_like(losses)
            shift[i, j] = step
            up, down = (head_loss(losses + sign * shift, probabilities, mode) for sign in (1, -1))
            found[i, j] = (up - down) / (2 * step)
    return found


def test_the_released_loss_is_the_unweighted_mean_whatever_the_gates_say():
    probabilities, losses = probabilities_and_losses()
    loss = head_loss(losses, probabilities, "released")
    assert loss.item() == pytest.approx(losses[:, :-1].mean().item(), rel=1e-12)
    (by_autograd,) = torch.autograd.grad(loss, losses)
    uniform = torch.full_like(losses, 1 / (6 * 3))
    uniform[:, -1] = 0
    torch.testing.assert_close(by_autograd, uniform)
    torch.testing.assert_close(finite_differences(losses, probabilities, "released"), uniform, rtol=1e-6, atol=1e-8)


def test_the_papers_and_the_normalised_loss_are_not():
    probabilities, losses = probabilities_and_losses()
    for mode in ("paper", "normalised"):
        (gradient,) = torch.autograd.grad(head_loss(losses, probabilities, mode), losses)
        assert gradient[:, :-1].std() > 0.01


def test_the_normalised_loss_has_the_released_ones_value_and_the_papers_direction_for_each_sample():
    probabilities, losses = probabilities_and_losses()
    loss = head_loss(losses, probabilities, "normalised")
    assert loss.item() == pytest.approx(head_loss(losses, probabilities, "released").item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, losses)
    early, values = probabilities[:, :-1], losses.detach()[:, :-1]
    scale = values.sum(dim=1, keepdim=True) / (early * values).sum(dim=1, keepdim=True)
    torch.testing.assert_close(gradient[:, :-1], early * scale / (6 * 3))


@pytest.mark.parametrize("mode", ["normalised", "released"])
def test_a_sample_that_leaves_at_no_early_exit_breaks_no_loss(mode):
    losses = torch.rand(2, 3, requires_grad=True)
    loss = head_loss(losses, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), mode)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, losses)[0]).all()


def test_the_mode_is_the_papers_unless_another_is_asked_for():
    outputs, y = recorded()
    program = network()
    gates = state(method_for(program).gates)
    found = {}
    for mode in (None, "paper", "normalised", "released"):
        method = method_for(program, **({} if mode is None else {"mode": mode}))
        method.gates.load_state_dict(gates)
        method._batches = method.switch_every
        found[mode] = method.loss(outputs, y).item()
        losses = cross_entropies(outputs.logits, y)
        assert found[mode] == head_loss(losses, method.probabilities(outputs), mode or "paper").item()
    assert found[None] == found["paper"] != found["released"]


# --- the warm-up


def test_the_warm_up_weighs_earlier_heads_more_and_the_last_not_at_all():
    """Eq. 17: of K = 2 early exits the first counts twice."""
    method = method_for(network(), warmup=1)
    outputs, y = recorded()
    loss = method.loss(outputs, y)
    first, second, _ = (functional.cross_entropy(logits, y) for logits in outputs.logits)
    assert loss.item() == pytest.approx((2 * first + second).item(), rel=1e-6)
    found = gradients(loss, outputs)
    assert_close(found[0], 2 * torch.autograd.grad(first, outputs.logits[0])[0])
    assert_close(found[1], torch.autograd.grad(second, outputs.logits[1])[0])
    assert found[2] is None


HISTORIES = {
    # exit: accuracies given, epochs until it rests, epoch whose weights are best
    "exit1": ([0.5, 0.6, 0.6, 0.55, 0.99], 4, 2),
    "exit2": ([0.1, 0.2, 0.3, 0.4, 0.2, 0.3], 6, 4),
}


def dynamic(head: str = "linear") -> tuple[Program, JeiDnn]:
    program = network(head)
    return program, method_for(program, warmup="dynamic")


def mark(program: Program, epoch: int) -> None:
    """What an epoch of training would do: the heads' numbers are those of this epoch."""
    with torch.no_grad():
        for parameter in program.get_submodule(HEADS).parameters():
            if parameter.requires_grad:
                parameter.fill_(epoch)


def epoch_of(program: Program, name: str) -> float:
    return program.get_submodule(f"{HEADS}.{name}").classifier.bias[0].item()


def is_at_rest(program: Program, name: str) -> bool:
    return not any(parameter.requires_grad for parameter in program.get_submodule(f"{HEADS}.{name}").parameters())


def test_a_head_rests_with_its_best_weights_once_it_has_not_grown_better_for_two_epochs():
    program, method = dynamic()
    for epoch in range(1, 7):
        mark(program, epoch)
        method.end_warmup_epoch({name: history[epoch - 1] if epoch <= len(history) else 0.0 for name, (history, _, _) in HISTORIES.items()})
        if epoch < 6:
            assert method.phase == "warmup"
            for name, (_, until, best) in HISTORIES.items():
                assert is_at_rest(program, name) == (epoch >= until)
                assert epoch_of(program, name) == (best if epoch >= until else epoch)
    assert method.phase == "gates"
    for name, (_, _, best) in HISTORIES.items():
        assert epoch_of(program, name) == best
        assert not is_at_rest(program, name)


def test_a_head_that_rests_is_out_of_the_loss_and_no_step_moves_it():
    program, method = dynamic()
    optimizer = torch.optim.SGD(program.get_submodule(HEADS).parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    x, y = a_batch()
    for accuracy in (0.9, 0.8, 0.7):
        optimizer.zero_grad()
        method(x, y).backward()
        optimizer.step()
        method.end_warmup_epoch({"exit1": accuracy, "exit2": 1 - accuracy})
    before = state(program)
    optimizer.zero_grad(set_to_none=False)
    loss = method(x, y)
    assert torch.equal(loss, functional.cross_entropy(program(x)["exit2"], y))
    loss.backward()
    optimizer.step()
    moved = {name for name, tensor in program.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{HEADS}.exit2.classifier.weight", f"{HEADS}.exit2.classifier.bias"}


def test_a_resting_heads_norm_statistics_are_its_best_ones_when_the_warm_up_ends():
    program, method = dynamic("conv")
    norms = {name: tensor for name, tensor in program.state_dict().items() if name.startswith(f"{HEADS}.exit1") and "running" in name}
    x, y = a_batch()
    method(x, y)
    best = {name: tensor.clone() for name, tensor in norms.items()}
    for epoch in range(MOST_WARMUP_EPOCHS):
        method.end_warmup_epoch({"exit1": 0.5 if epoch == 0 else 0.1, "exit2": 0.1 * epoch})
        if epoch < MOST_WARMUP_EPOCHS - 1:
            method(x, y)
            assert not all(torch.equal(program.state_dict()[name], tensor) for name, tensor in best.items())
    assert method.phase == "gates"
    assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in best.items())


def test_a_dynamic_warm_up_is_over_when_all_heads_rest_and_after_six_epochs_at_most():
    program, method = dynamic()
    epochs = 0
    while method.phase == "warmup":
        method.end_warmup_epoch(dict.fromkeys(method.gates, 0.5))
        epochs += 1
    assert epochs == 3
    program, method = dynamic()
    epochs = 0
    while method.phase == "warmup":
        epochs += 1
        mark(program, epochs)
        method.end_warmup_epoch(dict.fromkeys(method.gates, 0.1 * epochs))
    assert epochs == MOST_WARMUP_EPOCHS == 6
    assert {epoch_of(program, name) for name in method.gates} == {6}


def test_what_the_user_froze_in_a_head_stays_frozen():
    program, method = dynamic()
    frozen = program.get_submodule(f"{HEADS}.exit1").classifier.bias.requires_grad_(False)
    while method.phase == "warmup":
        method.end_warmup_epoch(dict.fromkeys(method.gates, 0.5))
    assert not frozen.requires_grad
    assert program.get_submodule(f"{HEADS}.exit1").classifier.weight.requires_grad


def test_heads_may_come_beside_a_plan():
    program = network()
    heads = {name: program.get_submodule(f"{HEADS}.{name}") for name in NAMES[:-1]}
    method = method_for(program.plan, warmup="dynamic", heads=heads)
    for epoch in range(1, 4):
        mark(program, epoch)
        method.end_warmup_epoch(dict.fromkeys(heads, 1 / epoch))
    assert method.phase == "gates"
    assert {epoch_of(program, name) for name in heads} == {1}


# --- phases


def phases(method: JeiDnn, batches: int, outputs: ExitOutputs, y: torch.Tensor) -> str:
    found = ""
    for _ in range(batches):
        found += method.phase[0]
        method.loss(outputs, y)
    return found


def test_after_the_warm_up_gates_and_heads_are_trained_in_turn_across_epochs():
    method = method_for(network(), warmup=2, switch_every=3)
    assert phases(method, 16, *recorded()) == "ww" + "ggg" + "hhh" + "ggg" + "hhh" + "gg"


def test_a_new_epoch_begins_with_the_gates_where_one_asks_for_it():
    method = method_for(network(), warmup=3, switch_every=2)
    found = ""
    for _ in range(3):
        method.new_epoch()
        found += phases(method, 5, *recorded())
    assert found == "wwwgg" + "gghhg" + "gghhg"


def test_the_switch_comes_after_200_batches_by_default():
    method = method_for(network())
    assert phases(method, 402, *recorded(1)) == "g" * 200 + "h" * 200 + "gg"


def test_validation_moves_no_phase():
    method = method_for(network(), switch_every=1)
    outputs, y = recorded()
    with torch.no_grad():
        method.loss(outputs, y)
    method.eval()
    method.loss(outputs, y)
    method.train()
    method.reweight([(outputs, y)])
    method.accuracies([(outputs, y)])
    assert method.phase == "gates"


def test_an_interrupted_training_goes_on_where_it_stopped():
    outputs, y = recorded()
    method = method_for(network(), warmup=2, switch_every=3)
    phases(method, 7, outputs, y)
    method.reweight([(outputs, y)])
    other = method_for(network(), warmup=2, switch_every=3)
    other.load_state_dict(method.state_dict())
    assert phases(other, 9, outputs, y) == phases(method, 9, outputs, y) == "hggghhhgg"
    assert other.gate_settings() == method.gate_settings()
    assert torch.equal(other.positive_weights, method.positive_weights)


def test_an_interrupted_dynamic_warm_up_goes_on_too(tmp_path):
    program, method = dynamic()
    for epoch in range(1, 5):
        mark(program, epoch)
        method.end_warmup_epoch({name: history[epoch - 1] for name, (history, _, _) in HISTORIES.items()})
    torch.save({"program": program.state_dict(), "method": method.state_dict()}, tmp_path / "checkpoint.pt")
    program, method = dynamic()
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    program.load_state_dict(kept["program"])
    method.load_state_dict(kept["method"])
    assert is_at_rest(program, "exit1")
    assert not is_at_rest(program, "exit2")
    for epoch in (5, 6):
        mark(program, epoch)
        method.end_warmup_epoch({"exit1": 0.99, "exit2": HISTORIES["exit2"][0][epoch - 1]})
    assert method.phase == "gates"
    assert [epoch_of(program, name) for name in HISTORIES] == [best for _, _, best in HISTORIES.values()]
    assert not is_at_rest(program, "exit1")


# --- in a training loop


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)]
)
def test_a_batch_moves_heads_or_gates_and_the_other_half_rests(make):
    program = network()
    method = method_for(program, warmup=1, switch_every=1)
    optimizer = make([*(p for p in program.parameters() if p.requires_grad), *method.parameters()])
    x, y = a_batch()
    for expected in ("warmup", "gates", "heads", "gates", "heads"):
        before = {**state(program), **state(method.gates)}
        assert method.phase == expected
        optimizer.zero_grad()
        method(x, y).backward()
        optimizer.step()
        after = {**program.state_dict(), **method.gates.state_dict()}
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        trained = method.gates if expected == "gates" else program.get_submodule(HEADS)
        prefix = "" if expected == "gates" else f"{HEADS}."
        assert moved == {f"{prefix}{name}" for name, _ in trained.named_parameters()}


def test_gates_are_trained_on_what_the_device_will_show_them():
    """In eval(): a head's norm takes its statistics, which rest, and the mode comes back."""
    program = network("conv")
    method, (x, y) = method_for(program), a_batch()
    before = state(program)
    loss = method(x, y)
    with torch.no_grad():
        outputs = copy.deepcopy(program).eval()(x, all_exits=True)
    other = method_for(program)
    other.gates.load_state_dict(method.gates.state_dict())
    assert torch.equal(other.loss(outputs, y), loss)
    assert all(torch.equal(program.state_dict()[name], tensor) for name, tensor in before.items())
    assert program.get_submodule(HEADS).training


def test_recorded_logits_train_as_the_network_does():
    program = network()
    x, y = a_batch()
    whole, alone = method_for(program, warmup=1, switch_every=1), method_for(program.plan, warmup=1, switch_every=1)
    alone.gates.load_state_dict(whole.gates.state_dict())
    for _ in range(3):
        assert torch.equal(whole(x, y), alone.loss(program(x), y))


def test_a_wrapped_network_is_trained_too():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any, **named: Any) -> Any:
            return self.module(*inputs, **named)

    program = network()
    x, y = a_batch()
    plain, wrapped = method_for(program, warmup=1), method_for(Wrapper(program), warmup=1)
    assert torch.equal(plain(x, y), wrapped(x, y))


def test_the_methods_parameters_are_the_gates_alone():
    method = method_for(network())
    assert list(method.gates) == ["exit1", "exit2"]
    assert [tuple(parameter.shape) for parameter in method.parameters()] == [(1, 4), (1,)] * 2


def test_a_gates_five_numbers_compute_what_the_gate_does():
    method = method_for(network())
    outputs, _ = recorded(20)
    for name, five in method.gate_settings().items():
        scores = gate_features(outputs[name]).numpy()
        expected = torch.sigmoid(method.gates[name](gate_features(outputs[name])))[:, 0]
        np.testing.assert_allclose(policies.gate_openness(scores, five), expected.detach().numpy(), rtol=1e-6)


def test_training_lowers_the_papers_objective_and_a_dearer_cost_leaves_earlier():
    """Heads of which the first knows half of the samples and the second all; a minute of cost decides."""
    y = torch.arange(400) % CLASSES
    known = functional.one_hot(y, CLASSES).float()
    easy = (torch.arange(400) < 200).float()[:, None]
    outputs = ExitOutputs(NAMES, (6 * easy * known + 0.1 * torch.randn(400, CLASSES), 6 * known, 7 * known))
    costs = {"exit1": 0.2, "exit2": 0.6, FINAL: 1.0}
    losses = cross_entropies(outputs.logits, y)
    mean_cost = {}
    for weight in (0.01, 1.0, 10.0):
        method = method_for(network().plan, cost_weight=weight, costs=costs, switch_every=1000)
        optimizer = torch.optim.Adam(method.parameters(), 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            method.loss(outputs, y).backward()
            optimizer.step()
        chosen = method.chosen_exits(outputs)
        objective = losses.gather(1, chosen[:, None])[:, 0] + weight * method.costs[chosen]
        best = (losses + weight * method.costs).min(dim=1).values
        assert objective.mean().item() == pytest.approx(best.mean().item(), rel=0.02)  # certainty tells the two kinds apart
        mean_cost[weight] = method.costs[chosen].mean().item()
    assert mean_cost[0.01] > mean_cost[1.0] > mean_cost[10.0] == pytest.approx(0.2)


# --- costs


@pytest.mark.parametrize(("classes", "operations"), [(10, 96), (100, 906)])
def test_a_gate_costs_what_tables_2_and_3_say(classes, operations):
    assert gate_operations(classes) == operations == 9 * classes + 6


def test_an_exits_cost_is_equation_18s():
    plan = network().plan
    segments = {segment.name: segment.cost.macs for segment in plan.segments}
    gate = 9 * CLASSES + 6
    first = segments["trunk_exit1"] + segments["head_exit1"] + gate
    second = first + segments["trunk_exit2"] + segments["head_exit2"] + gate
    last = second + segments["trunk_final"]
    assert relative_costs(plan) == pytest.approx({"exit1": first / last, "exit2": second / last, FINAL: 1.0})
    method = method_for(plan)
    assert method.costs.tolist() == pytest.approx([first / last, second / last, 1.0])


def test_measured_costs_may_take_their_place_in_any_unit():
    method = method_for(network(), costs={"exit1": 3.0, "exit2": 6.0, FINAL: 12.0})
    assert method.costs.tolist() == [0.25, 0.5, 1.0]


# --- gates alone


def a_recording(samples: int = 500, exits: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Heads that know more the later they stand, and samples of all degrees of difficulty."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    ease = random.uniform(0, 4, size=samples)
    logits = random.normal(size=(exits, samples, CLASSES))
    for k in range(exits):
        logits[k, np.arange(samples), labels] += ease * (k + 1) / 2
    return logits, labels, [(k + 1) / exits for k in range(exits)]


def newton(features: np.ndarray, targets: np.ndarray, weight: float, decay: float) -> np.ndarray:
    """The minimum of a weighted logistic regression with a ridge, by Newton's method in float64."""
    x = np.concatenate((features, np.ones((len(features), 1))), axis=1)
    theta, weights = np.zeros(5), np.where(targets, weight, 1.0)
    for _ in range(100):
        g = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (weights * (g - targets)) / len(x) + decay * theta
        hessian = (x * (weights * g * (1 - g))[:, None]).T @ x / len(x) + decay * np.eye(5)
        theta = theta - np.linalg.solve(hessian, gradient)
    return theta


@pytest.mark.parametrize("class_weights", ["cumulative", "released", None])
def test_fitted_gates_are_newtons(class_weights):
    logits, labels, costs = a_recording()
    fitted = fit_gates(logits, labels, costs, 0.7, class_weights=class_weights, weight_decay=1e-3)
    log_p = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    losses = -log_p[:, np.arange(len(labels)), labels]
    best = (losses + 0.7 * np.array(costs)[:, None]).argmin(axis=0)
    for j, five in enumerate(fitted):
        positives = {"cumulative": (best <= j).sum(), "released": (best == j).sum(), None: len(best) / 2}[class_weights]
        weight = min((len(best) - positives) / max(positives, 0.1), 5.0)
        features = policies.from_logits(logits[j])
        expected = newton(features, best <= j, weight, 1e-3)
        # float32 features, four of them all but the same direction: compare what the gates say
        assert policies.gate_openness(features, five) == pytest.approx(1 / (1 + np.exp(-features @ expected[:4] - expected[4])), abs=1e-4)


def test_fitted_gates_are_the_same_every_time_and_five_floats_each():
    logits, labels, costs = a_recording()
    first, second = (fit_gates(logits, labels, costs, 0.7) for _ in range(2))
    assert first == second
    assert [len(five) for five in first] == [5, 5]
    assert all(isinstance(value, float) for five in first for value in five)


def test_gates_fitted_on_some_samples_stop_others_better_than_any_one_exit_does():
    """On the paper's own objective, λ = 1."""
    logits, labels, costs = a_recording(2000)
    gates = fit_gates(logits, labels, costs, 1.0, class_weights=None)
    logits, labels, _ = a_recording(2000, seed=1)
    scores = policies.from_logits(logits)
    stop = policies.score_run("jei", scores[:-1], logits[:-1].argmax(axis=2), gates)
    chosen = np.concatenate((stop >= 0.5, np.ones((1, len(labels)), bool))).argmax(axis=0)
    log_p = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    objective = -log_p[:, np.arange(len(labels)), labels] + np.array(costs)[:, None]
    assert objective[chosen, np.arange(len(labels))].mean() < objective.mean(axis=1).min()
    assert len(set(chosen)) > 1


def test_temperatures_divide_the_logits_that_gates_are_fitted_on():
    logits, labels, costs = a_recording()
    scales = [2.0, 0.5, 3.0]
    divided = np.stack([value / scale for value, scale in zip(logits, scales, strict=True)])
    got = np.array(fit_gates(logits, labels, costs, 0.7, temperatures=scales))
    np.testing.assert_allclose(got, fit_gates(divided, labels, costs, 0.7), rtol=1e-3, atol=1e-3)
    assert not np.allclose(got, fit_gates(logits, labels, costs, 0.7), rtol=0.1)


def test_costs_may_be_in_any_unit():
    logits, labels, costs = a_recording()
    assert fit_gates(logits, labels, [1000 * cost for cost in costs], 0.7) == fit_gates(logits, labels, costs, 0.7)


@pytest.mark.parametrize(("weight", "is_open"), [(0.0, False), (1000.0, True)])
def test_a_gate_whose_samples_all_stop_or_none_stays_finite(weight, is_open):
    logits, labels, costs = a_recording()
    logits[-1, np.arange(len(labels)), labels] += 100  # without a price, the last exit is always best
    for j, five in enumerate(fit_gates(logits, labels, costs, weight)):
        assert np.isfinite(five).all()
        assert ((policies.gate_openness(policies.from_logits(logits[j]), five) > 0.5) == is_open).all()


# --- refusals


def without_exits() -> Program:
    return with_exits(captured("plain"), "none")


def test_a_network_without_exits_has_no_gates_to_learn():
    with pytest.raises(PlanError, match="no early exits to learn gates for"):
        method_for(without_exits())


def test_a_plan_without_segments_has_no_costs():
    plan = network().plan
    bare = Plan(plan.input, plan.output, plan.exits, values=plan.values)
    with pytest.raises(PlanError, match="does not say what its exits cost"):
        method_for(bare)
    assert method_for(bare, costs=dict.fromkeys(NAMES, 1.0)).costs.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mode": "both"}, "no mode 'both'"),
        ({"class_weights": "balanced"}, "no way to weigh classes 'balanced'"),
        ({"cost_weight": -0.1}, "a cost cannot weigh -0.1"),
        ({"cost_weight": math.nan}, "a cost cannot weigh nan"),
        ({"warmup": -1}, "a warm-up of -1"),
        ({"warmup": "long"}, "a warm-up of 'long'"),
        ({"switch_every": 0}, "change places every 0 batches"),
        ({"costs": {"exit1": 1.0}}, "the costs exit1 1.0 are not"),
        ({"costs": {"exit1": 0.0, "exit2": 1.0, FINAL: 2.0}}, "exit1 0.0"),
        ({"costs": {"exit1": math.inf, "exit2": 1.0, FINAL: 2.0}}, "exit1 inf"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options, problem):
    with pytest.raises(PlanError, match=problem):
        method_for(network(), **options)


def test_a_dynamic_warm_up_needs_the_heads():
    plan = network().plan
    with pytest.raises(PlanError, match="some are missing"):
        method_for(plan, warmup="dynamic")
    with pytest.raises(PlanError, match="some are missing"):
        method_for(plan, warmup="dynamic", heads={"exit1": nn.Linear(1, 1)})


def test_a_plan_alone_runs_nothing():
    x, y = a_batch()
    for warmup in (0, 1):
        with pytest.raises(PlanError, match="a plan alone cannot run"):
            method_for(network().plan, warmup=warmup)(x, y)


def test_outputs_of_other_exits_are_refused():
    method = method_for(network())
    outputs, y = recorded(names=("exit1", FINAL))
    for use in (
        lambda: method.loss(outputs, y),
        lambda: method.reweight([(outputs, y)]),
        lambda: method.accuracies([(outputs, y)]),
        lambda: method.chosen_exits(outputs),
    ):
        with pytest.raises(PlanError, match="the outputs are of exit1, final"):
            use()
    assert method._batches == 0


def test_validation_without_samples_is_refused():
    method = method_for(network())
    nothing: Iterable[Any] = []
    for use in (method.reweight, method.accuracies):
        with pytest.raises(DataError, match="no validation samples"):
            use(nothing)


def test_an_epochs_end_is_refused_where_no_dynamic_warm_up_is_going_on():
    for options in ({"warmup": 5}, {"warmup": 0}):
        with pytest.raises(PlanError, match="no dynamic warm-up going on"):
            method_for(network(), **options).end_warmup_epoch({"exit1": 0.5, "exit2": 0.5})


@pytest.mark.parametrize("accuracies", [{"exit1": 0.5}, {"exit1": 0.5, "exit2": math.nan}, {"exit1": 0.5, "exit2": 50.0}])
def test_an_accuracy_that_is_missing_or_none_is_refused(accuracies):
    _, method = dynamic()
    with pytest.raises(DataError, match="the accuracy of exit2 is"):
        method.end_warmup_epoch(accuracies)


LOGITS, LABELS, COSTS = a_recording(20)


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"logits": LOGITS[0]}, DataError, r"shape \(20, 5\)"),
        ({"logits": LOGITS[:1]}, DataError, r"shape \(1, 20, 5\)"),
        ({"logits": np.where(LOGITS > 1, np.inf, LOGITS)}, DataError, "not all finite"),
        ({"labels": LABELS[:-1]}, DataError, r"int64 \(19,\)"),
        ({"labels": LABELS + 1}, DataError, "not a class of 5"),
        ({"labels": LABELS.astype(float)}, DataError, "float64"),
        ({"costs": COSTS[:-1]}, PlanError, "2 costs are given for 3 exits"),
        ({"costs": [0.0, 1.0, 2.0]}, PlanError, "not one number over 0"),
        ({"cost_weight": -1.0}, PlanError, "a cost cannot weigh -1.0"),
        ({"class_weights": "other"}, PlanError, "no way to weigh classes"),
        ({"temperatures": [1.0, 1.0]}, PlanError, "the temperatures"),
        ({"temperatures": [1.0, 0.0, 1.0]}, PlanError, "the temperatures"),
        ({"weight_decay": 0.0}, PlanError, "a weight decay of 0.0"),
    ],
)
def test_recorded_outputs_that_do_not_fit_are_refused(change, error, problem):
    given = {"logits": LOGITS, "labels": np.minimum(LABELS, 3) + 1, "costs": COSTS, "cost_weight": 1.0, **change}
    if "labels" in change and "not a class" in problem:
        given["labels"] = np.full(20, 5)
    with pytest.raises(error, match=problem):
        fit_gates(**given)
