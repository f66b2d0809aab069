"""Thresholds of which it is proven how much they lose: tested from the safest to the cheapest, until one fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from exitify.calibration.bounds import Bound, least_rate, mean_bound, p_value, samples_needed
from exitify.calibration.thresholds import Recorded, exits_taken, judge
from exitify.errors import CalibrationError

Risk = Literal["disagreement", "accuracy"]
"""What a promise is about: answers that differ from the full network's, or accuracy below the full network's."""

RISKS: tuple[Risk, ...] = get_args(Risk)

LEAST: dict[Risk, float] = {"disagreement": 0.0, "accuracy": -1.0}
"""The smallest loss of one sample: an early answer may be right where the full network is wrong."""

SHARPEST: dict[Risk, Bound] = {"disagreement": "clopper-pearson", "accuracy": "betting"}
"""The bound that stops earliest; docs/calibration.md compares them."""

SEARCH_SHARE = 0.4
"""Of a risk promise's samples, the share on which thresholds are searched; the bound is computed on the rest."""


@dataclass(frozen=True)
class Steps:
    """Settings in the order in which they are tested.

    thresholds: `(K,)` each. cost: `(S,)`, mean cost of each on the samples that it was found on.
    losses: `(S, N)`, what each loses on other samples, in the order drawn.
    """

    thresholds: Sequence[NDArray[np.float64]]
    cost: NDArray[np.float64]
    losses: NDArray[np.float64]


def to_test(path: Iterable[NDArray[np.float64]], found_on: Recorded, judged_on: Recorded) -> Steps:
    """Return the settings of a path as tests.

    Args:
        found_on, judged_on: Disjoint samples; the loss of the second is the one that the promise is about.
    """
    steps = list(path)
    everyone = np.arange(judged_on.loss.shape[1])
    losses = [judged_on.loss[exits_taken(judged_on.confidence, thresholds), everyone] for thresholds in steps]
    cost = np.array([judge(found_on, thresholds)[1] for thresholds in steps])
    return Steps(steps, cost, np.array(losses).reshape(len(steps), len(everyone)))


def proven(steps: Steps, rate: float, confidence: float, bound: Bound, risk_of: Risk) -> int:
    """How many settings, from the first on, are proven to lose no more than `rate`: all before the first that is not.

    Testing in an order that was fixed on other samples needs no correction for having looked at many.

    Source: fixed-sequence testing; Angelopoulos et al. 2021, arXiv:2110.01052, section 2.
    """
    for step, losses in enumerate(steps.losses):
        if p_value(losses, rate, bound, confidence=confidence, least=LEAST[risk_of]) > 1.0 - confidence:
            return step
    return len(steps.losses)


def best_provable(steps: Steps, confidence: float, bound: Bound, risk_of: Risk) -> float:
    """The rate that is proven of the first setting, which is the safest: no smaller one can be promised on these samples."""
    return mean_bound(steps.losses[0], bound, confidence=confidence, least=LEAST[risk_of])


def require_provable(samples: int, rate: float, confidence: float, bound: Bound, risk_of: Risk, *, share: float = 1.0) -> None:
    """Refuse a promise that so many samples could not prove if none of them lost anything, and a bound that cannot be of it.

    Args:
        share: What part of the samples given these are, for the hint.

    Raises:
        CalibrationError: either; says how many samples are needed, and the smallest rate that these could prove.
    """
    if risk_of == "accuracy" and bound == "clopper-pearson":
        raise CalibrationError(
            "the Clopper-Pearson bound is one on how often something happens, and accuracy also rises where an exit is right and the network is not",
            "give --bound betting, or --risk-of disagreement",
        )
    tested = samples - round(SEARCH_SHARE * samples)
    needed = samples_needed(rate, confidence, bound, least=LEAST[risk_of])
    if tested < needed:
        what = {"disagreement": "a disagreement", "accuracy": "a drop of accuracy"}[risk_of]
        smallest = least_rate(tested, confidence, bound, least=LEAST[risk_of])
        hint = "ask for less" if smallest >= 1.0 else f"the smallest rate that these could prove is {_rounded_up(smallest)}"
        enough = int(np.ceil(needed / (1 - SEARCH_SHARE)))
        raise CalibrationError(
            f"{samples} samples cannot prove {what} of at most {rate:g} at {confidence:g} by the {bound} bound",
            f"give at least {int(np.ceil(enough / share))}{' in all' if share < 1 else ''}; {hint}",
        )


def _rounded_up(rate: float) -> str:
    """Four digits that promise no more than can be kept."""
    return f"{np.ceil(rate * 1e4) / 1e4:.4g}"
