"""What `exitify doctor` finds: on every board as it should be, on boards where something is wrong, and on machines that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitify.artifact.artifact import Artifact
from exitify.board import doctor
from exitify.board.doctor import Finding, examine
from exitify.errors import EngineError
from exitify.runtime.engines.cuda import Gpu, NoGpu
from tests.board import sysfs
from tests.cli.console import exitify
from tests.compiled import compiled, with_record


@pytest.fixture
def orin_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that finds the Orin's GPU, and a CUDA runtime that loads."""
    monkeypatch.setattr(doctor, "gpu_at_hand", lambda: Gpu("Orin", "sm_87", "12.6"))
    monkeypatch.setattr(doctor, "load_sidecar", lambda folder: folder / "libtvm_runtime_cuda.so")


def found(root: Path, artifact: Artifact | None = None) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examine(artifact, root)}


@pytest.mark.parametrize("jetpack", ["6", "7.2"])
@pytest.mark.parametrize("target", sysfs.MODELS)
def test_nothing_is_wrong_with_a_board_as_it_should_be(target: str, jetpack: str, tmp_path: Path, orin_gpu: None) -> None:
    findings = found(sysfs.board(tmp_path, target, jetpack=jetpack))
    assert [finding for finding in findings.values() if finding.state != "right"] == []
    assert f"target {target}" in findings["board"].text
    assert findings["JetPack"].text.startswith(f"JetPack {jetpack}, ")
    assert findings["power mode"].text == f"{sysfs.MODELS[target][2]}, clocks fixed"
    assert findings["GPU"].text == "Orin, sm_87, driver for CUDA 12.6"


def test_rails_are_shown_with_what_flows(tmp_path: Path) -> None:
    assert found(sysfs.board(tmp_path, "orin-nano-8gb", milliamps=1210))["power"].text == "VDD_IN 6.05 W"
    agx = found(sysfs.board(tmp_path / "agx", "agx-orin-64gb"))["power"].text
    assert agx == "VDD_GPU_SOC 5.00 W + VDD_CPU_CV 5.00 W + VIN_SYS_5V0 5.00 W + VDDQ_VDD2_1V8AO 5.00 W"


def test_on_another_machine_nothing_of_a_board_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> Gpu:
        raise NoGpu("there is no NVIDIA driver here (libcuda.so.1)", "")

    monkeypatch.setattr(doctor, "gpu_at_hand", no_gpu)
    findings = found(tmp_path)
    assert [finding for finding in findings.values() if finding.state == "wrong"] == []
    assert (findings["board"].state, findings["GPU"].state, findings["power"].state) == ("absent", "absent", "absent")
    assert findings["board"].text.startswith("no Jetson: ")


def test_a_gpu_that_the_driver_does_not_find_is_wrong_on_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> Gpu:
        raise NoGpu("the NVIDIA driver finds no GPU: cuInit says 999", "look at `nvidia-smi`")

    monkeypatch.setattr(doctor, "gpu_at_hand", no_gpu)
    assert found(sysfs.board(tmp_path))["GPU"] == Finding("GPU", "wrong", "the NVIDIA driver finds no GPU: cuInit says 999", "look at `nvidia-smi`")


def test_a_gpu_of_another_kind_than_the_boards_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpu_at_hand", lambda: Gpu("Thor", "sm_110", "13.2"))
    assert found(sysfs.board(tmp_path))["GPU"].text == "Thor, sm_110, driver for CUDA 13.2: the board's is sm_87"


def test_why_the_cuda_runtime_does_not_load_is_said_in_the_loaders_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orin_gpu: None) -> None:
    def refuse(folder: Path) -> Path:
        raise NoGpu("TVM's CUDA runtime cannot be loaded: libcudart.so.13: cannot open shared object file", "build it: `exitify board sidecar`")

    monkeypatch.setattr(doctor, "load_sidecar", refuse)
    finding = found(sysfs.board(tmp_path))["TVM's CUDA runtime"]
    assert (finding.state, finding.hint) == ("wrong", "build it: `exitify board sidecar`")
    assert "libcudart.so.13: cannot open shared object file" in finding.text


def test_an_unknown_release_module_and_mode_are_wrong_each_with_what_helps(tmp_path: Path, orin_gpu: None) -> None:
    sysfs.board(tmp_path)
    sysfs.write(tmp_path, "proc/device-tree/compatible", "nvidia,p9999-0001\0nvidia,tegra264\0")
    sysfs.write(tmp_path, "etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1")
    sysfs.write(tmp_path, "var/lib/nvpmodel/status", "")
    findings = found(tmp_path)
    wrong = {topic: finding for topic, finding in findings.items() if finding.state == "wrong"}
    assert list(wrong) == ["board", "JetPack", "power mode", "power"]
    assert wrong["board"].text.endswith("(p9999-0001) is none that exitify knows")
    assert wrong["JetPack"].text == "Jetson Linux 35.4.1 belongs to none that exitify knows"
    assert all(finding.hint for finding in wrong.values())


def test_clocks_that_follow_the_load_are_said_with_what_fixes_them(tmp_path: Path) -> None:
    finding = found(sysfs.board(tmp_path, fixed=False))["power mode"]
    assert (finding.state, finding.text, finding.hint) == ("right", "25W, clocks follow the load", "for figures that repeat: `sudo jetson_clocks`")


def test_a_tvm_that_does_not_load_is_wrong_and_one_that_is_not_there_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"apache-tvm": "0.27.0", "apache-tvm-ffi": ""}
    monkeypatch.setattr(doctor, "_version", versions.__getitem__)
    finding = found(tmp_path)["TVM"]
    assert (finding.state, finding.text) == ("wrong", "apache-tvm 0.27.0, apache-tvm-ffi not installed")
    versions["apache-tvm"] = ""
    assert found(tmp_path)["TVM"].state == "absent"


@pytest.mark.parametrize(
    "error", [OSError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found"), ImportError("tvm_ffi was built for another Python")]
)
def test_a_runtime_that_does_not_load_is_what_it_says_and_no_end_of_it(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exitify.runtime.engines.tvm as engine

    def refuse(*_: object) -> Path:
        raise error

    monkeypatch.setattr(engine, "load_runtime", refuse)
    monkeypatch.setattr(engine, "check_library", refuse)
    findings = found(tmp_path, compiled("identity"))
    for topic in ("TVM", "TVM's CUDA runtime", "library host"):
        assert findings[topic].state == "wrong"
        assert str(error) in findings[topic].text


def test_of_each_library_it_is_said_whether_it_runs_here(tmp_path: Path) -> None:
    artifact = compiled("identity")
    assert found(tmp_path, artifact)["library host"] == Finding("library host", "right", "runs here")
    foreign = found(tmp_path, with_record(artifact, triple="riscv64-linux-gnu"))["library host"]
    assert (foreign.state, foreign.text.split(",")[0]) == ("absent", "the library for 'host' is for riscv64")
    lacking = found(tmp_path, with_record(artifact, features=("telepathy",)))["library host"]
    assert (lacking.state, lacking.text) == ("wrong", "the library for 'host' needs a processor with telepathy")


def test_the_command_ends_with_1_where_something_is_wrong_and_names_it(tmp_path: Path) -> None:
    artifact = with_record(compiled("identity"), features=("telepathy",))
    artifact.save(tmp_path / "net.exitify")
    (tmp_path / "root").mkdir()
    done = exitify("doctor", "net.exitify", "--root", "root", folder=tmp_path)
    assert done.code == 1
    assert "wrong: library host" in done.err
    assert "Traceback" not in done.err
    compiled("identity").save(tmp_path / "net.exitify")
    done = exitify("doctor", "net.exitify", "--root", "root", "--json", folder=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert {"topic": "library host", "state": "right", "text": "runs here", "hint": ""} in json.loads(done.out)


def test_a_library_of_a_broken_engine_does_not_end_the_examination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import exitify.runtime.engines.tvm as engine

    def refuse(artifact: object, made: object) -> None:
        raise EngineError("something else", "do that")

    monkeypatch.setattr(engine, "check_library", refuse)
    assert found(tmp_path, compiled("identity"))["library host"] == Finding("library host", "wrong", "something else", "do that")
