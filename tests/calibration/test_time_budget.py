"""Masks and thresholds within a time: what is measured, what is chosen, and what a masked profile promises."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest

from exitify.calibration import time_budget
from exitify.calibration.calibrate import calibrate, record_outputs, settle_max_drop
from exitify.calibration.thresholds import NEVER
from exitify.calibration.time_budget import Candidate, Jury, greedy_masks, most_accurate
from exitify.errors import CalibrationError, PlanError
from exitify.plan import FINAL, Plan, mask_text
from exitify.runtime.session import Session
from tests.skipping import MASKS, skipping, torch_says


@pytest.fixture
def clock(monkeypatch, artifact):
    """Time as multiply-adds: 10 ms the whole network, and an answer what its exits and mask leave of that."""

    def time_masks(session, masks, inputs, progress=None):
        plan = session.artifact.plan
        return {mask: 10.0 * plan.macs_at((), mask)[FINAL] / plan.full_macs for mask in masks}

    def time_choice(artifact, choice, *_):
        return choice.ms * slow[0]

    slow = [1.0]
    monkeypatch.setattr(time_budget, "time_masks", time_masks)
    monkeypatch.setattr(time_budget, "_time_choice", time_choice)
    return slow


def test_every_mask_is_measured(artifact, samples, clock):
    made = calibrate(artifact, samples, budget_ms=100.0)
    table = made.masks
    assert table is not None
    assert sorted(table.masks) == MASKS
    x = samples.inputs(np.arange(len(samples)))
    for mask, row in table.masks.items():
        said = torch_says(mask, x)[FINAL].argmax(axis=1)
        assert row.accuracy == pytest.approx((said == samples.labels).mean())
        assert row.disagreement == pytest.approx((said != torch_says("000", x)[FINAL].argmax(axis=1)).mean())
        assert row.ms == pytest.approx(10 * row.macs_share)
    assert table.masks["000"].disagreement == 0.0


def test_with_time_for_everything_nothing_is_lost(artifact, samples, clock):
    profile = calibrate(artifact, samples, budget_ms=100.0).profile("default")
    assert profile.promise.kept
    assert profile.promise.accuracy >= profile.promise.full_accuracy
    assert profile.promise.kind == "budget-ms"


def test_less_time_is_kept_by_leaving_out_and_stopping_early(artifact, samples, clock):
    plan = artifact.plan
    for budget in (9.0, 7.0, 5.0):
        profile = calibrate(artifact, samples, budget_ms=budget).profile("default")
        assert profile.promise.kept
        assert 0 < profile.promise.mean_ms <= budget
        assert profile.promise.mean_macs_share < 1
        assert plan.mask(profile.skip) is not None


def test_a_choice_that_is_slower_than_estimated_is_replaced(artifact, samples, clock):
    clock[0] = 1.3
    promise = calibrate(artifact, samples, budget_ms=9.0).profile("default").promise
    assert promise.kept
    assert promise.mean_ms <= 9.0


@pytest.mark.parametrize("factor", [1.6, 2.0])
def test_a_time_that_the_fastest_choice_keeps_is_kept_however_wrong_the_estimates(artifact, samples, clock, factor):
    clock[0] = factor
    plan = artifact.plan
    fastest = 10 * factor * plan.macs_at((), "111")[FINAL] / plan.full_macs
    promise = calibrate(artifact, samples, budget_ms=fastest * 1.05).profile("default").promise
    assert promise.kept
    assert promise.mean_ms <= fastest * 1.05


def test_what_exits_say_under_one_mask_is_dropped_before_the_next(artifact, samples, clock, monkeypatch):
    recorded: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def record(*given, **options):
        outputs = record_outputs(*given, **options)
        recorded.append(weakref.ref(outputs.logits))
        alive.append(sum(logits() is not None for logits in recorded))
        return outputs

    monkeypatch.setattr(time_budget, "record_outputs", record)
    calibrate(artifact, samples, budget_ms=100.0)
    assert len(alive) == len(MASKS)
    assert max(alive) == 1


def test_a_time_that_nothing_keeps_is_said(artifact, samples, clock):
    promise = calibrate(artifact, samples, budget_ms=0.01).profile("default").promise
    assert not promise.kept
    assert promise.mean_ms > 0.01


def test_a_given_mask_is_not_replaced(artifact, samples, clock):
    assert calibrate(artifact, samples, budget_ms=100.0, skip="011").profile("default").skip == "011"


def test_times_are_measured_on_this_machine(artifact, samples):
    made = calibrate(artifact, samples, budget_ms=1e4)
    assert made.masks is not None
    assert min(row.ms for row in made.masks.masks.values()) > 0
    session = Session(made)
    session.use(budget_ms=1e4)
    best = max(row.accuracy for row in made.masks.masks.values())
    assert made.masks.masks[session.mask].accuracy == best


def candidate(jury: Jury, mask: str, wrong: range, *, stops: bool = False, ms: float = 1.0) -> Candidate:
    """One that is wrong on these samples, all of class 0."""
    answers = np.isin(np.arange(len(jury.labels)), wrong).astype(np.int32)
    thresholds = np.array([0.9 if stops else NEVER])
    return Candidate(tuple(flag == "1" for flag in mask), 0, thresholds, answers, float(jury.loss(answers).mean()), ms)


def jury(samples: int = 400, belief: float = 0.5) -> Jury:
    """Labels all 0, and a belief in them."""
    return Jury(np.zeros(samples, np.int64), np.tile([belief, 1.0 - belief], (samples, 1)))


@pytest.mark.parametrize(("first", "second"), [(("00", True), ("01", False)), (("01", False), ("01", True)), (("00", False), ("10", True))])
def test_a_choice_with_more_rivals_has_to_be_better_by_more_than_its_standard_error(first, second):
    judges = jury()
    simple = candidate(judges, first[0], range(3), stops=first[1])
    by_luck, by_merit = (candidate(judges, second[0], wrong, stops=second[1]) for wrong in (range(3, 5), range(0)))
    assert by_luck.loss < simple.loss
    assert most_accurate([by_luck, simple], judges) is simple
    assert most_accurate([by_merit, simple], judges) is by_merit
    # Three wrong against two others: 1 ± 2.2 of 400; against none: 3 ± 1.7.


def test_within_a_kind_the_least_loss_is_chosen_and_of_equal_ones_the_fastest():
    judges = jury()
    rivals = [candidate(judges, "01", range(3)), candidate(judges, "10", range(2), ms=2.0), candidate(judges, "11", range(2), ms=1.5)]
    assert most_accurate(rivals, judges) is rivals[2]


def test_a_jury_counts_half_an_error_observed_and_half_expected():
    judges = jury(samples=2, belief=0.75)
    assert judges.loss(np.array([0, 1], np.int32)).tolist() == [0.125, 0.875]


def test_greedy_masks_go_from_nothing_to_everything():
    plan = Plan("x", "y", skips=skipping()[1].plan.skips, segments=skipping()[1].plan.segments)
    asked: list[str] = []

    def loss(mask):
        asked.append(mask_text(mask))
        return mask[0] * 5.0 + mask[1] * 1.0 + mask[2] * 3.0

    assert [mask_text(mask) for mask in greedy_masks(plan, loss)] == ["000", "010", "011", "111"]
    assert len(asked) == 6


def test_more_masks_than_can_be_measured_are_searched(artifact, samples, clock, monkeypatch):
    monkeypatch.setattr(time_budget, "MOST_MASKS", 4)
    table = calibrate(artifact, samples, budget_ms=100.0).masks
    assert table is not None
    assert [mask.count("1") for mask in table.masks] == [0, 1, 2, 3]
    for before, after in itertools.pairwise(table.masks) if hasattr(itertools, "pairwise") else zip([*table.masks], [*table.masks][1:]):
        assert all(a <= b for a, b in zip(before, after))


def test_a_masked_profile_is_held_against_the_whole_network(artifact, samples):
    outputs = record_outputs(artifact, samples, skip="111")
    whole = record_outputs(artifact, samples)
    np.testing.assert_array_equal(outputs.full, whole.full)
    settings = settle_max_drop(outputs, artifact.plan, 1.0)
    assert settings.promise.full_accuracy == pytest.approx((whole.full.argmax(1) == samples.labels).mean())
    assert settings.promise.mean_macs_share <= artifact.plan.macs_at((), "111")[FINAL] / artifact.plan.full_macs + 1e-9
    assert outputs.select(np.arange(5)).full.shape == (5, 7)


def test_a_mask_that_alone_breaks_the_promise_is_said_not_to_keep_it(artifact, samples):
    made = calibrate(artifact, samples, max_drop=0.0, skip="111")
    promise = made.profile("default").promise
    lost = promise.full_accuracy - promise.accuracy
    assert promise.kept == (lost <= 0)
    assert not promise.kept  # this network was never trained to leave anything out
    assert not calibrate(artifact, samples, risk=(0.05, 0.9), skip="111").profile("default").promise.kept


@pytest.mark.parametrize("promise", [{"max_drop": 0.0}, {"budget_macs": 1.0}, {"risk": (0.05, 0.9)}, {"budget_ms": 100.0}])
def test_where_no_exit_is_taken_the_note_says_that_the_mask_leaves_something_out(artifact, samples, clock, promise):
    for mask, said in (("111", "runs, without what the mask leaves out."), ("000", "the full network runs. ")):
        assert said in calibrate(artifact, samples, skip=mask, **promise).profile("default").promise.note
    bare = skipping(exits="none")[1]
    if "risk" not in promise:
        assert "exit" not in calibrate(bare, samples, skip="111", **promise).profile("default").promise.note


def test_an_artifact_without_exits_is_calibrated_for_a_mask_alone(samples):
    artifact = skipping(exits="none")[1]
    profile = calibrate(artifact, samples, max_drop=1.0, skip="010", name="fast").profile("fast")
    assert (profile.skip, profile.exits, profile.promise.kept) == ("010", {}, True)
    with pytest.raises(CalibrationError, match=r"has no exits to calibrate\n  hint: leave something out"):
        calibrate(artifact, samples, max_drop=0.01)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_time_is_refused(artifact, samples, budget):
    with pytest.raises(CalibrationError, match=r"is no time\n  hint: 12 is twelve milliseconds"):
        calibrate(artifact, samples, budget_ms=budget)


def test_a_mask_of_another_network_is_refused(artifact, samples):
    with pytest.raises(PlanError, match="is not one 0 or 1 for each of the 3 skip paths"):
        calibrate(artifact, samples, max_drop=0.1, skip="01")
