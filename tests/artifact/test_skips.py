"""Skip paths, masks and second sets of norms in the file: what was saved is opened, and what contradicts itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from exitify.artifact.artifact import MASKS_FILE, Artifact, build_artifact, graph_path, target_path
from exitify.artifact.manifest import Compiled, CompiledSegment, Conditions, MaskMeasured, MaskTable
from exitify.artifact.sources import graph_hashes, source_hashes
from exitify.artifact.tensors import write_tensors
from exitify.plan import Plan
from exitify.records import dumps
from tests.artifact.clauses import refused
from tests.artifact.packing import reopened
from tests.artifacts import profile_for
from tests.skipping import skipping

BLOCK = "each skip path is one block that computes `after` from `before` alone, both of one shape and dtype"
FOLLOWS = "a segment follows a skip path of the plan or none; blocks follow one, heads none"
THERE = "weights, heads and a graph for each segment are there, two for a trunk that follows a skip path"
MASK = "a profile's mask has one 0 or 1 for each skip path"
TABLE = "masks.json is JSON with the fields and types listed and no others"
SECOND = "a segment has second weights, as many as weights, where its norms have two sets, and else none"
SAME = "a name means the same in every graph, and in every graph with its norms' second set"


@pytest.fixture
def artifact() -> Artifact:
    return skipping()[1]


def table(artifact: Artifact, **changes: object) -> MaskTable:
    made = MaskTable(
        artifact.manifest.model_id, "onnxruntime", 1, Conditions("a processor", "", ""), 100, "", {"000": MaskMeasured(0.9, 0.0, 1.0, 2.0)}
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def with_plan(artifact: Artifact, change: Callable[[Plan], Plan]) -> Artifact:
    return build_artifact(replace(artifact.manifest, plan=change(artifact.plan)), artifact.files)


def with_segment(artifact: Artifact, name: str, **changes: Any) -> Artifact:
    return with_plan(artifact, lambda plan: replace(plan, segments=tuple(replace(s, **changes) if s.name == name else s for s in plan.segments)))


def test_what_was_saved_is_opened(artifact):
    full = artifact.with_masks(table(artifact)).with_profile("p", replace(profile_for(artifact, {}), skip="010"))
    again = reopened(full)
    assert again.plan == artifact.plan
    assert again.masks == table(artifact)
    assert again.profile("p").skip == "010"
    assert again.manifest.model_id == artifact.manifest.model_id


def test_an_artifact_without_measurements_has_none(artifact):
    assert artifact.masks is None


def test_only_trunks_that_follow_a_path_have_two_graphs(artifact):
    seconds = {path for path in artifact.files if path.endswith(".second_norms.onnx")}
    assert seconds == {graph_path(s.name, second=True) for s in artifact.plan.segments if s.kind == "trunk" and s.follows}
    assert len(seconds) == 3


def test_the_second_graph_differs_in_the_names_of_norms_alone(artifact):
    for segment in artifact.plan.segments:
        if segment.has_two_norm_sets:
            first, second = (onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name, second=flag)])) for flag in (False, True))
            names = {tensor.name for tensor in first.graph.initializer} ^ {tensor.name for tensor in second.graph.initializer}
            assert names
            assert {name for name in names if name.startswith("skip_norms.")} == {f"skip_norms.{n}" for n in names if not n.startswith("skip_norms.")}
            for node in second.graph.node:
                node.input[:] = [name.removeprefix("skip_norms.") for name in node.input]
            assert [n.SerializeToString() for n in first.graph.node] == [n.SerializeToString() for n in second.graph.node]


@pytest.mark.parametrize("kind", ["second graph", "first graph"])
def test_both_graphs_must_be_there(artifact, kind):
    path = graph_path("trunk_skip1", second=kind == "second graph")
    with refused(THERE, match=f"lacks '{path}'"):
        reopened(build_artifact(artifact.manifest, {name: data for name, data in artifact.files.items() if name != path}))


def test_a_second_graph_of_a_segment_with_one_set_is_refused(artifact):
    path = graph_path("trunk_final", second=True)
    files = {**artifact.files, path: artifact.files[graph_path("trunk_final")]}
    with refused("every file there is one that this format knows", match=f"holds '{path}'"):
        reopened(build_artifact(artifact.manifest, files))


def test_a_second_graph_with_other_ends_is_refused(artifact):
    first = artifact.files[graph_path("trunk_skip3")]
    with refused("a graph has the inputs and outputs that the plan describes", match=r"trunk_skip1\.second_norms\.onnx does not have the inputs"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, graph_path("trunk_skip1", second=True): first}))


def test_a_name_with_two_meanings_among_second_graphs_is_refused(artifact):
    path = graph_path("trunk_skip1", second=True)
    model = onnx.load_model_from_string(bytes(artifact.files[path]))
    other = next(name for name in artifact.graph("trunk_skip3").made if name not in artifact.plan.values)
    inside = model.graph.node[0].output[0]
    for node in model.graph.node:
        node.input[:] = [other if name == inside else name for name in node.input]
        node.output[:] = [other if name == inside else name for name in node.output]
    with refused(SAME, match="with every skip path left out .*two meanings of the name"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, path: model.SerializeToString()}))


def test_a_name_with_two_meanings_that_meet_under_one_mask_alone_is_refused(artifact):
    """A first graph against another's second: neither with nothing left out nor with everything do they meet."""
    models = {
        name: onnx.load_model_from_string(bytes(artifact.files[graph_path(name, second=name == "trunk_skip3")]))
        for name in ("trunk_skip1", "trunk_skip3")
    }
    for model in models.values():
        inside = model.graph.node[0].output[0]
        for node in model.graph.node:
            node.input[:] = ["meets" if name == inside else name for name in node.input]
            node.output[:] = ["meets" if name == inside else name for name in node.output]
    edited = {graph_path(name, second=name == "trunk_skip3"): model.SerializeToString() for name, model in models.items()}
    with refused(SAME, match="with skip[13] left out .*two meanings of the name 'meets'"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, **edited}))


def test_a_path_that_is_not_one_block_is_refused(artifact):
    path = artifact.plan.skips[0]
    for changes in ({"before": artifact.plan.skips[1].before}, {"after": path.before}):
        with refused(BLOCK, match="skip path 'skip1' is not one segment that computes"):
            reopened(with_plan(artifact, lambda plan, changes=changes: replace(plan, skips=(replace(path, **changes), *plan.skips[1:]))))
    with refused(BLOCK, match="skip path 'skip9' is not one segment"):
        reopened(with_plan(artifact, lambda plan: replace(plan, skips=(*plan.skips, replace(path, name="skip9")))))


def test_a_path_that_changes_the_shape_is_refused(artifact):
    path = artifact.plan.skips[2]
    values = {**artifact.plan.values, path.after: replace(artifact.plan.values[path.after], shape=(16, 8, 8))}
    with refused(BLOCK, match=f"'{path.before}' cannot stand in for '{path.after}': they look different"):
        reopened(with_plan(artifact, lambda plan: replace(plan, values=values)))


@pytest.mark.parametrize(
    ("name", "follows", "message"),
    [
        ("trunk_skip1", "skip9", "segment 'trunk_skip1' follows 'skip9', which is no skip path"),
        ("head_exit1", "skip1", "the head 'head_exit1' follows a skip path"),
    ],
)
def test_a_segment_that_follows_what_it_cannot_is_refused(artifact, name, follows, message):
    with refused(FOLLOWS, match=message):
        reopened(with_segment(artifact, name, follows=follows))


def test_a_block_that_follows_nothing_is_refused(artifact):
    plan = replace(artifact.plan, skips=artifact.plan.skips[1:])
    with refused(FOLLOWS, match="segment 'trunk_skip1' follows 'skip1', which is no skip path"):
        reopened(with_plan(artifact, lambda _: plan))


@pytest.mark.parametrize("name", ["a b", "final", "exit1", "skip-1"])
def test_a_path_name_that_is_none_is_refused(artifact, name):
    def rename(plan: Plan) -> Plan:
        segments = tuple(replace(s, follows=name) if s.follows == "skip1" else s for s in plan.segments)
        return replace(plan, skips=(replace(plan.skips[0], name=name), *plan.skips[1:]), segments=segments)

    with refused("each segment, exit, value and node has its own name", match=f"a skip path cannot be called '{name}'"):
        reopened(with_plan(artifact, rename))


def test_two_paths_of_one_name_are_refused(artifact):
    with refused("each segment, exit, value and node has its own name", match="the skip path name 'skip1' is used twice"):
        reopened(with_plan(artifact, lambda plan: replace(plan, skips=(plan.skips[0], *plan.skips))))


@pytest.mark.parametrize("mask", ["", "01", "0110", "01x", "11 "])
def test_a_profile_with_another_mask_is_refused(artifact, mask):
    with refused(MASK, match="profile 'p' has the mask .*, which is none of this network"):
        artifact.with_profile("p", replace(profile_for(artifact, {}), skip=mask))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(surprise=1), "has an unknown field 'surprise'"),
        (lambda d: d.pop("engine"), "lacks the field 'engine'"),
        (lambda d: d["masks"]["000"].update(ms="fast"), r"\.masks\.000\.ms is 'fast', not a finite number"),
    ],
)
def test_measurements_with_other_fields_or_types_are_refused(artifact, edit, message):
    document = json.loads(dumps(table(artifact)))
    edit(document)
    with refused(TABLE, match=rf"masks\.json ?{message}"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, MASKS_FILE: json.dumps(document).encode()}))


def test_measurements_of_another_network_are_refused(artifact):
    with refused("masks.json has this artifact's model_id", match=r"masks\.json was measured on another network"):
        artifact.with_masks(table(artifact, model_id="0" * 64))


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"01": MaskMeasured(1, 0, 1, 1)},
        {"01x": MaskMeasured(1, 0, 1, 1)},
        {"000": MaskMeasured(1, 0, 1, 0.0)},
        {"000": MaskMeasured(1, 0, 1, -1.0)},
    ],
    ids=["none", "short", "letters", "no time", "negative"],
)
def test_measurements_of_no_mask_are_refused(artifact, masks):
    clause = "masks.json has at least one mask, each with one 0 or 1 for each skip path and a time above 0"
    with refused(clause, match=r"masks\.json has"):
        artifact.with_masks(table(artifact, masks=masks))


@pytest.mark.parametrize(("name", "count"), [("trunk_skip1", 0), ("trunk_skip1", 2), ("block_skip1", 1), ("trunk_final", 1)])
def test_second_weights_that_do_not_fit_are_refused(artifact, name, count):
    segments = {
        s.name: CompiledSegment(*graph_hashes(artifact, s.name), (f"{s.name}.0",), (f"{s.name}.0",) if s.has_two_norm_sets else (), (), 1e-6)
        for s in artifact.plan.segments
    }
    made = Compiled(
        "host", "host", "x86_64-linux-gnu", "x86-64-v3", ("avx2",), None, "fp32", "0.27.0", "0.1.14", segments, "",
        (), 0, source_hashes(artifact, segments), 1e-4, 0, {},
    )  # fmt: skip
    weights = write_tensors({f"{name}.0": np.zeros(3, np.float32) for name in segments})
    assert reopened(artifact.with_target(made, b"library", weights)).targets == {"host": made}
    wrong = replace(made, segments={**segments, name: replace(segments[name], second_weights=(f"{name}.0",) * count)})
    with refused(SECOND, match=f"does not give '{name}' weights for each of its sets of norms"):
        artifact.with_target(wrong, b"library", weights)
    assert target_path("host", "library.so") not in artifact.files
