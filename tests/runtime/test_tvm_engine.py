"""The engine over compiled libraries: answers as ONNX Runtime's, refusals before anything is loaded, many threads, no compiler."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import exitify
from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, build_artifact, graph_path, parse_artifact
from exitify.artifact.tensors import write_tensors
from exitify.benchmark import bench
from exitify.data import load_samples
from exitify.errors import EngineError, LibraryRefused
from exitify.lower import library as lowering
from exitify.lower.from_onnx import NotLowered, not_lowered, segment_module
from exitify.lower.pipeline import compile_artifact
from exitify.plan import FINAL, Segment
from exitify.runtime import engines
from exitify.runtime.answers import Answer
from exitify.runtime.engines import onnxruntime as onnxruntime_engine
from exitify.runtime.engines import tvm as tvm_engine
from exitify.runtime.engines.base import Array
from exitify.runtime.engines.elf import architecture_of
from exitify.runtime.session import Session
from exitify.targets import load_target, processor
from tests.artifact.packing import files_of, packed
from tests.artifacts import EXITS, exported, inputs, profile_for
from tests.compiled import DERIVED, HOST, LIBRARY, compiled, thresholds, with_library, with_record

SHARE = 1e-4
"""Of an array's largest magnitude: how far two engines' values may lie apart, which sum in another order."""

LEFT = "trunk_exit2"
"""The segment that `partly` leaves to ONNX Runtime, between two that TVM runs."""


def assert_alike(found: Array, expected: Array) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.abs(found - expected).max() <= SHARE * np.abs(expected).max()


def same(answers: list[Answer], others: list[Answer]) -> None:
    """To the bit."""
    assert len(answers) == len(others)
    for one, other in zip(answers, others):
        assert (one.label, one.exit, one.macs, one.logits.tobytes()) == (other.label, other.exit, other.macs, other.logits.tobytes())


def alike(answers: list[Answer], others: list[Answer]) -> None:
    """The same decisions, and logits within `SHARE`."""
    assert [(a.label, a.exit, a.macs, a.temperature) for a in answers] == [(a.label, a.exit, a.macs, a.temperature) for a in others]
    for one, other in zip(answers, others):
        assert_alike(one.logits, other.logits)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_every_exit_says_what_it_says_on_onnx_runtime(name: str) -> None:
    artifact = compiled(name)
    found, expected = (Session(artifact, engine=engine).record(inputs(4)) for engine in ("tvm", "onnxruntime"))
    assert list(found.logits) == list(expected.logits) == [point.name for point in artifact.plan.exits] + [FINAL]
    for exit_name in expected.logits:
        assert_alike(found.logits[exit_name], expected.logits[exit_name])
    for exit_name in expected.features:
        assert_alike(found.features[exit_name], expected.features[exit_name])


@pytest.mark.parametrize("name", [name for name in EXITS if name != "plain"])
def test_it_stops_where_onnx_runtime_stops_alone_and_in_a_batch(name: str) -> None:
    artifact, x = compiled(name), inputs(24)
    profile = profile_for(artifact, thresholds(artifact, x), final_temperature=2.0)
    artifact = artifact.with_profile("default", profile)
    ours, theirs = (Session(artifact, engine=engine) for engine in ("tvm", "onnxruntime"))
    expected = [theirs.run(row) for row in x]
    assert {answer.exit for answer in expected} >= {"exit1", FINAL}
    alike([ours.run(row) for row in x], expected)
    alike(ours.run_batch(x), expected)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_scores_are_those_of_onnx_runtime_at_the_temperature(temperature: float) -> None:
    artifact = compiled("identity")
    given = {artifact.plan.input: inputs(6), **artifact.tensors(HEADS_FILE)}
    given |= {point.temperature: np.array(temperature, np.float32) for point in artifact.plan.exits}
    for point in artifact.plan.exits:
        stretch = artifact.plan.stretches((point.name,))[0]
        reads = {key: given[key] for key in (*stretch.inputs, *stretch.parameters)}
        found, expected = (engines.make_engine(engine, artifact, 1).prepare(stretch)(reads) for engine in ("tvm", "onnxruntime"))
        assert list(found) == list(expected) == list(stretch.outputs)
        np.testing.assert_allclose(found[point.scores], expected[point.scores], rtol=1e-4, atol=2e-6)


def test_one_run_after_another_leaves_nothing_behind() -> None:
    """Buffers are used again: an answer must not depend on what was asked before it, and keeps its logits afterwards."""
    artifact, x = compiled("identity"), inputs(6)
    session = Session(artifact, engine="tvm")
    forward = [session.run(row) for row in x]
    backward = [session.run(row) for row in x[::-1]]
    same(forward, backward[::-1])
    assert len({answer.logits.tobytes() for answer in forward}) == len(x)


def test_profiles_can_be_switched_between_calls() -> None:
    artifact = compiled("identity")
    artifact = artifact.with_profile("early", profile_for(artifact, {"exit1": 0.0}))
    artifact = artifact.with_profile("middle", profile_for(artifact, {"exit2": 0.0}))
    session = Session(artifact, engine="tvm")
    taken = []
    for profile in (None, "early", "middle", None):
        session.use(profile)
        taken.append(session.run(inputs(1)).exit)
    assert taken == [FINAL, "exit1", "exit2", FINAL]


def test_a_benchmark_times_the_library_against_the_whole_network_in_it(tmp_path: Path) -> None:
    artifact, x = compiled("identity"), inputs(20)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(20) % 5)
    samples = load_samples(str(tmp_path / "data.npz"), artifact.manifest.input, classes=5)
    report = bench(artifact, samples, against=("tvm", "onnxruntime"), engine="tvm:host", threads=2, rounds=1, memory=False)
    assert [timing.name for timing in report.timings] == ["tvm", "tvm again", "onnxruntime", "exitify"]
    assert len({timing.accuracy for timing in report.timings}) == 1
    assert report.exits[FINAL] == 1


# --- heads are arguments --------------------------------------------------------------------------------------------


def test_another_classifier_and_temperature_need_no_new_library() -> None:
    artifact, x = compiled("in_place"), inputs(12)
    point = artifact.plan.exit("exit1")
    heads = artifact.tensors(HEADS_FILE)
    moved = {**heads, point.weight: heads[point.weight][::-1] * 2, point.bias: heads[point.bias] + np.arange(5, dtype=np.float32)}
    changed = build_artifact(artifact.manifest, {**artifact.files, HEADS_FILE: write_tensors(moved)})
    limits = {"exit1": thresholds(changed, x, 3.0)["exit1"]}
    changed = changed.with_profile("default", profile_for(changed, limits, temperatures={"exit1": 3.0}))
    assert changed.files[LIBRARY] == artifact.files[LIBRARY]
    ours, theirs = (Session(changed, engine=engine) for engine in ("tvm", "onnxruntime"))
    expected = [theirs.run(row) for row in x]
    assert {answer.exit for answer in expected} == {"exit1", FINAL}
    alike([ours.run(row) for row in x], expected)
    before = Session(artifact, engine="tvm").record(x).logits["exit1"]
    after = ours.record(x).logits["exit1"]
    bias = heads[point.bias]
    np.testing.assert_allclose(after, (before - bias)[:, ::-1] * 2 + bias + np.arange(5), rtol=1e-4, atol=1e-4)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reaches the system's loader fails the test."""

    def load(_: bytes) -> None:
        pytest.fail("the library was loaded")

    monkeypatch.setattr(tvm_engine, "_load", load)


def refusal(artifact: Artifact, engine: str = "tvm") -> tuple[str, str]:
    with pytest.raises(LibraryRefused) as caught:
        Session(artifact, engine=engine)
    return caught.value.problem, caught.value.hint


def other(weights: bool, name: str) -> Artifact:
    """The compiled `identity` with one tensor changed."""
    artifact, path = compiled("identity"), WEIGHTS_FILE if weights else HEADS_FILE
    tensors = {**artifact.tensors(path)}
    tensors[name] = tensors[name] + np.float32(1)
    return build_artifact(artifact.manifest, {**artifact.files, path: write_tensors(tensors)})


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_artifact_without_a_library_is_refused() -> None:
    _, artifact = exported("identity")
    assert refusal(artifact) == ("the artifact has no compiled library", "exitify compile --target host makes one, or use the engine onnxruntime")
    problem, hint = refusal(artifact, "tvm:orin")
    assert (problem, hint) == ("the artifact has no library for 'orin'", "it has none; exitify compile --target orin makes one")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    problem, hint = refusal(compiled("identity"), "tvm:orin")
    assert (problem, hint) == ("the artifact has no library for 'orin'", "it has host; exitify compile --target orin makes one")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_library_for_another_architecture_is_refused() -> None:
    artifact = with_record(compiled("identity"), triple="riscv64-linux-gnu")
    for engine in ("tvm", "tvm:host"):
        assert refusal(artifact, engine) == (
            f"the library for 'host' is for riscv64, and this machine is {processor.architecture()}",
            "compile for this machine: --target host",
        )


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_library_for_a_processor_that_does_more_is_refused() -> None:
    had = compiled("identity").targets[HOST].features
    artifact = with_record(compiled("identity"), features=("telepathy", *had, "levitation"))
    problem, hint = refusal(artifact)
    assert problem == "the library for 'host' needs a processor with levitation, telepathy"
    assert hint == "compile on this machine: --target host"


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(("package", "field"), [("apache-tvm", "tvm"), ("apache-tvm-ffi", "tvm_ffi")])
def test_a_library_for_another_version_is_refused(package: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, version = compiled("identity"), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99" if name == package else version(name))
    wanted = getattr(artifact.targets[HOST], field)
    assert refusal(artifact) == (
        f"the library for 'host' was compiled with {package} {wanted}, and 0.99 is installed",
        f"pip install '{package}=={wanted}', or compile again: exitify compile",
    )


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_library_of_another_graph_is_refused() -> None:
    artifact = compiled("identity")
    path = graph_path("trunk_final")
    model = onnx.load_model_from_string(bytes(artifact.files[path]))
    model.graph.name += "_2"
    changed = build_artifact(artifact.manifest, {**artifact.files, path: model.SerializeToString()})
    assert refusal(changed) == (
        "the library for 'host' is stale: it was compiled from another graph of 'trunk_final'",
        "compile again: exitify compile",
    )


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("weights", [True, False], ids=["network", "head's body"])
def test_a_library_of_other_weights_is_refused_by_their_name(weights: bool) -> None:
    artifact = compiled("identity")
    sources = artifact.targets[HOST].sources
    kept = artifact.tensors(WEIGHTS_FILE if weights else HEADS_FILE)
    name = next(name for name in sources if name in kept and kept[name].dtype == np.float32)
    assert refusal(other(weights, name)) == (
        f"the library for 'host' is stale: it was compiled from another {name!r}",
        "compile again: exitify compile",
    )


@pytest.mark.usefixtures("nothing_is_loaded")
def test_several_other_weights_are_counted() -> None:
    sources = compiled("identity").targets[HOST].sources
    first, *rest = sorted(sources)
    made_up = {**{name: sources[name] for name in rest[2:]}, "zz": "0" * 64}
    problem, _ = refusal(with_record(compiled("identity"), sources=made_up))
    assert problem == f"the library for 'host' is stale: it was compiled from another {first!r} and 3 others"


def test_without_a_name_the_first_library_that_fits_is_taken() -> None:
    artifact = compiled("identity")
    library, derived = bytes(artifact.files[LIBRARY]), bytes(artifact.files[DERIVED])
    foreign = exported("identity")[1].with_target(
        replace(artifact.targets[HOST], target="board", board="board", triple="riscv64-linux-gnu"), library, derived
    )
    both = foreign.with_target(artifact.targets[HOST], library, derived)
    assert list(both.targets) == ["board", HOST]
    session = Session(both, engine="tvm")
    assert isinstance(session.engine, tvm_engine.TvmEngine)
    assert session.engine.compiled.target == HOST
    problem, _ = refusal(with_record(both, triple="sparc64-linux-gnu"))
    assert problem.startswith("the library for 'board' is for riscv64")


def test_it_needs_tvms_runtime_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = compiled("identity")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tvm_ffi", None)  # type: ignore[arg-type]
        patch.delitem(sys.modules, "exitify.runtime.engines.tvm")
        patch.delattr(engines, "tvm")
        with pytest.raises(EngineError, match=r"the engine 'tvm' needs tvm_ffi, which is not installed\n  hint: pip install 'exitify\[tvm\]'"):
            Session(artifact, engine="tvm")
    tvm_engine.load_runtime.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"the engine 'tvm' needs apache-tvm, which is not installed\n  hint: pip install 'exitify\[tvm\]'"):
        Session(artifact, engine="tvm")


# --- broken libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_library_that_is_cut_off_is_refused_and_ends_no_process(share: float) -> None:
    """The system's loader answers some of these with SIGBUS."""
    library = bytes(compiled("identity").files[LIBRARY])
    problem, hint = refusal(with_library(compiled("identity"), library[: int(len(library) * share)]))
    assert problem.startswith(f"the library is not whole: it has {int(len(library) * share)} bytes")
    assert hint == "compile again: exitify compile"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda library: b"\x7fELF" + os.urandom(1000), "the library is not whole: it is no 64-bit shared object"),
        (lambda library: b"MZ" + library[2:], "the library is not whole: it is no 64-bit shared object"),
        (lambda library: library[:16] + b"\x02\x00" + library[18:], "the library is not whole: it is no 64-bit shared object"),
        (lambda library: library[:18] + b"\xf3\x00" + library[20:], "the library is for ELF machine 243, whatever its record says"),
        (lambda library: library.replace(b"__tvm_ffi__library_bin", b"__tvm_ffi__library_bun"), "the library cannot be loaded: "),
    ],
    ids=["noise", "a Windows library", "a program", "another machine's", "not TVM's"],
)
def test_what_is_no_library_of_ours_is_refused(edit: Callable[[bytes], bytes], problem: str) -> None:
    library = bytes(compiled("identity").files[LIBRARY])
    assert edit(library) != library
    found, hint = refusal(with_library(compiled("identity"), edit(library)))
    assert found.startswith(problem)
    assert "\n" not in found
    assert hint


def test_a_library_without_a_segments_function_is_refused() -> None:
    record = compiled("identity").targets[HOST]
    fewer = with_library(compiled("identity"), bytes(compiled("plain").files[LIBRARY]))
    assert "head_exit1" in record.segments
    with pytest.raises(LibraryRefused, match=r"the library for 'host' has no function 'trunk_exit1'\n  hint: compile again: exitify compile"):
        Session(fewer.with_profile("default", profile_for(fewer, {"exit1": 0.5})), engine="tvm")


@pytest.mark.parametrize("change", [lambda tensor: tensor.repeat(2, axis=0), lambda tensor: tensor.astype(np.float64)], ids=["shape", "dtype"])
def test_derived_weights_of_another_shape_or_dtype_are_an_error_and_no_crash(change: Callable[[Array], Array]) -> None:
    artifact = compiled("identity")
    tensors = artifact.tensors(DERIVED)
    name = artifact.targets[HOST].segments["trunk_exit1"].weights[0]
    tensors[name] = change(tensors[name])
    session = Session(artifact.with_target(artifact.targets[HOST], bytes(artifact.files[LIBRARY]), write_tensors(tensors)), engine="tvm")
    for call in (session.run, session.run_batch, session.record):
        with pytest.raises(EngineError, match=r"^TVM failed in trunk_exit1.*: .*(mismatch|dtype)"):
            call(inputs(1))


def test_a_folder_for_temporary_files_that_forbids_programs_is_named_in_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,noexec", "tmpfs", tmp_path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.strip()}")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        problem, hint = refusal(compiled("identity"))
        assert problem.startswith("the library cannot be loaded: ")
        assert hint == "if the folder for temporary files forbids programs, set TMPDIR to one that does not"
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_loaded_library_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = tvm_engine.tvm_ffi.load_module

    def spy(path: Path, **options: Any) -> Any:
        seen.append(path)
        return load(path, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tvm_engine.tvm_ffi, "load_module", spy)
    Session(compiled("plain"), engine="tvm").run(inputs(1))
    assert [path.is_relative_to(tmp_path) for path in seen] == [True]
    assert os.listdir(tmp_path) == []


# --- auto loads none ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_loaded")
def test_no_other_engine_loads_a_library() -> None:
    for engine in ("auto", "onnxruntime", "onnxruntime:cpu", "reference"):
        session = Session(compiled("plain"), engine=engine)
        assert not isinstance(session.engine, tvm_engine.TvmEngine)
        assert session.run(inputs(1)).exit == FINAL


def test_a_process_that_asks_for_auto_has_no_tvm_in_it(tmp_path: Path) -> None:
    path = compiled("in_place").save(tmp_path / "net.exitify")
    code = f"""
import sys
import numpy as np
from exitify import Session
session = Session.load({str(path)!r})
session.run(np.zeros((3, 16, 16), np.float32))
print(session.engine.name, "tvm_ffi" in sys.modules, "exitify.runtime.engines.tvm" in sys.modules, "libtvm" in open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["onnxruntime", "False", "False", "False"]


# --- memory ---------------------------------------------------------------------------------------------------------


def address(tensor: Any) -> int:
    return int(np.from_dlpack(tensor).ctypes.data)


def test_weights_are_read_where_the_artifact_is_mapped(tmp_path: Path) -> None:
    path = compiled("identity").save(tmp_path / "net.exitify")
    opened = Artifact.open(path)
    engine = engines.make_engine("tvm", opened, 1)
    assert isinstance(engine, tvm_engine.TvmEngine)
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    start, end = (int(number, 16) for number in line.split()[0].split("-"))
    tensors = opened.tensors(DERIVED)
    assert {name: address(tensor) for name, tensor in engine._weights.items()} == {name: array.ctypes.data for name, array in tensors.items()}
    assert all(start <= array.ctypes.data < end for array in tensors.values())
    heads = opened.tensors(HEADS_FILE)
    bound = engine.bind([], {name: np.ascontiguousarray(array) for name, array in heads.items()})
    assert isinstance(bound, tvm_engine._Binding)
    assert all(address(bound.values[name]) == array.ctypes.data for name, array in heads.items())


def test_weights_at_an_address_that_compiled_code_does_not_accept_are_copied() -> None:
    whole = packed(files_of(compiled("identity")))
    buffer = np.zeros(len(whole) + 128, np.uint8)
    start = -buffer.ctypes.data % 64 + 4
    buffer[start : start + len(whole)] = np.frombuffer(whole, np.uint8)
    artifact = parse_artifact(memoryview(buffer)[start : start + len(whole)].toreadonly())
    tensors = artifact.tensors(DERIVED)
    assert {array.ctypes.data % 64 for array in tensors.values()} == {4}
    session = Session(artifact, engine="tvm")
    assert isinstance(session.engine, tvm_engine.TvmEngine)
    for name, tensor in session.engine._weights.items():
        assert address(tensor) % 64 == 0
        np.testing.assert_array_equal(np.from_dlpack(tensor), tensors[name])
    same([session.run(inputs(1))], [Session(compiled("identity"), engine="tvm").run(inputs(1))])


@pytest.mark.parametrize("given", [0, 4, 64])
@pytest.mark.parametrize("writeable", [True, False])
def test_a_tensor_is_the_array_itself_only_where_its_address_allows_it(given: int, writeable: bool) -> None:
    buffer = tvm_engine.aligned((64,), "float32").view(np.uint8)
    array = buffer[given : given + 48].view(np.float32).reshape(3, 4)
    array[:] = np.arange(12).reshape(3, 4)
    array.flags.writeable = writeable
    tensor = tvm_engine._tensor(array)
    assert (address(tensor) == array.ctypes.data) == (given % 64 == 0)
    assert address(tensor) % 64 == 0
    np.testing.assert_array_equal(np.from_dlpack(tensor), array)


def test_arrays_that_are_not_contiguous_are_copied_in_the_order_of_their_rows() -> None:
    turned = tvm_engine.aligned((4, 3), "float32")
    turned[:] = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(np.from_dlpack(tvm_engine._tensor(turned.T)), turned.T)
    assert np.from_dlpack(tvm_engine._tensor(turned.T)).flags.c_contiguous
    assert np.from_dlpack(tvm_engine._tensor(np.array(2.5, np.float32))).shape == ()


def test_a_tensor_holds_the_array_that_it_points_into_and_no_longer() -> None:
    """Weights are mapped from a file, which must stay mapped."""
    array = tvm_engine.aligned((16, 16), "float32")
    array.flags.writeable = False
    held = weakref.ref(array)
    tensor = tvm_engine._tensor(array)
    assert address(tensor) == array.ctypes.data
    del array
    gc.collect()
    assert held() is not None
    del tensor
    gc.collect()
    assert held() is None


# --- threads --------------------------------------------------------------------------------------------------------


def test_eight_threads_answer_as_one_does_to_the_bit() -> None:
    """TVM's virtual machine holds the registers of one call: without one a thread this crashed the process."""
    artifact, x = compiled("identity"), inputs(40)
    artifact = artifact.with_profile("default", profile_for(artifact, thresholds(artifact, x)))
    session = Session(artifact, engine="tvm")
    alone = [session.run(row) for row in x]
    assert len({answer.exit for answer in alone}) > 1
    with ThreadPool(8) as pool:
        same(pool.map(session.run, list(x) * 20, chunksize=1), alone * 20)
        recorded = pool.map(lambda _: session.record(x[:4]).logits[FINAL].tobytes(), range(16), chunksize=1)
    assert set(recorded) == {session.record(x[:4]).logits[FINAL].tobytes()}


def test_sessions_with_other_numbers_of_threads_give_the_same_bits_side_by_side() -> None:
    artifact, x = compiled("identity"), inputs(20)
    sessions = [Session(artifact, engine="tvm", threads=count) for count in (1, 2, 3)]
    expected = [sessions[0].run(row) for row in x]
    for session in (*sessions, *reversed(sessions)):
        same([session.run(row) for row in x], expected)
    with ThreadPool(4) as pool:
        answers = pool.map(lambda i: sessions[i % 3].run(x[i // 3]), range(60), chunksize=1)
    same(answers, [answer for answer in expected for _ in range(3)])


def worked(before: dict[str, int]) -> int:
    """Nanoseconds that other threads than this one have computed since."""
    here = str(threading.get_native_id())
    return sum(spent - before.get(thread, 0) for thread, spent in spent_by_threads().items() if thread != here)


def spent_by_threads() -> dict[str, int]:
    found = {}
    for thread in os.listdir("/proc/self/task"):
        try:
            found[thread] = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])
        except FileNotFoundError:  # it has ended
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells here what each thread has computed")
def test_a_session_shares_its_work_with_as_many_threads_as_it_was_given_whatever_others_do() -> None:
    """Also the second one in a thread: TVM makes workers once, at a thread's first call."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(32, 5)).eval(), np.ones((1, 3, 32, 32), np.float32)
    program = exitify.transform(model, torch.from_numpy(x), exits="none")
    artifact = compile_artifact(exitify.export(program, heads_trained=False), load_target("host"))
    one, two = (Session(artifact, engine="tvm", threads=count) for count in (1, 2))
    spent: list[tuple[str, int]] = []

    def runs(session: Session) -> int:
        session.run(x)
        time.sleep(0.05)  # workers that wait have fallen asleep
        before = spent_by_threads()
        for _ in range(200):
            session.run(x)
        return worked(before)

    def work() -> None:
        spent.append(("one", runs(one)))
        spent.append(("two", runs(two)))
        spent.append(("one again", runs(one)))
        spent.append(("two again", runs(two)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    found = dict(spent)
    assert min(found["two"], found["two again"]) > 10 * max(found["one"], found["one again"], 10_000)


FORKED = """
import os, signal, sys
import numpy as np
from exitify import Session
session = Session.load(sys.argv[1], engine="tvm", threads=2)
x = np.ones((3, 16, 16), np.float32)
expected = session.run(x).logits.tobytes()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(7 if session.run(x).logits.tobytes() == expected else 8)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), session.run(x).logits.tobytes() == expected)
"""


def test_a_forked_process_answers_though_the_workers_are_not_in_it(tmp_path: Path) -> None:
    """As servers do that load a network and then fork. Waiting for workers that are not there would never end."""
    path = compiled("identity").save(tmp_path / "net.exitify")
    done = subprocess.run([sys.executable, "-c", FORKED, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["7", "True"]), done.stderr


# --- segments left to ONNX Runtime ----------------------------------------------------------------------------------


def taken_but_one(artifact: Artifact, segment: Segment) -> Any:
    """What lowering calls for a segment, for which TVM takes all but `LEFT`."""
    if segment.name == LEFT:
        raise not_lowered(segment, "it dislikes it")
    return segment_module(artifact, segment)


@pytest.fixture(scope="module")
def partly() -> Artifact:
    """The network `identity`, one segment of which is left to ONNX Runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "segment_module", taken_but_one)
        artifact = compile_artifact(exported("identity")[1], load_target(HOST), fallback="onnxruntime")
    return artifact.with_profile("default", profile_for(artifact, thresholds(artifact, inputs(24))))


def test_a_segment_that_tvm_cannot_take_is_refused_where_nothing_else_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "segment_module", taken_but_one)
    with pytest.raises(
        NotLowered, match=f"TVM cannot take the segment '{LEFT}': it dislikes it\n  hint: leave such segments .*--fallback onnxruntime"
    ):
        compile_artifact(exported("identity")[1], load_target(HOST))


def test_a_segment_left_to_onnx_runtime_runs_there_and_no_other(partly: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = onnxruntime_engine.OnnxRuntimeEngine.prepare

    def spy(self: Any, stretch: Any) -> Any:
        prepared.append(stretch.segments)
        return prepare(self, stretch)

    assert partly.targets[HOST].left_to == "onnxruntime"
    assert set(partly.targets[HOST].segments) == {segment.name for segment in partly.plan.segments} - {LEFT}
    x = inputs(24)
    expected = [Session(partly, engine="onnxruntime").run(row) for row in x]
    monkeypatch.setattr(onnxruntime_engine.OnnxRuntimeEngine, "prepare", spy)
    session = Session(partly, engine="tvm")
    alike([session.run(row) for row in x], expected)
    alike(session.run_batch(x), expected)
    assert set(prepared) == {(LEFT,)}


def test_a_segment_left_to_onnx_runtime_answers_many_threads_the_same(partly: Artifact) -> None:
    x = inputs(24)
    session = Session(partly, engine="tvm")
    alone = [session.run(row) for row in x]
    with ThreadPool(4) as pool:
        same(pool.map(session.run, list(x) * 5, chunksize=1), alone * 5)


def test_its_weights_may_change_as_they_are_in_no_library(partly: Artifact) -> None:
    name = next(iter(set(partly.graph(LEFT).external) - set(partly.targets[HOST].sources)))
    tensors = {**partly.tensors(WEIGHTS_FILE)}
    tensors[name] = tensors[name] * np.float32(0.5)
    changed = build_artifact(partly.manifest, {**partly.files, WEIGHTS_FILE: write_tensors(tensors)})
    found, expected = (Session(changed, engine=engine, profile="none").record(inputs(2)) for engine in ("tvm", "onnxruntime"))
    assert_alike(found.logits[FINAL], expected.logits[FINAL])


def test_without_onnx_runtime_a_library_that_needs_it_is_refused_with_how_to_install_it(partly: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled("in_place")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "exitify.runtime.engines.onnxruntime")
    monkeypatch.delattr(engines, "onnxruntime")
    with pytest.raises(EngineError, match=r"the engine 'tvm' needs onnxruntime, which is not installed\n  hint: pip install 'exitify\[ort\]'"):
        Session(partly, engine="tvm")
    assert Session(whole, engine="tvm").run(inputs(1)).exit == FINAL


# --- a device -------------------------------------------------------------------------------------------------------

DEVICE = """
import importlib.machinery, sys
for name in ("torch", "onnx", "onnxscript", "onnxruntime", "networkx"):
    sys.modules[name] = None

class NoCompiler:
    "tvm can be found, as its runtime's library is in its folder, and not imported."
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "tvm" else None
        if spec is not None:
            spec.loader = self
        return spec
    def create_module(self, spec):
        raise AssertionError("tvm was imported")
    def exec_module(self, module):
        raise AssertionError("tvm was imported")

sys.meta_path.insert(0, NoCompiler())
import numpy as np
from exitify import Session
session = Session.load(sys.argv[1], engine="tvm")
x = np.load(sys.argv[2])
for answer in [*map(session.run, x), *session.run_batch(x)]:
    print(answer.label, answer.exit, answer.logits.astype(float).tolist())
maps = open("/proc/self/maps").read()
print(*sorted({line.rpartition("/")[2] for line in maps.splitlines() if "libtvm" in line}))
print("tvm" in sys.modules)
"""


def test_a_device_runs_a_library_without_torch_onnx_onnx_runtime_and_tvms_compiler(tmp_path: Path) -> None:
    artifact, x = compiled("identity"), inputs(6)
    artifact = artifact.with_profile("default", profile_for(artifact, thresholds(artifact, inputs(24))))
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", DEVICE, str(artifact.save(tmp_path / "net.exitify")), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *answers, libraries, is_imported = done.stdout.splitlines()
    session = Session(artifact, engine="tvm")
    expected = [*map(session.run, x), *session.run_batch(x)]
    assert answers == [f"{answer.label} {answer.exit} {answer.logits.astype(float).tolist()}" for answer in expected]
    assert "libtvm_runtime.so" in libraries.split()
    assert "libtvm_compiler.so" not in libraries.split()
    assert is_imported == "False"


# --- shared objects -------------------------------------------------------------------------------------------------


def test_a_shared_object_is_known_by_its_architecture_and_by_its_last_byte() -> None:
    library = bytes(compiled("plain").files[LIBRARY])
    assert architecture_of(library) == processor.architecture()
    assert architecture_of(library[:18] + (183).to_bytes(2, "little") + library[20:]) == "aarch64"
    for length in (0, 63, 64, len(library) // 2, len(library) - 1):
        with pytest.raises(ValueError, match=f"it has {length} bytes"):
            architecture_of(library[:length])
