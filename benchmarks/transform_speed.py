"""How long `exitify.transform` takes (without export) as networks grow: at most 5 s at 1,000 graph nodes and 60 s at 10,000.

    python -m benchmarks.transform_speed --figure docs/figures/transform_speed.png

Residual networks of small convolutions, so that the time is the compiler's and not the network's; three exits and all skip paths.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import exitify

NODES = (100, 300, 1000, 3000, 10_000)
NODES_A_BLOCK = 7


class Block(nn.Module):
    """Seven nodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x).relu()


class Chain(nn.Module):
    """Blocks in a row, `(N, 3, H, W) -> (N, 10)`."""

    def __init__(self, blocks: int, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def measure(nodes: int) -> tuple[int, float, float]:
    """Nodes, seconds to capture, and seconds of the passes."""
    model, x = Chain(max(1, nodes // NODES_A_BLOCK)).eval(), torch.zeros(1, 3, 8, 8)
    started = time.perf_counter()
    program = exitify.capture(model, x)
    captured = time.perf_counter()
    from exitify.pipeline import place

    place(program, exits=3, skips="auto")
    return len(program.graph.nodes), captured - started, time.perf_counter() - captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    measure(50)  # imports, and what torch sets up once
    rows = []
    for nodes in NODES:
        rows.append(measure(nodes))
        count, capturing, passes = rows[-1]
        print(f"{count:6} nodes: capture {capturing:6.2f} s, passes {passes:6.2f} s, {1000 * (capturing + passes) / count:.2f} ms a node", flush=True)
    counts, totals = np.array([row[0] for row in rows]), np.array([row[1] + row[2] for row in rows])
    slope = np.polyfit(np.log(counts[2:]), np.log(totals[2:]), 1)[0]
    print(f"from {counts[2]} to {counts[-1]} nodes time grows as nodes to the power of {slope:.2f}")
    if options.figure:
        _draw(counts, totals, options.figure)


def _draw(counts: np.ndarray, totals: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.loglog(counts, totals, "o-", label="transform")
    axes.loglog([1000, 10_000], [5, 60], "k_", markersize=14, label="allowed")
    axes.loglog(counts, totals[0] * counts / counts[0], ":", color="grey", label="linear")
    axes.set(xlabel="graph nodes", ylabel="seconds")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
