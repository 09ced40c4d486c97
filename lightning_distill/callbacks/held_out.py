"""HeldOutLearners: what the batch teaches to architectures it was not distilled with."""

from __future__ import annotations

import lightning as L
import torch

from ..envs import ConfigError
from ..evaluation import IN_DISTRIBUTION
from ..families import as_family
from ..learners import LearnerFamily
from ..meta_ppo import MetaPPO


class HeldOutLearners(L.Callback):
    """At every validation and test, fresh learners of each listed family are taught and play whole episodes.

    Logs, per family, the mean return with its 95 % confidence interval, and the share of the in-distribution return
    (where that is positive: a share of a negative return says nothing).

    Args:
        families: names of families, or name → family; any ``nn.Module`` factory by class path, as ``package.Module`` or
            through ``lightning_distill.ModuleFamily``.
    """

    def __init__(self, families: list[str] | dict[str, LearnerFamily | str] | None = None) -> None:
        named = families if isinstance(families, dict) else {name: name for name in families or []}
        self.families = {name: as_family(family) for name, family in named.items()}

    def setup(self, trainer: L.Trainer, pl_module: MetaPPO, stage: str) -> None:
        spec = pl_module.spec
        for name, family in self.families.items():
            # Now rather than at the first validation, when a part of the run is done.
            try:
                params = family.draw(2, pl_module.learner_shape, spec.actions)
                shape = tuple(family.forward(params, torch.zeros(2, 3, *pl_module.learner_shape)).shape)
            except Exception as error:  # somebody else's module may raise anything
                raise ConfigError(f"held_out.families: {name!r} cannot be drawn and run ({error})") from error
            if shape != (2, 3, spec.actions):
                raise ConfigError(f"held_out.families: {name!r} returns {shape[2:]}, expected ({spec.actions},)")

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
