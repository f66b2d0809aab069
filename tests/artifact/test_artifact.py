"""The whole file: what was saved is opened, and every clause of FORMAT.md that it breaks is refused by name."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.artifact import container
from exitify.artifact.artifact import (
    HEADS_FILE,
    LARGEST_RECORD,
    MANIFEST,
    WEIGHTS_FILE,
    Artifact,
    build_artifact,
    graph_path,
    model_id,
    parse_artifact,
)
from exitify.artifact.manifest import Conformal, Policy, Preprocess, Profile
from exitify.artifact.tensors import write_tensors
from exitify.errors import AlteredFile, ArtifactError, ExitifyError, RecordError, UnknownProfile
from exitify.files import NotWritten
from exitify.plan import Cost, Plan, Value
from exitify.records import dumps, from_json, to_json
from exitify.runtime.session import Session
from tests.artifact.clauses import CLAUSES, refused
from tests.artifact.packing import files_of, packed, reopened
from tests.artifacts import EXITS, exported, inputs, profile_for, with_contract


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Two exits, two profiles, 30 KB."""
    _, plain = exported("depthwise")
    with_one = plain.with_profile("default", profile_for(plain, {"exit1": 0.5}))
    return with_one.with_profile("careful", profile_for(with_one, {"exit1": 0.9, "exit2": 0.8}))


def with_file(artifact: Artifact, path: str, data: bytes) -> Artifact:
    """Another file, listed and hashed as it should be, the profiles mended."""
    files = {**artifact.files, path: data}
    for profile in artifact.profiles:
        files.pop(f"profiles/{profile}.json", None)
    return build_artifact(artifact.manifest, files)


def with_document(artifact: Artifact, edit: Callable[[Any], object]) -> bytes:
    """The container with an edited manifest. Identity and profiles follow the edit where a plan can still be read, so that it alone is wrong."""
    document = json.loads(dumps(artifact.manifest))
    identity = document["model_id"]
    edit(document)
    files = files_of(artifact)
    try:
        plan = from_json(Plan, document["plan"], "plan")
        follows = document["model_id"] == identity
    except (RecordError, LookupError, TypeError):
        follows = False
    if follows:
        document["model_id"] = model_id(plan, artifact.manifest.files)
        for name, profile in artifact.profiles.items():
            path = f"profiles/{name}.json"
            files[path] = dumps(replace(profile, model_id=document["model_id"]))
            listed = document.get("files")
            if isinstance(listed, dict) and listed.get(path) == to_json(artifact.manifest.files[path]):
                listed[path] = to_json(build_artifact(artifact.manifest, {path: files[path]}).manifest.files[path])
    return packed({**files, MANIFEST: json.dumps(document).encode()})


def with_plan(artifact: Artifact, **changes: Any) -> bytes:
    """The container with a changed plan and everything else mended."""
    plan = replace(artifact.plan, **changes)
    files = {path: data for path, data in artifact.files.items() if not path.startswith("profiles/")}
    return packed(files_of(build_artifact(replace(artifact.manifest, plan=plan), files)))


def with_segment(artifact: Artifact, name: str, **changes: Any) -> bytes:
    return with_plan(artifact, segments=tuple(replace(s, **changes) if s.name == name else s for s in artifact.plan.segments))


def with_graph(artifact: Artifact, segment: str, edit: Callable[[onnx.ModelProto], object]) -> bytes:
    """The container with one graph edited and everything else mended."""
    model = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment)]))
    edit(model)
    return packed(files_of(with_file(artifact, graph_path(segment), model.SerializeToString())))


# --- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_what_was_saved_is_opened(name, tmp_path):
    _, saved = exported(name)
    opened = Artifact.open(saved.save(tmp_path / "net.exitify"))
    assert opened.manifest == saved.manifest
    assert {path: bytes(data) for path, data in opened.files.items()} == dict(saved.files)
    assert list(opened.files) == list(saved.files)


def test_profiles_come_back_in_the_order_in_which_they_were_made(artifact):
    opened = reopened(artifact)
    assert list(opened.profiles) == ["default", "careful"]
    assert opened.profiles == artifact.profiles
    assert opened.profile("careful").enabled == ("exit1", "exit2", "final")


def test_a_profile_of_the_same_name_takes_the_place_of_the_old_one(artifact):
    changed = artifact.with_profile("default", profile_for(artifact, {"exit2": 0.7}))
    assert list(changed.profiles) == ["default", "careful"]
    assert changed.profile("default").enabled == ("exit2", "final")
    assert artifact.profile("default").enabled == ("exit1", "final")


def test_the_same_artifact_gives_the_same_bytes(artifact, tmp_path):
    first, second = (artifact.save(tmp_path / name).read_bytes() for name in ("a.exitify", "b.exitify"))
    assert first == second == packed(files_of(Artifact.open(tmp_path / "a.exitify")))


def test_profiles_leave_the_identity_of_the_model_alone_and_weights_do_not(artifact):
    _, plain = exported("depthwise")
    assert artifact.manifest.model_id == plain.manifest.model_id
    tensors = dict(plain.tensors(HEADS_FILE))
    tensors["exit_heads.exit1.classifier.bias"] = tensors["exit_heads.exit1.classifier.bias"] + 1
    assert with_file(plain, HEADS_FILE, write_tensors(tensors)).manifest.model_id != plain.manifest.model_id
    assert build_artifact(replace(plain.manifest, exitify="0", heads_trained=False), plain.files).manifest.model_id == plain.manifest.model_id


def test_tensors_are_read_from_the_file_where_they_stand(artifact, tmp_path):
    opened = Artifact.open(artifact.save(tmp_path / "net.exitify"))
    for path in (WEIGHTS_FILE, HEADS_FILE):
        for tensor in opened.tensors(path).values():
            assert tensor.ctypes.data % 64 == 0
            assert not tensor.flags.owndata


def test_an_open_artifact_outlives_its_replacement(artifact, tmp_path):
    opened = Artifact.open(artifact.save(tmp_path / "net.exitify"))
    exported("in_place")[1].save(tmp_path / "net.exitify")
    assert {path: bytes(data) for path, data in opened.files.items()} == {path: bytes(data) for path, data in artifact.files.items()}


@pytest.mark.parametrize("name", ["identity", "transformer"])
def test_an_unpacked_artifact_is_a_folder_of_ordinary_onnx_models(name, tmp_path):
    """The head of `identity` has convolutions, so there are tensors in both files."""
    _, artifact = exported(name)
    with zipfile.ZipFile(artifact.save(tmp_path / "net.exitify")) as archive:
        archive.extractall(tmp_path)
    given: dict[str, np.ndarray] = {artifact.plan.input: inputs(2), **artifact.tensors(HEADS_FILE)}
    given |= {point.temperature: np.array(1, np.float32) for point in artifact.plan.exits}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for segment in artifact.plan.segments:
        path = tmp_path / graph_path(segment.name)
        onnx.checker.check_model(path, full_check=True)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        given.update(zip(names, session.run(names, {value.name: given[value.name] for value in session.get_inputs()})))
    recorded = Session(artifact).record(inputs(2))
    np.testing.assert_allclose(given[artifact.plan.output], recorded.logits["final"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(given["exit2.logits"], recorded.logits["exit2"], rtol=1e-4, atol=1e-5)


# --- container and manifest -----------------------------------------------------------------------------------------


def test_the_first_file_must_be_the_manifest(artifact):
    files = files_of(artifact)
    manifest = files.pop(MANIFEST)
    for wrong in ({**files, MANIFEST: manifest}, files, {"MANIFEST.json": manifest}):
        with refused("manifest.json is the first file", match=r"its first file is not manifest\.json"):
            parse_artifact(packed(wrong))


def test_a_flipped_byte_in_any_file_is_found(artifact):
    files = files_of(artifact)
    whole = packed(files)
    for path, data in files.items():
        at = whole.index(data) + len(data) // 2
        altered = bytearray(whole)
        altered[at] ^= 0x10
        with refused("each file's CRC-32 fits", match=f"the file '{path}' in the artifact was altered"):
            parse_artifact(bytes(altered))


def test_a_flipped_byte_is_found_when_the_container_was_written_anew(artifact):
    files = files_of(artifact)
    for path in artifact.files:
        altered = bytearray(files[path])
        altered[len(altered) // 2] ^= 0x10
        with refused("every file has the size and the sha256 listed", match=f"'{path}' in the artifact was altered: its sha256"):
            parse_artifact(packed({**files, path: bytes(altered)}))
        with refused("every file has the size and the sha256 listed", match=f"'{path}' in the artifact was altered: its sha256"):
            parse_artifact(packed({**files, path: files[path] + b"\n"}))


@pytest.mark.parametrize(
    ("version", "shown"),
    [(6, "6"), (8, "8"), (0, "0"), (-1, "-1"), ("7", "'7'"), (True, "True"), (7.0, r"7\.0"), (None, "None"), ([7], r"\[7\]"), ("9" * 100, "'9{39}")],
)
def test_an_unknown_format_is_refused_with_both_numbers(artifact, version, shown):
    with refused("format is 7", match=f"has format {shown}, and this release reads 7$|has format {shown}, and this release reads 7\n"):
        parse_artifact(with_document(artifact, lambda document: document.update(format=version)))


def test_a_manifest_without_a_format_is_refused(artifact):
    for text in (b"{}", b"[]", b"1", b'"manifest"', b"null"):
        with refused("format is 7", match="has format None, and this release reads 7"):
            parse_artifact(packed({**files_of(artifact), MANIFEST: text}))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b"[" * 100000,
        b"\xff\xfe",
        b'{"format": "\\udc00"}',
        b'{"format": ' + b"9" * 5000,
    ],
    ids=["empty", "cut off", "a key twice", "NaN", "deep", "no UTF-8", "half a character", "a number of 5000 digits"],
)
def test_a_manifest_that_is_no_json_is_refused(artifact, text):
    with refused("manifest.json is JSON", match=r"manifest\.json is not JSON that exitify reads"):
        parse_artifact(packed({**files_of(artifact), MANIFEST: text}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(surprise=1), r"manifest\.json has an unknown field 'surprise'"),
        (lambda d: d["plan"].update(surprise=1), r"manifest\.json\.plan has an unknown field 'surprise'"),
        (lambda d: d["input"].update(surprise=1), r"manifest\.json\.input has an unknown field 'surprise'"),
        (lambda d: d["plan"]["segments"][0]["cost"].update(joules=1), r"segments\[0\]\.cost has an unknown field 'joules'"),
        (lambda d: d["files"][WEIGHTS_FILE].update(surprise=1), "has an unknown field 'surprise'"),
        (lambda d: d.pop("heads_trained"), r"manifest\.json lacks the field 'heads_trained'"),
        (lambda d: d["plan"].pop("values"), r"manifest\.json\.plan lacks the field 'values'"),
        (lambda d: d["plan"]["exits"][0].pop("head"), r"exits\[0\] lacks the field 'head'"),
        (lambda d: d.update(heads_trained=1), r"manifest\.json\.heads_trained is 1, not true or false"),
        (lambda d: d.update(plan=None), r"manifest\.json\.plan is None, not an object"),
        (lambda d: d["input"].update(shape="3x16x16"), r"input\.shape is '3x16x16', not an array"),
        (lambda d: d["input"].update(color="CMYK"), r"input\.color is 'CMYK', not one of RGB, L"),
        (lambda d: d["plan"]["segments"][0].update(kind="loop"), r"segments\[0\]\.kind is 'loop', not one of trunk, block, head"),
        (lambda d: d["plan"]["segments"][0]["cost"].update(macs=1.5), r"cost\.macs is 1\.5, not an integer"),
        (lambda d: d["files"][WEIGHTS_FILE].update(bytes="12"), "bytes is '12', not an integer"),
    ],
)
def test_a_manifest_with_other_fields_or_types_is_refused(artifact, edit, message):
    with refused("manifest.json has the fields and types listed and no others", match=message):
        parse_artifact(with_document(artifact, edit))


def test_records_that_are_too_long_are_refused(artifact):
    clause = "manifest.json, each profile, masks.json, times and each compiled.json have at most 16777216 bytes"
    assert LARGEST_RECORD == 16777216
    files = files_of(artifact)
    with refused(clause, match=r"manifest\.json has 16777217 bytes"):
        parse_artifact(packed({**files, MANIFEST: files[MANIFEST].ljust(LARGEST_RECORD + 1)}))
    assert parse_artifact(packed({**files, MANIFEST: files[MANIFEST].ljust(LARGEST_RECORD)})).manifest == artifact.manifest
    path = "profiles/default.json"
    long = build_artifact(artifact.manifest, {**artifact.files, path: files[path].ljust(LARGEST_RECORD + 1)})
    with refused(clause, match=r"profiles/default\.json has 16777217 bytes"):
        reopened(long)


def test_missing_files_are_refused(artifact):
    for path in artifact.files:
        files = files_of(artifact)
        del files[path]
        with refused("every file listed is there", match=f"lacks '{path}', which its manifest lists"):
            parse_artifact(packed(files))


def test_weights_heads_and_graphs_must_be_there(artifact):
    for path in (WEIGHTS_FILE, HEADS_FILE, graph_path("trunk_final")):
        files = {name: data for name, data in artifact.files.items() if name != path and not name.startswith("profiles/")}
        with refused(
            "weights, heads and a graph for each segment are there, two for a trunk that follows a skip path",
            match=f"lacks '{path}'$|lacks '{path}'\n",
        ):
            reopened(build_artifact(artifact.manifest, files))


def test_a_file_that_is_not_listed_is_refused(artifact):
    for path in ("notes.txt", "profiles/other.json", "model/trunk_exit3.onnx"):
        with refused("every file there is listed", match=f"holds '{path}', which its manifest does not list"):
            parse_artifact(packed({**files_of(artifact), path: b"{}"}))


def test_a_file_that_the_format_does_not_know_is_refused_though_listed(artifact):
    for path in ("notes.txt", "model/trunk_exit3.onnx", "profiles/deep/er.json", "profiles/default.txt", "model/weights.bin"):
        with refused("every file there is one that this format knows", match=f"holds '{path}', which format 7 does not know"):
            reopened(build_artifact(artifact.manifest, {**artifact.files, path: b"{}"}))


def test_another_model_id_is_refused(artifact):
    for wrong in ("", "0" * 64, artifact.manifest.model_id.upper()):
        with refused("model_id is that of plan, graphs and weights", match="model_id is not that of its plan, graphs and weights"):
            parse_artifact(with_document(artifact, lambda document, wrong=wrong: document.update(model_id=wrong)))


def test_weights_of_another_network_are_refused_although_their_hash_is_listed(artifact):
    other = {name: tensor + 1 for name, tensor in artifact.tensors(WEIGHTS_FILE).items()}
    mixed = build_artifact(artifact.manifest, {**artifact.files, WEIGHTS_FILE: write_tensors(other)}).manifest
    files = {**files_of(artifact), WEIGHTS_FILE: write_tensors(other), MANIFEST: dumps(replace(mixed, model_id=artifact.manifest.model_id))}
    with refused("model_id is that of plan, graphs and weights", match="model_id is not that of"):
        parse_artifact(packed(files))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 16, 0)}, "has a dimension below 1"),
        ({"preprocess": Preprocess(mean=(0.1, 0.2))}, "mean has 2 numbers, and the input 3 channels"),
        ({"preprocess": Preprocess(std=(0.0,))}, "a std is 0"),
        ({"preprocess": Preprocess(), "color": "L"}, "a picture in L does not become an input of shape"),
        ({"preprocess": Preprocess(resize=(1, 2, 3))}, "is no side and no"),
        ({"preprocess": Preprocess(crop=(0, 16))}, "is no side and no"),
    ],
)
def test_an_input_contract_that_contradicts_itself_is_refused(artifact, changes, message):
    with refused("the input contract agrees with itself", match=f"the input contract: .*{message}"):
        reopened(with_contract(artifact, **changes))


# --- plan -----------------------------------------------------------------------------------------------------------

NAMES = "each segment, exit, value and node has its own name"
ORDER = "segments read what came before, and every value is described"
DTYPES = "a value's dtype is one of those listed, its dimensions are above 0, and one sample has at most 4293918720 bytes"
OUTPUT = "the output has one dimension and is computed by a segment"
HEAD = "every exit has a head with the inputs, outputs and parameters listed, and no other segment has parameters"
FITS = "a head fits the value that it reads and the number of classes"
LATER = "no exit needs a later one or the output"
PATH = "a head has a path exactly where it reads another exit, and that exit comes before it"


def test_names_used_twice_are_refused(artifact):
    plan = artifact.plan
    first = plan.segments[0]
    with refused(NAMES, match="the segment name 'trunk_exit1' is used twice"):
        parse_artifact(with_plan(artifact, segments=(*plan.segments, first)))
    with refused(NAMES, match="the exit name 'exit1' is used twice"):
        parse_artifact(with_plan(artifact, exits=(*plan.exits, plan.exits[0])))
    with refused(NAMES, match=f"the value name '{first.outputs[0]}' is used twice"):
        parse_artifact(with_segment(artifact, first.name, outputs=first.outputs * 2))
    with refused(NAMES, match=f"the node name '{first.nodes[0]}' is used twice"):
        parse_artifact(with_segment(artifact, first.name, nodes=first.nodes * 2))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda exits: exits[1].update(previous="exit1"), "reads 'exit1' by the path 'none'"),
        (lambda exits: exits[1]["head"].update(path="identity"), "reads 'no exit' by the path 'identity'"),
        (lambda exits: (exits[0].update(previous="exit2"), exits[0]["head"].update(path="boosted")), "reads 'exit2', which is no earlier exit"),
        (lambda exits: (exits[1].update(previous="exit2"), exits[1]["head"].update(path="boosted")), "reads 'exit2', which is no earlier exit"),
    ],
)
def test_a_head_that_reads_no_earlier_exit_is_refused(artifact, edit, message):
    with refused(PATH, match=message):
        parse_artifact(with_document(artifact, lambda document: edit(document["plan"]["exits"])))


@pytest.mark.parametrize("gates", [{"exit1": [0.0] * 5}, {"exit1": [0.0] * 5, "exit2": [0.0] * 4}, {"exit9": [0.0] * 5}])
def test_gates_are_five_numbers_for_each_exit(artifact, gates):
    with refused("gates are five finite numbers for each exit, or for none", match="gates are not 5 finite numbers for each exit"):
        parse_artifact(with_document(artifact, lambda document: document.update(gates=gates)))


def test_a_segment_that_reads_what_comes_later_is_refused(artifact):
    with refused(ORDER, match=r"segment 'trunk_final' reads 'mul', which nothing before it computes"):
        parse_artifact(with_plan(artifact, segments=artifact.plan.segments[::-1]))


def test_a_value_that_is_not_described_is_refused(artifact):
    values = {name: value for name, value in artifact.plan.values.items() if name != "mul"}
    with refused(ORDER, match="the plan does not say what 'mul' looks like"):
        parse_artifact(with_plan(artifact, values=values))


def test_a_segment_in_another_folder_is_refused(artifact):
    segments = tuple(replace(s, name=f"deep/{s.name}") if s.name == "trunk_final" else s for s in artifact.plan.segments)
    files = {path: data for path, data in artifact.files.items() if not path.startswith("profiles/")}
    files["model/deep/trunk_final.onnx"] = files.pop("model/trunk_final.onnx")
    moved = build_artifact(replace(artifact.manifest, plan=replace(artifact.plan, segments=segments)), files)
    with refused("a segment's name has no slash", match="segment 'deep/trunk_final' has a / in its name"):
        reopened(moved)


@pytest.mark.parametrize("cost", [Cost(macs=-1), Cost(parameters=2**48), Cost(moved_bytes=2**62)])
def test_impossible_costs_are_refused(artifact, cost):
    with refused("costs are from 0 to 2^48 - 1", match=r"segment 'trunk_exit1' cannot cost Cost\("):
        parse_artifact(with_segment(artifact, "trunk_exit1", cost=cost))


@pytest.mark.parametrize(
    "value", [Value((4,), "float8"), Value((4,), ""), Value((0,), "float32"), Value((-1,), "float32"), Value((2**40,), "float32")]
)
def test_values_that_cannot_be_are_refused(artifact, value):
    with refused(DTYPES, match="the plan's value 'more' cannot be"):
        parse_artifact(with_plan(artifact, values={**artifact.plan.values, "more": value}))


def test_a_plan_without_segments_is_refused(artifact):
    with refused("every file there is one that this format knows", match="holds 'model/trunk_exit1.onnx'"):
        parse_artifact(with_plan(artifact, segments=()))
    bare = {path: data for path, data in artifact.files.items() if path in (WEIGHTS_FILE, HEADS_FILE)}
    with refused(OUTPUT, match="the plan's output 'fc' is not the scores of some classes, computed by a segment"):
        reopened(build_artifact(replace(artifact.manifest, plan=replace(artifact.plan, segments=(), exits=())), bare))


def test_an_output_that_is_no_scores_is_refused(artifact):
    with refused(OUTPUT, match="the plan's output 'hardswish_1' is not the scores"):
        plan = replace(artifact.plan, output="hardswish_1", exits=(), segments=artifact.plan.segments[:1])
        files = {path: artifact.files[path] for path in (WEIGHTS_FILE, HEADS_FILE, graph_path("trunk_exit1"))}
        reopened(build_artifact(replace(artifact.manifest, plan=plan), files))
    with refused(OUTPUT, match="the plan's output 'x' is not the scores"):
        parse_artifact(with_plan(artifact, output="x"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "trunk", "parameters": ()},
        {"parameters": ("exit_heads.exit1.classifier.bias", "exit_heads.exit1.classifier.weight", "exit_heads.exit1.temperature")},
        {"parameters": ()},
        {"inputs": ("x",)},
        {"outputs": ("exit1.z", "exit1.logits", "exit1.scores")},
    ],
    ids=["no head", "parameters in another order", "no parameters", "another input", "outputs in another order"],
)
def test_a_head_with_other_ends_is_refused(artifact, changes):
    with refused(HEAD, match="the plan has no head for exit 'exit1'"):
        parse_artifact(with_segment(artifact, "head_exit1", **changes))


def test_a_head_without_an_exit_is_refused(artifact):
    with refused(HEAD, match="the plan has 2 heads for 1 exits"):
        parse_artifact(with_plan(artifact, exits=artifact.plan.exits[:1]))


def test_parameters_of_a_trunk_are_refused(artifact):
    with refused(HEAD, match="the plan has 3 heads for 2 exits"):
        parse_artifact(with_segment(artifact, "trunk_final", parameters=("fc.weight",)))


@pytest.mark.parametrize("changes", [{"classes": 7}, {"width": 8}, {"shape": (8, 8, 9)}])
def test_a_head_of_another_shape_is_refused(artifact, changes):
    exits = tuple(replace(point, head=replace(point.head, **changes)) if point.name == "exit1" else point for point in artifact.plan.exits)
    with refused(FITS, match="no segment computes 'exit1.(logits|z)' with shape|the head of exit 'exit1' does not fit"):
        parse_artifact(with_plan(artifact, exits=exits))


def test_heads_with_another_number_of_classes_than_the_network_are_refused(artifact):
    exits = tuple(replace(point, head=replace(point.head, classes=7)) for point in artifact.plan.exits)
    values = {**artifact.plan.values, "exit1.logits": Value((7,), "float32"), "exit2.logits": Value((7,), "float32")}
    with refused(FITS, match="the head of exit 'exit1' does not fit the value that it reads, or the number of classes"):
        parse_artifact(with_plan(artifact, exits=exits, values=values))


@pytest.mark.parametrize("name", ["final", "exit 1", "1", ""])
def test_a_name_that_no_exit_can_have_is_refused(artifact, name):
    exits = (replace(artifact.plan.exits[0], name=name), artifact.plan.exits[1])
    with refused(NAMES, match=f"an exit cannot be called '{name}'"):
        parse_artifact(with_plan(artifact, exits=exits))


def test_an_exit_that_needs_the_output_is_refused(artifact):
    segments = {segment.name: segment for segment in artifact.plan.segments}
    exits = (artifact.plan.exits[0], replace(artifact.plan.exits[1], after="fc"))
    segments["head_exit2"] = replace(segments["head_exit2"], inputs=("fc",))
    order = tuple(segments[name] for name in ("trunk_exit1", "head_exit1", "trunk_exit2", "trunk_final", "head_exit2"))
    with refused(LATER, match="exit 'exit2' needs the network's own output"):
        parse_artifact(with_plan(artifact, exits=exits, segments=order))


def test_an_exit_that_needs_a_later_one_is_refused(artifact):
    first, second = artifact.plan.exits
    segments = {segment.name: segment for segment in artifact.plan.segments}
    segments["head_exit1"] = replace(segments["head_exit1"], inputs=(second.features,))
    order = tuple(segments[name] for name in ("trunk_exit1", "trunk_exit2", "head_exit2", "head_exit1", "trunk_final"))
    early = replace(first, after=second.features, head=replace(first.head, shape=(second.head.width,), layout="vector"))
    with refused(LATER, match="nothing is left to run for exit 'exit2': one before it needs it"):
        parse_artifact(with_plan(artifact, exits=(early, second), segments=order))


def test_an_input_contract_for_another_network_is_refused(artifact):
    for changes in ({"shape": (3, 16, 17)}, {"dtype": "float64"}):
        with refused("the plan's input is what the input contract says", match="the input contract and the plan describe different inputs"):
            reopened(with_contract(artifact, **changes))


# --- graphs and weights ---------------------------------------------------------------------------------------------

ENDS = "a graph has the inputs and outputs that the plan describes"
TENSOR = "external data is the tensor of that name, dtype and shape in weights or heads"


def outside(model: onnx.ModelProto, index: int = 0) -> onnx.TensorProto:
    return [tensor for tensor in model.graph.initializer if tensor.external_data][index]


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Another name for a value or a tensor, wherever it stands."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = new if name == old else name
    for tensor in model.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name


def move(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        for entry in outside(model).external_data:
            if entry.key == key:
                entry.value = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        move("location", "../../../etc/passwd"),
        move("location", "/etc/passwd"),
        move("location", "heads.safetensors"),
        move("location", "../model/weights.safetensors"),
        move("location", ""),
        move("offset", "0"),
        move("length", "4"),
        move("offset", str(2**52)),
        lambda model: outside(model).dims.append(1),
        lambda model: setattr(outside(model), "data_type", onnx.TensorProto.INT32),
        lambda model: rename(model, outside(model).name, "fc.weight"),
    ],
    ids=[
        "out",
        "absolute",
        "the other file",
        "a detour",
        "no file",
        "the header",
        "shorter",
        "far",
        "another shape",
        "another dtype",
        "another name",
    ],
)
def test_external_data_that_is_not_that_tensor_is_refused(artifact, edit):
    with refused(TENSOR, match=r"model/trunk_exit1\.onnx reads .*, where the artifact has no such tensor"):
        parse_artifact(with_graph(artifact, "trunk_exit1", edit))


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.FLOAT16),
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "N"),
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 4),
        lambda model: setattr(model.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 4),
        lambda model: model.graph.input.add(name="more"),
        lambda model: model.graph.output.add(name=model.graph.node[0].output[0]),
        lambda model: setattr(model.graph.output[0], "name", model.graph.node[0].output[0]),
    ],
    ids=["dtype", "batch", "input shape", "output shape", "one input more", "one output more", "another output"],
)
def test_a_graph_with_other_ends_than_the_plan_is_refused(artifact, edit):
    with refused(ENDS, match=r"model/trunk_exit1\.onnx does not have the inputs and outputs that the plan names"):
        parse_artifact(with_graph(artifact, "trunk_exit1", edit))


def test_a_graph_that_is_not_plain_is_refused_when_opened(artifact):
    with refused("operators are of the standard domain", match=r"model/trunk_final\.onnx .*an operator of the domain b'com\.microsoft'"):
        parse_artifact(with_graph(artifact, "trunk_final", lambda model: setattr(model.graph.node[0], "domain", "com.microsoft")))
    with refused("a graph is a protobuf message of the fields named above", match=r"model/trunk_final\.onnx is not a graph"):
        reopened(with_file(artifact, graph_path("trunk_final"), b"garbage"))


def test_graphs_that_mean_different_things_by_a_name_are_refused_when_opened(artifact):
    hidden = next(iter(artifact.graph("trunk_exit1").made.keys() - set(artifact.plan.segment("trunk_exit1").outputs)))

    def edit(model: onnx.ModelProto) -> None:
        rename(model, next(node.output[0] for node in model.graph.node if node.output[0] not in artifact.plan.values), hidden)

    with refused(
        "a name means the same in every graph, and in every graph with its norms' second set",
        match=f"the model .*two meanings of the name '{hidden}'",
    ):
        parse_artifact(with_graph(artifact, "trunk_exit2", edit))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("exit_heads.exit1.classifier.weight", lambda tensor: tensor.T.copy()),
        ("exit_heads.exit1.classifier.bias", lambda tensor: tensor[:-1]),
        ("exit_heads.exit2.classifier.weight", lambda tensor: tensor.astype(np.float64)),
        ("exit_heads.exit2.classifier.bias", lambda tensor: None),
    ],
)
def test_heads_of_another_shape_are_refused(artifact, name, change):
    """The classifiers alone: what else a head has stands before them, so its graph's addresses still hold."""
    _, linear = exported("in_place")
    tensors = {**linear.tensors(HEADS_FILE), name: change(linear.tensors(HEADS_FILE)[name])}
    with refused("every head's weight and bias are there as float32 of the plan's shape", match=f"lacks '{name}' as float32"):
        reopened(with_file(linear, HEADS_FILE, write_tensors({key: tensor for key, tensor in tensors.items() if tensor is not None})))


def test_weights_that_are_no_safetensors_are_refused_when_opened(artifact):
    with refused("padding is zero", match=r"model/weights\.safetensors: the padding"):
        data = bytearray(bytes(artifact.files[WEIGHTS_FILE]))
        data[-1] = 1
        reopened(with_file(artifact, WEIGHTS_FILE, bytes(data)))


# --- profiles -------------------------------------------------------------------------------------------------------


def with_profile_text(artifact: Artifact, edit: Callable[[Any], object]) -> bytes:
    document = json.loads(dumps(artifact.profile("default")))
    edit(document)
    files = {**artifact.files, "profiles/default.json": json.dumps(document).encode()}
    return packed(files_of(build_artifact(artifact.manifest, files)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(surprise=1), r"profiles/default\.json has an unknown field 'surprise'"),
        (lambda d: d.pop("promise"), r"profiles/default\.json lacks the field 'promise'"),
        (lambda d: d.update(policy="hope"), r"profiles/default\.json\.policy is 'hope', not one of top1, entropy, margin"),
        (lambda d: d["exits"]["exit1"].update(threshold="high"), r"exits\.exit1\.threshold is 'high', not a finite number"),
        (lambda d: d["exits"]["exit1"].update(threshold=1e301), r"exits\.exit1\.threshold is 1e\+301, not a finite number"),
        (lambda d: d["exits"]["exit1"].update(enabled=1), r"exits\.exit1\.enabled is 1, not true or false"),
    ],
)
def test_a_profile_with_other_fields_or_types_is_refused(artifact, edit, message):
    with refused("a profile is JSON with the fields and types listed and no others", match=message):
        parse_artifact(with_profile_text(artifact, edit))


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(model_id="0" * 64),
        lambda d: d["exits"].pop("exit1"),
        lambda d: d["exits"].update(exit9=d["exits"]["exit1"]),
        lambda d: d["exits"].update(final=d["exits"]["exit1"]),
    ],
    ids=["another model", "an exit missing", "an exit too many", "the last exit"],
)
def test_a_profile_of_another_network_is_refused(artifact, edit):
    with refused("a profile has this artifact's model_id, and a setting for each exit", match="profile 'default' was made for another network"):
        parse_artifact(with_profile_text(artifact, edit))


def test_a_profile_of_another_network_cannot_be_added(artifact):
    _, other = exported("in_place")
    with refused("a profile has this artifact's model_id, and a setting for each exit", match="profile 'wrong' was made for another network"):
        artifact.with_profile("wrong", profile_for(other, {"exit1": 0.5}))


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-300, 0.0009, 1001.0, 1e299])
def test_temperatures_that_say_nothing_are_refused(artifact, temperature):
    clause = "temperatures are from 0.001 to 1000"
    with refused(clause, match=f"profile 'default' has a temperature of {temperature}".replace("+", r"\+")):
        parse_artifact(with_profile_text(artifact, lambda d: d.update(final_temperature=temperature)))
    with refused(clause, match="profile 'default' has a temperature of"):
        parse_artifact(with_profile_text(artifact, lambda d: d["exits"]["exit2"].update(temperature=temperature)))


GATE = (1.0, -2.0, 0.5, 0.25, -0.125)
QUANTILES = {"exit1": 0.0, "exit2": 0.75, "final": 1.0}


def with_everything(artifact: Artifact, policy: str = "jei") -> Profile:
    """A profile that has all a profile can have."""
    plain = profile_for(artifact, {"exit1": 0.5, "exit2": 0.25}, policy=policy)
    gated = {name: replace(setting, gate=GATE) for name, setting in plain.exits.items()}
    errors = dict.fromkeys(QUANTILES, (0.25, 0.125))
    return replace(plain, exits=gated, conformal=Conformal(0.1, "strict", QUANTILES, 500), calibration_errors=errors)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_profile_of_every_policy_comes_back(artifact, policy):
    profile = with_everything(artifact, policy)
    assert reopened(artifact.with_profile("default", profile)).profile("default") == profile


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["exits"]["exit2"].update(gate=[1.0] * 4), "has a gate of 4 numbers, not of 5 finite ones, at exit2"),
        (lambda d: d["exits"]["exit2"].update(gate=[1.0] * 6), "has a gate of 6 numbers"),
        (lambda d: d["exits"]["exit1"].update(gate=[]), "has the policy jei and no gate at exit1"),
        (lambda d: (d.update(policy="gates"), d["exits"]["exit2"].update(gate=[])), "has the policy gates and no gate at exit2"),
    ],
)
def test_an_exit_that_decides_by_a_gate_has_one(artifact, edit, message):
    changed = artifact.with_profile("default", with_everything(artifact))
    with refused("a gate has five numbers or none, and five at each enabled exit where the policy is gates or jei", match=message):
        parse_artifact(with_profile_text(changed, edit))


def test_where_no_exit_decides_by_a_gate_none_is_needed(artifact):
    profile = with_everything(artifact)
    off = replace(profile.exits["exit1"], enabled=False, gate=())
    assert reopened(artifact.with_profile("default", replace(profile, exits={**profile.exits, "exit1": off}))).profiles
    bare = {name: replace(setting, gate=()) for name, setting in profile.exits.items()}
    assert reopened(artifact.with_profile("default", replace(profile, policy="patience", exits=bare))).profiles


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(alpha=0.0), "has sets for alpha 0.0 from 500 samples"),
        (lambda c: c.update(alpha=1.0), "has sets for alpha 1.0 from 500 samples"),
        (lambda c: c.update(samples=0), "has sets for alpha 0.1 from 0 samples"),
        (lambda c: c["quantiles"].pop("final"), "has quantiles for exit1, exit2, not for each exit and final"),
        (lambda c: c["quantiles"].update(exit3=0.5), "has quantiles for exit1, exit2, final, exit3, not for"),
        (lambda c: c["quantiles"].update(exit1=-0.1), "has a quantile of -0.1 at exit1, not one from 0 to 1"),
        (lambda c: c["quantiles"].update(final=1.1), "has a quantile of 1.1 at final"),
    ],
)
def test_quantiles_that_make_no_sets_are_refused(artifact, edit, message):
    changed = artifact.with_profile("default", with_everything(artifact))
    clause = "alpha is above 0 and below 1, samples above 0, and there is a quantile from 0 to 1 for each exit and final and no other"
    with refused(clause, match=message):
        parse_artifact(with_profile_text(changed, lambda d: edit(d["conformal"])))


@pytest.mark.parametrize("errors", [{"exit1": [0.1, 0.1]}, dict.fromkeys(QUANTILES, (0.1, 1.5)), dict.fromkeys([*QUANTILES, "exit3"], (0.1, 0.1))])
def test_calibration_errors_that_cannot_be_are_refused(artifact, errors):
    changed = artifact.with_profile("default", with_everything(artifact))
    with refused(
        "calibration errors are two numbers from 0 to 1 for each exit and final, or for none", match="has calibration errors that are not two"
    ):
        parse_artifact(with_profile_text(changed, lambda d: d.update(calibration_errors=errors)))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_profile_with_a_number_that_cannot_be_written_is_refused_by_name(artifact, number):
    profile = with_everything(artifact)
    for changes, message in (({"threshold": number}, "a threshold of"), ({"gate": (*GATE[:4], number)}, "a gate of 5 numbers")):
        exits = {**profile.exits, "exit2": replace(profile.exits["exit2"], **changes)}
        with pytest.raises(ArtifactError, match=f"profile 'wrong' has {message}.* at exit2\n  hint: calibrate again"):
            artifact.with_profile("wrong", replace(profile, exits=exits))


def test_an_unknown_profile_is_refused_with_those_there_are(artifact):
    with pytest.raises(UnknownProfile, match=r"no profile 'fast'\n  hint: it has default, careful"):
        artifact.profile("fast")
    with pytest.raises(UnknownProfile, match=r"no profile 'fast'\n  hint: `exitify calibrate` makes one"):
        exported("depthwise")[1].profile("fast")


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "a b", "ü", "n" * 65, "none"])
def test_a_profile_name_that_cannot_be_a_files_is_refused(artifact, name):
    with pytest.raises(ExitifyError, match="a profile cannot be called"):
        artifact.with_profile(name, profile_for(artifact, {}))


@pytest.mark.parametrize("name", ["n" * 65, "none"])
def test_a_profile_in_the_file_with_a_name_that_it_cannot_have_is_refused(artifact, name):
    files = {**artifact.files, f"profiles/{name}.json": dumps(artifact.profile("default"))}
    with refused("a profile's name is one that it can have", match=f"a profile cannot be called '{name}'"):
        reopened(build_artifact(artifact.manifest, files))


# --- opening --------------------------------------------------------------------------------------------------------


def test_an_error_names_the_file(artifact, tmp_path):
    path = tmp_path / "net.exitify"
    path.write_bytes(packed(files_of(artifact))[:-5])
    with refused("an end record is there", match=f"^{path}: the artifact is cut off"):
        Artifact.open(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "net.exitify").touch()
    with refused("the file begins with a file's header", match="is not an exitify artifact"):
        Artifact.open(tmp_path / "net.exitify")


def test_a_file_that_cannot_be_opened_is_an_artifact_error(tmp_path):
    for path in (tmp_path / "none.exitify", tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(ArtifactError, match=r"cannot open .*: ") as raised:
            Artifact.open(path)
        assert type(raised.value) is ArtifactError


def test_opening_needs_no_engine_and_no_onnx(artifact, tmp_path):
    path = artifact.save(tmp_path / "net.exitify")
    code = f"""
import sys
for name in ("torch", "tvm", "networkx", "onnx", "onnxruntime"):
    sys.modules[name] = None
from exitify.artifact.artifact import Artifact
opened = Artifact.open({str(path)!r})
print(opened.manifest.model_id, *opened.profiles, len(opened.graph("trunk_final").nodes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [artifact.manifest.model_id, "default", "careful", str(len(artifact.graph("trunk_final").nodes))]


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # an artifact that a failed test holds is still mapped


def larger(artifact: Artifact, count: int) -> Artifact:
    """The artifact with that many bytes more."""
    profile = artifact.profile("default")
    return artifact.with_profile("large", replace(profile, promise=replace(profile.promise, note="x" * count)))


def test_a_full_disk_leaves_the_old_artifact_whole(artifact, small_disk):
    path = artifact.save(small_disk / "net.exitify")
    before = path.read_bytes()
    with pytest.raises(NotWritten, match=f"cannot write {path}: No space left on device"):
        larger(artifact, 2**20).save(path)
    assert path.read_bytes() == before
    assert os.listdir(small_disk) == ["net.exitify"]
    assert Artifact.open(path).manifest == artifact.manifest


def test_a_limit_on_file_sizes_leaves_the_old_artifact_whole(artifact, tmp_path):
    path = artifact.save(tmp_path / "net.exitify")
    larger(artifact, 2**18).save(tmp_path / "large.exitify")
    before = path.read_bytes()
    code = f"""
import resource
from exitify.artifact.artifact import Artifact
from exitify.files import NotWritten
large = Artifact.open({str(tmp_path / "large.exitify")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
try:
    large.save({str(path)!r})
except NotWritten as error:
    print(error.problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cannot write {path}: File too large\n"
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["large.exitify", "net.exitify"]


def test_a_failure_while_flushing_leaves_the_old_artifact_whole(artifact, tmp_path, monkeypatch):
    path = artifact.save(tmp_path / "net.exitify")
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotWritten, match="Input/output error"):
        larger(artifact, 100).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.exitify"]


def test_an_interruption_leaves_no_temporary_file(artifact, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(tmp_path / "net.exitify")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused(artifact, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "net.exitify", tmp_path / "file" / "net.exitify", tmp_path / ("n" * 250)):
        with pytest.raises(NotWritten, match="cannot write "):
            artifact.save(path)
    assert os.listdir(tmp_path) == ["file"]


def test_readers_see_the_old_file_or_the_new_one(artifact, tmp_path, monkeypatch):
    path = exported("in_place")[1].save(tmp_path / "net.exitify")
    seen = []

    def look(descriptor: int) -> None:
        seen.append(Artifact.open(path).manifest.model_id)

    monkeypatch.setattr(os, "fsync", look)
    artifact.save(path)
    assert seen == [exported("in_place")[1].manifest.model_id]
    assert Artifact.open(path).manifest.model_id == artifact.manifest.model_id


# --- fuzz -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def subtrees(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield from subtrees(value, (*path, key))


def at(document: Any, path: Sequence[Any]) -> Any:
    for key in path:
        document = document[key]
    return document


def opened_or_none(data: bytes) -> Artifact | None:
    """None where it is refused; any error but ArtifactError goes on."""
    try:
        return parse_artifact(data)
    except ArtifactError:
        return None


@settings(max_examples=400)
@given(st.integers(0, 10**6), st.sampled_from(["anything", "another part", "dropped"]), json_values, st.integers(0, 10**6))
def test_any_other_manifest_is_refused_or_runs(artifact, place, kind, anything, another):
    """A part is replaced by anything, or by another part of its type, or dropped. ArtifactError alone says no, and what opens also runs."""
    paths = [path for path in subtrees(json.loads(dumps(artifact.manifest))) if path]
    *owner, last = paths[place % len(paths)]

    def edit(root: Any) -> None:
        if kind == "dropped":
            del at(root, owner)[last]
        elif kind == "another part":
            alike = [other for other in (at(root, path) for path in paths) if type(other) is type(at(root, [*owner, last]))]
            at(root, owner)[last] = copy.deepcopy(alike[another % len(alike)])
        else:
            at(root, owner)[last] = anything

    opened = opened_or_none(with_document(artifact, edit))
    if opened is not None:
        recorded = Session(opened).record(np.zeros((1, *opened.manifest.input.shape), np.float32))
        assert set(recorded.logits) == set(opened.plan.exit_names)


@given(json_values)
def test_a_manifest_that_is_any_json_is_refused(artifact, document):
    with pytest.raises(ArtifactError):
        parse_artifact(packed({**files_of(artifact), MANIFEST: json.dumps(document).encode()}))


@settings(max_examples=200)
@given(st.sampled_from(get_args(Policy)), st.integers(0, 10**6), st.one_of(json_values, st.floats(-1e300, 1e300)))
def test_any_other_profile_is_refused_or_runs(artifact, policy, place, anything):
    artifact = artifact.with_profile("default", with_everything(artifact, policy))
    paths = [path for path in subtrees(json.loads(dumps(artifact.profile("default")))) if path]
    *owner, last = paths[place % len(paths)]
    opened = opened_or_none(with_profile_text(artifact, lambda root: at(root, owner).__setitem__(last, anything)))
    if opened is not None:
        answer = Session(opened).run(inputs(1))
        assert answer.exit in opened.plan.exit_names
        assert set(answer.prediction_set or ()) <= set(range(opened.plan.classes))


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4), st.floats(0, 1), st.binary(max_size=10))
def test_mutated_artifacts_raise_nothing_else(artifact, changes, cut, inserted):
    whole = packed(files_of(artifact))
    altered = bytearray(whole)
    for where, byte in changes:
        altered[int(where * len(altered))] = byte
    position = int(cut * len(altered))
    altered[position:position] = inserted
    try:
        assert parse_artifact(bytes(altered)).manifest == artifact.manifest
    except ArtifactError:
        assert bytes(altered) != whole
    else:
        assert bytes(altered) == whole


# --- the specification ----------------------------------------------------------------------------------------------


def test_every_clause_of_the_specification_has_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert len(CLAUSES) > 50
    assert [clause for clause in CLAUSES if f'"{clause}"' not in tests] == []


def test_every_error_of_the_artifact_answers_a_clause():
    named = {kind.__name__ for kind in CLAUSES.values()}
    children = {kind.__name__ for kind in ArtifactError.__subclasses__()}
    assert named == children


def test_the_fields_in_the_specification_are_those_of_the_records(artifact):
    text = (Path(container.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    document = json.loads(dumps(replace(artifact.manifest, input=replace(artifact.manifest.input, preprocess=Preprocess()))))
    profile = json.loads(dumps(with_everything(artifact)))
    point, segment = document["plan"]["exits"][0], document["plan"]["segments"][0]
    records = [document, document["input"], document["input"]["preprocess"], document["plan"], point, point["head"], segment, segment["cost"]]
    for record in [*records, document["model"], profile, profile["promise"], profile["exits"]["exit1"], profile["conformal"]]:
        for field in record:
            assert any(mark in text for mark in (f"{field}`", f"`{field}.", f".{field}.")), field


def test_what_is_altered_is_never_called_something_milder(artifact):
    """AlteredFile means: these bytes are not those that were hashed. It comes before anything is read out of them."""
    files = files_of(artifact)
    with pytest.raises(AlteredFile):
        parse_artifact(packed({**files, graph_path("trunk_final"): b"garbage", "profiles/default.json": b"garbage"}))
