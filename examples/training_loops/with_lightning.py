"""The same with Lightning, which has the loop.

python -m examples.training_loops.with_lightning
"""

from __future__ import annotations

import lightning
import torch
from torch.utils.data import DataLoader

import exitify
from examples.digits.model import DigitsNet
from examples.training_loops.task import BATCH, EXAMPLE, EXITS, PEAK, digits, epochs, show
from exitify import losses


class WithExits(lightning.LightningModule):
    """A network with exits, their loss, and what each exit gets right."""

    def __init__(self) -> None:
        super().__init__()
        self.network = exitify.transform(DigitsNet(), EXAMPLE, exits=EXITS)  # exitify: the network, with exits

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return losses.joint(self.network(x), y)  # exitify: the loss of all exits

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        x, y = batch
        outputs = self.network(x, all_exits=True)
        for name, logits in zip(outputs.names, outputs.logits):
            self.log(name, (logits.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), PEAK, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    count = epochs(__doc__)
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    trainer = lightning.Trainer(
        max_epochs=count,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(WithExits(), DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(test, BATCH))
    show({name: float(accuracy) for name, accuracy in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
