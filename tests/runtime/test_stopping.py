"""When a session stops, by every policy: where the recorded outputs say, alone, in a batch and in a trace; at one exit; within a budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exitify.artifact.manifest import Conformal, ExitSetting, Policy
from exitify.errors import DataError, PlanError
from exitify.plan import FINAL
from exitify.runtime import session as session_module
from exitify.runtime.answers import Answer
from exitify.runtime.engines import onnxruntime as onnxruntime_engine
from exitify.runtime.policies import from_logits, softmax
from exitify.runtime.session import Session
from exitify.runtime.steps import Step
from tests.artifacts import exported, inputs, profile_for
from tests.runtime.stopping import NAMES, four_exits, profile_of, recorded, session_of, stops, sureness_of
from tests.skipping import pictures, skipping

POLICIES = get_args(Policy)
RTOL, ATOL = 1e-4, 1e-5


def between(values: np.ndarray, position: int) -> float:
    """A threshold that `position` of these values do not reach; none of them is close by."""
    ranked = np.sort(values)
    edges = np.concatenate([[ranked[0] - 1], ranked, [ranked[-1] + 1]])
    assume(edges[position + 1] - edges[position] > 1e-3)
    return float((edges[position] + edges[position + 1]) / 2)


def same(one: Answer, other: Answer) -> None:
    assert (one.label, one.exit, one.macs, one.temperature, one.quantile, one.held) == (
        other.label, other.exit, other.macs, other.temperature, other.quantile, other.held,
    )  # fmt: skip
    np.testing.assert_allclose(one.logits, other.logits, rtol=RTOL, atol=ATOL)


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=15)
@given(
    positions=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 8), min_size=1),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    seed=st.integers(0, 5),
)
def test_every_policy_stops_where_the_recorded_outputs_say_alone_in_a_batch_and_in_a_trace(policy, positions, temperature, seed):
    """Only exits in `positions` are enabled; of eight rows so many do not reach an exit's threshold."""
    x = inputs(8, seed)
    logits, enabled = recorded(x), [name for name in NAMES if name in positions]
    temperatures = dict.fromkeys(NAMES, temperature)
    sureness = sureness_of(policy, enabled, logits, temperatures)
    if policy in ("patience", "temporal"):
        thresholds = {name: positions[name] % 4 + 0.5 for name in enabled}
    else:
        thresholds = {name: between(sureness[name], positions[name]) for name in enabled}
    session = session_of(profile_of(policy, thresholds, temperatures=temperatures, final_temperature=3.0))
    expected = stops(sureness, thresholds, 8)
    alone = [session.run(row) for row in x]
    assert [answer.exit for answer in alone] == expected
    for n, answer in enumerate(alone):
        np.testing.assert_allclose(answer.logits, logits[answer.exit][n], rtol=RTOL, atol=ATOL)
        assert answer.temperature == {**temperatures, FINAL: 3.0}[answer.exit]
        assert answer.macs == four_exits().plan.macs_at(enabled)[answer.exit]
    for one, other in zip(session.run_batch(x), alone, strict=True):
        same(one, other)
    for n, (row, answer) in enumerate(zip(x, alone)):
        for to_end in (False, True):
            trace = session.trace(row, to_end=to_end)
            same(replace(trace.answer, macs=answer.macs), answer)
            for visit in trace.visits:
                if visit.exit in enabled and policy != "temporal":
                    assert visit.score == pytest.approx(sureness[visit.exit][n], rel=1e-3, abs=1e-3)


def test_policies_differ_where_they_stop():
    """The test above would hold of scores that are all alike."""
    x = inputs(400)
    logits = recorded(x)
    taken = {}
    for policy in ("top1", "entropy", "margin", "renyi_entropy", "patience", "gates", "jei"):
        sureness = sureness_of(policy, NAMES, logits, {})
        thresholds = {name: 1.5 if policy == "patience" else float(np.quantile(sureness[name], 0.6)) for name in NAMES}
        session = session_of(profile_of(policy, thresholds))
        taken[policy] = tuple(answer.exit for answer in session.run_batch(x))
        assert len(set(taken[policy])) >= 3
    assert len(set(taken.values())) == len(taken)


def test_a_gate_decides_by_its_own_exits_weights():
    wide, shut = (0.0, 0.0, 0.0, 0.0, 5.0), (0.0, 0.0, 0.0, 0.0, -5.0)
    profile = profile_of("gates", dict.fromkeys(NAMES, 0.5))
    for open_one in NAMES:
        exits = {name: replace(setting, gate=wide if name == open_one else shut) for name, setting in profile.exits.items()}
        assert session_of(replace(profile, exits=exits)).run(inputs(1)).exit == open_one


def test_patience_looks_at_enabled_exits_alone():
    """Exits that a trace to the end runs besides do not count."""
    x = inputs(80)
    labels = {name: logits.argmax(axis=1) for name, logits in recorded(x).items()}
    row = next(n for n in range(80) if labels["exit1"][n] == labels["exit3"][n] != labels["exit2"][n])
    session = session_of(profile_of("patience", {"exit1": 2.0, "exit3": 2.0}))
    assert session.run(x[row]).exit == "exit3"
    assert session.trace(x[row], to_end=True).answer.exit == "exit3"
    session = session_of(profile_of("patience", {"exit1": 2.0, "exit2": 2.0, "exit3": 2.0}))
    assert session.run(x[row]).exit != "exit3"


def test_without_a_stream_a_temporal_profile_takes_no_exit():
    session = session_of(profile_of("temporal", dict.fromkeys(NAMES, 0.0)))
    assert {session.run(row).exit for row in inputs(4)} == {answer.exit for answer in session.run_batch(inputs(4))} == {FINAL}


def test_a_trace_says_that_an_exit_without_a_gate_has_no_score():
    profile = profile_of("gates", {"exit2": 0.0})
    profile = replace(profile, exits={**profile.exits, "exit1": replace(profile.exits["exit1"], gate=())})
    trace = session_of(profile).trace(inputs(1), to_end=True)
    assert [math.isnan(visit.score) for visit in trace.visits] == [True, False, False, False]
    assert trace.answer.exit == "exit2"


def test_settings_that_a_policy_cannot_decide_by_are_refused_and_nothing_changes():
    session = session_of(profile_of("gates", {"exit1": 0.0}))
    for setting in (ExitSetting(True, 0.5, 1.0), ExitSetting(True, 0.5, 1.0, (1.0,)), ExitSetting(True, math.nan, 1.0, (1.0,) * 5)):
        with pytest.raises(DataError, match="the exit 'exit1' cannot decide by"):
            session.change_exits(settings={"exit1": setting})
    assert (session.version.number, session.run(inputs(1)).exit) == (0, "exit1")
    session.change_exits(settings={"exit1": ExitSetting(True, 1.5, 1.0, (1.0,) * 5)})
    assert session.run(inputs(1)).exit == FINAL


# --- one exit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, FINAL])
def test_an_answer_can_be_asked_for_at_one_exit_and_costs_its_way_and_its_head(name):
    x = inputs(5)
    expected, plan = recorded(x)[name], four_exits().plan
    session = session_of()
    pinned = session_of()
    pinned.use(exit=name)
    for answers in ([session.run(row, exit=name) for row in x], [pinned.run(row) for row in x], pinned.run_batch(x)):
        assert {answer.exit for answer in answers} == {name}
        assert {answer.macs for answer in answers} == {plan.macs_at([name])[name]}
        np.testing.assert_allclose([answer.logits for answer in answers], expected, rtol=RTOL, atol=ATOL)
    assert session.run(x[0]).exit == FINAL


def test_no_other_head_runs_and_nothing_behind_the_exit(monkeypatch):
    opened = []
    open_session = onnxruntime_engine.OnnxRuntimeEngine._open
    monkeypatch.setattr(onnxruntime_engine.OnnxRuntimeEngine, "_open", lambda self, stretch: (opened.append(stretch), open_session(self, stretch))[1])
    session_of().run(inputs(1), exit="exit3")
    (stretch,) = [stretch for stretch in opened if stretch.exit == "exit3"]
    assert [name for name in stretch.segments if name.startswith("head_")] == ["head_exit3"]
    assert set(stretch.outputs) == {"exit3.logits", "exit3.z", "exit3.scores"}
    assert "trunk_final" not in stretch.segments


def test_an_exit_that_there_is_not_is_refused_with_those_there_are():
    session = session_of()
    for call in (lambda: session.run(inputs(1), exit="exit9"), lambda: session.use(exit="exit9")):
        with pytest.raises(PlanError, match="there is no exit 'exit9'\n  hint: this network has exit1, exit2, exit3, exit4, and final"):
            call()
    assert session.run(inputs(1)).exit == FINAL


def test_a_profiles_temperatures_and_quantiles_stay_where_the_exit_is_asked_for():
    """Of an exit that the profile has switched off too."""
    profile = profile_of("patience", {"exit1": 1.0}, temperatures={"exit2": 2.5}, final_temperature=3.0)
    profile = replace(profile, conformal=Conformal(0.1, "general", {**dict.fromkeys(NAMES, 0.25), FINAL: 0.5}, 100))
    session = session_of(profile)
    answers = [session.run(inputs(1), exit=name) for name in ("exit2", FINAL)]
    assert [(answer.exit, answer.temperature, answer.quantile) for answer in answers] == [("exit2", 2.5, 0.25), (FINAL, 3.0, 0.5)]
    session.use(exit="exit2")
    same(session.run(inputs(1)), answers[0])
    assert session.profile_name is None
    session.use()
    assert (session.profile_name, session.run(inputs(1)).exit) == ("default", "exit1")


def test_exits_asked_for_follow_changed_heads_and_settings():
    session = session_of(profile_of("top1", {"exit1": 2.0}))
    session.use(exit="exit2")
    before = session.run(inputs(1))
    bias = np.arange(5, dtype=np.float32)
    session.change_exits({"exit_heads.exit2.classifier.bias": four_exits().classifiers()["exit_heads.exit2.classifier.bias"] + bias})
    after = session.run(inputs(1))
    np.testing.assert_allclose(after.logits - before.logits, bias, atol=1e-4)
    session.change_exits(settings={"exit2": ExitSetting(False, 2.0, 4.0)}, profile="default")
    assert (session.run(inputs(1)).temperature, session.run(inputs(1), exit="exit2").temperature) == (4.0, 4.0)
    session.use()
    assert session.run(inputs(1), exit="exit2").temperature == 4.0


def test_a_trace_under_one_exit_is_its_visit_and_goes_on_to_the_end_where_asked():
    session = session_of(profile_of("gates", {}))
    session.use(exit="exit2")
    x = inputs(1)
    short, whole = session.trace(x), session.trace(x, to_end=True)
    assert ([visit.exit for visit in short.visits], short.full) == (["exit2"], None)
    assert [visit.exit for visit in whole.visits] == list(NAMES)
    np.testing.assert_allclose(whole.full, recorded(x)[FINAL][0], rtol=RTOL, atol=ATOL)
    same(replace(whole.answer, macs=short.answer.macs), short.answer)
    session.use(exit=FINAL)
    assert (session.trace(x).visits, session.trace(x).answer.exit) == ((), FINAL)


@pytest.mark.parametrize("only", ["exit3", FINAL])
def test_a_trace_under_one_exit_ends_where_run_does_whatever_the_profile_would(only):
    session = session_of(profile_of("top1", {"exit1": 0.0}))
    session.use(exit=only)
    x = inputs(1)
    assert session.run(x).exit == session.trace(x, to_end=True).answer.exit == only


def test_other_thresholds_than_the_profiles_have_no_sets():
    sets = Conformal(0.1, "general", dict.fromkeys((*NAMES, FINAL), 0.8), 100)
    session = session_of(replace(profile_of("top1", {"exit1": 0.0}), conformal=sets))
    assert session.run(inputs(1)).prediction_set is not None
    session.change_exits(settings={"exit1": ExitSetting(True, 0.1, 1.0)})
    assert session.run(inputs(1)).prediction_set is None


def test_one_exit_runs_under_any_mask_where_no_profile_is_in_use():
    artifact = skipping()[1]
    session, x = Session(artifact), pictures(2)
    name = artifact.plan.exits[0].name
    mask = "1" * len(artifact.plan.skips)
    expected = session.record(x, mask).logits[name]
    np.testing.assert_allclose(session.run(x[0], mask, exit=name).logits, expected[0], rtol=RTOL, atol=ATOL)
    session.use(exit=name)
    np.testing.assert_allclose([answer.logits for answer in session.run_batch(x, mask)], expected, rtol=RTOL, atol=ATOL)
    with_profile = artifact.with_profile("default", replace(profile_for(artifact, {}), skip="0" * len(artifact.plan.skips)))
    session = Session(with_profile)
    session.use(exit=name)
    with pytest.raises(PlanError, match="the profile 'default' was calibrated for the mask"):
        session.run(x[0], mask)


# --- sets of classes ------------------------------------------------------------------------------------------------


def test_an_answer_has_no_set_where_the_profile_has_no_quantiles():
    assert session_of(profile_of("top1", {"exit1": 0.0})).run(inputs(1)).prediction_set is None
    assert session_of().run_batch(inputs(1))[0].prediction_set is None


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 20))
def test_a_set_holds_the_classes_that_are_likely_enough_the_likeliest_first(early, late, seed):
    profile = profile_of("top1", {"exit1": 0.6}, temperatures={"exit1": 2.0}, final_temperature=0.5)
    session = session_of(replace(profile, conformal=Conformal(0.1, "per_exit", {**dict.fromkeys(NAMES, early), FINAL: late}, 100)))
    for answer in (session.run(inputs(1, seed)), session.run_batch(inputs(1, seed))[0]):
        quantile, temperature = (late, 0.5) if answer.exit == FINAL else (early, 2.0)
        p = np.exp(answer.logits.astype(float) / temperature) / np.exp(answer.logits.astype(float) / temperature).sum()
        assume(np.abs(p - (1 - quantile)).min() > 1e-9)
        likely = sorted((label for label in range(5) if p[label] >= 1 - quantile), key=lambda label: -p[label])
        assert answer.prediction_set == tuple(likely)


def test_the_class_that_a_quantile_was_taken_from_is_in_its_own_set():
    """To the last bit: 1 - p there and here are the same number."""
    for row in recorded(inputs(50))[FINAL]:
        p = softmax(row)
        for label in range(5):
            answer = Answer(0, FINAL, row, 1.0, 0, 0.0, (), float(1 - p[label]))
            assert label in answer.prediction_set


def test_a_quantile_of_one_holds_all_classes_and_one_of_zero_none_but_a_certain_one():
    flat, certain = np.zeros(3, np.float32), np.array([0, 1e4, 0], np.float32)
    assert Answer(0, FINAL, flat, 1.0, 0, 0.0, (), 1.0).prediction_set == (0, 1, 2)
    assert Answer(0, FINAL, flat, 1.0, 0, 0.0, (), 0.0).prediction_set == ()
    assert Answer(1, FINAL, certain, 1.0, 0, 0.0, (), 0.0).prediction_set == (1,)


# --- a batch within a budget ----------------------------------------------------------------------------------------


def costs(exits: tuple[str, ...]) -> list[float]:
    plan = four_exits().plan
    return [macs / plan.full_macs for macs in plan.macs_at(exits).values()]


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ("patience", "temporal")])
@pytest.mark.parametrize("budget", [0.55, 0.8])
def test_the_surest_rows_leave_first_and_the_batch_keeps_its_budget(policy, budget):
    x, exits = inputs(40), ("exit1", "exit2", "exit4")
    logits = recorded(x)
    session = session_of(profile_of(policy, dict.fromkeys(exits, 0.0)))
    answers = session.run_batch(x, budget_macs=budget)
    share = {name: macs / four_exits().plan.full_macs for name, macs in four_exits().plan.macs_at(exits).items()}
    assert [answer.macs / four_exits().plan.full_macs for answer in answers] == [share[answer.exit] for answer in answers]
    assert costs(exits)[0] < np.mean([share[answer.exit] for answer in answers]) <= budget
    ranked_by = {"patience": "top1", "jei": "gates"}.get(policy, policy)
    sureness, still = sureness_of(ranked_by, exits, logits, {}), np.arange(40)
    for name in exits:
        left = [n for n in still if answers[n].exit == name]
        stayed = [n for n in still if answers[n].exit != name]
        assert not left or not stayed or sureness[name][left].min() >= sureness[name][stayed].max() - 1e-3
        still = np.array(stayed)
    for n, answer in enumerate(answers):
        np.testing.assert_allclose(answer.logits, logits[answer.exit][n], rtol=RTOL, atol=ATOL)


def test_without_a_profile_a_budget_runs_all_exits_by_the_largest_probability():
    x = inputs(30)
    plain, top1 = session_of(), session_of(profile_of("top1", dict.fromkeys(NAMES, 2.0)))
    temporal = session_of(profile_of("temporal", dict.fromkeys(NAMES, 2.0)))
    expected = [answer.exit for answer in top1.run_batch(x, budget_macs=0.7)]
    assert len(set(expected)) >= 3
    assert [answer.exit for answer in plain.run_batch(x, budget_macs=0.7)] == expected
    assert [answer.exit for answer in temporal.run_batch(x, budget_macs=0.7)] == expected
    assert {answer.exit for answer in plain.run_batch(x)} == {FINAL}


def test_a_budget_that_all_can_spend_lets_all_run_to_the_end():
    everything = costs(NAMES)[-1]
    assert {answer.exit for answer in session_of().run_batch(inputs(9), budget_macs=everything)} == {FINAL}
    assert {answer.exit for answer in session_of().run_batch(inputs(9), budget_macs=costs(NAMES)[0])} == {"exit1"}


def test_a_budget_below_the_first_exit_is_refused_with_the_least_before_anything_runs(monkeypatch):
    session = session_of()
    monkeypatch.setattr(Step, "run", lambda *_: pytest.fail("it ran"))
    least = costs(NAMES)[0]
    for budget in (0.0, least * 0.99, -1.0, math.nan):
        with pytest.raises(DataError, match=rf"the first exit takes {least:.4g}\n  hint: give 0\.\d+ or more") as raised:
            session.run_batch(inputs(4), budget_macs=budget)
    named = float(raised.value.hint.split()[1])
    monkeypatch.undo()
    assert least <= named < least * 1.01
    assert {answer.exit for answer in session.run_batch(inputs(4), budget_macs=named)} == {"exit1"}


def test_rows_whose_scores_are_no_numbers_are_the_least_sure():
    chosen = session_module._surest(np.array([np.nan, 0.5, 0.9, 0.5]), 2)
    assert chosen.tolist() == [False, True, True, False]
    assert session_module._surest(np.array([np.nan, -np.inf]), 1).tolist() == [False, True]


def test_a_sample_whose_score_is_no_number_goes_on(monkeypatch):
    session = session_of(profile_of("top1", dict.fromkeys(NAMES, 0.0)))
    assert {answer.exit for answer in session.run_batch(inputs(4))} == {NAMES[0]}
    monkeypatch.setattr(session_module, "score", lambda policy, scores, *rest: (np.full(len(scores), np.nan), rest[-1]))
    assert {answer.exit for answer in session.run_batch(inputs(4))} == {FINAL}


def test_a_batch_within_a_budget_refuses_what_any_batch_does():
    with pytest.raises(DataError, match="the input has shape"):
        session_of().run_batch(inputs(0), budget_macs=0.5)


def test_exits_and_budgets_go_together_with_every_pair_of_exits():
    """Costs are those of the exits that are enabled, whichever they are."""
    for pair in itertools.combinations(NAMES, 2):
        session = session_of(profile_of("margin", dict.fromkeys(pair, 0.0)))
        budget = (costs(pair)[0] + costs(pair)[1]) / 2
        spent = [answer.macs for answer in session.run_batch(inputs(10), budget_macs=budget)]
        assert np.mean(spent) / four_exits().plan.full_macs <= budget + 1e-12


def test_plain_networks_have_one_place_to_stop():
    artifact = exported("plain")[1]
    assert Session(artifact).run(inputs(1), exit=FINAL).exit == FINAL
    with pytest.raises(DataError, match=r"the first exit takes 1\n"):
        Session(artifact).run_batch(inputs(2), budget_macs=0.5)
    with pytest.raises(PlanError, match="this network has no early exits, and final"):
        Session(artifact).run(inputs(1), exit="exit1")


def test_scores_of_recorded_outputs_are_the_engines():
    """What calibration reckons with is what a session decides by."""
    x = inputs(6)
    logits = recorded(x)
    session = session_of(profile_of("top1", {"exit1": 2.0}, temperatures={"exit1": 0.7}))
    found = [session.trace(row).visits[0].score for row in x]
    np.testing.assert_allclose(found, from_logits(logits["exit1"], 0.7)[:, 0], rtol=1e-4)
