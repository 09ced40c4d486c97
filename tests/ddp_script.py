"""Run by test_ddp in two processes: trains a little and writes down what each process ended with."""

import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_distill import CollectorDataModule, MetaPPO
from lightning_distill.callbacks import ExportDataset, RunReport
from lightning_distill.checkpoints import AtomicCheckpointIO, RunCheckpoint
from lightning_distill.experts import Expert
from lightning_distill.imitation import Imitation
from lightning_distill.returns import IN_DISTRIBUTION

torch.set_num_threads(1)
folder, iterations, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
game = what == "game"


class Record(L.Callback):
    """The learners that each process draws, and all that the last iteration's first update follows from."""

    def __init__(self):
        self.fresh, self.before, self.gradients = [], None, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.before is not None and len(self.gradients) < 2:  # critic and actor
            self.gradients.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.fresh.append(next(iter(pl_module._fresh.values())).clone())
        if batch_idx == iterations - 1:
            # Gradients as they are before clipping, of all samples at once.
            pl_module.minibatches, pl_module.max_grad_norm = 1, 1e9
            self.before = {
                "state": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "rollout": batch.clone().to_dict(),
                "fresh": {name: value.clone() for name, value in pl_module._fresh.items()},
                "normaliser": pl_module._normaliser,
                "running": pl_module._running.clone() if isinstance(pl_module, MetaPPO) else None,
            }


class Swings(Expert):
    """Pushes a pendulum the way it turns; observations are normalised as it meets them."""

    log_std = torch.tensor([-1.0])

    def output(self, observations):
        return 2 * observations[..., 2:].sign()


L.seed_everything(1, verbose=False)
if game:  # an encoder learns along with the critic
    data = CollectorDataModule("ALE/Pong-v5", env_steps=2 * 4 * 8 * iterations, num_envs=4, rollout_length=8, threads=1)
    module = MetaPPO(data.spec, pairs=3, learners=2, encoder_level=4)
elif what == "imitation":  # each process sees episodes of its own before the first rollout
    own, rollout = 16 * 1000, 8 * 20
    data = CollectorDataModule(
        "Pendulum-v1", env_steps=2 * (own + rollout * iterations), num_envs=8, rollout_length=20, val_learners=4
    )
    module = Imitation(data.spec, expert=Swings(), pairs=4, learners=4, replay=3 * rollout)
else:
    data = CollectorDataModule(
        "CartPole-v1", env_steps=2 * 16 * 20 * iterations, num_envs=16, rollout_length=20, val_learners=5, episodes=2
    )
    if what == "compiled":
        # By PyTorch's own operators, which is seconds sooner; more gradients than DDP's first bucket holds.
        torch.compile = partial(torch.compile, backend="aot_eager")
        module = MetaPPO(data.spec, pairs=50_000, learners=2, epochs=1, minibatches=1, compile=True)
    else:
        module = MetaPPO(data.spec, pairs=3, learners=4)
record = Record()
trainer = L.Trainer(
    max_epochs=1,
    devices=2,
    accelerator="cpu",
    strategy="ddp",
    logger=CSVLogger(folder, name="run"),
    log_every_n_steps=1,
    limit_val_batches=0 if game else None,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    default_root_dir=folder,
    plugins=[AtomicCheckpointIO()],
    callbacks=[record, ExportDataset(), RunReport(), RunCheckpoint(filename="last", minutes=1e-9)],
)
trainer.fit(module, data)
torch.save(
    {
        "state": module.state_dict(),
        "before": record.before,
        "gradients": record.gradients,
        "fresh": record.fresh,
        "returns": None if game else module.evaluations[IN_DISTRIBUTION]["sampled"].returns,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
    },
    folder / f"rank{trainer.global_rank}.pt",
)
