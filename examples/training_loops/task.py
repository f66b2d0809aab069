"""What the loops share: handwritten digits, and how good each exit is."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import TensorDataset

import exitify

BATCH, PEAK = 60, 0.1
EXITS = "stage1:conv,stage2:conv"
EXAMPLE = torch.zeros(1, 1, 16, 16)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of which one is `--epochs`."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epochs", type=int, default=6)
    return arguments


def epochs(description: str | None) -> int:
    """What `--epochs` says."""
    return int(parser(description).parse_args().epochs)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's scans, enlarged to `(1, 16, 16)`: 1,320 to train on and 477 to judge on."""
    scans = load_digits()
    x = functional.interpolate(torch.from_numpy(scans.images).float()[:, None] / 16, scale_factor=2, mode="bilinear")
    y = torch.from_numpy(scans.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order.split((1320, 477))
    return TensorDataset((x[train] - 0.3) / 0.4, y[train]), TensorDataset((x[test] - 0.3) / 0.4, y[test])


def accuracy_by_exit(network: exitify.Program, data: TensorDataset) -> dict[str, float]:
    """Share of right answers; in `eval()` the logits of all exits are asked for."""
    device = next(network.parameters()).device
    x, y = (tensor.to(device) for tensor in data.tensors)
    with torch.no_grad():
        outputs = network.eval()(x, all_exits=True)
    return {name: (logits.argmax(1) == y).float().mean().item() for name, logits in zip(outputs.names, outputs.logits)}


def show(accuracy: dict[str, float]) -> None:
    for name, right in accuracy.items():
        print(f"{name:6} {right:.1%} right")
