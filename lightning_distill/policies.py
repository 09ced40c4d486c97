"""From a learner's outputs to actions: the distributions, and the noise of continuous ones.

Shapes: ``output`` [..., d] is what a learner returns (logits or means), ``action`` [...] (discrete) or [..., d].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from .envs import EnvSpec


def action_distribution(output: Tensor, log_std: Tensor | None) -> Categorical | DiagonalGaussian:
    """Categorical over logits (``log_std`` None), or a diagonal Gaussian with log-probabilities of the joint action."""
    if log_std is None:
        return Categorical(logits=output, validate_args=False)
    return DiagonalGaussian(output, log_std)


class DiagonalGaussian:
    """What ``Independent(Normal(mean, log_std.exp()), 1)`` is, in a third of its time: every step and minibatch needs one.

    Args:
        mean: [..., d]. log_std: [d].
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean, self.log_std = mean, log_std

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self) -> Tensor:
        """One action [..., d] each, from torch's global random state."""
        return torch.addcmul(self.mean, self.log_std.exp(), torch.randn_like(self.mean))

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density [...] of joint actions [..., d]."""
        squares = ((action - self.mean) * (-self.log_std).exp()).square().sum(-1)
        return -0.5 * squares - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()

    def entropy(self) -> Tensor:
        """Differential entropy, the same for each mean: [...]."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(self.mean.shape[:-1])


class ActionNoise(nn.Module):
    """The learnable log standard deviation of a Gaussian policy; holds nothing if actions are discrete.

    Args:
        spec: gives the kind of action and its range.
        log_std: initial value, relative to half the action range.
        log_std_min: lower bound of the same; below it exploration would end.
    """

    def __init__(self, spec: EnvSpec, log_std: float, log_std_min: float) -> None:
        super().__init__()
        self.continuous = spec.action_type == "continuous"
        if self.continuous:
            self.log_std_min = log_std_min
            self.relative = nn.Parameter(torch.full((spec.actions,), max(log_std, log_std_min)))
            half_range = (torch.tensor(spec.action_high) - torch.tensor(spec.action_low)) / 2
            # Of a dimension without an end, or with one value alone, 1.
            half_range = torch.where(half_range.isfinite() & (half_range > 0), half_range, torch.ones_like(half_range))
            self.register_buffer("log_half_range", half_range.log(), persistent=False)
            self.register_buffer("log_share", torch.zeros(()))

    @torch.no_grad()
    def begin_with(self, log_std: Tensor) -> None:
        """Take a log standard deviation [d] in the environment's units as what is learned so far, where it is above the minimum.

        A dataset's noise has been annealed: with it a run by reward would find nothing more.
        """
        self.relative.copy_(log_std.to(self.relative.device) - self.log_half_range)
        self.keep_minimum()

    @torch.no_grad()
    def keep_minimum(self) -> None:
        """Back to the minimum where an update went below. A bound on what is learned from would have no gradient there: noise
        that reached it once could never grow again."""
        if self.continuous:
            self.relative.clamp_(min=self.log_std_min)

    def anneal(self, share: float) -> None:
        """From now on noise is this share, in (0, 1], of what is learned."""
        if self.continuous:
            self.log_share.fill_(math.log(share))

    @property
    def log_std(self) -> Tensor | None:
        """Log standard deviation [d] of actions in the environment's units; None if discrete."""
        if not self.continuous:
            return None
        return self.relative + self.log_share + self.log_half_range
