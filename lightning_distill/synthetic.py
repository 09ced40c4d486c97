"""SyntheticBatch: everything about the dataset that is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .envs import EnvSpec
from .policies import ActionNoise
from .step_rules import StepRule


class SyntheticBatch(nn.Module):
    """n learnable (observation, target) pairs, the step rule's number, and the taught policy's log standard deviation.

    Args:
        spec: gives the shapes, and the range of continuous actions that the initial noise is a share of.
        pairs: n.
        rule: the step rule that learners are taught by.
        number: initial value of the rule's one number: η, α or λ.
        observation_scale, target_scale: standard deviation of the normal initial values.
        log_std, log_std_min: see :class:`lightning_distill.policies.ActionNoise`.
    """

    def __init__(
        self,
        spec: EnvSpec,
        pairs: int,
        rule: StepRule,
        number: float,
        observation_scale: float = 0.5,
        target_scale: float = 0.5,
        log_std: float = -0.5,
        log_std_min: float = -3.0,
    ) -> None:
        super().__init__()
        self.observations = nn.Parameter(torch.randn(pairs, *spec.observation_shape) * observation_scale)
        self.targets = nn.Parameter(torch.randn(pairs, spec.actions) * target_scale)
        # The logarithm is learned: the number stays positive.
        self._log_number = f"log_{rule.number}"
        self.register_parameter(self._log_number, nn.Parameter(torch.tensor(math.log(number))))
        self.noise = ActionNoise(spec, log_std, log_std_min)

    @property
    def pairs(self) -> int:
        return len(self.targets)

    @property
    def number(self) -> Tensor:
        """The step rule's number: the step size η of ``sgd``, α of ``line_search``, λ of ``newton``; scalar, positive."""
        return getattr(self, self._log_number).exp()
