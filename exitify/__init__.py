"""exitify: early exits for a trained PyTorch model, in one artifact that runs without torch.

Names are loaded when they are used: `import exitify` alone imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exitify.version import __version__

if TYPE_CHECKING:
    from exitify import losses as losses
    from exitify.adapt.session import LearningSession as LearningSession
    from exitify.adapt.state import State as State
    from exitify.artifact.artifact import Artifact as Artifact
    from exitify.artifact.manifest import InputContract as InputContract
    from exitify.benchmark import bench as bench
    from exitify.calibration.calibrate import calibrate as calibrate
    from exitify.calibration.segment_times import measure_segments as measure_segments
    from exitify.errors import ExitifyError as ExitifyError
    from exitify.lower.pipeline import compile_artifact as compile_artifact
    from exitify.models import load_model as load_model
    from exitify.onnx_export.static import export_static as export_static
    from exitify.onnx_export.to_artifact import export as export
    from exitify.pipeline import transform as transform
    from exitify.placement import place_by_data as place_by_data
    from exitify.plan import Plan as Plan
    from exitify.program import ExitOutputs as ExitOutputs
    from exitify.program import Program as Program
    from exitify.report.report import Report as Report
    from exitify.report.report import inspect as inspect
    from exitify.runtime.answers import Answer as Answer
    from exitify.runtime.session import Session as Session
    from exitify.tracing import capture as capture
    from exitify.train.end_to_end import train_network as train_network
    from exitify.train.heads import train_heads as train_heads
    from exitify.train.jei_dnn import JeiDnn as JeiDnn
    from exitify.train.norms import reestimate_norms as reestimate_norms
    from exitify.train.skip_distillation import SkipAwareDistillation as SkipAwareDistillation

_HOME = {
    "Answer": "exitify.runtime.answers",
    "Artifact": "exitify.artifact.artifact",
    "ExitOutputs": "exitify.program",
    "ExitifyError": "exitify.errors",
    "InputContract": "exitify.artifact.manifest",
    "JeiDnn": "exitify.train.jei_dnn",
    "LearningSession": "exitify.adapt.session",
    "Plan": "exitify.plan",
    "Program": "exitify.program",
    "Report": "exitify.report.report",
    "Session": "exitify.runtime.session",
    "State": "exitify.adapt.state",
    "SkipAwareDistillation": "exitify.train.skip_distillation",
    "bench": "exitify.benchmark",
    "calibrate": "exitify.calibration.calibrate",
    "capture": "exitify.tracing",
    "compile_artifact": "exitify.lower.pipeline",
    "export": "exitify.onnx_export.to_artifact",
    "export_static": "exitify.onnx_export.static",
    "inspect": "exitify.report.report",
    "load_model": "exitify.models",
    "measure_segments": "exitify.calibration.segment_times",
    "place_by_data": "exitify.placement",
    "reestimate_norms": "exitify.train.norms",
    "train_heads": "exitify.train.heads",
    "train_network": "exitify.train.end_to_end",
    "transform": "exitify.pipeline",
}

__all__ = [*sorted(_HOME), "__version__", "losses"]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("exitify.losses")
    if name not in _HOME:
        raise AttributeError(f"module 'exitify' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
