"""ExportDataset: the synthetic batch as a file that outlives the run."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning as L

from ..checkpoints import copy_atomically
from ..distillation import Distillation
from ..envs import ConfigError
from ..returns import IN_DISTRIBUTION, as_returns

logger = logging.getLogger(__name__)


class ExportDataset(L.Callback):
    """Writes ``distilled.safetensors`` (best by validation) and ``last.safetensors``, whole or not at all; a test without a
    ``fit`` before it writes ``tested.safetensors``. They go to the run's log folder.
    """

    def __init__(self) -> None:
        self.best_return: float | None = None
        self.config = ""
        self.fits = False
        self.folder = Path()
        self._loaded_from = Path()

    def setup(self, trainer: L.Trainer, pl_module: Distillation, stage: str) -> None:
        self.fits = self.fits or stage == "fit"
        # Asked for here, on every process, as the answer is a broadcast.
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.fast_dev_run:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"output folder {str(self.folder)!r} is not writable: {error.strerror or error}"
            ) from error

    def on_validation_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._write(trainer, pl_module, "last.safetensors")
        mean = pl_module.evaluations[IN_DISTRIBUTION]["sampled"].mean
        if self.best_return is None or mean > self.best_return:
            self.best_return = mean
            self._write(trainer, pl_module, "distilled.safetensors")

    def on_train_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        if not pl_module.evaluations:  # trained since the last validation
            self._write(trainer, pl_module, "last.safetensors")
        if not trainer.enable_validation:
            self._write(trainer, pl_module, "distilled.safetensors")

    def on_test_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        # Where no checkpoints are kept the test is of the end, which is not the best by validation.
        of_the_end = trainer.ckpt_path is None and trainer.enable_validation and self.best_return is not None
        name = "last.safetensors" if of_the_end else "distilled.safetensors"
        self._write(trainer, pl_module, name if self.fits else "tested.safetensors")

    def on_exception(self, trainer: L.Trainer, pl_module: Distillation, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or pl_module.iteration == 0:
            return
        try:
            self._write(trainer, pl_module, "last.safetensors")
            if self.best_return is None:  # stopped before the first validation: there is no better one
                self._write(trainer, pl_module, "distilled.safetensors")
        except Exception as error:  # whatever it is, checkpoints are still to be written
            logger.warning("no dataset of the moment it stopped: %s. The one before is whole.", error)

    def _write(self, trainer: L.Trainer, pl_module: Distillation, name: str) -> None:
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        returns = as_returns(pl_module.evaluations)
        dataset = pl_module.distilled().with_metadata(returns=returns, config=self.config)
        dataset.save(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        return {"best_return": self.best_return, "folder": str(self.folder.resolve())}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Distillation, checkpoint: dict[str, Any]) -> None:
        self._loaded_from = Path(str(trainer.ckpt_path)).resolve().parent.parent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run has a folder of its own: the best dataset so far comes along.

        It lies in the run's folder that the checkpoint is in, wherever that has been moved to; where it was at the time, another run may be.
        """
        if not self.fits or state_dict["best_return"] is None:
            return
        folders = [self._loaded_from, Path(state_dict["folder"])]
        found = [folder / "distilled.safetensors" for folder in folders if (folder / "distilled.safetensors").is_file()]
        if not found:
            logger.warning("the best dataset so far is not in %s: starting to look for one anew", folders[0])
            return
        self.best_return = state_dict["best_return"]
        if found[0].parent != self.folder.resolve():
            copy_atomically(found[0], self.folder / found[0].name)
