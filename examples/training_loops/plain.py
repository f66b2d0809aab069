"""A plain PyTorch loop. Two lines of it are exitify's; they are marked.

python -m examples.training_loops.plain
torchrun --nproc-per-node 2 -m examples.training_loops.plain
"""

from __future__ import annotations

import os

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, accuracy_by_exit, digits, epochs, show
from exitify import losses


def main() -> None:
    count = epochs(__doc__)
    in_several_processes = "RANK" in os.environ  # torchrun says so
    if in_several_processes:
        distributed.init_process_group("gloo")  # on GPUs: nccl
    processes = distributed.get_world_size() if in_several_processes else 1
    torch.manual_seed(0)
    train, test = digits()
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    model = DistributedDataParallel(network) if in_several_processes else network
    sampler = DistributedSampler(train) if in_several_processes else None
    loader = DataLoader(train, BATCH // processes, shuffle=sampler is None, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=count * len(loader))
    for epoch in range(count):
        if sampler is not None:
            sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            loss = losses.joint(model(x), y)  # exitify: the loss of all exits
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not in_several_processes or distributed.get_rank() == 0:
        show(accuracy_by_exit(network, test))
    if in_several_processes:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
