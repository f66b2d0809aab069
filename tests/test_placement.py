"""`--exits auto` with data: probes everywhere, exits where they pay, none where they do not, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import exitify
from exitify import placement
from exitify.artifact.manifest import InputContract, Preprocess
from exitify.calibration import calibrate as calibration
from exitify.data import load_samples
from exitify.errors import CalibrationError, DataError, PlanError
from exitify.passes.choose_skips import ChooseSkips
from exitify.placement import Placement, place_by_data
from exitify.program import Program
from exitify.runtime.session import Session
from exitify.train.heads import HeadTraining
from tests import digits

TRAINING = HeadTraining(epochs=3, copies=1, batch=50, validation=0.1)


def captured() -> Program:
    model = digits.loaded()
    return exitify.capture(model.module, model.example, source=model.source)


def place(tmp_path: Path, program: Program | None = None, **options: object) -> Placement:
    given = {"held_out": digits.samples_of("calibration"), "training": TRAINING, "unit": "macs", "work": tmp_path / "work", **options}
    return place_by_data(program or captured(), digits.samples_of("train"), contract=digits.loaded().contract, **given)  # type: ignore[arg-type]


@pytest.fixture
def free_boundaries(monkeypatch):
    """The network of the tests is small; without the price of boundaries its exits pay."""
    monkeypatch.setattr(calibration, "boundary_macs", lambda _: 0)


@pytest.fixture
def found(tmp_path, free_boundaries) -> Placement:
    return place(tmp_path, max_drop=0.02)


def test_exits_stand_where_they_pay_and_their_heads_are_trained(found):
    assert found.program.plan.exits
    assert found.cost < 1
    assert found.drop <= 0.02
    assert found.reason == ""
    assert found.artifact.manifest.heads_trained
    session = Session(found.artifact)
    test = digits.samples_of("test")
    recording = session.record(test.inputs(slice(None)))
    probes = {(probe.value, probe.head): probe.accuracy for probe in found.probes}
    for point in found.artifact.plan.exits:
        accuracy = (recording.logits[point.name].argmax(1) == test.labels).mean()
        assert accuracy == pytest.approx(probes[point.after, point.head], abs=0.08)  # two samples of 400 and 500: three standard errors
        assert accuracy > 0.2


def test_every_probe_says_what_it_does_or_would_do(found):
    chosen = [(probe.value, probe.head) for probe in found.probes if probe.verdict == "exit"]
    assert chosen == [(point.after, point.head) for point in found.program.plan.exits]
    for probe in found.probes:
        assert probe.verdict == "exit" or "would save" in probe.verdict or "not sure enough" in probe.verdict
        assert 0 <= probe.worth.leaves <= probe.worth.comes_by <= 1
    saved = sum(probe.worth.saves - probe.worth.costs for probe in found.probes if probe.verdict == "exit")
    assert saved > 0
    assert {probe.head.kind for probe in found.probes} >= {"linear", "conv"}


def test_no_two_exits_stand_after_one_value(found):
    values = [point.after for point in found.program.plan.exits]
    assert len(set(values)) == len(values)


def test_the_recipe_makes_the_same_exits_again(found):
    from exitify.passes import make_pass

    program = captured()
    for text in found.artifact.manifest.model.recipe:
        program = make_pass(text)(program)
    assert program.plan == found.program.plan


def test_what_was_chosen_can_be_calibrated_and_runs(found):
    calibrated = exitify.calibrate(found.artifact, digits.samples_of("calibration"), max_drop=0.05)
    answer = Session(calibrated, profile="default").run(digits.samples_of("test").inputs([0]))
    assert answer.probabilities.shape == (10,)


def test_the_samples_that_probes_were_trained_on_are_remembered(found, caplog):
    exitify.calibrate(found.artifact, digits.samples_of("train"), max_drop=0.05)
    assert "the heads were trained on" in caplog.text


def test_where_no_exit_pays_the_answer_is_none_with_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "boundary_macs", lambda _: 10**8)
    found = place(tmp_path, max_drop=0.02)
    assert found.program.plan.exits == ()
    assert found.artifact.plan.exits == ()
    assert (found.cost, found.drop) == (1.0, 0.0)
    assert "would save" in found.reason or "is sure enough" in found.reason
    assert all(probe.verdict != "exit" for probe in found.probes)
    exported = Session(found.artifact).run(digits.samples_of("test").inputs([0]))
    assert exported.exit == "final"


def test_time_is_measured_on_the_engine_at_hand(tmp_path):
    found = place(tmp_path, max_drop=0.05, unit="ms")
    assert found.unit == "ms"
    assert "onnxruntime" in found.engine
    assert found.whole > 0


def test_a_budget_of_time_loses_as_little_as_it_can(tmp_path, free_boundaries, monkeypatch):
    """On a machine whose segments take a millisecond for a million multiply-adds."""
    measure = placement.measure_segments

    def by_macs(artifact, **given):
        ms = {segment.name: segment.cost.macs / 1e6 for segment in artifact.plan.segments}
        return replace(measure(artifact, **{**given, "rounds": 1}), whole_ms=artifact.plan.full_macs / 1e6, segments=ms)

    monkeypatch.setattr(placement, "measure_segments", by_macs)
    whole = place(tmp_path, max_drop=0.0, unit="ms").whole
    found = place(tmp_path, budget_ms=0.97 * whole, unit="ms")
    assert found.cost <= 0.97 + 1e-9


def test_an_interrupted_search_goes_on_with_what_it_recorded(tmp_path, free_boundaries):
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training heads" and done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        place(tmp_path, max_drop=0.02, progress=stop)
    recorded = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.features")}
    assert recorded
    stages: list[tuple[str, int]] = []
    again = place(tmp_path, max_drop=0.02, progress=lambda stage, done, total: stages.append((stage, done)))
    assert ("training heads", 0) not in stages  # goes on after the first epoch
    straight = place(tmp_path / "straight", max_drop=0.02)
    assert again.program.plan.exits == straight.program.plan.exits
    assert not any((tmp_path / "work").rglob("*"))


def test_the_same_seed_places_the_same_exits_and_draws_no_numbers_of_the_users(tmp_path, free_boundaries):
    first, second = (place(tmp_path / str(i), max_drop=0.02, seed=3) for i in range(2))
    assert first.artifact.manifest.model_id == second.artifact.manifest.model_id


def test_without_held_out_samples_a_part_of_the_data_is_judged_on(tmp_path, free_boundaries):
    found = place(tmp_path, held_out=None, max_drop=0.02)
    assert found.probes
    assert 0 < found.accuracy <= 1


def test_memorised_samples_are_warned_about(tmp_path):
    x, y = digits.pictures()["train"]
    np.savez(tmp_path / "easy.npz", x=x, y=y)
    model = digits.loaded()
    samples = load_samples(str(tmp_path / "easy.npz"), model.contract, classes=10)
    own = Session(digits.artifact_without_exits()).record(samples.inputs(slice(None))).logits["final"]
    np.savez(tmp_path / "own.npz", x=x, y=own.argmax(1))  # right on every one
    found = place(tmp_path, held_out=load_samples(str(tmp_path / "own.npz"), model.contract, classes=10), max_drop=0.02)
    assert "they look memorised" in found.warning


def test_exits_by_data_and_skip_paths_go_together(tmp_path, free_boundaries):
    from examples.cifar_resnet56.model import CifarResNet

    torch.manual_seed(0)
    model = CifarResNet(2, classes=10).eval()
    contract = InputContract((3, 16, 16), preprocess=Preprocess())
    program = ChooseSkips("auto")(exitify.capture(model, torch.zeros(1, 3, 16, 16)))
    x, y = digits.pictures()["train"]
    np.savez(tmp_path / "rgb.npz", x=np.repeat(x, 3, axis=3), y=y)
    samples = load_samples(str(tmp_path / "rgb.npz"), contract, classes=10)
    found = place_by_data(program, samples, contract=contract, max_drop=0.9, unit="macs", training=TRAINING, work=tmp_path / "work")
    assert found.artifact.plan.skips
    skipped = {path.name for path in found.program.plan.skips}
    within = [place.verdict for place in found.turned_down if "may leave out" in place.verdict]
    assert within
    assert all(any(name in verdict for name in skipped) for verdict in within)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_drop": 0.01, "budget_ms": 3.0}, "exits are placed for one promise"),
        ({"budget_ms": 3.0}, "--budget-ms is a time, and costs were asked for in multiply-adds"),
        ({"budget_ms": 0.0, "unit": "ms"}, "--budget-ms 0 is no time"),
        ({"max_drop": 2.0}, "--max-drop 2 is no share of the samples"),
    ],
)
def test_promises_that_make_no_sense_are_refused(tmp_path, options, problem):
    with pytest.raises(CalibrationError, match=problem):
        place(tmp_path, **options)


def test_too_few_samples_are_refused_with_how_many_are_needed(tmp_path):
    few = digits.samples_of("train").subset(slice(0, 60))
    with pytest.raises(DataError, match=r"60 samples to train probes on and 500 to choose by are too few\n  hint: give at least 100 and 50"):
        place_by_data(captured(), few, contract=digits.loaded().contract, held_out=digits.samples_of("calibration"))


def test_a_network_without_a_place_is_refused_with_what_was_turned_down(tmp_path):
    program = exitify.capture(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval(), torch.zeros(1, 1, 16, 16))
    with pytest.raises(PlanError, match=r"no exit can stand in this network: .*outside 5% to 95% of the cost\n  hint: see --why"):
        place(tmp_path, program)


class Overflows(nn.Module):
    """The digits' network, with values in its middle that float16 cannot hold."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner.stage3(self.inner.stage2(self.inner.stage1(x))) * 1e6
        x = self.inner.stage4[2](self.inner.stage4[1](self.inner.stage4[0](x) / 1e6))
        return self.inner.fc(x.mean((2, 3)))


def test_a_value_that_cannot_be_recorded_is_turned_down_and_the_others_probed(tmp_path, free_boundaries):
    program = exitify.capture(Overflows(digits.network()).eval(), torch.zeros(1, 1, 16, 16))
    found = place(tmp_path, program, max_drop=0.02)
    assert any("its values go beyond 60000, and features are recorded in float16" in place.verdict for place in found.turned_down)
    assert found.probes


def test_the_gap_is_how_far_the_cost_is_from_its_bound(found):
    assert 0 <= found.bound <= found.cost
    assert found.gap == pytest.approx(1 - found.bound / found.cost)
