"""The runtime: segments in order, a decision after each head, no torch and no compiler."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exitify.artifact.artifact import LEAST_TEMPERATURE, MOST_TEMPERATURE, NO_PROFILE, Artifact
from exitify.artifact.manifest import ExitSetting, InputContract
from exitify.errors import DataError, PlanError
from exitify.pictures import prepare_pictures
from exitify.plan import FINAL, SCORES, Mask, Stretch, mask_text
from exitify.runtime.engines import make_engine
from exitify.runtime.engines.base import ALIGNMENT, Array, Bound, Engine, Runner, aligned
from exitify.targets.board import conditions

COPY_MACS_A_BYTE = 4
"""What copying a byte costs beside computing: 10 GB/s against 40 GMAC/s. Rows that have left a batch are dropped when
what they would still compute costs more than copying the rows that stay."""


# Not frozen: each field would be set through a function call, in the path of every answer.
@dataclass(slots=True)
class Answer:
    """What the network says of one sample.

    label: Index of the class. exit: Name of the exit taken, `final` for the whole network.
    logits: `(classes,)` before the temperature. macs: Multiply-adds spent, heads on the way counted.
    ms: Wall-clock time; in a batch, the batch's time up to this answer.
    """

    label: int
    exit: str
    logits: Array
    temperature: float
    macs: int
    ms: float
    classes: tuple[str, ...]

    @property
    def probabilities(self) -> Array:
        """`(classes,)`, at the calibrated temperature."""
        scaled = np.asarray(self.logits, np.float64) / self.temperature
        powers = np.exp(scaled - scaled.max())
        return (powers / powers.sum()).astype(np.float32)

    @property
    def name(self) -> str:
        """Name of the class, or its number when the artifact names none."""
        return self.classes[self.label] if self.label < len(self.classes) else str(self.label)


@dataclass(frozen=True)
class Recording:
    """What every exit says of some samples, none of them stopped.

    logits: `(N, classes)` by exit, `final` among them. features: the classifiers' inputs, `(N, width)` by early exit.
    """

    logits: dict[str, Array]
    features: dict[str, Array]


@dataclass(frozen=True)
class Visit:
    """An exit on the way of a run, taken or not. logits: `(classes,)`. features: The classifier's input, `(width,)`. score: The policy's."""

    exit: str
    logits: Array
    features: Array
    score: float


@dataclass(frozen=True)
class Trace:
    """A run and what it passed.

    visits: The exits whose heads ran, in order, that of the answer among them unless it is the network's own.
    full: The network's own logits, `(classes,)`, where the run went on to its end; else None.
    """

    answer: Answer
    visits: tuple[Visit, ...]
    full: Array | None


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
    setups: Mapping[str, _Setup] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _Step:
    """A stretch and the decision after it.

    column: Which score is held against the threshold, -1 for the last stretch.
    """

    stretch: Stretch
    runner: Runner
    logits: str
    scores: str
    column: int
    threshold: float
    temperature: float
    macs: int
    remaining_macs: int


@dataclass(frozen=True)
class _Setup:
    """Everything that follows from a profile.

    mask: The skip paths that are left out. exits: Names of those that are run. parameters: What their heads take.
    profile: Its name, empty for a setup of no profile.
    """

    mask: Mask
    exits: tuple[str, ...]
    steps: tuple[_Step, ...]
    parameters: dict[str, Array]
    profile: str = ""


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
        self._calibrated: dict[str, _Setup] = {}
        self._plain: dict[Mask, _Setup] = {}
        self._recorders: dict[Mask, _Setup] = {}
        self._runners: dict[Stretch, Runner] = {}
        self._whole: dict[str, tuple[_Setup, _Setup]] = {}
        self.use(profile)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, engine: str = "auto", profile: str | None = None, threads: int = 1) -> Session:
        """Open and check an artifact, and prepare it."""
        return cls(Artifact.open(path), engine=engine, profile=profile, threads=threads)

    @property
    def contract(self) -> InputContract:
        """What the network reads."""
        return self.artifact.manifest.input

    def use(self, profile: str | None = None, *, budget_ms: float | None = None) -> None:
        """Switch to another profile, with its exits and its mask, between two calls; calls under way end with the one they began with.

        Args:
            profile: Its name; None means `default` if there is one; `none` is the whole network without exits.
            budget_ms: In place of a profile: the mask with the most accurate answers among those measured to take no longer,
                no exit taken.

        Raises:
            UnknownProfile: there is none of that name.
            DataError: nothing was measured, or under other conditions, or every mask takes longer than the budget.
        """
        if budget_ms is not None:
            setup = self._plain_setup(self.artifact.plan.mask(self._mask_within(budget_ms)))
            with self._changing:
                self._setup, self.profile_name = setup, None
            return
        if profile is None and "default" in self.artifact.profiles:
            profile = "default"
        name = None if profile == NO_PROFILE else profile
        if name is not None and name not in self._calibrated:
            self._calibrated.setdefault(name, self._make_setup(name, {}))
        setup = self._plain_setup(self.artifact.plan.mask(None)) if name is None else self._calibrated[name]
        with self._changing:
            self._setup, self.profile_name = setup, name

    def run(self, x: Array, skip: str | Sequence[bool] | None = None) -> Answer:
        """Answer for one sample, stopping as soon as the profile allows.

        Args:
            skip: Skip paths to leave out this time, `0110` for instance (see `Plan.mask`); None is the profile's mask.
            x: Ready for the network, `shape` or `(1, *shape)`; or one picture, uint8 `(H, W, C)`, that the contract prepares.

        Raises:
            DataError: wrong shape or dtype, NaN or infinity, in the input or in the network's answer.
            PlanError: the mask is none of this network, or the profile's thresholds belong to another one.
        """
        started = time.perf_counter_ns()
        if not (type(x) is np.ndarray and x.dtype == self._dtype and x.shape in self._one_sample and _is_finite(x)):
            x = self._ready(x)
            if x.shape[0] != 1:
                raise DataError(f"run() takes one sample, and got {x.shape[0]}", "use run_batch()")
        version = self.version
        setup = self._now(version) if skip is None else self._with_mask(skip, version)
        bound = self._bound(setup, version)
        bound.set_input(x if x.ndim > self._dimensions else x[None])
        for index, step in enumerate(setup.steps):
            bound.step(index)
            if step.column < 0 or bound.value(step.scores)[0, step.column] >= step.threshold:
                break
        return self._answer(step, bound.value(step.logits)[0].copy(), started)

    def trace(self, x: Array, *, to_end: bool = False) -> Trace:
        """Answer for one sample as `run` does, and keep what the exits on the way said.

        Args:
            x: As for `run`. to_end: Go through every exit of the plan, those that are switched off too, to the network's own answer; the
                answer is still the one that `run` gives.

        Raises:
            DataError: as for `run`.
        """
        started = time.perf_counter_ns()
        x = self._ready(x)
        if x.shape[0] != 1:
            raise DataError(f"trace() takes one sample, and got {x.shape[0]}", "give them one by one")
        version = self.version
        setup = self._with_all_exits(self._now(version)) if to_end else self._now(version)
        bound = self._bound(setup, version)
        bound.set_input(x)
        visits: list[Visit] = []
        answer, full = None, None
        for index, step in enumerate(setup.steps):
            bound.step(index)
            logits = bound.value(step.logits)[0].copy()
            if step.column < 0:
                full = logits
                answer = answer or self._answer(step, logits, started)
                continue
            score = float(bound.value(step.scores)[0, step.column])
            features = bound.value(self.artifact.plan.exit(step.stretch.exit).features)[0].copy()
            visits.append(Visit(step.stretch.exit, logits, features, score))
            if answer is None and score >= step.threshold:
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
        for name, setting in (settings or {}).items():
            self.artifact.plan.exit(name)
            if not (math.isfinite(setting.threshold) and LEAST_TEMPERATURE <= setting.temperature <= MOST_TEMPERATURE):
                raise DataError(f"the exit {name!r} cannot decide by {setting}", "calibrate again")
        if profile is not None:
            self.artifact.profile(profile)
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

    def run_batch(self, x: Array, skip: str | Sequence[bool] | None = None) -> list[Answer]:
        """Answer for a batch; rows that have their answer are dropped from it where that pays.

        Args:
            x: `(N, *shape)`, or pictures, uint8 `(N, H, W, C)`.
            skip: As for `run`.

        Raises:
            DataError, PlanError: as for `run`.
        """
        started = time.perf_counter_ns()
        values = {self.artifact.plan.input: self._ready(x)}
        version = self.version
        setup = self._now(version) if skip is None else self._with_mask(skip, version)
        parameters = self._parameters(setup, version)
        answers: list[Answer | None] = [None] * len(values[self.artifact.plan.input])
        rows = np.arange(len(answers))
        for index, step in enumerate(setup.steps):
            values.update(self._call(step, values, parameters))
            logits = values[step.logits]
            leaves = np.ones(len(rows), bool) if step.column < 0 else values[step.scores][:, step.column] >= step.threshold
            for i in np.flatnonzero(leaves):
                if answers[rows[i]] is None:
                    answers[rows[i]] = self._answer(step, logits[i].copy(), started)
            stays = np.array([answers[row] is None for row in rows])
            if not stays.any():
                break
            needed = {name for later in setup.steps[index + 1 :] for name in later.stretch.inputs}
            values = {name: value for name, value in values.items() if name in needed}
            copied = sum(value[:1].nbytes for value in values.values()) * int(stays.sum())
            if int((~stays).sum()) * step.remaining_macs > copied * COPY_MACS_A_BYTE:
                values = {name: value[stays] for name, value in values.items()}
                rows = rows[stays]
        return [answer for answer in answers if answer is not None]

    def record(self, x: Array, skip: str | Sequence[bool] | None = None) -> Recording:
        """Run a batch through every exit, stopping nowhere; with a mask's skip paths left out, none of them by default."""
        values = {self.artifact.plan.input: self._ready(x)}
        setup = self._everything(self.artifact.plan.mask(skip))
        parameters = self._parameters(setup, self.version)
        logits, features = {}, {}
        for step in setup.steps:
            values.update(self._call(step, values, parameters))
            logits[step.stretch.exit] = values[step.logits]
        for point in self.artifact.plan.exits:
            features[point.name] = values[point.features]
        return Recording(logits, features)

    def _everything(self, mask: Mask) -> _Setup:
        """All exits, none taken."""
        if mask not in self._recorders:
            names = [point.name for point in self.artifact.plan.exits]
            self._recorders[mask] = self._assemble(mask, names, {}, dict.fromkeys(names, np.inf), 0)
        return self._recorders[mask]

    def _now(self, version: ExitsVersion) -> _Setup:
        """The profile in use, as this version has it."""
        setup = self._setup
        return version.setups.get(setup.profile, setup) if version.number else setup

    def _with_all_exits(self, setup: _Setup) -> _Setup:
        """The same with every other exit of the plan run too, and never taken."""
        pair = self._whole.get(setup.profile)  # once: another thread may put a newer one there
        if pair is None or pair[0] is not setup:
            names = [point.name for point in self.artifact.plan.exits]
            known = {step.stretch.exit: step for step in setup.steps}
            temperatures = {name: step.temperature for name, step in known.items()}
            thresholds = {name: known[name].threshold if name in known else np.inf for name in names}
            column = next((step.column for step in setup.steps if step.column >= 0), 0)
            whole = self._assemble(setup.mask, names, temperatures, thresholds, column, setup.profile)
            pair = self._whole[setup.profile] = setup, whole
        return pair[1]

    def _with_mask(self, skip: str | Sequence[bool], version: ExitsVersion) -> _Setup:
        """What to run under this mask: the profile if it is its own, else the network without exits."""
        mask, setup = self.artifact.plan.mask(skip), self._now(version)
        if mask == setup.mask:
            return setup
        if setup.exits:
            raise PlanError(
                f"the profile {self.profile_name!r} was calibrated for the mask {mask_text(setup.mask)}, not {mask_text(mask)}",
                f"calibrate one for it (exitify calibrate --skip {mask_text(mask)}), or take no exit: profile none",
            )
        return self._plain_setup(mask)

    def prepare(self, skip: str | Sequence[bool] | None) -> None:
        """Make ready for calls under this mask, which the first of them would do otherwise (a ResNet-50 takes 0.1 s on ONNX Runtime).

        Raises:
            PlanError: as for `run`.
        """
        self._with_mask(self.artifact.plan.mask(skip), self.version)

    def _plain_setup(self, mask: Mask) -> _Setup:
        """The network under a mask, without exits."""
        if mask not in self._plain:
            return self._plain.setdefault(mask, self._assemble(mask, [], {}, {}, 0))  # one of them, whoever comes first
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

    def _make_setup(self, name: str, changes: Mapping[str, ExitSetting]) -> _Setup:
        """A profile's, with these settings in place of its own."""
        profile = self.artifact.profile(name)
        exits = {**profile.exits, **changes}
        temperatures = {FINAL: profile.final_temperature, **{exit_name: setting.temperature for exit_name, setting in exits.items()}}
        thresholds = {exit_name: setting.threshold for exit_name, setting in exits.items()}
        enabled = [point.name for point in self.artifact.plan.exits if exits[point.name].enabled]
        mask = self.artifact.plan.mask(profile.skip)
        return self._assemble(mask, enabled, temperatures, thresholds, SCORES.index(profile.policy), name)

    def _assemble(
        self, mask: Mask, enabled: list[str], temperatures: dict[str, float], thresholds: dict[str, float], column: int, profile: str = ""
    ) -> _Setup:
        plan = self.artifact.plan
        stretches = plan.stretches(enabled, mask)
        macs = np.cumsum([stretch.cost.macs for stretch in stretches])
        steps = []
        for stretch, spent in zip(stretches, macs):
            point = None if stretch.exit == FINAL else plan.exit(stretch.exit)
            steps.append(
                _Step(
                    stretch,
                    self._runner(stretch),
                    logits=plan.output if point is None else point.logits,
                    scores="" if point is None else point.scores,
                    column=-1 if point is None else column,
                    threshold=_as_float32(thresholds.get(stretch.exit, np.inf)),
                    temperature=temperatures.get(stretch.exit, 1.0),
                    macs=int(spent),
                    remaining_macs=int(macs[-1] - spent),
                )
            )
        heads = {name: np.ascontiguousarray(array) for name, array in self._heads.items()}
        heads.update({point.temperature: np.array(temperatures.get(point.name, 1.0), np.float32) for point in plan.exits})
        parameters = {name: heads[name] for stretch in stretches for name in stretch.parameters}
        return _Setup(mask, tuple(enabled), tuple(steps), parameters, profile)

    def _runner(self, stretch: Stretch) -> Runner:
        """What runs a stretch, made once."""
        if stretch not in self._runners:
            self._runners.setdefault(stretch, self.engine.prepare(stretch))
        return self._runners[stretch]

    def _parameters(self, setup: _Setup, version: ExitsVersion) -> Mapping[str, Array]:
        """What heads take under this version."""
        if version.number == 0:
            return setup.parameters
        own = version.of_profile.get(setup.profile, {})
        return {name: own.get(name, version.tensors.get(name, array)) for name, array in setup.parameters.items()}

    def _call(self, step: _Step, values: dict[str, Array], parameters: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: values[name] for name in step.stretch.inputs}
        given.update({name: parameters[name] for name in step.stretch.parameters})
        return step.runner(given)

    def _bound(self, setup: _Setup, version: ExitsVersion) -> Bound:
        """This thread's buffers for this setup, its heads as this version has them."""
        local = self._local.__dict__
        if local.get("setup") is setup and local["number"] == version.number:
            bound: Bound = local["bound"]
            return bound
        bounds: dict[tuple[Mask, tuple[str, ...]], Bound] = local.setdefault("bounds", {})  # setups of the same exits share one
        given: dict[tuple[Mask, tuple[str, ...]], Mapping[str, Array]] = local.setdefault("given", {})
        key = setup.mask, setup.exits
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

    def _answer(self, step: _Step, logits: Array, started: int) -> Answer:
        ms = (time.perf_counter_ns() - started) / 1e6
        label = int(logits.argmax())  # of a NaN, if there is one
        if not math.isfinite(logits[label]):
            raise DataError(f"the network's answer is not finite at {step.stretch.exit}", "the input's values are far from any it was trained on")
        return Answer(label, step.stretch.exit, logits, step.temperature, step.macs, ms, self._classes)

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
