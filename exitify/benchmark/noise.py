"""How sure a ratio of times is: what the same command, run again, would find.

The machine drifts: clocks, heat and neighbours change over seconds and slow every contender alike. Each sample is therefore answered by all
contenders in turn, and only ratios of means over blocks of samples are looked at. What is left comes in two kinds. Within a round, blocks differ:
by interruptions, and for a network with exits by what its samples cost, which is why every block is given the same mix. Between rounds, in which
every contender is loaded anew, ratios differ as a whole: weights and buffers land elsewhere in memory, and a network is a percent faster or
slower for as long as it is loaded. Blocks never see the second kind, however many there are; rounds do, and so does the untransformed network
against itself, loaded twice (A/A).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 50
"""Samples whose mean is one observation: enough that a block's mean hides the clock's grain and most of what single samples differ by."""
CONFIDENCE = 0.95

_NORMAL = 1.959964
_STUDENT = (12.70620, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""Two-sided 95 % points of Student's t with 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Comparison:
    """A contender's time over the untransformed network's.

    ratio: The median of the rounds' ratios, each of which is the median over blocks.
    interval: That holds such a median at 95 %, over the blocks of all rounds, what rounds differ by as a whole taken out; see `median_interval`.
    rounds: Each round's ratio.
    noise: A share of the ratio: see `compare`.
    """

    ratio: float
    interval: tuple[float, float]
    rounds: tuple[float, ...]
    noise: float


def compare(times: NDArray[np.float64], baseline: NDArray[np.float64], again: NDArray[np.float64]) -> Comparison:
    """How long a contender takes, as a share of the untransformed network's time, and how far a repeated run may be from that.

    The noise is stated such that the ratio that the same command finds when it is run again on this machine lies between
    `ratio / (1 + noise)` and `ratio * (1 + noise)` in 95 of 100 runs or more. It is the largest of three, in logarithms of ratios:

    1. What two runs differ by. A run's ratio is the median of its R rounds, which a disturbed round does not move; it spreads by up to
       `sqrt(pi / 2)` times as much as a mean would, so the difference of two runs has a standard deviation of `s * sqrt(pi / R)`, s being that
       of a round's ratio. s is known twice: from this contender's rounds (R - 1 degrees of freedom), and from the A/A ratios, whose mean
       should be 0 (R degrees). Each is multiplied by Student's t for its degrees, and the larger product counts: of few rounds either may
       be small by luck, and what is alike (A/A) may be disturbed less than what is not.
    2. The interval of the median over blocks.
    3. The A/A ratio of this run: nothing smaller can be told from no difference.

    One round knows s from a single A/A ratio, and its noise is accordingly wide. Five are where more begin to bring little: t is 12.7, 4.3, 3.2,
    2.8 for two to five.

    Args:
        times: float64 `(rounds, samples)`, the contender's, in any unit of time, above 0; a round's samples are the same in the same order.
        baseline: The untransformed network's, taken in turn with them.
        again: Those of the untransformed network's second copy.
    """
    blocks = _block_ratios(times, baseline)
    of_rounds = np.median(blocks, 1)
    aa_of_rounds = np.median(_block_ratios(again, baseline), 1)
    middle = float(np.median(of_rounds))
    low, high = (middle + end for end in median_interval((blocks - of_rounds[:, None]).ravel()))
    rounds = len(times)
    own = student(rounds - 1) * float(of_rounds.std(ddof=1)) if rounds > 1 else 0.0
    between_runs = max(own, student(rounds) * math.sqrt((aa_of_rounds**2).mean())) * math.sqrt((math.pi if rounds > 2 else 2) / rounds)
    noise = max(between_runs, middle - low, high - middle, abs(float(np.median(aa_of_rounds))))
    return Comparison(math.exp(middle), (math.exp(low), math.exp(high)), tuple(float(value) for value in np.exp(of_rounds)), math.expm1(noise))


def balanced_order(costs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """An order of samples in which every block holds the same mix of cheap and expensive ones, at random within it.

    Args:
        costs: `(samples,)`, of an answer; only their order matters.
    """
    count = _block_count(len(costs))
    ascending = np.lexsort((rng.random(len(costs)), costs))
    return np.concatenate([rng.permutation(ascending[block::count]) for block in range(count)])


def agree(first: float, second: float, noise: float) -> bool:
    """Whether the second of two runs' ratios lies within the noise that the first one states."""
    return abs(math.log(second / first)) <= math.log1p(noise)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The order statistics between which the median of what the values are drawn from lies at 95 %.

    The coverage is exact for any distribution, which a bootstrap's is not for a median of a dozen values; and it draws no random numbers.
    Fewer than six values cannot give 95 %: then it is the lowest and the highest, at `1 - 2 ** (1 - len(values))`.
    """
    count, ordered = len(values), np.sort(values)
    below, outside = 0.0, -1
    while below <= (1 - CONFIDENCE) / 2:  # the chance that at most so many values are below the median
        outside += 1
        below += math.comb(count, outside) / 2**count
    first = max(outside - 1, 0)
    return float(ordered[first]), float(ordered[count - 1 - first])


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t; beyond the table by its expansion about the normal's (Abramowitz and Stegun 26.7.5), to 2e-4."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _block_ratios(times: NDArray[np.float64], baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the ratios of means, `(rounds, blocks)`."""
    parts = np.array_split(np.arange(times.shape[1]), _block_count(times.shape[1]))
    return np.log(np.stack([times[:, part].mean(1) / baseline[:, part].mean(1) for part in parts], 1))


def _block_count(samples: int) -> int:
    return max(1, samples // BLOCK)
