"""What is minimised and what it is computed from: PPO's surrogate, divergence, advantages, returns."""

from __future__ import annotations

import torch
from torch import Tensor


def ppo_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), negated to be minimised; mean over all samples.

    Args:
        log_ratio: log π_new(a|s) − log π_old(a|s). advantage: same shape. clip: ε.
    """
    ratio = log_ratio.exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Mean of (r − 1) − log r over samples of the old policy: unbiased, never negative (Schulman 2020, "k3")."""
    return (log_ratio.expm1() - log_ratio).mean()


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target)."""
    return 1 - (target - value).var() / target.var().clamp(min=1e-12)


def generalized_advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16), all tensors [N, T].

    A terminal state is worth nothing (``terminated``); a time limit cuts the trace but keeps the value of the state
    it cut at (``done`` without ``terminated``), which must therefore be the last state's own, not a reset one's.
    """
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    columns = [tensor.unsqueeze(-1) for tensor in (value, next_value, reward, done, terminated)]
    advantage, _ = generalized_advantage_estimate(gamma, gae_lambda, *columns, time_dim=-2)
    return advantage.squeeze(-1)


def discounted_sums(reward: Tensor, done: Tensor, start: Tensor, gamma: float) -> Tensor:
    """Running discounted sums s_t = γ s_{t−1} + r_t, restarted after each ``done``.

    Args:
        reward, done: [N, T]. start: [N], sums before the first step, already restarted. gamma: the discount.

    Returns:
        [N, T], values at each step before a restart.
    """
    running, sums = start, []
    for step_reward, step_done in zip(reward.unbind(1), done.unbind(1), strict=True):
        running = gamma * running + step_reward
        sums.append(running)
        running = running.masked_fill(step_done, 0.0)
    return torch.stack(sums, dim=-1)


def carried_sums(reward: Tensor, done: Tensor, so_far: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted sums [N, T] that go on from the rollout before, and what the next rollout goes on from [N].

    Args:
        reward, done: [N, T]. so_far: the latter of the rollout before; None, or of another number of environments: they begin.
        gamma: the discount.
    """
    if so_far is None or len(so_far) != len(reward):
        so_far = reward.new_zeros(len(reward))
    sums = discounted_sums(reward, done, so_far, gamma)
    return sums, sums[:, -1].masked_fill(done[:, -1], 0.0)
