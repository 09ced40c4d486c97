"""SyntheticBatch: everything about the dataset that is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .envs import EnvSpec
from .policies import ActionNoise


class SyntheticBatch(nn.Module):
    """n learnable (observation, target) pairs, the step rule's numbers, the normaliser's correction, and the taught policy's
    log standard deviation.

    The correction is a gain and a shift of each number in the observations. Learners draw their features at random, so they cannot
    turn away from what does not matter; and as their biases are 0, a tanh network is an odd function of what it is fed. Where the gain
    is small a network is nearly linear, and orthogonal layers at least as wide as what they are fed keep all angles: taught learners
    then differ little from each other.

    Args:
        spec: gives the targets' shape, and the range of continuous actions that the initial noise is a share of.
        shape: of one synthetic observation.
        pairs: n.
        numbers: initial values of what the step rule needs beside the pairs, by name.
        observation_scale, target_scale: standard deviation of the normal initial values.
        gain: initial gain.
        log_std, log_std_min: see :class:`lightning_distill.policies.ActionNoise`.
    """

    def __init__(
        self,
        spec: EnvSpec,
        shape: tuple[int, ...],
        pairs: int,
        numbers: Mapping[str, float],
        observation_scale: float,
        target_scale: float,
        gain: float,
        log_std: float,
        log_std_min: float,
    ) -> None:
        super().__init__()
        self.observations = nn.Parameter(torch.randn(pairs, *shape) * observation_scale)
        self.targets = nn.Parameter(torch.randn(pairs, spec.actions) * target_scale)
        if not spec.frames:
            self.shift = nn.Parameter(torch.zeros(spec.observation_shape))
            self.log_gain = nn.Parameter(torch.full(spec.observation_shape, math.log(gain)))
        # Logarithms are learned: numbers stay positive.
        self._numbers = tuple(numbers)
        for name, value in numbers.items():
            self.register_parameter(f"log_{name}", nn.Parameter(torch.tensor(math.log(value))))
        self.noise = ActionNoise(spec, log_std, log_std_min)

    @torch.no_grad()
    def set_number(self, name: str, value: Tensor) -> None:
        """Give one of ``numbers`` another value."""
        getattr(self, f"log_{name}").copy_(value.log())

    def corrected(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The normaliser (mean, std), [*obs] each, that learners have where the running one is this."""
        return mean + std * self.shift, std * (-self.log_gain).exp()

    @property
    def pairs(self) -> int:
        return len(self.targets)

    @property
    def numbers(self) -> dict[str, Tensor]:
        """What the step rule needs beside the pairs, by name and in its order: positive scalars."""
        return {name: getattr(self, f"log_{name}").exp() for name in self._numbers}
