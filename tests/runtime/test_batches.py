"""A library with functions for several samples: what they answer, which of them run, and what is refused."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact
from exitify.errors import EngineError, ExitifyError, LibraryRefused
from exitify.lower import library as lowering
from exitify.lower.pipeline import compile_artifact
from exitify.runtime.engines import make_engine
from exitify.runtime.engines import tvm as tvm_engine
from exitify.runtime.session import Session
from exitify.targets import load_target
from tests import skipping
from tests.artifacts import exported, inputs, profile_for
from tests.compiled import HOST, thresholds, with_record
from tests.runtime.test_tvm_engine import alike

SIZES = (2, 5)


@functools.cache
def in_batches(name: str) -> Artifact:
    """A network with a library for one sample and for these sizes."""
    return compile_artifact(exported(name)[1], load_target(HOST), batches=SIZES)


@pytest.mark.parametrize("name", ["plain", "identity", "depthwise"])
def test_every_segment_has_functions_for_the_sizes_over_the_same_weights(name: str) -> None:
    artifact, alone = in_batches(name), compile_artifact(exported(name)[1], load_target(HOST))
    record = artifact.targets[HOST]
    assert {made.batches for made in record.segments.values()} == {SIZES}
    assert artifact.files[f"targets/{HOST}/weights.safetensors"] == alone.files[f"targets/{HOST}/weights.safetensors"]
    assert all(0 < made.error < record.tolerance for made in record.segments.values())


@pytest.mark.parametrize("name", ["identity", "depthwise", "transformer"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 13])
def test_a_batch_is_answered_as_sample_by_sample(name: str, count: int) -> None:
    artifact, x = in_batches(name), inputs(24)
    artifact = artifact.with_profile("default", profile_for(artifact, thresholds(artifact, x)))
    session = Session(artifact, engine="tvm")
    alike(session.run_batch(x[:count]), [session.run(row) for row in x[:count]])


def test_a_batch_runs_in_the_largest_parts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("tvm", in_batches("plain"), 1)
    (whole,) = engine.artifact.plan.stretches(())
    run, asked = engine.prepare(whole), []
    real = tvm_engine._Runner._computed
    monkeypatch.setattr(tvm_engine._Runner, "_computed", lambda self, values, batch: asked.append(batch) or real(self, values, batch))
    run({engine.artifact.plan.input: inputs(13)})
    assert asked == [5, 5, 2, 1]


def test_skip_paths_may_be_left_out_in_batches() -> None:
    _, artifact = skipping.skipping()
    artifact = compile_artifact(artifact, load_target(HOST), batches=(3,))
    x = skipping.pictures(7)
    for skip in ("none", "all"):
        found, expected = (Session(artifact, engine=engine).run_batch(x, skip=skip) for engine in ("tvm", "onnxruntime"))
        alike(found, expected)


@pytest.mark.parametrize("sizes", [(1, 4), (4, 2), (2, 2), (0,), (-1,)], ids=str)
def test_sizes_that_are_none_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ExitifyError, match=r"cannot be compiled for\n  hint: give sizes from 2 in ascending order: --batch 4,16"):
        compile_artifact(exported("plain")[1], load_target(HOST), batches=sizes)


def test_a_segment_whose_code_for_several_samples_takes_other_weights_runs_sample_by_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, seen = lowering.lift_constants, []

    def other(function):
        lifted, constants = real(function)
        seen.append(1)
        return lifted, [constant + 1 for constant in constants] if len(seen) == 2 else constants  # the first segment's second function

    monkeypatch.setattr(lowering, "lift_constants", other)
    artifact = compile_artifact(exported("identity")[1], load_target(HOST), batches=(4,))
    first, *others = artifact.plan.segments
    made = artifact.targets[HOST].segments
    assert made[first.name].batches == ()
    assert {made[segment.name].batches for segment in others} == {(4,)}
    assert f"{first.name} has no code for batches of 4" in caplog.text
    x = inputs(6)
    alike(Session(artifact, engine="tvm").run_batch(x), Session(artifact, engine="onnxruntime").run_batch(x))


def test_a_function_that_the_library_lacks_is_refused_by_name() -> None:
    artifact = in_batches("plain")
    segments = {name: made.__class__(*[*list(vars(made).values())[:4], (7,), made.error]) for name, made in artifact.targets[HOST].segments.items()}
    session = Session(with_record(artifact, segments=segments), engine="tvm")
    with pytest.raises((LibraryRefused, EngineError), match="_batch7"):
        session.run_batch(inputs(7))


def test_maps_between_stretches_are_taken_in_both_forms() -> None:
    """As the plan describes them, and as the library keeps them."""
    artifact = in_batches("identity")
    engine = make_engine("tvm", artifact, 1)
    kept = artifact.targets[HOST].in_blocks
    assert kept
    first, second = artifact.plan.stretches(("exit1",))
    values = {artifact.plan.input: inputs(3)}
    heads = {**artifact.classifiers(), **{point.temperature: np.ones((), np.float32) for point in artifact.plan.exits}}
    found = engine.prepare(first)({**values, **{name: heads[name] for name in first.parameters}})
    between = set(second.inputs) & set(kept)
    assert {found[name].ndim for name in between} == {5}
    rows = {name: engine.rows(name, found[name]) for name in between}
    assert all(array.shape == (3, *artifact.plan.values[name].shape) for name, array in rows.items())
    run, given = engine.prepare(second), {name: heads[name] for name in second.parameters}
    np.testing.assert_array_equal(*(run({**values, **found, **given, **forms})[artifact.plan.output] for forms in ({}, rows)))
