"""Heads: what they read, what they return, and the scores that policies read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from exitify.heads import ExitHead, HeadWithScores
from exitify.plan import SCORES, HeadSpec

SPECS = [
    HeadSpec("linear", "nchw", (6, 4, 4), 1, 6, 5),
    HeadSpec("linear", "tokens", (17, 6), 1, 6, 5),
    HeadSpec("linear", "vector", (6,), 1, 6, 5),
    HeadSpec("mlp", "nchw", (6, 4, 4), 1, 8, 5),
    HeadSpec("mlp", "tokens", (17, 6), 1, 8, 5),
    HeadSpec("mlp", "vector", (6,), 1, 8, 5),
    HeadSpec("conv", "nchw", (6, 16, 16), 2, 8, 5),
    HeadSpec("conv", "nchw", (6, 4, 4), 1, 8, 5),
    HeadSpec("conv", "nhwc", (8, 8, 6), 2, 8, 5),
    HeadSpec("deep", "nchw", (6, 16, 16), 2, 8, 5),
    HeadSpec("deep", "nhwc", (8, 8, 6), 1, 8, 5),
    HeadSpec("linear", "nhwc", (4, 4, 6), 1, 6, 5),
    HeadSpec("linear", "class_token", (17, 6), 1, 6, 5),
    HeadSpec("mlp", "nhwc", (4, 4, 6), 1, 8, 5),
    HeadSpec("own", "nchw", (6, 4, 4), 1, 8, 5, ("layer_norm:1e-06", "relu", "max", "linear:8", "gelu", "dropout:0.1")),
    HeadSpec("own", "class_token", (17, 6), 1, 6, 5, ("layer_norm:1e-06", "first")),
    HeadSpec("own", "nhwc", (4, 4, 6), 1, 6, 5, ("mean", "batch_norm:1e-05")),
]


def value(spec: HeadSpec, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, *spec.shape)


def scores_of(logits: np.ndarray) -> np.ndarray:
    """The definitions, in float64."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    q = p**2 / (p**2).sum(1, keepdims=True)
    two = np.sort(p, axis=1)[:, :-3:-1]
    return np.stack([two[:, 0], -(p * np.log(p)).sum(1), two[:, 0] - two[:, 1], -(q * np.log(q)).sum(1)], axis=1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind} {spec.layout} pool {spec.pool}")
def test_a_head_gives_logits_features_and_scores_of_the_shapes_its_spec_says(spec):
    head = ExitHead(spec).eval()
    x = value(spec)
    logits, z, scores = HeadWithScores(head).eval()(x)
    assert (logits.shape, z.shape, scores.shape) == ((3, spec.classes), (3, spec.width), (3, len(SCORES)))
    assert torch.equal(logits, head(x))
    assert torch.equal(logits, head.classifier(z))


def test_a_linear_head_is_a_mean_and_one_linear_layer():
    spec = SPECS[0]
    head = ExitHead(spec)
    x = value(spec)
    expected = x.mean((2, 3)) @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)  # one sum of 6 products, in another order


def test_scores_are_what_their_names_say():
    spec = HeadSpec("linear", "vector", (5,), 1, 5, 5)
    head = HeadWithScores(ExitHead(spec))
    x = value(spec, 50) * 8
    logits, _, scores = head(x)
    # float32 against float64; entropies near 0 are differences of numbers near 1, so the absolute part matters
    np.testing.assert_allclose(scores.detach(), scores_of(logits.detach().double().numpy()), rtol=1e-4, atol=1e-6)


def test_a_temperature_divides_the_logits_before_the_scores_and_leaves_the_logits():
    spec = HeadSpec("linear", "vector", (5,), 1, 5, 5)
    head = HeadWithScores(ExitHead(spec))
    x = value(spec, 20) * 8
    plain, _, _ = head(x)
    head.temperature.fill_(2.5)
    logits, _, scores = head(x)
    assert torch.equal(logits, plain)
    np.testing.assert_allclose(scores.detach(), scores_of(logits.detach().double().numpy() / 2.5), rtol=1e-4, atol=1e-6)


def test_of_equal_logits_the_scores_are_those_of_ignorance():
    head = HeadWithScores(ExitHead(HeadSpec("linear", "vector", (5,), 1, 5, 4)))
    nn.init.zeros_(head.classifier.weight)
    nn.init.constant_(head.classifier.bias, 3.0)
    _, _, scores = head(torch.randn(2, 5))
    torch.testing.assert_close(scores, torch.tensor([[0.25, math.log(4), 0.0, math.log(4)]] * 2))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_scores_of_very_sure_heads_are_finite(scale):
    head = HeadWithScores(ExitHead(HeadSpec("linear", "vector", (5,), 1, 5, 5)))
    _, _, scores = head(torch.randn(10, 5) * scale)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[:, 0], torch.ones(10), rtol=0, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind} {spec.layout} pool {spec.pool}")
def test_a_head_learns_from_a_value_that_is_overwritten_later(spec):
    head = ExitHead(spec).train()
    x = value(spec)
    loss = head(x).square().sum()
    x.relu_()  # as the next layer of the network may do
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_head_without_gradients_makes_no_copy_of_what_it_reads():
    head = ExitHead(SPECS[7]).eval()
    read = []
    head.pool.register_forward_hook(lambda module, args, result: read.append(args[0]))
    x = value(SPECS[7])
    with torch.no_grad():
        head(x)
    assert read[0] is x
