"""A network with four exits, for tests of when it stops, and what each policy should do on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Policy, Profile
from exitify.onnx_export.to_artifact import export
from exitify.plan import FINAL
from exitify.runtime.policies import from_logits, score_run
from exitify.runtime.session import Session
from tests.artifacts import inputs, profile_for
from tests.helpers import captured, with_exits

NAMES = ("exit1", "exit2", "exit3", "exit4")
GATES = {
    "exit1": (1.5, -0.4, 0.8, 0.3, -1.6),
    "exit2": (-2.0, 0.7, 1.1, 0.2, 0.4),
    "exit3": (0.3, 0.1, -0.9, 0.6, -1.2),
    "exit4": (1.0, 0.2, 0.4, -0.3, -0.5),
}


@functools.cache
def four_exits() -> Artifact:
    """A residual network whose four heads say something else of every input, and seldom agree."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        program = with_exits(captured("identity"), "relu_1,relu_2,relu_3,relu_4", "linear").eval()
        for parameter in program.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        spread = [logits.std(dim=0) / 2 for logits in program(torch.from_numpy(inputs(200)), all_exits=True).logits]
        for name, by in zip(NAMES, spread):
            program.get_submodule(f"exit_heads.{name}.classifier").weight.div_(by[:, None])
        means = [logits.mean(dim=0) for logits in program(torch.from_numpy(inputs(200)), all_exits=True).logits]
        for name, mean in zip(NAMES, means):
            program.get_submodule(f"exit_heads.{name}.classifier").bias.sub_(mean)
    return export(program)


def profile_of(policy: Policy, thresholds: Mapping[str, float], **options: object) -> Profile:
    """A profile in which just the exits with a threshold are enabled, each with a gate."""
    plain = profile_for(four_exits(), thresholds, policy=policy, **options)  # type: ignore[arg-type]
    return replace(plain, exits={name: replace(setting, gate=GATES[name]) for name, setting in plain.exits.items()})


def session_of(profile: Profile | None = None) -> Session:
    return Session(four_exits().with_profile("default", profile) if profile else four_exits())


def recorded(x: np.ndarray) -> dict[str, np.ndarray]:
    """Logits `(N, classes)` by exit."""
    return Session(four_exits()).record(x).logits


def sureness_of(policy: Policy, exits: Sequence[str], logits: Mapping[str, np.ndarray], temperatures: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Scores `(N,)` of a policy by exit, when just these are run."""
    scores = np.stack([from_logits(logits[name], temperatures.get(name, 1.0)) for name in exits])
    found = score_run(policy, scores, np.stack([logits[name].argmax(axis=1) for name in exits]), [GATES[name] for name in exits])
    return dict(zip(exits, found))


def stops(sureness: Mapping[str, np.ndarray], thresholds: Mapping[str, float], count: int) -> list[str]:
    """The first exit whose score reaches its threshold, for each sample."""
    return [next((name for name in sureness if sureness[name][n] >= thresholds[name]), FINAL) for n in range(count)]
