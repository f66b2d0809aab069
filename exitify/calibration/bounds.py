"""What a sample of losses proves of their mean: three bounds, each as a p-value and as an upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from exitify.errors import CalibrationError

Bound = Literal["clopper-pearson", "bentkus", "betting"]
"""`clopper-pearson` is exact, and for losses of 0 and 1 alone; the others take any losses within known ends."""

BOUNDS: tuple[Bound, ...] = get_args(Bound)

MOST_STAKED = 0.75
"""Of all that is staked on one sample at most this share can be lost (Waudby-Smith and Ramdas name 1/2 and 3/4)."""

MOST_SAMPLES = 2**21
"""Where even more are needed, at least these are."""


def p_value(losses: NDArray[Any], rate: float, bound: Bound, *, confidence: float = 0.95, least: float = 0.0) -> float:
    """How likely losses as small as these are, at most, if their mean is `rate` or more.

    Args:
        losses: `(N,)`, drawn independently, each in `[least, 1]`.
        rate: In `(least, 1)`. bound: Which.
        confidence: What the betting bound sizes its stakes for; it is a p-value at any.
        least: The smallest that a loss can be: -1 where an answer may also be better than the network's.

    Raises:
        CalibrationError: the Clopper-Pearson bound, and losses other than 0 and 1.
    """
    span = 1.0 - least
    unit, unit_rate = (np.asarray(losses, np.float64) - least) / span, (rate - least) / span
    if not len(unit) or unit_rate <= 0.0:
        return 1.0
    return _P_VALUES[bound](unit, min(unit_rate, 1.0), confidence)


def mean_bound(losses: NDArray[Any], bound: Bound, *, confidence: float, least: float = 0.0) -> float:
    """With `confidence`, the true mean is at most this: the smallest rate whose p-value is 1 - confidence or less.

    Args:
        losses: `(N,)`, in the order drawn, which the betting bound depends on. bound, least: As for `p_value`.
    """

    def is_proven(rate: float) -> bool:
        return p_value(losses, rate, bound, confidence=confidence, least=least) <= 1.0 - confidence

    return _smallest(is_proven, least) if is_proven(1.0) else 1.0


def samples_needed(rate: float, confidence: float, bound: Bound = "clopper-pearson", *, least: float = 0.0) -> int:
    """The fewest samples, all with a loss of 0, from which on so many prove `rate` at `confidence`.

    Args:
        bound, least: As for `p_value`.
    """
    if least == 0.0 and bound != "betting":  # (1 - rate)^n for both
        return math.ceil(math.log(1.0 - confidence) / math.log1p(-rate))
    few, enough = 0, 1
    while enough < MOST_SAMPLES and not _proves_without_loss(enough, rate, confidence, bound, least):
        few, enough = enough, 2 * enough
    if enough >= MOST_SAMPLES:
        return enough
    while enough - few > 1:
        middle = (few + enough) // 2
        if _proves_without_loss(middle, rate, confidence, bound, least):
            enough = middle
        else:
            few = middle
    return enough


def least_rate(samples: int, confidence: float, bound: Bound = "clopper-pearson", *, least: float = 0.0) -> float:
    """The smallest rate that so many samples can prove at `confidence`: what they prove when all have a loss of 0."""
    return mean_bound(np.zeros(samples), bound, confidence=confidence, least=least)


def _proves_without_loss(samples: int, rate: float, confidence: float, bound: Bound, least: float) -> bool:
    """Whether so many do and one more does: Bentkus's bound rounds sums up, and is blunter for odd numbers of halves."""
    return all(p_value(np.zeros(count), rate, bound, confidence=confidence, least=least) <= 1.0 - confidence for count in (samples, samples + 1))


# --- Clopper-Pearson ------------------------------------------------------------------------------------------------


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """P(X <= successes) for X binomial with `trials` and `rate`, exactly (sums of logarithms)."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 1.0 if successes >= trials else 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    i = np.arange(1, min(successes, trials) + 1)
    terms = np.append(0.0, np.cumsum(np.log((trials - i + 1) / i) + (log_rate - log_rest)))
    top = float(terms.max())
    total = trials * log_rest + top + math.log(float(np.exp(terms - top).sum()))
    return math.exp(min(total, 0.0))


def upper_bound(successes: int, trials: int, confidence: float) -> float:
    """The one-sided Clopper-Pearson bound: with `confidence`, the true rate is at most this.

    Args:
        successes: How often it happened. trials: In how many samples. confidence: 0.95 for instance.

    Source: Clopper and Pearson 1934.
    """
    if successes >= trials:
        return 1.0
    return _smallest(lambda rate: binomial_tail(successes, trials, rate) <= 1.0 - confidence, 0.0)


def _smallest(is_proven: Callable[[float], bool], low: float) -> float:
    """The smallest rate from which on all up to 1 are proven."""
    high = 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_proven(middle) else (middle, high)
    return high


def _clopper_pearson(losses: NDArray[np.float64], rate: float, confidence: float) -> float:
    if not np.isin(losses, (0.0, 1.0)).all():
        raise CalibrationError(
            "the Clopper-Pearson bound is one on how often something happens, and a loss here is neither 0 nor 1", "give --bound betting"
        )
    return binomial_tail(round(float(losses.sum())), len(losses), rate)


# --- Hoeffding and Bentkus ------------------------------------------------------------------------------------------


def _bentkus(losses: NDArray[np.float64], rate: float, confidence: float) -> float:
    """The smaller of Hoeffding's exp(-n h(mean, rate)), h the divergence of two coins, and Bentkus's e P(X <= ceil(n mean)).

    Source: Bates et al. 2021, arXiv:2101.02703, section 3.1.2; as a p-value Angelopoulos et al. 2021, arXiv:2110.01052, section 3.
    """
    count, mean = len(losses), min(float(losses.mean()), rate)
    hoeffding = math.exp(-count * _divergence(mean, rate))
    return min(1.0, hoeffding, math.e * binomial_tail(math.ceil(float(losses.sum()) - 1e-9), count, rate))


def _divergence(first: float, second: float) -> float:
    """Kullback-Leibler divergence of two coins, first <= second, in nats."""
    if first == second:
        return 0.0
    if second >= 1.0:
        return math.inf
    heads = first * math.log(first / second) if first > 0.0 else 0.0
    return heads + (1.0 - first) * math.log((1.0 - first) / (1.0 - second))


# --- betting --------------------------------------------------------------------------------------------------------


def _betting(losses: NDArray[np.float64], rate: float, confidence: float) -> float:
    """One over the most that somebody's money became who bet, sample by sample, that losses are smaller than `rate`.

    If the mean is `rate` or more, the money is a supermartingale: it becomes k times as much at any time with a chance of 1/k at most
    (Ville). The stake before each sample is the one that pays best for losses of the variance seen so far.

    Source: Waudby-Smith and Ramdas 2024, arXiv:2010.09686, equations 24 to 26 with all of the money on one side; stakes for a fixed
    number of samples.
    """
    count = len(losses)
    seen = np.arange(1, count + 1)
    means = (0.5 + np.cumsum(losses)) / (seen + 1)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (seen + 1)
    before = np.append(0.25, variances[:-1])
    stakes = np.sqrt(2.0 * math.log(1.0 / (1.0 - confidence)) / (count * before))
    if rate < 1.0:
        stakes = np.minimum(stakes, MOST_STAKED / (1.0 - rate))
    money = np.cumsum(np.log1p(stakes * (rate - losses)))
    return math.exp(-max(0.0, float(money.max())))


_P_VALUES: dict[Bound, Callable[[NDArray[np.float64], float, float], float]] = {
    "clopper-pearson": _clopper_pearson,
    "bentkus": _bentkus,
    "betting": _betting,
}
