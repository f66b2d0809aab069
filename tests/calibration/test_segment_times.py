"""Times by segment: what is measured, what a run takes by it, and what is chosen for another machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Conditions, MaskMeasured, MaskTable, SegmentTimes
from exitify.calibration import time_budget
from exitify.calibration.calibrate import calibrate
from exitify.calibration.segment_times import mean_time, measure_segments, name_of, run_times
from exitify.errors import CalibrationError
from exitify.plan import FINAL
from exitify.targets.board import conditions
from tests.compiled import compiled
from tests.skipping import MASKS

BOARD = Conditions("orin-nano-8gb", "15W", "fixed")


def as_costs(artifact: Artifact, whole_ms: float = 10.0, engine: str = "tvm:orin-nano-8gb") -> SegmentTimes:
    """Times of a board on which a multiply-add always takes as long."""
    a_mac = whole_ms / artifact.plan.full_macs
    segments = {segment.name: max(segment.cost.macs * a_mac, 1e-9) for segment in artifact.plan.segments}
    return SegmentTimes(artifact.manifest.model_id, engine, 1, BOARD, 25, whole_ms, segments)


@pytest.mark.parametrize("mask", MASKS)
def test_where_time_is_cost_a_run_takes_its_share_of_the_networks(artifact, mask):
    plan, times = artifact.plan, as_costs(artifact)
    exits = [point.name for point in plan.exits]
    flags = plan.mask(mask)
    for enabled in ([], exits[:1], exits):
        found = run_times(plan, times, enabled, flags)
        expected = {name: 10.0 * macs / plan.full_macs for name, macs in plan.macs_at(enabled, flags).items()}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_segments_share_what_the_whole_takes_and_heads_take_their_own(artifact):
    plan, times = artifact.plan, as_costs(artifact)
    slower = replace(times, segments={name: 2.0 * ms for name, ms in times.segments.items()})
    assert run_times(plan, slower, [], plan.mask(None)) == pytest.approx(run_times(plan, times, [], plan.mask(None)))
    (first, *_) = plan.exits
    head = times.segments[plan.head(first).name]
    taken = run_times(plan, slower, [first.name], plan.mask(None))[first.name]
    assert taken == pytest.approx(run_times(plan, times, [first.name], plan.mask(None))[first.name] + head)


def test_a_mean_is_over_where_runs_ended(artifact):
    plan, times = artifact.plan, as_costs(artifact)
    names = [point.name for point in plan.exits]
    found = run_times(plan, times, names, plan.mask(None))
    taken = np.array([0, 0, len(names)])
    assert mean_time(plan, times, names, plan.mask(None), taken) == pytest.approx((2 * found[names[0]] + found[FINAL]) / 3)


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
def test_every_segment_is_timed_where_it_runs(engine):
    artifact = compiled("identity")
    times = measure_segments(artifact, engine=engine, rounds=3)
    assert set(times.segments) == {segment.name for segment in artifact.plan.segments}
    assert min(times.whole_ms, *times.segments.values()) > 0
    assert (times.engine, times.threads, times.rounds) == ({"tvm": "tvm:host"}.get(engine, engine), 1, 3)
    assert times.conditions == conditions()
    assert artifact.with_times("here", times).times["here"] == times


def test_a_choice_for_another_machine_follows_from_its_times_and_nothing_is_timed_here(artifact, samples, monkeypatch):
    def no_clock(*_: object) -> None:
        raise AssertionError("timed here")

    monkeypatch.setattr(time_budget, "time_masks", no_clock)
    monkeypatch.setattr(time_budget, "_time_choice", no_clock)
    artifact = artifact.with_times("nano", as_costs(artifact))
    made = calibrate(artifact, samples, budget_ms=7.0, times="nano")
    promise = made.profile("default").promise
    assert (promise.kept, promise.kind) == (True, "budget-ms")
    assert promise.mean_ms <= 7.0
    assert promise.mean_ms == pytest.approx(10.0 * promise.mean_macs_share, rel=1e-6)
    assert f"{promise.mean_ms:.2f} ms by the times of its segments with tvm:orin-nano-8gb on orin-nano-8gb, 15W, clocks fixed; " in promise.note
    assert made.profile("default").engine == "onnxruntime"
    assert made.masks is None


def test_what_was_measured_of_masks_stays_beside_what_is_estimated(artifact, samples):
    measured = MaskTable(artifact.manifest.model_id, "tvm:orin-nano-8gb", 1, BOARD, 100, "", {"000": MaskMeasured(0.9, 0.0, 1.0, 12.0)})
    made = calibrate(artifact.with_masks(measured).with_times("nano", as_costs(artifact)), samples, budget_ms=7.0, times="nano")
    assert made.masks == measured


def test_a_board_with_more_time_keeps_more(artifact, samples):
    artifact = artifact.with_times("fast", as_costs(artifact, 5.0)).with_times("slow", as_costs(artifact, 50.0))
    fast, slow = (calibrate(artifact, samples, budget_ms=6.0, times=name).profile("default").promise for name in ("fast", "slow"))
    assert fast.accuracy >= slow.accuracy
    assert fast.kept
    assert fast.mean_macs_share > slow.mean_macs_share


def test_times_that_are_not_there_are_refused_with_those_there_are(artifact, samples):
    with pytest.raises(CalibrationError, match=r"^the artifact has no times 'nano'\n  hint: it has none; measure on the machine that is to answer"):
        calibrate(artifact, samples, budget_ms=7.0, times="nano")
    with pytest.raises(CalibrationError, match=r"no times 'agx'\n  hint: it has nano;"):
        calibrate(artifact.with_times("nano", as_costs(artifact)), samples, budget_ms=7.0, times="agx")


def test_times_without_a_promise_of_time_are_refused(artifact, samples):
    with pytest.raises(CalibrationError, match=r"^times serve a promise of time\n  hint: give --budget-ms with --times$"):
        calibrate(artifact.with_times("nano", as_costs(artifact)), samples, max_drop=0.01, times="nano")


def test_times_are_called_after_the_board_its_power_mode_and_the_engine(artifact):
    times = as_costs(artifact)
    assert name_of(times) == "orin-nano-8gb-15W-fixed-tvm"
    assert name_of(replace(times, engine="tvm:orin-nano-8gb.gpu.fp16", threads=2)) == "orin-nano-8gb-15W-fixed-tvm.gpu.fp16-2-threads"
    assert name_of(replace(times, engine="onnxruntime:cuda", conditions=replace(BOARD, clocks="free"))) == "orin-nano-8gb-15W-free-onnxruntime-cuda"
    long = Conditions("11th Gen Intel(R) Core(TM) i7-1185G7 with Radeon Graphics @ 3.00GHz", "", "")
    names = {name_of(replace(times, engine=engine, threads=n, conditions=long)) for engine in ("onnxruntime", "tvm:host") for n in (1, 2, 4)}
    assert len(names) == 6
    assert all(len(name) <= 64 for name in names)
    assert (
        name_of(replace(as_costs(artifact), engine="onnxruntime", conditions=Conditions("AMD EPYC (8 cores)", "", "")))
        == "AMD-EPYC-8-cores-onnxruntime"
    )
