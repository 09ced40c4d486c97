"""PPO on streamed rollouts (Schulman et al. 2017): the update that direct RL and distillation share.

``PPO`` optimises a policy's own weights: the direct-RL baseline. ``MetaPPO`` replaces those weights by the result of
one SGD step on a synthetic batch, and optimises the batch.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .checkpoints import make_resumable
from .compiling import CompiledLosses, Losses
from .configs import check_numbers
from .critics import make_critic
from .data import CollectorDataModule, Stage
from .dataset import DistilledDataset, load, normalise
from .envs import ConfigError, EnvSpec, reason, stream_seed
from .evaluation import TRAINED_POLICY, Evaluation, StackedActor, check_begins
from .families import as_family
from .learners import FIXED, Factory, LearnerFamily, Params, UnfitLearner
from .mixtures import members
from .moments import FrameScale, RunningMoments
from .nature import LEVELS, make_encoder, scaled
from .objectives import (
    approximate_kl,
    discounted_sums,
    explained_variance,
    generalized_advantages,
    ppo_loss,
)
from .policies import ActionNoise, action_distribution
from .step_rules import check_outputs
from .teaching import keep_random_state, teach_many

Normaliser = tuple[Tensor, Tensor]

OBSERVATION_CLIP = 10.0
EPISODES_LOGGED = 100
#: Others lose the gradients' size (16-mixed, scaled) or the dtype of what simulators return.
PRECISIONS = ("32-true", "bf16-mixed")
#: Numbers in the observations whose values are computed at once.
VALUE_CHUNK = 2**24


def check_env(checkpoint: dict[str, Any], env: str, kwargs: dict[str, Any] | None = None) -> None:
    """Raise ``ConfigError`` unless a checkpoint is of this environment and, where they are given, of these arguments of it."""
    saved = checkpoint.get("env")
    if saved is None:
        return
    if saved["id"] != env:
        raise ConfigError(f"ckpt_path: a checkpoint of env={saved['id']!r}, but data.env={env!r}")
    if kwargs is not None and saved["kwargs"] != kwargs:
        raise ConfigError(
            f"ckpt_path: a checkpoint of data.env_kwargs={saved['kwargs']}, but here they are {kwargs}; what it has learned is trained "
            "elsewhere from its dataset (--model.start=FILE)"
        )


class LinearAnneal(LambdaLR):
    """From the optimiser's learning rate down to ``final`` times it over ``iterations``.

    The number of iterations is not part of its state: a run that is resumed for longer anneals over its new length.
    """

    def __init__(self, optimizer: Optimizer, iterations: int, final: float = 0.0) -> None:
        super().__init__(optimizer, lambda step: 1 - (1 - final) * min(step / iterations, 1.0))


class PPO(L.LightningModule):
    """Proximal policy optimisation of one policy's weights, one rollout a batch.

    A training batch is a rollout [N, T] of the data module. It is normalised, its advantages are estimated, and
    ``epochs`` × ``minibatches`` updates are made on it; actor and critic have an optimiser each, and one backward pass
    serves both, so that DDP averages all gradients. Defaults are those of Huang et al. (2022, "The 37 implementation
    details of PPO") for continuous control and rollouts of 2048 steps, in 4 minibatches instead of 32 and at three times
    the learning rate: an eighth of the updates.

    Args:
        spec: the environment, as an ``EnvSpec``. The command line gives its ``as_dict()``, from the data module, and plain values for all
            else, which a checkpoint then keeps.
        family: what learners are drawn from: a name (``paper``: MLP 64-64 tanh, orthogonal), a family, or what makes an ``nn.Module`` from
            (observation_shape, outputs), by class path, with arguments or without.
        encoder_level: l ∈ 0…4, for Atari: the first l layers of the Nature CNN are one encoder, trained along with the
            critic by the gradient of the whole loss; learners and critic are fed its features.
        gamma: discount γ.
        gae_lambda: λ of generalised advantage estimation.
        clip: ε of the clipped surrogate.
        value_coef: weight of the value loss; matters to an encoder alone, which policy and value loss share.
        target_kl: when a minibatch's approximate KL divergence from the acting policy exceeds this, the actor and the
            encoder are left alone for the rest of the iteration; the critic goes on.
        entropy_coef: weight of the entropy bonus.
        epochs: passes over a rollout.
        minibatches: parts of one pass.
        max_grad_norm: gradients are clipped to this norm, actor and critic each.
        optimizer: of the actor, called with its parameters.
        critic_optimizer: of the critic and the encoder, called with their parameters.
        scheduler: called with an optimiser and the number of iterations; stepped once an iteration, for both.
        log_std: initial log standard deviation of continuous actions, relative to half the action range.
        log_std_min: lower bound of the same.
        noise_rate: learning rate of ``log_std`` over the optimiser's. Where it is learned as fast as the means, noise is gone before
            the means have found much.
        final_noise: share of the learned standard deviation that is left at the end of the run.
        noise_falls_from: share of the run after which it falls there, linearly.
        start: a distilled dataset, by name in the zoo or by path: the policy begins as a fresh learner of the family taught on it,
            with its encoder, its noise and its normaliser, which stays as it is there. The critic begins anew.
        critic_warmup: iterations at the beginning of the run in which the critic alone learns, not the encoder either: what it says at
            first would undo what ``start`` can do.
        compile: losses and their gradients are compiled (``torch.compile``): updates take two thirds of their time, the first iteration up to
            half a minute longer. On a CPU this needs a C++ compiler. For MLPs, not for mixtures, modules and frames.
    """

    #: Arguments that may be objects.
    OBJECTS: tuple[str, ...] = ("spec", "family", "optimizer", "critic_optimizer", "scheduler")

    def __init__(
        self,
        spec: dict[str, Any],
        family: str | LearnerFamily | Factory = "paper",
        encoder_level: int = 0,
        gamma: ClosedUnitInterval = 0.99,
        gae_lambda: ClosedUnitInterval = 0.95,
        clip: PositiveFloat = 0.2,
        value_coef: PositiveFloat = 1.0,
        target_kl: PositiveFloat = math.inf,
        entropy_coef: NonNegativeFloat = 0.0,
        epochs: PositiveInt = 10,
        minibatches: PositiveInt = 4,
        max_grad_norm: PositiveFloat = 0.5,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-5, fused=True),
        critic_optimizer: Callable[[Iterable], Optimizer] = lambda p: torch.optim.Adam(
            p, lr=1e-3, eps=1e-5, fused=True
        ),
        scheduler: Callable[[Optimizer, int], LRScheduler] = LinearAnneal,
        log_std: float = 0.0,
        log_std_min: float = -3.0,
        noise_rate: PositiveFloat = 1.0,
        final_noise: PositiveFloat = 1.0,
        noise_falls_from: ClosedUnitInterval = 0.0,
        start: str | None = None,
        critic_warmup: NonNegativeInt = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_numbers("model", PPO.__init__, locals())
        if not 0 < final_noise <= 1:
            raise ConfigError(f"model.final_noise={final_noise}: allowed are numbers above 0, up to 1")
        if not 0 <= noise_falls_from < 1:
            raise ConfigError(f"model.noise_falls_from={noise_falls_from}: allowed are numbers from 0, below 1")
        # The command line gives plain values, all of which a checkpoint can hold; objects given in Python stay outside.
        self.save_hyperparameters(ignore=() if isinstance(spec, dict) else self.OBJECTS)
        self.automatic_optimization = False
        self.spec = spec if isinstance(spec, EnvSpec) else EnvSpec(**spec)
        self.family = as_family(family)
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip, self.target_kl, self.entropy_coef, self.value_coef = clip, target_kl, entropy_coef, value_coef
        self.noise_rate, self.final_noise, self.noise_falls_from = noise_rate, final_noise, noise_falls_from
        self.epochs, self.minibatches, self.max_grad_norm = epochs, minibatches, max_grad_norm
        self.critic_warmup = critic_warmup
        if compile and self.spec.frames:
            raise ConfigError(
                "model.compile=true with frames: allowed is false; an encoder learns from both losses at once"
            )
        self.compiles = compile
        self._compiled: CompiledLosses | None = None
        self.optimizer, self.critic_optimizer, self.scheduler = optimizer, critic_optimizer, scheduler
        self.encoder_level, self.encoder, self.learner_shape = self._make_encoder(encoder_level)
        self.actor = self.make_actor(log_std, log_std_min)
        self.critic = make_critic(self.learner_shape, self.spec.frames)
        self.observation_moments = FrameScale() if self.spec.frames else RunningMoments(self.spec.observation_shape)
        self.return_moments = RunningMoments()
        self.observation_clip = OBSERVATION_CLIP
        self.register_buffer("env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.seed, self.rank, self._precision = 0, 0, nullcontext
        #: Environment steps that a run takes before its first rollout.
        self.first_steps = 0
        #: Iterations and environment steps made before this ``fit``, if it goes on from a checkpoint.
        self.resumed = 0, 0
        #: Of the policies as they are at this moment: row → sampled|greedy → evaluation; empty once they have learned more.
        self.evaluations: dict[str, dict[str, Evaluation]] = {}
        self._episode_returns: deque[float] = deque(maxlen=EPISODES_LOGGED)
        self._inference_seconds = 0.0
        self._running: Tensor | None = None
        self.start = start
        if start is not None:
            try:
                self._begin_as(load(start))
            except ValueError as error:
                raise ConfigError(f"model.start={start!r}: {error}") from None

    def prepare_for_worker(self) -> None:
        """Drop what cannot be pickled for a worker that acts: what makes optimisers, and compiled functions."""
        self.optimizer = self.critic_optimizer = self.scheduler = self._compiled = None

    # --- acting -------------------------------------------------------------------------------------------------

    def encode(self, observations: Tensor, normaliser: Normaliser | None = None) -> Tensor:
        """An environment's observations [..., *obs] as networks are fed them, [..., *learner_shape].

        Args:
            normaliser: mean and standard deviation [*obs] each; default: the running ones, which the critic has.
        """
        if self.spec.frames:
            return self.encoder(scaled(observations, None if self.encoder_level else self.observation_moments.mean))
        mean, std = normaliser or self._normaliser
        return normalise(observations.float(), mean, std, self.observation_clip)

    def running_normaliser(self) -> Normaliser:
        """Mean and standard deviation of everything seen by this moment."""
        return self.observation_moments.mean.float(), self.observation_moments.std.float()

    def policy_normaliser(self) -> Normaliser | None:
        """Mean and standard deviation for what policies are fed, if they are not the running ones."""
        return None

    @torch.no_grad()
    def begin_rollout(self) -> None:
        """Fix the policies that act in the next rollout. Called by the data module before each.

        All randomness of an iteration follows from (seed, rank, iteration), so a resumed run draws what the
        uninterrupted one would have drawn.
        """
        torch.manual_seed(stream_seed(self.seed, self.rank, int(self.iteration)))
        self._normaliser = self.running_normaliser()
        progress = min(int(self.iteration) / self._iterations, 1.0)
        fallen = max(0.0, (progress - self.noise_falls_from) / (1 - self.noise_falls_from))
        self.actor.noise.anneal(1 - (1 - self.final_noise) * fallen)
        self.draw()
        self._acting_normaliser = self.policy_normaliser()
        with self._precision():
            self._acting = self.policy_params()
        self._acting_log_std = self.log_std

    @torch.no_grad()
    def act(self, state: MutableMapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """The collector's policy: writes ``action``, and ``output`` to tell later how likely it was; of frames ``value``."""
        began = time.perf_counter()
        with self._precision():
            # Not a number would break the sampling of an action; the rollout's check names it soon enough.
            observation = self.encode(state["observation"], self._acting_normaliser).nan_to_num()
            output = self.family.forward(self._acting, observation.unflatten(0, (self.learners, -1))).flatten(0, 1)
            if self.spec.frames:
                # An encoder is most of what a value costs, and here it has run. Of vectors a rollout's values at once cost less.
                state["value"] = self.critic(observation).squeeze(-1)
        state["output"] = output
        state["action"] = action_distribution(output, self._acting_log_std).sample()
        self._inference_seconds += time.perf_counter() - began
        return state

    # --- learning -----------------------------------------------------------------------------------------------

    def training_step(self, rollout: TensorDictBase, batch_idx: int) -> None:
        """One iteration: a rollout [N, T] and its PPO epochs."""
        self._rollout_ended_at = time.perf_counter()
        self._check_finite(rollout)
        self.evaluations = {}
        samples = self._samples(rollout)
        metrics = self._update(samples)
        self.observation_moments.update(rollout["next", "observation"], self._sum_over_processes)
        self.iteration += 1
        self.env_steps += rollout.numel() * self.trainer.world_size
        self._log(metrics, rollout.numel())
        for scheduler in self.lr_schedulers():
            scheduler.step()

    @torch.no_grad()
    def _samples(self, rollout: TensorDictBase) -> dict[str, Tensor]:
        """Tensors [K, M, …] for the update of K learners from M samples each."""
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
        """Rewards over the running standard deviation of discounted returns; also collects episode returns."""
        if self._running is None or self._running.shape[1] != len(reward):
            self._running = reward.new_zeros(2, len(reward))
        sums = discounted_sums(reward, done, self._running, reward.new_tensor([self.gamma, 1.0]))
        self._running = sums[..., -1].masked_fill(done[:, -1], 0.0)
        self._episode_returns.extend(
            sums[1].T[done.T].tolist()
        )  # in order of time: the latest of all environments stay
        self.return_moments.update(sums[0], self._sum_over_processes)
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
        actor_optimizer, critic_optimizer = self.optimizers()
        actor_params, critic_params = list(self.actor.parameters()), self._critic_params()
        count = samples["advantage"].shape[1]
        device = samples["advantage"].device
        metrics: dict[str, list[Tensor]] = {}
        stopped = int(self.iteration) < self.critic_warmup
        losses = self._losses if self._compiled is None else self._compiled
        for _ in range(self.epochs):
            for index in torch.randperm(count, device=device).tensor_split(self.minibatches):
                batch = {name: tensor.index_select(1, index) for name, tensor in samples.items()}
                value_loss, policy_loss, policy_metrics = losses(batch, not stopped)
                found = {"loss/value": value_loss}
                if not stopped:
                    kl = found["policy/kl"] = self._mean_over_processes(policy_metrics["policy/kl"])
                    found["policy/clip_fraction"] = policy_metrics["policy/clip_fraction"]
                    stopped = self.target_kl < math.inf and bool(kl > self.target_kl)
                if stopped:
                    policy_loss = no_loss(actor_params)
                else:
                    found |= {name: policy_metrics[name] for name in ("loss/policy", "policy/entropy")}
                actor_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                self.manual_backward(policy_loss + self.value_coef * value_loss)
                if stopped:
                    self.encoder.zero_grad()  # it feeds the actor, too, which is to stay as it is
                found["gradient/critic"] = clipped_step(critic_optimizer, critic_params, self.max_grad_norm)
                if not stopped:
                    found["gradient/actor"] = clipped_step(actor_optimizer, actor_params, self.max_grad_norm)
                    self.actor.noise.keep_minimum()
                for name, tensor in found.items():
                    metrics.setdefault(name, []).append(tensor.detach())
        actor_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        result = {name: torch.stack(values).mean() for name, values in metrics.items()}
        result["policy/updates"] = torch.tensor(float(len(metrics.get("gradient/actor", []))), device=device)
        result["gradient/skipped"] = self._count_skipped(metrics)
        result["loss/explained_variance"] = explained_variance(samples["value"], samples["value_target"])
        return result

    def _losses(self, batch: dict[str, Tensor], learns: bool) -> Losses:
        """The critic's loss, the actor's (None unless it ``learns``), and what is logged of that."""
        batch = batch | self._inputs(batch["observation"])
        value_loss = self._value_loss(batch)
        if not learns:
            return value_loss, None, {}
        policy_loss, entropy, log_ratio = self._policy_loss(batch)
        with torch.no_grad():
            policy_metrics = {
                "policy/kl": approximate_kl(log_ratio),
                "policy/clip_fraction": (log_ratio.exp() - 1).abs().gt(self.clip).float().mean(),
            }
        policy_metrics |= {"loss/policy": policy_loss, "policy/entropy": entropy}
        return value_loss, policy_loss - self.entropy_coef * entropy, policy_metrics

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

    def _check_finite(self, rollout: TensorDictBase) -> None:
        """Raise ``ConfigError``, on all processes alike, before anything is learned from a rollout that is not finite."""
        names = {
            "a reward": ("next", "reward"),
            "an observation": ("next", "observation"),
            "a first observation": "observation",
        }
        # Bytes are finite, and frames are too many to look at for nothing.
        names = {name: key for name, key in names.items() if rollout[key].is_floating_point()}
        broken = torch.stack([rollout[key].isfinite().logical_not().any() for key in names.values()]).float()
        for name, found in zip(names, self._sum_over_processes(broken).tolist(), strict=True):
            if found:
                raise ConfigError(
                    f"env={self.spec.id!r} returned {name} that is NaN or infinite after {int(self.env_steps)} steps; "
                    f"allowed: finite numbers"
                )

    def _count_skipped(self, metrics: dict[str, list[Tensor]]) -> Tensor:
        """Number of updates of this iteration whose gradient was not finite.

        Raises:
            ConfigError: of actor or critic, all were.
        """
        skipped = {}
        for name in ("actor", "critic"):
            norms = metrics.get(f"gradient/{name}", [])
            skipped[name] = sum(norm.isfinite().logical_not().float() for norm in norms)
            if norms and skipped[name] == len(norms):
                raise ConfigError(
                    f"no finite gradient of the {name} in iteration {int(self.iteration)} (after {int(self.env_steps)} "
                    "steps): what was learned so far is kept; begin with it (--model.start) and a lower lr of model.optimizer and "
                    "model.critic_optimizer, or look for huge rewards and observations"
                )
        return skipped["actor"] + skipped["critic"]

    # --- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Whole episodes with sampled actions."""
        rows = self.evaluate("validate")
        self.evaluations = {row: {"sampled": evaluation} for row, evaluation in rows.items()}
        evaluation = next(iter(rows.values()))
        self.log("val/return", evaluation.mean, batch_size=1, prog_bar=True)
        self.log("val/return_worst", evaluation.worst, batch_size=1)
        self.log("val/return_ci95", evaluation.ci95, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Whole episodes with sampled and with greedy actions."""
        self.evaluations = {}
        for kind in ("sampled", "greedy"):
            for index, (row, evaluation) in enumerate(self.evaluate("test", greedy=kind == "greedy").items()):
                name = f"test/{kind}/{row}/return" if index else f"test/return_{kind}"
                self.evaluations.setdefault(row, {})[kind] = evaluation
                self.log(name, evaluation.mean, batch_size=1)
                self.log(f"{name}_ci95", evaluation.ci95, batch_size=1)

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

    # --- across processes ---------------------------------------------------------------------------------------

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(tensor, reduce_op="mean")

    # --- Lightning ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        try:
            self._iterations = max(1, int(min(self.trainer.estimated_stepping_batches, 2**31)))
        except ValueError as error:  # of Lightning: more iterations between validations than there are
            raise ConfigError(f"trainer.val_check_interval={self.trainer.val_check_interval}: {error}") from error
        if self.critic_warmup >= self._iterations and not self.trainer.fast_dev_run:
            raise ConfigError(
                f"model.critic_warmup={self.critic_warmup}: the run has {self._iterations} iterations, allowed are fewer"
            )
        self.check_optimizers(self._iterations)
        optimizers = [self._actor_optimizer(), self.critic_optimizer(self._critic_params())]
        return optimizers, [self.scheduler(optimizer, self._iterations) for optimizer in optimizers]

    def _actor_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """The actor's parameters, with the noise as a second group."""
        noise = list(self.actor.noise.parameters())
        groups = [{"params": [p for p in self.actor.parameters() if p not in set(noise)]}]
        return [*groups, {"params": noise}] if noise else groups

    def _actor_optimizer(self) -> Optimizer:
        optimizer = self.optimizer(self._actor_groups())
        for group in optimizer.param_groups[1:]:
            group["lr"] *= self.noise_rate
        return optimizer

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_trainer(self.trainer)
            if not isinstance(self.trainer.datamodule, CollectorDataModule):
                raise ConfigError("trainer.fit: rollouts come from a data module; allowed is a CollectorDataModule")
            self.check_rollouts(self.trainer.datamodule)

    def check(self, trainer: L.Trainer, data: CollectorDataModule) -> None:
        """Raise ``ConfigError`` for anything with which this module cannot be trained, before ``trainer.fit`` begins anything.

        That looks itself, once the module is on its device; optimisers may be for that device alone.
        """
        self.check_trainer(trainer)
        self.check_rollouts(data)
        self.check_family()
        if trainer.strategy.root_device.type == "cpu":
            self.check_optimizers(max(1, data.env_steps // (data.num_envs * data.rollout_length * trainer.world_size)))

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Raise ``ConfigError`` for options of the Trainer that this module cannot be trained with."""
        if trainer.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={trainer.precision!r}: allowed are {', '.join(PRECISIONS)}")
        if trainer.max_steps != -1 and not trainer.fast_dev_run:  # which sets it itself
            # Lightning counts each optimiser's steps there, schedules count iterations.
            raise ConfigError(
                f"trainer.max_steps={trainer.max_steps}: allowed is -1; data.env_steps says how long a run is"
            )
        if trainer.check_val_every_n_epoch not in (None, 1):
            raise ConfigError(
                f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}: allowed is 1; one epoch is the whole run, "
                "trainer.val_check_interval says how often it is validated"
            )
        if trainer.max_epochs != 1:
            raise ConfigError(
                f"trainer.max_epochs={trainer.max_epochs}: allowed is 1; one epoch is the whole run, data.env_steps says how long"
            )

    def check_rollouts(self, data: CollectorDataModule) -> None:
        """Raise ``ConfigError`` for rollouts that this module cannot learn from."""
        data.check_learners(self.learners)
        samples = data.num_envs * data.rollout_length // self.learners
        if samples < self.minibatches:
            raise ConfigError(
                f"model.minibatches={self.minibatches}: a rollout has {samples} samples of each learner; allowed are at most as many"
            )

    def check_optimizers(self, iterations: int) -> None:
        """Raise ``ConfigError`` unless optimisers can be made and take a step on copies of the parameters, where these are, with gradients
        of zero, and schedulers can be made of them."""

        def copied(param: nn.Parameter) -> nn.Parameter:
            copy = nn.Parameter(param.detach().clone(), param.requires_grad)
            copy.grad = torch.zeros_like(copy) if copy.requires_grad else None
            return copy

        groups = [{"params": list(map(copied, group["params"]))} for group in self._actor_groups()]
        for name, params in (("optimizer", groups), ("critic_optimizer", list(map(copied, self._critic_params())))):
            try:
                optimizer = getattr(self, name)(params)
                optimizer.step()
            except Exception as error:  # somebody else's optimiser may raise anything
                raise ConfigError(
                    f"model.{name}: cannot be made for this module's parameters and take a step ({reason(error)}); allowed "
                    "are optimisers of dense parameters of any shape, in groups, whose step takes no closure, as Adam, AdamW, RMSprop and SGD"
                ) from error
            try:
                self.scheduler(optimizer, iterations)
            except Exception as error:
                raise ConfigError(
                    f"model.scheduler: cannot be made of an optimiser and a number of iterations, {iterations} "
                    f"({reason(error)}); allowed are schedulers that can, as LinearAnneal and CosineAnnealingLR"
                ) from error

    def on_fit_start(self) -> None:
        if self.iteration and self.resumed == (0, 0):
            raise ConfigError(
                f"this module has learned for {int(self.iteration)} iterations already, and its schedules are at their end: allowed are a new "
                "one, which may begin with the dataset that it wrote (model.start), or ckpt_path"
            )
        if self.resumed == (0, 0):  # else the checkpoint's
            self.seed = torch.initial_seed() % 2**31
        self.check_family()
        self.rank = self.global_rank
        # Lightning runs training alone in the Trainer's precision; policies act in the same.
        self._precision = self.trainer.precision_plugin.forward_context
        if self.compiles:
            self._compiled = CompiledLosses(self._losses, list(self.actor.parameters()), self._critic_params())
        self._began_at = time.perf_counter()

    def on_train_start(self) -> None:
        """A run that goes on may be longer than it was: its schedulers take anew, over the present length, the steps that they have taken."""
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate  # as it begins: the optimiser's state has brought the one of the end
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                for _ in range(self.resumed[0]):
                    scheduler.step()

    def on_fit_end(self) -> None:
        self.resumed = 0, 0
        self._compiled = None

    def on_train_batch_end(self, *_: Any) -> None:
        self._began_at = time.perf_counter()

    def on_validation_end(self) -> None:
        self._began_at = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"env": self.spec.as_dict(), "family": self.family.describe(), "seed": self.seed}
        checkpoint["validated"] = bool(self.evaluations)  # since it learned last
        checkpoint["observation_clip"] = self.observation_clip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        check_env(checkpoint, self.spec.id, self.spec.kwargs if goes_on else None)
        self.seed = checkpoint.get("seed", self.seed)
        self.observation_clip = checkpoint.get("observation_clip", self.observation_clip)
        if goes_on:
            self.resumed = int(checkpoint["state_dict"]["iteration"]), int(checkpoint["state_dict"]["env_steps"])
            checkpoint["lr_schedulers"] = []  # see on_train_start
        make_resumable(checkpoint)

    def _log(self, metrics: dict[str, Tensor], frames: int) -> None:
        distributed = self.trainer.world_size > 1
        metrics |= {f"policy/{name}": value for name, value in self.actor_metrics().items()}
        # Learning rates fall and returns of the acting policies rise: both belong beside env_steps in every row.
        metrics["policy/optimizer_lr"] = self.optimizers()[0].param_groups[0]["lr"]
        self.log_dict(metrics | self._times(), sync_dist=distributed, batch_size=1)
        self.log("env_steps", self.env_steps.float(), batch_size=1)
        speed = frames * self.trainer.world_size / (time.perf_counter() - self._began_at)
        self.log("steps/s", speed, prog_bar=True, batch_size=1, sync_dist=distributed)
        # A process may have seen no episode end yet: summed over all, so that each logs the same or nothing.
        found = torch.tensor([sum(self._episode_returns), len(self._episode_returns)], dtype=torch.float64)
        total, episodes = self._sum_over_processes(found.to(self.device)).tolist()
        if episodes:
            self.log("return", total / episodes, prog_bar=True, batch_size=1)

    def _times(self) -> dict[str, float]:
        """Shares of this iteration's time in which policies acted, simulators (and the collector) ran, and batches were learned from.

        Host clocks, without waiting for the device: what a GPU does in the background counts where its result is awaited.
        """
        now = time.perf_counter()
        total = now - self._began_at
        inference, update = self._inference_seconds / total, (now - self._rollout_ended_at) / total
        self._inference_seconds = 0.0
        return {"time/inference": inference, "time/update": update, "time/simulation": 1 - inference - update}

    # --- what distillation replaces -----------------------------------------------------------------------------

    #: Whose returns an evaluation states.
    players = "runs of the one trained policy"

    def evaluate(self, stage: Stage, greedy: bool = False) -> dict[str, Evaluation]:
        """Rows of the table of returns in whole episodes; the first is the one that counts."""
        return {TRAINED_POLICY: self.trainer.datamodule.play(self.present_policy, stage, greedy)}

    @property
    def learners(self) -> int:
        """K, the number of policies that act in one rollout."""
        return 1

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        """The module whose parameters ``optimizer`` changes."""
        return PolicyWeights(self.family, self.spec, self.learner_shape, log_std, log_std_min)

    @torch.no_grad()
    def _begin_as(self, dataset: DistilledDataset) -> None:
        """Take what the dataset teaches, its encoder, noise and normaliser as the initial state."""
        check_begins(f"model.start={self.start!r}", dataset, self.spec)
        dataset = self._at_encoder_level(dataset)
        self.encoder.load_state_dict(dict(dataset.encoder))
        self._begin_actor_as(dataset)
        if dataset.log_std is not None:
            self.actor.noise.begin_with(dataset.log_std)
        self._freeze_normaliser(dataset.observation_mean, dataset.observation_std)
        self.observation_clip = dataset.observation_clip

    def _freeze_normaliser(self, mean: Tensor, std: Tensor) -> None:
        """Keep this normaliser for good; encoders are fed frames as they are, whatever it is."""
        if not self.encoder_level:
            self.observation_moments.freeze(mean, std)

    def _at_encoder_level(self, dataset: DistilledDataset) -> DistilledDataset:
        """A dataset whose encoder has as many layers as this run's, made of ``model.start``'s."""
        if dataset.encoder_level != self.encoder_level:
            raise ConfigError(
                f"of encoder level {dataset.encoder_level}; model.encoder_level={self.encoder_level} has to be the same"
            )
        return dataset

    def _begin_actor_as(self, dataset: DistilledDataset) -> None:
        if len(members(self.family)) > 1:  # the learner that is taught would be of another than the policy
            raise ConfigError("begins one policy; allowed is a model.family of one architecture")
        taught = teach_many(self.family, dataset, 1).module.params
        for name, weight in self.actor.params().items():
            weight.copy_(taught[name])

    def check_family(self) -> None:
        """Raise ``ConfigError`` unless learners of the family can be drawn, taught and run. Random state stays as it is."""
        try:
            with keep_random_state(self.device), torch.no_grad():
                self.draw()
                params = self.policy_params()
                for count in (2, 1):  # in an evaluation each acts on one observation
                    inputs = torch.zeros(self.learners, count, *self.learner_shape, device=self.device)
                    check_outputs(self.family.forward(params, inputs), (*inputs.shape[:2], self.spec.actions))
                if all(name.startswith(FIXED) for name in params):
                    raise UnfitLearner("they have no trainable parameter")
        except Exception as error:  # somebody else's module may raise anything
            raise ConfigError(
                f"model.family: its learners cannot be drawn, taught and run ({reason(error)})"
            ) from error

    def draw(self) -> None:
        """Draw what is fresh in each rollout."""

    def policy_params(self) -> Params:
        """Parameters [K, …] of the acting policies, differentiable in the actor's parameters."""
        return self.actor.params()

    def _make_encoder(self, level: int) -> tuple[int, nn.Module, tuple[int, ...]]:
        """The level, its encoder, and the shape of what it returns."""
        shape = self.spec.observation_shape
        if not 0 <= level <= LEVELS or (level and not self.spec.frames):
            allowed = f"0 … {LEVELS}" if self.spec.frames else "0: encoders are for Atari's frames"
            raise ConfigError(f"model.encoder_level={level} with env={self.spec.id!r}: allowed are {allowed}")
        encoder = make_encoder(level)
        with torch.no_grad():
            return level, encoder, tuple(encoder(torch.zeros(1, *shape)).shape[1:])

    def _critic_params(self) -> list[nn.Parameter]:
        return [*self.critic.parameters(), *self.encoder.parameters()]

    @property
    def log_std(self) -> Tensor | None:
        """Log standard deviation [d] of continuous actions; None if discrete."""
        return self.actor.noise.log_std

    def actor_metrics(self) -> dict[str, Tensor]:
        return {} if self.log_std is None else {"log_std": self.log_std.detach().mean()}


def no_loss(params: Iterable[nn.Parameter]) -> Tensor:
    """0, with every parameter in the graph, as DDP expects, and a gradient of zero for each."""
    return sum(parameter.sum() * 0.0 for parameter in params)


def clipped_step(optimizer: Optimizer, params: list[nn.Parameter], max_norm: float) -> Tensor:
    """Step with gradients scaled to at most ``max_norm`` together; returns their norm [] before.

    Where that is NaN or infinite nothing is changed, the optimiser's own moments neither.
    """
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    if norm.isfinite():
        optimizer.step()
    return norm


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
