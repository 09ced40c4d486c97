"""SyntheticBatch: everything about the dataset that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .envs import EnvSpec
from .policies import ActionNoise


class SyntheticBatch(nn.Module):
    """n learnable (observation, target) pairs, the step size, and the taught policy's log standard deviation.

    Args:
        spec: gives the targets' shape, and the range of continuous actions that the initial noise is a share of.
        shape: of one synthetic observation.
        pairs: n.
        observation_scale, target_scale: standard deviation of the normal initial values.
        learning_rate: initial step size η per output dimension. The loss is a mean over dimensions, so the step
            size that moves a learner equally far grows with their number.
        log_std, log_std_min: see :class:`lightning_distill.policies.ActionNoise`.
    """

    def __init__(
        self,
        spec: EnvSpec,
        shape: tuple[int, ...],
        pairs: int,
        observation_scale: float = 0.5,
        target_scale: float = 0.5,
        learning_rate: float = 0.3,
        log_std: float = -0.5,
        log_std_min: float = -3.0,
    ) -> None:
        super().__init__()
        self.observations = nn.Parameter(torch.randn(pairs, *shape) * observation_scale)
        self.targets = nn.Parameter(torch.randn(pairs, spec.actions) * target_scale)
        # The logarithm is learned: the step size stays positive.
        self.log_learning_rate = nn.Parameter(torch.tensor(math.log(learning_rate * spec.actions)))
        self.noise = ActionNoise(spec, log_std, log_std_min)

    @property
    def pairs(self) -> int:
        return len(self.targets)

    @property
    def learning_rate(self) -> Tensor:
        """η, the size of the one SGD step; scalar, positive."""
        return self.log_learning_rate.exp()
