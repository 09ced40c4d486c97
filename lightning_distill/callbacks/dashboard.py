"""Dashboard: what curves alone do not show, for Weights & Biases."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from ..dataset import DistilledDataset
from ..distillation import Distillation
from ..envs.rendering import make_rendered
from ..learners import LearnerFamily
from ..returns import IN_DISTRIBUTION, as_returns
from ..rollout_module import RolloutModule
from ..tables import rows

logger = logging.getLogger(__name__)


class Dashboard(L.Callback):
    """Beside the logged curves, which W&B groups by what stands before the slash: environment steps as their x axis, the
    pairs as pictures at each validation, the table of returns of all families at the end, the dataset as a versioned
    artifact. Does nothing without a ``WandbLogger``; direct PPO has no pairs to show.

    Args:
        video: also record a taught learner at the end (some seconds; the environment must be one that can be drawn).
    """

    def __init__(self, video: bool = False) -> None:
        self.video = video
        self.best_return: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        if self.video and isinstance(pl_module, Distillation):
            make_rendered(pl_module.spec.id, pl_module.spec.kwargs).close()  # it says why it cannot be drawn
        run = _wandb_run(trainer)
        if run is not None:
            run.define_metric("env_steps")
            run.define_metric("*", step_metric="env_steps", step_sync=True)
            run.define_metric("val/return", summary="max", step_metric="env_steps", step_sync=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        run = _wandb_run(trainer)
        if run is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if not isinstance(pl_module, Distillation):
            return
        dataset = _described(pl_module)
        self._log_pictures(run, dataset)
        mean = pl_module.evaluations[IN_DISTRIBUTION]["sampled"].mean
        if self.best_return is None or mean > self.best_return:
            self.best_return = mean
            _log_dataset(run, dataset, ["best-by-validation"])

    def on_test_end(self, trainer: L.Trainer, pl_module: RolloutModule) -> None:
        run = _wandb_run(trainer)
        if run is None:
            return
        import wandb

        columns = ["family", "actions", "mean", "ci95", "std", "iqm", "worst", "learners", "episodes", "share"]
        data = [[row[name] for name in columns] for row in rows(pl_module.evaluations)]
        run.log({"test/returns": wandb.Table(columns=columns, data=data)})
        if not isinstance(pl_module, Distillation):
            return
        dataset = _described(pl_module)
        _log_dataset(run, dataset, ["best-by-validation", "tested"])
        if self.video:
            self._log_video(run, dataset, pl_module.family)

    def _log_video(self, run: Any, dataset: DistilledDataset, family: LearnerFamily) -> None:
        import wandb

        from ..watching import record

        try:
            with tempfile.TemporaryDirectory() as folder:
                recording = record(dataset, Path(folder) / "taught.gif", family=family)
                caption = f"a fresh learner after one step: return {recording.total:.1f}"
                run.log({"video/taught": wandb.Video(str(recording.path), caption=caption, format="gif")})
        except Exception as error:  # a video is not worth a run's table and report, which come after it
            logger.warning("no video: %s", error)

    def _log_pictures(self, run: Any, dataset: DistilledDataset) -> None:
        import wandb

        from ..pictures import draw_pairs

        with tempfile.TemporaryDirectory() as folder:
            picture = draw_pairs(dataset, Path(folder) / "pairs.png")
            run.log({"pairs": wandb.Image(str(picture), caption=f"{dataset.metadata['env_steps']:,} steps")})

    def state_dict(self) -> dict[str, Any]:
        return {"best_return": self.best_return}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_return = state_dict["best_return"]


def _wandb_run(trainer: L.Trainer) -> Any | None:
    """The W&B run, in the process that writes it; None if there is none, or W&B is switched off."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if logger is None or not trainer.is_global_zero or trainer.fast_dev_run or logger.experiment.disabled:
        return None
    return logger.experiment


def _described(pl_module: Distillation) -> DistilledDataset:
    return pl_module.distilled().with_metadata(returns=as_returns(pl_module.evaluations))


def _log_dataset(run: Any, dataset: DistilledDataset, aliases: list[str]) -> None:
    """A new version of the run's dataset; W&B keeps all of them and moves the aliases."""
    import wandb

    about = {"env": dataset.env, "pairs": dataset.pairs, "learning_rate": dataset.learning_rate.item()}
    about |= {key: dataset.metadata[key] for key in ("env_steps", "seed", "learners", "returns", "versions")}
    name = re.sub(r"[^\w.-]", "-", f"{dataset.env}-{dataset.pairs}-pairs")
    artifact = wandb.Artifact(name, type="distilled-dataset", metadata=about)
    with tempfile.TemporaryDirectory() as folder:
        artifact.add_file(str(dataset.save(Path(folder) / "distilled.safetensors")))
        run.log_artifact(artifact, aliases=aliases)
