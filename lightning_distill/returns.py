"""Returns: what an evaluation finds, with its statistics, and the rows of a table of several."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .dataset import DistilledDataset

Kind = Literal["sampled", "greedy"]

#: Rows of a table of returns that are no held-out family.
IN_DISTRIBUTION = "in-distribution"
TRAINED_POLICY = "trained policy"
UNTAUGHT = "control: untaught"
SHUFFLED = "control: shuffled targets"
RANDOM = "control: random actions"
#: Rows of tables that are not families'.
ROWS = (IN_DISTRIBUTION, TRAINED_POLICY, UNTAUGHT, SHUFFLED, RANDOM)

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Evaluation:
    """Returns of fresh learners: ``returns`` [learners, episodes], undiscounted, of whole episodes.

    Of direct RL, which has one policy, every row is that policy again: statistics are then over its episodes.
    """

    returns: Tensor
    greedy: bool

    @property
    def per_learner(self) -> Tensor:
        """Mean return of each learner [learners]: the unit of all statistics, as learners are what is drawn afresh."""
        return self.returns.mean(1)

    @property
    def mean(self) -> float:
        return self.per_learner.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over learners."""
        return self.per_learner.std().item() if len(self.returns) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean, by the percentile bootstrap over learners (Efron 1979)."""
        n = len(self.returns)
        if n < 2:
            return -math.inf, math.inf
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(n, (BOOTSTRAP_DRAWS, n), generator=generator)
        means = self.per_learner.cpu()[draws].mean(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return low, high

    @property
    def ci95(self) -> float:
        """Half the width of the 95 % confidence interval; infinite for one learner."""
        low, high = self.interval
        return (high - low) / 2

    @property
    def iqm(self) -> float:
        """Interquartile mean over learners (Agarwal et al. 2021)."""
        ordered = self.per_learner.sort().values
        cut = len(ordered) // 4
        return ordered[cut : len(ordered) - cut].mean().item()

    @property
    def worst(self) -> float:
        """The worst learner's mean return."""
        return self.per_learner.min().item()

    def share(self, reference: Evaluation) -> float | None:
        """Mean return as a share of another's; None if that is not positive, as a share of a loss says nothing."""
        return self.mean / reference.mean if reference.mean > 0 else None

    def as_dict(self) -> dict[str, Any]:
        names = ("mean", "std", "ci95", "iqm", "worst")
        values = {name: getattr(self, name) for name in names}
        return {**values, "learners": self.returns.shape[0], "episodes": self.returns.shape[1], "greedy": self.greedy}


def reported_rules(dataset: DistilledDataset) -> list[str]:
    """The step rules every dataset is reported with: the one that it recommends, and the plain step."""
    return list(dict.fromkeys([dataset.step_rule, "sgd"]))


def row_name(family: str, rule: str, dataset: DistilledDataset) -> str:
    """Name of a row of a table of returns; it says the step rule unless that is the recommended one."""
    return family if rule == dataset.step_rule else f"{family}, {rule} step"


def as_returns(evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{row: {sampled|greedy: evaluation}} as the ``returns`` entry of a dataset's metadata."""

    def plain(evaluation: Evaluation) -> dict[str, Any]:
        return {key: value for key, value in evaluation.as_dict().items() if key != "greedy"}

    return {family: {kind: plain(entry) for kind, entry in kinds.items()} for family, kinds in evaluations.items()}
