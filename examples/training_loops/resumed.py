"""The plain loop, in one process, with checkpoints: interrupted anywhere and started again, it ends with the same weights, bit for bit.

A checkpoint holds what the next step depends on: the network, optimizer, schedule, where in which epoch, and the state of the random numbers that
move the pictures. The order of an epoch's samples follows from its number, and needs no state.

python -m examples.training_loops.resumed --checkpoint digits.pt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, accuracy_by_exit, digits, parser, show
from exitify import losses
from exitify.files import written_whole


def train(data: TensorDataset, count: int, checkpoint: Path, every: int) -> exitify.Program:
    """The network after `count` epochs, going on from the checkpoint where there is one; every so many steps there is a new one."""
    torch.manual_seed(0)
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    steps = len(data) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=count * steps)
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["epochs"] != count:
            raise SystemExit(f"{checkpoint} is of a training of {state['epochs']} epochs: give --epochs {state['epochs']}, or remove it")
        for part, own in (("network", network), ("optimizer", optimizer), ("schedule", schedule)):
            own.load_state_dict(state[part])
        torch.set_rng_state(state["random"])  # last: what is made above draws numbers, too
        done = state["steps"]
        print(f"Goes on after {done} of {count * steps} steps.")
    network.train()
    while done < count * steps:
        epoch, step = divmod(done, steps)
        for x, y in rest_of_epoch(data, epoch, step):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = losses.joint(network(torch.roll(x, shift, dims=(2, 3))), y)  # exitify: the loss of all exits
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % every == 0:
                parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                save({**parts, "random": torch.get_rng_state(), "steps": done, "epochs": count}, checkpoint)
    return network


def rest_of_epoch(data: TensorDataset, epoch: int, step: int) -> DataLoader[Any]:
    """The epoch's batches from this one on, in an order that follows from the epoch's number."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(data), generator=generator).tolist()
    # With a generator of its own a loader draws no number from the one whose state is kept.
    return DataLoader(data, BATCH, sampler=order[step * BATCH :], drop_last=True, generator=generator)


def save(state: dict[str, Any], checkpoint: Path) -> None:
    """Write it beside the one before, then rename it, so that an interruption leaves one of the two, whole."""
    with written_whole(checkpoint) as stream:
        torch.save(state, stream)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--checkpoint", type=Path, default=Path("digits.pt"))
    arguments.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    options = arguments.parse_args()
    data, test = digits()
    network = train(data, options.epochs, options.checkpoint, options.every)
    options.checkpoint.unlink(missing_ok=True)
    show(accuracy_by_exit(network, test))


if __name__ == "__main__":
    main()
