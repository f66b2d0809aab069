"""Promises: kept on the population that the samples were drawn from, and refused or called broken where they cannot be."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from exitify.artifact.manifest import ExitSetting, Policy
from exitify.artifact.memory import MEMORY_FILE
from exitify.calibration import calibrate as calibration
from exitify.calibration.bounds import BOUNDS, Bound, mean_bound, samples_needed
from exitify.calibration.calibrate import (
    Outputs,
    Settings,
    calibrate,
    cross_fit,
    excess_error,
    looks_memorised,
    record_outputs,
    recorded_outputs,
    settle_budget,
    settle_max_drop,
    settle_risk,
)
from exitify.calibration.exit_search import Limit, least_costs, lower_bound
from exitify.calibration.risk import RISKS
from exitify.calibration.temperature import calibration_errors
from exitify.calibration.thresholds import NEVER, judge
from exitify.errors import CalibrationError, ExitifyError
from exitify.plan import FINAL
from exitify.runtime.answers import Recording
from exitify.runtime.session import Session
from tests import digits
from tests.calibration.simulated import PLAN, disagreement, drop, mean_macs, plan, population, taken

EVERYONE = 20_000
"""Samples of the population; drawing 500 of them without putting back hardly changes it."""


@pytest.fixture(scope="module")
def everyone() -> Outputs:
    return population(0, EVERYONE)


def draw(everyone: Outputs, seed: int, samples: int) -> Outputs:
    return everyone.select(np.random.default_rng(seed).choice(len(everyone.labels), samples, replace=False))


def test_the_simulated_exits_are_worse_than_the_network(everyone: Outputs) -> None:
    accuracy = (everyone.logits.argmax(axis=2) == everyone.labels).mean(axis=1)
    assert 0.5 < accuracy[0] < accuracy[1] - 0.1 < accuracy[2] - 0.2


# --- max-drop

DRAWS = 100


@pytest.fixture(scope="module")
def settled(everyone: Outputs) -> list[Settings]:
    """What 100 samples of 250 each led to, for a drop of at most a point."""
    return [settle_max_drop(draw(everyone, seed, 250), PLAN, 0.01, seed=seed) for seed in range(DRAWS)]


def test_the_drop_on_the_population_is_in_the_mean_not_above_the_limit(everyone: Outputs, settled: list[Settings]) -> None:
    drops = np.array([drop(everyone, settings) for settings in settled])
    noise = drops.std(ddof=1) / math.sqrt(DRAWS)  # about 0.1 points
    assert drops.mean() <= 0.01 + 2 * noise
    assert drops.max() > 0.01  # a single sample of 250 cannot know better: the promise is one of expectation


def test_the_drop_that_a_profile_names_is_within_its_limit(settled: list[Settings]) -> None:
    promises = [settings.promise for settings in settled]
    assert all(promise.kept and promise.kind == "max-drop" and promise.limit == 0.01 and promise.samples == 250 for promise in promises)
    assert max(promise.full_accuracy - promise.accuracy for promise in promises) <= 0.01 + 1e-12


def test_what_a_profile_names_is_in_the_mean_what_the_population_shows(everyone: Outputs, settled: list[Settings]) -> None:
    shown = np.array([[disagreement(everyone, s), mean_macs(everyone, s)] for s in settled[:30]])
    named = np.array([[s.promise.disagreement, s.promise.mean_macs_share] for s in settled[:30]])
    gap = named - shown
    assert np.all(abs(gap.mean(axis=0)) <= 0.02)  # measured on held-out parts: no flattery beyond a point or two


def test_early_exits_make_the_network_cheaper(everyone: Outputs, settled: list[Settings]) -> None:
    assert np.mean([mean_macs(everyone, settings) for settings in settled[:30]]) < 0.9


def test_a_limit_of_nothing_is_kept_by_no_exit_at_all_where_each_seems_to_cost_something(everyone: Outputs) -> None:
    """On 60 samples errors held out are a matter of luck: some draws end with exits, some without."""
    settled = [settle_max_drop(draw(everyone, seed, 60), PLAN, 0.0, seed=seed) for seed in range(20)]
    nothing_on = [not (settings.thresholds < NEVER).any() for settings in settled]
    assert set(nothing_on) == {False, True}
    for settings, nothing in zip(settled, nothing_on, strict=True):
        promise = settings.promise
        assert promise.kept
        assert promise.accuracy >= promise.full_accuracy
        assert ((promise.mean_macs_share, promise.disagreement) == (1.0, 0.0)) == nothing
        assert promise.note.startswith("No exit pays") == nothing


def test_a_larger_limit_is_never_dearer(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 500)
    costs = [settle_max_drop(outputs, PLAN, limit).promise.mean_macs_share for limit in (0.0, 0.005, 0.02, 0.1, 1.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.3 < costs[0]


def test_the_margin_is_a_policy_too(everyone: Outputs) -> None:
    settings = settle_max_drop(draw(everyone, 0, 500), PLAN, 0.02, policy="margin")
    assert (settings.thresholds < NEVER).any()
    top1 = settle_max_drop(draw(everyone, 0, 500), PLAN, 0.02)
    assert not np.array_equal(settings.thresholds, top1.thresholds)
    assert mean_macs(everyone, settings, PLAN) < 1.0


def test_the_same_seed_gives_the_same_settings(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 300)
    first, second = (settle_max_drop(outputs, PLAN, 0.01, seed=3) for _ in range(2))
    assert first.thresholds.tolist() == second.thresholds.tolist()
    assert first.promise == second.promise


@pytest.mark.parametrize("settle", [lambda o, p: settle_max_drop(o, p, 0.0), lambda o, p: settle_risk(o, p, 0.05, 0.95)], ids=["max-drop", "risk"])
def test_where_no_exit_pays_none_is_on_and_the_note_says_so(settle: object) -> None:
    """Exits that guess."""
    settings = settle(population(1, 600, skills=(0.0, 0.0, 6.0)), PLAN)  # type: ignore[operator]
    assert settings.thresholds.tolist() == [NEVER, NEVER]
    assert settings.promise.kept
    assert settings.promise.note.startswith("No exit pays within this promise: the full network runs.")
    assert settings.promise.mean_macs_share == 1.0
    assert settings.promise.disagreement == 0.0


def test_where_some_exit_pays_the_note_says_nothing_of_that(everyone: Outputs) -> None:
    settings = settle_max_drop(draw(everyone, 0, 500), PLAN, 0.02)
    assert "No exit pays" not in settings.promise.note
    estimated = (settings.promise.full_accuracy - settings.promise.accuracy) * 100
    assert settings.promise.note.startswith(f"estimated drop {estimated:+.2f} ± ")


# --- budget


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_a_budget_is_kept_on_the_population(everyone: Outputs, budget: float) -> None:
    settings = [settle_budget(draw(everyone, seed, 250), PLAN, budget, seed=seed) for seed in range(12)]
    assert all(s.promise.kept and s.promise.mean_macs_share <= budget for s in settings)
    spent = np.array([mean_macs(everyone, s) for s in settings])
    assert spent.mean() <= budget + 2 * spent.std(ddof=1) / math.sqrt(len(spent))
    assert spent.mean() >= budget - 0.15  # and used


def test_a_larger_budget_never_loses_more(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 500)
    promises = [settle_budget(outputs, PLAN, budget).promise for budget in (0.3, 0.5, 0.7, 0.9, 1.0)]
    drops = [promise.full_accuracy - promise.accuracy for promise in promises]
    assert drops == sorted(drops, reverse=True)
    assert drops[-1] <= 0.0


def test_a_budget_that_cannot_be_reached_is_not_kept_and_the_note_names_the_least(everyone: Outputs) -> None:
    settings = settle_budget(draw(everyone, 0, 400), PLAN, 0.1)
    least = 0.26  # the first exit for everyone: 25 of 100, and its head
    assert not settings.promise.kept
    assert settings.promise.mean_macs_share == pytest.approx(least, abs=0.005)
    assert f"a mean of 0.1 of the multiply-adds cannot be reached, {settings.promise.mean_macs_share:.3f} is the least" in settings.promise.note
    assert mean_macs(everyone, settings) == pytest.approx(least, abs=0.005)


# --- risk

RATE, CONFIDENCE = 0.05, 0.95


def test_a_risk_promise_holds_as_often_as_its_confidence(everyone: Outputs) -> None:
    """Were each draw to hold with exactly 95 %, 186 of 200 or more would in nine runs of ten (binomial); the bound is exact or better.

    It is judged on the whole population, not on another sample, which would err as well.
    """
    held = [disagreement(everyone, settle_risk(draw(everyone, seed, 200), PLAN, RATE, CONFIDENCE, seed=seed)) <= RATE for seed in range(200)]
    assert np.mean(held) >= 0.93


def test_a_risk_promise_is_of_use(everyone: Outputs) -> None:
    settings = settle_risk(draw(everyone, 0, 1000), PLAN, RATE, CONFIDENCE)
    assert settings.promise.kept
    assert settings.promise.mean_macs_share < 0.95
    assert 0 < settings.promise.disagreement < RATE
    assert "proven on 600 of the samples" in settings.promise.note


def test_a_risk_promise_is_proven_on_samples_that_its_thresholds_were_not_found_on(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 400)
    settings = settle_risk(outputs, PLAN, RATE, CONFIDENCE, seed=5)
    held_out = outputs.select(np.random.default_rng(5).permutation(400)[160:])  # the last three fifths
    assert settings.promise.disagreement == pytest.approx(disagreement(held_out, settings))
    assert settings.promise.mean_macs_share == pytest.approx(mean_macs(held_out, settings))
    right = held_out.logits.argmax(axis=2) == held_out.labels
    assert settings.promise.accuracy == pytest.approx(right[taken(held_out, settings), np.arange(240)].mean())
    assert settings.promise.full_accuracy == pytest.approx(right[-1].mean())


def test_a_risk_is_tested_in_order_until_one_step_fails(everyone: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after a failure is not looked at: else the best of many tests would be taken, and chance with it."""
    outputs = draw(everyone, 0, 500)
    nobody, everybody, sure = np.array([NEVER, NEVER]), np.array([0.0, 0.0]), np.array([0.97, 0.97])
    for path, chosen in (
        ([nobody, sure, everybody], sure),
        ([nobody, everybody, sure], nobody),
        ([everybody, sure], nobody),
        ([sure, nobody], sure),
    ):
        monkeypatch.setattr(calibration, "stricter_first", lambda steps, _highest: steps)
        monkeypatch.setattr(calibration, "price_path", lambda _recorded, steps=path: iter(steps))
        assert settle_risk(outputs, PLAN, RATE, CONFIDENCE).thresholds.tolist() == chosen.tolist()


def test_too_few_samples_for_a_risk_are_refused_with_the_number_that_is_enough(everyone: Outputs) -> None:
    enough = math.ceil(samples_needed(0.02, 0.95) / 0.6)
    assert enough == 249  # 149 without a failure, on three fifths of the samples
    with pytest.raises(CalibrationError, match=r"247 samples cannot prove a disagreement of at most 0\.02 at 0\.95") as caught:
        settle_risk(draw(everyone, 0, 247), PLAN, 0.02, 0.95)
    assert f"at least {enough}" in caught.value.hint
    assert settle_risk(draw(everyone, 0, enough), PLAN, 0.02, 0.95).promise.kept


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_bound_keeps_a_risk_as_often_as_it_says(everyone: Outputs, bound: Bound) -> None:
    settings = [settle_risk(draw(everyone, seed, 400), PLAN, RATE, CONFIDENCE, bound=bound, seed=seed) for seed in range(60)]
    held = [disagreement(everyone, s) <= RATE for s in settings]
    assert np.mean(held) >= 0.9  # 95 % or more; of 60 draws a standard error is 2.8 %
    assert np.mean([mean_macs(everyone, s) for s in settings]) < 0.98
    assert f"by the {bound} bound" in next(s for s in settings if s.promise.mean_macs_share < 1).promise.note


def test_of_disagreement_clopper_pearson_stops_earliest_and_is_the_default(everyone: Outputs) -> None:
    macs: dict[str, list[float]] = {bound: [] for bound in BOUNDS}
    for seed in range(20):
        outputs = draw(everyone, seed, 400)
        for bound, found in macs.items():
            found.append(settle_risk(outputs, PLAN, RATE, CONFIDENCE, bound=bound, seed=seed).promise.mean_macs_share)  # type: ignore[arg-type]
        assert macs["clopper-pearson"][-1] <= macs["bentkus"][-1] + 0.01  # whatever Bentkus proves of coins it proves too
        assert settle_risk(outputs, PLAN, RATE, CONFIDENCE, seed=seed).promise.mean_macs_share == macs["clopper-pearson"][-1]
    assert np.mean(macs["clopper-pearson"]) < min(np.mean(macs["bentkus"]), np.mean(macs["betting"]))


def test_a_risk_of_accuracy_holds_as_often_as_its_confidence(everyone: Outputs) -> None:
    settings = [settle_risk(draw(everyone, seed, 300), PLAN, RATE, CONFIDENCE, risk_of="accuracy", seed=seed) for seed in range(100)]
    assert np.mean([drop(everyone, s) <= RATE for s in settings]) >= 0.9
    assert np.mean([mean_macs(everyone, s) for s in settings]) < 0.95


def test_a_risk_of_accuracy_stops_earlier_than_one_of_disagreement(everyone: Outputs) -> None:
    """Where the network is wrong, another answer costs nothing."""
    promises = {}
    for risk_of in RISKS:
        settled = [settle_risk(draw(everyone, seed, 1000), PLAN, RATE, CONFIDENCE, risk_of=risk_of, seed=seed) for seed in range(5)]
        promises[risk_of] = [settings.promise for settings in settled]
    macs = {risk_of: np.mean([promise.mean_macs_share for promise in made]) for risk_of, made in promises.items()}
    assert macs["accuracy"] < macs["disagreement"] - 0.02
    for promise in promises["accuracy"]:
        assert promise.full_accuracy - promise.accuracy < RATE
        assert (promise.kind, promise.limit, promise.confidence) == ("max-drop", RATE, CONFIDENCE)  # a drop, and proven
        assert "at most 5 % of accuracy lost at 0.95, proven on 600 of the samples by the betting bound" in promise.note
    assert all((promise.kind, promise.confidence) == ("risk", CONFIDENCE) for promise in promises["disagreement"])


def test_clopper_pearson_is_refused_by_name_for_accuracy(everyone: Outputs) -> None:
    with pytest.raises(CalibrationError, match="the Clopper-Pearson bound is one on how often something happens") as caught:
        settle_risk(draw(everyone, 0, 1000), PLAN, RATE, CONFIDENCE, risk_of="accuracy", bound="clopper-pearson")
    assert "--bound betting" in caught.value.hint


@pytest.mark.parametrize("bound", ["bentkus", "betting"])
def test_a_bound_says_how_many_samples_it_needs_for_accuracy(everyone: Outputs, bound: Bound) -> None:
    needed = samples_needed(RATE, CONFIDENCE, bound, least=-1.0)
    assert needed == pytest.approx({"bentkus": 1800, "betting": 80}[bound], rel=0.03)
    enough = math.ceil(needed / 0.6)
    with pytest.raises(CalibrationError, match=rf"drop of accuracy of at most 0\.05 at 0\.95 by the {bound} bound") as caught:
        settle_risk(draw(everyone, 0, enough - 2), PLAN, RATE, CONFIDENCE, risk_of="accuracy", bound=bound)
    assert f"give at least {enough}; the smallest rate that these could prove is 0.05" in caught.value.hint
    assert settle_risk(draw(everyone, 0, enough), PLAN, RATE, CONFIDENCE, risk_of="accuracy", bound=bound).promise.kept


def test_the_smallest_rate_that_could_be_proven_can_be_asked_for(everyone: Outputs) -> None:
    with pytest.raises(CalibrationError) as caught:
        settle_risk(draw(everyone, 0, 100), PLAN, 0.02, CONFIDENCE)
    smallest = float(caught.value.hint.split()[-1])
    assert 0.04 < smallest < 0.06  # three in sixty
    assert settle_risk(draw(everyone, 0, 100), PLAN, smallest, CONFIDENCE).promise.kept


def test_a_risk_that_no_exit_keeps_says_the_smallest_that_is_proven() -> None:
    """Exits that are sure and wrong: even the strictest thresholds let some of them go."""
    outputs = population(1, 2000, skills=(1.6, 2.4, 3.4))
    logits = outputs.logits.copy()
    wrong = np.random.default_rng(0).random(2000) < 0.02
    logits[:2, wrong] = 0.0
    logits[:2, wrong, (outputs.labels[wrong] + 1) % 10] = 15.0
    settings = settle_risk(Outputs(logits, outputs.labels), PLAN, 0.01, 0.95)
    assert settings.thresholds.tolist() == [NEVER, NEVER]
    assert settings.promise.kept  # the full network differs from itself nowhere
    assert settings.promise.note.startswith("No exit could be proven to keep this promise on these samples: the full network runs.")
    proven = float(settings.promise.note.split(" is ")[1].split(" %")[0]) / 100
    assert 0.01 < proven < 0.1
    asked = math.ceil(proven * 1e4) / 1e4
    assert (settle_risk(Outputs(logits, outputs.labels), PLAN, asked, 0.95).thresholds < NEVER).any()


def test_the_smallest_rate_is_the_bound_of_the_first_setting(everyone: Outputs, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = draw(everyone, 0, 500)
    monkeypatch.setattr(calibration, "stricter_first", lambda steps, _highest: iter([np.array([0.0, 0.0]), np.array([0.97, 0.97])]))
    note = settle_risk(outputs, PLAN, RATE, CONFIDENCE).promise.note
    test = outputs.select(np.random.default_rng(0).permutation(500)[200:])
    answers = test.logits.argmax(axis=2)
    bound = mean_bound(answers[0] != answers[-1], "clopper-pearson", confidence=CONFIDENCE)
    assert f"The smallest rate that these samples prove at 0.95 is {math.ceil(bound * 1e4) / 100:.4g} %." in note


# --- how far a search is from the best


def test_a_note_names_a_bound_that_no_thresholds_undercut_and_the_gap(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 500)
    for settings in (settle_max_drop(outputs, PLAN, 0.05), settle_budget(outputs, PLAN, 0.6)):
        recorded = recorded_outputs(outputs, settings.temperatures, PLAN, "top1", excess_error(outputs, settings.temperatures))
        loss, cost = judge(recorded, settings.thresholds)
        bound = lower_bound(recorded, Limit(loss=loss))
        assert 0 < bound <= cost
        gap = f"they cost {cost:.3f}, boundaries priced; none that lose as little cost less than {bound:.3f} (gap {1 - bound / cost:.0%})."
        assert gap in settings.promise.note


def test_every_step_of_a_path_is_above_its_bound(everyone: Outputs) -> None:
    _, held_out, _ = cross_fit(draw(everyone, 0, 400), PLAN, "top1", 0)
    assert np.all(held_out.bound <= held_out.own_cost + 1e-9)
    assert held_out.bound[0] > 0.3


def test_bounds_of_many_losses_are_those_of_each(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 200)
    recorded = recorded_outputs(outputs, np.ones(3), PLAN, "top1", excess_error(outputs, np.ones(3)))
    losses = np.array([-0.1, 0.0, 0.02, 0.3])
    assert least_costs(recorded, losses).tolist() == pytest.approx([lower_bound(recorded, Limit(loss=loss)) for loss in losses])


def test_where_no_exit_is_on_there_is_no_gap(everyone: Outputs) -> None:
    assert "gap" not in settle_max_drop(population(1, 600, skills=(0.0, 0.0, 6.0)), PLAN, 0.0).promise.note


# --- policies

ALIKE = [(4.0, -2.0, 1.0, 0.5, -2.5), (3.0, -1.0, 2.0, -0.5, -2.0)]


@pytest.mark.parametrize("policy", ["entropy", "renyi_entropy", "gates"])
def test_policies_with_a_threshold_an_exit_keep_promises(everyone: Outputs, policy: Policy) -> None:
    gates = ALIKE if policy == "gates" else ()
    outputs = draw(everyone, 0, 800)
    for settings in (
        settle_max_drop(outputs, PLAN, 0.03, policy=policy, gates=gates),
        settle_budget(outputs, PLAN, 0.6, policy=policy, gates=gates),
        settle_risk(outputs, PLAN, RATE, CONFIDENCE, policy=policy, gates=gates),
    ):
        assert settings.promise.kept
        leaves = taken(everyone, settings, policy, gates)
        assert 0.1 < (leaves < 2).mean() < 1
        right = everyone.logits.argmax(axis=2) == everyone.labels
        lost = (right[-1] * 1.0 - right[leaves, np.arange(EVERYONE)]).mean()
        assert lost < 0.2
        assert abs(lost - (settings.promise.full_accuracy - settings.promise.accuracy)) < 0.03


def test_patience_has_one_number_for_all_and_runs_every_exit() -> None:
    network = plan(10, 30, 50, 70)
    outputs = population(3, 1500, skills=(1.8, 2.4, 2.8, 3.2, 3.4))
    settings = settle_budget(outputs, network, 0.6, policy="patience")
    assert len(set(settings.thresholds)) == 1
    assert settings.thresholds[0] in (1.0, 2.0, 3.0, 4.0)
    leaves = taken(outputs, settings, "patience")
    answers = outputs.logits.argmax(axis=2)
    for sample in range(100):
        row, expected = 0, 4
        for k in range(4):
            row = row + 1 if k and answers[k, sample] == answers[k - 1, sample] else 1
            if row >= settings.thresholds[0]:
                expected = k
                break
        assert leaves[sample] == expected
    stricter = settle_max_drop(outputs, network, 0.001, policy="patience")
    assert stricter.promise.mean_macs_share >= settings.promise.mean_macs_share


def test_patience_that_saves_nothing_is_called_so() -> None:
    """Two exits that hardly agree: both heads would be run for nothing."""
    settings = settle_max_drop(population(3, 800, skills=(0.0, 0.0, 3.4)), PLAN, 0.001, policy="patience")
    assert settings.thresholds.tolist() == [NEVER, NEVER]
    assert "No exit pays" in settings.promise.note


def test_jei_has_one_threshold_for_all_between_0_and_1(everyone: Outputs) -> None:
    outputs = draw(everyone, 0, 800)
    settings = settle_budget(outputs, PLAN, 0.6, policy="jei", gates=ALIKE)
    assert len(set(settings.thresholds)) == 1
    assert round(settings.thresholds[0] * 60) == pytest.approx(settings.thresholds[0] * 60)
    assert settings.promise.kept


@pytest.mark.parametrize("policy", ["gates", "jei"])
def test_gates_read_scores_at_the_temperature_they_were_learned_at(everyone: Outputs, policy: Policy) -> None:
    settings = settle_budget(draw(everyone, 0, 500), PLAN, 0.6, policy=policy, gates=ALIKE)
    assert settings.temperatures[:2].tolist() == [1.0, 1.0]
    assert settings.temperatures[2] != 1.0
    assert settings.errors is not None
    assert settings.errors[0, 0] == settings.errors[0, 1]
    assert settings.errors[2, 0] != settings.errors[2, 1]


# --- memorised samples


def memorised(count: int = 400) -> Outputs:
    """Always right and never sure: what a network says of pictures that it was trained on until it knew them, seen through augmentation."""
    outputs = population(2, count)
    sure = 3.0 * np.eye(10, dtype=np.float32)[outputs.labels]
    return Outputs(np.stack([outputs.logits[0], outputs.logits[1], sure]), outputs.labels)


def test_samples_that_look_memorised_are_called_so() -> None:
    warning = looks_memorised(settle_max_drop(memorised(), PLAN, 0.01))
    assert "right on 100.00%" in warning
    assert "(temperature 0.05)" in warning
    assert "they look memorised" in warning


def test_a_network_that_errs_does_not_look_memorised(everyone: Outputs) -> None:
    assert looks_memorised(settle_max_drop(draw(everyone, 0, 300), PLAN, 0.01)) == ""


def test_a_good_network_that_is_too_sure_does_not_look_memorised() -> None:
    """Right on 99.5 %, and sure to the last digit where it is wrong as well: its temperature is above 1."""
    outputs = memorised(400)
    logits = outputs.logits * np.array([1, 1, 10], np.float32)[:, None, None]
    wrong = outputs.labels.copy()
    wrong[:2] = (wrong[:2] + 1) % 10
    settings = settle_max_drop(Outputs(logits, wrong), PLAN, 0.01)
    assert settings.promise.full_accuracy > 0.99
    assert settings.temperatures[-1] > 1.0
    assert looks_memorised(settings) == ""


def test_calibration_warns_of_memorised_samples_and_writes_it_down(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: memorised(len(digits.samples_of("calibration"))))
    with caplog.at_level(logging.WARNING):
        made = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01).profile("default")
    assert "they look memorised" in caplog.text
    assert "estimated drop" in made.promise.note
    assert "they look memorised" in made.promise.note


# --- with an artifact

GATES = {"exit1": (4.0, -2.0, 1.0, 0.5, -2.5), "exit2": (3.0, -1.0, 2.0, -0.5, -2.0)}


@pytest.mark.parametrize(
    "asked",
    [
        {"max_drop": 0.01},
        {"budget_macs": 0.5},
        {"budget_macs": 0.5, "search": "quotas"},
        {"risk": (0.05, 0.95)},
        {"risk": (0.05, 0.95), "risk_of": "accuracy", "policy": "entropy"},
        {"max_drop": 0.01, "policy": "margin"},
        {"max_drop": 0.01, "policy": "renyi_entropy"},
        {"budget_macs": 0.7, "policy": "patience"},
        {"max_drop": 0.02, "policy": "gates", "gates": GATES},
        {"max_drop": 0.02, "policy": "jei", "gates": GATES},
    ],
    ids=lambda asked: "+".join([*asked, str(asked.get("policy", ""))]),
)
def test_the_runtime_takes_the_exits_that_calibration_foresaw(asked: dict[str, object]) -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("test")
    calibrated = calibrate(artifact, digits.samples_of("calibration"), **asked)  # type: ignore[arg-type]
    made = calibrated.profile("default")
    assert any(setting.enabled for setting in made.exits.values())
    outputs = record_outputs(artifact, samples)
    settings = Settings(
        np.array([setting.threshold if setting.enabled else NEVER for setting in made.exits.values()]),
        np.array([*(setting.temperature for setting in made.exits.values()), made.final_temperature]),
        made.promise,
    )
    gates = [setting.gate for setting in made.exits.values()]
    foreseen = np.array(artifact.plan.exit_names)[taken(outputs, settings, made.policy, gates)]
    assert len(set(foreseen)) > 1
    session = Session(calibrated)
    answers = [session.run(x) for x in samples.inputs(slice(0, 100))]
    # The device works in float32: only where a score all but equals its threshold may it decide otherwise.
    scores = outputs.confidence(settings.temperatures, made.policy, gates)
    close = (
        made.policy != "patience"
        and np.any([abs(score - threshold) < 1e-5 for score, threshold in zip(scores, settings.thresholds, strict=True)], axis=0)[:100]
    )
    close = np.broadcast_to(close, 100)
    assert close.sum() <= 2
    assert [answer.exit for answer, is_close in zip(answers, close, strict=True) if not is_close] == foreseen[:100][~close].tolist()


def test_what_is_recorded_is_what_every_exit_says() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    outputs = record_outputs(artifact, samples)
    assert outputs.logits.shape == (3, len(samples), 10)
    assert outputs.labels.tolist() == samples.labels.tolist()
    assert outputs.engine == "onnxruntime"
    some = [0, 249, 250, 499]  # of both batches
    recorded = Session(artifact).record(samples.inputs(some)).logits
    for number, name in enumerate(artifact.plan.exit_names):
        np.testing.assert_allclose(outputs.logits[number, some], recorded[name], rtol=1e-4, atol=1e-4)


def test_a_profile_says_what_it_was_made_from() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    made = calibrate(artifact, samples, risk=(0.1, 0.9), name="careful").profile("careful")
    assert made.model_id == artifact.manifest.model_id
    assert made.data == samples.identity()
    assert made.engine == "onnxruntime"
    assert (made.promise.kind, made.promise.limit, made.promise.confidence) == ("risk", 0.1, 0.9)
    assert made.enabled[-1] == FINAL


def test_calibrating_adds_a_profile_and_leaves_the_artifact_given_alone() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    first = calibrate(artifact, samples, max_drop=0.01)
    second = calibrate(first, samples, budget_macs=0.5, name="cheap")
    replaced = calibrate(second, samples, max_drop=0.2)
    assert artifact.profiles == {}
    assert list(first.profiles) == ["default"]
    assert list(second.profiles) == list(replaced.profiles) == ["default", "cheap"]
    assert second.profile("default") == first.profile("default")
    assert replaced.profile("default").promise.limit == 0.2
    assert replaced.profile("cheap") == second.profile("cheap")


def test_calibrating_changes_nothing_but_the_profile_and_the_memory() -> None:
    artifact = digits.trained_artifact()
    calibrated = calibrate(artifact, digits.samples_of("calibration"), max_drop=0.01)
    kept = {path: bytes(data) for path, data in calibrated.files.items() if not path.startswith("profiles/") and path != MEMORY_FILE}
    assert kept == {path: bytes(data) for path, data in artifact.files.items()}
    assert calibrated.manifest.model_id == artifact.manifest.model_id
    samples, memory = digits.samples_of("calibration"), calibrated.memory
    assert memory is not None
    assert len(memory) == len(samples)
    assert np.array_equal(memory.labels, samples.labels)
    expected = record_outputs(artifact, samples)
    np.testing.assert_allclose(memory.logits, expected.full, rtol=1e-3, atol=1e-3)
    assert all(np.array_equal(memory.features[name], expected.features[name]) for name in memory.features)


def test_gates_come_from_the_heads_training_where_none_are_given() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    with pytest.raises(CalibrationError, match="the policy gates needs learned gates, and the artifact has none"):
        calibrate(artifact, samples, max_drop=0.02, policy="gates")
    with_gates = replace(artifact, manifest=replace(artifact.manifest, gates=GATES))
    made = calibrate(with_gates, samples, max_drop=0.02, policy="gates").profile("default")
    assert {name: setting.gate for name, setting in made.exits.items()} == GATES
    assert made == calibrate(artifact, samples, max_drop=0.02, policy="gates", gates=GATES).profile("default")


@pytest.mark.parametrize("gates", [{"exit1": GATES["exit1"]}, {**GATES, "exit2": (1.0, 2.0)}, {**GATES, "exit2": (1.0, 2.0, 3.0, 4.0, math.inf)}])
def test_gates_that_do_not_fit_are_refused(gates: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(CalibrationError, match=r"the gate of exit2 is .*, not 5 finite numbers"):
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.02, policy="jei", gates=gates)


def test_a_profile_says_how_far_probabilities_are_off_without_and_with_temperatures() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    found = calibrate(artifact, samples, max_drop=0.01).profile("default").calibration_errors
    outputs = record_outputs(artifact, samples)
    errors = calibration_errors(outputs.logits, outputs.labels)
    for name, (before, after) in zip(("exit1", "exit2", "final"), errors, strict=True):
        assert after < before
        assert found[name] == (before, after)


def test_a_diverging_temperature_is_warned_about_by_its_exit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    outputs = population(1, len(digits.samples_of("calibration")))
    logits = outputs.logits.copy()
    logits[0] = 5.0 * np.eye(10, dtype=np.float32)[outputs.labels]  # always right
    logits[1] = np.random.default_rng(0).normal(0, 9.0, logits[1].shape)  # knows nothing, and is sure of it
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: Outputs(logits, outputs.labels))
    with caplog.at_level(logging.WARNING):
        made = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01).profile("default")
    assert "No finite temperature fits exit1 (0.05), exit2 (20)" in caplog.text
    assert "No finite temperature fits" in made.promise.note
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        monkeypatch.undo()
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01)
    assert "temperature" not in caplog.text


def test_an_exit_that_is_off_has_a_threshold_that_no_score_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(digits.samples_of("calibration"))
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: population(1, count, skills=(0.0, 0.0, 6.0)))
    made = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.0).profile("default")
    assert [(setting.enabled, setting.threshold) for setting in made.exits.values()] == [(False, 2.0), (False, 2.0)]
    assert all(isinstance(setting, ExitSetting) and setting.temperature > 0 for setting in made.exits.values())


# --- refusals


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "one promise must be asked for"),
        ({"max_drop": 0.01, "budget_macs": 0.5}, "one promise must be asked for"),
        ({"max_drop": 0.01, "risk": (0.02, 0.95)}, "one promise must be asked for"),
        ({"max_drop": 0.01, "budget_macs": 0.5, "risk": (0.02, 0.95)}, "one promise must be asked for"),
        ({"max_drop": -0.01}, "--max-drop -0.01 is no share"),
        ({"max_drop": 1.5}, "--max-drop 1.5 is no share"),
        ({"max_drop": math.nan}, "--max-drop nan is no share"),
        ({"budget_macs": 0.0}, "--budget-macs 0 is no share"),
        ({"budget_macs": math.inf}, "--budget-macs inf is no share"),
        ({"budget_macs": math.nan}, "--budget-macs nan is no share"),
        ({"risk": (0.0, 0.95)}, "--risk 0@0.95 is no rate and confidence"),
        ({"risk": (0.02, 1.0)}, "--risk 0.02@1 is no rate and confidence"),
        ({"risk": (math.nan, 0.95)}, "--risk nan@0.95 is no rate and confidence"),
        ({"risk": (0.02, 0.95), "bound": "hoeffding"}, "there is no bound 'hoeffding'"),
        ({"risk": (0.02, 0.95), "risk_of": "regret"}, "there is no risk_of 'regret'"),
        ({"max_drop": 0.01, "bound": "betting"}, "bound and risk_of say how a risk is proven"),
        ({"max_drop": 0.01, "risk_of": "accuracy"}, "bound and risk_of say how a risk is proven"),
        ({"risk": (0.02, 0.95), "risk_of": "accuracy", "bound": "clopper-pearson"}, "the Clopper-Pearson bound is one on how often"),
        ({"max_drop": 0.01, "search": "quotas"}, "quotas are found for a budget of multiply-adds"),
        ({"budget_macs": 0.5, "search": "beam"}, "there is no search 'beam'"),
        ({"budget_macs": 0.5, "search": "quotas", "policy": "patience"}, "quotas give each exit a threshold of its own"),
        ({"max_drop": 0.01, "policy": "certainty"}, "there is no policy 'certainty'"),
        ({"max_drop": 0.01, "policy": "temporal"}, "the policy temporal compares frames of a stream"),
        ({"max_drop": 0.01, "gates": GATES}, "gates serve the policies gates and jei, not top1"),
    ],
)
def test_a_promise_that_is_none_is_refused(asked: dict[str, object], problem: str) -> None:
    with pytest.raises(CalibrationError, match=problem):
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), **asked)  # type: ignore[arg-type]


def test_what_could_not_be_proven_is_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: pytest.fail("recorded"))
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    with pytest.raises(CalibrationError, match="500 samples cannot prove a disagreement") as caught:
        calibrate(artifact, samples, risk=(0.005, 0.95))
    assert "give at least 997; the smallest rate that these could prove is 0.01" in caught.value.hint
    with pytest.raises(CalibrationError, match="350 samples cannot prove a disagreement") as caught:
        calibrate(artifact, samples, risk=(0.01, 0.95), alpha=0.1)
    assert "give at least 713 in all" in caught.value.hint  # 299 tested are three fifths of 499, which are seven tenths


def test_labels_outside_the_classes_are_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: pytest.fail("recorded"))
    samples = digits.samples_of("calibration").subset(range(100))
    samples.labels = samples.labels.copy()
    samples.labels[[7, 9]] = [10, -1]
    with pytest.raises(CalibrationError, match="the label 10 of sample 7 is none of the network's 10 classes"):
        calibrate(digits.trained_artifact(), samples, max_drop=0.01)


def test_logits_that_are_not_finite_are_refused_by_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    session = Session(artifact)

    def record(*given: object) -> Recording:
        recording = real(*given)  # type: ignore[arg-type]
        recording.logits["exit2"][3, 1] = np.nan
        return recording

    real = session.record
    monkeypatch.setattr(session, "record", record)
    with pytest.raises(CalibrationError, match="the logits of exit2 are not finite for sample 3"):
        record_outputs(artifact, samples, session=session)


def test_untrained_heads_are_refused() -> None:
    with pytest.raises(CalibrationError, match="heads are untrained") as caught:
        calibrate(digits.fresh_artifact(), digits.samples_of("calibration"), max_drop=0.01)
    assert "exitify train" in caught.value.hint


def test_an_artifact_without_exits_is_refused() -> None:
    artifact = digits.trained_artifact()
    bare = replace(artifact, manifest=replace(artifact.manifest, plan=replace(artifact.plan, exits=())))
    with pytest.raises(CalibrationError, match="no exits to calibrate"):
        calibrate(bare, digits.samples_of("calibration"), max_drop=0.01)


def test_fewer_than_fifty_samples_are_refused() -> None:
    samples = digits.samples_of("calibration")
    with pytest.raises(CalibrationError, match="49 samples are too few") as caught:
        calibrate(digits.trained_artifact(), samples.subset(range(49)), max_drop=0.01)
    assert "at least 50" in caught.value.hint
    assert calibrate(digits.trained_artifact(), samples.subset(range(50)), max_drop=0.01).profile("default").promise.samples == 50


def test_a_profile_name_that_is_no_file_name_is_refused_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "record_outputs", lambda *_, **__: pytest.fail("recorded"))
    with pytest.raises(ExitifyError, match=r"cannot be called '\.\./up'"):
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01, name="../up")


def test_more_exits_settle_too() -> None:
    """Four exits, each reached later: the costs stay those of what is run."""
    network = plan(10, 30, 50, 70)
    outputs = population(3, 300, skills=(1.4, 1.8, 2.4, 3.0, 3.4))
    settings = settle_max_drop(outputs, network, 0.05)
    assert settings.thresholds.shape == (4,)
    assert settings.temperatures.shape == (5,)
    assert mean_macs(outputs, settings, network) < 0.9
