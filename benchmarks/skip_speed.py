"""What leaving out saves, and what being able to costs: masks against the same network untransformed, same engine, in turn.

    exitify transform torchvision:resnet50 --exits none -o plain.exitify
    exitify transform torchvision:resnet50 --exits none --skips auto -o skips.exitify
    python -m benchmarks.skip_speed plain.exitify skips.exitify --engine onnxruntime tvm

Batch 1, one thread, buffers bound once, several loads of each. Prints the sizes of both artifacts; each mask's time over the
untransformed network's, with the network's own time; and how long the first answer under a new mask takes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.lower.pipeline import compile_artifact
from exitify.plan import FINAL, mask_text
from exitify.runtime.session import Session
from exitify.targets import load_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("skips", type=Path)
    parser.add_argument("--engine", nargs="+", default=["onnxruntime"])
    parser.add_argument("--masks", nargs="*", help="By default all; for instance 0000 1111")
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="Of timing, a load.")
    options = parser.parse_args()
    sizes = [path.stat().st_size for path in (options.plain, options.skips)]
    print(f"size {sizes[0]} bytes without skip paths, {sizes[1]} with: {sizes[1] / sizes[0] - 1:+.3%}")
    artifacts = [Artifact.open(path) for path in (options.plain, options.skips)]
    for engine in options.engine:
        if engine == "tvm":
            artifacts = [compile_artifact(artifact, load_target("host")) for artifact in artifacts]
        compare(*artifacts, engine, options)


def compare(plain: Artifact, skips: Artifact, engine: str, options: argparse.Namespace) -> None:
    """Print each mask's time over the plain network's, medians over loads."""
    plan = skips.plan
    masks = options.masks or [mask_text(mask) for mask in itertools.product((False, True), repeat=len(plan.skips))]
    x = np.random.default_rng(0).standard_normal((1, *plain.manifest.input.shape)).astype(np.float32)
    ratios: dict[str, list[float]] = {mask: [] for mask in masks}
    own, first = [], []
    for _ in range(options.loads):
        sessions = [Session(artifact, engine=engine, profile=NO_PROFILE) for artifact in (plain, skips)]
        sessions[1].run(x)
        for mask in masks[1:]:
            started = time.perf_counter()
            sessions[1].run(x, mask)
            first.append((time.perf_counter() - started) * 1e3)
        times: dict[str, list[float]] = {mask: [] for mask in ("plain", *masks)}
        ends = time.perf_counter() + options.seconds
        while time.perf_counter() < ends:
            for mask in times:
                session, chosen = (sessions[0], None) if mask == "plain" else (sessions[1], mask)
                session.run(x, chosen)
                started = time.perf_counter()
                session.run(x, chosen)
                times[mask].append((time.perf_counter() - started) * 1e3)
        middle = {mask: float(np.median(found)) for mask, found in times.items()}
        own.append(middle["plain"])
        for mask in masks:
            ratios[mask].append(middle[mask] / middle["plain"])
    print(f"{engine}: untransformed {np.median(own):.3f} ms; first answer under a new mask {np.median(first):.1f} ms (at most {max(first):.1f})")
    for mask, found in ratios.items():
        share = plan.macs_at((), mask)[FINAL] / plan.full_macs
        print(
            f"  {mask}: {share:.3f} of the multiply-adds, time {np.median(found):.3f} ({min(found):.3f} to {max(found):.3f} over {len(found)} loads)"
        )


if __name__ == "__main__":
    main()
