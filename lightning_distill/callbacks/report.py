"""RunReport: what a run was made with; the table, the pictures, the page and the list of files at its end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from ..dataset import DistilledDataset, write_atomically
from ..distillation import Distillation
from ..provenance import describe_run
from ..rollout_module import RolloutModule

logger = logging.getLogger(__name__)

#: Numbers in one pair's observation up to which the page shows pairs over time: heat maps of more tell nothing.
SHOWN_OVER_TIME = 512


class RunReport(L.Callback):
    """Writes ``environment.json`` when a run starts. After the test it prints the table of returns and where things lie,
    and draws learning curve, pairs and the page ``report.html``; a run that stops earlier leaves the page at least.

    Args:
        pictures: draw ``learning_curve.png``, ``pairs.png`` and ``report.html`` in the run's folder.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self.folder = Path()
        self.environment: dict[str, Any] = {}
        #: The dataset as it was at each validation.
        self.snapshots: list[DistilledDataset] = []

    def setup(self, trainer: L.Trainer, pl_module: RolloutModule, stage: str) -> None:
        # Asked for here, on every process, as the answer is a broadcast.
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.environment = {"seed": pl_module.seed, **describe_run(), "processes": trainer.world_size}
        self.environment["resumed_from"] = str(trainer.ckpt_path) if trainer.ckpt_path else None
        write_atomically(self.folder / "environment.json", json.dumps(self.environment, indent=2).encode())

    def on_validation_end(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        if trainer.state.fn != "fit" or not trainer.is_global_zero or not isinstance(pl_module, Distillation):
            return
        if pl_module.synthetic_batch.observations[0].numel() <= SHOWN_OVER_TIME:
            self.snapshots.append(pl_module.distilled())

    def on_exception(self, trainer: L.Trainer, pl_module: RolloutModule, exception: BaseException) -> None:
        writes = trainer.is_global_zero and not trainer.fast_dev_run and self.pictures
        if writes and trainer.state.fn == "fit" and pl_module.iteration > 0:
            try:
                self._draw(trainer, pl_module)
            except Exception as error:  # what stopped the run is what has to be seen
                logger.warning("no report: %s", error)

    def teardown(self, trainer: L.Trainer, pl_module: RolloutModule, stage: str) -> None:
        # After the progress bar has ended, so that the table stands alone.
        if stage != "test" or not pl_module.evaluations or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        from rich.console import Console

        from ..tables import returns_table

        console = Console()
        title = f"{self._title(pl_module)} after {int(pl_module.env_steps):,} steps"
        console.print(returns_table(title, pl_module.evaluations, pl_module.players))
        if self.pictures:
            self._draw(trainer, pl_module)
        console.print("Files:")
        for path, meaning in self._files(trainer):
            console.print(f"  {path}  [dim]{meaning}[/dim]", soft_wrap=True, highlight=False)

    @staticmethod
    def _title(pl_module: RolloutModule) -> str:
        what = (
            f"{pl_module.synthetic_batch.pairs} pairs"
            if isinstance(pl_module, Distillation)
            else type(pl_module).__name__
        )
        return f"{pl_module.spec.id}: {what}"

    def _draw(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        from ..html_report import write_report
        from ..pictures import draw_learning_curve, draw_pairs, read_curves

        picture = curves = None
        if isinstance(pl_module, Distillation):
            picture = draw_pairs(pl_module.distilled(), self.folder / "pairs.png")
        for csv_logger in (found for found in trainer.loggers if isinstance(found, CSVLogger)):
            csv_logger.save()
            if (metrics := Path(csv_logger.log_dir) / "metrics.csv").is_file():
                found = read_curves(metrics)
                if "return" in found or "val/return" in found:  # a test alone has none
                    curves = found
                    draw_learning_curve(curves, self.folder / "learning_curve.png")
        config = self.folder / "config.yaml"
        write_report(
            self.folder / "report.html",
            self._title(pl_module),
            f"{int(pl_module.env_steps):,} environment steps, seed {pl_module.seed}",
            pl_module.evaluations,
            players=pl_module.players,
            curves=curves,
            pairs_picture=picture,
            snapshots=self.snapshots,
            environment=self.environment,
            config=config.read_text() if config.is_file() else "",
            files=self._files(trainer),
        )

    def _files(self, trainer: L.Trainer) -> list[tuple[Path, str]]:
        folder, best = self.folder, " (best by validation)" if trainer.enable_validation else ""
        found = [
            (folder / "distilled.safetensors", f"the distilled dataset{best}"),
            (folder / "tested.safetensors", "the dataset that was tested"),
            (folder / "last.safetensors", "the dataset as it was at the end"),
            (folder / "report.html", "everything on one page"),
            (folder / "learning_curve.png", "return against environment steps"),
            (folder / "pairs.png", "the pairs"),
            (folder / "config.yaml", "the exact config"),
            (folder / "environment.json", "versions, revisions, machine, command"),
        ]
        for checkpoint in trainer.checkpoint_callbacks:
            meaning = (
                f"checkpoint, best {checkpoint.monitor}"
                if checkpoint.monitor
                else "checkpoint to resume from: --ckpt_path"
            )
            found.append((Path(checkpoint.best_model_path), meaning))
        for logger_ in trainer.loggers:
            if isinstance(logger_, CSVLogger):
                found.append((Path(logger_.log_dir) / "metrics.csv", "every logged number"))
            elif isinstance(logger_, WandbLogger):
                run = Path(logger_.experiment.dir).parent
                offline = (
                    logger_.experiment.settings.mode == "offline" if hasattr(logger_.experiment, "settings") else False
                )
                found.append((run, "W&B run" + (", offline: upload it with `wandb sync`" if offline else "")))
        return [(path, meaning) for path, meaning in found if path.name and path.exists()]
