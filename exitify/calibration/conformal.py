"""Sets of classes that hold the true one as often as promised: split conformal prediction at every exit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import Conformal
from exitify.errors import CalibrationError

Kind = Literal["general", "per_exit", "strict", "gated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FEWEST = 20
"""Samples at an exit below which `gated` does not trust its own quantile (Regol et al. 2024, section 5)."""

WHOLE_SET = 1.0
"""The quantile whose sets hold every class."""

ROUNDING = 1e-6
"""Added to quantiles: a device computes in float32, and a sample at the quantile belongs to its own set."""


def samples_needed(alpha: float) -> int:
    """The fewest samples whose quantile is less than the whole set: of fewer than 1/alpha - 1 no one is so rare."""
    return math.ceil(1.0 / alpha - 1e-9) - 1


def quantile(scores: NDArray[np.float64], alpha: float) -> float:
    """The score that so many more samples' scores exceed with a chance of at most alpha: at ceil((N + 1)(1 - alpha)) / N, no interpolation.

    That is the ceil((N + 1)(1 - alpha))-th smallest; of none, or too few for alpha, the whole set. (NumPy's quantile with the method
    `higher`, as public codes call it, is the one after.)

    Source: Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv:2107.07511, section 1.
    """
    count = len(scores)
    rank = math.ceil((count + 1) * (1.0 - alpha) - 1e-9)
    return float(np.partition(scores, rank - 1)[rank - 1]) if 0 < rank <= count else WHOLE_SET


def conformal_quantiles(scores: NDArray[np.float64], taken: NDArray[np.integer], alpha: float, kind: Kind) -> NDArray[np.float64]:
    """Return each exit's quantile, `(K + 1,)`.

    - `general`: one for all, of every sample at the exit that it takes. Sets hold the true class with 1 - alpha over all answers.
    - `strict`: each exit's own, of the samples that leave there. They do so over the answers of each exit.
    - `gated`: as `strict`, but `general` for an exit where fewer than 20 samples leave, or too few for alpha.
    - `per_exit`: each exit's own, of all samples, whether they leave there or not: for answers of one exit whatever it says of itself
      (a deadline, a fixed exit). Under thresholds those that leave are others than those that it was measured on.

    Where nothing was measured the set is whole: the paper has quantile 0 there, whose set is empty and never holds the true class.

    Args:
        scores: `(K + 1, N)`, 1 - p(true class) at each exit, the network's own last, of samples that neither temperatures nor
            thresholds were found on. taken: `(N,)`, the exit that each leaves at.

    Source: Regol et al. 2024 (JEI-DNN), section 5.
    """
    everyone = np.arange(len(taken))
    if kind == "general":
        return np.full(len(scores), quantile(scores[taken, everyone], alpha))
    if kind == "per_exit":
        return np.array([quantile(row, alpha) for row in scores])
    leaves = [taken == k for k in range(len(scores))]
    strict = np.array([quantile(row[here], alpha) for row, here in zip(scores, leaves)])
    if kind == "strict":
        return strict
    enough = np.array([here.sum() >= max(FEWEST, samples_needed(alpha)) for here in leaves])
    return np.where(enough, strict, quantile(scores[taken, everyone], alpha))


def fit_conformal(
    probabilities: NDArray[np.float64], labels: NDArray[np.integer], taken: NDArray[np.integer], names: Sequence[str], alpha: float, kind: Kind
) -> Conformal:
    """Return what a profile holds of prediction sets.

    Args:
        probabilities: `(K + 1, N, classes)`, each exit's at its temperature. labels, taken: `(N,)`. names: Of the exits, `final` last.

    Raises:
        CalibrationError: so few samples that no set could leave out a class.
    """
    require_enough(len(labels), alpha)
    true = np.take_along_axis(probabilities, labels[None, :, None].astype(np.intp), axis=2)[..., 0]
    found = np.minimum(conformal_quantiles(1.0 - true, taken, alpha, kind) + ROUNDING, WHOLE_SET)
    return Conformal(alpha, kind, dict(zip(names, found.tolist())), len(labels))


def require_enough(samples: int, alpha: float, share: float = 1.0) -> None:
    """Refuse too few samples for prediction sets, and an alpha that is none.

    Args:
        samples: That quantiles would rest on. share: What part of those given that is, for the hint.

    Raises:
        CalibrationError: either.
    """
    if not 0.0 < alpha < 1.0:
        raise CalibrationError(f"--prediction-sets {alpha:g} is no share of answers in (0, 1)", "0.05: at most 5 % of the sets miss the true class")
    if samples < samples_needed(alpha):
        raise CalibrationError(
            f"{samples} samples are too few for prediction sets that miss the true class in {alpha:g} of the answers",
            f"they need {samples_needed(alpha)} of their own: give at least {math.ceil(samples_needed(alpha) / share)} in all, or a larger share",
        )


def prediction_sets(probabilities: NDArray[np.floating], quantile: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which classes are in each set, `(..., classes)`: those of probability 1 - quantile or more."""
    return np.asarray(probabilities >= 1.0 - quantile)
