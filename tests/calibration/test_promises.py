"""Promises: kept on the population that the samples were drawn from, and refused or called broken where they cannot be."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest

from exitify.artifact.manifest import ExitSetting
from exitify.artifact.memory import MEMORY_FILE
from exitify.calibration import calibrate as calibration
from exitify.calibration.bounds import samples_needed
from exitify.calibration.calibrate import (
    Outputs,
    Settings,
    calibrate,
    confidence_of,
    looks_memorised,
    record_outputs,
    settle_budget,
    settle_max_drop,
    settle_risk,
)
from exitify.calibration.thresholds import NEVER
from exitify.errors import CalibrationError, ExitifyError
from exitify.plan import FINAL
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
        monkeypatch.setattr(calibration, "stricter_first", lambda steps: steps)
        monkeypatch.setattr(calibration, "price_path", lambda _recorded, steps=path: iter(steps))
        assert settle_risk(outputs, PLAN, RATE, CONFIDENCE).thresholds.tolist() == chosen.tolist()


def test_too_few_samples_for_a_risk_are_refused_with_the_number_that_is_enough(everyone: Outputs) -> None:
    enough = math.ceil(samples_needed(0.02, 0.95) / 0.6)
    assert enough == 249  # 149 without a failure, on three fifths of the samples
    with pytest.raises(CalibrationError, match=r"247 samples cannot prove a disagreement of at most 0\.02 at 0\.95") as caught:
        settle_risk(draw(everyone, 0, 247), PLAN, 0.02, 0.95)
    assert f"at least {enough}" in caught.value.hint
    assert settle_risk(draw(everyone, 0, enough), PLAN, 0.02, 0.95).promise.kept


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


@pytest.mark.parametrize(
    "asked",
    [{"max_drop": 0.01}, {"budget_macs": 0.5}, {"risk": (0.05, 0.95)}, {"max_drop": 0.01, "policy": "margin"}],
    ids=lambda asked: "+".join(asked),
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
    foreseen = np.array(artifact.plan.exit_names)[taken(outputs, settings, made.policy)]
    session = Session(calibrated)
    answers = [session.run(x) for x in samples.inputs(slice(0, 100))]
    # The device works in float32: only where a score all but equals its threshold may it decide otherwise.
    scores = [confidence_of(logits / t, made.policy) for logits, t in zip(outputs.logits[:-1], settings.temperatures, strict=False)]
    close = np.any([abs(score - threshold) < 1e-5 for score, threshold in zip(scores, settings.thresholds, strict=True)], axis=0)[:100]
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
    ],
)
def test_a_promise_that_is_none_is_refused(asked: dict[str, object], problem: str) -> None:
    with pytest.raises(CalibrationError, match=problem):
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), **asked)  # type: ignore[arg-type]


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
