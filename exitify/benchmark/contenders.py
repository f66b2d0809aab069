"""What can be timed beside an artifact. A contender says how it is loaded, so that every round, and a process of its own, can load it anew."""

from __future__ import annotations

import abc
import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.benchmark.report import Role
from exitify.errors import EngineError, ModelError, first_line, one_line
from exitify.runtime.engines import make_engine
from exitify.runtime.engines.base import Array, Engine
from exitify.runtime.session import Session

AGAINST = ("onnxruntime", "tvm", "torch", "inductor", "openvino")
_LIBRARIES = {"reference": "onnx", "inductor": "torch"}
"""The package behind an engine, where it is not called like the engine."""


@dataclass(frozen=True)
class Loaded:
    """A contender that answers.

    engine: What runs it, with its library or provider.
    run: Answers one sample `(1, *shape)`; all that is timed. What it gives may be overwritten by the next call.
    logits: Of what `run` gave, `(1, classes)` or `(classes,)`.
    precision: What it computes in. close: Puts back what loading changed in the process.
    """

    engine: str
    run: Callable[[Array], Any]
    logits: Callable[[Any], Array] = np.asarray
    precision: str = "fp32"
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender(abc.ABC):
    """One row of the report. It can be pickled."""

    name: str
    role: Role

    @abc.abstractmethod
    def load(self, threads: int) -> Loaded:
        """Load it, with nothing kept from an earlier time.

        Raises:
            EngineError: its library refuses it, or does not use as many threads. ModuleNotFoundError: its library is not installed.
        """


@dataclass(frozen=True)
class OneGraph(Contender):
    """The network without exits as one graph in an engine of ours, buffers bound once: no decision, no session."""

    artifact: Path
    engine: str

    def load(self, threads: int) -> Loaded:
        artifact = Artifact.open(self.artifact)
        engine = make_engine(self.engine, artifact, threads)
        precision = artifact.targets[engine.library].precision if engine.name == "tvm" else "fp32"
        return Loaded(engine.full_name, _whole(artifact, engine), precision=precision)


@dataclass(frozen=True)
class WithExits(Contender):
    """The artifact in a session, as `exitify run` answers. `profile`: see `Session`."""

    artifact: Path
    engine: str
    profile: str | None

    def load(self, threads: int) -> Loaded:
        session = Session.load(self.artifact, engine=self.engine, profile=self.profile, threads=threads)
        return Loaded(session.engine.full_name, session.run, lambda answer: answer.logits)


@dataclass(frozen=True)
class InTorch(Contender):
    """The original module, as it stands or compiled by Inductor.

    classes: How many scores the network gives: of several outputs the first with so many is taken.
    """

    model: Any = field(repr=False)
    classes: int
    is_compiled: bool

    def load(self, threads: int) -> Loaded:
        import torch
        from torch.utils._pytree import tree_leaves

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        network = copy.deepcopy(self.model).eval()
        if self.is_compiled:
            network = torch.compile(network)
        shape = (1, self.classes)

        def call(given: Array) -> Any:
            try:
                return network(torch.from_numpy(given))
            except Exception as error:  # Inductor's first call compiles, and fails in many ways
                if not self.is_compiled:
                    raise
                raise EngineError(
                    f"Inductor refuses the network: {one_line(error)}", "it needs a C++ compiler; or leave inductor out of --against"
                ) from error

        def run(given: Array) -> Array:
            with torch.inference_mode():
                result = call(given)
            scores = (
                result
                if isinstance(result, torch.Tensor)
                else next((leaf for leaf in tree_leaves(result) if getattr(leaf, "shape", None) == shape), None)
            )
            if scores is None:
                raise ModelError(f"the model's outputs have no {self.classes} class scores", "give the model that was transformed: --model MODEL")
            array: Array = scores.numpy()
            return array

        def close() -> None:
            torch.set_num_threads(before)
            if self.is_compiled:  # or the next round's copy meets the limit on how often one forward() is compiled
                torch.compiler.reset()

        return Loaded(self.name, run, close=close)


@dataclass(frozen=True)
class InOpenVino(Contender):
    """One ONNX file of the whole network in OpenVINO on the processor, one stream, buffers bound once."""

    network: Path

    def load(self, threads: int) -> Loaded:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # it would take bfloat16 where the processor has it
            "ENABLE_CPU_PINNING": False,  # as for all others; and the thread that it pins may be ours
        }
        try:
            core = openvino.Core()
            model = core.read_model(self.network)
            model.reshape([1, *model.input(0).partial_shape[1:]])
            compiled = core.compile_model(model, "CPU", settings)
            given = compiled.get_property("INFERENCE_NUM_THREADS")
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refuses the network: {first_line(error)}", "leave openvino out of --against") from error
        if given != threads:
            raise EngineError(
                f"OpenVINO runs on {given} threads where {threads} were asked for", "give as many --threads as there are cores, or less"
            )
        request = compiled.create_infer_request()
        x = np.zeros(tuple(model.input(0).shape), model.input(0).element_type.to_dtype())
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        scores = request.get_output_tensor(0).data

        def run(inputs: Array) -> Array:
            np.copyto(x, inputs)
            request.infer()
            return scores

        return Loaded(self.name, run)


@dataclass(frozen=True)
class InOnnxRuntime(Contender):
    """A static network from an ONNX file in ONNX Runtime, buffers bound once; `exitify.benchmark.smaller` has looked at the file.

    shape, dtype: Of the input, `(1, …)`. classes: Of the output.
    """

    network: Path
    shape: tuple[int, ...]
    dtype: str
    classes: int

    def load(self, threads: int) -> Loaded:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        if threads > 1:  # as in the engine: threads of one contender must not spin while another is timed
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(self.network, options, providers=["CPUExecutionProvider"])
            x, scores = np.zeros(self.shape, self.dtype), np.zeros((1, self.classes), np.float32)
            binding = session.io_binding()
            binding.bind_ortvalue_input(session.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(x))
            binding.bind_ortvalue_output(session.get_outputs()[0].name, ort.OrtValue.ortvalue_from_numpy(scores))
            session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime refuses {self.network}: {first_line(error)}", "give a network of the same input that gives as many class scores"
            ) from error

        def run(inputs: Array) -> Array:
            np.copyto(x, inputs)
            session.run_with_iobinding(binding)
            return scores

        return Loaded("onnxruntime", run)


def one_graph(artifact: Artifact, threads: int, engine: str = "auto") -> Callable[[Array], Array]:
    """The network without exits as one graph in an engine, buffers bound once: no decision, no session of ours.

    Args:
        artifact: Whose network. threads: That one answer may use. engine: See `exitify.runtime.engines.make_engine`.

    Returns:
        From one sample `(1, *shape)` to its logits `(1, classes)`, which the next call overwrites.
    """
    return _whole(artifact, make_engine(engine, artifact, threads))


def engine_kind(engine: str) -> str:
    """The name among `AGAINST` of what `auto` or `tvm:host` stands for."""
    kind = engine.partition(":")[0]
    return "onnxruntime" if kind == "auto" else kind


def library_versions(engines: Iterable[str]) -> dict[str, str]:
    """The versions of the packages behind these engines, which are loaded, by the packages' names."""
    found = {}
    for kind in map(engine_kind, engines):
        if kind == "tvm":  # its runtime is loaded without the package
            found["apache-tvm"] = importlib.metadata.version("apache-tvm")
        else:
            package = _LIBRARIES.get(kind, kind)
            found[package] = str(importlib.import_module(package).__version__).partition("-")[0]  # OpenVINO's goes on with its build
    return found


def _whole(artifact: Artifact, engine: Engine) -> Callable[[Array], Array]:
    (whole,) = artifact.plan.stretches(())
    bound = engine.bind([whole], {})

    def answer(given: Array) -> Array:
        bound.set_input(given)
        bound.step(0)
        return bound.value(artifact.plan.output)

    return answer
