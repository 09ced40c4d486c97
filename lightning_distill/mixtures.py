"""Mixtures: learners of several families at once, drawn anew each time.

Distilled with a mixture, a dataset has to teach all of its families: that is what makes it teach strangers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .class_paths import described
from .learners import FIXED, GROUP, MLP, Factory, LearnerFamily, Learners, Params, count_learners


class Mixture(LearnerFamily):
    """Draws groups of learners, each group from one of several families; all act in the same rollout.

    Families are picked by systematic sampling (Kitagawa 1996): each as often as its weight says, up to one group, and none
    twice while another of equal weight waits. Within a group learners are stacked; groups run one after another.

    Args:
        families: what groups are drawn from, by name or class path; mixtures may stand in mixtures.
        each: learners of one group; the last group has what is left.
        weights: share of the groups that each family gets on average; default: equal shares.
    """

    def __init__(
        self, families: list[str | LearnerFamily | Factory], each: int = 2, weights: list[float] | None = None
    ) -> None:
        if not families:
            raise ValueError("Mixture.families=[]: allowed are lists of one family or more")
        if each < 1:
            raise ValueError(f"Mixture.each={each}: allowed are integers ≥ 1")
        if weights is not None and (len(weights) != len(families) or not all(w > 0 for w in weights)):
            raise ValueError(f"Mixture.weights={weights}: allowed are {len(families)} positive numbers, one a family")
        self.families = [family if isinstance(family, LearnerFamily) else _as_family(family) for family in families]
        self.each, self.weights = each, weights

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        groups = [min(self.each, learners - first) for first in range(0, learners, self.each)]
        sizes = [0] * len(self.families)
        for size, index in zip(groups, self._pick(len(groups)), strict=True):
            sizes[index] += size
        params: Params = {}
        for index, size in enumerate(sizes):
            if size:
                params |= _grouped(index, self.families[index].draw(size, observation_shape, outputs, device))
        return params

    def _pick(self, groups: int) -> list[int]:
        """Indices of the families of so many groups."""
        weights = torch.tensor(self.weights or [1.0] * len(self.families), dtype=torch.float64)
        order = torch.randperm(len(weights))
        bounds = (weights[order] / weights.sum()).cumsum(0)
        points = (torch.arange(groups) + torch.rand((), dtype=torch.float64)) / groups
        found = torch.searchsorted(bounds, points).clamp(max=len(weights) - 1)
        return order[found].tolist()

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        groups = _groups(params)
        parts = observations.split([count_learners(its) for its in groups.values()])
        outputs = [
            self.families[index].forward(its, part) for (index, its), part in zip(groups.items(), parts, strict=True)
        ]
        return torch.cat(outputs)

    def map(self, function: Callable[[Learners, Params], Params], params: Params) -> Params:
        mapped: Params = {}
        for index, its in _groups(params).items():
            mapped |= _grouped(index, self.families[index].map(function, its))
        return mapped

    def describe(self) -> dict[str, Any]:
        families = [family.describe() for family in self.families]
        return described(self, Mixture, {"families": families, "each": self.each, "weights": self.weights})


class MLPs(Mixture):
    """Every combination of widths, depths, activations, initialisations and normalisations of :class:`MLP`.

    Args:
        widths, depths, activations, inits, norms: as the arguments of ``MLP``.
        gains: of orthogonal hidden layers; for other initialisations there is nothing to combine.
        each: learners of one group, see :class:`Mixture`.
    """

    def __init__(
        self,
        widths: list[int],
        depths: list[int],
        activations: list[str] = ["tanh"],  # noqa: B006  never changed, and what a config shows
        inits: list[str] = ["orthogonal"],  # noqa: B006
        norms: list[str] = ["none"],  # noqa: B006
        gains: list[float] = [2**0.5],  # noqa: B006
        each: int = 2,
    ) -> None:
        self.arguments = {
            "widths": widths,
            "depths": depths,
            "activations": activations,
            "inits": inits,
            "norms": norms,
            "gains": gains,
        }
        for name, values in self.arguments.items():
            if not values:
                raise ValueError(f"MLPs.{name}=[]: allowed are lists of one value or more")
        kinds = [(init, gain) for init in inits for gain in (gains if init == "orthogonal" else gains[:1])]
        families = [
            MLP(width, depth, activation, init, gain, norm=norm)
            for width, depth, activation, norm, (init, gain) in itertools.product(
                widths, depths, activations, norms, kinds
            )
        ]
        super().__init__(families, each)

    def describe(self) -> dict[str, Any]:
        return described(self, MLPs, self.arguments | {"each": self.each})


def members(family: LearnerFamily) -> list[LearnerFamily]:
    """All families that learners can come from: those of a mixture, or the family alone."""
    if isinstance(family, Mixture):
        return [member for part in family.families for member in members(part)]
    return [family]


def _as_family(family: Factory | str) -> LearnerFamily:
    from .families import as_family  # which knows mixtures by name

    return as_family(family)


def _grouped(index: int, params: Params) -> Params:
    return {
        FIXED * name.startswith(FIXED) + f"{index}{GROUP}{name.removeprefix(FIXED)}": value
        for name, value in params.items()
    }


def _groups(params: Params) -> dict[int, Params]:
    """Index of a family → parameters of its group, in the order of the indices."""
    groups: dict[int, Params] = {}
    for name, value in params.items():
        index, _, rest = name.removeprefix(FIXED).partition(GROUP)
        groups.setdefault(int(index), {})[FIXED * name.startswith(FIXED) + rest] = value
    return dict(sorted(groups.items()))
