"""TVM's CUDA runtime as it is built on a board: for CUDA 12.6, whose headers PyPI has, over `tests.fake_cuda` as that CUDA's driver and runtime.

PyPI has TVM's wheel and no source of it. `$EXITIFY_TVM_SOURCE` names the source release (archive or folder); without it small files that are
ours stand in for the two that the wheel lacks, and no network is run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exitify.board import sidecar
from exitify.board.sidecar import FILES, CannotBuild, build_sidecar
from exitify.errors import ExitifyError
from exitify.files import NotWritten
from exitify.runtime.engines import cuda
from exitify.runtime.session import Session
from tests.artifacts import inputs
from tests.fake_cuda import FOLDER, FakeGpu, made_or_skipped
from tests.fake_cuda import _run as run
from tests.gpu import GPU, on_gpu

SOURCE = os.environ.get("EXITIFY_TVM_SOURCE")

MODULE = """
#include <cuda.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include "../../../runtime/pack_args.h"
#include "../../../support/bytes_io.h"

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("ffi.Module.load_from_bytes.cuda", [] {
    return cuInit(0) == CUDA_SUCCESS ? static_cast<int>(CU_LAUNCH_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION) : -1;
  });
}
"""
DEVICE_API = """
#include <cuda_runtime.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("device_api.cuda", [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : -1;
  });
}
"""
UTILS = """
#pragma once
#include <cstdint>
#include <sstream>

namespace tvm::support {
inline uint64_t HashCombine(uint64_t key, uint64_t value) { return key * 31 + value; }
}
"""
STREAM = """
#pragma once
#include <cstddef>

namespace tvm::support {
template <typename T, typename = void>
struct Serializer {
  static void Write(void*, const T&) {}
  static bool Read(void*, T*) { return false; }
};

struct Stream {
  template <typename T>
  void Write(const T&) {}
  void Write(const void*, size_t) {}
  template <typename T>
  bool Read(T*) { return false; }
  size_t Read(void*, size_t) { return 0; }
  template <typename T>
  void WriteArray(const T*, size_t) {}
  template <typename T>
  bool ReadArray(T*, size_t) { return false; }
};
}
"""
STAND_INS = {
    FILES[0]: MODULE,
    FILES[1]: DEVICE_API,
    "src/support/utils.h": UTILS,
    "src/support/bytes_io.h": "",
    "include/tvm/support/io.h": STREAM,
    "include/tvm/support/serializer.h": "",
}
"""What the wheel lacks. The third file that is compiled is TVM's own."""
MORE_OF_CUDART = "int cudaGetDeviceProperties_v2(void *properties, int device) { return 1; }  /* its name in CUDA 12 */"

LOADED = """
import json, sys
import tvm_ffi
from exitify.runtime.engines.cuda import load_sidecar
from exitify.runtime.engines.tvm import load_runtime

path = load_sidecar(load_runtime())
called = [tvm_ffi.get_global_func(name)() for name in sys.argv[1:]]
print(json.dumps([str(path), called, [line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line]]))
"""

RECORD = """
import sys
import numpy as np
from exitify.runtime.session import Session

path, x, out = sys.argv[1:]
session = Session.load(path, engine="tvm", profile="none")
np.savez(out, **session.record(np.load(x)).logits)
print(session.engine.compiled.target, *(line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line or "tvm_runtime_cuda" in line))
"""


class OlderGpu(FakeGpu):
    """The fake GPU as JetPack 6 would have it: there is a libcudart.so.12, and no libcudart.so.13."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "libcudart.so.13").unlink()
        (folder / "more.c").write_text(MORE_OF_CUDART)
        (folder / "versions.map").write_text("libcudart.so.12 { global: *; };")
        options = f"-Wl,-soname,libcudart.so.12,--version-script,{folder / 'versions.map'}"
        run("gcc", "-shared", "-fPIC", "-O1", "-w", options, "-o", folder / "libcudart.so.12", FOLDER / "runtime.c", folder / "more.c")


@pytest.fixture(scope="module")
def older_gpu(tmp_path_factory: pytest.TempPathFactory) -> OlderGpu:
    return made_or_skipped(OlderGpu, tmp_path_factory.mktemp("older_gpu"))


@pytest.fixture
def sees_gpu(older_gpu: OlderGpu, monkeypatch: pytest.MonkeyPatch) -> OlderGpu:
    """The programs that the test starts see the GPU, and so does what they build."""
    for name, value in older_gpu.environment().items():
        monkeypatch.setenv(name, value)
    return older_gpu


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the user's, and none of the variables that choose."""
    for name in ("EXITIFY_TVM_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CUDA toolkit of 12.6, of NVIDIA's packages."""
    folder = tmp_path_factory.mktemp("cuda-12.6")
    places = [path for path in (Path(entry, "nvidia") for entry in sys.path) if (path / "cuda_runtime" / "include" / "cuda.h").is_file()]
    if not places:
        pytest.skip("CUDA's headers are missing: pip install 'exitify[cuda12]'")
    for part in ("include", "lib64"):
        (folder / part).mkdir()
    for package in ("cuda_runtime", "cuda_nvcc"):
        for header in (places[0] / package / "include").iterdir():
            if header.name not in ("__init__.py", "__pycache__"):
                (folder / "include" / header.name).symlink_to(header)
    (folder / "lib64" / "libcudart.so.12").symlink_to(places[0] / "cuda_runtime" / "lib" / "libcudart.so.12")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that looks like TVM's release: what the wheel has of it, and files of ours for the rest."""
    found = importlib.util.find_spec("tvm")
    assert found is not None
    assert found.submodule_search_locations is not None
    wheel, folder = Path(found.submodule_search_locations[0]), tmp_path / "apache-tvm"
    for part in ("include/tvm/runtime", "src/runtime"):
        shutil.copytree(wheel / part, folder / part)
    for file, text in STAND_INS.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def pack(folder: Path, archive: Path, *more: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(archive, "w:gz") as members:
        members.add(folder, "apache-tvm-src-v0.0.0")
        for member, content in more:
            members.addfile(member, io.BytesIO(content))
    return archive


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


# --- built and loaded


def test_what_is_built_from_an_archive_is_what_the_engine_loads(source: Path, toolkit: Path, sees_gpu: OlderGpu, home: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    made = build_sidecar(pack(source, source.parent / "release.tar.gz"), cuda=toolkit, progress=lambda *stage: stages.append(stage))
    assert made.path == cuda.own_sidecar()
    assert home in made.path.parents
    assert made.tvm in made.path.parent.name
    assert (made.cuda, made.cudart.name) == ("12.6", "libcudart.so.12")
    assert [path.name for path in made.path.parent.iterdir()] == [made.path.name]
    assert [text for text, _, _ in stages][1:4] == [f"compiling {Path(file).name}" for file in FILES]
    assert [done for _, done, _ in stages] == list(range(stages[-1][2] + 1))
    path, called, cudart = json.loads(sees_gpu.python(LOADED, "device_api.cuda", "ffi.Module.load_from_bytes.cuda"))
    assert path == str(made.path)
    assert called == [1, 11]
    assert set(cudart) == {str(sees_gpu.folder / "libcudart.so.12")}


@pytest.mark.skipif(not SOURCE, reason="PyPI has no source of TVM: set EXITIFY_TVM_SOURCE to its release, archive or folder")
def test_a_network_answers_on_what_is_built_from_tvms_release(toolkit: Path, sees_gpu: OlderGpu, tmp_path: Path) -> None:
    made = build_sidecar(Path(SOURCE or ""), cuda=toolkit)
    artifact, kernels = on_gpu("identity")
    x = inputs(4)
    np.save(tmp_path / "x.npy", x)
    arguments = (artifact.save(tmp_path / "net.exitify"), tmp_path / "x.npy", tmp_path / "said.npz")
    target, *libraries = sees_gpu.python(RECORD, *arguments, kernels=sees_gpu.kernels_of(kernels)).split()
    assert target == GPU
    assert set(libraries) == {str(made.path), str(sees_gpu.folder / "libcudart.so.12")}
    expected = Session(artifact, profile="none").record(x).logits
    with np.load(tmp_path / "said.npz") as said:
        assert sorted(said) == sorted(expected)
        for name, logits in expected.items():
            np.testing.assert_allclose(said[name], logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_one_that_cannot_be_loaded_is_not_put_in_place(source: Path, toolkit: Path, sees_gpu: OlderGpu, tmp_path: Path) -> None:
    for file in FILES:
        (source / file).write_text("")
    (source / FILES[1]).write_text(DEVICE_API.replace("cudaGetDeviceCount(&count)", "cudaDeviceSynchronize()"))  # which the fake one lacks
    target = tmp_path / "before.so"
    target.write_bytes(b"before")
    with pytest.raises(CannotBuild, match=r"was built and cannot be loaded: .*cudaDeviceSynchronize"):
        build_sidecar(source, cuda=toolkit, to=target)
    assert target.read_bytes() == b"before"


def test_one_that_registers_nothing_is_not_put_in_place(source: Path, toolkit: Path, sees_gpu: OlderGpu, home: Path) -> None:
    for file in FILES:
        (source / file).write_text("")
    with pytest.raises(CannotBuild, match=r"it does not register device_api\.cuda, ffi\.Module"):
        build_sidecar(source, cuda=toolkit)
    assert not home.exists()


def test_a_place_that_cannot_be_written_is_said(source: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sidecar, "_run", lambda command, problem: command[command.index("-o") + 1].touch())
    monkeypatch.setattr(sidecar, "_check", lambda *_: None)
    (tmp_path / "file").touch()
    with pytest.raises(CannotBuild, match=r"the folder .*file cannot be made") as caught:
        build_sidecar(source, cuda=toolkit, to=tmp_path / "file" / "built.so")
    assert "EXITIFY_TVM_CUDA" in caught.value.hint
    with pytest.raises(NotWritten, match="cannot write"):
        build_sidecar(source, cuda=toolkit, to=tmp_path)


# --- what is missing or wrong


def refusal(*arguments: object, **options: object) -> CannotBuild:
    with pytest.raises(CannotBuild) as caught:
        build_sidecar(*arguments, **options)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_without_a_source_the_hint_names_the_file_to_fetch() -> None:
    error = refusal()
    version = sidecar._installed().version
    assert f"PyPI does not have for apache-tvm {version}" in error.problem
    assert f"apache-tvm-src-v{version.partition('.post')[0]}.tar.gz" in error.hint
    assert "--source" in error.hint


def edit(text: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / text).write_text(change((folder / text).read_text())) and None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, r"there is no .*apache-tvm"),
        (lambda folder: shutil.rmtree(folder / "include"), r"is not TVM's source: it has no include/tvm/runtime/base\.h"),
        (
            edit("include/tvm/runtime/base.h", lambda text: text.replace('TVM_VERSION "0.27', 'TVM_VERSION "0.28')),
            r"is TVM 0\.28.*, and apache-tvm 0\.27",
        ),
        (edit("include/tvm/runtime/base.h", lambda text: text.replace("TVM_VERSION", "VERSION")), r"is TVM of an unknown version"),
        (edit("include/tvm/runtime/vm/vm.h", lambda text: text + "\n"), r"was built from: include/tvm/runtime/vm/vm\.h differs"),
        (edit("src/runtime/pack_args.h", lambda text: text + "\n"), r"was built from: src/runtime/pack_args\.h differs"),
        *((lambda folder, file=file: (folder / file).unlink(), f"lacks {file}") for file in FILES),
    ],
)
def test_a_source_of_another_version_or_without_a_file_is_refused(spoil: Callable[[Path], None], said: str, source: Path, toolkit: Path) -> None:
    spoil(source)
    error = refusal(source, cuda=toolkit)
    assert error.problem.startswith(("there is no ", str(source)))
    with pytest.raises(CannotBuild, match=said):
        raise error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (member("/tmp/include/out.h"), r"has a file '/tmp/include/out\.h', which leads out of it"),
        (member("top/src/../../../out.h"), r"which leads out of it"),
        (member("apache-tvm-src-v0.0.0/src/runtime/vm/vm.cc/more.h"), r"cannot be unpacked: .*(Exists|NotADirectory)"),
    ],
)
def test_an_archive_that_leads_elsewhere_is_refused(more: tuple[tarfile.TarInfo, bytes], said: str, source: Path, toolkit: Path) -> None:
    error = refusal(pack(source, source.parent / "release.tar.gz", more), cuda=toolkit)
    with pytest.raises(CannotBuild, match=said):
        raise error


def test_links_in_an_archive_are_not_made(source: Path, toolkit: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.cc"
    outside.write_text("secret")
    (source / FILES[0]).unlink()
    name = f"apache-tvm-src-v0.0.0/{FILES[0]}"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = member(name, type=kind, linkname=str(outside))
        assert f"lacks {FILES[0]}" in refusal(pack(source, tmp_path / "release.tar.gz", link), cuda=toolkit).problem


def test_what_is_no_archive_or_half_of_one_or_too_large_is_refused(
    source: Path, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "release.tar.gz"
    archive.write_bytes(b"no archive")
    assert "cannot be unpacked: ReadError" in refusal(archive, cuda=toolkit).problem
    whole = pack(source, archive).read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert "cannot be unpacked: " in refusal(archive, cuda=toolkit).problem
    archive.write_bytes(whole)
    monkeypatch.setattr(sidecar, "_UNPACKED_LIMIT", 1 << 20)
    (source / "src" / "large.h").write_bytes(bytes(1 << 20))
    assert "holds more than 1 MiB" in refusal(pack(source, archive), cuda=toolkit).problem


def test_without_cuda_the_hint_says_how_to_get_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "TOOLKITS", tmp_path / "nowhere")
    error = refusal(source)
    assert error.problem == f"there is no CUDA toolkit in {tmp_path / 'nowhere'}"
    assert "cuda-toolkit-12-6" in error.hint
    assert f"{tmp_path} has no headers of CUDA" in refusal(source, cuda=tmp_path).problem


def test_headers_without_their_runtime_are_not_enough(source: Path, toolkit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "include").symlink_to(toolkit / "include")
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart.so.13").touch()
    assert "has headers of CUDA 12.6 and no lib64/libcudart.so.12" in refusal(source, cuda=folder).problem


def test_the_toolkit_is_the_one_that_is_named_or_the_first_that_is_whole(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "TOOLKITS", tmp_path)
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda-12.6").symlink_to(toolkit)
    assert sidecar._toolkit(None).include == tmp_path / "cuda-12.6" / "include"
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    with pytest.raises(CannotBuild, match="cuda has no headers"):
        sidecar._toolkit(None)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert sidecar._toolkit(None).include == toolkit / "include"
    with pytest.raises(CannotBuild, match="nowhere has no headers"):
        sidecar._toolkit(Path("nowhere"))


def test_without_a_compiler_the_hint_says_how_to_get_one(source: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no C++ compiler here (g++)" in refusal(source, cuda=toolkit).problem
    monkeypatch.setenv("CXX", "ccache clang++")
    assert "there is no C++ compiler here (ccache)" in refusal(source, cuda=toolkit).problem


def test_what_the_compiler_says_first_is_shown(source: Path, toolkit: Path) -> None:
    (source / FILES[0]).write_text("#warning look\nint f() {\n  return nothing;\n}\n#error later\n")
    error = refusal(source, cuda=toolkit)
    assert "cuda_module.cc does not compile: " in error.problem
    assert "cuda_module.cc:5:2: error: #error later" in error.problem or "cuda_module.cc:3:10: error: " in error.problem
    assert "g++ 11" in error.hint


# --- which one is loaded


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is loaded, without loading it."""
    paths: list[Path] = []
    monkeypatch.setattr(cuda, "_load", lambda path: paths.append(path) or path)
    return paths


def test_the_one_that_was_built_is_loaded_before_the_wheels_and_the_one_that_is_named_before_both(
    loads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, own = tmp_path / "wheel", cuda.own_sidecar()
    assert cuda.load_sidecar(wheel) == wheel / cuda.SIDECAR
    own.parent.mkdir(parents=True)
    own.touch()
    assert cuda.load_sidecar(wheel) == own
    monkeypatch.setenv("EXITIFY_TVM_CUDA", str(tmp_path / "named.so"))
    assert cuda.load_sidecar(wheel) == tmp_path / "named.so" == cuda.own_sidecar()
    assert loads == [wheel / cuda.SIDECAR, own, tmp_path / "named.so"]


def test_one_that_was_built_for_another_tvm_is_not_loaded(loads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = cuda.importlib.metadata.version
    for package in ("apache-tvm", "apache-tvm-ffi"):
        with monkeypatch.context() as patch:
            patch.setattr(cuda.importlib.metadata, "version", lambda name, other=package: "0.1" if name == other else version(name))
            older = cuda.own_sidecar()
        older.parent.mkdir(parents=True)
        older.touch()
    assert cuda.load_sidecar(tmp_path) == tmp_path / cuda.SIDECAR


def test_where_nothing_is_set_it_stands_in_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cuda.own_sidecar().is_relative_to("/home/somebody/.local/share/exitify")
    monkeypatch.setenv("EXITIFY_TVM_CUDA", "~/built.so")
    assert cuda.own_sidecar() == Path("/home/somebody/built.so")


def test_without_tvm_there_is_no_place_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise cuda.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cuda.importlib.metadata, "version", missing)
    with pytest.raises(ExitifyError, match="TVM's runtime is not installed"):
        cuda.own_sidecar()
    assert "TVM's runtime is not installed" in refusal().problem


@pytest.mark.parametrize(
    ("version", "hint"),
    [("12060", r"^the driver is for CUDA 12: build .*`exitify board sidecar`"), ("13020", r"^install CUDA 13's runtime")],
)
def test_what_helps_when_the_wheels_cannot_be_loaded_depends_on_the_driver(version: str, hint: str, older_gpu: OlderGpu, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from exitify.errors import EngineError
from exitify.runtime.engines.cuda import load_sidecar
try:
    load_sidecar(Path(sys.argv[1]))
except EngineError as error:
    print(error.hint, error.problem, sep="\\n")
"""
    said = older_gpu.python(program, tmp_path, cuda=version)
    assert f"TVM's CUDA runtime cannot be loaded: {tmp_path}/libtvm_runtime_cuda.so: cannot open" in said
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(said)


def test_one_that_was_built_and_cannot_be_loaded_is_to_be_built_again_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = cuda.own_sidecar()
    own.parent.mkdir(parents=True)
    own.write_bytes(b"no library")
    with pytest.raises(cuda.NoGpu, match=r"cannot be loaded: .*(too short|invalid ELF)") as caught:
        cuda.load_sidecar(tmp_path)
    assert caught.value.hint == f"build it again: `exitify board sidecar`, or do without it: rm {own}"
    monkeypatch.setenv("EXITIFY_TVM_CUDA", str(own))
    with pytest.raises(cuda.NoGpu) as caught:
        cuda.load_sidecar(tmp_path)
    assert caught.value.hint.endswith("unset EXITIFY_TVM_CUDA")
