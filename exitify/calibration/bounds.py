"""Upper bounds on a rate from a sample of it."""

from __future__ import annotations

import math


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """P(X <= successes) for X binomial with `trials` and `rate`, exactly (sums of logarithms)."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 1.0 if successes >= trials else 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    term = trials * log_rest
    total = term
    for i in range(1, successes + 1):
        term += math.log((trials - i + 1) / i) + log_rate - log_rest
        total = max(total, term) + math.log1p(math.exp(-abs(total - term)))
    return min(1.0, math.exp(total))


def upper_bound(successes: int, trials: int, confidence: float) -> float:
    """The one-sided Clopper-Pearson bound: with `confidence`, the true rate is at most this.

    Args:
        successes: How often it happened. trials: In how many samples. confidence: 0.95 for instance.

    Source: Clopper and Pearson 1934.
    """
    if successes >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if binomial_tail(successes, trials, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def samples_needed(rate: float, confidence: float) -> int:
    """The fewest samples, without a single failure among them, that prove `rate` at `confidence`."""
    return math.ceil(math.log(1.0 - confidence) / math.log1p(-rate))
