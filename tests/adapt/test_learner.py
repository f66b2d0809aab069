"""What is learnt from, and what is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.recorded_device import Device, judged
from exitify.adapt import learner as module
from exitify.adapt.learner import Learner
from exitify.adapt.review import Factory, Proposal, Ruling, propose
from exitify.adapt.settings import Guards, Learning
from exitify.adapt.update import Classifier, Sgd, softmax
from exitify.artifact.manifest import Conformal, ExitSetting
from exitify.calibration.thresholds import NEVER
from exitify.errors import DataError, StateError, UnknownProfile
from exitify.plan import FINAL
from exitify.runtime.answers import Answer, Trace, Visit
from tests import digits
from tests.adapt.world import FEW, artifact, careful, device, population, stream
from tests.artifacts import exported
from tests.skipping import skipping

QUICK = Guards(audit=0.3, review_every=100, audit_first=100, audits_kept=300)


def what_happened(seen: Device) -> list[str]:
    return [happening.what for _, happening in seen.happened]


def trace_of(taken: str, *, sure: float = 9.0, full: bool = False, seed: int = 0) -> Trace:
    """A run that left at this exit and said class 4."""
    random, points = np.random.default_rng(seed), artifact().plan.exits
    logits = np.zeros(10, np.float32)
    logits[4] = sure
    visits = []
    for point in points:
        visits.append(Visit(point.name, logits, random.standard_normal(point.head.width).astype(np.float32), 0.9))
        if point.name == taken and not full:
            break
    ends = full or taken == FINAL
    return Trace(Answer(4, taken, logits, 1.0, 0, 0.0, ()), tuple(visits), logits if ends else None)


def moved(learner: Learner) -> set[str]:
    names = [point.name for point in artifact().plan.exits]
    return {name for name, ours, theirs in zip(names, learner.learnt, learner.factory.ruling.heads) if not np.array_equal(ours.weight, theirs.weight)}


def test_exits_before_the_selected_one_learn_and_it_does_not() -> None:
    for taken, expected in (("exit1", set()), ("exit2", {"exit1"}), (FINAL, {"exit1", "exit2"})):
        learner = Learner(artifact(), "default", Learning(Sgd(0.1)))
        learner.observe(trace_of(taken), audited=False)
        assert moved(learner) == expected


def test_of_an_audited_run_every_exit_learns_from_the_networks_own_answer() -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(0.1)))
    learner.observe(trace_of("exit1", full=True), audited=True)
    assert moved(learner) == {"exit1", "exit2"}
    assert learner.audited == len(learner.audits) == 1


def test_nothing_is_learnt_from_an_answer_that_is_unsure() -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(0.1), guards=Guards(gate=0.5)))
    at = learner.factory.temperatures[-1]
    learner.observe(trace_of(FINAL, sure=float(at * np.log(9 * 0.45 / 0.55))), audited=False)
    assert (moved(learner), learner.learnt_from, learner.seen.counts.sum()) == (set(), 0, 0)
    learner.observe(trace_of(FINAL, sure=float(at * np.log(9 * 0.55 / 0.45))), audited=False)
    assert (moved(learner), learner.learnt_from, learner.seen.counts.sum()) == ({"exit1", "exit2"}, 1, 1)


def test_without_guard_rails_a_stream_of_updates_is_the_papers_as_torch_computes_it() -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(1e-3), guards=None))
    (point, *_) = artifact().plan.exits
    own = artifact().classifiers()
    linear = torch.nn.Linear(point.head.width, 10)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.array(own[point.weight])))
        linear.bias.copy_(torch.from_numpy(np.array(own[point.bias])))
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    for seed in range(300):
        run = trace_of("exit2", seed=seed)
        learner.observe(run, audited=False)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(torch.from_numpy(run.visits[0].features)[None]), torch.tensor([4])).backward()
        optimizer.step()
    assert learner.updates == 300
    np.testing.assert_allclose(learner.in_use.heads[0].weight, linear.weight.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(learner.in_use.heads[0].bias, linear.bias.detach().numpy(), rtol=0, atol=1e-5)
    assert learner.in_use.thresholds is learner.factory.ruling.thresholds


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_a_batch_is_one_step_on_the_mean(targets: str) -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(0.1), targets, batch=4))  # type: ignore[arg-type]
    head, at = learner.factory.ruling.heads[0], learner.factory.temperatures[0]
    runs = [trace_of(FINAL, seed=seed) for seed in range(4)]
    for run in runs[:3]:
        learner.observe(run, audited=False)
    assert moved(learner) == set()
    learner.observe(runs[3], audited=False)
    z = np.array([run.visits[0].features for run in runs], np.float64)
    wanted = np.eye(10)[[4] * 4] if targets == "hard" else softmax(np.array([run.full for run in runs]) / learner.factory.temperatures[-1])
    error = softmax((z @ head.weight.T + head.bias) / at) - wanted
    np.testing.assert_allclose(learner.learnt[0].weight, head.weight - 0.1 * error.T @ z / 4, rtol=0, atol=1e-5)
    assert learner.updates == 2


def test_a_head_moves_no_further_than_it_may() -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(5.0), guards=Guards(most_drift=0.2)))
    for seed in range(module.DRIFT_EVERY):
        learner.observe(trace_of(FINAL, seed=seed), audited=False)
    for ours, theirs in zip(learner.learnt, learner.factory.ruling.heads):
        assert ours.distance(theirs) == pytest.approx(0.2, rel=1e-4)


def test_a_head_that_is_not_finite_begins_again() -> None:
    seen = device(Learning(Sgd(1e38)))
    with np.errstate(all="ignore"):
        for seed in range(2 * module.DRIFT_EVERY):
            seen.learner.observe(trace_of(FINAL, seed=seed), audited=False)
    assert "rollback" in what_happened(seen)
    assert all(head.is_finite for head in seen.learner.in_use.heads)
    assert seen.learner.in_use is seen.learner.factory.ruling


def test_audits_are_drawn_as_often_as_it_says_and_more_at_first() -> None:
    learner = Learner(artifact(), "default", Learning(guards=Guards(audit=0.05, audit_first=100)), seed=3)
    drawn = []
    for seed in range(4000):
        drawn.append(learner.wants_audit())
        learner.observe(trace_of("exit1", seed=seed), audited=False)
    assert all(drawn[:100])
    assert np.mean(drawn[3000:]) == pytest.approx(0.05, abs=0.015)
    assert np.sum(drawn[:2000]) == pytest.approx(100 * (1 + np.log(20)), rel=0.15)


def test_heads_that_learn_answer_nothing_until_they_are_reviewed() -> None:
    seen = device(Learning(Sgd(0.5), guards=replace(QUICK, review_every=10_000)))
    seen.see(stream(400, FEW))
    assert moved(seen.learner) == {"exit1", "exit2"}
    assert seen.learner.in_use is seen.learner.factory.ruling
    assert seen.versions == [(0, seen.learner.factory.ruling)]


def test_a_device_that_sees_few_classes_gets_cheaper_and_stays_as_good_on_the_others() -> None:
    seen = device(Learning(guards=QUICK))
    seen.see(stream(1500, FEW))
    factory, rows = seen.learner.factory, np.arange(len(population().labels))
    few = np.isin(population().labels, FEW)
    before, after = (judged(factory, one, population(), rows[few]) for one in (factory.ruling, seen.learner.in_use))
    assert "in use" in what_happened(seen)
    assert after.cost < 0.95 * before.cost
    assert after.accuracy >= before.accuracy - 0.02
    others_before, others = (judged(factory, one, population(), rows[~few]) for one in (factory.ruling, seen.learner.in_use))
    assert others.accuracy >= others_before.accuracy - 0.03


def test_the_same_stream_and_seed_are_the_same_decisions() -> None:
    lives = []
    for _ in range(2):
        seen = device(Learning(guards=QUICK), seed=5)
        seen.see(stream(800, FEW))
        lives.append((seen.happened, seen.learner.updates, [head.weight.tobytes() for head in seen.learner.in_use.heads]))
    assert lives[0] == lives[1]


def test_a_promised_rate_is_proven_before_new_heads_are_in_use() -> None:
    seen = device(Learning(guards=QUICK), of=careful())
    assert seen.learner.factory.is_proven
    seen.see(stream(6000, FEW))
    happened = what_happened(seen)
    assert happened[0] == "trial"
    assert "in use" in happened
    assert happened.index("trial") < happened.index("in use")
    rows = np.flatnonzero(np.isin(population().labels, FEW))
    for _, ruling in seen.versions[1:]:
        assert judged(seen.learner.factory, ruling, population(), rows).differs <= 0.05


def trial_of(learner: Learner, ruling: Ruling) -> Proposal:
    return Proposal(learner.in_use, ruling, 0.4, 0.6, 0.01, 0.01, 0.0, ())


def test_a_trial_that_differs_too_often_is_dropped_and_the_next_one_aims_lower() -> None:
    seen = device(Learning(guards=QUICK), of=careful())
    learner = seen.learner
    careless = replace(learner.factory.ruling, thresholds=np.zeros(2))
    learner.consider(trial_of(learner, careless))
    assert learner.trial is not None
    aim = learner.aim
    seen.see(stream(2000))
    assert what_happened(seen)[:2] == ["trial", "dropped"]
    assert learner.aim < aim
    assert all(np.array_equal(ruling.thresholds, learner.factory.ruling.thresholds) for _, ruling in seen.versions)


def test_each_trial_needs_more_evidence_so_that_all_together_err_no_more_than_allowed() -> None:
    learner = Learner(careful(), "default", Learning(guards=QUICK))
    total = 0.0
    for _ in range(50):
        learner.trial = None
        learner.consider(trial_of(learner, learner.factory.ruling))
        assert learner.trial is not None
        total += 1 / learner.trial.needed
    assert total <= QUICK.trial_error
    assert total > 0.9 * QUICK.trial_error


def careless_in_use(seen: Device) -> None:
    """Heads in use that break the promise, as if the world had changed."""
    learner = seen.learner
    heads = tuple(Classifier(np.roll(head.weight, 1, axis=0).copy(), np.roll(head.bias, 1).copy()) for head in learner.factory.ruling.heads)
    learner._use(Ruling(heads, np.full(2, 0.3)))


@pytest.mark.parametrize("profile", [artifact, careful], ids=["accuracy", "rate"])
def test_a_broken_promise_makes_thresholds_stricter_then_stops_learning_then_rolls_back(profile) -> None:
    seen = device(Learning(guards=replace(QUICK, review_every=100_000)), of=profile())
    careless_in_use(seen)
    wrong = seen.learner.in_use
    seen.see(stream(4000))
    happened = what_happened(seen)
    assert happened[:3] == ["thresholds up", "updates off", "rollback"]
    assert seen.learner.stage == "stopped"
    assert np.allclose(seen.versions[1][1].thresholds, 1 - (1 - wrong.thresholds) / 2)
    assert all(ours is theirs for ours, theirs in zip(seen.learner.in_use.heads, seen.learner.factory.ruling.heads))
    reasons = [what.reason for _, what in seen.happened]
    assert "audited inputs" in reasons[0]
    assert moved(seen.learner) == set()


def test_where_the_factorys_own_heads_break_their_promise_no_exit_is_taken_in_the_end() -> None:
    made = careful()
    profile = made.profile("default")
    bold = replace(profile, exits={name: replace(one, enabled=True, threshold=0.15) for name, one in profile.exits.items()})
    seen = device(Learning(guards=replace(QUICK, review_every=100_000)), of=made.with_profile("default", bold))
    rows = np.arange(len(population().labels))
    assert judged(seen.learner.factory, seen.learner.in_use, population(), rows).differs > 0.08
    seen.see(stream(12_000))
    assert what_happened(seen)[0] == "thresholds up"
    assert judged(seen.learner.factory, seen.learner.in_use, population(), rows).differs <= 0.05
    assert (seen.learner.in_use.thresholds >= np.array([0.15] * 2)).all()


def test_heads_that_forget_the_memory_begin_again_and_in_the_end_learn_no_more() -> None:
    seen = device(Learning(Sgd(0.3), guards=replace(QUICK, gate=0.0, most_drift=5.0)))
    z = [array[0] for array in population().features.values()]
    poison = np.zeros(10, np.float32)
    poison[7] = 20.0
    for _ in range(3000):
        audit = seen.learner.wants_audit()
        seen.take(seen.trace(z, poison, to_end=audit), audited=audit)
    happened = what_happened(seen)
    assert happened.count("rollback") >= module.FORGIVEN
    assert "updates off" in happened
    rows = np.arange(len(population().labels))
    before, after = (judged(seen.learner.factory, one, population(), rows) for one in (seen.learner.factory.ruling, seen.learner.in_use))
    assert after.accuracy >= before.accuracy - 0.03


def test_the_same_poison_without_guard_rails_breaks_the_heads() -> None:
    seen = device(Learning(Sgd(0.3), guards=None))
    z = [array[0] for array in population().features.values()]
    poison = np.zeros(10, np.float32)
    poison[7] = 20.0
    names = [point.name for point in artifact().plan.exits]
    for _ in range(3000):
        visits = tuple(Visit(name, head.weight @ feature + head.bias, feature, 0.1) for name, head, feature in zip(names, seen.learner.learnt, z))
        seen.take(Trace(Answer(7, FINAL, poison, 1.0, 0, 0.0, ()), visits, poison), audited=False)
    rows = np.arange(len(population().labels))
    before, after = (judged(seen.learner.factory, one, population(), rows) for one in (seen.learner.factory.ruling, seen.learner.in_use))
    assert after.accuracy < before.accuracy - 0.1


def proposal(shares: Mapping[int, float], guards: Guards = QUICK, *, of=artifact, forget: bool = False) -> tuple[Factory, Proposal]:
    made = Factory.of(of(), "default")
    made = replace(made, memory=None) if forget else made
    seen = np.zeros(10)
    for label, share in shares.items():
        seen[label] = share
    rows = population().rows(stream(400, tuple(shares)))
    return made, propose(made, made.ruling.heads, made.ruling, seen, rows, guards, guards.aim)


def test_a_proposal_keeps_what_it_must_on_audits_and_memory_and_costs_less() -> None:
    factory, found = proposal({3: 0.4, 5: 0.3, 8: 0.3})
    assert found.ruling is not None
    assert found.cost < 0.98 * found.cost_now
    assert found.rare_drop <= QUICK.rare_drop
    rows = population().rows(stream(400, FEW))
    more = found.ruling.differs(factory, rows) - factory.ruling.differs(factory, rows)
    assert more.mean() <= 0
    memory = factory.memory
    assert memory is not None
    rare = ~np.isin(memory.labels, FEW)
    held = [array[rare].astype(np.float32) for array in memory.features.values()], memory.logits[rare].astype(np.float32)

    def right(ruling: Ruling) -> float:
        taken = factory.outputs(ruling.heads, held)
        confidence = taken.confidence(factory.temperatures, "top1")
        answers = [next((k for k in range(2) if confidence[k, i] >= ruling.thresholds[k]), 2) for i in range(int(rare.sum()))]
        said = taken.logits.argmax(axis=2)[answers, np.arange(int(rare.sum()))]
        return float((said == memory.labels[rare]).mean())

    assert right(factory.ruling) - right(found.ruling) == pytest.approx(found.rare_drop, abs=1e-9)


def test_without_a_memory_only_half_of_what_is_seen_is_believed() -> None:
    _, found = proposal({3: 0.4, 5: 0.3, 8: 0.3}, forget=True)
    assert found.ruling is not None
    assert found.ruling.left == 0.5


def test_where_nothing_is_cheaper_nothing_is_proposed() -> None:
    _, found = proposal({3: 0.4, 5: 0.3, 8: 0.3}, replace(QUICK, aim=0.0), of=careful)
    assert found.ruling is None
    assert found.cost == found.cost_now


def test_what_was_compared_with_other_heads_is_not_considered() -> None:
    learner = Learner(artifact(), "default", Learning(guards=QUICK))
    late = replace(trial_of(learner, learner.factory.ruling), in_use=replace(learner.in_use))
    assert not learner.consider(late)
    assert learner.in_use is learner.factory.ruling
    begun = replace(trial_of(learner, replace(learner.factory.ruling)), forgotten=("exit1",), epoch=learner.epoch)
    learner.roll_back("asked for")
    assert not learner.consider(begun)
    assert (learner.in_use is learner.factory.ruling, learner.forgot) == (True, 0)


def test_where_nothing_can_be_learnt_it_is_said() -> None:
    with pytest.raises(StateError, match="nothing can be learnt without exits and a profile"):
        Learner(artifact(), "none")
    with pytest.raises(StateError, match="nothing can be learnt without exits"):
        Learner(exported("plain")[1], "default")
    with pytest.raises(UnknownProfile, match="no profile 'winter'"):
        Learner(artifact(), "winter")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gate": 1.5}, "gate 1.5 is no share"),
        ({"left_for_rare": (0.3, -0.1)}, "left_for_rare -0.1 is no share"),
        ({"left_for_rare": ()}, "without audits, chances of error"),
        ({"audit": 0.0}, "without audits, chances of error"),
        ({"review_every": 10}, "at least 50"),
        ({"most_drift": 0.0}, "most_drift above 0"),
    ],
)
def test_guard_rails_that_are_none_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        Guards(**wrong)  # type: ignore[arg-type]
    assert raised.value.hint


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 0"):
        Learning(batch=0)


def test_a_profile_that_leaves_blocks_out_cannot_be_watched() -> None:
    made = skipping()[1]
    profile = replace(digits_profile(made), skip="1" + "0" * (len(made.plan.skips) - 1))
    with pytest.raises(StateError, match="leaves blocks out"):
        Learner(made.with_profile("default", profile), "default")


def digits_profile(made):
    from tests.artifacts import profile_for

    return profile_for(made, {})


def test_where_the_factory_is_not_trusted_no_exit_is_taken_before_one_is_proven_here() -> None:
    seen = device(Learning(guards=replace(QUICK, trust_factory=False)), of=careful())
    assert (seen.learner.in_use.thresholds == NEVER).all()
    rows = stream(4000, FEW)
    for row in rows:
        is_proven = "in use" in what_happened(seen)
        before = seen.audited
        seen.see([row])
        assert is_proven or seen.audited == before + 1, "until then all inputs are audited"
    assert what_happened(seen)[:1] == ["trial"]
    assert "in use" in what_happened(seen)
    few = np.flatnonzero(np.isin(population().labels, FEW))
    assert judged(seen.learner.factory, seen.versions[0][1], population(), few).cost == pytest.approx(1.0)
    for _, ruling in seen.versions:
        assert judged(seen.learner.factory, ruling, population(), few).differs <= 0.05
    seen.learner.roll_back("asked for")
    assert (seen.learner.in_use.thresholds == NEVER).all()


def test_when_other_classes_come_it_goes_back_at_once_and_learns_them() -> None:
    seen = device(Learning(guards=QUICK))
    seen.see(stream(900, FEW))
    assert what_happened(seen)[-1] == "in use"
    rare = seen.learner.in_use.rare
    assert rare is not None
    assert set(np.flatnonzero(~rare)) == set(FEW)
    others = tuple(label for label in range(10) if label not in FEW)
    before = seen.learner.answers
    while what_happened(seen)[-1] != "rollback":
        seen.see(stream(1, others, seed=seen.learner.answers))
        assert seen.learner.answers < before + 150
    assert seen.learner.in_use is seen.learner.factory.ruling
    assert seen.happened[-1][1].reason.startswith("other classes are seen: ")
    assert seen.learner.stage == "learning"
    seen.see(stream(900, others))
    assert seen.learner.seen.shares[list(FEW)].sum() < 0.1, "what was seen before does not count any more"


def test_classes_that_were_expected_change_nothing() -> None:
    seen = device(Learning(guards=QUICK))
    seen.see(stream(900, FEW))
    versions = len(seen.versions)
    seen.learner._next_review = 10**9
    seen.see(stream(1500, FEW, seed=3))
    assert len(seen.versions) == versions


def test_absurd_inputs_are_no_rows_to_search_thresholds_on() -> None:
    learner = Learner(artifact(), "default", Learning(guards=QUICK))
    run = trace_of("exit1", full=True)
    wild = replace(run, full=np.full(10, np.nan, np.float32))
    with np.errstate(all="ignore"):
        learner.observe(wild, audited=True)
        learner.observe(replace(run, visits=(replace(run.visits[0], features=run.visits[0].features * np.inf), run.visits[1])), audited=True)
    assert (learner.audited, len(learner.audits)) == (2, 0)


def test_a_promise_that_few_audits_could_show_is_not_reviewed_before_there_are_enough() -> None:
    assert module.fewest_audits(1.0, 1000) == 100
    assert module.fewest_audits(0.012, 1000) == 200
    assert module.fewest_audits(0.0001, 1000) == 1000
    seen = device(Learning(guards=replace(QUICK, audits_kept=50)), of=careful())
    seen.learner.aim = 1e-9
    seen.learner.consider(trial_of(seen.learner, replace(seen.learner.factory.ruling, thresholds=np.zeros(2))))
    seen.see(stream(3000))
    assert "dropped" in what_happened(seen)
    assert seen.learner.aim >= 0.04, "an aim that could never be shown would end all learning"


def test_answers_at_each_exit_are_counted_with_what_is_known_of_their_rate() -> None:
    learner = Learner(artifact(), "default", Learning(guards=QUICK))
    same, other = trace_of("exit1", full=True), trace_of("exit1", full=True)
    other = replace(other, answer=replace(other.answer, label=5))
    for run in (same, same, same, other):
        learner.observe(run, audited=True)
    learner.observe(same, audited=False)
    found = learner.at_exits()
    assert (found["exit1"].answers, found["exit1"].differed) == (4, 1)
    assert found["exit1"].at_most == pytest.approx(0.7514, abs=1e-4)  # of the beta distribution, 95 %
    assert (found["exit2"].answers, found["exit2"].at_most) == (0, 1.0)
    learner.roll_back("asked for")
    assert learner.at_exits()["exit1"].answers == 0


def test_heads_that_were_handed_out_are_never_written_to() -> None:
    learner = Learner(artifact(), "default", Learning(Sgd(0.1)))
    held, copies = [], []
    for seed in range(12):
        learner.observe(trace_of(FINAL, seed=seed), audited=False)
        if seed % 3 == 0:
            held.append(learner.learnt)
            copies.append([head.weight.copy() for head in held[-1]])
    for heads, weights in zip(held, copies):
        assert all(np.array_equal(head.weight, weight) for head, weight in zip(heads, weights))
    own = artifact().classifiers()
    assert all(np.array_equal(head.weight, own[point.weight]) for head, point in zip(learner.factory.ruling.heads, artifact().plan.exits))


def test_a_profile_that_a_device_could_not_keep_true_is_none_to_learn_under() -> None:
    artifact = digits.trained_artifact()
    plain = digits.profile(artifact, {"exit1": 0.5})
    proven = replace(plain, promise=replace(plain.promise, kind="max-drop", confidence=0.95))
    with pytest.raises(StateError, match="was proven to keep its accuracy, which a device without labels cannot prove again"):
        Learner(artifact.with_profile("other", proven), "other")
    sets = Conformal(0.1, "general", dict.fromkeys(artifact.plan.exit_names, 0.8), 100)
    with pytest.raises(StateError, match="has sets of classes, which hold for its heads as they were calibrated"):
        Learner(artifact.with_profile("other", replace(plain, conformal=sets)), "other")


@pytest.mark.parametrize("policy", ["entropy", "patience"])
def test_a_profile_whose_scores_do_not_end_at_one_is_none_to_learn_under(policy: str) -> None:
    artifact = digits.trained_artifact()
    exits = {"exit1": ExitSetting(True, -0.5, 1.0), "exit2": ExitSetting(True, -0.5, 1.0)}
    artifact = artifact.with_profile("other", replace(digits.profile(artifact, {}), policy=policy, exits=exits))  # type: ignore[arg-type]
    with pytest.raises(StateError, match=f"decides by {policy}, and a device learns under top1, margin"):
        Learner(artifact, "other")
