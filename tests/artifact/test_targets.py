"""Libraries in an artifact: kept, replaced, and refused where their three files do not fit each other. None of them is loaded here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.artifact import container
from exitify.artifact.artifact import (
    HEADS_FILE,
    LARGEST_RECORD,
    WEIGHTS_FILE,
    Artifact,
    build_artifact,
    graph_path,
    parse_artifact,
    target_path,
)
from exitify.artifact.manifest import Compiled, CompiledSegment, GpuKernels, TunedKernel, target_name
from exitify.artifact.sources import source_hashes
from exitify.artifact.tensors import write_tensors
from exitify.errors import AlteredFile, ArtifactError, ExitifyError, MalformedManifest
from exitify.records import dumps
from tests.artifact.clauses import refused
from tests.artifact.packing import files_of, packed, reopened
from tests.artifacts import exported, profile_for

LIBRARY = b"\x7fELF, as far as anyone looks"
FILES = "a target has compiled.json, library.so and weights.safetensors"
NAMED = "a target's name is one that it can have, and its compiled.json says the same, with that board, device and precision"
KERNELS = "a target has kernels.cubin and kernels.ptx where its compiled.json describes a GPU, and only there"
SEGMENTS = "a library's segments are the plan's, all of them unless left_to says what runs the others"
WEIGHTS = "a target's weights.safetensors holds each tensor that its segments take, each taken by one of them, and no other"
WORDS = "triple, cpu, features and versions of TVM have 1 to 64 letters, digits, `_`, `.`, `+` and `-`"
OF_GPU = "a GPU's architecture is `sm_` with 2 or 3 digits, PTX and compiler are two numbers with a point, and the mark has its form"
BLOCKS = "in_blocks names values of three sizes in float32 that segments of the library alone make and read; block is 0 if it names none"
TUNED = "a kernel's counts are 1 or more, trials ascend in its history, times fall there and stay above 0, and its chosen time is between them"
KNOWN = "every file there is one that this format knows"


def record(artifact: Artifact, target: str = "host", **changes: object) -> Compiled:
    """What a library says of itself that takes one derived tensor for each segment."""
    segments = {
        s.name: CompiledSegment(artifact.manifest.files[graph_path(s.name)].sha256, "", (f"{s.name}.0",), (), (), 1e-6)
        for s in artifact.plan.segments
    }
    made = Compiled(
        target, target.split(".")[0], "x86_64-linux-gnu", "x86-64-v3", ("avx2", "fma"), None, "fp32", "0.27.0", "0.1.14", segments, "",
        (), 0, source_hashes(artifact, segments), 1e-4, 0, {},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def derived(compiled: Compiled) -> bytes:
    """The tensors that its segments take."""
    names = [name for segment in compiled.segments.values() for name in segment.weights]
    return write_tensors({name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)})


def with_library(artifact: Artifact, target: str = "host", library: bytes = LIBRARY, **changes: object) -> Artifact:
    compiled = record(artifact, target, **changes)
    return artifact.with_target(compiled, library, derived(compiled), (b"cubin", b"ptx") if compiled.gpu else None)


GPU = GpuKernels("sm_87", "8.5", "12.6", "exitify kernels " + "0" * 64)
ON_GPU = "board.gpu"


@pytest.fixture(scope="module")
def plain() -> Artifact:
    """Two exits and a profile, no library."""
    _, artifact = exported("depthwise")
    return artifact.with_profile("default", profile_for(artifact, {"exit1": 0.5}))


@pytest.fixture(scope="module")
def artifact(plain: Artifact) -> Artifact:
    """The same with a library."""
    return with_library(plain)


def with_document(artifact: Artifact, edit: Callable[[Any], object]) -> Artifact:
    """The artifact with an edited compiled.json, hashed as it should be."""
    path = target_path("host", "compiled.json")
    document = json.loads(bytes(artifact.files[path]))
    edit(document)
    return build_artifact(artifact.manifest, {**artifact.files, path: json.dumps(document).encode()})


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_library_comes_back_as_it_was_saved(artifact: Artifact, tmp_path: Path) -> None:
    opened = Artifact.open(artifact.save(tmp_path / "net.exitify"))
    assert opened.targets == artifact.targets == {"host": record(artifact)}
    assert bytes(opened.files["targets/host/library.so"]) == LIBRARY
    assert opened.manifest == artifact.manifest


def test_derived_tensors_are_read_from_the_file_where_they_stand(artifact: Artifact, tmp_path: Path) -> None:
    opened = Artifact.open(artifact.save(tmp_path / "net.exitify"))
    tensors = opened.tensors(target_path("host", "weights.safetensors"))
    assert sorted(tensors) == sorted(f"{segment.name}.0" for segment in artifact.plan.segments)
    assert all(tensor.ctypes.data % 64 == 0 and not tensor.flags.owndata for tensor in tensors.values())


def test_a_library_leaves_the_identity_of_the_model_alone(plain: Artifact, artifact: Artifact) -> None:
    assert with_library(artifact, "board").manifest.model_id == artifact.manifest.model_id == plain.manifest.model_id


def test_profiles_and_libraries_survive_each_other(artifact: Artifact) -> None:
    more = artifact.with_profile("late", profile_for(artifact, {"exit2": 0.9}))
    more = with_library(more, "board", triple="aarch64-linux-gnu")
    more = reopened(more.with_profile("early", profile_for(artifact, {"exit1": 0.1})))
    assert list(more.profiles) == ["default", "late", "early"]
    assert list(more.targets) == ["host", "board"]
    assert [more.targets[name].triple for name in more.targets] == ["x86_64-linux-gnu", "aarch64-linux-gnu"]


def test_a_library_for_the_same_target_takes_the_place_of_the_old_one(artifact: Artifact) -> None:
    both = with_library(artifact, "board")
    changed = with_library(both, "host", library=LIBRARY + b"2", trials=7)
    assert list(changed.targets) == ["host", "board"]
    assert (changed.targets["host"].trials, changed.targets["board"].trials) == (7, 0)
    assert bytes(changed.files["targets/host/library.so"]) == LIBRARY + b"2"
    assert sorted(path for path in changed.files if path.startswith("targets/")) == sorted(p for p in both.files if p.startswith("targets/"))
    assert reopened(changed).targets == changed.targets
    assert (both.targets["host"].trials, bytes(both.files["targets/host/library.so"])) == (0, LIBRARY)


def test_some_segments_may_be_left_to_another_engine(plain: Artifact) -> None:
    compiled = record(plain)
    fewer = {name: segment for name, segment in compiled.segments.items() if name != "trunk_final"}
    kept = with_library(plain, segments=fewer, left_to="onnxruntime")
    assert list(reopened(kept).targets["host"].segments) == list(fewer)
    assert reopened(with_library(plain, segments={}, left_to="onnxruntime")).targets["host"].segments == {}


def test_sources_are_what_the_graphs_keep_outside_and_no_arguments(plain: Artifact) -> None:
    sources = source_hashes(plain, [segment.name for segment in plain.plan.segments])
    outside = {name for segment in plain.plan.segments for name in plain.graph(segment.name).external}
    assert set(sources) == outside < {*plain.tensors(WEIGHTS_FILE), *plain.tensors(HEADS_FILE)}
    assert not {name for point in plain.plan.exits for name in (point.weight, point.bias)} & outside
    assert set(source_hashes(plain, ["trunk_exit1"])) == set(plain.graph("trunk_exit1").external) < outside


def test_opening_an_artifact_with_a_library_loads_nothing(artifact: Artifact, tmp_path: Path) -> None:
    """Its library would end any process that hands it to the system's loader."""
    path = artifact.save(tmp_path / "net.exitify")
    code = f"""
import ctypes, sys
for name in ("tvm_ffi", "tvm", "onnxruntime"):
    sys.modules[name] = None
def fail(*_):
    raise SystemExit("loaded")
ctypes.CDLL.__init__ = fail
from exitify.artifact.artifact import Artifact
opened = Artifact.open({str(path)!r})
print(*opened.targets, len(opened.targets["host"].segments))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["host", str(len(artifact.plan.segments))]


@pytest.mark.parametrize(
    ("on_gpu", "precision", "name"),
    [(False, "fp32", "board"), (True, "fp32", "board.gpu"), (False, "fp16", "board.fp16"), (True, "fp16", "board.gpu.fp16")],
)
def test_libraries_of_one_board_stand_side_by_side_under_names_that_say_what_they_are(artifact: Artifact, on_gpu, precision, name) -> None:
    assert target_name("board", on_gpu=on_gpu, precision=precision) == name
    both = reopened(with_library(artifact, name, gpu=GPU if on_gpu else None, precision=precision))
    assert list(both.targets) == ["host", name]
    assert (both.targets[name].board, both.targets[name].gpu) == ("board", GPU if on_gpu else None)
    assert (target_path(name, "kernels.cubin") in both.files) == on_gpu


# --- what is refused ------------------------------------------------------------------------------------------------


def test_feature_maps_between_segments_may_be_in_blocks_and_nothing_else_may(plain: Artifact) -> None:
    plan = plain.plan
    between = sorted(plan.maps_between([segment.name for segment in plan.segments]))
    assert between
    kept = with_library(plain, in_blocks=tuple(between), block=8)
    assert (reopened(kept).targets["host"].in_blocks, reopened(kept).targets["host"].block) == (tuple(between), 8)
    others = [{"in_blocks": (name,), "block": 8} for name in plan.values if name not in between]
    assert {plan.input, plan.output} <= {other["in_blocks"][0] for other in others}
    for wrong in [*others, {"in_blocks": ("?",), "block": 8}, {"in_blocks": tuple(between), "block": 0}, {"block": 8}]:
        with refused(BLOCKS, match="keeps other values in blocks of channels than it can"):
            reopened(with_library(plain, **wrong))


@pytest.mark.parametrize("batches", [(1,), (4, 2), (2, 2), (0, 2)], ids=str)
def test_batches_are_above_one_and_ascend(plain: Artifact, batches: tuple[int, ...]) -> None:
    def with_batches(sizes: tuple[int, ...]) -> Artifact:
        return with_library(plain, segments={name: replace(made, batches=sizes) for name, made in record(plain).segments.items()})

    assert {made.batches for made in reopened(with_batches((2, 16))).targets["host"].segments.values()} == {(2, 16)}
    with refused("the batches of each segment are above 1 and ascend", match="for batches of"):
        reopened(with_batches(batches))


@pytest.mark.parametrize(
    ("calls", "trials", "history", "chosen"),
    [
        (0, 9, ((1, 2.0),), 2.0),
        (1, 0, ((1, 2.0),), 2.0),
        (1, 9, (), 2.0),
        (1, 9, ((0, 2.0),), 2.0),
        (1, 9, ((1, 2.0), (10, 1.0)), 1.0),
        (1, 9, ((1, 2.0), (1, 1.0)), 1.0),
        (1, 9, ((2, 2.0), (1, 1.0)), 1.0),
        (1, 9, ((1, 2.0), (5, 2.5)), 2.0),
        (1, 9, ((1, 2.0), (5, 0.0)), 2.0),
        (1, 9, ((1, 2.0), (5, -1.0)), -1.0),
        (1, 9, ((1, 2.0), (5, 1.0)), 0.5),
        (1, 9, ((1, 2.0), (5, 1.0)), 2.5),
        (1, 9, ((1, 1e9),), 1e9),
    ],
)
def test_a_search_that_cannot_have_gone_so_is_refused(plain: Artifact, calls: int, trials: int, history: Any, chosen: float) -> None:
    found = {"conv2d": TunedKernel(3, 9, ((1, 2.0), (5, 1.0)), 2.0), "dense": TunedKernel(1, 1, ((1, 2.0),), 2.0)}
    assert reopened(with_library(plain, kernels=found)).targets["host"].kernels == found
    with refused(TUNED, match="has the kernel 'conv2d' tuned as no search does it"):
        reopened(with_library(plain, kernels={**found, "conv2d": TunedKernel(calls, trials, history, chosen)}))


def test_a_map_that_another_engine_reads_is_in_rows(plain: Artifact) -> None:
    segments = [segment.name for segment in plain.plan.segments]
    between = plain.plan.maps_between(segments)
    fewer = {name: made for name, made in record(plain).segments.items() if name != "trunk_final"}
    read = set(plain.plan.segment("trunk_final").inputs) & between
    assert read
    with refused(BLOCKS, match="keeps other values in blocks"):
        reopened(with_library(plain, segments=fewer, left_to="onnxruntime", in_blocks=tuple(read), block=4))


@pytest.mark.parametrize("name", ["compiled.json", "library.so", "weights.safetensors"])
def test_a_target_without_one_of_its_files_is_refused(artifact: Artifact, name: str) -> None:
    files = {path: data for path, data in artifact.files.items() if path != f"targets/host/{name}"}
    with refused(FILES, match=f"the artifact lacks 'targets/host/{name}'"):
        reopened(build_artifact(artifact.manifest, files))


@pytest.mark.parametrize(
    "path", ["targets/host/evil.so", "targets/library.so", "targets/host/deep/library.so", "targets/host/library.so.1", "target/host/library.so"]
)
def test_another_file_among_the_targets_is_refused(artifact: Artifact, path: str) -> None:
    with refused(KNOWN, match=f"holds '{path}', which format 7 does not know"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, path: LIBRARY}))


def test_an_altered_library_is_refused(artifact: Artifact) -> None:
    for name in ("library.so", "compiled.json", "weights.safetensors"):
        path = target_path("host", name)
        data = bytearray(bytes(artifact.files[path]))
        data[len(data) // 2] ^= 1
        with pytest.raises(AlteredFile, match=f"'{path}' in the artifact was altered"):
            parse_artifact(packed({**files_of(artifact), path: bytes(data)}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(surprise=1), "has an unknown field 'surprise'"),
        (lambda d: d.pop("sources"), "lacks the field 'sources'"),
        (lambda d: d.update(features="avx2"), r"\.features is 'avx2', not an array"),
        (lambda d: d.update(trials=1.5), r"\.trials is 1\.5, not an integer"),
        (lambda d: d.update(left_to="torch"), r"\.left_to is 'torch', not one of , onnxruntime"),
        (lambda d: d["segments"]["trunk_exit1"].update(error="small"), r"\.segments\.trunk_exit1\.error is 'small', not a finite number"),
        (lambda d: d["segments"]["trunk_exit1"].pop("graph"), r"\.segments\.trunk_exit1 lacks the field 'graph'"),
        (lambda d: d["segments"]["trunk_exit1"].update(weights=[1]), r"\.segments\.trunk_exit1\.weights\[0\] is 1, not a string"),
        (lambda d: d.update(tolerance=None), r"\.tolerance is None, not a finite number"),
        (lambda d: d.update(precision="int8"), r"\.precision is 'int8', not one of fp32, fp16"),
        (lambda d: d.update(gpu={"architecture": "sm_87"}), r"\.gpu lacks the field 'ptx'"),
    ],
)
def test_a_record_with_other_fields_or_types_is_refused(artifact: Artifact, edit: Callable[[Any], object], message: str) -> None:
    clause = "compiled.json is JSON with the fields and types listed and no others"
    with refused(clause, match=rf"targets/host/compiled\.json{message}|targets/host/compiled\.json {message}"):
        reopened(with_document(artifact, edit))


def test_a_record_that_is_no_json_is_refused(artifact: Artifact) -> None:
    path = target_path("host", "compiled.json")
    with refused("compiled.json is JSON with the fields and types listed and no others", match=r"targets/host/compiled\.json is not JSON"):
        reopened(build_artifact(artifact.manifest, {**artifact.files, path: b"{"}))


def test_a_record_that_is_too_long_is_refused(artifact: Artifact) -> None:
    path = target_path("host", "compiled.json")
    padded = bytes(artifact.files[path]).ljust(LARGEST_RECORD)
    assert reopened(build_artifact(artifact.manifest, {**artifact.files, path: padded})).targets == artifact.targets
    with refused(
        "manifest.json, each profile, masks.json, times and each compiled.json have at most 16777216 bytes", match="compiled.json has 16777217 bytes"
    ):
        reopened(build_artifact(artifact.manifest, {**artifact.files, path: padded + b" "}))


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "a b", "ü", "n" * 65, "none"])
def test_a_target_name_that_cannot_be_a_folders_is_refused(plain: Artifact, name: str) -> None:
    with pytest.raises(ExitifyError, match="a target cannot be called"):
        with_library(plain, name)


@pytest.mark.parametrize("name", ["n" * 65, "none"])
def test_a_folder_with_a_name_that_no_target_can_have_is_refused(artifact: Artifact, name: str) -> None:
    moved = {path.replace("/host/", f"/{name}/"): data for path, data in artifact.files.items()}
    moved[target_path(name, "compiled.json")] = dumps(record(artifact, name))
    with refused(NAMED, match=f"a target cannot be called '{name}'"):
        reopened(build_artifact(artifact.manifest, moved))


def test_a_library_in_another_targets_folder_is_refused(artifact: Artifact) -> None:
    moved = {path.replace("/host/", "/board/"): data for path, data in artifact.files.items()}
    with refused(NAMED, match="the library for 'board' says that it is for 'host'"):
        reopened(build_artifact(artifact.manifest, moved))


@pytest.mark.parametrize("name", ["board", "board.fp16", "host.gpu"])
def test_a_name_that_says_something_else_than_the_record_is_refused(artifact: Artifact, name: str) -> None:
    with refused(NAMED, match="the library for .* says that it is for"):
        with_library(artifact, name, board="board", gpu=GPU)


@pytest.mark.parametrize("file", ["kernels.cubin", "kernels.ptx"])
def test_kernels_for_a_gpu_are_there_where_the_record_says_so_and_only_there(artifact: Artifact, file: str) -> None:
    on_gpu = with_library(artifact, ON_GPU, gpu=GPU)
    without = {path: data for path, data in on_gpu.files.items() if path != target_path(ON_GPU, file)}
    for files in (without, {**artifact.files, target_path("host", file): b"more"}):
        with refused(KERNELS, match="has kernels for a GPU and names none, or the other way round"):
            reopened(build_artifact(artifact.manifest, files))


@pytest.mark.parametrize(
    "change",
    [
        *({"architecture": name} for name in ("sm 87", "sm_", "sm_8", "sm_90a", "banana", "compute_87")),
        *({"ptx": version} for version in ("8.5; reboot", "8", "8.x")),
        *({"compiler": version} for version in ("", "12.x", "1234.5")),
    ],
)
def test_words_about_a_gpu_that_could_do_something_in_a_message_are_refused(plain: Artifact, change: dict[str, str]) -> None:
    with refused(OF_GPU, match="is for no GPU, PTX and CUDA that there can be"):
        with_library(plain, ON_GPU, gpu=replace(GPU, **change))


@pytest.mark.parametrize("mark", ["", "exitify kernels", "exitify kernels " + "g" * 64, "#include </etc/passwd>"])
def test_a_mark_of_another_form_is_refused(plain: Artifact, mark: str) -> None:
    with refused(OF_GPU, match="has the mark"):
        with_library(plain, ON_GPU, gpu=replace(GPU, mark=mark))


@pytest.mark.parametrize("field", ["triple", "cpu", "features", "tvm", "tvm_ffi"])
@pytest.mark.parametrize("word", ["", "0.27'; rm -rf ~; '", "\x1b[2J", "a b", "ü", "n" * 65])
def test_words_that_could_do_something_in_a_message_are_refused(plain: Artifact, field: str, word: str) -> None:
    with refused(WORDS, match="the library for 'host' names .* as a part of its machine or of TVM"):
        with_library(plain, **{field: ("avx2", word) if field == "features" else word})


def test_a_library_of_other_segments_is_refused(plain: Artifact) -> None:
    compiled = record(plain)
    fewer = {name: segment for name, segment in compiled.segments.items() if name != "trunk_final"}
    other = {**fewer, "trunk_exit9": compiled.segments["trunk_final"]}
    for segments, left_to in ((fewer, ""), (other, ""), (other, "onnxruntime"), ({**compiled.segments, **other}, "")):
        with refused(SEGMENTS, match="the library for 'host' was compiled for other segments"):
            with_library(plain, segments=segments, left_to=left_to)


def test_tensors_that_are_not_those_of_the_segments_are_refused(plain: Artifact) -> None:
    compiled = record(plain)
    tensors = {name: np.zeros(3, np.float32) for segment in compiled.segments.values() for name in segment.weights}
    first = next(iter(tensors))
    message = r"targets/host/weights\.safetensors does not hold the tensors that the library for 'host' takes"
    for wrong in ({name: tensor for name, tensor in tensors.items() if name != first}, {**tensors, "more": np.zeros(3)}, {}):
        with refused(WEIGHTS, match=message):
            plain.with_target(compiled, LIBRARY, write_tensors(wrong))
    twice = {name: replace(segment, weights=(first,)) for name, segment in compiled.segments.items()}
    with refused(WEIGHTS, match=message):
        plain.with_target(replace(compiled, segments=twice), LIBRARY, write_tensors({first: np.zeros(3, np.float32)}))


def test_derived_tensors_that_are_no_safetensors_are_refused(plain: Artifact) -> None:
    with refused("the header fits the file and has at most 67108864 bytes", match=r"targets/host/weights\.safetensors is no safetensors file"):
        plain.with_target(record(plain), LIBRARY, b"garbage")


def test_a_refused_library_leaves_the_artifact_as_it_was(artifact: Artifact) -> None:
    with pytest.raises(MalformedManifest):
        with_library(artifact, segments={})
    assert artifact.targets == {"host": record(artifact)}


# --- fuzz -----------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.sampled_from(list(Compiled.__dataclass_fields__)), st.booleans(), json_values)
def test_any_other_record_is_refused_or_read_as_it_stands(artifact: Artifact, field: str, inside: bool, anything: Any) -> None:
    changed = json.loads(dumps(artifact.targets["host"]))
    if inside and field == "segments":
        changed[field]["trunk_exit1"] = anything
    elif inside and field == "kernels":
        changed[field]["conv2d"] = anything
    elif inside and isinstance(changed[field], dict):
        changed[field]["more"] = anything
    else:
        changed[field] = anything
    try:
        opened = reopened(with_document(artifact, lambda document: document.update(changed)))
    except ArtifactError:
        return
    assert json.loads(dumps(opened.targets["host"])) == changed


# --- the specification ----------------------------------------------------------------------------------------------


def test_the_fields_of_a_record_are_in_the_specification(artifact: Artifact) -> None:
    text = (Path(container.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    section = text[text.index("## Targets") : text.index("## Trust")]
    document = json.loads(dumps(artifact.targets["host"]))
    for field in document:
        assert f"| `{field}` |" in section, field
    for field in document["segments"]["trunk_exit1"]:
        assert f"| `segments.<name>.{field}` |" in section, field
    for field in TunedKernel.__dataclass_fields__:
        assert f"| `kernels.<name>.{field}` |" in section, field
    for field in GpuKernels.__dataclass_fields__:
        assert f"| `gpu.{field}` |" in section, field
    for name in ("compiled.json", "library.so", "weights.safetensors", "kernels.cubin", "kernels.ptx"):
        assert name in text[: text.index("## Container")]
