"""A session under a mask: every engine answers as torch does, nothing left out is run, and wrong masks are refused."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Conditions, MaskMeasured, MaskTable
from exitify.errors import DataError, LibraryRefused, MalformedManifest, PlanError
from exitify.lower.pipeline import compile_artifact
from exitify.lower.processors import machine_of
from exitify.plan import FINAL
from exitify.runtime.engines.onnxruntime import OnnxRuntimeEngine
from exitify.runtime.session import Session
from exitify.targets import load_target
from exitify.targets.board import conditions
from tests.artifacts import profile_for
from tests.skipping import MASKS, pictures, skipping, torch_says

ENGINES = ("onnxruntime", "tvm", "reference")
X = pictures(3)


@functools.cache
def compiled() -> Artifact:
    return compile_artifact(skipping()[1], load_target("host"))


def session(engine: str = "onnxruntime", **options: object) -> Session:
    return Session(compiled() if engine == "tvm" else skipping()[1], engine=engine, **options)  # type: ignore[arg-type]


def test_every_mask_answers_otherwise():
    answers = [torch_says(mask, X)[FINAL] for mask in MASKS]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", MASKS)
def test_an_engine_says_what_torch_says_under_every_mask(engine, mask):
    expected, found = torch_says(mask, X), session(engine).record(X, mask).logits
    assert list(found) == list(expected)
    for name, logits in expected.items():
        np.testing.assert_allclose(found[name], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_one_session_switches_between_all_masks(engine):
    running = session(engine)
    for mask in [*MASKS, *reversed(MASKS)]:
        answer = running.run(X[0], mask)
        np.testing.assert_allclose(answer.logits, torch_says(mask, X[:1])[FINAL][0], rtol=1e-5, atol=1e-5)
        assert answer.macs == skipping()[1].plan.macs_at((), mask)[FINAL]
        batch = running.run_batch(X, [flag == "1" for flag in mask])
        np.testing.assert_allclose(batch[0].logits, answer.logits, rtol=1e-5, atol=1e-5)


def test_leaving_nothing_out_is_the_session_without_a_mask():
    running = session()
    for mask in ("000", "none", (False, False, False)):
        np.testing.assert_array_equal(running.run(X[0], mask).logits, running.run(X[0]).logits)


def test_a_mask_is_prepared_once():
    running = session()
    engine = running.engine
    assert isinstance(engine, OnnxRuntimeEngine)
    running.prepare("101")
    known = len(engine._runners)
    for _ in range(3):
        running.run(X[0], "101")
        running.run(X[0])
        running.run_batch(X, "101")
    assert len(engine._runners) == known == 2
    with pytest.raises(PlanError, match="is not one 0 or 1"):
        running.prepare("1")


def test_a_left_out_block_is_not_run(monkeypatch):
    prepared: list[tuple[str, ...]] = []
    plain = OnnxRuntimeEngine.joined

    def joined(self, stretch):
        model, outside = plain(self, stretch)
        prepared.append(tuple(outside))
        return model, outside

    monkeypatch.setattr(OnnxRuntimeEngine, "joined", joined)
    running = session()
    prepared.clear()
    running.run(X[0], "010")
    read = {name for names in prepared for name in names}
    assert not [name for name in read if name.startswith("layer2.1.")]
    assert [name for name in read if name.startswith("layer3.1.")]
    assert "skip_norms.layer2.0.bn1.weight" in read
    assert "layer2.0.bn1.weight" not in read
    assert "skip_norms.layer1.0.bn1.weight" not in read


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_exits_and_a_mask_work_together(engine):
    artifact = compiled() if engine == "tvm" else skipping()[1]
    for mask in ("000", "010", "111"):
        logits = torch_says(mask, X)
        top = {name: np.exp(values).max(axis=1) / np.exp(values).sum(axis=1) for name, values in logits.items()}
        order = np.argsort(top["exit1"])
        threshold = float(top["exit1"][order[1:]].mean())
        profile = replace(profile_for(artifact, {"exit1": threshold, "exit2": 0.0}), skip=mask)
        running = Session(artifact.with_profile("both", profile), engine=engine, profile="both")
        assert running.mask == mask
        for x, early, late, score in zip(X, logits["exit1"], logits["exit2"], top["exit1"]):
            answer = running.run(x)
            assert answer.exit == ("exit1" if score >= threshold else "exit2")
            np.testing.assert_allclose(answer.logits, early if answer.exit == "exit1" else late, rtol=1e-5, atol=1e-5)
            assert answer.macs == artifact.plan.macs_at(("exit1", "exit2"), mask)[answer.exit]


def test_thresholds_belong_to_their_mask():
    artifact = skipping()[1]
    made = artifact.with_profile("both", replace(profile_for(artifact, {"exit1": 0.5}), skip="010"))
    running = Session(made, profile="both")
    running.run(X[0], "010")
    with pytest.raises(PlanError, match=r"the profile 'both' was calibrated for the mask 010, not 111\n  hint: .*--skip 111"):
        running.run(X[0], "111")
    running.use("none")
    assert running.run(X[0], "111").exit == FINAL


def test_profiles_with_other_masks_are_switched_between_two_calls():
    artifact = skipping()[1]
    for mask in ("111", "001"):
        artifact = artifact.with_profile(f"m{mask}", replace(profile_for(artifact, {}), skip=mask))
    running = Session(artifact)
    for mask in ("111", "001", "111"):
        running.use(f"m{mask}")
        np.testing.assert_allclose(running.run(X[0]).logits, torch_says(mask, X[:1])[FINAL][0], rtol=1e-5, atol=1e-5)
    running.use(None)
    assert running.mask == "000"


@pytest.mark.parametrize("mask", ["", "01", "0110", "01x", (True,), (0, 2, 0), "ALL"])
def test_a_mask_of_another_length_or_other_values_is_refused(mask):
    for call in (session().run, session().run_batch, session().record):
        with pytest.raises(PlanError, match=r"is not one 0 or 1 for each of the 3 skip paths\n  hint: .*skip1 \(layer1\), skip2 \(layer2\)"):
            call(X[0] if call.__name__ == "run" else X, mask)


def test_threads_under_different_masks_do_not_disturb_each_other():
    for engine in ENGINES[:2]:
        running = session(engine)
        wrong: list[str] = []

        def work(mask: str, running: Session = running, wrong: list[str] = wrong) -> None:
            expected = torch_says(mask, X)[FINAL]
            for i in range(30):
                if not np.allclose(running.run(X[i % 3], mask).logits, expected[i % 3], rtol=1e-5, atol=1e-5):
                    wrong.append(mask)

        threads = [threading.Thread(target=work, args=(mask,)) for mask in MASKS[::2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


# --- masks by time


def measured(**times: float) -> MaskTable:
    rows = {name.removeprefix("m"): MaskMeasured(0.5 + ms / 100, 0.1, 0.5, ms) for name, ms in times.items()}
    return MaskTable(skipping()[1].manifest.model_id, "onnxruntime", 1, conditions(), 100, "", rows)


def test_a_budget_takes_the_most_accurate_mask_that_fits():
    running = Session(skipping()[1].with_masks(measured(m000=10.0, m010=7.0, m100=6.0, m111=4.0)))
    for budget, mask in ((10, "000"), (9.99, "010"), (6.5, "100"), (4, "111")):
        running.use(budget_ms=budget)
        assert running.mask == mask
        np.testing.assert_allclose(running.run(X[0]).logits, torch_says(mask, X[:1])[FINAL][0], rtol=1e-5, atol=1e-5)


def test_a_budget_that_no_mask_fits_is_refused():
    with pytest.raises(DataError, match=r"no mask answers within 3 ms; the fastest takes 4"):
        Session(skipping()[1].with_masks(measured(m000=10.0, m111=4.0))).use(budget_ms=3)
    with pytest.raises(DataError, match=r"does not say how long its masks take\n  hint: .*--budget-ms"):
        session().use(budget_ms=3)


@pytest.mark.parametrize("change", [{"engine": "tvm"}, {"engine": "onnxruntime:cuda"}, {"threads": 4}, {"conditions": Conditions("another", "", "")}])
def test_times_of_another_engine_or_machine_are_not_used(change):
    running = Session(skipping()[1].with_masks(replace(measured(m000=10.0), **change)))
    with pytest.raises(DataError, match=r"the masks were timed with .*\n  hint: measure them here: .*--engine onnxruntime --threads 1"):
        running.use(budget_ms=20)


def test_measurements_of_another_network_cannot_be_added():
    with pytest.raises(MalformedManifest, match=r"masks\.json was measured on another network"):
        skipping()[1].with_masks(replace(measured(m000=1.0), model_id="another"))


# --- what is compiled


def test_both_sets_of_norms_share_the_weights_of_convolutions():
    made = compiled().targets["host"]
    for name, segment in made.segments.items():
        two_sets = compiled().plan.segment(name).has_two_norm_sets
        assert len(segment.second_weights) == (len(segment.weights) if two_sets else 0)
        assert bool(segment.second_graph) == two_sets
        if two_sets:
            shared = set(segment.weights) & set(segment.second_weights)
            arrays = compiled().tensors("targets/host/weights.safetensors")
            assert shared
            for one in set(segment.weights) - shared:
                images, _, height, width, block = arrays[one].shape  # a factor or a summand a channel, in blocks
                assert (images, height, width, block) == (1, 1, 1, machine_of(load_target("host")).vectors.lanes)


def test_a_library_of_other_second_norms_is_refused_as_stale():
    program, artifact = skipping()
    made = compiled()
    record = made.targets["host"]
    name = next(name for name in record.sources if name.startswith("skip_norms."))
    stale = replace(record, sources={**record.sources, name: "0" * 64})
    files = made.files
    altered = made.with_target(stale, bytes(files["targets/host/library.so"]), bytes(files["targets/host/weights.safetensors"]))
    with pytest.raises(LibraryRefused, match=f"stale: it was compiled from another '{name}'"):
        Session(altered, engine="tvm")
    assert program
    assert artifact
