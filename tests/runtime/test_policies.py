"""Scores: against loops over one sample at a time, written from the definitions; and the same for many samples as for one."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exitify.artifact.manifest import Policy
from exitify.heads import ExitHead, HeadWithScores
from exitify.plan import SCORES, HeadSpec
from exitify.runtime.policies import (
    BEFORE,
    FEW,
    NEVER,
    History,
    from_logits,
    gate_openness,
    one_similarity,
    one_softmax,
    score,
    score_run,
    scorer,
    similarity,
    softmax,
)

POLICIES = get_args(Policy)
GATES = ((1.5, -0.4, 0.8, 0.3, -0.6), (-2.0, 0.7, 1.1, 0.2, 0.4), (0.3, 0.1, -0.9, 0.6, -1.2))


def logits_of(exits: int, samples: int, classes: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((exits, samples, classes)) * 2).astype(np.float32)


def run_of(logits: np.ndarray, policy: Policy) -> np.ndarray:
    """Scores `(K, N)` of logits `(K, N, classes)`."""
    return score_run(policy, from_logits(logits), logits.argmax(axis=2), GATES[: len(logits)])


# --- the four numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_scores_of_logits_are_those_of_a_heads_graph(classes, temperature):
    torch.manual_seed(0)
    head = HeadWithScores(ExitHead(HeadSpec("linear", "vector", (7,), 1, 7, classes))).double()
    head.temperature.fill_(temperature)
    with torch.no_grad():
        logits, _, scores = head(torch.randn(20, 7, dtype=torch.float64) * 5)
    np.testing.assert_allclose(from_logits(logits.numpy(), temperature), scores.numpy(), rtol=1e-9, atol=1e-12)


def test_scores_of_logits_are_closed_forms_where_there_are_any():
    """Uniform; certain; two equal; p = (2, 1, 1) / 4, whose squares are (4, 1, 1) / 6."""
    some = np.log([2.0, 1.0, 1.0])
    squares = np.array([4, 1, 1]) / 6
    rows = np.array([[0.0, 0.0, 0.0], [4e4, 0.0, 0.0], [1e3, 1e3, -1e5], some])
    expected = [
        [1 / 3, math.log(3), 0, math.log(3)],
        [1, 0, 1, 0],
        [1 / 2, math.log(2), 0, math.log(2)],
        [1 / 2, 1.5 * math.log(2), 1 / 4, -(squares * np.log(squares)).sum()],
    ]
    np.testing.assert_allclose(from_logits(rows), expected, rtol=1e-12, atol=1e-12)


def test_a_single_class_is_certain():
    assert from_logits(np.array([[3.0]])).tolist() == [[1, 0, 1, 0]]


def test_scores_of_logits_take_any_dimensions_before_the_classes():
    logits = logits_of(3, 4, 6)
    np.testing.assert_array_equal(from_logits(logits)[1, 2], from_logits(logits[1, 2]))
    assert from_logits(logits).shape == (3, 4, len(SCORES))


# --- policies -------------------------------------------------------------------------------------------------------


def test_a_policy_that_reads_one_number_reads_its_own_and_is_surer_when_it_is_higher():
    logits = logits_of(1, 50, 10)
    scores = from_logits(logits)[0]
    for policy, sign in (("top1", 1), ("margin", 1), ("entropy", -1), ("renyi_entropy", -1)):
        np.testing.assert_array_equal(run_of(logits, policy)[0], sign * scores[:, SCORES.index(policy)])


def test_with_two_classes_all_that_read_one_number_put_samples_in_one_order():
    logits = logits_of(1, 30, 2)
    orders = {policy: np.argsort(run_of(logits, policy)[0]).tolist() for policy in ("top1", "margin", "entropy", "renyi_entropy")}
    assert [order for order in orders.values() if order != orders["top1"]] == []


@given(arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(0, 2)))
def test_patience_counts_how_many_exits_in_a_row_agree_ending_here(labels):
    found = score_run("patience", np.zeros((*labels.shape, 4)), labels)
    for k, n in np.ndindex(*labels.shape):
        in_a_row = list(itertools.takewhile(lambda label, here=labels[k, n]: label == here, labels[k::-1, n]))
        assert found[k, n] == len(in_a_row)


@given(st.lists(st.tuples(*[st.floats(-4, 4)] * 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_gates_are_sigmoids_of_the_four_numbers(gates, seed):
    scores = from_logits(logits_of(len(gates), 3, 10, seed))
    found = score_run("gates", scores, np.zeros((len(gates), 3), int), gates)
    for k, n in np.ndindex(*found.shape):
        *weights, bias = gates[k]
        assert found[k, n] == pytest.approx(1 / (1 + math.exp(-(sum(w * s for w, s in zip(weights, scores[k, n])) + bias))), rel=1e-9)


def test_a_gate_of_any_finite_numbers_is_open_or_shut():
    scores = from_logits(logits_of(1, 4, 10))[0]
    assert gate_openness(scores, (1e299, 0, 0, 0, 0)).tolist() == [1] * 4
    assert gate_openness(scores, (0, 0, 0, 0, -1e299)).tolist() == [0] * 4


def leaving(gates: list[float]) -> list[float]:
    """P(E) at each exit, from JEI-DNN's definitions one after the other."""
    found: list[float] = []
    for index, g in enumerate(gates):
        p = max(0.0, min(g, 1 - sum(gates[:index])))
        comes_here = math.prod(1 - other for other in found)
        found.append(min(max(p / comes_here, 0.0), 1.0) if comes_here > 1e-9 else 0.0)
    return found


@given(st.lists(st.floats(1e-3, 0.999), min_size=1, max_size=8))
def test_jei_is_the_probability_of_leaving_here_of_what_comes_here(gates):
    sums = np.cumsum(gates)
    assume(np.abs(sums - 1).min() > 1e-6)  # there the definition divides 0 by 0
    found = score_run("jei", np.zeros((len(gates), 1, 4)), np.zeros((len(gates), 1), int), [(0, 0, 0, 0, math.log(g / (1 - g))) for g in gates])
    np.testing.assert_allclose(found[:, 0], leaving(gates), rtol=1e-6, atol=1e-9)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6))
def test_with_jei_the_shares_that_leave_and_the_share_that_stays_sum_to_one(gates):
    logits = [(0, 0, 0, 0, math.log(g / (1 - g))) for g in gates]
    left, shares = 1.0, []
    for (p,) in score_run("jei", np.zeros((len(gates), 1, 4)), np.zeros((len(gates), 1), int), logits):
        shares.append(left * p)
        left *= 1 - p
    assert sum(shares) + left == pytest.approx(1)
    np.testing.assert_allclose(shares, np.clip(np.minimum(gates, 1 - np.concatenate([[0], np.cumsum(gates)[:-1]])), 0, None), atol=1e-9)


def test_where_gates_have_added_up_to_one_everything_has_left():
    certain = (0, 0, 0, 0, 1e3)
    assert score_run("jei", np.zeros((3, 1, 4)), np.zeros((3, 1), int), [certain] * 3)[:, 0].tolist() == [1, 0, 0]


def test_without_a_stream_temporal_is_never_sure():
    assert run_of(logits_of(2, 3, 4), "temporal").tolist() == [[NEVER] * 3] * 2


# --- one sample and many --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([2, 10, 40]), st.integers(0, 10**6))
def test_one_sample_alone_is_as_sure_as_among_many(policy, exits, samples, classes, seed):
    logits = logits_of(exits, samples, classes, seed)
    together = run_of(logits, policy)
    alone = scorer(policy)
    for n in range(samples):
        state = BEFORE
        for k in range(exits):
            scores = from_logits(logits[k, n : n + 1])
            if alone is None:
                found = scores[0, SCORES.index(policy)]
            else:
                found, state = alone(scores, logits[k, n : n + 1], GATES[k], state)
            assert found == pytest.approx(together[k, n], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2), st.integers(0, 1000))
def test_a_history_of_some_rows_is_theirs(policy, keeps, seed):
    """Rows dropped between exits leave the scores of the others as they are."""
    logits = logits_of(3, 6, 3, seed)
    whole = run_of(logits, policy)
    rows, history = np.arange(6), None
    for k in range(3):
        scores = from_logits(logits[k, rows])
        found, history = score(policy, scores, logits[k, rows].argmax(axis=1), GATES[k], history)
        np.testing.assert_allclose(found, whole[k, rows])
        if k < 2:
            keep = np.array(keeps[k])[rows]
            rows, history = rows[keep], history.rows(keep)


def test_a_score_leaves_the_history_that_it_was_given_alone():
    logits = logits_of(1, 5, 4)[0]
    history = History.empty(5)
    for policy in POLICIES:
        score(policy, from_logits(logits), logits.argmax(axis=1), GATES[0], history)
        assert (history.labels.tolist(), history.agreed.tolist(), history.spent.tolist()) == ([-1] * 5, [0] * 5, [0] * 5)


# --- similarity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, FEW, FEW + 1, 500])
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 7.0]))
def test_similarity_is_what_two_distributions_have_in_common(classes, seed, temperature):
    one, other = logits_of(2, 1, classes, seed)[:, 0]
    p, q = softmax(one, temperature), softmax(other, temperature)
    assert similarity(p, q) == pytest.approx(sum(min(a, b) for a, b in zip(p, q)), abs=1e-12)
    assert 0 <= similarity(p, q) <= 1
    assert similarity(p, p) == 1
    alone = one_softmax(one, temperature), one_softmax(other, temperature)
    np.testing.assert_allclose(alone, [p, q], rtol=1e-12, atol=1e-15)
    assert one_similarity(*alone) == pytest.approx(similarity(p, q), abs=1e-12)
    assert one_similarity(alone[0], alone[0]) == 1


def test_distributions_with_nothing_in_common_have_similarity_zero():
    p = np.eye(40)
    assert similarity(p[0], p[1]) == one_similarity(p[0], p[1]) == one_similarity([1.0, 0.0], [0.0, 1.0]) == 0
