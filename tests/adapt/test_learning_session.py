"""A session that learns while it answers: on real engines, from several threads, with states, and through everything that can go wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import exitify
from benchmarks.recorded_device import judged
from exitify.adapt.report import adapt
from exitify.adapt.session import LearningSession
from exitify.adapt.settings import Guards, Learning
from exitify.adapt.state import FACTORY, State
from exitify.adapt.stream import Stream
from exitify.adapt.update import Sgd
from exitify.artifact.artifact import Artifact
from exitify.calibration.calibrate import calibrate
from exitify.errors import DataError, EngineError, StateError
from exitify.files import NotWritten
from exitify.runtime.session import Session
from tests import digits
from tests.adapt.world import FEW, artifact, population, stream
from tests.compiled import compiled

QUICK = Guards(audit=0.3, review_every=100, audit_first=100, audits_kept=300)
HOW = Learning(guards=QUICK)


def few(count: int, seed: int = 0) -> np.ndarray:
    """Digits of few classes, as the network reads them."""
    return digits.samples_of("test").inputs(stream(count, FEW, seed))


def everything() -> np.ndarray:
    return digits.samples_of("test").inputs(np.arange(len(population().labels)))


def session(how: Learning = HOW, *, of: Artifact | None = None, engine: str = "auto") -> LearningSession:
    return LearningSession(of or artifact(), how=how, seed=0, in_background=False, engine=engine)


def learnt(count: int = 700) -> LearningSession:
    made = session()
    for x in few(count):
        made.run(x)
    return made


def answers(made: Session) -> list[tuple[str, int, list[float]]]:
    return [(one.exit, one.label, one.logits.tolist()) for one in made.run_batch(everything())]


def test_until_something_is_taken_into_use_answers_are_the_plain_sessions() -> None:
    plain, learning = Session(artifact()), session(Learning(Sgd(0.5), guards=replace(QUICK, review_every=10_000)))
    for x in few(300):
        one, other = plain.run(x), learning.run(x)
        assert (one.exit, one.label, one.logits.tolist(), one.macs) == (other.exit, other.label, other.logits.tolist(), other.macs)
    assert learning.learner.updates > 100


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_what_was_learnt_is_in_use_in_the_engine_and_cheaper(engine: str) -> None:
    made = session(engine=engine)
    for x in few(900):
        made.run(x)
    assert any(event.what == "in use" for event in made.state.record.events)
    assert made.version.number >= 1
    head = made.learner.in_use.heads[0]
    for x in everything()[:20]:
        visit = made.trace(x, to_end=True).visits[0]
        np.testing.assert_allclose(visit.logits, head.weight @ visit.features + head.bias, rtol=1e-3, atol=1e-3)
    rows = np.flatnonzero(np.isin(population().labels, FEW))
    factory = made.learner.factory
    assert judged(factory, made.learner.in_use, population(), rows).cost < judged(factory, factory.ruling, population(), rows).cost
    said = made.run_batch(digits.samples_of("test").inputs(rows))
    assert np.mean([one.label == label for one, label in zip(said, population().labels[rows])]) == pytest.approx(
        judged(factory, made.learner.in_use, population(), rows).accuracy, abs=0.01
    )


def test_on_a_compiled_library_heads_learn_too() -> None:
    made = compiled("identity")
    from tests.artifacts import inputs, profile_for
    from tests.compiled import thresholds

    made = made.with_profile("default", profile_for(made, thresholds(made, inputs(12))))
    learning = LearningSession(made, engine="tvm", how=Learning(Sgd(1e-2), guards=None), seed=0)
    before = learning.trace(inputs(1)[0], to_end=True)
    for x in inputs(40, seed=3):
        learning.run(x)
    after = learning.trace(inputs(1)[0], to_end=True)
    assert learning.learner.updates > 0
    assert not np.array_equal(before.visits[0].logits, after.visits[0].logits)
    assert np.array_equal(before.full, after.full)


def test_the_answer_at_full_depth_is_exactly_what_it_was() -> None:
    made = learnt()
    assert made.version.number >= 1
    whole = Session(artifact(), profile="none").run_batch(everything())
    made.use("none")
    assert [one.logits.tolist() for one in made.run_batch(everything())] == [one.logits.tolist() for one in whole]


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    made = learnt()
    path = made.save_state(tmp_path / "device.state")
    again = LearningSession.load(artifact().save(tmp_path / "net.exitify"), state=path, how=HOW, seed=1)
    assert answers(again) == answers(made)
    assert again.learner.updates == made.learner.updates
    assert np.array_equal(again.learner.seen.counts, made.learner.seen.counts)
    assert again.learner.in_use.rare is not None
    assert np.array_equal(again.learner.in_use.rare, made.learner.in_use.rare)
    for ours, theirs in zip(again.learner.learnt, made.learner.learnt):
        assert np.array_equal(ours.weight, theirs.weight)
    assert again.learner.settings == made.learner.settings
    assert again.state.record.events == made.state.record.events


def test_without_guard_rails_a_saved_state_goes_on_too(tmp_path: Path) -> None:
    made = session(Learning(Sgd(1e-2), guards=None))
    for x in few(100):
        made.run(x)
    path = made.save_state(tmp_path / "device.state")
    again = LearningSession(artifact(), how=Learning(Sgd(1e-2), guards=None))
    again.restore(path)
    assert answers(again) == answers(made)


def test_a_state_that_is_not_there_yet_begins_anew(tmp_path: Path) -> None:
    made = LearningSession.load(artifact().save(tmp_path / "net.exitify"), state=tmp_path / "device.state")
    assert made.state.record.current == FACTORY


def test_rollback_answers_as_before_and_learns_on_from_the_artifacts_heads() -> None:
    made = learnt(1500)
    kept = [one.number for one in made.state.record.snapshots]
    assert kept
    made.rollback()
    assert made.state.record.current == (kept[-2] if len(kept) > 1 else FACTORY)
    made.rollback(FACTORY)
    assert answers(made) == answers(Session(artifact()))
    assert made.state.record.current == FACTORY
    assert made.learner.updates == 0
    made.rollback(kept[-1])
    assert made.state.record.current == kept[-1]
    assert answers(made) != answers(Session(artifact()))
    assert [event.what for event in made.state.record.events][-3:] == ["rollback"] * 3
    with pytest.raises(StateError, match="the state has no snapshot 99"):
        made.rollback(99)


def test_what_cannot_be_restored_changes_nothing(tmp_path: Path) -> None:
    made = learnt()
    before = answers(made)
    other = artifact().with_profile("other", artifact().profile("default"))
    of_other = LearningSession(other, profile="other", how=HOW, seed=0, in_background=False)
    for x in few(700):
        of_other.run(x)
    under_other = of_other.save_state(tmp_path / "other.state")
    damaged = tmp_path / "damaged.state"
    damaged.write_bytes(made.save_state(tmp_path / "whole.state").read_bytes()[:-100])
    foreign = State.fresh(compiled("identity")).save(tmp_path / "foreign.state")
    for path, said in (
        (under_other, "was learnt under the profile 'other', and this is 'default'"),
        (damaged, "is no whole state"),
        (foreign, "belongs to another artifact"),
        (tmp_path / "missing.state", "cannot read"),
    ):
        with pytest.raises(StateError, match=said) as raised:
            made.restore(path)
        assert raised.value.hint
        assert answers(made) == before
    made.run(few(1)[0])


def test_an_input_that_is_no_number_is_refused_and_nothing_is_lost() -> None:
    made = learnt(300)
    updates, counted = made.learner.updates, made.learner.answers
    broken = few(1)[0].copy()
    broken[0, 0, 0] = np.nan
    for _ in range(20):
        with pytest.raises(DataError, match="the input holds nan"):
            made.run(broken)
    assert (made.learner.updates, made.learner.answers) == (updates, counted)
    assert made.run(few(1)[0]).label in FEW


def test_a_stream_with_bad_inputs_is_answered_for_the_rest_and_says_so(tmp_path: Path) -> None:
    rows = few(300).copy()
    rows[::50, 0, 0, 0] = np.inf
    made = session()
    report = adapt(made, Stream(rows, made.contract), save_to=tmp_path / "device.state", seed=3)
    assert (report.refused, report.answers) == (6, 294)
    assert "the input holds inf" in report.refusal
    assert State.open(tmp_path / "device.state", artifact()).record.answers == 294


def test_a_disk_that_cannot_be_written_is_an_error_of_the_save_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = learnt(300)
    path = made.save_state(tmp_path / "device.state")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for where, error in (("os.fsync", 28), ("os.replace", 30)):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(NotWritten, match="No space left on device"):
                made.save_state(path)
            made.run(few(1)[0])
        assert path.read_bytes() == before, error
    assert os.listdir(tmp_path) == ["device.state"]
    with pytest.raises(NotWritten, match="cannot write"):
        made.save_state(tmp_path / "nowhere" / "device.state")
    made.save_state(path)
    assert State.open(path, artifact()).record.answers == made.learner.answers


def test_what_cannot_be_written_on_the_way_is_said_and_the_stream_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitify.adapt.report.SAVE_EVERY", 50)
    made, real, calls = session(), LearningSession.save_state, []

    def once(self: LearningSession, path: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise NotWritten("cannot write the state: No space left on device", "")
        return real(self, path)

    monkeypatch.setattr(LearningSession, "save_state", once)
    report = adapt(made, Stream(few(200), made.contract), save_to=tmp_path / "device.state")
    assert report.not_saved == "cannot write the state: No space left on device"
    assert len(calls) == 5
    assert report.answers == 200


def test_a_report_tells_classes_seen_from_the_others() -> None:
    made = session()
    samples = digits.samples_of("calibration")
    report = adapt(made, Stream(few(900), made.contract), judge_on=samples)
    assert report.seen == FEW
    assert report.before is not None
    assert report.after is not None
    of_few = np.isin(samples.labels, FEW)
    plain = Session(artifact()).run_batch(samples.inputs(np.arange(len(samples))))
    right = np.array([one.label for one in plain]) == samples.labels
    assert report.before.accuracy_seen == pytest.approx(right[of_few].mean())
    assert report.before.accuracy_rest == pytest.approx(right[~of_few].mean())
    assert report.before.macs_seen == pytest.approx(np.mean([one.macs for one, is_few in zip(plain, of_few) if is_few]) / artifact().plan.full_macs)
    assert report.after.exits != report.before.exits
    assert sum(report.after.exits.values()) == pytest.approx(1.0)
    assert 0 < report.audited < report.answers
    assert any(event.what == "in use" for event in report.events)
    assert report.drift.keys() == {"exit1", "exit2"}


def test_every_answer_of_four_threads_is_of_one_version_while_heads_learn_and_are_saved(tmp_path: Path) -> None:
    """Every update is in use at once here. An answer that mixed the weight of one version and the bias of another would be none of theirs."""
    made = session(Learning(Sgd(1e-2), guards=None))
    x = everything()[:40]
    said: list[list[tuple[int, str, np.ndarray]]] = [[] for _ in range(4)]
    versions: list[tuple[np.ndarray, ...]] = []
    real = made.change_exits

    def noted(tensors=None, settings=None, **options):  # type: ignore[no-untyped-def]
        found = real(tensors, settings, **options)
        versions.append(tuple(array for head in made.learner.in_use.heads for array in (head.weight, head.bias)))
        return found

    own = tuple(array for head in made.learner.in_use.heads for array in (head.weight, head.bias))
    versions.append(own)
    made.change_exits = noted  # type: ignore[method-assign]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(150):
                row = (turn * 7 + number) % len(x)
                answer = made.run(x[row])
                said[number].append((row, answer.exit, answer.logits))
                if turn % 50 == number:
                    made.save_state(tmp_path / "device.state")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    features = Session(artifact(), profile="none").record(x).features
    index = {"exit1": 0, "exit2": 1}
    early = [(row, index[name], logits) for rows in said for row, name, logits in rows if name in index]
    assert len(early) > 50
    assert len(versions) > 50
    for row, k, logits in early:
        z = features[f"exit{k + 1}"][row]
        expected = np.array([version[2 * k] @ z + version[2 * k + 1] for version in versions])
        assert np.abs(expected - logits).max(axis=1).min() < 1e-4 * max(1.0, float(np.abs(logits).max()))
    assert made.learner.answers == 600
    State.open(tmp_path / "device.state", artifact())


def test_a_review_in_the_background_stops_nobody() -> None:
    made = LearningSession(artifact(), how=HOW, seed=0)
    for x in few(900):
        made.run(x)
    made.wait()
    assert any(event.what == "in use" for event in made.state.record.events)


def test_a_review_that_fails_in_the_background_leaves_answers_as_they_are(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("exitify.adapt.learner.propose", lambda *_: 1 / 0)
    made = LearningSession(artifact(), how=HOW, seed=0)
    for x in few(300):
        made.run(x)
    made.wait()
    assert "looking at what was learnt failed" in caplog.text
    assert answers(made) == answers(Session(artifact()))


def test_with_another_profile_or_a_mask_nothing_is_learnt() -> None:
    made = session()
    made.use("none")
    made.run(few(1)[0])
    assert made.learner.answers == 0


def test_the_top_level_offers_it() -> None:
    assert exitify.LearningSession is LearningSession
    assert exitify.State is State


LEARN = """
import sys
import numpy as np
from exitify.adapt.session import LearningSession
from exitify.adapt.settings import Guards, Learning
from exitify.adapt.update import Sgd
guards = Guards(audit=0.3, review_every=50, audit_first=100, audits_kept=300)
made = LearningSession.load(sys.argv[1], state=sys.argv[2], how=Learning(Sgd(1e-2), guards=guards), seed=int(sys.argv[4]))
rows = np.load(sys.argv[3])
print(made.learner.answers, made.learner.updates, flush=True)
while True:
    for x in rows:
        made.run(x)
        made.save_state(sys.argv[2])
"""


@pytest.mark.slow
def test_killed_two_hundred_times_the_state_always_loads(tmp_path: Path) -> None:
    """What the test below does with ten kills, with a kill at each of the 200 moments."""
    net, path = artifact().save(tmp_path / "net.exitify"), tmp_path / "device.state"
    session().save_state(path)
    np.save(tmp_path / "rows.npy", few(100))
    draw, last = random.Random(1), 0
    for kill in range(200):
        process = subprocess.Popen(
            [sys.executable, "-c", LEARN, str(net), str(path), str(tmp_path / "rows.npy"), str(kill)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert int(process.stdout.readline().split()[0]) == last
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        found = State.open(path, artifact())
        assert found.record.answers >= last
        last = found.record.answers
    assert last > 200


def test_killed_while_it_learns_and_saves_the_state_always_loads(tmp_path: Path) -> None:
    """200 moments, ten of them real kills: what the disk has is a state of before or after, and learning goes on from there."""
    net, path = artifact().save(tmp_path / "net.exitify"), tmp_path / "device.state"
    session().save_state(path)
    np.save(tmp_path / "rows.npy", few(100))
    draw, moments, last = random.Random(0), 0, 0
    for kill in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", LEARN, str(net), str(path), str(tmp_path / "rows.npy"), str(kill)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        resumed, _ = map(int, process.stdout.readline().split())
        assert resumed == last
        for _ in range(20):
            time.sleep(draw.random() * 0.01)
            process.send_signal(signal.SIGSTOP)
            found = State.open(path, artifact())
            assert found.record.answers >= last
            last, moments = found.record.answers, moments + 1
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()
        found = State.open(path, artifact())
        assert found.record.answers >= last
        last = found.record.answers
    assert moments == 200
    assert last > 20
    again = session()
    again.restore(path)
    again.run(few(1)[0])


def test_where_the_artifact_knows_how_long_segments_take_here_new_thresholds_save_time() -> None:
    made = artifact()
    times = exitify.measure_segments(made)
    slow_heads = {name: 50 * times.whole_ms if made.plan.segment(name).kind == "head" else ms for name, ms in times.segments.items()}
    here = made.with_times("here", replace(times, segments=slow_heads))
    assert LearningSession(made, how=HOW).learner.factory.times is None
    assert LearningSession(made.with_times("there", replace(times, threads=2)), how=HOW).learner.factory.times is None
    learning = LearningSession(here, how=HOW, seed=0, in_background=False)
    assert learning.learner.factory.times is not None
    for x in few(700):
        learning.run(x)
    assert not any(setting.enabled for setting in learning.learner.settings.values()), "no head pays for itself, if each takes fifty networks' time"


def with_risk(rate: float) -> Artifact:
    return calibrate(digits.trained_artifact(), digits.samples_of("calibration"), risk=(rate, 0.9))


def test_heads_that_were_never_proven_do_not_answer_where_a_rate_is_promised(tmp_path: Path) -> None:
    careless = LearningSession(with_risk(0.05), how=Learning(Sgd(1e-1), guards=None), seed=0)
    for x in few(200):
        careless.run(x)
    path = careless.save_state(tmp_path / "careless.state")
    guarded = LearningSession(with_risk(0.05), how=HOW, seed=0, in_background=False)
    guarded.restore(path)
    assert answers(guarded) == answers(Session(with_risk(0.05)))
    assert guarded.state.record.events[-1].what == "not used"
    assert "never proven" in guarded.state.record.events[-1].reason
    assert not np.array_equal(guarded.learner.learnt[0].weight, guarded.learner.factory.ruling.heads[0].weight), "what was learnt may be tried"
    with pytest.raises(StateError, match="snapshot 1 cannot be used: it was never proven"):
        guarded.rollback(1)


def test_thresholds_of_another_promise_do_not_answer(tmp_path: Path) -> None:
    made = learnt()
    assert made.state.record.current > 0
    path = made.save_state(tmp_path / "device.state")
    again = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.001)
    other = LearningSession(again, how=HOW, seed=0, in_background=False)
    other.restore(path)
    assert answers(other) == answers(Session(again))
    assert "another promise" in other.state.record.events[-1].reason


def test_a_plain_rollback_does_not_go_back_to_what_was_found_broken() -> None:
    made = learnt(1500)
    number = made.state.record.current
    made.state = made.state.condemn()
    made._keep("stricter")
    made.rollback()
    assert made.state.record.current != number


def test_an_engine_that_cannot_take_new_heads_is_asked_again_and_answers_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, real, calls = LearningSession(artifact(), how=HOW, seed=0), Session.change_exits, []

    def broken(self: Session, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise EngineError("the engine is busy", "")
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "change_exits", broken)
    for x in few(700):
        made.run(x)
        made.wait()
    assert len(calls) >= 2
    assert "the engine is busy" in caplog.text
    assert made.version.number >= 1
    assert made._served is made.learner.in_use


def test_waiting_while_others_answer_never_fails() -> None:
    made = LearningSession(artifact(), how=HOW, seed=0)
    stop = threading.Event()
    failures: list[BaseException] = []

    def wait() -> None:
        while not stop.is_set():
            try:
                made.wait()
            except BaseException as error:
                failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    for x in few(600):
        made.run(x)
    stop.set()
    waiting.join()
    assert not failures


def test_other_profiles_and_none_keep_the_heads_that_they_were_calibrated_with() -> None:
    made = artifact().with_profile("other", artifact().profile("default"))
    learning = LearningSession(made, profile="default", how=Learning(Sgd(1e-2), guards=None), seed=0)
    for x in few(200):
        learning.run(x)
    changed = answers(learning)
    plain = Session(made)
    assert changed != answers(plain)
    learning.use("other")
    assert answers(learning) == answers(plain)
    assert np.array_equal(learning.record(everything()[:5]).logits["exit1"], plain.record(everything()[:5]).logits["exit1"])
    learning.use("default")
    assert answers(learning) == changed
