"""Accuracy against cost: what other thresholds would give, each judged on samples that it was not found on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import Policy, SegmentTimes
from exitify.calibration.calibrate import LOOK_BACK, Gates, by_folds, excess_error, recorded_outputs
from exitify.calibration.segment_times import run_times
from exitify.calibration.thresholds import NEVER, exits_taken, price_path
from exitify.plan import Plan
from exitify.report.evidence import Evidence


@dataclass(frozen=True)
class Front:
    """Settings from the network without exits to the cheapest, `(S,)` each.

    macs: Mean cost, as a share of the full network's multiply-adds. ms: Mean milliseconds; None where segments were not timed.
    accuracy: Share of right answers. error: Standard error of its difference from the full network's.
    """

    macs: NDArray[np.float64]
    ms: NDArray[np.float64] | None
    accuracy: NDArray[np.float64]
    error: NDArray[np.float64]


def front(plan: Plan, evidence: Evidence, policy: Policy, gates: Gates = (), times: SegmentTimes | None = None, seed: int = 0) -> Front:
    """The settings that calibration would choose among on these samples.

    Each fifth of the samples is judged at thresholds that the other four would have at the same price of errors (see `cross_fit`).
    """
    outputs, temperatures = evidence.outputs, evidence.temperatures
    recorded = recorded_outputs(outputs, temperatures, plan, policy, excess_error(outputs, temperatures), gates=gates)
    right = outputs.logits.argmax(axis=2) == outputs.labels
    full_right = outputs.full.argmax(axis=1) == outputs.labels
    count, names = len(outputs.labels), [point.name for point in plan.exits]
    lost, macs, ms = [], [], []
    for fold, path in by_folds(recorded, LOOK_BACK.get(policy, price_path), seed):
        lost.append(np.empty((len(path), len(fold))))
        macs.append(np.empty((len(path), len(fold))))
        ms.append(np.empty((len(path), len(fold))))
        for step, thresholds in enumerate(path):
            taken = exits_taken(recorded.confidence[:, fold], thresholds)
            enabled = [name for name, threshold in zip(names, thresholds) if threshold < NEVER]
            lost[-1][step] = full_right[fold].astype(float) - right[taken, fold]
            macs[-1][step] = _of_exits(plan, plan.macs_at(enabled, outputs.mask or None))[taken] / plan.full_macs
            ms[-1][step] = _of_exits(plan, run_times(plan, times, enabled, outputs.mask))[taken] if times is not None else 0.0
    losses = np.concatenate(lost, axis=1)
    return Front(
        np.concatenate(macs, axis=1).mean(axis=1),
        np.concatenate(ms, axis=1).mean(axis=1) if times is not None else None,
        float(full_right.mean()) - losses.mean(axis=1),
        losses.std(axis=1) / np.sqrt(count),
    )


def _of_exits(plan: Plan, found: dict[str, int] | dict[str, float]) -> NDArray[np.float64]:
    return np.array([found.get(name, np.nan) for name in plan.exit_names], np.float64)
