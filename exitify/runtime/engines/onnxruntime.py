"""ONNX Runtime: the portable default."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exitify.artifact.artifact import Artifact
from exitify.errors import EngineError, first_line
from exitify.plan import Stretch
from exitify.runtime.engines.base import Array, Bound, Engine, Parameters, Runner

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


class OnnxRuntimeEngine(Engine):
    """Each stretch is one session over tensors mapped from the artifact; batch 1 runs on buffers bound once a thread."""

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, threads: int, provider: str = "cpu") -> None:
        super().__init__(artifact, threads)
        self.providers = PROVIDERS.get(provider, [])
        if not self.providers or self.providers[0] not in ort.get_available_providers():
            offered = [name for name, wanted in PROVIDERS.items() if wanted[0] in ort.get_available_providers()]
            raise EngineError(
                f"this installation of ONNX Runtime has no {provider!r} provider",
                f"it offers {', '.join(f'onnxruntime:{name}' for name in offered)}",
            )
        self.device, self.library = ("cpu", "") if provider == "cpu" else ("cuda", provider)
        self._runners: dict[tuple[object, ...], _Runner] = {}
        self._lock = threading.Lock()

    def prepare(self, stretch: Stretch) -> _Runner:
        key = (stretch.segments, stretch.inputs, stretch.outputs, stretch.skipped)
        with self._lock:
            if key not in self._runners:
                self._runners[key] = _Runner(self._open(stretch), stretch)
            return self._runners[key]

    def bind(self, stretches: Sequence[Stretch], parameters: Parameters) -> Bound:
        return _Binding(self, stretches, parameters)

    def _open(self, stretch: Stretch) -> ort.InferenceSession:
        model, outside = self.joined(stretch)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        if self.threads > 1:  # each stretch has threads of its own: they must not spin while another's work
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if outside:
            options.add_external_initializers(list(outside), [ort.OrtValue.ortvalue_from_numpy(tensor) for tensor in outside.values()])
        providers = [(name, _tensorrt_options(model, outside)) if name.startswith("Tensorrt") else name for name in self.providers]
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:
            raise EngineError(
                f"ONNX Runtime refuses {', '.join(stretch.segments)}: {first_line(error)}", "update onnxruntime, or transform the model again"
            ) from error
        if self.providers[0] not in session.get_providers():  # it goes on with the others, and says so in a log that nobody reads
            raise EngineError(
                f"ONNX Runtime's {self.providers[0]} does not start here: its sessions run on {', '.join(session.get_providers())}",
                "`exitify doctor` looks at the driver; ONNX Runtime's own words are in its log",
            )
        return session


class _Runner(Runner):
    def __init__(self, session: ort.InferenceSession, stretch: Stretch) -> None:
        self.session, self.stretch = session, stretch

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(self.stretch.outputs, self.session.run(list(self.stretch.outputs), dict(inputs))))
        except Exception as error:
            raise _failed(self.stretch, error) from error


class _Binding(Bound):
    """One buffer a value; what a stretch writes is where the next one reads. On a GPU it stays there until somebody reads it."""

    def __init__(self, engine: OnnxRuntimeEngine, stretches: Sequence[Stretch], parameters: Parameters) -> None:
        self.stretches = stretches
        plan = engine.artifact.plan
        names = [plan.input, *(name for stretch in stretches for name in stretch.outputs)]
        self.buffers = {name: np.zeros((1, *plan.values[name].shape), plan.values[name].dtype) for name in names}
        self.is_here = engine.device == "cpu"
        given = {name: ort.OrtValue.ortvalue_from_numpy(array, engine.device, 0) for name, array in {**self.buffers, **parameters}.items()}
        self.input, self._given = self.buffers[plan.input], given[plan.input]
        self.steps: list[tuple[Any, Any]] = []
        for stretch in stretches:
            session = engine.prepare(stretch).session
            binding = session.io_binding()
            for name in (*stretch.inputs, *stretch.parameters):
                binding.bind_ortvalue_input(name, given[name])
            for name in stretch.outputs:
                binding.bind_ortvalue_output(name, given[name])
            self.steps.append((session.run_with_iobinding, binding))
        self._alive = given
        self._device = engine.device
        self._readers = {name: [binding for stretch, (_, binding) in zip(stretches, self.steps) if name in stretch.parameters] for name in parameters}

    def set_parameters(self, parameters: Parameters) -> None:
        made = {name: ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for name, array in parameters.items()}
        for name, value in made.items():
            for binding in self._readers[name]:
                binding.bind_ortvalue_input(name, value)
        self._alive.update(made)

    def set_input(self, x: Array) -> None:
        np.copyto(self.input, x)
        if not self.is_here:
            self._given.update_inplace(self.input)

    def step(self, index: int) -> None:
        run, binding = self.steps[index]
        try:
            run(binding)
        except Exception as error:
            raise _failed(self.stretches[index], error) from error

    def value(self, name: str) -> Array:
        return self.buffers[name] if self.is_here else self._alive[name].numpy()


def _tensorrt_options(model: bytes, outside: Mapping[str, Array]) -> dict[str, str]:
    """TensorRT takes minutes to build its engines: they are kept for the next session.

    ONNX Runtime finds one by names in the graph alone, of which networks with other weights have the same: each has a folder of its own.
    """
    content = hashlib.sha256(model)
    for name, tensor in sorted(outside.items()):
        content.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        content.update(np.ascontiguousarray(tensor).data)
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exitify" / "tensorrt" / content.hexdigest()
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: they are built each time
        return {}
    return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(kept)}


def _failed(stretch: Stretch, error: Exception) -> EngineError:
    return EngineError(f"ONNX Runtime failed in {', '.join(stretch.segments)}: {first_line(error)}", "check the input and the memory left")
