"""Run by test_ddp in two processes: trains a little and writes down what each process ended with."""

import sys
from pathlib import Path

import lightning as L
import torch

from lightning_distill import CollectorDataModule, MetaPPO

torch.set_num_threads(1)
folder, iterations = Path(sys.argv[1]), int(sys.argv[2])


class Record(L.Callback):
    """Gradients as each process sees them before clipping, and the learners each has drawn."""

    def __init__(self):
        self.gradients, self.fresh = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.fresh.append(pl_module._fresh["0.weight"].clone())


L.seed_everything(1, verbose=False)
data = CollectorDataModule("CartPole-v1", env_steps=2 * 16 * 20 * iterations, num_envs=16, rollout_length=20)
module = MetaPPO(data.spec, pairs=3, learners=4)
record = Record()
trainer = L.Trainer(
    max_epochs=1,
    devices=2,
    accelerator="cpu",
    strategy="ddp",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    limit_val_batches=0,
    default_root_dir=folder,
    callbacks=[record],
)
trainer.fit(module, data)
torch.save(
    {
        "state": module.state_dict(),
        "gradients": record.gradients,
        "fresh": record.fresh,
    },
    folder / f"rank{trainer.global_rank}.pt",
)
