"""HeldOutLearners: what the batch teaches to architectures it was not distilled with."""

from __future__ import annotations

import lightning as L

from ..evaluation import IN_DISTRIBUTION
from ..learners import LearnerFamily
from ..meta_ppo import MetaPPO


class HeldOutLearners(L.Callback):
    """At every validation and test, fresh learners of each listed family are taught and play whole episodes.

    Logs, per family, the mean return with its 95 % confidence interval, and the share of the in-distribution return
    (where that is positive: a share of a negative return says nothing).

    Args:
        families: name → family; any ``nn.Module`` factory through ``lightning_distill.ModuleFamily``.
    """

    def __init__(self, families: dict[str, LearnerFamily] | None = None) -> None:
        self.families = families or {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MetaPPO) -> None:
        for name, family in self.families.items():
            evaluation = trainer.datamodule.evaluate(pl_module.distilled(), family, "validate")
            pl_module.evaluations[name] = {"sampled": evaluation}
            self._log(pl_module, name, "sampled", "held_out")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: MetaPPO) -> None:
        for name, family in self.families.items():
            pl_module.evaluations[name] = {}
            for kind in ("sampled", "greedy"):
                evaluation = trainer.datamodule.evaluate(pl_module.distilled(), family, "test", greedy=kind == "greedy")
                pl_module.evaluations[name][kind] = evaluation
                self._log(pl_module, name, kind, f"test/{kind}")

    @staticmethod
    def _log(pl_module: MetaPPO, name: str, kind: str, prefix: str) -> None:
        evaluation = pl_module.evaluations[name][kind]
        reference = pl_module.evaluations[IN_DISTRIBUTION][kind].mean
        pl_module.log(f"{prefix}/{name}/return", evaluation.mean, batch_size=1)
        pl_module.log(f"{prefix}/{name}/return_ci95", evaluation.ci95, batch_size=1)
        if reference > 0:
            pl_module.log(f"{prefix}/{name}/share", evaluation.mean / reference, batch_size=1)
