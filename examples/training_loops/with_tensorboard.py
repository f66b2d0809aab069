"""The plain loop, in one process, with TensorBoard: the loss of every exit by step, what it gets right by epoch.

python -m examples.training_loops.with_tensorboard --log-dir runs/digits
tensorboard --logdir runs
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, accuracy_by_exit, digits, parser, show
from exitify import losses


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--log-dir", type=Path, default=Path("runs/digits"))
    options = arguments.parse_args()
    torch.manual_seed(0)
    train, test = digits()
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(network.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=options.epochs * len(loader))
    with SummaryWriter(options.log_dir) as writer:
        for epoch in range(options.epochs):
            network.train()
            for step, (x, y) in enumerate(loader, start=epoch * len(loader)):
                outputs = network(x)
                by_exit = losses.per_sample(outputs, y).mean(dim=0)  # exitify: the loss of each exit; their sum is losses.joint
                optimizer.zero_grad()
                by_exit.sum().backward()
                optimizer.step()
                schedule.step()
                for name, loss in zip(outputs.names, by_exit.tolist()):
                    writer.add_scalar(f"loss/{name}", loss, step)
            accuracy = accuracy_by_exit(network, test)
            for name, right in accuracy.items():
                writer.add_scalar(f"accuracy/{name}", right, epoch)
    show(accuracy)


if __name__ == "__main__":
    main()
