"""Weights of samples: their mean, the virtual step against a real one on a copy, the meta-gradient against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from exitify import losses
from exitify.errors import DataError, PlanError
from exitify.passes.equilibrate_gradients import EquilibrateGradients
from exitify.program import HEADS, Program
from exitify.train.sample_weights import SampleWeights, deal_out
from tests.helpers import assert_close, captured, cuttable_places, images, state, with_exits
from tests.models import CLASSES

Batch = tuple[torch.Tensor, torch.Tensor]


def network(name: str = "identity", exits: int = 2) -> Program:
    places = cuttable_places(name)
    return with_exits(captured(name), ",".join(places[(i + 1) * len(places) // (exits + 1)] for i in range(exits))).train()


def batch(count: int = 8) -> Batch:
    return images(count), torch.randint(CLASSES, (count,))


def in_double(**options: object) -> tuple[Program, SampleWeights, Batch, Batch]:
    """A tiny network in float64 without norms of batches, and two batches."""
    program = with_exits(captured("transformer"), "add_1,add_3").double().train()
    method = SampleWeights(program, hidden=4, **options)
    method.network.double()
    for parameter in method.network.parameters():
        nn.init.normal_(parameter)
    first, second = ((x.double(), y) for x, y in (batch(6), batch(7)))
    return program, method, first, second


def each(program: Program, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([functional.cross_entropy(logits, y, reduction="none") for logits in program(x).logits], 1)


def dealt_out(confidence: np.ndarray, shares: Sequence[float]) -> list[int]:
    """Exit by exit, one sample after the other."""
    exits, count = confidence.shape
    leaves = [exits - 1] * count
    left = list(range(count))
    for k in range(exits - 1):
        for _ in range(int(count * shares[k])):
            best = max(left, key=lambda n: (confidence[k, n], -n))
            leaves[best] = k
            left.remove(best)
    return leaves


def meta_loss_by_hand(program: Program, method: SampleWeights, first: Batch, second: Batch, *, step: float, moves: str = "") -> float:
    """A real step of SGD on a copy, and the other batch's samples looked at one by one."""
    copied = copy.deepcopy(program)
    each_loss = each(copied, *first)
    with torch.no_grad():
        said = torch.tanh(method.network(each_loss))
        weights = 1 + method.limit * (said - said.mean(0))
    optimizer = torch.optim.SGD([p for name, p in copied.named_parameters() if name.startswith(moves)], lr=step)
    (weights * each_loss).mean(0).sum().backward()
    optimizer.step()
    with torch.no_grad():
        outputs = copied(second[0])
    confidence = torch.stack([logits.softmax(1).max(1).values for logits in outputs.logits]).numpy()
    powers = [0.75**k for k in (1, 2, 3)]
    leaves = dealt_out(confidence, [power / sum(powers) for power in powers])
    total = 0.0
    for k, logits in enumerate(outputs.logits):
        own = [float(functional.cross_entropy(logits[n], second[1][n])) for n in range(len(leaves)) if leaves[n] == k]
        total += sum(own) / len(own) if own else 0.0
    return total


# --- the weights


@given(st.integers(1, 9), st.floats(0, 1), st.sampled_from(["exit", "batch"]), st.integers(0, 2**31))
def test_weights_have_mean_1_and_stay_within_twice_the_limit(count, limit, mean, seed):
    torch.manual_seed(seed)
    method = SampleWeights(PROGRAM, limit=limit, mean=mean)
    for parameter in method.network.parameters():
        nn.init.normal_(parameter)
    weights = method.weights(torch.rand(count, 3) * 5).detach()
    assert weights.shape == (count, 3)
    assert_close(weights.mean(0) if mean == "exit" else weights.mean(), torch.ones(3) if mean == "exit" else torch.ones(()))
    assert float((weights - 1).abs().max()) <= 2 * limit + 1e-6


PROGRAM = network()


def test_weights_look_at_all_exits_losses_and_pass_no_gradient_to_them():
    method = SampleWeights(network())
    each_loss = torch.rand(6, 3, requires_grad=True)
    weights = method.weights(each_loss)
    changed = each_loss.detach().clone()
    changed[2, 0] += 1
    assert not torch.allclose(method.weights(changed)[2, 2], weights[2, 2])
    weights.square().sum().backward()
    assert each_loss.grad is None


def test_the_loss_weighs_every_sample_at_every_exit():
    program = network()
    method, (x, y) = SampleWeights(program, every=10**6), batch()
    method.batches = 1  # the network learns in batch 0 alone
    loss = method(x, y)
    each_loss = losses.per_sample(program(x), y).detach()
    weights = method.weights(each_loss).detach()
    expected = sum(float((weights[:, k] * each_loss[:, k]).sum() / 8) for k in range(3))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_limit_of_zero_is_the_joint_loss_and_its_gradients():
    program = network()
    x, y = batch()
    method = SampleWeights(program, limit=0.0)
    before = state(method.network)
    program.zero_grad()
    loss = method(x, y)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in program.named_parameters()}
    program.zero_grad()
    joint = losses.joint(program(x), y)
    joint.backward()
    assert_close(loss, joint)
    for name, parameter in program.named_parameters():
        assert_close(got[name], parameter.grad)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.network.state_dict().items())


# --- how they are learnt


@given(
    st.integers(1, 4).flatmap(
        lambda exits: st.tuples(
            st.lists(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]), min_size=exits, max_size=exits), min_size=1, max_size=12),
            st.floats(0.05, 2),
        )
    )
)
def test_samples_are_dealt_out_as_one_by_one(drawn):
    rows, ratio = drawn
    confidence = np.array(rows).T
    powers = [ratio**k for k in range(1, len(confidence) + 1)]
    shares = [power / sum(powers) for power in powers]
    got = deal_out(torch.tensor(confidence), shares)
    assert got.tolist() == dealt_out(confidence, shares)
    counts = [int((got == k).sum()) for k in range(len(shares))]
    assert counts[:-1] == [int(len(rows) * share) for share in shares[:-1]]
    assert sum(counts) == len(rows)


def test_the_shares_grow_or_shrink_by_one_ratio():
    shares = SampleWeights(network(), ratio=0.5).shares
    assert shares.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_the_meta_loss_is_what_a_real_step_on_a_copy_comes_to():
    program, method, first, second = in_double(step=0.2)
    expected = meta_loss_by_hand(program, method, first, second, step=0.2)
    assert float(method.meta_loss(first, second).detach()) == pytest.approx(expected, rel=1e-9)


def test_the_meta_gradient_is_that_of_finite_differences_of_real_steps():
    program, method, first, second = in_double(step=0.5, limit=0.9)
    own = list(method.network.parameters())
    gradients = torch.autograd.grad(method.meta_loss(first, second), own)
    direction = [torch.randn_like(parameter) for parameter in own]
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, change in zip(own, direction, strict=True):
                parameter.add_(change, alpha=sign * 1e-5)
        found.append(meta_loss_by_hand(program, method, first, second, step=0.5))
        with torch.no_grad():
            for parameter, change in zip(own, direction, strict=True):
                parameter.sub_(change, alpha=sign * 1e-5)
    expected = (found[0] - found[1]) / 2e-5
    got = sum(float((gradient * change).sum()) for gradient, change in zip(gradients, direction, strict=True))
    assert abs(expected) > 1e-4
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_virtual_step_scales_gradients_as_the_real_one_does():
    program, method, first, second = in_double(step=0.3)
    plain = meta_loss_by_hand(program, method, first, second, step=0.3)
    method.program = EquilibrateGradients()(program)
    expected = meta_loss_by_hand(method.program, method, first, second, step=0.3)
    assert float(method.meta_loss(first, second).detach()) == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(plain, rel=1e-6)


def test_a_virtual_step_of_some_parameters_moves_those_alone():
    program, method, first, second = in_double(step=0.3)
    heads = [name for name, _ in program.named_parameters() if name.startswith(f"{HEADS}.")]
    method.parameters = heads
    expected = meta_loss_by_hand(program, method, first, second, step=0.3, moves=f"{HEADS}.")
    assert float(method.meta_loss(first, second).detach()) == pytest.approx(expected, rel=1e-9)
    everything = meta_loss_by_hand(program, method, first, second, step=0.3)
    assert everything != pytest.approx(expected, rel=1e-3)


def test_by_default_what_requires_gradients_is_moved():
    program, method, first, second = in_double(step=0.3)
    program.freeze_backbone()
    expected = meta_loss_by_hand(program, method, first, second, step=0.3, moves=f"{HEADS}.")
    assert float(method.meta_loss(first, second).detach()) == pytest.approx(expected, rel=1e-9)


def test_rates_are_those_that_an_optimizer_has_now():
    program, method, first, second = in_double()
    heads = [p for name, p in program.named_parameters() if name.startswith(f"{HEADS}.")]
    method.step = torch.optim.SGD([{"params": heads, "lr": 7.0}])
    method.step.param_groups[0]["lr"] = 0.3
    expected = meta_loss_by_hand(program, method, first, second, step=0.3, moves=f"{HEADS}.")
    assert float(method.meta_loss(first, second).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["identity", "in_place", "transformer", "dropout"])
def test_nothing_of_the_network_moves_while_weights_are_learnt(name):
    program = network(name)
    method, (x, y) = SampleWeights(program), batch()
    before, weights = state(program), state(method.network)
    method.learn((x[:4], y[:4]), (x[4:], y[4:]))
    assert all(torch.equal(before[key], tensor) for key, tensor in program.state_dict().items())  # norm statistics are in it
    assert all(parameter.grad is None for parameter in program.parameters())
    assert not all(torch.equal(weights[key], tensor) for key, tensor in method.network.state_dict().items())


def test_the_meta_loss_falls_as_weights_are_learnt():
    _, method, first, second = in_double(step=1.0, limit=1.0, learning_rate=0.01, weight_decay=0.0)
    start = float(method.meta_loss(first, second).detach())
    for _ in range(25):
        method.learn(first, second)
    assert float(method.meta_loss(first, second).detach()) < start - 0.01


def test_the_network_learns_every_so_many_batches_and_halves_take_turns(monkeypatch):
    method, seen = SampleWeights(network(), every=2), []
    monkeypatch.setattr(method, "learn", lambda first, second: seen.append((first, second)))
    x, y = batch(5)
    for _ in range(5):
        method(x, y)
    assert len(seen) == 3  # before batches 0, 2 and 4
    one, other = (x[:3], y[:3]), (x[3:], y[3:])
    for got, expected in zip(seen, [(one, other), (other, one), (one, other)], strict=True):
        for (inputs, labels), (expected_inputs, expected_labels) in zip(got, expected, strict=True):
            assert torch.equal(inputs, expected_inputs)
            assert torch.equal(labels, expected_labels)


def test_a_validation_loop_teaches_no_weights():
    method, (x, y) = SampleWeights(network()), batch()
    before = state(method.network)
    with torch.no_grad():
        method(x, y)
    assert method.batches == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in method.network.state_dict().items())


def test_one_line_in_a_loop_trains_network_and_weights():
    program = network()
    method, (x, y) = SampleWeights(program, step=0.05), batch()
    before, weights = losses.per_sample(program(x), y).mean(0), state(method.network)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.05)
    for _ in range(8):
        optimizer.zero_grad()
        method(x, y).backward()
        optimizer.step()
    assert bool((losses.per_sample(program(x), y).mean(0) < before - 0.05).all())
    assert not all(torch.equal(weights[key], tensor) for key, tensor in method.network.state_dict().items())


def test_what_was_saved_goes_on_where_it_was():
    program = network("plain")
    method, (x, y) = SampleWeights(program, every=2), batch()
    method(x, y)
    again = SampleWeights(program, every=2)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    for _ in range(2):
        assert torch.equal(method(x, y), again(x, y))
    assert again.batches == method.batches == 3


def test_a_wrapped_network_is_found():
    program = network()
    method, (x, y) = SampleWeights(nn.DataParallel(program), limit=0.0), batch()  # on a machine without GPUs it calls the module itself
    assert_close(method(x, y), losses.joint(program(x), y))


# --- refusals


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"limit": 1.5}, r"limit is 1.5\n  hint: it must be in \[0, 1\]"),
        ({"limit": float("nan")}, "limit is nan"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"every": 0}, "every is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"step": 0.0}, "step is 0.0\n  hint: it must be above 0, or an optimizer"),
        ({"mean": "sample"}, "there is no mean over each 'sample'\n  hint: there are exit, batch"),
        ({"parameters": ["fc.weights"]}, "the network has no parameter 'fc.weights' to move"),
    ],
)
def test_options_out_of_range_are_refused(options, problem):
    with pytest.raises(PlanError, match=problem):
        SampleWeights(network("plain", 1), **options)


def test_a_network_without_exits_is_refused():
    with pytest.raises(PlanError, match="the network has no early exits, so there is nothing to weigh between"):
        SampleWeights(captured("plain"))


def test_a_batch_without_two_halves_is_refused():
    with pytest.raises(DataError, match="a batch of 1 has no two halves"):
        SampleWeights(network())(*batch(1))


def test_labels_outside_the_classes_are_refused():
    x, y = batch()
    y[5] = CLASSES
    with pytest.raises(DataError, match="5 is the label of a sample"):
        SampleWeights(network())(x, y)


def test_a_network_that_is_frozen_altogether_is_refused():
    program = network().requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter requires gradients"):
        SampleWeights(program)(*batch())


# --- several processes


def one_of_two(rank: int, folder: str, program: Program, x: torch.Tensor, y: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)  # the first process's network is everybody's
        method = SampleWeights(program, hidden=5)
        start = state(method.network)
        half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
        own = x[half], y[half]
        alone = torch.autograd.grad(method.meta_loss(own, own), list(method.network.parameters()))
        method.optimizer = torch.optim.SGD(method.network.parameters(), lr=1.0)
        method.learn(own, own)
        torch.save((start, alone, state(method.network)), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_learn_one_network_from_the_mean_of_their_gradients(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), network("plain", 1), *batch()), nprocs=2)
    (start, alone, end), (other_start, other_alone, other_end) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, mine, others in zip(start, alone, other_alone, strict=True):
        assert torch.equal(start[name], other_start[name])
        assert torch.equal(end[name], other_end[name])
        assert_close(end[name], start[name] - (mine + others) / 2)
    assert not all(torch.allclose(mine, others) for mine, others in zip(alone, other_alone, strict=True))
