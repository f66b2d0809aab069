"""A network that exists only as numbers: what its exits say of samples drawn from a population, and what they cost."""

from __future__ import annotations

import numpy as np

from exitify.artifact.manifest import Policy
from exitify.calibration.calibrate import Gates, Outputs, Settings
from exitify.calibration.thresholds import NEVER, exits_taken
from exitify.plan import SCORES, Cost, ExitPoint, HeadSpec, Plan, Segment, Value

CLASSES = 10
HEAD_MACS = 1_000_000


def plan(*reached: int) -> Plan:
    """A network of 100 M multiply-adds with an exit after each of these many millions; a head costs one more."""
    exits, segments, values = [], [], {"x": Value((3, 8, 8), "float32"), "scores": Value((CLASSES,), "float32")}
    before, done = "x", 0
    for number, millions in enumerate(reached, 1):
        point = ExitPoint(f"exit{number}", f"v{number}", f"stage{number}", HeadSpec("linear", "nchw", (16, 8, 8), 1, 16, CLASSES))
        values |= {point.after: Value((16, 8, 8), "float32"), point.logits: Value((CLASSES,), "float32")}
        values |= {point.features: Value((16,), "float32"), point.scores: Value((len(SCORES),), "float32")}
        outputs, parameters = (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
        segments.append(Segment(f"trunk_{point.name}", "trunk", (point.after,), (before,), (point.after,), (), Cost(10**6 * (millions - done))))
        segments.append(Segment(f"head_{point.name}", "head", (point.name,), (point.after,), outputs, parameters, Cost(HEAD_MACS)))
        exits.append(point)
        before, done = point.after, millions
    segments.append(Segment("trunk_final", "trunk", ("last",), (before,), ("scores",), (), Cost(10**6 * (100 - done))))
    made = Plan("x", "scores", tuple(exits), tuple(segments), values)
    made.check()
    return made


PLAN = plan(25, 50)


def population(seed: int, samples: int, skills: tuple[float, ...] = (1.6, 2.4, 3.4)) -> Outputs:
    """What exits of these skills say, the network's own answer last: noise that they partly share, over the label's logit.

    With the skills as they stand the exits are right on 54 % and 76 % of the samples, the network on 91 %.
    """
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, samples)
    shared, own = generator.normal(size=(samples, CLASSES)), generator.normal(size=(len(skills), samples, CLASSES))
    ease = generator.uniform(0.6, 1.4, samples)
    signal = np.zeros((samples, CLASSES))
    signal[np.arange(samples), labels] = ease
    logits = np.array(skills)[:, None, None] * signal + np.sqrt(0.5) * shared + np.sqrt(0.5) * own
    return Outputs(1.5 * logits.astype(np.float32), labels.astype(np.int64), "simulated")


def taken(outputs: Outputs, settings: Settings, policy: Policy = "top1", gates: Gates = ()) -> np.ndarray:
    """Which exit each sample leaves at, the network's own the last number."""
    return exits_taken(outputs.confidence(settings.temperatures, policy, gates), settings.thresholds)


def drop(outputs: Outputs, settings: Settings) -> float:
    """Accuracy lost against the full network."""
    right = outputs.logits.argmax(axis=2) == outputs.labels
    return float(right[-1].mean() - right[taken(outputs, settings), np.arange(len(outputs.labels))].mean())


def disagreement(outputs: Outputs, settings: Settings) -> float:
    """Share of the samples on which the full network says something else."""
    answers = outputs.logits.argmax(axis=2)
    return float((answers[taken(outputs, settings), np.arange(len(outputs.labels))] != answers[-1]).mean())


def mean_macs(outputs: Outputs, settings: Settings, network: Plan = PLAN) -> float:
    """Multiply-adds a sample, as a share of the full network's, by adding up what is run."""
    spent, at_exit = 0, []
    trunks = [segment for segment in network.segments if segment.kind == "trunk"]
    for number, trunk in enumerate(trunks):
        spent += trunk.cost.macs
        if number < len(settings.thresholds) and settings.thresholds[number] < NEVER:
            spent += HEAD_MACS
        at_exit.append(spent)
    return float(np.array(at_exit)[taken(outputs, settings)].mean()) / sum(trunk.cost.macs for trunk in trunks)
