"""PPO on streamed rollouts (Schulman et al. 2017): the objective that direct RL and distillation share.

``PPO`` optimises a policy's own weights: the direct-RL baseline. ``MetaPPO`` replaces those weights by the result of
one SGD step on a synthetic batch, and optimises the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .compiling import Losses
from .configs import check_numbers
from .critics import make_critic
from .data import Stage
from .dataset import DistilledDataset
from .envs import ConfigError, EnvSpec
from .evaluation import StackedActor
from .learners import FIXED, LearnerFamily, Params
from .mixtures import members
from .moments import RunningMoments
from .objectives import (
    approximate_kl,
    carried_sums,
    explained_variance,
    generalized_advantages,
    ppo_loss,
)
from .optimizing import LinearAnneal as LinearAnneal  # where the configs of earlier runs say that it is
from .policies import ActionNoise, action_distribution
from .returns import TRAINED_POLICY, Evaluation
from .rollout_module import RolloutModule
from .teaching import teach_many

#: Numbers in the observations whose values are computed at once.
VALUE_CHUNK = 2**24


class PPO(RolloutModule):
    """Proximal policy optimisation of one policy's weights, one rollout a batch.

    A rollout [N, T] is normalised, its advantages are estimated, and ``epochs`` × ``minibatches`` updates are made on it. Defaults are
    those of Huang et al. (2022, "The 37 implementation details of PPO") for continuous control and rollouts of 2048 steps, in 4
    minibatches instead of 32 and at three times the learning rate: an eighth of the updates.

    Args:
        spec: as in :class:`lightning_distill.rollout_module.RolloutModule`.
        gamma: discount γ.
        gae_lambda: λ of generalised advantage estimation.
        clip: ε of the clipped surrogate.
        value_coef: weight of the value loss; matters to an encoder alone, which policy and value loss share.
        target_kl: when a minibatch's approximate KL divergence from the acting policy exceeds this, the actor and the
            encoder are left alone for the rest of the iteration; the critic goes on.
        critic_warmup: iterations at the beginning of the run in which the critic alone learns, not the encoder either: what it says at
            first would undo what ``start`` can do.
        kwargs: of :class:`lightning_distill.rollout_module.RolloutModule`. With ``start`` the policy begins as a fresh learner of the family
            taught on that dataset.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        gamma: ClosedUnitInterval = 0.99,
        gae_lambda: ClosedUnitInterval = 0.95,
        clip: PositiveFloat = 0.2,
        value_coef: PositiveFloat = 1.0,
        target_kl: PositiveFloat = math.inf,
        critic_warmup: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        check_numbers("model", PPO.__init__, locals())
        super().__init__(spec, **kwargs)
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip, self.target_kl, self.value_coef = clip, target_kl, value_coef
        self.critic_warmup = critic_warmup
        self.return_moments = RunningMoments()
        self._running: Tensor | None = None

    # --- the objective ------------------------------------------------------------------------------------------

    def make_critic(self) -> nn.Module:
        return make_critic(self.learner_shape, self.spec.frames)

    def recorded(self, inputs: Tensor) -> dict[str, Tensor]:
        # An encoder is most of what a value costs, and here it has run. Of vectors a rollout's values at once cost less.
        return {"value": self.critic(inputs).squeeze(-1)} if self.spec.frames else {}

    @torch.no_grad()
    def samples(self, rollout: TensorDictBase) -> dict[str, Tensor]:
        reward, done, terminated = (rollout["next", key].squeeze(-1) for key in ("reward", "done", "terminated"))
        value = rollout["value"] if "value" in rollout else self._values(rollout["observation"])
        # The next state's value is the next step's, except where the trace is cut; behind an end it counts for nothing.
        next_value, cut = value.roll(-1, 1), done & ~terminated
        cut[:, -1] = True
        next_value[cut] = self._values(rollout["next", "observation"][cut])
        advantage = generalized_advantages(
            self._scaled(reward, done), value, next_value, terminated, done, self.gamma, self.gae_lambda
        )
        samples = {
            "observation": rollout["observation"],
            "action": rollout["action"],
            "log_prob": action_distribution(rollout["output"], self._acting_log_std).log_prob(rollout["action"]),
            "advantage": self._standardised(advantage),
            "value_target": advantage + value,
            "value": value,
        }
        return {name: tensor.unflatten(0, (self.learners, -1)).flatten(1, 2) for name, tensor in samples.items()}

    def _values(self, observations: Tensor) -> Tensor:
        """The critic's values of observations [*batch, *obs], in parts that take a bounded amount of memory."""
        shape = self.spec.observation_shape
        batch = observations.shape[: observations.dim() - len(shape)]
        parts = observations.reshape(-1, *shape).split(max(1, VALUE_CHUNK // torch.Size(shape).numel()))
        return torch.cat([self.critic(self.encode(part)).squeeze(-1) for part in parts]).view(batch)

    def _scaled(self, reward: Tensor, done: Tensor) -> Tensor:
        """Rewards over the running standard deviation of discounted returns."""
        sums, self._running = carried_sums(reward, done, self._running, self.gamma)
        self.return_moments.update(sums, self._sum_over_processes)
        return reward / self.return_moments.std.to(reward.dtype)

    def _standardised(self, advantage: Tensor) -> Tensor:
        """Advantages with mean 0 and standard deviation 1 over the samples of all processes."""
        # In single precision a variance that is small beside the mean's square is lost.
        exact = advantage.double()
        sums = torch.stack([torch.full_like(exact[0, 0], exact.numel()), exact.sum(), exact.square().sum()])
        count, total, squares = self._sum_over_processes(sums)
        mean = total / count
        standardised = (exact - mean) / ((squares / count - mean.square()).clamp(min=0).sqrt() + 1e-8)
        return standardised.to(advantage)

    def _update(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super()._update(samples)
        return metrics | {"loss/explained_variance": explained_variance(samples["value"], samples["value_target"])}

    @property
    def actor_learns(self) -> bool:
        return int(self.iteration) >= self.critic_warmup

    def may_go_on(self, found: dict[str, Tensor]) -> bool:
        kl = found["policy/kl"] = self._mean_over_processes(found["policy/kl"])
        return self.target_kl == math.inf or not kl > self.target_kl

    def losses(self, batch: dict[str, Tensor], learns: bool) -> Losses:
        batch = batch | self._inputs(batch["observation"])
        value_loss = self._value_loss(batch)
        found = {"loss/value": value_loss}
        if not learns:
            return self.value_coef * value_loss, None, found
        policy_loss, entropy, log_ratio = self._policy_loss(batch)
        with torch.no_grad():
            found["policy/kl"] = approximate_kl(log_ratio)
            found["policy/clip_fraction"] = (log_ratio.exp() - 1).abs().gt(self.clip).float().mean()
        found |= {"loss/policy": policy_loss, "policy/entropy": entropy}
        return self.value_coef * value_loss, policy_loss - self.entropy_coef * entropy, found

    def _inputs(self, observations: Tensor) -> dict[str, Tensor]:
        """What critic and policies are fed for an environment's observations; the same where both have one normaliser."""
        encoded, own = self.encode(observations), self.policy_normaliser()
        return {"critic_input": encoded, "input": encoded if own is None else self.encode(observations, own)}

    def _value_loss(self, batch: dict[str, Tensor]) -> Tensor:
        value = self.critic(batch["critic_input"]).squeeze(-1)
        return (value - batch["value_target"]).square().mean()

    def _policy_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Clipped surrogate, entropy, and log π_new − log π_old of each sample."""
        output = self.family.forward(self.policy_params(), batch["input"])
        policy = action_distribution(output, self.log_std)
        log_ratio = policy.log_prob(batch["action"]) - batch["log_prob"]
        return ppo_loss(log_ratio, batch["advantage"], self.clip), policy.entropy().mean(), log_ratio

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        made = super().configure_optimizers()
        if self.critic_warmup >= self._iterations and not self.trainer.fast_dev_run:
            raise ConfigError(
                f"model.critic_warmup={self.critic_warmup}: the run has {self._iterations} iterations, allowed are fewer"
            )
        return made

    # --- one policy, whose weights are learned ------------------------------------------------------------------

    players = "runs of the one trained policy"

    @property
    def learners(self) -> int:
        return 1

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        return PolicyWeights(self.family, self.spec, self.learner_shape, log_std, log_std_min)

    def policy_params(self) -> Params:
        return self.actor.params()

    def begin_actor_as(self, dataset: DistilledDataset) -> None:
        if len(members(self.family)) > 1:  # the learner that is taught would be of another than the policy
            raise ConfigError("begins one policy; allowed is a model.family of one architecture")
        taught = teach_many(self.family, dataset, 1).module.params
        for name, weight in self.actor.params().items():
            weight.copy_(taught[name])

    def evaluate(self, stage: Stage, greedy: bool = False) -> dict[str, Evaluation]:
        return {TRAINED_POLICY: self.trainer.datamodule.play(self.present_policy, stage, greedy)}

    def present_output(self, observations: Tensor) -> Tensor:
        """Logits or means [*batch, d] of the one policy as it is, with the normaliser of this moment.

        Args:
            observations: of an environment, [*batch, *obs], of one batch dimension or more.
        """
        batch = observations.shape[: observations.dim() - len(self.spec.observation_shape)]
        inputs = self.encode(observations.flatten(0, len(batch) - 1), self.running_normaliser())
        return self.family.forward(self.policy_params(), inputs.unsqueeze(0)).view(*batch, -1)

    def present_policy(self) -> StackedActor:
        """The one policy as it is, in as many environments as are asked for."""

        def act(observation: Tensor, sample: bool = False) -> Tensor:
            distribution = action_distribution(self.present_output(observation), self.log_std)
            return distribution.sample() if sample else distribution.mode

        return act


class PolicyWeights(nn.Module):
    """One learner's own parameters as trainable weights: what direct RL optimises."""

    def __init__(
        self, family: LearnerFamily, spec: EnvSpec, shape: tuple[int, ...], log_std: float, log_std_min: float
    ) -> None:
        super().__init__()
        drawn = family.draw(1, shape, spec.actions)
        self.names = list(drawn)
        self.weights = nn.ParameterList(
            nn.Parameter(value, requires_grad=not name.startswith(FIXED)) for name, value in drawn.items()
        )
        self.noise = ActionNoise(spec, log_std, log_std_min)

    def params(self) -> Params:
        return dict(zip(self.names, self.weights, strict=True))
