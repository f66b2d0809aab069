"""Two states of one artifact, exit by exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exitify.adapt.state import State, classifier_of
from exitify.artifact.manifest import ExitSetting


@dataclass(frozen=True)
class Difference:
    """One exit. in_use, learning: How far the heads are from the other's, over that one's size. ours, theirs: Thresholds, None where off."""

    exit: str
    in_use: float
    learning: float
    ours: float | None
    theirs: float | None


def compare(state: State, other: State) -> list[Difference]:
    """How far one state is from another, of the same artifact."""
    profile = next((one.profile for one in (state.snapshot(), other.snapshot()) if one is not None and one.profile), "")
    own = state.artifact.classifiers()
    found = []
    for point in state.artifact.plan.exits:
        pairs = ((state.current(), other.current()), ({**own, **state.learnt}, {**own, **other.learnt}))
        in_use, learning = (classifier_of(ours, point).distance(classifier_of(theirs, point)) for ours, theirs in pairs)
        thresholds = (_threshold(one, profile, point.name) for one in (state, other))
        found.append(Difference(point.name, in_use, learning, *thresholds))
    return found


def _threshold(state: State, profile: str, exit_name: str) -> float | None:
    snapshot = state.snapshot()
    settings: Mapping[str, ExitSetting] = snapshot.settings if snapshot is not None else {}
    if not settings and profile in state.artifact.profiles:
        settings = state.artifact.profile(profile).exits
    setting = settings.get(exit_name)
    return setting.threshold if setting is not None and setting.enabled else None
