"""Training and nothing beside it: what benchmarks time and watch."""

from __future__ import annotations

from typing import Any

import lightning as L


def train(module: L.LightningModule, data: L.LightningDataModule, callback: L.Callback, **options: Any) -> None:
    """Fit without logs, checkpoints and validation; ``options`` are the Trainer's."""
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[callback],
        **options,
    )
    trainer.fit(module, data)
