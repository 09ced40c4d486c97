"""Checkpoints that survive: written whole or not at all, read without running code, found again, carried along."""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse.typing import PositiveFloat
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .dataset import write_atomically
from .envs import ConfigError

logger = logging.getLogger(__name__)

#: Options of ``data`` that say what is learned from; the others, how long, how fast, and with how many learners it is tested.
OF_TRAJECTORIES = ("env", "env_kwargs", "max_episode_steps", "rollout_length")
#: Those of ``model`` that say how fast it learns, not what: a run may go on with others.
OF_SPEED = ("compile",)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Local checkpoints replace their predecessors in one step; nothing in a checkpoint is executed.

    Lightning's own are written in the system's temporary folder and moved, which is a copy where that is another file
    system: a full disk or a crash then leaves half a checkpoint in place of a whole one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(path, content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but ``weights_only`` unless it is False.

        Raises:
            ConfigError: there is no such file, it is broken, or it holds objects that only code could restore.
        """
        try:
            found = super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)
        except FileNotFoundError:
            raise ConfigError(
                f"ckpt_path={str(path)!r}: no such file; allowed are a checkpoint's path, and last for the newest one of this config"
            ) from None
        except OSError as error:
            raise ConfigError(f"ckpt_path={str(path)!r}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # which ones a broken file can provoke is torch's business
            cause = (
                str(error).splitlines()[0] if zipfile.is_zipfile(path) else "no whole file of torch's present format"
            )
            raise ConfigError(f"ckpt_path={str(path)!r}: not a checkpoint that can be read safely ({cause})") from error
        if not isinstance(found, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(found):
            raise ConfigError(f"ckpt_path={str(path)!r}: a file of torch, but no checkpoint of a run")
        return found


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` for runs that are stopped and go on in a folder of their own.

    Args:
        minutes: also save when the last checkpoint is older than so many minutes. (Lightning's ``train_time_interval`` does
            nothing in manual optimisation.)
        kwargs: of ``ModelCheckpoint``.
    """

    def __init__(self, minutes: PositiveFloat | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Several files of one name: each validation would replace the best one.
        if self.monitor and self.save_top_k not in (0, 1) and "{" not in (self.filename or "{"):
            raise ConfigError(
                f"checkpoint.save_top_k={self.save_top_k} with checkpoint.filename={self.filename!r}: allowed are 0 and 1, or a filename "
                "that says which, as '{env_steps:.0f}'"
            )
        self.minutes = minutes
        self.fits = False
        self._saved_at = time.monotonic()
        self._loaded_from = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.fits = stage == "fit"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        if not trainer.enable_validation:
            self.monitor = None  # there is nothing to choose by: the last is kept

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.minutes is None or trainer.fast_dev_run:
            return
        due = time.monotonic() - self._saved_at > 60 * self.minutes
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was trained since the last validation is kept as well, where the last checkpoint is what is kept."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None and self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, if ``save_on_exception`` is set and nothing stands in the way."""
        if trainer.state.fn != "fit":
            return  # in a test the weights are the best ones', which must not take the place of the last
        # All processes save together. Where one alone broke it would wait for the others, and they for it.
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        try:
            super().on_exception(trainer, pl_module, exception)
        except OSError as error:
            logger.warning("no checkpoint of the moment it stopped: %s. The one before is whole.", error)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_from = Path(str(trainer.ckpt_path)).parent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best so far comes along into the new run's folder, so that what follows is measured against it.

        Not where a checkpoint is tested: what was the last one when it was written no longer is.
        """
        if self.fits and self.monitor is not None and (carried := self._carried_along(state_dict)):
            super().load_state_dict(carried)

    def _carried_along(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its files, which lie beside the checkpoint, in this run's folder; empty if they are gone.

        The paths in it are not used: the folder may have moved since, and relative ones depend on the working directory.
        """
        there = self._loaded_from
        to = {path: os.path.join(str(self.dirpath), os.path.basename(path)) for path in state["best_k_models"]}
        if not all((there / os.path.basename(path)).is_file() for path in to):
            logger.warning("the best checkpoint so far is not in %s: starting to look for one anew", there)
            return {}
        for copy in to.values():
            copy_atomically(there / os.path.basename(copy), copy)
        return {
            **state,
            "dirpath": self.dirpath,
            "best_k_models": {to[path]: score for path, score in state["best_k_models"].items()},
            "kth_best_model_path": to.get(state["kth_best_model_path"], ""),
            "best_model_path": to.get(state["best_model_path"], ""),
            "last_model_path": "",
        }


def check_env(checkpoint: dict[str, Any], env: str, kwargs: dict[str, Any] | None = None) -> None:
    """Raise ``ConfigError`` unless a checkpoint is of this environment and, where they are given, of these arguments of it."""
    saved = checkpoint.get("env")
    if saved is None:
        return
    if saved["id"] != env:
        raise ConfigError(f"ckpt_path: a checkpoint of env={saved['id']!r}, but data.env={env!r}")
    if kwargs is not None and saved["kwargs"] != kwargs:
        raise ConfigError(
            f"ckpt_path: a checkpoint of data.env_kwargs={saved['kwargs']}, but here they are {kwargs}; what it has learned is trained "
            "elsewhere from its dataset (--model.start=FILE)"
        )


def make_resumable(checkpoint: dict[str, Any]) -> None:
    """Change Lightning's counters in a checkpoint of one epoch, the whole run, so that it goes on where it stopped.

    Args:
        checkpoint: changed in place; its entry ``validated`` says whether the model was validated after its last update.
    """
    # trainer.max_time is each start's own: with what earlier ones took on its clock no later one would get anywhere.
    checkpoint.get("callbacks", {}).pop("Timer", None)
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    # A finished run goes on where data.env_steps was raised: its last batch was the last, and its epoch over, only then.
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    for count in loop["epoch_progress"].values():
        count["processed"] = count["completed"]
    # A validation that was due when it stopped comes first, as one that has begun; Lightning would leave it out.
    count = loop["epoch_loop.val_loop.batch_progress"]["total"]
    begun = count["completed"] + (not checkpoint.get("validated", True))
    count |= {"ready": begun, "started": begun, "processed": count["completed"]}


class StopTogether(L.Callback):
    """SIGTERM to any of several processes, or Ctrl-C, ends all of them after the same iteration, so that they can save together.

    Lightning's own handler talks to the other processes at once, and waits for ever if they are busy talking of something else. A second
    Ctrl-C does not wait. A test, or a validation alone, has nothing to save, and SIGTERM ends it at once; Lightning would go on to its end.
    """

    def __init__(self) -> None:
        self.told = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size == 1:
            return

        def tell(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not self.told and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            self.told = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, tell)  # Lightning puts back what was there before at the end of the run

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def leave(*_: Any) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the other processes, which may not have been told
            raise SIGTERMException

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, leave)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.told, all=False):
            raise SIGTERMException


def copy_atomically(source: str | Path, target: str | Path) -> None:
    """Copy a small file so that ``target`` is the old one or the whole new one; several processes may do the same."""
    write_atomically(target, Path(source).read_bytes())


def last_checkpoint(root: str | Path, config: Mapping[str, Any]) -> Path | None:
    """The newest ``last.ckpt`` below ``root`` of a run that was configured as this one; None if there is none.

    Args:
        root: below which runs are written.
        config: the present run's, of which ``seed_everything``, ``model`` and what trajectories are of must agree; a run may go on
            for longer, on other hardware, or with other loggers.
    """

    def given(value: Any) -> Any:
        """Without entries that are None, which a config may name or leave out."""
        return {k: given(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value

    def identity(settings: Mapping[str, Any]) -> Any:
        data, model = settings.get("data") or {}, settings.get("model") or {}
        options = {k: v for k, v in (model.get("init_args") or {}).items() if k not in OF_SPEED}
        parts = (settings.get("seed_everything"), model | {"init_args": options}, *map(data.get, OF_TRAJECTORIES))
        return [given(part) or None for part in parts]

    newest_first = sorted(Path(root).rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        try:
            saved = yaml.safe_load((path.parents[1] / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(saved, dict) and identity(saved) == identity(config):
            return path
    return None
