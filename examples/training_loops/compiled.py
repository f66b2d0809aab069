"""The plain loop with torch.compile, in one process.

The model is compiled whole, as one graph without breaks, and the network stays as it is beside it: what is evaluated, saved and exported
is `network`, whose state_dict has the names that it always had. Needs a C++ compiler, and waits for it at the first batch.

python -m examples.training_loops.compiled
"""

from __future__ import annotations

from typing import cast

import torch
from torch.utils.data import DataLoader

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, accuracy_by_exit, digits, epochs, show
from exitify import losses


def compiled(network: exitify.Program) -> torch.nn.Module:
    """The network through torch.compile, with the network's own weights.

    A Program writes the code for all of its exits when they are first asked for, which torch.compile cannot look into: so they are asked
    for once before, in eval(), where norms learn nothing from it.
    """
    network.eval()(EXAMPLE, all_exits=True)
    return cast(torch.nn.Module, torch.compile(network, fullgraph=True))  # fullgraph: an error where the graph would break


def main() -> None:
    count = epochs(__doc__)
    torch.manual_seed(0)
    train, test = digits()
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    model = compiled(network)
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=count * len(loader))
    for _ in range(count):
        model.train()
        for x, y in loader:
            loss = losses.joint(model(x), y)  # exitify: the loss of all exits
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    show(accuracy_by_exit(network, test))


if __name__ == "__main__":
    main()
