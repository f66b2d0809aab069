"""Deciding after an exit takes at most 10 µs at 10 classes and 25 µs at 1,000, by every policy.

    python -m benchmarks.deciding

Pure decisions, as a session makes them, on what a head has said: nothing of the network runs. Class means have no row of their own: they
are a linear head, scored as any other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import get_args

import numpy as np

from exitify.artifact.manifest import Policy
from exitify.plan import SCORES
from exitify.runtime.policies import BEFORE, from_logits, one_similarity, one_softmax, scorer
from exitify.targets.processor import model_name

GATE = (1.5, -0.4, 0.8, 0.3, -1.6)
LIMITS = {10: 10.0, 1000: 25.0}


def median_us(decide: Callable[[], object], rounds: int, calls: int = 200) -> tuple[float, float]:
    """Median and 95th percentile of a call, in µs, over rounds of so many calls each."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter_ns()
        for _ in range(calls):
            decide()
        times.append((time.perf_counter_ns() - started) / calls / 1e3)
    return float(np.median(times)), float(np.percentile(times, 95))


def decision(policy: Policy, classes: int) -> Callable[[], object]:
    """What a session does after one exit."""
    generator = np.random.default_rng(0)
    logits, key = (generator.standard_normal((2, 1, classes)) * 3).astype(np.float32)
    scores = from_logits(logits).astype(np.float32)
    if policy == "temporal":
        before = one_softmax(key[0], 1.3)
        return lambda: one_similarity(one_softmax(logits[0], 1.3), before) >= 0.9
    score = scorer(policy)
    if score is None:
        column = SCORES.index(policy)
        return lambda: scores[0, column] >= 0.9
    return lambda: score(scores, logits, GATE, BEFORE)[0] >= 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    print(f"{model_name()}; median (95th percentile) µs of a decision, {rounds} rounds of 200")
    worst = dict.fromkeys(LIMITS, 0.0)
    for policy in get_args(Policy):
        cells = []
        for classes in LIMITS:
            middle, high = median_us(decision(policy, classes), rounds)
            worst[classes] = max(worst[classes], middle)
            cells.append(f"{classes} classes {middle:6.2f} ({high:6.2f})")
        print(f"  {policy:14}{'   '.join(cells)}")
    for classes, limit in LIMITS.items():
        print(f"{classes} classes: at most {worst[classes]:.2f} µs, {'within' if worst[classes] <= limit else 'OVER'} {limit:.0f}")


if __name__ == "__main__":
    main()
