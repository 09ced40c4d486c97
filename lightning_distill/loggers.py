"""RunFolder: a folder of its own for every run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


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
            return version
