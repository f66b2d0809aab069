"""What a report says is what a session does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Policy
from exitify.calibration.calibrate import calibrate
from exitify.calibration.temperature import expected_calibration_error, reliability
from exitify.errors import ExitifyError, UnknownProfile
from exitify.onnx_export.to_artifact import export
from exitify.pipeline import transform
from exitify.report.behaviour import behaviour
from exitify.report.evidence import answered
from exitify.report.page import blocks, expected, rows
from exitify.report.report import inspect, pareto
from exitify.runtime.policies import softmax
from exitify.runtime.session import Session
from tests.artifacts import profile_for
from tests.digits import artifact_without_exits, fresh_artifact, network, profile, samples_of, trained_artifact
from tests.report.reports import calibrated, with_samples, without_samples
from tests.skipping import pictures, skipping

GATES = {"exit1": (4.0, -1.0, 2.0, 0.5, -3.0), "exit2": (3.0, -1.0, 1.0, 0.2, -2.0)}


def with_policy(policy: Policy) -> Artifact:
    """The digits' network with thresholds under which about half of the samples leave early, by each policy."""
    artifact = trained_artifact()
    if policy == "gates":
        artifact = replace(artifact, manifest=replace(artifact.manifest, gates=GATES))
    return calibrate(artifact, samples_of("calibration"), budget_macs=0.75, policy=policy)


@pytest.mark.parametrize("policy", ["top1", "entropy", "margin", "patience", "gates"])
def test_samples_leave_where_a_session_lets_them_leave(policy: Policy) -> None:
    artifact, samples = with_policy(policy), samples_of("test")
    found = inspect(artifact, samples).behaviour
    assert found is not None
    answers = Session(artifact).run_batch(samples.inputs(slice(None)))
    names = artifact.plan.exit_names
    assert [names[k] for k in found.taken] == [answer.exit for answer in answers]
    assert found.answers.tolist() == [answer.label for answer in answers]
    assert found.mean_macs * artifact.plan.full_macs == pytest.approx(np.mean([answer.macs for answer in answers]))
    assert found.accuracy == np.mean([answer.label == label for answer, label in zip(answers, samples.labels)])
    np.testing.assert_allclose(found.probability, [answer.probabilities.max() for answer in answers], rtol=1e-5)
    assert len({answer.exit for answer in answers}) > 1


def test_exits_that_are_off_are_not_asked() -> None:
    artifact = trained_artifact()
    artifact = artifact.with_profile("default", profile(artifact, {"exit2": 0.5}))
    found = inspect(artifact, samples_of("test")).behaviour
    assert found is not None
    assert set(found.taken) == {1, 2}
    assert np.isnan(found.macs[0])
    assert found.most_macs == found.macs[2]


def test_of_a_profile_that_leaves_blocks_out_the_outputs_are_recorded_so() -> None:
    _, artifact = skipping()
    made = replace(profile_for(artifact, {"exit1": 0.5}), skip="010")
    masked = artifact.with_profile("default", made)
    session = Session(masked)
    x = pictures(40)
    answers = session.run_batch(x)
    from exitify.data import Samples, _Array

    labels = np.array([answer.label for answer in answers])
    evidence = answered(masked, Samples(_Array(x), labels, [str(i) for i in range(7)], masked.manifest.input), made)
    found = behaviour(masked.plan, made, evidence)
    assert found.accuracy == 1.0
    assert [masked.plan.exit_names[k] for k in found.taken] == [answer.exit for answer in answers]
    assert found.full_accuracy < 1.0  # the whole network, nothing left out, says otherwise here and there


def test_what_the_artifact_remembers_stands_for_samples_that_are_not_given() -> None:
    report = without_samples()
    assert report.evidence is not None
    assert report.evidence.samples is None
    assert report.evidence.are_those_calibrated_on
    exact = inspect(calibrated(), samples_of("calibration"))
    assert exact.evidence is not None
    assert exact.evidence.are_those_calibrated_on  # the same pictures, by their hash
    assert len(report.evidence) == len(exact.evidence)
    for found, recorded in zip(report.evidence.outputs.logits, exact.evidence.outputs.logits):  # float16 in the memory
        np.testing.assert_allclose(np.sort(found, axis=0), np.sort(recorded, axis=0), atol=0.1)
    assert not with_samples().evidence.are_those_calibrated_on  # type: ignore[union-attr]


def test_on_samples_that_it_was_calibrated_on_the_promise_is_what_to_expect() -> None:
    report = without_samples()
    promise = calibrated().profile("default").promise
    found = expected(report)
    assert found is not None
    assert (found.accuracy, found.macs, found.drop_error) == (promise.accuracy, promise.mean_macs_share, None)
    other = expected(with_samples())
    assert other is not None
    assert other.accuracy == with_samples().behaviour.accuracy  # type: ignore[union-attr]
    assert other.drop_error is not None


def test_the_picture_of_costs_has_the_mean_cost_as_its_area() -> None:
    report = with_samples()
    assert report.behaviour is not None
    assert sum(block.width * block.height for block in blocks(report)) == pytest.approx(report.behaviour.mean_macs)
    assert sum(block.width for block in blocks(report)) == pytest.approx(report.behaviour.most_macs)


def test_rows_tell_every_segment_and_every_exit_once_and_lose_no_sample() -> None:
    report = with_samples()
    plan = report.artifact.plan
    found = rows(report, ["#000000"] * len(plan.exit_names))
    assert [row.name for row in found if row.kind == "exit"] == list(plan.exit_names)
    assert [row.name for row in found if row.kind != "exit"] == [s.name for s in plan.segments if s.kind != "head"]
    assert sum(row.leaves or 0.0 for row in found) == pytest.approx(1.0)
    assert found[-1].comes_by == pytest.approx(found[-1].leaves)
    assert [row.note for row in found if row.kind == "trunk"] == ["up to stage2", "up to stage3", "up to the network's end"]


def test_without_a_profile_no_head_is_asked_and_the_network_costs_what_it_costs() -> None:
    report = inspect(trained_artifact(), samples_of("test"))
    assert sum(block.width * block.height for block in blocks(report)) == pytest.approx(1.0)
    found = {row.name: row for row in rows(report, ["#000000"] * 3) if row.kind == "exit"}
    assert [row.is_on for row in found.values()] == [False, False, True]
    assert found["exit1"].asked == "not asked without a profile"
    assert found["exit1"].reached == trained_artifact().plan.macs_at(["exit1"])["exit1"] / trained_artifact().plan.full_macs
    assert found["final"].reached == 1.0


def test_a_head_that_a_later_one_reads_is_run_though_its_exit_is_off() -> None:
    program = transform(network(), torch.zeros(1, 1, 16, 16), exits="stage2,stage3", head="linear", cascade="identity")
    artifact = export(program)
    artifact = artifact.with_profile("default", profile(artifact, {"exit2": 0.5}))
    plan = artifact.plan
    found = {row.name: row for row in rows(inspect(artifact), ["#000000"] * 3)}
    assert (found["exit1"].is_on, found["exit1"].asked) == (False, "off, but its head is run: a later one reads what it says")
    assert found["exit2"].reached == plan.macs_at(["exit2", "final"])["exit2"] / plan.full_macs
    assert (
        found["exit2"].reached
        > (plan.segment("trunk_exit1").cost + plan.segment("trunk_exit2").cost + plan.segment("head_exit2").cost).macs / plan.full_macs
    )
    assert "head_exit1" in [block.name for block in blocks(inspect(artifact))]


@pytest.mark.parametrize(("policy", "threshold", "said"), [
    ("top1", 0.99997, "stops at a score (top1) of 0.99997 or more"),
    ("entropy", -0.25, "stops at an entropy (entropy) of 0.25 or less"),
])  # fmt: skip
def test_a_threshold_is_said_as_it_is_meant(policy: Policy, threshold: float, said: str) -> None:
    artifact = trained_artifact()
    made = replace(profile(artifact, {"exit1": threshold}), policy=policy)
    row = next(row for row in rows(inspect(artifact.with_profile("default", made)), ["#000000"] * 3) if row.name == "exit1")
    assert row.asked == said


def test_the_curve_begins_at_the_network_itself_and_holds_what_calibration_estimated() -> None:
    report = without_samples()
    curve, outputs = report.front, report.evidence.outputs  # type: ignore[union-attr]
    assert curve is not None
    assert (curve.macs[0], curve.error[0]) == (1.0, 0.0)
    assert curve.accuracy[0] == pytest.approx((outputs.full.argmax(axis=1) == outputs.labels).mean())
    promise = calibrated().profile("default").promise
    nearest = np.abs(curve.macs - promise.mean_macs_share).argmin()
    assert abs(curve.macs[nearest] - promise.mean_macs_share) < 0.05
    assert abs(curve.accuracy[nearest] - curve.accuracy[0] + promise.full_accuracy - promise.accuracy) < 0.01


def test_times_of_segments_make_it_milliseconds() -> None:
    report = with_samples()
    assert report.times is not None
    assert report.behaviour is not None
    assert report.front is not None
    assert report.front.ms is not None
    assert report.front.ms[0] == pytest.approx(report.times.whole_ms)
    assert report.behaviour.ms is not None
    assert np.all(np.diff(report.behaviour.ms) > 0)
    stored = inspect(calibrated().with_times("here", report.times))
    assert stored.times == report.times
    assert stored.behaviour is not None
    assert stored.behaviour.ms is not None


def test_reliability_is_the_calibration_error_that_is_known() -> None:
    outputs = with_samples().evidence.outputs  # type: ignore[union-attr]
    for logits in outputs.logits:
        found = reliability(softmax(logits, 2.0), outputs.labels)
        assert found.error == pytest.approx(expected_calibration_error(softmax(logits, 2.0), outputs.labels))
        assert np.all(np.diff(found.confidence) >= 0)
        p = softmax(logits, 2.0)
        ranked = sorted(zip(p.max(axis=1), p.argmax(axis=1) == outputs.labels), key=lambda pair: pair[0])  # by hand: 397 = 7 * 27 + 8 * 26
        sizes, at, gap = [27] * 7 + [26] * 8, 0, 0.0
        for size in sizes:
            gap += abs(sum(sure for sure, _ in ranked[at : at + size]) - sum(right for _, right in ranked[at : at + size]))
            at += size
        assert found.error == pytest.approx(gap / 397)


def test_the_newest_profile_is_shown_where_none_is_called_default() -> None:
    artifact = trained_artifact()
    for name, threshold in (("first", 0.9), ("second", 0.5)):
        artifact = artifact.with_profile(name, profile(artifact, {"exit1": threshold}))
    assert inspect(artifact).profile_name == "second"
    assert inspect(artifact, profile="first").profile_name == "first"
    assert inspect(artifact.with_profile("default", artifact.profile("first"))).profile_name == "default"
    with pytest.raises(UnknownProfile, match="no profile 'third'"):
        inspect(artifact, profile="third")


def test_samples_say_nothing_of_untrained_heads() -> None:
    with pytest.raises(ExitifyError, match="heads are untrained, so what they say of samples means nothing\n  hint: run `exitify train`"):
        inspect(fresh_artifact(), samples_of("test"))
    assert inspect(fresh_artifact()).evidence is None
    assert inspect(artifact_without_exits(), samples_of("test")).front is None


def test_a_pareto_front_keeps_what_nothing_beats() -> None:
    cost, worth = np.array([3.0, 1.0, 2.0, 2.0, 4.0]), np.array([0.9, 0.5, 0.8, 0.7, 0.9])
    assert pareto(cost, worth) == [1, 2, 0]
