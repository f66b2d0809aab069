"""Libraries for GPUs on TVM's own CUDA runtime, over a driver whose kernels the processor computes (`tests.fake_cuda`)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exitify.artifact.artifact import HEADS_FILE, Artifact, build_artifact, target_path
from exitify.artifact.tensors import write_tensors
from exitify.lower.nvrtc import cubin_architecture
from exitify.lower.pipeline import compile_artifact
from exitify.runtime.engines.elf import architecture_of
from exitify.runtime.session import Session
from exitify.targets import load_target
from tests.artifacts import exported, inputs, profile_for
from tests.compiled import thresholds
from tests.fake_cuda import FakeGpu
from tests.gpu import GPU, ORIN, on_gpu
from tests.skipping import MASKS, pictures

NETWORKS = ("identity", "shared", "depthwise", "transformer")

ANSWERS = """
import json, sys
import numpy as np
from exitify.runtime.session import Session

path, x, profile, mask = sys.argv[1:]
session = Session.load(path, engine="tvm", profile=profile)
for row in np.load(x):
    answer = session.run(row, mask or None)
    print(json.dumps([session.engine.compiled.target, answer.exit, answer.logits.tolist()]))
"""

RECORD = """
import sys
import numpy as np
from exitify.runtime.session import Session

path, x, out, *mask = sys.argv[1:]
session = Session.load(path, engine="tvm", profile="none")
np.savez(out, **session.record(np.load(x), *mask).logits)
"""

SEGMENTS = """
import json, os, sys
import numpy as np
from exitify.artifact.artifact import HEADS_FILE, Artifact
from exitify.plan import Stretch
from exitify.runtime.engines import make_engine

path, x = sys.argv[1:]
artifact = Artifact.open(path)
plan, engine = artifact.plan, make_engine("tvm", artifact, 1)
heads = artifact.tensors(HEADS_FILE)
values = {plan.input: np.load(x)[:1], **{p.temperature: np.float32(1.0).reshape(()) for p in plan.exits}, **heads}
log, found = os.environ["EXITIFY_FAKE_LAUNCHES"], {}
for segment in plan.segments:
    open(log, "w").close()
    stretch = Stretch((segment.name,), segment.inputs, segment.outputs, segment.parameters, "", segment.cost)
    values.update(engine.prepare(stretch)({name: values[name] for name in (*segment.inputs, *segment.parameters)}))
    found[segment.name] = [line.split()[0] for line in open(log)]
print(json.dumps(found))
"""


def saved(artifact: Artifact, x: np.ndarray, folder: Path) -> tuple[Path, Path]:
    np.save(folder / "x.npy", x)
    return artifact.save(folder / "net.exitify"), folder / "x.npy"


def answers(gpu: FakeGpu, artifact: Artifact, x: np.ndarray, folder: Path, *, profile: str = "none", mask: str = "", **seen: object) -> list[list]:
    """Target, exit and logits of each input, in a process that sees the GPU."""
    return [json.loads(line) for line in gpu.python(ANSWERS, *saved(artifact, x, folder), profile, mask, **seen).splitlines()]


def refusal(gpu: FakeGpu, artifact: Artifact, folder: Path, engine: str = "tvm", variables: dict[str, str] | None = None, **seen: object) -> str:
    """What is said when the library is asked for and does not run."""
    program = f"""
import os, sys
os.environ.update({variables or {}!r})
from exitify.errors import ExitifyError
from exitify.runtime.session import Session
try:
    Session.load(sys.argv[1], engine={engine!r}, profile="none")
except ExitifyError as error:
    print(error.problem, "|", error.hint)
"""
    return gpu.python(program, artifact.save(folder / "net.exitify"), **seen).strip()


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, gpu: FakeGpu) -> tuple[Artifact, Path]:
    """A network with a library for a GPU, and its kernels for the processor."""
    artifact, source = on_gpu(request.param)
    return artifact, gpu.kernels_of(source, request.param)


def test_every_exit_says_what_it_says_in_onnxruntime(network: tuple[Artifact, Path], gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, kernels = network
    x = inputs(4)
    gpu.python(RECORD, *saved(artifact, x, tmp_path), tmp_path / "said.npz", kernels=kernels)
    expected = Session(artifact, profile="none").record(x).logits
    with np.load(tmp_path / "said.npz") as said:
        assert sorted(said) == sorted(expected)
        for name, logits in expected.items():
            np.testing.assert_allclose(said[name], logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float16_every_exit_says_what_it_says_in_onnxruntime(name: str, gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, source = on_gpu(name, "fp16")
    assert artifact.targets[f"{GPU}.fp16"].gpu is not None
    x = inputs(4)
    gpu.python(RECORD, *saved(artifact, x, tmp_path), tmp_path / "said.npz", kernels=gpu.kernels_of(source, f"{name}-fp16"))
    expected = Session(artifact, profile="none").record(x).logits
    with np.load(tmp_path / "said.npz") as said:
        assert sorted(said) == sorted(expected)
        for logits_name, logits in expected.items():
            assert 0 < np.abs(said[logits_name] - logits).max() < 1e-2 * np.abs(logits).max()


def test_exits_are_taken_where_onnxruntime_takes_them(network: tuple[Artifact, Path], gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, kernels = network
    x = inputs(12)
    artifact = artifact.with_profile("early", profile_for(artifact, thresholds(artifact, x)))
    session = Session(artifact, profile="early")
    expected = [session.run(row) for row in x]
    found = answers(gpu, artifact, x, tmp_path, profile="early", kernels=kernels)
    assert [target for target, *_ in found] == [GPU] * len(x)
    assert [exit_ for _, exit_, _ in found] == [answer.exit for answer in expected]
    assert len({answer.exit for answer in expected}) > 1
    for (_, _, logits), answer in zip(found, expected):
        np.testing.assert_allclose(logits, answer.logits, rtol=1e-4, atol=1e-4 * np.abs(answer.logits).max())


@pytest.mark.parametrize("name", ["identity", "transformer"])
def test_an_early_exit_launches_the_kernels_of_the_segments_that_it_runs_and_no_other(name: str, gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, source = on_gpu(name)
    kernels, x = gpu.kernels_of(source, name), inputs(1)
    of_segment = json.loads(gpu.python(SEGMENTS, *saved(artifact, x, tmp_path), kernels=kernels))
    assert all(of_segment.values())
    seen = set()
    for k, exit_ in enumerate(artifact.plan.exit_names):
        # Sure at the k-th exit and never before; at the last one, nowhere.
        taken = {point.name: (0.0 if i == k else 1.5) for i, point in enumerate(artifact.plan.exits)}
        stopping = artifact.with_profile("stop", profile_for(artifact, taken))
        ((_, found, _),) = answers(gpu, stopping, x, tmp_path, profile="stop", kernels=kernels)
        assert found == exit_
        ran = [segment for stretch in artifact.plan.stretches(artifact.plan.exit_names)[: k + 1] for segment in stretch.segments]
        launched = gpu.launched()
        assert launched == [kernel for segment in ran for kernel in of_segment[segment]]
        seen.add(len(launched))
    assert len(seen) == len(artifact.plan.exit_names)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_switch_norms_on_the_gpu_too(mask: str, gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, source = on_gpu("skipping")
    x = pictures(2)
    gpu.python(RECORD, *saved(artifact, x, tmp_path), tmp_path / "said.npz", mask, kernels=gpu.kernels_of(source, "skipping"))
    expected = Session(artifact, profile="none").record(x, mask).logits
    with np.load(tmp_path / "said.npz") as said:
        for name, logits in expected.items():
            np.testing.assert_allclose(said[name], logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_a_head_that_was_trained_again_answers_anew_with_the_same_kernels(gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, source = on_gpu("identity")
    heads = {name: -tensor if tensor.dtype == np.float32 else tensor for name, tensor in artifact.tensors(HEADS_FILE).items()}
    arguments = {name for point in artifact.plan.exits for name in (point.weight, point.bias)}
    heads = {name: tensor if name in arguments else artifact.tensors(HEADS_FILE)[name] for name, tensor in heads.items()}
    changed = build_artifact(artifact.manifest, {**artifact.files, HEADS_FILE: write_tensors(heads)})
    x = inputs(2)
    gpu.python(RECORD, *saved(changed, x, tmp_path), tmp_path / "said.npz", kernels=gpu.kernels_of(source, "identity"))
    before, after = (Session(one, profile="none").record(x).logits for one in (artifact, changed))
    with np.load(tmp_path / "said.npz") as said:
        for point in artifact.plan.exits:
            assert np.abs(after[point.name] - before[point.name]).max() > 1e-2
            np.testing.assert_allclose(said[point.name], after[point.name], rtol=1e-4, atol=1e-4 * np.abs(after[point.name]).max())


# --- which kernels, and which GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["agx-orin-64gb", "orin-nano-4gb"])
def test_a_boards_library_is_for_its_processor_with_kernels_for_its_gpu(board: str, aarch64_linker: list[str]) -> None:
    assert aarch64_linker
    artifact = compile_artifact(exported("identity")[1], load_target(board), device="gpu")
    record = artifact.targets[f"{board}.gpu"]
    library, cubin, ptx = (bytes(artifact.files[target_path(record.target, name)]) for name in ("library.so", "kernels.cubin", "kernels.ptx"))
    assert architecture_of(library) == record.triple.split("-")[0] == "aarch64"
    assert record.gpu is not None
    assert cubin_architecture(cubin) == record.gpu.architecture == ORIN
    assert (record.gpu.ptx, record.gpu.compiler) == ("8.5", "12.6")
    assert b".target sm_87" in ptx
    assert record.gpu.mark.encode() in library
    assert b"__global__" not in library


def test_the_machine_code_is_the_orins_and_stands_beside_a_library_without_cuda_source() -> None:
    artifact, source = on_gpu("identity")
    cubin = bytes(artifact.files[target_path(GPU, "kernels.cubin")])
    ptx = bytes(artifact.files[target_path(GPU, "kernels.ptx")])
    library = bytes(artifact.files[target_path(GPU, "library.so")])
    record = artifact.targets[GPU].gpu
    assert cubin_architecture(cubin) == record.architecture == ORIN
    assert f".version {record.ptx}".encode() in ptx
    assert b".target sm_87" in ptx
    assert record.mark.encode() in library
    assert b"__global__" in source.encode()
    assert b"__global__" not in library


def test_a_newer_gpu_runs_the_ptx(gpu: FakeGpu, tmp_path: Path) -> None:
    """The fake driver refuses machine code of another architecture than its own, as a real one does."""
    artifact, source = on_gpu("identity")
    x = inputs(1)
    ((_, _, logits),) = answers(gpu, artifact, x, tmp_path, architecture="90", kernels=gpu.kernels_of(source, "identity"))
    np.testing.assert_allclose(logits, Session(artifact, profile="none").run(x[0]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"architecture": "86"}, r"is for GPUs from sm_87 on, and this one is sm_86 \(fake GPU\) \| compile again"),
        (
            {"architecture": "90", "cuda": "12020"},
            r"compiled by CUDA 12.6 \(PTX 8.5\), and the driver here is for CUDA 12.2 \| compile with an older",
        ),
        ({"cuda": "11080"}, r"and the driver here is for CUDA 11.8 \| compile with an older NVRTC"),
    ],
)
def test_a_gpu_or_a_driver_that_cannot_run_the_kernels_is_refused(gpu: FakeGpu, tmp_path: Path, seen: dict, said: str) -> None:
    artifact, _ = on_gpu("identity")
    found = refusal(gpu, artifact, tmp_path, **seen)
    assert re.search(said, found), found


def test_an_older_driver_of_the_same_major_version_loads_the_machine_code(gpu: FakeGpu, tmp_path: Path) -> None:
    assert refusal(gpu, on_gpu("identity")[0], tmp_path, cuda="12020") == ""


def test_without_a_driver_the_gpus_library_is_refused_with_the_reason(tmp_path: Path) -> None:
    from exitify.errors import LibraryRefused

    with pytest.raises(LibraryRefused, match=r"needs a GPU: there is no NVIDIA driver here|needs a GPU: the NVIDIA driver finds no GPU"):
        Session(on_gpu("identity")[0], engine="tvm", profile="none")


def test_a_runtime_that_cannot_be_loaded_is_said_in_the_loaders_words(gpu: FakeGpu, tmp_path: Path) -> None:
    found = refusal(gpu, on_gpu("identity")[0], tmp_path, variables={"EXITIFY_TVM_CUDA": "/nowhere/libtvm_runtime_cuda.so"})
    assert "TVM's CUDA runtime cannot be loaded: /nowhere/libtvm_runtime_cuda.so: cannot open shared object file" in found
    assert "exitify board sidecar" in found


def test_a_library_whose_kernels_are_others_is_refused(gpu: FakeGpu, tmp_path: Path) -> None:
    artifact, _ = on_gpu("identity")
    record = artifact.targets[GPU]
    other = replace(record, gpu=replace(record.gpu, mark="exitify kernels " + "0" * 64))
    parts = [bytes(artifact.files[target_path(GPU, name)]) for name in ("library.so", "weights.safetensors", "kernels.cubin", "kernels.ptx")]
    mixed = artifact.with_target(other, parts[0], parts[1], (parts[2], parts[3]))
    assert "kernels are not those of its artifact" in refusal(gpu, mixed, tmp_path)


def test_where_the_gpu_cannot_be_used_the_processors_library_is_and_says_so(gpu: FakeGpu, tmp_path: Path) -> None:
    from exitify.lower.pipeline import compile_artifact
    from exitify.targets import load_target

    both = compile_artifact(on_gpu("identity")[0], load_target("host"))
    program = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from exitify.runtime.session import Session
print(Session.load(sys.argv[1], engine="tvm", profile="none").engine.compiled.target)
"""
    path = both.save(tmp_path / "both.exitify")
    assert gpu.python(program, path).split() == [GPU]
    said = gpu.python(program, path, architecture="86")
    assert said.splitlines()[-1] == "host"
    assert "the GPU is not used: the library for 'cuda.gpu' is for GPUs from sm_87 on" in said
