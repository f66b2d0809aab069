"""Each contender computes the network, on as many threads as were asked for."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exitify.artifact.artifact import Artifact
from exitify.benchmark import rounds
from exitify.benchmark.contenders import Contender, InOnnxRuntime, InOpenVino, InTorch, Loaded, OneGraph, WithExits, library_versions, one_graph
from exitify.benchmark.rounds import Race, Stored, run_round
from exitify.errors import EngineError, ExitifyError, ModelError
from exitify.onnx_export.static import export_static
from tests import digits


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.trained_artifact().save(tmp_path_factory.mktemp("contenders") / "net.exitify")


@pytest.fixture(scope="module")
def whole(stored: Path) -> Path:
    path = stored.with_name("whole.onnx")
    onnx.save(export_static(digits.trained_artifact()), path)
    return path


def contender(name: str, stored: Path, whole: Path) -> Contender:
    if name == "openvino":
        pytest.importorskip("openvino", reason="pip install 'exitify[openvino]'")
    return {
        "onnxruntime": OneGraph("onnxruntime", "baseline", stored, "onnxruntime"),
        "torch": InTorch("torch", "against", digits.network(), 10, is_compiled=False),
        "inductor": InTorch("inductor", "against", digits.network(), 10, is_compiled=True),
        "openvino": InOpenVino("openvino", "against", whole),
        "an ONNX file": InOnnxRuntime("whole.onnx", "smaller", whole, (1, 1, 16, 16), "float32", 10),
        "exitify": WithExits("exitify", "artifact", stored, "auto", None),
    }[name]


ALL = ("onnxruntime", "torch", "openvino", "an ONNX file", "exitify", pytest.param("inductor", marks=pytest.mark.slow))


@pytest.mark.parametrize("name", ALL)
def test_a_contender_says_what_torch_says(stored: Path, whole: Path, name: str) -> None:
    loaded = contender(name, stored, whole).load(1)
    x = digits.samples_of("test").inputs(slice(20))
    with torch.no_grad():
        expected = digits.network()(torch.from_numpy(x)).numpy()
    try:
        said = np.stack([np.array(loaded.logits(loaded.run(x[i : i + 1]))).reshape(-1) for i in range(len(x))])
    finally:
        loaded.close()
    np.testing.assert_allclose(said, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "openvino", "an ONNX file", "exitify"])
def test_a_contender_can_go_to_another_process(stored: Path, whole: Path, name: str) -> None:
    there = pickle.loads(pickle.dumps(contender(name, stored, whole))).load(1)
    here = contender(name, stored, whole).load(1)
    x = digits.samples_of("test").inputs(slice(1))
    np.testing.assert_array_equal(there.logits(there.run(x)), here.logits(here.run(x)))


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_is_given_its_threads(whole: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **named)
            seen.append(self.get_session_options())

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    InOnnxRuntime("whole.onnx", "smaller", whole, (1, 1, 16, 16), "float32", 10).load(threads)
    assert [(options.intra_op_num_threads, options.inter_op_num_threads) for options in seen] == [(threads, 1)]


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_on_as_many_threads(threads: int) -> None:
    before = torch.get_num_threads()
    loaded = InTorch("torch", "against", digits.network(), 10, is_compiled=False).load(threads)
    assert torch.get_num_threads() == threads
    loaded.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_runs_one_stream_on_as_many_threads_in_full_precision(whole: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install 'exitify[openvino]'")
    made = []

    class Core(openvino.Core):
        def compile_model(self, *given: object) -> object:
            made.append(super().compile_model(*given))
            return made[-1]

    monkeypatch.setattr(openvino, "Core", Core)
    affinity = os.sched_getaffinity(0)
    InOpenVino("openvino", "against", whole).load(threads)
    (model,) = made
    assert model.get_property("INFERENCE_NUM_THREADS") == threads
    assert model.get_property("NUM_STREAMS") == 1
    assert model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert os.sched_getaffinity(0) == affinity


def test_openvino_on_fewer_threads_than_asked_for_is_refused(whole: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'exitify[openvino]'")
    with pytest.raises(EngineError, match=r"OpenVINO runs on \d+ threads where 4096 were asked for"):
        InOpenVino("openvino", "against", whole).load(4096)


def test_a_network_that_openvino_cannot_read_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'exitify[openvino]'")
    (tmp_path / "none.onnx").write_bytes(b"no network")
    with pytest.raises(EngineError, match="OpenVINO refuses the network"):
        InOpenVino("openvino", "against", tmp_path / "none.onnx").load(1)


def test_openvino_is_a_missing_package_where_it_is_not_installed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match="openvino"):
        InOpenVino("openvino", "against", whole).load(1)


def test_the_module_that_is_given_is_left_as_it_is() -> None:
    network = type(digits.network())().train()
    InTorch("torch", "against", network, 10, is_compiled=False).load(1).close()
    assert network.training


def test_a_module_without_class_scores_is_refused() -> None:
    loaded = InTorch("torch", "against", _Pair(torch.nn.Flatten()), 10, is_compiled=False).load(1)
    with pytest.raises(ModelError, match="no 10 class scores"):
        loaded.run(np.zeros((1, 1, 16, 16), np.float32))


class _Pair(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.network(x), 1


def test_one_graph_of_an_artifact_answers_without_a_file() -> None:
    answer = one_graph(digits.trained_artifact(), 1)
    x = digits.samples_of("test").inputs(slice(1))
    with torch.no_grad():
        np.testing.assert_allclose(answer(x), digits.network()(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-4)


def test_versions_are_of_the_packages_behind_the_engines() -> None:
    import onnxruntime

    found = library_versions(["onnxruntime", "onnxruntime", "torch", "inductor", "tvm:host"])
    assert list(found) == ["onnxruntime", "torch", "apache-tvm"]
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["torch"] == torch.__version__


# --- what is refused before anything is timed


class Given(OneGraph):
    """The network in ONNX Runtime, which says that it computes in another precision, or adds to what it gives."""

    precision, added = "fp32", 0.0

    def load(self, threads: int) -> Loaded:
        loaded = super().load(threads)
        return Loaded(loaded.engine, lambda x: loaded.run(x) + type(self).added, precision=type(self).precision)


class InHalf(Given):
    precision = "fp16"


class Off(Given):
    added = 1.0


class Missing(Given):
    added = float("nan")


def race(stored: Path, tmp_path: Path, other: type[Given]) -> Race:
    samples = digits.samples_of("test")
    np.save(tmp_path / "x.npy", samples.pixels(slice(10)))
    answer = one_graph(Artifact.open(stored), 1)
    expected = np.stack([answer(x[None])[0].copy() for x in samples.inputs(slice(10))])
    contenders = (OneGraph("onnxruntime", "baseline", stored, "auto"), other("other", "against", stored, "auto"))
    return Race(contenders, 1, Stored(tmp_path / "x.npy", samples.contract, samples.are_pictures), samples.labels[:10], expected)


def test_the_same_network_is_timed(stored: Path, tmp_path: Path) -> None:
    told: list[int] = []
    found = run_round(race(stored, tmp_path, Given), (0, 0), told.append)
    assert found.times.shape == (2, 10)
    assert (found.times > 0).all()
    assert found.right[0] == found.right[1]
    assert told == [0, 10]


@pytest.mark.parametrize("other", [Off, Missing])
def test_other_logits_are_refused(stored: Path, tmp_path: Path, other: type[Given]) -> None:
    with pytest.raises(ModelError, match=r"other is not the artifact's network: on 10 samples its logits differ by (0\.|nan)"):
        run_round(race(stored, tmp_path, other), (0, 0), lambda done: None)


def test_another_precision_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ExitifyError, match="the artifact's library computes in fp32, and other in fp16") as caught:
        run_round(race(stored, tmp_path, InHalf), (0, 0), lambda done: None)
    assert caught.value.hint == "compile it with --precision fp16, or leave other out of --against"


def test_a_difference_is_relative_to_the_largest_logit() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.5]])
    assert rounds.difference(expected + np.array([[0, 0], [0.2, 0]]), expected) == pytest.approx(0.05)
    assert rounds.difference(expected[:1], expected) == float("inf")


def test_every_contender_comes_at_every_place_of_the_order(stored: Path, tmp_path: Path) -> None:
    """Or the one behind a large network would always find cold caches."""
    calls: list[str] = []

    def noted(name: str) -> Loaded:
        return Loaded("onnxruntime", lambda x: calls.append(name) or np.zeros((1, 10)))  # type: ignore[func-returns-value]

    found = race(stored, tmp_path, Given)
    rounds._time(found, [noted("a"), noted("b"), noted("c")], np.random.default_rng(0), lambda done: None)
    timed = calls[3 * len(found.labels) :]  # what comes before is warm-up
    firsts = timed[::6]
    assert set(firsts) == {"a", "b", "c"}
    assert timed[::2] == timed[1::2]  # twice in a row
    assert all(sorted(timed[i : i + 6]) == ["a", "a", "b", "b", "c", "c"] for i in range(0, len(timed), 6))
