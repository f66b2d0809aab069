"""What a device has learnt: heads and thresholds that were in use in snapshots, the heads that learn, and why. Data alone, bound to one
artifact, in a file of its own.

The file is a container like an artifact's: `state.json` first, `heads/<number>.safetensors` for each snapshot, `learnt.safetensors` for the heads
that learn. It is written beside the old one and renamed, so that whoever is interrupted finds the old state or the new. Of what was
seen it holds the counts of classes, and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.adapt.update import Classifier
from exitify.artifact import container
from exitify.artifact.artifact import LARGEST_RECORD, LEAST_TEMPERATURE, MOST_TEMPERATURE, Artifact
from exitify.artifact.manifest import ExitSetting
from exitify.artifact.tensors import read_tensors, write_tensors
from exitify.errors import ArtifactError, RecordError, StateError
from exitify.files import written_whole
from exitify.plan import ExitPoint
from exitify.records import dumps, from_json, loads

Array = NDArray[Any]

FORMAT = 2
KEPT = 4
"""Snapshots that are kept; of more the oldest go."""
EVENTS = 1000
"""Events that are kept; of more the oldest go."""
MOST_COUNTED = 2**53
"""Nothing is counted further; the sums of a fleet stay whole numbers."""
FACTORY = 0
"""The number of the artifact's own classifiers, which every state can go back to."""
RECORD = "state.json"
LEARNT = "learnt.safetensors"
_AGAIN = "begin again with the artifact's own heads: `exitify state reset`"


@dataclass(frozen=True)
class Snapshot:
    """Heads that were taken into use, and how a profile's exits decide with them.

    number: From 1, never used again. updates: Made until then. reason: Why it was taken. seconds: Since 1970. profile: Its name, empty
    where there are no settings. settings: By exit. left: What was left for classes that are rarely seen, 1 where nothing was believed.
    expected: What was believed of the next answer, `(classes,)`; empty where nothing was. promise: sha256 of the profile, whose promise it was
    judged by. is_proven: Whether that was proven; condemned: Whether a watch has found it broken.
    """

    number: int
    updates: int
    reason: str
    seconds: float
    profile: str = ""
    settings: Mapping[str, ExitSetting] = field(default_factory=dict)
    left: float = 1.0
    expected: tuple[float, ...] = ()
    promise: str = ""
    is_proven: bool = False
    condemned: bool = False


@dataclass(frozen=True)
class Event:
    """Something that was decided. updates: Made until then. exit: The one that it concerns, empty for all. reason: With its figures."""

    updates: int
    what: str
    exit: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class StateRecord:
    """What stands in `state.json`.

    model_id: Of the artifact. updates: That the heads that learn have had. answers: Seen. current: The snapshot in use, `FACTORY` for none.
    next: The number of the next one. trials: Made so far. stopped: Whether nothing is learnt any more. broken: How often a promise was. forgot: How
    often heads that learn have forgotten the memory. aim: Of the next trial, 0 for that of the guard rails. seen: How often each class was
    answered, what is long ago counting less; empty where nothing was seen.
    """

    format: int
    model_id: str
    updates: int = 0
    answers: int = 0
    current: int = FACTORY
    next: int = 1
    trials: int = 0
    stopped: bool = False
    broken: int = 0
    forgot: int = 0
    aim: float = 0.0
    seen: tuple[float, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class State:
    """A state in memory. Frozen: each change returns a new one.

    artifact: That it belongs to. tensors: Classifiers of each snapshot, by its number and then by name. learnt: The heads that learn, by name;
    empty for the artifact's own.
    """

    artifact: Artifact = field(repr=False)
    record: StateRecord
    tensors: Mapping[int, Mapping[str, Array]] = field(repr=False, default_factory=dict)
    learnt: Mapping[str, Array] = field(repr=False, default_factory=dict)

    @classmethod
    def fresh(cls, artifact: Artifact) -> State:
        """Nothing learnt yet.

        Raises:
            StateError: the artifact has no exits that could learn.
        """
        if not artifact.plan.exits:
            raise StateError("the artifact has no exits that could learn", "transform with `--exits auto`")
        return cls(artifact, StateRecord(FORMAT, artifact.manifest.model_id))

    @classmethod
    def open(cls, path: str | os.PathLike[str], artifact: Artifact) -> State:
        """Read and check a state.

        Raises:
            StateError: it is not there, not whole, of another artifact, or of a version that this release does not read.
        """
        place = Path(path)
        try:
            if place.stat().st_size > most_bytes(artifact):
                raise StateError(f"{place} has {place.stat().st_size} bytes, and a state of this artifact {most_bytes(artifact)} at most", _AGAIN)
            files = container.read(place.read_bytes())
            return _parsed(files, artifact, place)
        except OSError as error:
            raise StateError(f"cannot read {place}: {error.strerror or error}", "`exitify adapt --state` makes one") from error
        except (ArtifactError, RecordError) as error:
            raise StateError(f"{place} is no whole state: {error.problem.replace('the artifact', 'it')}", _AGAIN) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state in place of what is there; until the last byte is on the disk that stays.

        Raises:
            NotWritten: no space, no permission, no such folder.
        """
        files: dict[str, bytes] = {RECORD: dumps(self.record)}
        files.update({_path(number): write_tensors(tensors) for number, tensors in self.tensors.items()})
        if self.learnt:
            files[LEARNT] = write_tensors(self.learnt)
        with written_whole(path) as stream:
            container.write(stream, files)
        return Path(path)

    def current(self) -> dict[str, Array]:
        """The classifiers in use, by name; the artifact's own where nothing was learnt."""
        return {**self.artifact.classifiers(), **self.tensors.get(self.record.current, {})}

    def keep(
        self,
        tensors: Mapping[str, Array],
        updates: int,
        reason: str,
        *,
        profile: str = "",
        settings: Mapping[str, ExitSetting] | None = None,
        left: float = 1.0,
        expected: Sequence[float] = (),
        promise: str = "",
        is_proven: bool = False,
    ) -> State:
        """These classifiers as a snapshot, in use from now on.

        Args:
            tensors: By name; those left out are as in the snapshot in use. updates: Made since the state was fresh.
            profile, settings, left, expected, promise, is_proven: How exits decide with them and why, as a `Snapshot` has it.

        Raises:
            StateError: they are no classifiers of this artifact, or not finite.
        """
        held = self._checked({**self.current(), **tensors})
        number = self.record.next
        snapshot = Snapshot(number, updates, reason, time.time(), profile, settings or {}, left, tuple(map(float, expected)), promise, is_proven)
        kept = (*self.record.snapshots, snapshot)[-KEPT:]
        numbers = {one.number for one in kept}
        arrays = {n: held for n, held in {**self.tensors, number: held}.items() if n in numbers}
        return replace(self, record=replace(self.record, updates=updates, current=number, next=number + 1, snapshots=kept), tensors=arrays)

    def with_learnt(self, tensors: Mapping[str, Array], updates: int, **changes: Any) -> State:
        """The same with these heads as those that learn.

        Args:
            tensors: All classifiers, by name. updates: That they have had. changes: Other fields of the record.

        Raises:
            StateError: they are not the classifiers of this artifact, or not finite.
        """
        return replace(self, record=replace(self.record, updates=updates, **changes), learnt=self._checked(tensors))

    def _checked(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        own = self.artifact.classifiers()
        for name, array in tensors.items():
            if name not in own or (array.dtype, array.shape) != (own[name].dtype, own[name].shape) or not np.isfinite(array).all():
                raise StateError(f"{name!r} is no classifier of the artifact, or holds a number that is not finite", "go back to a snapshot")
        return dict(tensors)

    def snapshot(self) -> Snapshot | None:
        """The one in use, None for the artifact's own heads."""
        return next((one for one in self.record.snapshots if one.number == self.record.current), None)

    def note(self, what: str, reason: str, exit_name: str = "") -> State:
        """The same with an event."""
        event = Event(self.record.updates, what, exit_name, reason, time.time())
        return replace(self, record=replace(self.record, events=(*self.record.events, event)[-EVENTS:]))

    def back_to(self, number: int, reason: str) -> State:
        """An older snapshot in use again, or the artifact's own classifiers (`FACTORY`), and nothing learnt since; younger ones are kept.

        Raises:
            StateError: it is not kept any more.
        """
        changed = self.use(number)
        changed = replace(changed, record=replace(changed.record, updates=0), learnt={})
        return changed.note("rollback", f"{reason}; from snapshot {self.record.current} to {number}")

    def use(self, number: int) -> State:
        """A snapshot in use, or the artifact's own classifiers (`FACTORY`).

        Raises:
            StateError: it is not kept any more.
        """
        if number != FACTORY and number not in self.tensors:
            there_are = ", ".join(str(one.number) for one in self.record.snapshots) or "none"
            raise StateError(f"the state has no snapshot {number}", f"it has {there_are}; {FACTORY} is the artifact's own heads")
        return replace(self, record=replace(self.record, current=number))

    def condemn(self) -> State:
        """The same, the snapshot in use marked as one whose promise was found broken."""
        marked = tuple(replace(one, condemned=True) if one.number == self.record.current else one for one in self.record.snapshots)
        return replace(self, record=replace(self.record, snapshots=marked))

    def drift(self, *, learning: bool = False) -> dict[str, float]:
        """How far each exit's classifier is from the artifact's own, over that one's size; of the one in use, or of the one that learns."""
        theirs = self.artifact.classifiers()
        ours = {**theirs, **self.learnt} if learning else self.current()
        return {point.name: classifier_of(ours, point).distance(classifier_of(theirs, point)) for point in self.artifact.plan.exits}


def merged(states: Sequence[State]) -> State:
    """What several devices with one artifact have learnt: the mean of the heads that learn, weighed by the updates they have had, and the sum of
    what was seen.

    No thresholds go with it: the artifact's own heads are in use until a device has found, and proven, its own for these.

    Devices that have stopped learning count for nothing.

    Raises:
        StateError: none are given, or they belong to different artifacts.
    """
    if not states:
        raise StateError("there are no states to merge", "give two or more")
    first = states[0]
    if any(state.record.model_id != first.record.model_id for state in states):
        raise StateError("these states belong to different artifacts", "merge those of one artifact")
    counts = np.array([state.record.updates if state.learnt and not state.record.stopped else 0 for state in states], np.float64)
    total = counts.sum()
    if not total:
        return State.fresh(first.artifact)
    own = first.artifact.classifiers()
    held = [{**own, **state.learnt} for state in states]
    mean = {name: sum(count / total * one[name].astype(np.float64) for count, one in zip(counts, held)).astype(np.float32) for name in own}
    all_seen = [state.record.seen for state in states if state.record.seen]
    seen = tuple(float(one) for one in np.sum(all_seen, axis=0)) if all_seen else ()
    answers, trials = sum(state.record.answers for state in states), max(state.record.trials for state in states)
    together = State.fresh(first.artifact).with_learnt(mean, int(total), answers=answers, seen=seen, trials=trials)
    return together.note("merged", f"{len(states)} states with {', '.join(map(str, counts.astype(int)))} updates")


def classifier_of(tensors: Mapping[str, Array], point: ExitPoint) -> Classifier:
    """One exit's."""
    return Classifier(tensors[point.weight], tensors[point.bias])


def most_bytes(artifact: Artifact) -> int:
    """What a state of this artifact can have."""
    return LARGEST_RECORD + (KEPT + 1) * (sum(array.nbytes for array in artifact.classifiers().values()) + 64 * 1024)


def looks_like_state(path: Path) -> bool:
    """Whether a file, though it is damaged, began as a state: its first name is the record's."""
    data = path.read_bytes()
    try:
        container.read(data)
    except ArtifactError:
        return data[30 : 30 + len(RECORD)] == RECORD.encode() or not data
    return False


def _path(number: int) -> str:
    return f"heads/{number}.safetensors"


def _parsed(files: Mapping[str, memoryview], artifact: Artifact, place: Path) -> State:
    if next(iter(files), "") != RECORD or len(files[RECORD]) > LARGEST_RECORD:
        raise StateError(f"{place} is no state: {RECORD} is not its first file", _AGAIN)
    document = loads(bytes(files[RECORD]), RECORD)
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT or type(version) is not int:
        raise StateError(f"{place} has format {version!r:.40}, and this release reads {FORMAT}", "install the exitify that wrote it")
    record = from_json(StateRecord, document, RECORD)
    if record.model_id != artifact.manifest.model_id:
        raise StateError(f"{place} belongs to another artifact, {record.model_id[:16]}", f"this one is {artifact.manifest.model_id[:16]}; {_AGAIN}")
    numbers = [one.number for one in record.snapshots]
    holds = (
        numbers == sorted(set(numbers))
        and len(numbers) <= KEPT
        and len(record.events) <= EVENTS
        and min(numbers, default=FACTORY + 1) > FACTORY
        and record.next > max(numbers, default=FACTORY)
        and record.current in (FACTORY, *numbers)
        and record.updates >= 0
        and set(files) - {LEARNT} == {RECORD, *map(_path, numbers)}
        and len(record.seen) in (0, artifact.plan.classes)
        and min((*record.seen, record.trials, record.broken, record.forgot, record.answers, record.aim)) >= 0
        and max(record.updates, record.answers, record.trials) < MOST_COUNTED
    )
    if not holds:
        raise StateError(f"{place} contradicts itself: its snapshots are not those that it lists", _AGAIN)
    for one in record.snapshots:
        _check_settings(one, artifact, place)
    tensors = {number: _read_heads(files[_path(number)], artifact, place, f"snapshot {number}") for number in numbers}
    learnt = _read_heads(files[LEARNT], artifact, place, "the heads that learn") if LEARNT in files else {}
    return State(artifact, record, tensors, learnt)


def _check_settings(snapshot: Snapshot, artifact: Artifact, place: Path) -> None:
    exits = {point.name for point in artifact.plan.exits}
    if bool(snapshot.profile) != bool(snapshot.settings) or (snapshot.settings and set(snapshot.settings) != exits):
        raise StateError(f"{place} contradicts itself: snapshot {snapshot.number} does not say how each exit decides", _AGAIN)
    if len(snapshot.expected) not in (0, artifact.plan.classes) or not all(0 < share <= 1 for share in (snapshot.left, *snapshot.expected)):
        raise StateError(f"{place} holds in snapshot {snapshot.number} shares of classes that are none", _AGAIN)
    if not all(LEAST_TEMPERATURE <= setting.temperature <= MOST_TEMPERATURE for setting in snapshot.settings.values()):
        raise StateError(f"{place} holds in snapshot {snapshot.number} a temperature that there cannot be", _AGAIN)


def _read_heads(data: memoryview, artifact: Artifact, place: Path, what: str) -> dict[str, Array]:
    own, held = artifact.classifiers(), read_tensors(data, LEARNT)
    if {name: (array.dtype, array.shape) for name, array in held.items()} != {name: (array.dtype, array.shape) for name, array in own.items()}:
        raise StateError(f"{place} holds in {what} other tensors than the artifact's classifiers", _AGAIN)
    for name, array in held.items():
        if not np.isfinite(array).all():
            raise StateError(f"{place} holds in {what} a number in {name!r} that is not finite", _AGAIN)
    return {name: np.array(array) for name, array in held.items()}
