"""The runtime: segments in order, a decision after each head, no torch and no compiler."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from exitify.artifact.artifact import LEAST_TEMPERATURE, MOST_TEMPERATURE, NO_PROFILE, Artifact, setting_problem
from exitify.artifact.manifest import ExitSetting, InputContract, Policy
from exitify.errors import DataError, PlanError
from exitify.pictures import prepare_pictures
from exitify.plan import FINAL, SCORES, Mask, Stretch, mask_text
from exitify.runtime.answers import Answer, Recording, Trace, Visit
from exitify.runtime.batches import Batch, Helpers
from exitify.runtime.deadlines import FIRST_PASSES, StretchTimes
from exitify.runtime.engines import make_engine
from exitify.runtime.engines.base import ALIGNMENT, Array, Bound, Engine, Runner, aligned
from exitify.runtime.policies import BEFORE, LOOKING_BACK, History, score, scorer
from exitify.runtime.quotas import geometric_quotas
from exitify.runtime.steps import Rule, Setup, Step
from exitify.targets.board import conditions

if TYPE_CHECKING:
    from exitify.runtime.stream import Stream

RANKED_BY: Mapping[Policy, Policy] = {"temporal": "top1", "patience": "top1", "jei": "gates"}
"""What ranks a batch's rows for a budget where a policy's own score does not: it is one for all, or 0 where the gates opened long ago."""


@dataclass(frozen=True)
class ExitsVersion:
    """What may change between two runs with nothing loaded again: classifiers, and how a profile's exits decide.

    number: Of the version, from 0. tensors: Classifiers in place of the artifact's, by name; nobody changes them afterwards.
    of_profile: Classifiers that stand in place of all these under one profile, by its name and then by theirs.
    settings: In place of a profile's, by its name and by exit. setups: What follows from them, by the profile's name.
    """

    number: int = 0
    tensors: Mapping[str, Array] = field(default_factory=dict)
    of_profile: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, ExitSetting]] = field(default_factory=dict)
    setups: Mapping[str, Setup] = field(default_factory=dict, repr=False)


class Session:
    """Answers with one artifact, from any number of threads.

    Without a profile no exit is taken and nothing left out. The profile named `default` is used unless another is asked for.
    """

    def __init__(self, artifact: Artifact, *, engine: str = "auto", profile: str | None = None, threads: int = 1) -> None:
        """Prepare the network.

        Args:
            artifact: An opened artifact. Loading hands its graphs to the engine.
            engine: See `exitify.runtime.engines.make_engine`.
            profile: Name of a calibrated profile; None means `default` if there is one, `none` takes no exit.
            threads: Threads that one answer may use.

        Raises:
            UnknownProfile, EngineError: see there.
        """
        self.artifact = artifact
        self.engine: Engine = make_engine(engine, artifact, threads)
        self._classes = artifact.manifest.input.classes
        self._dtype = np.dtype(self.contract.dtype)
        self._dimensions = len(self.contract.shape)
        self._one_sample = (self.contract.shape, (1, *self.contract.shape))
        self._local = threading.local()
        self._changing = threading.Lock()
        self._heads = artifact.classifiers()
        self.version = ExitsVersion()
        self._calibrated: dict[str, Setup] = {}
        self._plain: dict[Mask, Setup] = {}
        self._recorders: dict[Mask, Setup] = {}
        self._runners: dict[Stretch, Runner] = {}
        self._whole: dict[tuple[str, str], tuple[Setup, Setup]] = {}
        self._ending: dict[tuple[str, Mask, str], tuple[Setup, Setup]] = {}
        self._times: dict[Stretch, StretchTimes] = {}
        self._clock = time.perf_counter_ns
        self._helpers = Helpers()
        self.use(profile)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, engine: str = "auto", profile: str | None = None, threads: int = 1) -> Session:
        """Open and check an artifact, and prepare it."""
        return cls(Artifact.open(path), engine=engine, profile=profile, threads=threads)

    @property
    def contract(self) -> InputContract:
        """What the network reads."""
        return self.artifact.manifest.input

    def use(self, profile: str | None = None, *, budget_ms: float | None = None, exit: str | None = None) -> None:  # noqa: A002
        """Switch to another profile, with its exits and its mask, between two calls; calls under way end with the one they began with.

        Args:
            profile: Its name; None means `default` if there is one; `none` is the whole network without exits.
            budget_ms: In place of a profile: the mask with the most accurate answers among those measured to take no longer,
                no exit taken.
            exit: Always answer at this exit, or at `final`, and run no other head. The profile's mask, temperatures and quantiles stay.

        Raises:
            UnknownProfile: there is none of that name. PlanError: there is no such exit; the hint lists those there are.
            DataError: nothing was measured, or under other conditions, or every mask takes longer than the budget.
        """
        if budget_ms is not None:
            setup = self._plain_setup(self.artifact.plan.mask(self._mask_within(budget_ms)))
            with self._changing:
                self._setup, self.profile_name = setup if exit is None else self._ending_at(setup, exit), None
            return
        if profile is None and "default" in self.artifact.profiles:
            profile = "default"
        name = None if profile == NO_PROFILE else profile
        if name is not None and name not in self._calibrated:
            self._calibrated.setdefault(name, self._make_setup(name, {}))
        setup = self._plain_setup(self.artifact.plan.mask(None)) if name is None else self._calibrated[name]
        if exit is not None:
            setup, name = self._ending_at(setup, exit), None
        with self._changing:
            self._setup, self.profile_name = setup, name

    def run(
        self,
        x: Array,
        skip: str | Sequence[bool] | None = None,
        *,
        exit: str | None = None,  # noqa: A002
        deadline_ms: float | None = None,
    ) -> Answer:
        """Answer for one sample, stopping as soon as the profile allows.

        Args:
            skip: Skip paths to leave out this time, `0110` for instance (see `Plan.mask`); None is the profile's mask.
            x: Ready for the network, `shape` or `(1, *shape)`; or one picture, uint8 `(H, W, C)`, that the contract prepares.
            exit: Answer at this exit, or at `final`, whatever the profile says, and run no other head.
            deadline_ms: Answer within this time of the call: the best answer so far stands when the next stretch would not be done by
                then, going by the longest of its last times. The profile may still stop earlier; with none, all exits are run. The first
                exit is always computed. The first call that meets a stretch never measured measures: it goes through the network some
                times and answers at its end, whatever the deadline.

        Raises:
            DataError: wrong shape or dtype, NaN or infinity, in the input or in the network's answer; a deadline that is no time.
            PlanError: the mask is none of this network, or the profile's thresholds belong to another one; there is no such exit.
        """
        started = self._clock()
        if not (type(x) is np.ndarray and x.dtype == self._dtype and x.shape in self._one_sample and _is_finite(x)):
            x = self._one(x)
        version = self.version
        setup = self._now(version) if skip is None else self._with_mask(skip, version)
        if exit is not None:
            setup = self._ending_at(setup, exit)
        if deadline_ms is not None:
            return self._run_within(deadline_ms, x, setup, version, started)
        bound = self._bound(setup, version)
        bound.set_input(x if x.ndim > self._dimensions else x[None])
        score, column, state = setup.score, setup.column, BEFORE
        if score is None:
            for index, step in enumerate(setup.steps):
                bound.step(index)
                if step.is_last or bound.value(step.scores)[0, column] >= step.threshold:
                    break
        else:
            for index, step in enumerate(setup.steps):
                bound.step(index)
                if step.is_last:
                    break
                sureness, state = score(bound.value(step.scores), bound.value(step.logits), step.gate, state)
                if sureness >= step.threshold:
                    break
        return self._answer(step, bound.value(step.logits)[0].copy(), started)

    def _run_within(self, deadline_ms: float, x: Array, setup: Setup, version: ExitsVersion, started: int) -> Answer:
        """As `run`, with a deadline; `started` is when it began, in the clock's nanoseconds."""
        if not (0 < deadline_ms < math.inf):
            raise DataError(f"a deadline of {deadline_ms} ms is no time", "give milliseconds above 0")
        setup = self._with_some_exit(setup)
        bound = self._bound(setup, version)
        bound.set_input(x if x.ndim > self._dimensions else x[None])
        if not all(step.times.readings for step in setup.steps):
            self._measure(setup, bound)
            last = setup.steps[-1]
            return self._answer(last, bound.value(last.logits)[0].copy(), started)
        until, now, state = started + deadline_ms * 1e6, self._clock(), BEFORE
        answering = setup.steps[0]
        for index, step in enumerate(setup.steps):
            if index and not step.times.fits(until - now):
                break
            bound.step(index)
            bound.value(step.logits)  # waits for a GPU
            answering, before, now = step, now, self._clock()
            step.times.add(now - before)
            if step.is_last:
                break
            sureness, state = setup.sureness(step, bound, state)
            if sureness >= step.threshold:
                break
        return self._answer(answering, bound.value(answering.logits)[0].copy(), started)

    def _measure(self, setup: Setup, bound: Bound) -> None:
        """Go through all steps, and note how long each takes once the engine is warm."""
        for number in range(FIRST_PASSES):
            for index, step in enumerate(setup.steps):
                before = self._clock()
                bound.step(index)
                bound.value(step.logits)
                if number:
                    step.times.add(self._clock() - before)

    def stream(self, *, hold: float | None = None, every: int = 30) -> Stream:
        """Return what answers frames that follow each other in time, and keeps an answer while it still holds.

        Args:
            hold: Least similarity to the key frame at any exit, in [0, 1], at which its answer holds. None takes the thresholds of a
                profile whose policy is `temporal`.
            every: After so many held frames in a row, one is answered by the whole network.

        Raises:
            DataError: the similarity is none, or missing; less than one frame.
        """
        from exitify.runtime.stream import Stream

        return Stream(self, hold, every)

    def trace(self, x: Array, *, to_end: bool = False) -> Trace:
        """Answer for one sample as `run` does, and keep what the exits on the way said.

        Args:
            x: As for `run`. to_end: Go through every exit of the plan, those that are switched off too, to the network's own answer; the
                answer is still the one that `run` gives.

        Raises:
            DataError: as for `run`.
        """
        started = self._clock()
        x = self._ready(x)
        if x.shape[0] != 1:
            raise DataError(f"trace() takes one sample, and got {x.shape[0]}", "give them one by one")
        version = self.version
        setup = self._with_all_exits(self._now(version)) if to_end else self._now(version)
        bound = self._bound(setup, version)
        bound.set_input(x)
        visits: list[Visit] = []
        answer, full, state = None, None, BEFORE
        for index, step in enumerate(setup.steps):
            bound.step(index)
            logits = bound.value(step.logits)[0].copy()
            if step.stretch.exit == FINAL:
                full = logits
                answer = answer or self._answer(step, logits, started)
                continue
            sureness, after = setup.sureness(step, bound, state)
            state = after if step.decides else state
            features = bound.value(self.artifact.plan.exit(step.stretch.exit).features)[0].copy()
            visits.append(Visit(step.stretch.exit, logits, features, float(sureness)))
            if answer is None and (step.stretch.exit == setup.only if setup.only else sureness >= step.threshold):
                answer = self._answer(step, logits, started)
            if answer is not None and not to_end:
                break
        assert answer is not None
        return Trace(answer, tuple(visits), full)

    def change_exits(
        self,
        tensors: Mapping[str, Array] | None = None,
        settings: Mapping[str, ExitSetting] | None = None,
        *,
        profile: str | None = None,
        alone: bool = False,
    ) -> ExitsVersion:
        """Let classifiers and settings stand in place of the artifact's from the next run on; runs under way end with those they began with.

        Args:
            tensors: Weights `(classes, width)` and biases `(classes,)`, float32, by their names in the plan; they must not be changed
                afterwards. Those left out stay as they are.
            settings: How exits of a profile decide, by exit. One that is not enabled is not run; one that the profile has switched off may
                be enabled.
            profile: The one that settings are for, by default the one in use. They stay with it while others are used.
            alone: Whether the classifiers too are for this profile alone; otherwise they are for all, and for none.

        Returns:
            The version that is now in use.

        Raises:
            DataError: a name, shape or number that cannot be, or settings where there is no profile. UnknownProfile: there is none of that name.
        """
        for name, array in (tensors or {}).items():
            before = self._heads.get(name)
            if before is None:
                raise DataError(f"no head has a classifier {name!r}", "see `exitify inspect`")
            if array.shape != before.shape or array.dtype != before.dtype or not array.flags.c_contiguous:
                raise DataError(f"{name!r} is {array.dtype} {array.shape}, and the head's {before.dtype} {before.shape}", "give it in that form")
            if not _is_finite(array):
                raise DataError(f"{name!r} holds a number that is not finite", "an update went wrong: go back to an older state")
        named = profile or self.profile_name
        policy = self.artifact.profile(named).policy if named else "top1"
        for name, setting in (settings or {}).items():
            self.artifact.plan.exit(name)
            if setting_problem(setting, policy) or not LEAST_TEMPERATURE <= setting.temperature <= MOST_TEMPERATURE:
                raise DataError(f"the exit {name!r} cannot decide by {setting}", "calibrate again")
        fitting = {name: array if array.ctypes.data % ALIGNMENT == 0 else _aligned_copy(array) for name, array in (tensors or {}).items()}
        with self._changing:
            now, of = self.version, profile or self.profile_name
            if (settings or alone) and of is None:
                raise DataError("settings are for a profile's exits, and none is in use", "use one, or name it")
            changed, setups = now.settings, now.setups
            if settings and of:
                changed = {**changed, of: {**changed.get(of, {}), **settings}}
                setups = {**setups, of: self._make_setup(of, changed[of])}
            shared, own = {**now.tensors, **fitting}, now.of_profile
            if alone and of is not None:
                shared, own = dict(now.tensors), {**own, of: {**own.get(of, {}), **fitting}}
            self.version = ExitsVersion(now.number + 1, shared, own, changed, setups)
            return self.version

    def prepare_exits(self, settings: Mapping[str, ExitSetting], profile: str) -> None:
        """Make ready what `change_exits` with these settings, and traces to the end, will need: it may take long, and stops nobody."""
        self._with_all_exits(self._make_setup(profile, settings))

    def forget_changes(self) -> None:
        """The artifact's own classifiers and settings again."""
        with self._changing:
            names = self.version.tensors
            self.version = ExitsVersion(self.version.number + 1, {name: self._heads[name] for name in names})

    def run_batch(self, x: Array, skip: str | Sequence[bool] | None = None, *, budget_macs: float | None = None) -> list[Answer]:
        """Answer for a batch: samples that have their answer leave it, and those that are left go on together (`exitify.runtime.batches`).

        Args:
            x: `(N, *shape)`, or pictures, uint8 `(N, H, W, C)`.
            skip: As for `run`.
            budget_macs: What an answer of this batch may cost on average, as a share of the whole network's multiply-adds. The rows that
                the profile's score is surest of leave first, as many at each exit as the budget allows (`geometric_quotas`), and
                thresholds do not matter: a row's answer depends on the others. With no profile all exits are run, and the score is
                the largest probability, as it is for `temporal`.

        Raises:
            DataError, PlanError: as for `run`; a budget below what the first exit costs.
        """
        started = self._clock()
        x = self._ready(x)
        version = self.version
        setup = self._now(version) if skip is None else self._with_mask(skip, version)
        quotas = None
        if budget_macs is not None:
            setup = self._with_some_exit(setup)
            quotas = geometric_quotas([step.macs / self.artifact.plan.full_macs for step in setup.steps], budget_macs, len(x))
        answers: list[Answer | None] = [None] * len(x)
        history = History.empty(len(x))
        policy = RANKED_BY.get(setup.rule.policy, setup.rule.policy) if quotas else setup.rule.policy

        def decide(index: int, numbers: Array, said: Mapping[str, Array]) -> Array:
            step = setup.steps[index]
            logits, stays = said[step.logits], np.zeros(len(numbers), bool)
            if not step.is_last:
                before = history.rows(numbers) if policy in LOOKING_BACK else history
                labels = logits.argmax(axis=1) if policy == "patience" else before.labels
                sureness, after = score(policy, said[step.scores], labels, step.gate, before)
                if after is not before:
                    history.put(numbers, after)
                stays = ~(sureness >= step.threshold) if quotas is None else ~_surest(sureness, quotas[index])
            for i in np.flatnonzero(~stays):
                answers[numbers[i]] = self._answer(step, logits[i].copy(), started)
            return stays

        batch = Batch(self.engine, setup.steps, self._parameters(setup, version), {self.artifact.plan.input: x}, decide, together=quotas is not None)
        batch.run(self._helpers)
        return [answer for answer in answers if answer is not None]

    def record(self, x: Array, skip: str | Sequence[bool] | None = None) -> Recording:
        """Run a batch through every exit, stopping nowhere; with a mask's skip paths left out, none of them by default."""
        values = {self.artifact.plan.input: self._ready(x)}
        setup = self._everything(self.artifact.plan.mask(skip))
        parameters = self._parameters(setup, self.version)
        logits, features = {}, {}
        for step in setup.steps:
            values.update(step.run(values, parameters))
            logits[step.stretch.exit] = values[step.logits]
        for point in self.artifact.plan.exits:
            features[point.name] = values[point.features]
        return Recording(logits, features)

    def _everything(self, mask: Mask) -> Setup:
        """All exits, none taken."""
        if mask not in self._recorders:
            names = [point.name for point in self.artifact.plan.exits]
            self._recorders[mask] = self._assemble(mask, names, Rule())
        return self._recorders[mask]

    def _with_some_exit(self, setup: Setup) -> Setup:
        """The same, or all exits, none taken, where it is the network without a profile."""
        return setup if setup.rule.profile or setup.only else self._everything(setup.mask)

    def _now(self, version: ExitsVersion) -> Setup:
        """What is in use, as this version has it."""
        setup = self._setup
        changed = version.setups.get(setup.rule.profile) if version.number else None
        if changed is None:
            return setup
        return self._ending_at(changed, setup.only) if setup.only else changed

    def _with_all_exits(self, setup: Setup) -> Setup:
        """The same with every other exit of the plan run too, and never taken."""
        key = setup.rule.profile, setup.only
        pair = self._whole.get(key)  # once: another thread may put a newer one there
        if pair is None or pair[0] is not setup:
            names = [point.name for point in self.artifact.plan.exits]
            pair = self._whole[key] = setup, replace(self._assemble(setup.mask, names, setup.rule), only=setup.only)
        return pair[1]

    def _ending_at(self, setup: Setup, name: str) -> Setup:
        """The same under its mask, with this exit always taken and no other head run.

        Raises:
            PlanError: there is no such exit.
        """
        key = setup.rule.profile, setup.mask, name
        pair = self._ending.get(key)
        if pair is None or pair[0] is not setup:
            pair = self._ending[key] = setup, self._assemble(setup.mask, [], setup.rule, only=name)
        return pair[1]

    def _with_mask(self, skip: str | Sequence[bool], version: ExitsVersion) -> Setup:
        """What to run under this mask: the profile if it is its own, else the network without exits."""
        mask, setup = self.artifact.plan.mask(skip), self._now(version)
        if mask == setup.mask:
            return setup
        if setup.exits or (setup.only and setup.rule.profile):
            raise PlanError(
                f"the profile {setup.rule.profile!r} was calibrated for the mask {mask_text(setup.mask)}, not {mask_text(mask)}",
                f"calibrate one for it (exitify calibrate --skip {mask_text(mask)}), or take no exit: profile none",
            )
        plain = self._plain_setup(mask)
        return self._ending_at(plain, setup.only) if setup.only else plain

    def prepare(self, skip: str | Sequence[bool] | None) -> None:
        """Make ready for calls under this mask, which the first of them would do otherwise (a ResNet-50 takes 0.1 s on ONNX Runtime).

        Raises:
            PlanError: as for `run`.
        """
        self._with_mask(self.artifact.plan.mask(skip), self.version)

    def _plain_setup(self, mask: Mask) -> Setup:
        """The network under a mask, without exits."""
        if mask not in self._plain:
            return self._plain.setdefault(mask, self._assemble(mask, [], Rule()))  # one of them, whoever comes first
        return self._plain[mask]

    def _mask_within(self, budget_ms: float) -> str:
        table = self.artifact.masks
        if table is None:
            raise DataError("the artifact does not say how long its masks take", "measure them on this machine: exitify calibrate --budget-ms")
        here = (self.engine.full_name, self.engine.threads, conditions())
        if (table.engine, table.threads, table.conditions) != here:
            raise DataError(
                f"the masks were timed with {table.engine} and {table.threads} threads on {table.conditions}, "
                f"and this is {here[0]} and {here[1]} on {here[2]}",
                f"measure them here: exitify calibrate --budget-ms --engine {here[0]} --threads {here[1]}",
            )
        within = [mask for mask, measured in table.masks.items() if measured.ms <= budget_ms]
        if not within:
            fastest = min(measured.ms for measured in table.masks.values())
            raise DataError(f"no mask answers within {budget_ms:g} ms; the fastest takes {fastest:.3g}", "give more time, or calibrate with exits")
        return max(within, key=lambda mask: (table.masks[mask].accuracy, -table.masks[mask].ms))

    @property
    def mask(self) -> str:
        """The mask in use, one 0 or 1 a skip path."""
        return mask_text(self._setup.mask)

    def _make_setup(self, name: str, changes: Mapping[str, ExitSetting]) -> Setup:
        """A profile's, with these settings in place of its own."""
        profile = self.artifact.profile(name)
        quantiles = profile.conformal.quantiles if profile.conformal and not changes else {}  # they are of its own thresholds
        rule = Rule(name, profile.policy, {**profile.exits, **changes}, profile.final_temperature, quantiles)
        enabled = [point.name for point in self.artifact.plan.exits if rule.settings[point.name].enabled]
        return self._assemble(self.artifact.plan.mask(profile.skip), enabled, rule)

    def _assemble(self, mask: Mask, exits: Sequence[str], rule: Rule, *, only: str = "") -> Setup:
        """What runs these exits under a rule, or `only` one, and nothing behind it."""
        plan = self.artifact.plan
        stretches = plan.stretches((only,) if only else exits, mask)
        if only:
            wanted = (plan.output,) if only == FINAL else (plan.exit(only).logits, plan.exit(only).features, plan.exit(only).scores)
            stretches = (replace(stretches[0], outputs=wanted),)
        macs = np.cumsum([stretch.cost.macs for stretch in stretches])
        steps: list[Step] = []
        for stretch, spent in zip(stretches, macs):
            point = None if stretch.exit == FINAL else plan.exit(stretch.exit)
            setting = rule.settings.get(stretch.exit, _NO_SETTING)
            steps.append(
                Step(
                    stretch,
                    self._runner(stretch),
                    logits=plan.output if point is None else point.logits,
                    scores="" if point is None else point.scores,
                    is_last=len(steps) == len(stretches) - 1,
                    decides=setting.enabled,
                    threshold=_as_float32(setting.threshold) if setting.enabled else math.inf,
                    temperature=rule.final_temperature if point is None else setting.temperature,
                    gate=setting.gate,
                    quantile=rule.quantiles.get(stretch.exit),
                    macs=int(spent),
                    times=self._times.setdefault(stretch, StretchTimes()),
                )
            )
        heads = {name: np.ascontiguousarray(array) for name, array in self._heads.items()}
        heads.update({point.temperature: np.array(rule.settings.get(point.name, _NO_SETTING).temperature, np.float32) for point in plan.exits})
        parameters = {name: heads[name] for stretch in stretches for name in stretch.parameters}
        made = scorer(rule.policy)
        column = SCORES.index(rule.policy) if made is None else -1
        return Setup(mask, tuple(exits), tuple(steps), parameters, rule, column, made, only)

    def _runner(self, stretch: Stretch) -> Runner:
        """What runs a stretch, made once."""
        if stretch not in self._runners:
            self._runners.setdefault(stretch, self.engine.prepare(stretch))
        return self._runners[stretch]

    def _parameters(self, setup: Setup, version: ExitsVersion) -> Mapping[str, Array]:
        """What heads take under this version."""
        if version.number == 0:
            return setup.parameters
        own = version.of_profile.get(setup.rule.profile, {})
        return {name: own.get(name, version.tensors.get(name, array)) for name, array in setup.parameters.items()}

    def _bound(self, setup: Setup, version: ExitsVersion) -> Bound:
        """This thread's buffers for this setup, its heads as this version has them."""
        local = self._local.__dict__
        if local.get("setup") is setup and local["number"] == version.number:
            bound: Bound = local["bound"]
            return bound
        bounds: dict[_Key, Bound] = local.setdefault("bounds", {})  # setups of the same exits share one
        given: dict[_Key, Mapping[str, Array]] = local.setdefault("given", {})
        key = setup.mask, setup.exits, setup.only
        if key not in bounds:
            bounds[key] = self.engine.bind([step.stretch for step in setup.steps], setup.parameters)
            given[key] = setup.parameters
        before, now = given[key], self._parameters(setup, version)
        changed = {name: array for name, array in now.items() if array is not before.get(name)}
        if changed:
            local["setup"], given[key] = None, {}  # whatever is interrupted is given whole the next time
            bounds[key].set_parameters(changed)
        given[key] = now
        local["setup"], local["number"], local["bound"] = setup, version.number, bounds[key]
        return bounds[key]

    def _answer(self, step: Step, logits: Array, started: int) -> Answer:
        ms = (self._clock() - started) / 1e6
        label = int(logits.argmax())  # of a NaN, if there is one
        if not math.isfinite(logits[label]):
            raise DataError(f"the network's answer is not finite at {step.stretch.exit}", "the input's values are far from any it was trained on")
        return Answer(label, step.stretch.exit, logits, step.temperature, step.macs, ms, self._classes, step.quantile)

    def _one(self, x: Any) -> Array:
        """One input as the network reads it, with its batch dimension."""
        x = self._ready(x)
        if x.shape[0] != 1:
            raise DataError(f"run() takes one sample, and got {x.shape[0]}", "use run_batch()")
        return np.asarray(x)

    def _ready(self, x: Any) -> Array:
        """The input as the network reads it, with its batch dimension."""
        contract = self.contract
        if not isinstance(x, np.ndarray):
            raise DataError(f"the input is a {type(x).__name__}, not a NumPy array", "convert it: numpy.asarray(x)")
        if x.dtype == np.uint8 and contract.dtype != "uint8" and x.size:
            return prepare_pictures(x if x.ndim == 4 else x[None], contract)
        if x.ndim == len(contract.shape):
            x = x[None]
        if x.shape[1:] != contract.shape or not len(x):
            raise DataError(
                f"the input has shape {x.shape}, and the network reads (N, {', '.join(map(str, contract.shape))})", "see `exitify inspect`"
            )
        if x.dtype != contract.dtype:
            if not (np.issubdtype(x.dtype, np.floating) and contract.dtype == "float32"):
                raise DataError(f"the input is {x.dtype}, and the network reads {contract.dtype}", f"convert it: x.astype(numpy.{contract.dtype})")
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                x = x.astype(np.float32)
        if np.issubdtype(x.dtype, np.floating) and not _is_finite(x):
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise DataError(f"the input holds {x[at]} at {at}", "clean the input: the network's answer to it would mean nothing")
        return x


_NO_SETTING = ExitSetting(False, math.inf, 1.0)
"""Of an exit that no profile speaks of."""
_Key = tuple[Mask, tuple[str, ...], str]


def _surest(sureness: Array, count: int) -> Array:
    """Which `count` rows, a mask, have the largest scores; of equal ones the first, and last those whose score is no number."""
    chosen = np.zeros(len(sureness), bool)
    chosen[np.argsort(-sureness, kind="stable")[:count]] = True
    return chosen


def _aligned_copy(array: Array) -> Array:
    """A copy that engines take as it is, so that all threads share it."""
    copy = aligned(array.shape, array.dtype.name)
    np.copyto(copy, array)
    return copy


@np.errstate(over="ignore", invalid="ignore")  # whether the sum's overflow is reported depends on the processor's BLAS kernel
def _is_finite(x: Array) -> bool:
    """Whether all values are finite, by the cheapest look at all of them: what is not finite survives a sum of squares.

    That sum may overflow by itself, and for large arrays would use threads; then the largest and the smallest value tell
    (a NaN is both).
    """
    if x.size <= 8192:
        flat = x.reshape(-1)
        if math.isfinite(flat.dot(flat)):
            return True
    return math.isfinite(np.maximum.reduce(x, axis=None)) and math.isfinite(np.minimum.reduce(x, axis=None))


def _as_float32(threshold: float) -> float:
    """The threshold as scores are compared with it, alone or in a batch; what is too large for float32 is never reached."""
    with np.errstate(over="ignore"):
        return float(np.float32(threshold))
