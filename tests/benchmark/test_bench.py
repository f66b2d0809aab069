"""What a benchmark says beside its times: those depend on the machine, and no test asserts one."""

from __future__ import annotations

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exitify.artifact.artifact import Artifact
from exitify.benchmark import BenchReport, Timing, bench, compare
from exitify.benchmark.worker import NotHandedOver
from exitify.errors import DataError, EngineError, ExitifyError, ModelError, UnknownProfile
from exitify.onnx_export.static import export_static
from exitify.records import from_json, to_json
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
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smaller") / "up_to_exit1.onnx"
    onnx.save(export_static(digits.trained_artifact(), exit="exit1"), path)
    return path


@pytest.fixture(scope="module")
def report(calibrated: Artifact, smaller: Path) -> BenchReport:
    samples, model = digits.samples_of("test"), digits.network()
    return bench(calibrated, samples, against=("onnxruntime", "torch"), smaller=smaller, model=model, most=MOST, rounds=2, seed=3)


@pytest.fixture(scope="module")
def answers(calibrated: Artifact) -> list[tuple[Answer, int, np.ndarray]]:
    """What a session says of the same samples, one by one, with their labels and inputs."""
    samples, session = digits.samples_of("test"), Session(calibrated)
    rows = np.random.default_rng(3).permutation(len(samples))[:MOST]
    return [(session.run(x), int(label), x) for x, label in zip(samples.inputs(rows), samples.labels[rows], strict=True)]


def timing(report: BenchReport, name: str) -> Timing:
    (found,) = (t for t in report.timings if t.name == name)
    return found


def quick(artifact: Artifact, **options: Any) -> BenchReport:
    """One round of a few samples."""
    return bench(artifact, digits.samples_of("test"), **{"most": 5, "rounds": 1, "memory": False, **options})


def test_the_untransformed_network_comes_first_and_again_and_the_artifact_last(report: BenchReport) -> None:
    assert [t.name for t in report.timings] == ["onnxruntime", "onnxruntime again", "torch", "up_to_exit1.onnx", "exitify"]
    assert [t.role for t in report.timings] == ["baseline", "again", "against", "smaller", "artifact"]
    assert [t.engine for t in report.timings] == ["onnxruntime", "onnxruntime", "torch", "onnxruntime", "onnxruntime"]
    assert (report.baseline, report.again, report.artifact) == (report.timings[0], report.timings[1], report.timings[-1])
    assert (report.samples, report.rounds, report.threads, report.precision) == (MOST, 2, 1, "fp32")


@pytest.mark.parametrize("against", [(), ("onnxruntime",), ("onnxruntime", "onnxruntime")])
def test_the_untransformed_network_is_there_whatever_is_asked_for(against: tuple[str, ...]) -> None:
    assert [t.name for t in quick(digits.trained_artifact(), against=against).timings] == ["onnxruntime", "onnxruntime again", "exitify"]


def test_it_is_in_the_engine_that_runs_the_artifact() -> None:
    report = quick(digits.trained_artifact(), engine="reference", most=2)
    assert [(t.name, t.engine) for t in report.timings] == [
        ("reference", "reference"),
        ("reference again", "reference"),
        ("onnxruntime", "onnxruntime"),
        ("exitify", "reference"),
    ]
    assert set(report.versions) == {"exitify", "Python", "onnx", "onnxruntime"}


def test_the_artifact_is_right_as_often_as_its_session(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]]) -> None:
    assert report.artifact.accuracy == pytest.approx(np.mean([answer.label == label for answer, label, _ in answers]))


def test_the_others_are_right_as_often_as_the_network(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]]) -> None:
    inputs = torch.from_numpy(np.stack([x for _, _, x in answers]))
    with torch.no_grad():
        said = digits.network()(inputs).argmax(1).tolist()
    accuracy = np.mean([answer == label for answer, (_, label, _) in zip(said, answers, strict=True)])
    for name in ("onnxruntime", "onnxruntime again", "torch"):
        assert timing(report, name).accuracy == pytest.approx(accuracy)


def test_a_smaller_network_is_right_as_often_as_it_is(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]]) -> None:
    session = Session(digits.trained_artifact())
    accuracy = np.mean([session.run(x, exit="exit1").label == label for _, label, x in answers])
    assert timing(report, "up_to_exit1.onnx").accuracy == pytest.approx(accuracy)
    assert accuracy < report.baseline.accuracy  # or this would test little


def test_exits_and_costs_are_those_of_the_session(report: BenchReport, answers: list[tuple[Answer, int, np.ndarray]], calibrated: Artifact) -> None:
    left = [answer.exit for answer, _, _ in answers]
    assert report.exits == {name: pytest.approx(left.count(name) / MOST) for name in ("exit1", "exit2", "final")}
    assert min(report.exits.values()) > 0  # or this would test little
    assert report.mean_macs_share == pytest.approx(np.mean([answer.macs for answer, _, _ in answers]) / calibrated.plan.full_macs)


def test_without_a_profile_nothing_leaves_early() -> None:
    report = quick(digits.trained_artifact(), most=20)
    assert report.exits == {"exit1": 0.0, "exit2": 0.0, "final": 1.0}
    assert report.mean_macs_share == 1.0
    assert report.profile is None
    assert report.artifact.accuracy == report.baseline.accuracy


def test_a_profile_is_chosen_by_name(calibrated: Artifact) -> None:
    both = calibrated.with_profile("first", digits.profile(calibrated, {"exit1": 0.0}))
    report = quick(both, profile="first")
    assert report.exits == {"exit1": 1.0, "exit2": 0.0, "final": 0.0}
    assert report.profile == "first"
    assert quick(both, profile="none").exits["final"] == 1


def test_the_untransformed_network_is_the_unit_of_the_ratios(report: BenchReport) -> None:
    assert (report.baseline.ratio, report.baseline.interval, report.baseline.rounds, report.baseline.noise) == (1.0, (1.0, 1.0), (1.0, 1.0), 0.0)
    for t in report.timings:
        assert all(math.isfinite(value) and value > 0 for value in (t.mean_ms, t.p50_ms, t.p95_ms, t.ratio, *t.interval, *t.rounds, t.throughput))
        assert t.p50_ms <= t.p95_ms
        assert t.interval[0] <= t.ratio <= t.interval[1]
        assert t.throughput == pytest.approx(1e3 / t.mean_ms)
        assert len(t.rounds) == 2


def test_memory_is_of_each_contender_alone(report: BenchReport) -> None:
    """Torch is loaded in one of the processes only, though the test's own holds it, and holds more than ONNX Runtime's."""
    resident = {t.name: t.rss_mib for t in report.timings}
    assert all(value is not None and 20 < value < 4096 for value in resident.values())
    assert resident["torch"] > resident["onnxruntime"] + 50  # type: ignore[operator]
    assert resident["onnxruntime"] == resident["onnxruntime again"]


def test_the_same_samples_are_chosen_again_and_others_with_another_seed() -> None:
    """The network errs on some, so that 25 of them are not always right as often."""
    accuracy = [quick(digits.trained_artifact(), most=25, seed=seed).baseline.accuracy for seed in (0, 0, 1, 2, 3)]
    assert accuracy[0] == accuracy[1]
    assert len(set(accuracy)) > 1


def test_no_more_samples_are_timed_than_there_are() -> None:
    samples = digits.samples_of("test").subset(range(7))
    assert bench(digits.trained_artifact(), samples, most=1000, rounds=1, memory=False).samples == 7


def test_progress_goes_through_all_rounds() -> None:
    calls: list[tuple[str, int, int]] = []
    quick(digits.trained_artifact(), most=60, rounds=2, memory=True, progress=lambda *given: calls.append(given))
    assert [given for given in calls if given[0] == "timing"] == [("timing", i, 120) for i in (0, 50, 60, 60, 110, 120)]
    assert [given for given in calls if given[0] == "answering"] == [("answering", i, 60) for i in (0, 50, 60)]
    assert calls[-1] == ("measuring memory", 3, 3)


def test_a_report_survives_json(report: BenchReport) -> None:
    assert from_json(BenchReport, to_json(report), "report") == report


def test_a_model_that_no_other_process_can_have_is_timed_in_this_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Local(type(digits.network())):  # type: ignore[misc]
        """Of a function, and so of no name that could be imported."""

    model = Local()
    model.load_state_dict(digits.network().state_dict())
    with caplog.at_level(logging.WARNING):
        report = quick(digits.trained_artifact(), against=("torch",), model=model, rounds=2, memory=True)
    assert timing(report, "torch").rss_mib is None
    assert report.baseline.rss_mib is not None
    assert len(timing(report, "torch").rounds) == 2
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "rounds run in this process",
        "the memory of torch is not measured",
    ]


def test_torch_has_its_threads_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: object, **_named: object) -> None:
        raise NotHandedOver("not in this test")

    monkeypatch.setattr(compare, "call_alone", refuse)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quick(digits.trained_artifact(), against=("torch",), model=digits.network(), threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_run_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("timing", 50):
            raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        quick(digits.trained_artifact(), most=60, progress=press)
    assert list(tmp_path.iterdir()) == []


# --- refusals


def test_an_unknown_contender_is_refused() -> None:
    with pytest.raises(ExitifyError, match="no contender 'jax'") as caught:
        quick(digits.trained_artifact(), against=("onnxruntime", "jax"))
    assert caught.value.hint == "there are onnxruntime, tvm, torch, inductor, openvino"


@pytest.mark.parametrize("name", ["torch", "inductor"])
def test_torch_without_the_model_is_refused(name: str) -> None:
    with pytest.raises(ExitifyError, match=f"timing against {name} needs the original model") as caught:
        quick(digits.trained_artifact(), against=(name,))
    assert "--model" in caught.value.hint


def test_a_model_of_other_weights_is_refused_and_by_how_much_it_differs() -> None:
    model = type(digits.network())()
    with pytest.raises(
        ModelError, match=r"torch is not the artifact's network: on 5 samples its logits differ by \d\S* of the largest, more than 0.001"
    ):
        quick(digits.trained_artifact(), against=("torch",), model=model)


def test_a_model_with_logits_among_other_outputs_is_timed_by_them() -> None:
    report = quick(digits.trained_artifact(), against=("torch",), model=digits_among_others())
    assert timing(report, "torch").accuracy == report.baseline.accuracy


def digits_among_others() -> torch.nn.Module:
    from tests.benchmark.networks import AmongOthers

    return AmongOthers(digits.network())


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} samples are too few"):
        bench(digits.trained_artifact(), digits.samples_of("test").subset(range(count)))


def test_no_rounds_are_refused() -> None:
    with pytest.raises(DataError, match="0 rounds"):
        quick(digits.trained_artifact(), rounds=0)


def test_an_unknown_profile_or_engine_is_refused() -> None:
    with pytest.raises(UnknownProfile, match="no profile 'fast'"):
        quick(digits.trained_artifact(), profile="fast")
    with pytest.raises(EngineError, match="no engine 'jax'"):
        quick(digits.trained_artifact(), engine="jax")


def test_a_missing_library_is_refused() -> None:
    with pytest.raises(EngineError, match="no compiled library"):
        quick(digits.trained_artifact(), against=("tvm",))
