"""How sure an exit is: what each policy makes of a head's four numbers, and of what the exits before it said.

Every policy is a score, higher is surer: an exit is taken when its score reaches its threshold. Each stands here twice: over many samples
(`score`, for batches and calibration), and for one sample in plain numbers (`scorer`), since a call of NumPy takes longer than the whole
decision. Class means (E2CM) are no policy: they are a linear head, and its probabilities are scored like any other's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import Policy
from exitify.plan import SCORES

Floats = NDArray[np.float64]
Array = NDArray[Any]
LOOKING_BACK: frozenset[Policy] = frozenset({"patience", "jei"})
"""Policies whose score depends on what the exits before said."""
NEVER = -math.inf
"""The score of an exit that is not sure at all: no threshold is below it."""


@dataclass(frozen=True)
class History:
    """What the exits of a run have said so far of N samples; what a policy does not look back at stays as it is.

    labels: `(N,)`, the last exit's. agreed: `(N,)`, how many exits in a row, the last among them, gave it.
    spent: `(N,)`, the sum of the gates.
    """

    labels: NDArray[np.int64]
    agreed: NDArray[np.int64]
    spent: Floats

    @classmethod
    def empty(cls, samples: int) -> History:
        """Before the first exit."""
        return cls(np.full(samples, -1), np.zeros(samples, np.int64), np.zeros(samples))

    def rows(self, keep: Array) -> History:
        """The history of these samples alone; `keep` is a mask or indices."""
        return History(self.labels[keep], self.agreed[keep], self.spent[keep])

    def put(self, rows: Array, other: History) -> None:
        """Let the history of these samples be another."""
        self.labels[rows], self.agreed[rows], self.spent[rows] = other.labels, other.agreed, other.spent


def softmax(logits: Array, temperature: float = 1.0) -> Floats:
    """Probabilities `(…, classes)` of logits at a temperature, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def from_logits(logits: Array, temperature: float = 1.0) -> Floats:
    """A head's scores `(…, 4)`, as `exitify.plan.SCORES` names them, of its logits `(…, classes)`: what its graph computes, in float64."""
    p = softmax(logits, temperature)
    squares = p * p
    q = squares / squares.sum(axis=-1, keepdims=True)
    top = np.partition(p, -2, axis=-1)[..., -2:] if p.shape[-1] > 1 else np.concatenate([np.zeros_like(p), p], axis=-1)
    return np.stack([top[..., 1], _entropy_of(p), top[..., 1] - top[..., 0], _entropy_of(q)], axis=-1)


def _entropy_of(p: Floats) -> Floats:
    """In nats, over the last dimension; p log p is 0 where p is."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))


def similarity(p: Array, key: Array) -> Any:
    """What two distributions `(…, classes)` have in common, in [0, 1]: 1 - half their L1 distance, exactly 1 where they are the same."""
    return 1 - 0.5 * np.abs(p - key).sum(axis=-1)


def gate_openness(scores: Array, gate: Sequence[float]) -> Floats:
    """A gate's g in (0, 1), `(…,)`, of scores `(…, 4)`: sigmoid(gate · [scores, 1]) (Regol et al. 2024, JEI-DNN)."""
    logit = np.asarray(scores, np.float64) @ np.asarray(gate[:-1], np.float64) + gate[-1]
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logit))  # the sigmoid, with nothing that overflows


def score(policy: Policy, scores: Array, labels: Array, gate: Sequence[float] = (), history: History | None = None) -> tuple[Floats, History]:
    """How sure one exit is of N samples, and what the next exit must know.

    - `top1`, `margin`: as they are. `entropy`, `renyi_entropy`: with the sign turned.
    - `patience`: how many exits in a row, ending here, gave this label: 1, 2, … (Zhou et al. 2020, PABEE).
    - `gates`: this exit's own gate, g.
    - `jei`: P(E), the probability of leaving here for a sample that comes here. With P_l = max(0, min(g_l, 1 - Σ_{j<l} g_j)) it is
      P_l / Π_{j<l} (1 - P(E_j)) (Regol et al. 2024), and that product is 1 - Σ_{j<l} g_j as long as this is positive. Once the gates
      have added up to 1, no sample comes any further, and the score is 0.
    - `temporal`: a sample alone holds nothing: `NEVER`. In a stream it is `similarity`.

    Args:
        scores: `(N, 4)`, as `exitify.plan.SCORES` names them. labels: `(N,)`, this exit's.
        gate: Four weights and a bias, for `gates` and `jei`.
        history: Of the exits run before; None at the first.

    Returns:
        Scores `(N,)`, and the history with this exit.
    """
    scores = np.asarray(scores, np.float64)
    before = history or History.empty(len(scores))
    if policy in ("top1", "margin"):
        return scores[:, SCORES.index(policy)], before
    if policy in ("entropy", "renyi_entropy"):
        return -scores[:, SCORES.index(policy)], before
    if policy == "patience":
        agreed = np.where(labels == before.labels, before.agreed + 1, 1)
        return agreed.astype(np.float64), History(np.asarray(labels, np.int64), agreed, before.spent)
    if policy == "temporal":
        return np.full(len(scores), NEVER), before
    g = gate_openness(scores, gate)
    if policy == "gates":
        return g, before
    left = 1 - before.spent
    leaving = np.where(left > 0, np.minimum(g, left) / np.where(left > 0, left, 1.0), 0.0)
    return leaving, History(before.labels, before.agreed, before.spent + g)


def score_run(policy: Policy, scores: Array, labels: Array, gates: Sequence[Sequence[float]] = ()) -> Floats:
    """How sure each of K exits is of N samples, `(K, N)`, when just these exits are run, in this order.

    Args:
        scores: `(K, N, 4)`. labels: `(K, N)`. gates: One an exit, for `gates` and `jei`.
    """
    history, found = None, np.empty(np.shape(scores)[:2])
    for index, (row, label) in enumerate(zip(scores, labels)):
        found[index], history = score(policy, row, label, gates[index] if gates else (), history)
    return found


# --- one sample -----------------------------------------------------------------------------------------------------

State = tuple[float, float]
"""What the next exit must know of one sample; each policy has its own two numbers. `BEFORE` is that of the first."""
BEFORE: State = (-1.0, 0.0)
Scorer = Callable[[Array, Array, Sequence[float], State], tuple[float, State]]
"""Of scores `(1, 4)`, logits `(1, classes)`, the exit's gate and what came before: the score, and what comes after."""


def scorer(policy: Policy) -> Scorer | None:
    """The policy's `score` for one sample; None where the score is a column of a head's scores as it is."""
    return _SCORERS[policy]


def _entropy(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    return -scores.item(1), state


def _renyi_entropy(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    return -scores.item(3), state


def _patience(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    label = float(logits.argmax())
    last, agreed = state
    agreed = agreed + 1 if label == last else 1.0
    return agreed, (label, agreed)


def _gates(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    return _openness(scores, gate), state


def _jei(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    g, (unused, spent) = _openness(scores, gate), state
    left = 1 - spent
    return min(g, left) / left if left > 0 else 0.0, (unused, spent + g)


def _temporal(scores: Array, logits: Array, gate: Sequence[float], state: State) -> tuple[float, State]:
    return NEVER, state


def _openness(scores: Array, gate: Sequence[float]) -> float:
    (top1, entropy, margin, renyi_entropy), (a, b, c, d, bias) = scores.tolist()[0], gate
    return 0.5 + 0.5 * math.tanh(0.5 * (a * top1 + b * entropy + c * margin + d * renyi_entropy + bias))


_SCORERS: dict[str, Scorer | None] = {
    "top1": None,
    "margin": None,
    "entropy": _entropy,
    "renyi_entropy": _renyi_entropy,
    "patience": _patience,
    "gates": _gates,
    "jei": _jei,
    "temporal": _temporal,
}


FEW = 32
"""Up to so many classes plain numbers are faster than calls of NumPy."""


def one_softmax(logits: Array, temperature: float) -> Array | list[float]:
    """As `softmax`, of one sample's logits `(classes,)`."""
    if len(logits) > FEW:
        return softmax(logits, temperature)
    values: list[float] = logits.tolist()
    largest = max(values)
    powers = [math.exp((value - largest) / temperature) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def one_similarity(p: Array | list[float], key: Array | list[float]) -> float:
    """As `similarity`, of what `one_softmax` returned."""
    if isinstance(p, list):
        return 1 - 0.5 * sum([abs(one - other) for one, other in zip(p, key)])
    return 1 - 0.5 * float(np.abs(p - key).sum())
