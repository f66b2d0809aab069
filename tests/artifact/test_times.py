"""Times of segments in the file: what was saved is opened, and what contradicts itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from exitify.artifact.artifact import Artifact, build_artifact
from exitify.artifact.manifest import Conditions, SegmentTimes
from tests.artifact.clauses import refused
from tests.artifact.packing import reopened
from tests.artifacts import exported

BOARD = Conditions("orin-nano-8gb", "15W", "fixed")


def times(artifact: Artifact, **changes: object) -> SegmentTimes:
    segments = {segment.name: 0.5 + i for i, segment in enumerate(artifact.plan.segments)}
    made = SegmentTimes(artifact.manifest.model_id, "tvm:orin-nano-8gb.gpu", 1, BOARD, 25, 9.0, segments)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def artifact() -> Artifact:
    return exported("identity")[1]


def edited(artifact: Artifact, edit: Callable[[dict[str, Any]], object]) -> Artifact:
    document = json.loads(bytes(artifact.with_times("nano", times(artifact)).files["times/nano.json"]))
    edit(document)
    return build_artifact(artifact.manifest, {**artifact.files, "times/nano.json": json.dumps(document).encode()})


def test_what_was_saved_is_opened(artifact):
    full = artifact.with_times("nano", times(artifact)).with_times("agx", times(artifact, whole_ms=2.0))
    again = reopened(full)
    assert again.times == {"nano": times(artifact), "agx": times(artifact, whole_ms=2.0)}
    assert again.manifest.model_id == artifact.manifest.model_id


def test_an_artifact_without_times_has_none(artifact):
    assert artifact.times == {}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(seconds=1), r"seconds"),
        (lambda d: d.pop("rounds"), r"lacks the field 'rounds'"),
        (lambda d: d.update(whole_ms="9"), r"whole_ms is '9'"),
        (lambda d: d["conditions"].update(clocks="slow"), r"clocks is 'slow', not one of fixed, free"),
        (lambda d: d["segments"].update(trunk_exit1=None), r"trunk_exit1.* is None"),
    ],
)
def test_times_with_other_fields_or_types_are_refused(artifact, edit, message):
    with refused("a file of times is JSON with the fields and types listed and no others", match=message):
        reopened(edited(artifact, edit))


@pytest.mark.parametrize("name", ["n" * 65, "none"])
def test_a_name_that_no_profile_can_have_is_refused(artifact, name):
    data = artifact.with_times("nano", times(artifact)).files["times/nano.json"]
    with refused("the name of times is one that a profile can have", match=f"a record of times cannot be called '{name}'"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, f"times/{name}.json": data}))


@pytest.mark.parametrize("change", [{"model_id": "0" * 64}, {"segments": {}}, {"segments": {"trunk_exit1": 1.0}}])
def test_times_of_another_network_are_refused(artifact, change):
    with refused(
        "times have this artifact's model_id, and one number for each segment of the plan and no other",
        match="the times 'nano' were measured on another",
    ):
        artifact.with_times("nano", times(artifact, **change))


@pytest.mark.parametrize("ms", [0.0, -1.0, 3_600_000.0])
@pytest.mark.parametrize("field", ["whole_ms", "trunk_exit1"])
def test_times_that_no_clock_shows_are_refused(artifact, field, ms):
    def edit(document: dict[str, Any]) -> None:
        (document if field in document else document["segments"])[field] = ms

    with refused("every time is above 0 and below 3600000", match="the times 'nano' have a segment that takes no time, or more than an hour"):
        reopened(edited(artifact, edit))
