"""What every exit says of some samples: of those that the artifact remembers, or of others that are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import Profile
from exitify.calibration.calibrate import Outputs, record_outputs
from exitify.calibration.temperature import fit_temperature
from exitify.data import Samples
from exitify.plan import FINAL
from exitify.progress import Progress, silent
from exitify.runtime.session import Session


@dataclass(frozen=True)
class Evidence:
    """What a report rests on.

    outputs: Logits of every exit under the profile's mask, and labels.
    samples: Those that were given; None where the artifact's own memory of its calibration stands for them.
    temperatures: Of every exit, the network's own last: the profile's; fitted to these samples where there is no profile.
    are_those_calibrated_on: Whether thresholds or temperatures were found on these samples, or may have been, which flatters them a little.
    """

    outputs: Outputs
    samples: Samples | None
    temperatures: NDArray[np.float64]
    are_those_calibrated_on: bool

    def __len__(self) -> int:
        return len(self.outputs.labels)


def remembered(artifact: Artifact, profile: Profile | None) -> Evidence | None:
    """What the artifact remembers of its calibration, float16 features through today's heads; None where that says nothing of this profile.

    It says nothing where the profile leaves something out, and where a head adds an earlier one's logits to its own.
    """
    memory = artifact.memory
    added = any(point.head.path in ("boosted", "ensemble") for point in artifact.plan.exits)
    if memory is None or added or (profile is not None and "1" in profile.skip):
        return None
    heads = {name: array.astype(np.float32) for name, array in artifact.classifiers().items()}
    logits = [memory.features[point.name].astype(np.float32) @ heads[point.weight].T + heads[point.bias] for point in artifact.plan.exits]
    outputs = Outputs(np.stack([*logits, memory.logits.astype(np.float32)]), memory.labels.astype(np.int64), mask=artifact.plan.mask(None))
    return Evidence(outputs, None, _temperatures(artifact, profile, outputs), are_those_calibrated_on=True)


def answered(
    artifact: Artifact, samples: Samples, profile: Profile | None, *, engine: str = "auto", threads: int = 1, progress: Progress = silent
) -> Evidence:
    """What every exit says of these samples now."""
    session = Session(artifact, engine=engine, profile=NO_PROFILE, threads=threads)
    skip = profile.skip if profile is not None and artifact.plan.skips else None
    outputs = replace(record_outputs(artifact, samples, skip=skip, progress=progress, session=session), features={})
    are_the_same = profile is None or profile.data == samples.identity()
    return Evidence(outputs, samples, _temperatures(artifact, profile, outputs), are_the_same)


def _temperatures(artifact: Artifact, profile: Profile | None, outputs: Outputs) -> NDArray[np.float64]:
    if profile is None:
        return np.array([fit_temperature(logits, outputs.labels) for logits in outputs.logits])
    return np.array([profile.exits[name].temperature for name in artifact.plan.exit_names if name != FINAL] + [profile.final_temperature])


def only(outputs: Outputs, exits: Sequence[int]) -> Outputs:
    """The same with these early exits alone, and the network's own."""
    return replace(outputs, logits=outputs.logits[[*exits, len(outputs.logits) - 1]])
