"""The same with Hugging Face's Trainer, which asks a subclass for the loss.

python -m examples.training_loops.with_transformers
torchrun --nproc-per-node 2 -m examples.training_loops.with_transformers
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, digits, epochs, show
from exitify import losses


class WithExits(Trainer):
    """A Trainer whose loss is that of all exits; it predicts the logits of each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a batch's mean, which gradient accumulation has to divide

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(inputs["x"], all_exits=True)  # the Trainer asks for the loss in eval(), too
        loss = losses.joint(outputs, inputs["labels"])  # exitify: the loss of all exits
        return (loss, dict(zip(outputs.names, outputs.logits))) if return_outputs else loss


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    x, y = zip(*rows)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def main() -> None:
    count = epochs(__doc__)
    torch.manual_seed(0)
    train, test = digits()
    network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits
    optimizer = torch.optim.SGD(network.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=count * (len(train) // BATCH))

    def accuracy(said: EvalPrediction) -> dict[str, float]:
        return {name: (logits.argmax(1) == said.label_ids).mean() for name, logits in zip(network.plan.exit_names, said.predictions)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=count,
            per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
            dataloader_drop_last=True,
            max_grad_norm=0.0,
            label_names=["labels"],  # by the names of what forward() takes it would find none
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,  # the loss reaches all of them
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = WithExits(
            network,
            arguments,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        show({name: metrics[f"eval_{name}"] for name in network.plan.exit_names})


if __name__ == "__main__":
    main()
