"""What a timing says beside its times: those depend on the machine, and no test asserts one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exitify.artifact.artifact import Artifact
from exitify.benchmark import BenchReport, Timing, bench
from exitify.errors import DataError, EngineError, ExitifyError, UnknownProfile
from exitify.runtime.answers import Answer
from exitify.runtime.session import Session
from tests import digits

MOST = 60


@pytest.fixture(scope="module")
def calibrated() -> Artifact:
    """Both exits on, so that some samples leave at each of the three."""
    artifact = digits.trained_artifact()
    return artifact.with_profile("default", digits.profile(artifact, {"exit1": 0.8, "exit2": 0.8}))


@pytest.fixture(scope="module")
def report(calibrated: Artifact) -> BenchReport:
    return bench(calibrated, digits.samples_of("test"), against=("onnxruntime", "torch"), model=digits.network(), most=MOST, seed=3)


@pytest.fixture(scope="module")
def answers(calibrated: Artifact) -> list[tuple[Answer, int, np.ndarray]]:
    """What a session says of the same samples, one by one, with their labels and inputs."""
    samples, session = digits.samples_of("test"), Session(calibrated)
    rows = np.random.default_rng(3).permutation(len(samples))[:MOST]
    return [(session.run(x), int(label), x) for x, label in zip(samples.inputs(rows), samples.labels[rows], strict=True)]


def timing(report: BenchReport, name: str) -> Timing:
    (found,) = (t for t in report.timings if t.name == name)
    return found


def test_the_contenders_come_in_the_order_given_and_the_artifact_last(report: BenchReport) -> None:
    assert [t.name for t in report.timings] == ["onnxruntime", "torch", "exitify"]
    assert (report.samples, report.threads) == (MOST, 1)


def test_the_artifact_is_right_as_often_as_its_session(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]]) -> None:
    assert timing(report, "exitify").accuracy == pytest.approx(np.mean([answer.label == label for answer, label, _ in answers]))


def test_the_others_are_right_as_often_as_the_network(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]]) -> None:
    inputs = torch.from_numpy(np.stack([x for _, _, x in answers]))
    with torch.no_grad():
        said = digits.network()(inputs).argmax(1).tolist()
    accuracy = np.mean([answer == label for answer, (_, label, _) in zip(said, answers, strict=True)])
    assert timing(report, "torch").accuracy == pytest.approx(accuracy)
    assert timing(report, "onnxruntime").accuracy == pytest.approx(accuracy)


def test_exits_and_costs_are_those_of_the_session(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]], calibrated: Artifact) -> None:
    left = [answer.exit for answer, _, _ in answers]
    assert report.exits == {name: pytest.approx(left.count(name) / MOST) for name in ("exit1", "exit2", "final")}
    assert min(report.exits.values()) > 0  # or this would test little
    assert report.mean_macs_share == pytest.approx(np.mean([answer.macs for answer, _, _ in answers]) / calibrated.plan.full_macs)


def test_without_a_profile_nothing_leaves_early() -> None:
    report = bench(digits.trained_artifact(), digits.samples_of("test"), most=20)
    assert report.exits == {"exit1": 0.0, "exit2": 0.0, "final": 1.0}
    assert report.mean_macs_share == 1.0
    assert timing(report, "exitify").accuracy == timing(report, "onnxruntime").accuracy


def test_a_profile_is_chosen_by_name(calibrated: Artifact) -> None:
    both = calibrated.with_profile("first", digits.profile(calibrated, {"exit1": 0.0}))
    assert bench(both, digits.samples_of("test"), profile="first", most=20).exits == {"exit1": 1.0, "exit2": 0.0, "final": 0.0}


def test_the_first_contender_is_the_unit_of_the_ratios(report: BenchReport) -> None:
    first = report.timings[0]
    assert first.mean_ratio == 1.0
    assert first.spread == (1.0, 1.0)
    for t in report.timings:
        assert all(math.isfinite(value) and value > 0 for value in (t.mean_ms, t.p50_ms, t.p95_ms, t.mean_ratio, *t.spread))
        assert t.p50_ms <= t.p95_ms
        assert t.spread[0] <= t.mean_ratio <= t.spread[1]


def test_no_contender_leaves_the_artifact_alone_with_itself() -> None:
    report = bench(digits.trained_artifact(), digits.samples_of("test"), against=(), most=5)
    assert [(t.name, t.mean_ratio) for t in report.timings] == [("exitify", 1.0)]


def test_no_more_samples_are_timed_than_there_are() -> None:
    assert bench(digits.trained_artifact(), digits.samples_of("test").subset(range(7)), most=1000).samples == 7


def test_progress_ends_at_the_last_sample() -> None:
    calls: list[tuple[str, int, int]] = []
    bench(digits.trained_artifact(), digits.samples_of("test"), most=60, progress=lambda *given: calls.append(given))
    assert calls == [("timing", 0, 60), ("timing", 50, 60), ("timing", 60, 60)]


# --- refusals


def test_an_unknown_contender_is_refused() -> None:
    with pytest.raises(ExitifyError, match="no contender 'jax'") as caught:
        bench(digits.trained_artifact(), digits.samples_of("test"), against=("onnxruntime", "jax"), most=5)
    assert caught.value.hint == "there are onnxruntime, tvm, torch, inductor"


@pytest.mark.parametrize("name", ["torch", "inductor"])
def test_torch_without_the_model_is_refused(name: str) -> None:
    with pytest.raises(ExitifyError, match=f"timing against {name} needs the original model") as caught:
        bench(digits.trained_artifact(), digits.samples_of("test"), against=(name,), most=5)
    assert "--model" in caught.value.hint


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} samples are too few"):
        bench(digits.trained_artifact(), digits.samples_of("test").subset(range(count)))


def test_an_unknown_profile_or_engine_is_refused() -> None:
    with pytest.raises(UnknownProfile, match="no profile 'fast'"):
        bench(digits.trained_artifact(), digits.samples_of("test"), profile="fast")
    with pytest.raises(EngineError, match="no engine 'jax'"):
        bench(digits.trained_artifact(), digits.samples_of("test"), engine="jax")


def test_the_samples_are_a_choice_by_seed() -> None:
    """The network errs on some, so that 25 of them are not always right as often."""
    samples = digits.samples_of("test")
    accuracy = [bench(digits.trained_artifact(), samples, most=25, seed=seed).timings[-1].accuracy for seed in (0, 0, 1, 2, 3, 4, 5)]
    assert accuracy[0] == accuracy[1]
    assert len(set(accuracy)) > 1
