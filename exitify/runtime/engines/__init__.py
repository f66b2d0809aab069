"""The engines by name. Each imports its library when it is asked for."""

from __future__ import annotations

from exitify.artifact.artifact import Artifact
from exitify.errors import EngineError
from exitify.runtime.engines.base import Engine

ENGINES = ("auto", "onnxruntime", "tvm", "reference")


def make_engine(name: str, artifact: Artifact, threads: int) -> Engine:
    """Return the engine of this name over an artifact.

    Args:
        name: `auto` (ONNX Runtime on the CPU), `onnxruntime`, `onnxruntime:cuda`, `onnxruntime:tensorrt`, `tvm` (the library
            in the artifact: native code, loaded only when it is asked for), `tvm:TARGET`, or `reference`.
        threads: How many threads one call may use.

    Raises:
        EngineError: there is no such engine, or its library is missing.
    """
    kind, _, provider = name.partition(":")
    if kind not in ENGINES or (kind not in ("onnxruntime", "tvm") and provider):
        raise EngineError(f"there is no engine {name!r}", f"there are {', '.join(ENGINES)}")
    try:
        if kind == "reference":
            from exitify.runtime.engines.reference import ReferenceEngine

            return ReferenceEngine(artifact, threads)
        if kind == "tvm":
            from exitify.runtime.engines.tvm import TvmEngine

            return TvmEngine(artifact, threads, provider)
        from exitify.runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(artifact, threads, provider or "cpu")
    except ModuleNotFoundError as error:
        extra = "ort" if error.name == "onnxruntime" else {"reference": "transform", "tvm": "tvm"}.get(kind, "ort")
        raise EngineError(f"the engine {name!r} needs {error.name}, which is not installed", f"pip install 'exitify[{extra}]'") from error
