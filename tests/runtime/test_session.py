"""The runtime: it stops where the profile says, saves what it says, and answers the same alone, in a batch and from any thread."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exitify.artifact.artifact import HEADS_FILE, Artifact, build_artifact, graph_path
from exitify.artifact.manifest import Preprocess
from exitify.artifact.tensors import write_tensors
from exitify.errors import DataError, EngineError, UnknownProfile
from exitify.pictures import prepare_pictures
from exitify.plan import FINAL
from exitify.runtime import engines
from exitify.runtime.answers import Answer
from exitify.runtime.engines import onnxruntime as onnxruntime_engine
from exitify.runtime.engines.base import Bound, Engine
from exitify.runtime.session import Session
from tests.artifacts import EXITS, exported, inputs, profile_for, with_contract
from tests.compiled import thresholds as thresholds_for

RTOL, ATOL = 1e-4, 1e-5
"""ONNX Runtime picks other kernels for other batch sizes, and folds norms where a cut does not stand in the way."""

NAMES = ["identity", "transformer"]
"""Convolutions, with two values across a cut; attention, with the input needed late."""


def session_with(artifact: Artifact, thresholds: dict[str, float], **profile: object) -> Session:
    return Session(artifact.with_profile("default", profile_for(artifact, thresholds, **profile)))  # type: ignore[arg-type]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(axis=1)


def scores(logits: np.ndarray, temperature: float) -> np.ndarray:
    """`exitify.plan.SCORES`, in float64."""
    p = softmax(logits, temperature)
    ranked = np.sort(p, axis=1)[:, ::-1]
    q = p**2 / (p**2).sum(axis=1, keepdims=True)
    return np.stack([ranked[:, 0], entropy(p), ranked[:, 0] - ranked[:, 1], entropy(q)], axis=1)


def between(values: np.ndarray, position: int) -> float:
    """A threshold that `position` of these values do not reach, with none of them close by."""
    ranked = np.sort(values)
    edges = np.concatenate([[ranked[0] - 1], ranked, [ranked[-1] + 1]])
    assume(edges[position + 1] - edges[position] > 1e-3)
    return float((edges[position] + edges[position + 1]) / 2)


def expected_exits(logits: dict[str, np.ndarray], thresholds: dict[str, float], temperatures: dict[str, float], column: int) -> list[str]:
    """The first exit whose score reaches its threshold."""
    taken = [FINAL] * len(logits[FINAL])
    for name in reversed([name for name in logits if name in thresholds]):
        reached = scores(logits[name], temperatures.get(name, 1.0))[:, column] >= thresholds[name]
        taken = [name if here else later for here, later in zip(reached, taken)]
    return taken


# --- where it stops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_without_a_profile_no_exit_is_taken_and_the_answer_is_torchs(name):
    program, artifact = exported(name)
    session = Session(artifact)
    x = inputs(6)
    with torch.no_grad():
        expected = program.eval()(torch.from_numpy(x)).numpy()
    for answers in ([session.run(row) for row in x], session.run_batch(x)):
        assert {answer.exit for answer in answers} == {FINAL}
        assert {answer.macs for answer in answers} == {artifact.plan.full_macs}
        assert {answer.temperature for answer in answers} == {1.0}
        np.testing.assert_allclose([answer.logits for answer in answers], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_a_threshold_of_zero_always_takes_the_first_exit(name):
    _, artifact = exported(name)
    session = session_with(artifact, {"exit1": 0.0, "exit2": 0.0})
    expected = session.record(inputs(6)).logits["exit1"]
    for answers in ([session.run(row) for row in inputs(6)], session.run_batch(inputs(6))):
        assert {answer.exit for answer in answers} == {"exit1"}
        np.testing.assert_allclose([answer.logits for answer in answers], expected, rtol=RTOL, atol=ATOL)


def test_an_exit_that_is_not_enabled_is_not_taken_whatever_its_threshold():
    _, artifact = exported("identity")
    profile = profile_for(artifact, {"exit2": 0.0})
    profile = replace(profile, exits={**profile.exits, "exit1": replace(profile.exits["exit1"], threshold=0.0)})
    session = Session(artifact.with_profile("default", profile))
    assert {session.run(row).exit for row in inputs(3)} == {"exit2"}


def test_a_threshold_beyond_float32_is_never_reached():
    _, artifact = exported("identity")
    session = session_with(artifact, {"exit1": 1e299})
    assert [session.run(inputs(1)).exit, session.run_batch(inputs(1))[0].exit] == [FINAL, FINAL]
    assert session_with(artifact, {"exit1": -1e299}).run(inputs(1)).exit == "exit1"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["top1", "margin"])
@settings(max_examples=10)
@given(st.sampled_from([0.5, 1.0, 2.5]), st.tuples(st.integers(0, 12), st.integers(0, 12)))
def test_each_exit_keeps_its_own_threshold(name, policy, temperature, positions):
    """Against softmax and thresholds in NumPy over the recorded logits."""
    _, artifact = exported(name)
    x = inputs(12)
    logits = Session(artifact).record(x).logits
    column = {"top1": 0, "margin": 2}[policy]
    temperatures = {"exit1": temperature, "exit2": 1.5}
    thresholds = {
        exit_name: between(scores(logits[exit_name], temperatures[exit_name])[:, column], position)
        for exit_name, position in zip(temperatures, positions)
    }
    session = session_with(artifact, thresholds, temperatures=temperatures, policy=policy, final_temperature=3.0)
    expected = expected_exits(logits, thresholds, temperatures, column)
    answers = [session.run(row) for row in x]
    assert [answer.exit for answer in answers] == expected
    for answer, row in zip(answers, range(12)):
        np.testing.assert_allclose(answer.logits, logits[answer.exit][row], rtol=RTOL, atol=ATOL)
        assert answer.label == logits[answer.exit][row].argmax()
        assert answer.temperature == {**temperatures, FINAL: 3.0}[answer.exit]


@pytest.mark.parametrize("enabled", [(), ("exit1",), ("exit2",), ("exit1", "exit2")])
def test_multiply_adds_are_those_of_the_plan(enabled):
    _, artifact = exported("identity")
    x = inputs(12)
    logits = Session(artifact).record(x).logits
    session = session_with(artifact, {name: float(np.median(scores(logits[name], 1.0)[:, 0])) for name in enabled})
    answers = [*(session.run(row) for row in x), *session.run_batch(x)]
    assert {answer.exit for answer in answers} == {*enabled, FINAL}
    spent, total = {}, 0
    for segment in artifact.plan.segments:
        exit_name = segment.name.removeprefix("head_")
        if segment.kind == "trunk" or exit_name in enabled:
            total += segment.cost.macs
            spent[exit_name] = total
    spent[FINAL] = total
    assert all(answer.macs == spent[answer.exit] == artifact.plan.macs_at(enabled)[answer.exit] for answer in answers)


# --- engines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_onnx_runtime_agrees_with_the_reference_on_every_stretch(name):
    _, artifact = exported(name)
    plan = artifact.plan
    fast, plain = (engines.make_engine(kind, artifact, 1) for kind in ("onnxruntime", "reference"))
    given = {plan.input: inputs(2), **{key: np.ascontiguousarray(tensor) for key, tensor in artifact.tensors(HEADS_FILE).items()}}
    given |= {point.temperature: np.array(0.7, np.float32) for point in plan.exits}
    names = [point.name for point in plan.exits]
    compared = 0
    for enabled in (chosen for count in range(len(names) + 1) for chosen in itertools.combinations(names, count)):
        for stretch in plan.stretches(enabled):
            reads = {key: given[key] for key in (*stretch.inputs, *stretch.parameters)}
            found, expected = fast.prepare(stretch)(reads), plain.prepare(stretch)(reads)
            assert list(found) == list(expected) == list(stretch.outputs)
            for key, array in found.items():
                assert (array.shape, array.dtype) == (expected[key].shape, expected[key].dtype)
                np.testing.assert_allclose(array, expected[key], rtol=RTOL, atol=ATOL)
                compared += 1
            given.update(found)
    assert compared >= len(names) + 1


def test_the_reference_engine_runs_a_whole_session():
    _, artifact = exported("in_place")
    x = inputs(4)
    with_profile = artifact.with_profile("default", profile_for(artifact, {"exit1": 0.55, "exit2": 0.7}))
    fast, plain = (Session(with_profile, engine=engine) for engine in ("onnxruntime", "reference"))
    for row in x:
        one, other = fast.run(row), plain.run(row)
        assert (one.label, one.exit, one.macs) == (other.label, other.exit, other.macs)
        np.testing.assert_allclose(one.logits, other.logits, rtol=RTOL, atol=ATOL)
    assert [answer.exit for answer in plain.run_batch(x)] == [fast.run(row).exit for row in x]


def test_more_threads_in_an_answer_change_nothing():
    _, artifact = exported("identity")
    one, two = Session(artifact, threads=1), Session(artifact, threads=2)
    np.testing.assert_allclose(one.run(inputs(1)).logits, two.run(inputs(1)).logits, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("engine", ["tensorflow", "", "onnx", "reference:cuda", "ONNXRUNTIME"])
def test_an_unknown_engine_is_refused_with_those_there_are(engine):
    _, artifact = exported("plain")
    with pytest.raises(EngineError, match=f"there is no engine '{engine}'\n  hint: there are auto, onnxruntime, tvm, reference"):
        Session(artifact, engine=engine)


@pytest.mark.parametrize("provider", ["cuda", "quantum"])
def test_an_unavailable_provider_is_refused_with_those_there_are(provider, monkeypatch):
    _, artifact = exported("plain")
    monkeypatch.setattr(onnxruntime_engine.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=f"no '{provider}' provider\n  hint: it offers onnxruntime:cpu$"):
        Session(artifact, engine=f"onnxruntime:{provider}")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as if it had a GPU: sessions say that they run there, and arrays are copied there and back."""
    ort = onnxruntime_engine.ort
    make, place = ort.InferenceSession, ort.OrtValue.ortvalue_from_numpy

    def session(model: bytes, options: object, providers: object) -> object:
        made = make(model, options, providers=["CPUExecutionProvider"])
        made.get_providers = lambda: providers
        return made

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", lambda array, device="cpu", number=0: place(array.copy() if device == "cuda" else array))


def test_on_a_gpu_values_are_copied_there_and_what_is_read_comes_back(monkeypatch):
    artifact = exported("identity")[1]
    artifact = artifact.with_profile("default", profile_for(artifact, thresholds_for(artifact, inputs(8))))
    expected = [Session(artifact).run(x) for x in inputs(8)]
    on_a_gpu(monkeypatch)
    session = Session(artifact, engine="onnxruntime:cuda")
    assert (session.engine.full_name, Session(artifact).engine.full_name) == ("onnxruntime:cuda", "onnxruntime")
    for x, answer in zip(inputs(8), expected):
        found = session.run(x)
        assert (found.exit, found.logits.tolist()) == (answer.exit, answer.logits.tolist())
    assert len({answer.exit for answer in expected}) > 1


def test_a_provider_that_silently_does_not_start_is_an_error(monkeypatch):
    ort = onnxruntime_engine.ort
    make = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda model, options, providers: make(model, options, providers=["CPUExecutionProvider"]))
    with pytest.raises(EngineError, match=r"^ONNX Runtime's CUDAExecutionProvider does not start here: its sessions run on CPUExecutionProvider\n"):
        Session(exported("identity")[1], engine="onnxruntime:cuda")


def test_what_tensorrt_built_is_kept_apart_for_each_content(monkeypatch, tmp_path):
    """ONNX Runtime's own key for it is made of names, the same in networks with other weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = {"w": np.ones((2, 3), np.float32)}
    cases = [
        (b"model", weights),
        (b"other", weights),
        (b"model", {"w": weights["w"] * 2}),
        (b"model", {"w": weights["w"].reshape(3, 2)}),
        (b"model", {}),
    ]
    paths = [onnxruntime_engine._tensorrt_options(*case)["trt_engine_cache_path"] for case in cases]
    assert len(set(paths)) == len(cases)
    assert all(Path(path).is_dir() for path in paths)
    assert onnxruntime_engine._tensorrt_options(b"model", weights)["trt_engine_cache_path"] == paths[0]


def test_without_a_place_for_it_tensorrt_builds_each_time(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert onnxruntime_engine._tensorrt_options(b"model", {}) == {}


def test_auto_and_a_named_provider_are_onnx_runtime():
    _, artifact = exported("plain")
    for engine in ("auto", "onnxruntime", "onnxruntime:cpu"):
        assert isinstance(Session(artifact, engine=engine).engine, onnxruntime_engine.OnnxRuntimeEngine)


def test_an_engine_whose_library_is_missing_is_refused_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    _, artifact = exported("plain")
    for engine, library, extra in (("auto", "onnxruntime", "ort"), ("reference", "onnx", "transform")):
        module = f"exitify.runtime.engines.{engine if engine == 'reference' else library}"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
            patch.delitem(sys.modules, module, raising=False)
            patch.delattr(engines, module.rpartition(".")[2], raising=False)
            with pytest.raises(
                EngineError, match=rf"the engine '{engine}' needs {library}, which is not installed\n  hint: pip install 'exitify\[{extra}\]'"
            ):
                Session(artifact, engine=engine)


def with_graph(artifact: Artifact, segment: str, edit: object) -> Artifact:
    model = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment)]))
    edit(model.graph)  # type: ignore[operator]
    return build_artifact(artifact.manifest, {**artifact.files, graph_path(segment): model.SerializeToString()})


def test_a_graph_that_the_engine_does_not_know_is_refused():
    _, artifact = exported("plain")
    strange = with_graph(artifact, "trunk_final", lambda graph: setattr(graph.node[0], "op_type", "Nonsense"))
    with pytest.raises(EngineError, match=r"ONNX Runtime refuses trunk_final: .*Nonsense"):
        Session(strange)


def test_a_graph_that_fails_while_it_runs_is_an_engine_error():
    """Sixteen times sixteen pixels do not fold into rows of seven; no engine sees that before it runs."""

    def break_in_two(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 7]), "sevens"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 3, 16, 16]), "back"))
        for node in graph.node:
            node.input[:] = ["mended" if name == "x" else name for name in node.input]
        graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "sevens"], ["folded"]))
        graph.node.insert(1, onnx.helper.make_node("Reshape", ["folded", "back"], ["mended"]))

    _, artifact = exported("plain")
    broken = with_graph(artifact, "trunk_final", break_in_two)
    session = Session(broken)
    for call in (session.run, session.run_batch, session.record):
        with pytest.raises(EngineError, match=r"ONNX Runtime failed in trunk_final: .*Reshape.*\n  hint: check the input"):
            call(inputs(1))
    with pytest.raises(EngineError, match=r"the reference engine failed in trunk_final: .*reshape"):
        Session(broken, engine="reference").run(inputs(1))


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["identity", "transformer", "depthwise"])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_scores_are_those_of_numpy_at_the_temperature(name, temperature):
    _, artifact = exported(name)
    engine = engines.make_engine("onnxruntime", artifact, 1)
    given = {artifact.plan.input: inputs(8), **{key: np.ascontiguousarray(tensor) for key, tensor in artifact.tensors(HEADS_FILE).items()}}
    given |= {point.temperature: np.array(temperature, np.float32) for point in artifact.plan.exits}
    for point in artifact.plan.exits:
        stretch = artifact.plan.stretches((point.name,))[0]
        found = engine.prepare(stretch)({key: given[key] for key in (*stretch.inputs, *stretch.parameters)})
        logits = found[point.logits]
        np.testing.assert_allclose(logits, Session(artifact).record(inputs(8)).logits[point.name], rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(found[point.scores], scores(logits, temperature), rtol=1e-4, atol=2e-6)
        weight, bias = (artifact.tensors(HEADS_FILE)[key] for key in (point.weight, point.bias))
        np.testing.assert_allclose(logits, found[point.features] @ weight.T + bias, rtol=RTOL, atol=ATOL)


def test_probabilities_sum_to_one_and_use_the_temperature():
    _, artifact = exported("identity")
    temperatures = {"exit1": 0.3, "exit2": 1.0}
    for thresholds, temperature in (({"exit1": 0.0}, 0.3), ({}, 5.0)):
        session = session_with(artifact, thresholds, temperatures=temperatures, final_temperature=5.0)
        for answer in (session.run(inputs(1)), session.run_batch(inputs(1))[0]):
            assert answer.temperature == temperature
            np.testing.assert_allclose(answer.probabilities, softmax(answer.logits[None], temperature)[0], rtol=1e-5)
            assert answer.probabilities.sum() == pytest.approx(1, abs=1e-6)
            assert answer.probabilities.dtype == np.float32
            assert answer.label == answer.probabilities.argmax()


def test_probabilities_of_huge_logits_do_not_overflow():
    answer = Answer(0, FINAL, np.array([3e38, -3e38, 0], np.float32), 0.001, 0, 0.0, ())
    assert answer.probabilities.tolist() == [1.0, 0.0, 0.0]


def test_a_class_without_a_name_is_called_by_its_number():
    answers = [Answer(label, FINAL, np.zeros(3, np.float32), 1.0, 0, 0.0, ("cat", "dog")) for label in (1, 2)]
    assert [answer.name for answer in answers] == ["dog", "2"]


def test_class_names_come_from_the_input_contract():
    _, artifact = exported("identity")
    answer = Session(with_contract(artifact, classes=tuple("abcde"))).run(inputs(1))
    assert answer.name == "abcde"[answer.label]


def test_changed_heads_change_the_answer_without_a_new_graph():
    _, artifact = exported("in_place")
    session = session_with(artifact, {"exit1": 0.0})
    point = artifact.plan.exit("exit1")
    moved = {**artifact.tensors(HEADS_FILE), point.bias: artifact.tensors(HEADS_FILE)[point.bias] + np.arange(5, dtype=np.float32)}
    changed = build_artifact(artifact.manifest, {**artifact.files, HEADS_FILE: write_tensors(moved)})
    before, after = session.run(inputs(1)), session_with(changed, {"exit1": 0.0}).run(inputs(1))
    np.testing.assert_allclose(after.logits - before.logits, np.arange(5), atol=1e-5)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(0, 3), st.dictionaries(st.sampled_from(["exit1", "exit2"]), st.integers(0, 9)))
def test_a_batch_answers_as_its_rows_do(name, count, seed, positions):
    """Exits that are not in `positions` are not enabled; of the others, so many rows do not reach the threshold."""
    _, artifact = exported(name)
    x = inputs(count, seed)
    logits = Session(artifact).record(x).logits
    thresholds = {exit_name: between(scores(logits[exit_name], 1.0)[:, 0], min(position, count)) for exit_name, position in positions.items()}
    session = session_with(artifact, thresholds)
    together, alone = session.run_batch(x), [session.run(row) for row in x]
    assert [answer.exit for answer in together] == expected_exits(logits, thresholds, {}, 0)
    for one, other in zip(together, alone, strict=True):
        assert (one.label, one.exit, one.macs) == (other.label, other.exit, other.macs)
        np.testing.assert_allclose(one.logits, other.logits, rtol=RTOL, atol=ATOL)


@pytest.fixture
def batches(monkeypatch) -> Iterator[dict[str, int]]:
    """Rows that each stretch was given, by its exit."""
    seen: dict[str, int] = {}
    run = onnxruntime_engine._Runner.__call__

    def spy(self, given):
        sizes = {len(given[name]) for name in self.stretch.inputs}
        assert len(sizes) == 1
        seen[self.stretch.exit] = sizes.pop()
        return run(self, given)

    monkeypatch.setattr(onnxruntime_engine._Runner, "__call__", spy)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_have_their_answer_are_dropped_from_the_batch(name, batches):
    _, artifact = exported(name)
    x = inputs(12)
    logits = Session(artifact).record(x).logits
    thresholds = {exit_name: float(np.median(scores(logits[exit_name], 1.0)[:, 0])) for exit_name in ("exit1", "exit2")}
    session = session_with(artifact, thresholds)
    taken = expected_exits(logits, thresholds, {}, 0)
    assert len(set(taken)) == 3
    batches.clear()
    answers = session.run_batch(x)
    assert batches == {"exit1": 12, "exit2": 12 - taken.count("exit1"), FINAL: taken.count(FINAL)}
    assert [answer.exit for answer in answers] == taken


def test_a_batch_that_has_all_its_answers_goes_no_further(batches):
    _, artifact = exported("identity")
    session_with(artifact, {"exit1": 0.0}).run_batch(inputs(5))
    assert batches == {"exit1": 5}


def test_a_run_goes_no_further_than_its_exit(monkeypatch):
    _, artifact = exported("identity")
    session = session_with(artifact, {"exit1": 0.0})
    steps = []
    step = onnxruntime_engine._Binding.step
    monkeypatch.setattr(onnxruntime_engine._Binding, "step", lambda self, index: (steps.append(index), step(self, index)))
    session.run(inputs(1))
    assert steps == [0]


def test_an_answer_keeps_its_logits_when_the_next_one_is_computed():
    _, artifact = exported("in_place")
    session = Session(artifact)
    first = session.run(inputs(2)[0])
    before = first.logits.copy()
    second = session.run(inputs(2)[1])
    assert np.array_equal(first.logits, before)
    assert not np.array_equal(first.logits, second.logits)


def test_a_later_answer_of_a_batch_took_longer():
    _, artifact = exported("identity")
    x = inputs(12)
    threshold = float(np.median(scores(Session(artifact).record(x).logits["exit1"], 1.0)[:, 0]))
    answers = session_with(artifact, {"exit1": threshold}).run_batch(x)
    assert 0 < max(a.ms for a in answers if a.exit == "exit1") < min(a.ms for a in answers if a.exit == FINAL)


def test_recording_stops_nowhere():
    program, artifact = exported("identity")
    recorded = session_with(artifact, {"exit1": 0.0}).record(inputs(3))
    with torch.no_grad():
        outputs = program.eval()(torch.from_numpy(inputs(3)), all_exits=True)
    assert list(recorded.logits) == list(outputs.names)
    for name, logits in zip(outputs.names, outputs.logits):
        np.testing.assert_allclose(recorded.logits[name], logits.numpy(), rtol=RTOL, atol=1e-4)
    assert {name: array.shape for name, array in recorded.features.items()} == {point.name: (3, point.head.width) for point in artifact.plan.exits}


# --- threads and profiles -------------------------------------------------------------------------------------------


def test_four_threads_answer_as_one_does_to_the_bit():
    _, artifact = exported("identity")
    x = inputs(40)
    logits = Session(artifact).record(x).logits
    session = session_with(artifact, {name: float(np.median(scores(logits[name], 1.0)[:, 0])) for name in ("exit1", "exit2")})
    alone = [session.run(row) for row in x]
    assert len({answer.exit for answer in alone}) == 3
    with ThreadPool(4) as pool:
        together = pool.map(session.run, list(x) * 3, chunksize=1)
    for one, other in zip(alone * 3, together, strict=True):
        assert (one.label, one.exit, one.macs) == (other.label, other.exit, other.macs)
        assert one.logits.tobytes() == other.logits.tobytes()


def test_profiles_can_be_switched_between_calls():
    _, artifact = exported("identity")
    artifact = artifact.with_profile("early", profile_for(artifact, {"exit1": 0.0}))
    artifact = artifact.with_profile("middle", profile_for(artifact, {"exit2": 0.0}))
    session = Session(artifact)
    taken = []
    for profile in (None, "early", "middle", "early", None):
        session.use(profile)
        assert session.profile_name == profile
        taken += [session.run(inputs(1)).exit, session.run_batch(inputs(2))[1].exit]
    assert taken == [FINAL, FINAL, "exit1", "exit1", "exit2", "exit2", "exit1", "exit1", FINAL, FINAL]


def test_the_profile_called_default_is_used_unless_another_is_named(tmp_path):
    _, artifact = exported("identity")
    artifact = artifact.with_profile("default", profile_for(artifact, {"exit1": 0.0}))
    path = artifact.with_profile("late", profile_for(artifact, {})).save(tmp_path / "net.exitify")
    assert (Session.load(path).profile_name, Session.load(path).run(inputs(1)).exit) == ("default", "exit1")
    assert (Session.load(path, profile="late").profile_name, Session.load(path, profile="late").run(inputs(1)).exit) == ("late", FINAL)


def test_the_profile_called_none_takes_no_exit():
    _, artifact = exported("identity")
    artifact = artifact.with_profile("default", profile_for(artifact, {"exit1": 0.0}))
    session = Session(artifact, profile="none")
    assert (session.profile_name, session.run(inputs(1)).exit) == (None, FINAL)
    session.use(None)
    assert (session.profile_name, session.run(inputs(1)).exit) == ("default", "exit1")


def test_an_unknown_profile_is_refused_and_the_old_one_stays():
    _, artifact = exported("identity")
    session = session_with(artifact, {"exit1": 0.0})
    with pytest.raises(UnknownProfile, match=r"no profile 'fast'\n  hint: it has default"):
        session.use("fast")
    assert (session.profile_name, session.run(inputs(1)).exit) == ("default", "exit1")
    with pytest.raises(UnknownProfile, match="no profile 'fast'"):
        Session(artifact, profile="fast")


def test_switching_profiles_while_other_threads_run_never_mixes_them():
    _, artifact = exported("identity")
    artifact = artifact.with_profile("early", profile_for(artifact, {"exit1": 0.0}, temperatures={"exit1": 2.0}))
    artifact = artifact.with_profile("late", profile_for(artifact, {}, final_temperature=3.0))
    session = Session(artifact, profile="early")
    x = inputs(1)
    expected = {}
    for profile in ("early", "late"):
        session.use(profile)
        answer = session.run(x)
        expected[answer.exit] = (answer.logits.tobytes(), answer.temperature, answer.macs)
    assert set(expected) == {"exit1", FINAL}
    wrong: list[Answer] = []
    seen: set[str] = set()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            answer = session.run(x)
            seen.add(answer.exit)
            if expected[answer.exit] != (answer.logits.tobytes(), answer.temperature, answer.macs):
                wrong.append(answer)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    rounds, deadline = 0, time.monotonic() + 60
    while rounds < 60 or (len(seen) < 2 and time.monotonic() < deadline):
        session.use(("early", "late")[rounds % 2])
        session.run(x)
        rounds += 1
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong
    assert seen == {"exit1", FINAL}


def test_a_stretch_is_prepared_once(monkeypatch):
    _, artifact = exported("identity")
    opened = []
    open_session = onnxruntime_engine.OnnxRuntimeEngine._open
    monkeypatch.setattr(
        onnxruntime_engine.OnnxRuntimeEngine, "_open", lambda self, stretch: (opened.append(stretch.segments), open_session(self, stretch))[1]
    )
    session = session_with(artifact, {"exit1": 0.0})
    for profile in (None, "default", None, "default"):
        session.use(profile)
    assert len(opened) == len(set(opened)) == 2


def test_stretches_of_the_same_segments_with_other_outputs_are_two():
    _, artifact = exported("identity")
    engine = engines.make_engine("onnxruntime", artifact, 1)
    stretch = artifact.plan.stretches(("exit1",))[0]
    given = {artifact.plan.input: inputs(1), **{name: np.ascontiguousarray(tensor) for name, tensor in artifact.tensors(HEADS_FILE).items()}}
    given["exit_heads.exit1.temperature"] = np.array(1, np.float32)
    reads = {name: given[name] for name in (*stretch.inputs, *stretch.parameters)}
    for outputs in (("exit1.logits",), stretch.outputs):
        assert tuple(engine.prepare(replace(stretch, outputs=outputs))(reads)) == outputs


# --- input ----------------------------------------------------------------------------------------------------------


def test_an_input_comes_with_or_without_its_batch_dimension():
    _, artifact = exported("in_place")
    session = Session(artifact)
    assert session.run(inputs(1)).logits.tobytes() == session.run(inputs(1)[0]).logits.tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4", np.longdouble])
def test_floats_of_another_size_are_converted(dtype):
    _, artifact = exported("in_place")
    x = inputs(2).astype(np.float16)
    expected = [answer.logits.tobytes() for answer in Session(artifact).run_batch(x.astype(np.float32))]
    assert [answer.logits.tobytes() for answer in Session(artifact).run_batch(x.astype(dtype))] == expected


def test_memory_layout_does_not_matter():
    _, artifact = exported("in_place")
    session = Session(artifact)
    x = inputs(4)
    turned = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    sparse = np.repeat(x, 2, axis=0)[::2]
    for other in (turned, sparse):
        assert not other.flags.c_contiguous
        for one, two in zip(session.run_batch(x), session.run_batch(other), strict=True):
            assert one.logits.tobytes() == two.logits.tobytes()
        assert session.run(other[0]).logits.tobytes() == session.run(x[0]).logits.tobytes()


CONTRACT = {"preprocess": Preprocess(resize=(18,), crop=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))}


def test_a_picture_is_prepared_as_the_contract_says():
    _, artifact = exported("identity")
    artifact = with_contract(artifact, **CONTRACT)
    session = Session(artifact)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    ready = prepare_pictures(pictures, artifact.manifest.input)
    assert ready.shape == (3, 3, 16, 16)
    for answers in ([session.run(picture) for picture in pictures], [session.run(picture[None]) for picture in pictures]):
        assert [answer.logits.tobytes() for answer in answers] == [session.run(x).logits.tobytes() for x in ready]
    assert [a.logits.tobytes() for a in session.run_batch(pictures)] == [a.logits.tobytes() for a in session.run_batch(ready)]


def test_a_picture_without_a_preprocess_is_refused():
    _, artifact = exported("identity")
    with pytest.raises(DataError, match="pictures cannot become inputs: the model came without a preprocess"):
        Session(artifact).run(np.zeros((16, 16, 3), np.uint8))


BAD_INPUTS = [
    ([[1.0]], r"the input is a list, not a NumPy array"),
    (None, "the input is a NoneType, not a NumPy array"),
    (torch.zeros(1, 3, 16, 16), "the input is a Tensor, not a NumPy array"),
    (np.float32(1), "the input is a float32, not a NumPy array"),
    (np.zeros((), np.float32), r"the input has shape \(\), and the network reads \(N, 3, 16, 16\)"),
    (np.zeros((3, 16), np.float32), r"the input has shape \(3, 16\)"),
    (np.zeros((1, 16, 16, 3), np.float32), r"the input has shape \(1, 16, 16, 3\)"),
    (np.zeros((3, 16, 17), np.float32), r"the input has shape \(1, 3, 16, 17\)"),
    (np.zeros((1, 1, 3, 16, 16), np.float32), r"the input has shape \(1, 1, 3, 16, 16\)"),
    (np.zeros((0, 3, 16, 16), np.float32), r"the input has shape \(0, 3, 16, 16\)"),
    (np.zeros((0, 16, 16, 3), np.uint8), r"the input has shape \(0, 16, 16, 3\)"),
    (np.zeros((1, 3, 16, 16), np.int64), r"the input is int64, and the network reads float32\n  hint: convert it: x\.astype\(numpy\.float32\)"),
    (np.zeros((1, 3, 16, 16), bool), "the input is bool, and the network reads float32"),
    (np.zeros((1, 3, 16, 16), np.complex64), "the input is complex64, and the network reads float32"),
    (np.zeros((1, 3, 16, 16), object), "the input is object, and the network reads float32"),
    (np.full((1, 3, 16, 16), "a"), "the input is <U1, and the network reads float32"),
]


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS, ids=[message[:40] for _, message in BAD_INPUTS])
@pytest.mark.parametrize("call", ["run", "run_batch", "record"])
def test_an_input_that_does_not_fit_is_refused(x, message, call):
    _, artifact = exported("identity")
    with pytest.raises(DataError, match=message) as raised:
        getattr(Session(with_contract(artifact, **CONTRACT)), call)(x)
    assert raised.value.hint


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_not_finite_is_refused_with_its_place(value, shown, dtype):
    _, artifact = exported("identity")
    x = inputs(3).astype(dtype)
    x[1, 2, 5, 7] = value
    for call in (Session(artifact).run_batch, Session(artifact).record):
        with pytest.raises(DataError, match=rf"the input holds {shown} at \(1, 2, 5, 7\)"):
            call(x)
    with pytest.raises(DataError, match=rf"the input holds {shown} at \(0, 2, 5, 7\)"):
        Session(artifact).run(x[1])


def test_infinities_that_cancel_and_numbers_too_large_are_refused():
    _, artifact = exported("identity")
    both = inputs(1)
    both[0, 0, 0, :2] = np.inf, -np.inf
    with pytest.raises(DataError, match=r"the input holds inf at \(0, 0, 0, 0\)"):
        Session(artifact).run(both)
    with pytest.raises(DataError, match=r"the input holds inf at \(0, 0, 0, 0\)"):
        Session(artifact).run(np.full((3, 16, 16), 1e200))


def test_large_finite_numbers_are_read_and_an_answer_that_they_make_infinite_is_refused():
    """Their sum overflows as well, and is no reason to refuse them."""
    _, artifact = exported("plain")
    session = Session(artifact)
    for call in (session.run, session.run_batch):
        with pytest.raises(DataError, match="the network's answer is not finite at final\n  hint: the input's values are far from any"):
            call(np.full((1, 3, 16, 16), 3e38, np.float32))


def test_run_takes_one_sample():
    _, artifact = exported("identity")
    with pytest.raises(DataError, match=r"run\(\) takes one sample, and got 2\n  hint: use run_batch\(\)"):
        Session(artifact).run(inputs(2))


# --- without torch --------------------------------------------------------------------------------------------------


def test_a_session_runs_where_there_is_no_torch_tvm_networkx_or_onnx(tmp_path):
    _, artifact = exported("identity")
    path = with_contract(artifact, **CONTRACT).save(tmp_path / "net.exitify")
    np.save(tmp_path / "x.npy", inputs(3))
    code = f"""
import sys
for name in ("torch", "tvm", "networkx", "onnx", "onnxscript"):
    sys.modules[name] = None
import numpy as np
from exitify import Session
session = Session.load({str(path)!r})
x = np.load({str(tmp_path / "x.npy")!r})
for answer in [*map(session.run, x), *session.run_batch(x)]:
    print(answer.label, answer.exit, answer.logits.astype(float).tolist())
session.record(x)
session.run(np.zeros((16, 16, 3), np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = Session(artifact)
    answers = [*map(session.run, inputs(3)), *session.run_batch(inputs(3))]
    assert done.stdout.splitlines() == [f"{answer.label} {answer.exit} {answer.logits.astype(float).tolist()}" for answer in answers]


def test_an_engine_without_bindings_gets_plain_ones():
    """What the base class offers is enough: a new engine has only to prepare stretches."""

    class Doubled(Engine):
        name = "doubled"

        def prepare(self, stretch):
            runner = engines.make_engine("onnxruntime", self.artifact, 1).prepare(stretch)
            return lambda given: {key: array * (2 if key == self.artifact.plan.output else 1) for key, array in runner(given).items()}

    _, artifact = exported("in_place")
    session = session_with(artifact, {"exit1": 0.57})
    plain = Session(session.artifact)
    plain.engine = Doubled(session.artifact, 1)
    plain.use(None)
    assert isinstance(plain.engine.bind([], {}), Bound)
    for row in inputs(6):
        one, other = session.run(row), plain.run(row)
        assert (one.exit, one.label) == (other.exit, other.label)
        np.testing.assert_allclose(other.logits, one.logits * (2 if one.exit == FINAL else 1), rtol=RTOL, atol=ATOL)


def test_importing_the_runtime_imports_no_engine():
    code = "import sys, exitify.runtime.session; print(sorted({'onnxruntime', 'torch', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
