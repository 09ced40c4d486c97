"""RunFolder: a folder of its own for every run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .envs import ConfigError

#: Loggers that give every run a folder of its own, if they are the first.
MAKE_FOLDERS = ("RunFolder", "CSVLogger", "TensorBoardLogger")


class RunFolder(CSVLogger):
    """Lightning's ``CSVLogger``, whose folder ``version_N`` is made when its number is chosen.

    Lightning's is made later: of two runs that begin at the same moment both would choose the same one.
    """

    def _get_next_version(self) -> int:
        while True:
            version = super()._get_next_version()
            if rank_zero_only.rank != 0:
                return version  # other processes are told where rank zero's is
            try:
                (Path(self.root_dir) / f"version_{version}").mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(f"output folder {str(self.root_dir)!r} is not writable: {error.strerror}") from error
            return version


def gives_folders(logger: Any) -> bool:
    """Whether ``trainer.logger``, as a config has it, gives every run a folder of its own."""
    first = _first(logger)
    return first is True or (first is not False and first["class_path"].rpartition(".")[2] in MAKE_FOLDERS)


def runs_folder(trainer: Mapping[str, Any]) -> tuple[str, str]:
    """Below which folder runs are written: the option that says so, and what it says.

    Args:
        trainer: that section of a config.
    """
    first, root = _first(trainer.get("logger")), trainer.get("default_root_dir") or os.getcwd()
    save_dir = None if isinstance(first, bool) else (first.get("init_args") or {}).get("save_dir")
    if save_dir in (None, root):
        return "trainer.default_root_dir", root
    return "trainer.logger.save_dir", str(save_dir)


def _first(logger: Any) -> Any:
    """The first of the loggers that a config has; a default one is True, none False."""
    if isinstance(logger, list):
        logger = next(iter(logger), False)
    return True if logger is None else logger
