"""Streams: an answer is held as long as the probabilities stay close to the key frame's, which a plain loop over recorded outputs says too."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exitify.artifact.manifest import Conformal
from exitify.errors import DataError
from exitify.plan import FINAL
from exitify.runtime.session import Session
from tests.artifacts import inputs
from tests.runtime.stopping import NAMES, four_exits, profile_of, recorded, session_of, sureness_of

RTOL, ATOL = 1e-4, 1e-5


def frames(scenes: int, each: int, noise: float, seed: int = 0) -> np.ndarray:
    """Scenes of frames that differ a little, `(scenes * each, *shape)`."""
    generator = np.random.default_rng(seed)
    x = np.repeat(inputs(scenes, seed), each, axis=0)
    return (x + noise * generator.standard_normal(x.shape)).astype(np.float32)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return powers / powers.sum()


def held_or_not(logits, exits, holds, takes, temperatures, every) -> list[tuple[int, str, bool]]:
    """For each frame: the frame whose answer it gets, where it stops, and whether that was held. `takes(n, exit)` is the profile's own policy."""
    found: list[tuple[int, str, bool]] = []
    key, passed, in_a_row = None, [], 0
    for n in range(len(logits[FINAL])):
        p = {name: softmax(logits[name][n], temperatures.get(name, 1.0)) for name in exits}
        to_end = key is not None and in_a_row >= every
        stopped = FINAL
        for name in exits if not to_end else []:
            if key is not None and name in passed:
                common = 1 - np.abs(p[name] - softmax(logits[name][key], temperatures.get(name, 1.0))).sum() / 2
                assume(abs(common - holds[name]) > 1e-4)
                if common >= holds[name]:
                    found.append((key, name, True))
                    break
            if takes(n, name):
                stopped = name
                break
        if len(found) > n:
            in_a_row += 1
            continue
        found.append((n, stopped, False))
        key, in_a_row = n, 0
        passed = exits if stopped == FINAL else exits[: exits.index(stopped) + 1]
    return found


def agrees(answers, logits, expected) -> None:
    for answer, (frame, exit_name, is_held) in zip(answers, expected, strict=True):
        assert (answer.exit, answer.held) == (exit_name, is_held)
        source = next(name for n, name, held in expected if n == frame and not held)
        np.testing.assert_allclose(answer.logits, logits[source][frame], rtol=RTOL, atol=ATOL)
        assert answer.label == logits[source][frame].argmax()


@settings(max_examples=25)
@given(
    holds=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.5, 0.8, 0.9, 0.97]), min_size=1),
    noise=st.sampled_from([0.01, 0.05, 0.2]),
    every=st.sampled_from([1, 2, 30]),
    temperature=st.sampled_from([0.7, 2.0]),
    seed=st.integers(0, 3),
)
def test_a_temporal_profile_holds_what_a_loop_over_recorded_outputs_holds(holds, noise, every, temperature, seed):
    x = frames(4, 6, noise, seed)
    logits, exits = recorded(x), [name for name in NAMES if name in holds]
    temperatures = dict.fromkeys(NAMES, temperature)
    expected = held_or_not(logits, exits, holds, lambda n, name: False, temperatures, every)
    stream = session_of(profile_of("temporal", holds, temperatures=temperatures)).stream(every=every)
    answers = [stream.run(row) for row in x]
    agrees(answers, logits, expected)
    macs = four_exits().plan.macs_at(exits)
    assert [answer.macs for answer in answers] == [macs[exit_name] for _, exit_name, _ in expected]


def in_a_gap(values: np.ndarray) -> float:
    """A number far from all of these that some of them reach and others do not, where they are not all alike."""
    ranked = np.sort(values)
    widest = int(np.diff(ranked).argmax())
    return float(ranked[widest : widest + 2].mean()) if ranked[-1] > ranked[0] else 2.0


@pytest.mark.parametrize("policy", ["top1", "patience", "gates", "jei", "entropy"])
@settings(max_examples=12)
@given(hold=st.sampled_from([0.6, 0.85, 0.95]), noise=st.sampled_from([0.02, 0.1]), every=st.sampled_from([2, 30]), seed=st.integers(0, 3))
def test_any_profile_streams_what_holds_first_then_its_own_policy(policy, hold, noise, every, seed):
    x = frames(4, 6, noise, seed)
    logits, exits = recorded(x), ["exit1", "exit2", "exit4"]
    sureness = sureness_of(policy, exits, logits, {})
    thresholds = {name: 1.5 if policy == "patience" else in_a_gap(sureness[name]) for name in exits}
    expected = held_or_not(logits, exits, dict.fromkeys(exits, hold), lambda n, name: sureness[name][n] >= thresholds[name], {}, every)
    stream = session_of(profile_of(policy, thresholds)).stream(hold=hold, every=every)
    agrees([stream.run(row) for row in x], logits, expected)


def test_scenes_are_held_and_changes_are_seen():
    """The tests above would hold of a stream that holds nothing."""
    x = frames(6, 10, 0.02)
    stream = session_of(profile_of("temporal", dict.fromkeys(NAMES, 0.9))).stream()
    answers = [stream.run(row) for row in x]
    assert [n for n, answer in enumerate(answers) if not answer.held] == [0, 10, 20, 30, 40, 50]
    assert {answer.exit for answer in answers if answer.held} <= {"exit1", "exit2"}
    assert [answer.exit for answer in answers].count("exit1") > 40


def test_with_no_profile_all_exits_compare():
    x = frames(2, 4, 0.02)
    stream = session_of().stream(hold=0.9)
    assert [stream.run(row).held for row in x] == [False, True, True, True] * 2
    assert Session(four_exits()).run(x[0]).held is False


def test_a_frame_that_is_the_key_frame_holds_at_a_similarity_of_one():
    x = inputs(1)
    stream = session_of().stream(hold=1.0)
    first, again = stream.run(x), stream.run(x)
    assert (first.held, again.held, again.exit) == (False, True, "exit1")


def test_after_so_many_held_frames_one_is_answered_by_the_whole_network():
    """Whatever the profile's own policy says."""
    x = inputs(1)
    stream = session_of(profile_of("top1", {"exit1": 0.0, "exit2": 0.0})).stream(hold=0.5, every=3)
    taken = [(answer.exit, answer.held) for answer in (stream.run(x) for _ in range(9))]
    assert taken == [("exit1", False), *[("exit1", True)] * 3, (FINAL, False), *[("exit1", True)] * 3, (FINAL, False)]


def test_where_the_key_frame_stopped_later_exits_are_not_compared():
    """Frames that are not held and not sure go on, although the key frame never came so far."""
    x = inputs(40)
    sureness = sureness_of("top1", NAMES, recorded(x), {})["exit1"]
    sure, unsure = int(sureness.argmax()), int(sureness.argmin())
    profile = profile_of("top1", {"exit1": float(sureness[[sure, unsure]].mean()), "exit2": 2.0})
    stream = session_of(profile).stream(hold=0.0)
    assert stream.run(x[sure]).exit == "exit1"
    assert stream.run(x[unsure]).held is True
    stream = session_of(profile).stream(hold=0.9999)
    taken = [stream.run(x[n]) for n in (sure, unsure, sure)]
    assert [(answer.exit, answer.held) for answer in taken] == [("exit1", False), (FINAL, False), ("exit1", False)]


def test_reset_forgets_the_key_frame():
    x = inputs(1)
    stream = session_of().stream(hold=0.9)
    assert [stream.run(x).held for _ in range(2)] == [False, True]
    stream.reset()
    assert [stream.run(x).held for _ in range(2)] == [False, True]


def test_two_streams_of_a_session_know_nothing_of_each_other():
    one, other = inputs(2)
    session = session_of()
    first, second = session.stream(hold=0.95), session.stream(hold=0.95)
    taken = [(first.run(one).held, second.run(other).held) for _ in range(3)]
    assert taken == [(False, False), (True, True), (True, True)]


def test_a_key_frame_of_other_heads_or_another_profile_is_not_held_against():
    x = inputs(1)
    session = session_of(profile_of("temporal", {"exit1": 0.5}))
    session.artifact = session.artifact.with_profile("other", profile_of("temporal", {"exit2": 0.5}))
    stream = session.stream()
    assert [stream.run(x).held for _ in range(2)] == [False, True]
    session.use("other")
    assert [stream.run(x).held for _ in range(2)] == [False, True]
    weight = "exit_heads.exit2.classifier.weight"
    session.change_exits({weight: np.ascontiguousarray(four_exits().classifiers()[weight] * np.float32(1.5))})
    assert [stream.run(x).held for _ in range(2)] == [False, True]


def test_a_held_answer_is_the_key_frames_with_its_temperature_and_its_set_and_nobody_shares_its_logits():
    profile = profile_of("temporal", {"exit1": 0.5}, temperatures={"exit1": 2.0}, final_temperature=3.0)
    profile = replace(profile, conformal=Conformal(0.1, "per_exit", {**dict.fromkeys(NAMES, 0.1), FINAL: 0.9}, 100))
    stream = session_of(profile).stream()
    x = inputs(1)
    first = stream.run(x)
    logits = first.logits.copy()
    first.logits[:] = 0
    held = stream.run(x)
    assert (held.held, held.exit, held.temperature, held.quantile) == (True, "exit1", 3.0, 0.9)
    np.testing.assert_array_equal(held.logits, logits)
    held.logits[:] = 0
    np.testing.assert_array_equal(stream.run(x).logits, logits)


def test_at_one_exit_nothing_is_compared():
    session = session_of()
    session.use(exit="exit2")
    stream = session.stream(hold=0.5)
    assert [(answer.exit, answer.held) for answer in (stream.run(inputs(1)) for _ in range(2))] == [("exit2", False)] * 2


@pytest.mark.parametrize("hold", [-0.1, 1.1, math.nan, math.inf])
def test_a_similarity_that_is_none_is_refused(hold):
    with pytest.raises(DataError, match=r"a similarity of .* is none from 0 to 1\n  hint: give hold=0.95"):
        session_of().stream(hold=hold)


@pytest.mark.parametrize("every", [0, -1])
def test_a_stream_that_could_hold_nothing_is_refused(every):
    with pytest.raises(DataError, match=rf"every={every} leaves no frame to hold"):
        session_of().stream(hold=0.9, every=every)


def test_a_profile_that_says_no_similarity_is_refused_unless_one_is_given():
    message = r"the profile 'default' does not say how similar frames must be for an answer to hold\n  hint: give hold=0.95"
    with pytest.raises(DataError, match=message):
        session_of(profile_of("top1", {"exit1": 0.5})).stream()
    with pytest.raises(DataError, match="there is no profile to say"):
        session_of().stream()
    session = session_of(profile_of("temporal", {"exit1": 0.5}))
    stream = session.stream()
    session.artifact = session.artifact.with_profile("other", profile_of("margin", {"exit1": 0.5}))
    session.use("other")
    with pytest.raises(DataError, match="the profile 'other' does not say"):
        stream.run(inputs(1))


def test_a_stream_refuses_what_run_refuses_and_goes_on():
    x = inputs(1)
    stream = session_of().stream(hold=0.9)
    stream.run(x)
    with pytest.raises(DataError, match="takes one sample, and got 2"):
        stream.run(inputs(2))
    with pytest.raises(DataError, match="the input holds nan"):
        stream.run(np.full_like(x, np.nan))
    assert stream.run(x).held is True
