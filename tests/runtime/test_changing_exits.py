"""Classifiers and settings that change while a session runs: from one answer to the next, on every engine, and never within one."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from exitify.artifact.artifact import HEADS_FILE, Artifact, build_artifact
from exitify.artifact.manifest import ExitSetting
from exitify.artifact.tensors import write_tensors
from exitify.errors import DataError, PlanError, UnknownProfile
from exitify.plan import FINAL
from exitify.runtime.session import Session
from tests.artifacts import inputs, profile_for
from tests.compiled import compiled, thresholds

ENGINES = ("onnxruntime", "tvm", "reference")


def network() -> Artifact:
    artifact = compiled("identity")
    return artifact.with_profile("default", profile_for(artifact, thresholds(artifact, inputs(12))))


def other_heads(artifact: Artifact, seed: int = 1) -> dict[str, np.ndarray]:
    """Other numbers for every classifier."""
    random, heads = np.random.default_rng(seed), artifact.tensors(HEADS_FILE)
    names = [name for point in artifact.plan.exits for name in (point.weight, point.bias)]
    return {name: (heads[name] + random.standard_normal(heads[name].shape) * 0.1).astype(np.float32) for name in names}


def with_heads(artifact: Artifact, tensors: dict[str, np.ndarray]) -> Artifact:
    """The same network exported with these classifiers."""
    heads = {name: np.array(array) for name, array in artifact.tensors(HEADS_FILE).items()}
    kept = {path: data for path, data in artifact.files.items() if not path.startswith(("profiles/", "targets/"))}
    return build_artifact(artifact.manifest, {**kept, HEADS_FILE: write_tensors({**heads, **tensors})})


@pytest.mark.parametrize("engine", ENGINES)
def test_from_the_next_answer_on_heads_say_what_an_artifact_with_them_says(engine: str) -> None:
    artifact = network()
    changed = other_heads(artifact)
    expected = Session(with_heads(artifact, changed), engine="onnxruntime").record(inputs(6)).logits
    session = Session(artifact, engine=engine, profile="none")
    before = session.record(inputs(6)).logits
    session.change_exits(changed)
    after = session.record(inputs(6)).logits
    for name, logits in after.items():
        np.testing.assert_allclose(logits, expected[name], rtol=1e-4, atol=1e-4 * np.abs(expected[name]).max())
        assert (name == FINAL) == np.array_equal(logits, before[name])


@pytest.mark.parametrize("engine", ENGINES)
def test_alone_and_in_a_batch_and_traced_answers_change_alike_and_go_back(engine: str) -> None:
    artifact = network()
    session, x = Session(artifact, engine=engine), inputs(12)
    first = [session.run(row) for row in x]
    session.change_exits(other_heads(artifact), {"exit1": ExitSetting(enabled=True, threshold=0.0, temperature=2.0)})
    alone, batch, traced = [session.run(row) for row in x], session.run_batch(x), [session.trace(row).answer for row in x]
    assert {answer.exit for answer in alone} == {"exit1"}
    assert {answer.temperature for answer in alone} == {2.0}
    for one, other, third in zip(alone, batch, traced):
        assert one.exit == other.exit == third.exit
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
        assert np.array_equal(one.logits, third.logits)
    assert any(not np.array_equal(a.logits, b.logits) for a, b in zip(first, alone))
    session.forget_changes()
    for before, again in zip(first, [session.run(row) for row in x]):
        assert (before.exit, before.logits.tolist(), before.temperature) == (again.exit, again.logits.tolist(), again.temperature)


def test_settings_belong_to_the_profile_that_was_in_use() -> None:
    artifact = network()
    artifact = artifact.with_profile("other", artifact.profile("default"))
    session, x = Session(artifact), inputs(12)
    expected = [answer.exit for answer in session.run_batch(x)]
    session.change_exits(settings={"exit1": ExitSetting(enabled=True, threshold=0.0, temperature=1.0)})
    assert {answer.exit for answer in session.run_batch(x)} == {"exit1"}
    session.use("other")
    assert [answer.exit for answer in session.run_batch(x)] == expected
    session.use("default")
    assert {answer.exit for answer in session.run_batch(x)} == {"exit1"}


def test_settings_stay_with_their_profile_while_another_is_used_and_heads_change() -> None:
    artifact = network()
    artifact = artifact.with_profile("other", artifact.profile("default"))
    session, x = Session(artifact), inputs(12)
    session.change_exits(settings={name: ExitSetting(True, 1.5, 1.0) for name in ("exit1", "exit2")})
    session.use("other")
    session.change_exits(other_heads(artifact))
    session.change_exits(settings={"exit1": ExitSetting(True, 0.0, 1.0)})
    assert {answer.exit for answer in session.run_batch(x)} == {"exit1"}
    session.use("default")
    assert {answer.exit for answer in session.run_batch(x)} == {answer.exit for answer in map(session.run, x)} == {FINAL}
    session.change_exits(settings={"exit2": ExitSetting(True, 0.0, 1.0)}, profile="other")
    assert {answer.exit for answer in session.run_batch(x)} == {FINAL}


def test_settings_where_there_is_no_profile_are_refused() -> None:
    session = Session(network(), profile="none")
    with pytest.raises(DataError, match="settings are for a profile's exits, and none is in use"):
        session.change_exits(settings={"exit1": ExitSetting(True, 0.0, 1.0)})
    with pytest.raises(UnknownProfile, match="no profile 'summer'"):
        session.change_exits(settings={"exit1": ExitSetting(True, 0.0, 1.0)}, profile="summer")


def test_an_exit_that_is_switched_off_is_not_taken() -> None:
    session, x = Session(network()), inputs(12)
    session.change_exits(settings={"exit1": ExitSetting(enabled=False, threshold=0.0, temperature=1.0)})
    assert "exit1" not in {answer.exit for answer in session.run_batch(x)} | {session.run(row).exit for row in x}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_setup_without_heads_is_given_none(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = network()
    session, x = Session(artifact, engine=engine, profile="none"), inputs(1)[0]
    before = session.run(x).logits
    given: list[str] = []
    bound = session._local.bound
    monkeypatch.setattr(type(bound), "set_parameters", lambda self, parameters: given.extend(parameters))
    session.change_exits(other_heads(artifact))
    assert np.array_equal(session.run(x).logits, before)
    assert given == []


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
def test_what_was_interrupted_while_it_was_given_is_given_whole_the_next_time(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = network()
    session, x, old = Session(artifact, engine=engine), inputs(1)[0], other_heads(artifact, 1)
    session.change_exits(old, {"exit1": ExitSetting(True, 0.0, 1.0)})
    expected = session.run(x).logits
    real = type(session._local.bound).set_parameters

    def half(self: object, parameters: dict[str, np.ndarray]) -> None:
        real(self, dict(list(parameters.items())[:1]))
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(session._local.bound), "set_parameters", half)
        session.change_exits(other_heads(artifact, 2))
        with pytest.raises(MemoryError):
            session.run(x)
    session.change_exits(old)
    assert np.array_equal(session.run(x).logits, expected)


def test_versions_are_counted_and_keep_what_is_not_changed() -> None:
    artifact = network()
    session, changed = Session(artifact), other_heads(artifact)
    first, second = list(changed)[:2]
    assert session.version.number == 0
    assert session.change_exits({first: changed[first]}).number == 1
    version = session.change_exits({second: changed[second]})
    assert (version.number, set(version.tensors)) == (2, {first, second})
    assert np.array_equal(version.tensors[first], changed[first])


def test_a_trace_shows_every_exit_on_the_way_and_the_end_if_it_is_asked_for() -> None:
    artifact = network()
    session, x = Session(artifact), inputs(12)
    recorded = session.record(x)
    names = [point.name for point in artifact.plan.exits]
    for i, row in enumerate(x):
        answer, short, whole = session.run(row), session.trace(row), session.trace(row, to_end=True)
        assert short.answer.exit == whole.answer.exit == answer.exit
        assert np.array_equal(short.answer.logits, answer.logits)
        reached = names[: names.index(answer.exit) + 1] if answer.exit != FINAL else names
        assert [visit.exit for visit in short.visits] == reached
        assert [visit.exit for visit in whole.visits] == names
        assert whole.full is not None
        np.testing.assert_allclose(whole.full, recorded.logits[FINAL][i], rtol=1e-4, atol=1e-5)
        assert (short.full is None) == (answer.exit != FINAL)
        for visit in whole.visits:
            np.testing.assert_allclose(visit.logits, recorded.logits[visit.exit][i], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(visit.features, recorded.features[visit.exit][i], rtol=1e-4, atol=1e-5)
            assert 0 < visit.score <= 1


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
def test_every_answer_of_four_threads_is_of_one_version(engine: str) -> None:
    """Weight and bias of a version belong together: an answer that mixed two would be none of theirs."""
    artifact = network()
    session, x = Session(artifact, engine=engine), inputs(1)[0]
    (point, *_) = artifact.plan.exits
    z = Session(artifact, profile="none").record(x[None]).features[point.name][0].astype(np.float64)
    settings = {point.name: ExitSetting(enabled=True, threshold=0.0, temperature=1.0)}
    versions = [{point.weight: other_heads(artifact, i)[point.weight], point.bias: other_heads(artifact, i + 50)[point.bias]} for i in range(40)]
    session.change_exits(versions[0], settings)
    said: list[list[np.ndarray]] = [[] for _ in range(4)]
    running = threading.Event()
    running.set()

    def answer(rows: list[np.ndarray]) -> None:
        while running.is_set():
            rows.append(session.run(x).logits)

    threads = [threading.Thread(target=answer, args=(rows,)) for rows in said]
    for thread in threads:
        thread.start()
    for version in versions * 5:
        session.change_exits(version)
        threading.Event().wait(0.002)
    running.clear()
    for thread in threads:
        thread.join()
    expected = np.array([version[point.weight].astype(np.float64) @ z + version[point.bias] for version in versions])
    rows = np.array([row for rows in said for row in rows])
    distance = np.abs(rows[:, None] - expected[None]).max(axis=2)
    assert distance.min(axis=1).max() < 1e-4 * np.abs(expected).max()
    assert len(set(distance.argmin(axis=1))) > 5
    assert np.sort(distance, axis=1)[:, 1].min() > 1e-3


def test_what_cannot_be_a_classifier_is_refused_and_changes_nothing() -> None:
    artifact = network()
    session, (point, *_) = Session(artifact), artifact.plan.exits
    weight = np.array(artifact.tensors(HEADS_FILE)[point.weight])
    broken = weight.copy()
    broken[0, 0] = np.nan
    for tensors, said in (
        ({"heads.exit9.weight": weight}, "no head has a classifier 'heads.exit9.weight'"),
        ({point.temperature: np.float32(1.0)}, "no head has a classifier"),
        ({point.weight: weight[:, :-1]}, "and the head's float32"),
        ({point.weight: weight.astype(np.float64)}, "is float64"),
        ({point.weight: np.asfortranarray(weight)}, "and the head's float32"),
        ({point.weight: broken}, "holds a number that is not finite"),
    ):
        with pytest.raises(DataError, match=said) as raised:
            session.change_exits(tensors)
        assert raised.value.hint
    for setting in (ExitSetting(True, float("nan"), 1.0), ExitSetting(True, 0.5, 0.0), ExitSetting(True, 0.5, float("inf"))):
        with pytest.raises(DataError, match="the exit 'exit1' cannot decide by"):
            session.change_exits(settings={"exit1": setting})
    with pytest.raises(PlanError, match="exit9"):
        session.change_exits(settings={"exit9": ExitSetting(True, 0.5, 1.0)})
    assert session.version.number == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exit_that_the_profile_has_switched_off_may_be_enabled_and_another_not_run_at_all(engine: str) -> None:
    artifact = compiled("identity")
    artifact = artifact.with_profile("default", profile_for(artifact, {"exit2": 0.0}))
    session, x = Session(artifact, engine=engine), inputs(6)
    assert {answer.exit for answer in session.run_batch(x)} == {"exit2"}
    cost = session.run(x[0]).macs
    session.change_exits(settings={"exit1": ExitSetting(True, 0.0, 2.0), "exit2": ExitSetting(False, 0.0, 1.0)})
    for answers in (session.run_batch(x), [session.run(row) for row in x], [session.trace(row).answer for row in x]):
        assert {answer.exit for answer in answers} == {"exit1"}
        assert {answer.temperature for answer in answers} == {2.0}
        assert answers[0].macs < cost
    session.change_exits(settings={"exit1": ExitSetting(False, 0.0, 1.0)})
    whole = Session(artifact, engine=engine, profile="none").run(x[0])
    assert [(answer.exit, answer.macs) for answer in session.run_batch(x)] == [(FINAL, whole.macs)] * 6, "heads that are off cost nothing"
    session.forget_changes()
    assert {answer.exit for answer in session.run_batch(x)} == {"exit2"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trace_to_the_end_shows_exits_that_are_off_and_answers_as_a_run(engine: str) -> None:
    artifact = compiled("identity")
    artifact = artifact.with_profile(
        "default", profile_for(artifact, {"exit2": thresholds(artifact, inputs(12), 2.0)["exit2"]}, temperatures={"exit2": 2.0})
    )
    session, x = Session(artifact, engine=engine), inputs(12)
    session.prepare_exits({"exit1": ExitSetting(False, 0.0, 1.0)}, "default")
    left = set()
    for row in x:
        whole, answer = session.trace(row, to_end=True), session.run(row)
        assert [visit.exit for visit in whole.visits] == ["exit1", "exit2"]
        assert (whole.answer.exit, whole.answer.label, whole.answer.temperature) == (answer.exit, answer.label, answer.temperature)
        np.testing.assert_allclose(whole.answer.logits, answer.logits, rtol=1e-4, atol=1e-5)
        assert [visit.exit for visit in session.trace(row).visits] == ["exit2"]
        left.add(answer.exit)
    assert left == {"exit2", FINAL}
