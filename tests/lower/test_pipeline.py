"""An artifact compiled from end to end: the record, the same bytes each time, refusals before any work."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact, graph_path, target_path
from exitify.artifact.sources import source_hashes
from exitify.lower import pipeline
from exitify.lower.from_onnx import NotLowered
from exitify.lower.linking import NoLinker
from exitify.lower.pipeline import TOLERANCE, compile_artifact
from exitify.targets import TargetError, load_target
from tests.artifacts import exported
from tests.compiled import compiled
from tests.lower.kernels import HERE
from tests.lower.test_library import UNKNOWN, with_graph

FILES = tuple(target_path("host", name) for name in ("compiled.json", "library.so", "weights.safetensors"))


def bytes_of(artifact: Artifact) -> list[bytes]:
    return [bytes(artifact.files[path]) for path in FILES]


@pytest.mark.parametrize("network", ["identity", "depthwise"])
def test_compiling_twice_gives_the_same_bytes(network):
    again = compile_artifact(exported(network)[1], load_target("host"))
    for path, first, second in zip(FILES, bytes_of(compiled(network)), bytes_of(again)):
        assert first == second, path


AGAIN = """
import sys
from exitify.artifact.artifact import Artifact
from exitify.lower.pipeline import compile_artifact
from exitify.targets import load_target
compile_artifact(Artifact.open(sys.argv[1]), load_target("host")).save(sys.argv[2])
"""


def test_another_process_gives_the_same_bytes_and_says_nothing(tmp_path):
    path = exported("transformer")[1].save(tmp_path / "net.exitify")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", AGAIN, str(path), str(tmp_path / "compiled.exitify")]
    done = subprocess.run(command, env=environment, cwd=Path(pipeline.__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name, first, second in zip(FILES, bytes_of(compiled("transformer")), bytes_of(Artifact.open(tmp_path / "compiled.exitify"))):
        assert first == second, name


def test_the_record_says_what_was_compiled_and_from_what():
    artifact = compiled("identity")
    record = artifact.targets["host"]
    assert (record.triple, record.cpu, record.features) == (HERE.triple, HERE.cpu, HERE.features)
    assert (record.tvm, record.tvm_ffi) == tuple(importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi"))
    assert list(record.segments) == [segment.name for segment in artifact.plan.segments]
    assert (record.left_to, record.trials, record.tolerance) == ("", 0, TOLERANCE["fp32"])
    assert record.sources == source_hashes(artifact, record.segments)
    weights = artifact.tensors(FILES[2])
    named = [name for segment in record.segments.values() for name in segment.weights]
    assert sorted(named) == sorted(weights)
    assert len(set(named)) == len(named)
    for name, segment in record.segments.items():
        assert segment.graph == artifact.manifest.files[graph_path(name)].sha256
        assert 0 < segment.error < TOLERANCE["fp32"]


def test_compiling_adds_three_files_and_changes_none():
    before, after = exported("identity")[1], compiled("identity")
    assert set(after.files) - set(before.files) == set(FILES)
    assert all(bytes(after.files[path]) == bytes(data) for path, data in before.files.items())


def test_no_weight_stands_in_the_library():
    """It would be there twice, and in native code."""
    artifact = compiled("identity")
    library = bytes(artifact.files[FILES[1]])
    large = [array for array in artifact.tensors(FILES[2]).values() if array.nbytes >= 16 and len(np.unique(array)) > 2]
    assert large
    assert not any(np.ascontiguousarray(array).tobytes()[:64] in library for array in large)


def test_each_step_is_told_once_and_the_last_says_all_is_done():
    told = []
    compile_artifact(exported("plain")[1], load_target("host"), progress=lambda *step: told.append(step))
    assert told == [("lowering", 0, 4), ("compiling", 1, 4), ("linking", 2, 4), ("checking", 3, 4), ("checking", 4, 4)]


def test_a_segment_that_tvm_cannot_take_is_refused():
    artifact = exported("identity")[1]
    segment = artifact.plan.segments[2]
    changed = with_graph(artifact, segment, UNKNOWN)
    with pytest.raises(NotLowered, match=r"'trunk_exit2'.*Celu"):
        compile_artifact(changed, load_target("host"))


def test_what_cannot_be_compiled_for_is_refused_before_anything_is_lowered(monkeypatch):
    def lower(*_, **__):
        raise AssertionError("lowered")

    monkeypatch.setattr(pipeline, "lower_segments", lower)
    artifact = exported("plain")[1]
    monkeypatch.setenv("EXITIFY_AARCH64_LD", "nowhere")
    with pytest.raises(NoLinker, match="EXITIFY_AARCH64_LD"):
        compile_artifact(artifact, load_target("agx-orin-64gb"))
    monkeypatch.setattr(pipeline, "machine_of", lambda target: (_ for _ in ()).throw(TargetError("no schedules", "")))
    with pytest.raises(TargetError, match="no schedules"):
        compile_artifact(artifact, load_target("host"))
