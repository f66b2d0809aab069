"""The update against torch: its gradient, and streams of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from exitify.adapt.update import Classifier, Sgd, softmax, step, targets_of


def classifier(classes: int, width: int, seed: int = 0) -> Classifier:
    random = np.random.default_rng(seed)
    return Classifier((random.standard_normal((classes, width)) * 0.1).astype(np.float32), random.standard_normal(classes).astype(np.float32))


def logits_of(head: Classifier, features: np.ndarray) -> np.ndarray:
    return features @ head.weight.T + head.bias


@given(
    classes=st.integers(2, 130),
    width=st.integers(1, 40),
    batch=st.integers(1, 5),
    kind=st.sampled_from(["hard", "soft"]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_the_gradient_is_autograds(classes: int, width: int, batch: int, kind: str, scale: float) -> None:
    random = np.random.default_rng(classes * 1000 + width)
    head = classifier(classes, width)
    features = (random.standard_normal((batch, width)) * scale).astype(np.float32)
    targets = targets_of(random.standard_normal((batch, classes)) * 3, kind)  # type: ignore[arg-type]
    moved, _ = step(head, features, logits_of(head, features), targets, Sgd(1.0))
    weight, bias = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (head.weight, head.bias))
    said = torch.from_numpy(features).double() @ weight.T + bias
    functional.cross_entropy(said, torch.from_numpy(targets).double()).backward()
    for gradient, before, after in ((weight.grad, head.weight, moved.weight), (bias.grad, head.bias, moved.bias)):
        assert gradient is not None
        largest = max(1.0, float(gradient.abs().max()), float(np.abs(before).max()))
        np.testing.assert_allclose(before.astype(np.float64) - after, gradient.numpy(), rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("parts", ["both", "weight", "bias"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 8])
def test_a_stream_of_updates_is_torchs_sgd(parts: str, momentum: float, batch: int) -> None:
    random, head, sgd = np.random.default_rng(0), classifier(10, 64), Sgd(1e-2, momentum, parts)  # type: ignore[arg-type]
    linear = torch.nn.Linear(64, 10)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(head.weight))
        linear.bias.copy_(torch.from_numpy(head.bias))
    moving = {"both": [linear.weight, linear.bias], "weight": [linear.weight], "bias": [linear.bias]}[parts]
    optimizer = torch.optim.SGD(moving, lr=1e-2, momentum=momentum)
    velocity = None
    for _ in range(500):
        features = random.standard_normal((batch, 64)).astype(np.float32)
        targets = targets_of(random.standard_normal((batch, 10)), "hard")
        head, velocity = step(head, features, logits_of(head, features), targets, sgd, velocity)
        optimizer.zero_grad()
        functional.cross_entropy(linear(torch.from_numpy(features)), torch.from_numpy(targets)).backward()
        optimizer.step()
    np.testing.assert_allclose(head.weight, linear.weight.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(head.bias, linear.bias.detach().numpy(), rtol=0, atol=1e-5)


def test_a_step_leaves_the_classifier_that_it_starts_from() -> None:
    head, features = classifier(10, 64), np.ones((1, 64), np.float32)
    weight, bias = head.weight.copy(), head.bias.copy()
    moved, _ = step(head, features, logits_of(head, features), targets_of(np.eye(10)[3], "hard")[None], Sgd(0.1))
    assert np.array_equal(head.weight, weight)
    assert np.array_equal(head.bias, bias)
    assert not np.shares_memory(moved.weight, head.weight)


def test_a_step_makes_the_target_likelier() -> None:
    head, features = classifier(10, 64), np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    before = logits_of(head, features)
    moved, _ = step(head, features, before, targets_of(np.eye(10)[3], "hard")[None], Sgd(1e-2))
    assert softmax(logits_of(moved, features))[0, 3] > softmax(before)[0, 3]


def test_soft_targets_are_the_deeper_exits_probabilities_at_its_temperature() -> None:
    logits = np.array([2.0, 0.0, -1.0])
    powers = np.exp(logits / 2.5)
    np.testing.assert_allclose(targets_of(logits, "soft", 2.5), powers / powers.sum(), rtol=1e-6)
    assert targets_of(logits, "hard").tolist() == [1.0, 0.0, 0.0]


def test_logits_beyond_what_an_exponential_takes_give_probabilities() -> None:
    assert softmax(np.array([1e4, -1e4, 0.0])).tolist() == [1.0, 0.0, 0.0]


def test_the_distance_is_relative_to_where_it_started() -> None:
    head = classifier(10, 64)
    assert head.distance(head) == 0.0
    assert Classifier(head.weight * 1.1, head.bias * 1.1).distance(head) == pytest.approx(0.1, rel=1e-4)
    zero = Classifier(np.zeros((2, 2), np.float32), np.zeros(2, np.float32))
    assert (zero.distance(zero), head.distance(head)) == (0.0, 0.0)
    assert Classifier(zero.weight + 1, zero.bias).distance(zero) == float("inf")


@pytest.mark.parametrize("place", ["weight", "bias"])
def test_what_is_not_finite_is_seen(place: str) -> None:
    head = classifier(10, 64)
    assert head.is_finite
    getattr(head, place).flat[3] = np.nan
    assert not head.is_finite
