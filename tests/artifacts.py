"""Networks of the zoo with exits, exported once for all tests that read artifacts, and profiles for them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import ExitSetting, Profile, Promise
from exitify.onnx_export.to_artifact import export
from exitify.program import Program
from tests.helpers import captured, with_exits
from tests.models import SHAPE

EXITS = {
    "identity": ("relu_1,relu_3", "conv"),  # inside the branch of a residual block: two values cross
    "in_place": ("block1_relu,add_1", "linear"),  # a value that the network overwrites later
    "shared": ("relu_2,mean", "linear"),  # one block's weights on both sides of an exit; a vector that is the head's features as it is
    "dropout": ("relu,dropout", "linear"),  # the same tensor on both sides: nothing is dropped any more
    "depthwise": ("hardswish_1,mul", "mlp"),
    "transformer": ("add_1,add_3", "linear"),
    "plain": ("none", "auto"),
}
"""Where each network may stop, and with which heads."""

PROMISE = Promise("max-drop", 0.01, 0.0, True, 100, 0.9, 0.91, 0.02, 0.6, 0.0, "")


@functools.cache
def exported(name: str) -> tuple[Program, Artifact]:
    """A network of the zoo with used norm statistics, no two weights alike, and fresh heads that are sure of themselves; and its artifact."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = with_exits(captured(name), *EXITS[name])
        with torch.no_grad():
            for path, parameter in program.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
                if path.endswith("classifier.weight"):
                    parameter.mul_(8)
            for buffer in program.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer) * 0.1)
    return program, export(program)


def inputs(count: int, seed: int = 0) -> np.ndarray:
    """Different inputs, `(count, *SHAPE)`."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def profile_for(
    artifact: Artifact,
    thresholds: Mapping[str, float],
    *,
    temperatures: Mapping[str, float] | None = None,
    policy: str = "top1",
    final_temperature: float = 1.0,
) -> Profile:
    """A profile in which just the exits with a threshold are enabled."""
    warmth = temperatures or {}
    settings = {
        point.name: ExitSetting(point.name in thresholds, thresholds.get(point.name, 2.0), warmth.get(point.name, 1.0))
        for point in artifact.plan.exits
    }
    return Profile(artifact.manifest.model_id, policy, settings, final_temperature, "", PROMISE, "onnxruntime", "")  # type: ignore[arg-type]


def with_contract(artifact: Artifact, **changes: object) -> Artifact:
    """The artifact with another input contract."""
    manifest = artifact.manifest
    return Artifact(replace(manifest, input=replace(manifest.input, **changes)), artifact.files)
