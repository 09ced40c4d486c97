"""RunReport: the table, the pictures and the list of files at the end of a run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from ..meta_ppo import MetaPPO
from ..ppo import PPO
from .export import ExportDataset


class RunReport(L.Callback):
    """After the test: prints the table of returns and where things lie, and draws learning curve and pairs.

    Args:
        pictures: draw ``learning_curve.png`` and ``pairs.png`` beside the dataset.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures

    def teardown(self, trainer: L.Trainer, pl_module: PPO, stage: str) -> None:
        # After the progress bar has ended, so that the table stands alone.
        if stage != "test" or not pl_module.evaluations or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        from rich.console import Console

        from ..tables import returns_table

        console = Console()
        what = f"{pl_module.synthetic_batch.pairs} pairs" if isinstance(pl_module, MetaPPO) else "PPO"
        title = f"{pl_module.spec.id}: {what} after {int(pl_module.env_steps):,} steps"
        console.print(returns_table(title, pl_module.evaluations, pl_module.players))
        export = next((c for c in trainer.callbacks if isinstance(c, ExportDataset)), None)
        folder = export.folder if export else Path(trainer.log_dir or trainer.default_root_dir)
        if self.pictures:
            self._draw(folder, pl_module)
        console.print("Files:")
        for path, meaning in self._files(trainer, folder):
            console.print(f"  {path}  [dim]{meaning}[/dim]", soft_wrap=True, highlight=False)

    def _draw(self, folder: Path, pl_module: PPO) -> None:
        from ..pictures import draw_learning_curve, draw_pairs

        if isinstance(pl_module, MetaPPO):
            draw_pairs(pl_module.distilled(), folder / "pairs.png")
        if (folder / "metrics.csv").is_file():
            draw_learning_curve(folder / "metrics.csv", folder / "learning_curve.png")

    def _files(self, trainer: L.Trainer, folder: Path) -> list[tuple[Path, str]]:
        found = [
            (folder / "distilled.safetensors", "the distilled dataset (best by validation)"),
            (folder / "last.safetensors", "the dataset as it was at the end"),
            (folder / "learning_curve.png", "return against environment steps"),
            (folder / "pairs.png", "the pairs"),
            (folder / "config.yaml", "the exact config"),
        ]
        for checkpoint in trainer.checkpoint_callbacks:
            meaning = (
                f"checkpoint, best {checkpoint.monitor}"
                if checkpoint.monitor
                else "checkpoint to resume from: --ckpt_path"
            )
            found.append((Path(checkpoint.best_model_path), meaning))
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                found.append((Path(logger.log_dir) / "metrics.csv", "every logged number"))
            elif isinstance(logger, WandbLogger):
                run = Path(logger.experiment.dir).parent
                offline = (
                    logger.experiment.settings.mode == "offline" if hasattr(logger.experiment, "settings") else False
                )
                found.append((run, "W&B run" + (", offline: upload it with `wandb sync`" if offline else "")))
        return [(path, meaning) for path, meaning in found if path.name and path.exists()]
