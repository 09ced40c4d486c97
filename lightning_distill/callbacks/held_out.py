"""HeldOutLearners: what the batch teaches to architectures it was not distilled with."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
from jsonargparse.typing import NonNegativeInt

from ..distillation import Distillation
from ..envs import ConfigError
from ..families import as_families, families_apart, held_out_from
from ..learners import Factory, LearnerFamily
from ..matching import check_taught
from ..returns import IN_DISTRIBUTION, ROWS, reported_rules, row_name


class HeldOutLearners(L.Callback):
    """Fresh learners of each listed family are taught and play whole episodes: all at the test, a few at every validation.

    Logs, per family, the mean return with its 95 % confidence interval, and the share of the in-distribution return
    (where that is positive: a share of a negative return says nothing). Actions are sampled. The test teaches by the
    recommended rule and by the plain step. A family that the training draws from is reported as such.

    Args:
        families: names of families, or name → family; any ``nn.Module`` factory by class path, with arguments or without.
            Default: those of :func:`lightning_distill.families.held_out_from`.
        at_validation: how many of them, from the front, also play at every validation: all of the default ones would take
            longer than the training between two validations.
    """

    def __init__(
        self,
        families: list[str] | dict[str, str | LearnerFamily | Factory] | None = None,
        at_validation: NonNegativeInt = 3,
    ) -> None:
        self.families = None if families is None else _named(families)
        self.at_validation = at_validation

    def setup(self, trainer: L.Trainer, pl_module: Distillation, stage: str) -> None:
        if self.families is None:
            self.families = _named(held_out_from(pl_module.spec.observation_shape))
        self.families = families_apart(self.families, pl_module.family)
        if not self.families:
            return
        dataset = pl_module.distilled()
        for name, family in self.families.items():
            # Now rather than at the first validation or the test, when a part of the run or all of it is done.
            check_taught(f"held_out.families: {name!r}", family, dataset, reported_rules(dataset))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        dataset = pl_module.distilled()
        for name, family in list(self.families.items())[: self.at_validation]:
            evaluation = trainer.datamodule.evaluate(dataset, family, "validate")
            pl_module.evaluations[name] = {"sampled": evaluation}
            self._log(pl_module, name, "held_out")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        dataset = pl_module.distilled()
        for rule in reported_rules(dataset):
            for name, family in self.families.items():
                evaluation = trainer.datamodule.evaluate(dataset, family, "test", step_rule=rule)
                row = row_name(name, rule, dataset)
                pl_module.evaluations[row] = {"sampled": evaluation}
                self._log(pl_module, row, "test/sampled")

    @staticmethod
    def _log(pl_module: Distillation, name: str, prefix: str) -> None:
        evaluation = pl_module.evaluations[name]["sampled"]
        share = evaluation.share(pl_module.evaluations[IN_DISTRIBUTION]["sampled"])
        pl_module.log(f"{prefix}/{name}/return", evaluation.mean, batch_size=1)
        pl_module.log(f"{prefix}/{name}/return_ci95", evaluation.ci95, batch_size=1)
        if share is not None:
            pl_module.log(f"{prefix}/{name}/share", share, batch_size=1)


def _named(families: Iterable[str] | dict[str, str | LearnerFamily | Factory]) -> dict[str, LearnerFamily]:
    named = as_families(families)
    for name in named:
        if name in ROWS:
            raise ConfigError(
                f"held_out.families: {name!r} is the name of another row of the tables; allowed is any other name"
            )
    return named
