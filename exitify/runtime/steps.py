"""What a run goes through: stretches and the decision after each, as a profile's exits, its mask and its policy have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from exitify.artifact.manifest import ExitSetting, Policy
from exitify.plan import Mask, Stretch
from exitify.runtime.deadlines import StretchTimes
from exitify.runtime.engines.base import Array, Bound, Runner
from exitify.runtime.policies import Scorer, State


@dataclass(frozen=True)
class Rule:
    """How exits decide, whichever of them are run.

    profile: Its name, empty for none. settings: By exit; one that is not there, or not enabled, is never taken.
    final_temperature: Divides the network's own logits. quantiles: By exit, empty for none.
    """

    profile: str = ""
    policy: Policy = "top1"
    settings: Mapping[str, ExitSetting] = field(default_factory=dict)
    final_temperature: float = 1.0
    quantiles: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A stretch and the decision after it.

    is_last: Whether the run ends here, whatever its scores. decides: Whether the policy looks at it.
    times: What deadlines know of the stretch, the same for all that run it.
    """

    stretch: Stretch
    runner: Runner
    logits: str
    scores: str
    is_last: bool
    decides: bool
    threshold: float
    temperature: float
    gate: tuple[float, ...]
    quantile: float | None
    macs: int
    times: StretchTimes

    def run(self, values: Mapping[str, Array], parameters: Mapping[str, Array]) -> dict[str, Array]:
        """The stretch's outputs, of values and parameters among which are its own."""
        given = {name: values[name] for name in self.stretch.inputs}
        return self.runner({**given, **{name: parameters[name] for name in self.stretch.parameters}})


@dataclass(frozen=True)
class Setup:
    """Everything that follows from a rule.

    mask: The skip paths that are left out. exits: Names of those that are run. parameters: What their heads take.
    column: Which score is held against the thresholds as it is. score: What makes one where none is.
    only: The one exit that is run, and taken; empty where the rule decides.
    """

    mask: Mask
    exits: tuple[str, ...]
    steps: tuple[Step, ...]
    parameters: dict[str, Array]
    rule: Rule
    column: int
    score: Scorer | None
    only: str = ""

    def sureness(self, step: Step, bound: Bound, state: State) -> tuple[float, State]:
        """What the policy makes of a step that has run; NaN at an exit that its rule gives no gate."""
        scores = bound.value(step.scores)
        if self.score is None:
            return scores.item(self.column), state
        if not step.gate and self.rule.policy in ("gates", "jei"):
            return math.nan, state
        return self.score(scores, bound.value(step.logits), step.gate, state)
