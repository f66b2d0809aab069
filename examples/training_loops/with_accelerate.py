"""The same with Hugging Face's accelerate, on what it finds: a CPU, a GPU, several processes.

python -m examples.training_loops.with_accelerate
torchrun --nproc-per-node 2 -m examples.training_loops.with_accelerate
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, accuracy_by_exit, digits, epochs, show
from exitify import losses


def main() -> None:
    count = epochs(__doc__)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # several processes on CPUs it does not find by itself
    torch.manual_seed(0)
    train, test = digits()
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    optimizer = torch.optim.SGD(network.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loader = DataLoader(train, BATCH // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=count * len(loader))
    for _ in range(count):
        model.train()
        for x, y in loader:
            loss = losses.joint(model(x), y)  # exitify: the loss of all exits
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
    if accelerator.is_main_process:
        show(accuracy_by_exit(accelerator.unwrap_model(model), test))
    accelerator.end_training()


if __name__ == "__main__":
    main()
