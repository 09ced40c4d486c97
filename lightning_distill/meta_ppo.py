"""MetaPPO: distil an environment into a synthetic batch (Wilhelm & Ventura 2025).

Fresh learners take one SGD step on the batch, act in the environment, and the PPO loss of what they did is
back-propagated through that step into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import Stage
from .dataset import DistilledDataset
from .envs import ConfigError
from .evaluation import IN_DISTRIBUTION, Evaluation
from .learners import Params
from .ppo import OBSERVATION_CLIP, PPO
from .synthetic import SyntheticBatch
from .teaching import sgd_step
from .versions import versions


class MetaPPO(PPO):
    """Distils an environment into ``pairs`` (observation, target) rows.

    Each iteration draws ``learners`` fresh networks, teaches them by one step, lets them act in the data module's
    environments (an equal share each), and re-teaches them from the same θ₀ in every minibatch, so that the gradient of
    the PPO loss reaches the batch through the step.

    Args:
        spec: the environment, as an ``EnvSpec`` or its ``as_dict()``; the command line takes it from the data module.
        pairs: n, rows of the synthetic batch.
        learners: K, fresh learners in each rollout; divides the number of environments.
        observation_scale: standard deviation of the initial synthetic observations.
        target_scale: standard deviation of the initial targets.
        learning_rate: initial step size η of the one step, per output dimension.
        target_kl, epochs, minibatches, optimizer, critic_optimizer, log_std: as in :class:`lightning_distill.ppo.PPO`.
        kwargs: of :class:`lightning_distill.ppo.PPO`; there the actor is the synthetic batch.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        pairs: PositiveInt = 64,
        learners: PositiveInt = 8,
        observation_scale: PositiveFloat = 0.5,
        target_scale: PositiveFloat = 0.5,
        learning_rate: PositiveFloat = 0.3,
        target_kl: PositiveFloat = 0.05,
        epochs: PositiveInt = 4,
        minibatches: PositiveInt = 4,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: torch.optim.Adam(p, lr=2.5e-3, eps=1e-5, fused=True),
        critic_optimizer: Callable[[Iterable], Optimizer] = lambda p: torch.optim.Adam(
            p, lr=1e-3, eps=1e-5, fused=True
        ),
        log_std: float = -0.5,
        **kwargs: Any,
    ) -> None:
        for name, value in (("pairs", pairs), ("learners", learners)):
            if value < 1:
                raise ConfigError(f"model.{name}={value}: allowed are integers ≥ 1")
        self._learners = learners
        self._initial = {
            "pairs": pairs,
            "observation_scale": observation_scale,
            "target_scale": target_scale,
            "learning_rate": learning_rate,
        }
        super().__init__(
            spec,
            target_kl=target_kl,
            epochs=epochs,
            minibatches=minibatches,
            optimizer=optimizer,
            critic_optimizer=critic_optimizer,
            log_std=log_std,
            **kwargs,
        )

    @property
    def synthetic_batch(self) -> SyntheticBatch:
        return self.actor

    @property
    def learners(self) -> int:
        return self._learners

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        return SyntheticBatch(self.spec, **self._initial, log_std=log_std, log_std_min=log_std_min)

    def draw(self) -> None:
        self._fresh = self.family.draw(self.learners, self.spec.observation_shape, self.spec.actions, self.device)

    def policy_params(self) -> Params:
        batch = self.synthetic_batch
        return sgd_step(self.family.forward, self._fresh, batch.observations, batch.targets, batch.learning_rate)

    def actor_metrics(self) -> dict[str, Tensor]:
        return {**super().actor_metrics(), "learning_rate": self.synthetic_batch.learning_rate.detach()}

    row = IN_DISTRIBUTION
    players = "fresh learners after one step"

    def evaluate(self, stage: Stage, greedy: bool = False) -> Evaluation:
        """Returns of fresh in-distribution learners in whole episodes."""
        return self.trainer.datamodule.evaluate(self.distilled(), self.family, stage, greedy)

    # --- the dataset ---------------------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        """The present synthetic batch as a dataset on its own, with the normaliser of this moment."""
        batch, moments = self.synthetic_batch, self.observation_moments
        tensors = {
            "observations": batch.observations,
            "targets": batch.targets,
            "learning_rate": batch.learning_rate,
            "observation_mean": moments.mean,
            "observation_std": moments.std,
        }
        if self.log_std is not None:
            tensors["log_std"] = self.log_std
        return DistilledDataset(
            **{name: tensor.detach().float().clone() for name, tensor in tensors.items()},
            env=self.spec.id,
            action_type=self.spec.action_type,
            observation_clip=OBSERVATION_CLIP,
            metadata={
                "env_kwargs": self.spec.kwargs,
                "learners": [self.family.describe()],
                "env_steps": int(self.env_steps),
                "seed": self.seed,
                "versions": versions(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "license": "MIT",
            },
        )
