"""What every way of training here shares: policies act, and are learned from, one rollout a batch.

What is learned, one policy's weights or a synthetic batch, and by which loss, is what subclasses say.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoints import check_env, make_resumable
from .checks import check_family, check_optimizers, check_trainer
from .compiling import CompiledLosses, Losses
from .configs import check_numbers
from .data import CollectorDataModule, Stage
from .dataset import DistilledDataset, load, normalise
from .envs import ConfigError, EnvSpec, stream_seed
from .families import as_family
from .learners import Factory, LearnerFamily, Params
from .matching import check_begins
from .moments import FrameScale, RunningMoments
from .nature import LEVELS, make_encoder, scaled
from .objectives import carried_sums
from .optimizing import LinearAnneal, clipped_step, no_loss
from .policies import action_distribution
from .returns import Evaluation

logger = logging.getLogger(__name__)

Normaliser = tuple[Tensor, Tensor]

OBSERVATION_CLIP = 10.0
EPISODES_LOGGED = 100
#: Options of continuous actions alone.
OF_NOISE = ("log_std", "log_std_min", "noise_rate", "final_noise", "noise_falls_from")
#: Figures that are logged of minibatches by which the actor takes a step alone.
OF_STEPS = ("loss/policy", "policy/entropy")


class RolloutModule(L.LightningModule, ABC):
    """Policies that act in the data module's environments, and learn from what they came to.

    A training batch is a rollout [N, T] of the data module. ``epochs`` × ``minibatches`` updates are made on it. Actor (what is learned)
    and critic (if there is one, with the encoder) have an optimiser each, and one backward pass serves both, so that DDP averages all
    gradients.

    Args:
        spec: the environment, as an ``EnvSpec``. The command line gives its ``as_dict()``, from the data module, and plain values for all
            else, which a checkpoint then keeps.
        family: what learners are drawn from: a name (``paper``: MLP 64-64 tanh, orthogonal), a family, or what makes an ``nn.Module`` from
            (observation_shape, outputs), by class path, with arguments or without.
        encoder_level: l ∈ 0…4, for Atari: the first l layers of the Nature CNN are one encoder, trained along with the
            critic by the gradient of the whole loss; learners and critic are fed its features.
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
        start: a distilled dataset, by name in the zoo or by path, to begin with: what is learned, the encoder, the noise and the
            normaliser, which stays as it is there. A critic begins anew.
        compile: losses and their gradients are compiled (``torch.compile``): updates take two thirds of their time, the first iteration up to
            half a minute longer. On a CPU this needs a C++ compiler. For MLPs, not for mixtures, modules and frames.
    """

    #: Arguments that may be objects.
    OBJECTS: tuple[str, ...] = ("spec", "family", "optimizer", "critic_optimizer", "scheduler")

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        family: str | LearnerFamily | Factory = "paper",
        encoder_level: int = 0,
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
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_numbers("model", RolloutModule.__init__, locals())
        if not isinstance(spec, EnvSpec | dict):
            raise ConfigError(f"model.spec={spec!r}: allowed is a data module's spec")
        if start is not None and not isinstance(start, str):
            # A checkpoint keeps it, and holds plain values alone.
            raise ConfigError(
                f"model.start: is a {type(start).__name__}; allowed is a name in the zoo or a path, as text (DistilledDataset.save writes a file)"
            )
        if not 0 < final_noise <= 1:
            raise ConfigError(f"model.final_noise={final_noise}: allowed are numbers above 0, up to 1")
        if not 0 <= noise_falls_from < 1:
            raise ConfigError(f"model.noise_falls_from={noise_falls_from}: allowed are numbers from 0, below 1")
        # The command line gives plain values, all of which a checkpoint can hold; objects given in Python stay outside.
        self.save_hyperparameters(ignore=() if isinstance(spec, dict) else self.OBJECTS)
        self.automatic_optimization = False
        self.spec = spec if isinstance(spec, EnvSpec) else EnvSpec(**spec)
        self.family = as_family(family)
        self.entropy_coef = entropy_coef
        self.noise_rate, self.final_noise, self.noise_falls_from = noise_rate, final_noise, noise_falls_from
        self.epochs, self.minibatches, self.max_grad_norm = epochs, minibatches, max_grad_norm
        if compile and self.spec.frames:
            raise ConfigError(
                "model.compile=true with frames: allowed is false; an encoder learns from both losses at once"
            )
        self.compiles = compile
        self._compiled: CompiledLosses | None = None
        self.optimizer, self.critic_optimizer, self.scheduler = optimizer, critic_optimizer, scheduler
        self.encoder_level, self.encoder, self.learner_shape = self._make_encoder(encoder_level)
        self.actor = self.make_actor(log_std, log_std_min)
        self.critic = self.make_critic()
        self.observation_moments = FrameScale() if self.spec.frames else RunningMoments(self.spec.observation_shape)
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
        self._returns_so_far: Tensor | None = None
        self.start = start
        if start is not None:
            try:
                self._begin_as(load(start))
            except ValueError as error:
                raise ConfigError(f"model.start={start!r}: {error}") from None

    def prepare_for_worker(self) -> None:
        """Drop what cannot be pickled for a worker that acts: what makes optimisers, and compiled functions."""
        self.optimizer = self.critic_optimizer = self.scheduler = self._compiled = None

    # --- what subclasses say ------------------------------------------------------------------------------------

    #: Whose returns an evaluation states.
    players: str
    #: Names of what a validation logs; a subclass that logs more adds them.
    validated: tuple[str, ...] = ("val/return", "val/return_worst", "val/return_ci95")

    @property
    @abstractmethod
    def learners(self) -> int:
        """K, the number of policies that act in one rollout."""

    @abstractmethod
    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        """The module whose parameters ``optimizer`` changes; its ``noise`` is an :class:`ActionNoise`."""

    def make_critic(self) -> nn.Module | None:
        """A network from ``learner_shape`` to a state's value, where the objective needs one."""
        return None

    def draw(self) -> None:
        """Draw what is fresh in each rollout."""

    @abstractmethod
    def policy_params(self) -> Params:
        """Parameters [K, …] of the acting policies, differentiable in the actor's parameters."""

    def policy_normaliser(self) -> Normaliser | None:
        """Mean and standard deviation for what policies are fed, if they are not the running ones."""
        return None

    @abstractmethod
    def begin_actor_as(self, dataset: DistilledDataset) -> None:
        """Take what the dataset teaches as the actor's initial state."""

    def recorded(self, inputs: Tensor) -> dict[str, Tensor]:
        """What a rollout records of a step beside observation, output and action. ``inputs``: what networks were fed, [N, *learner_shape]."""
        return {}

    @property
    def actor_learns(self) -> bool:
        """Whether the actor learns in this iteration, or the critic alone."""
        return True

    def may_go_on(self, found: dict[str, Tensor]) -> bool:
        """Whether the actor learns on in this iteration. ``found``: what is logged of a minibatch, before its step; may be changed here."""
        return True

    def actor_metrics(self) -> dict[str, Tensor]:
        """What is logged of the actor in each iteration."""
        return {} if self.log_std is None else {"log_std": self.log_std.detach().mean()}

    @abstractmethod
    def samples(self, rollout: TensorDictBase) -> dict[str, Tensor]:
        """Tensors [K, M, …] for the update of K learners from M samples each."""

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], learns: bool) -> Losses:
        """The critic's loss (None without one), the actor's (None unless it ``learns``), and what is logged."""

    @abstractmethod
    def evaluate(self, stage: Stage, greedy: bool = False) -> dict[str, Evaluation]:
        """Rows of the table of returns in whole episodes; the first is the one that counts."""

    # --- acting -------------------------------------------------------------------------------------------------

    def encode(self, observations: Tensor, normaliser: Normaliser | None = None) -> Tensor:
        """An environment's observations [..., *obs] as networks are fed them, [..., *learner_shape].

        Args:
            normaliser: mean and standard deviation [*obs] each; default: the running ones, which a critic has.
        """
        if self.spec.frames:
            return self.encoder(scaled(observations, None if self.encoder_level else self.observation_moments.mean))
        mean, std = normaliser or self._normaliser
        return normalise(observations.float(), mean, std, self.observation_clip)

    def running_normaliser(self) -> Normaliser:
        """Mean and standard deviation of everything seen by this moment."""
        return self.observation_moments.mean.float(), self.observation_moments.std.float()

    @property
    def log_std(self) -> Tensor | None:
        """Log standard deviation [d] of continuous actions; None if discrete."""
        return self.actor.noise.log_std

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
        """The collector's policy: writes ``action``, and ``output`` to tell later how likely it was."""
        began = time.perf_counter()
        with self._precision():
            # Not a number would break the sampling of an action; the rollout's check names it soon enough.
            observation = self.encode(state["observation"], self._acting_normaliser).nan_to_num()
            output = self.family.forward(self._acting, observation.unflatten(0, (self.learners, -1))).flatten(0, 1)
            state.update(self.recorded(observation))
        state["output"] = output
        state["action"] = action_distribution(output, self._acting_log_std).sample()
        self._inference_seconds += time.perf_counter() - began
        return state

    # --- learning -----------------------------------------------------------------------------------------------

    def training_step(self, rollout: TensorDictBase, batch_idx: int) -> None:
        """One iteration: a rollout [N, T] and its epochs."""
        self._rollout_ended_at = time.perf_counter()
        self._check_finite(rollout)
        self.evaluations = {}
        self._collect_returns(*(rollout["next", key].squeeze(-1) for key in ("reward", "done")))
        samples = self.samples(rollout)
        metrics = self._update(samples)
        self.observation_moments.update(rollout["next", "observation"], self._sum_over_processes)
        self.iteration += 1
        self.env_steps += rollout.numel() * self.trainer.world_size
        self._log(metrics, rollout.numel())
        for scheduler in _every(self.lr_schedulers()):
            scheduler.step()

    def _collect_returns(self, reward: Tensor, done: Tensor) -> None:
        """Keep the returns of the episodes that ended in a rollout [N, T]."""
        sums, self._returns_so_far = carried_sums(reward, done, self._returns_so_far, 1.0)
        self._episode_returns.extend(sums.T[done.T].tolist())  # in order of time: the latest of all environments stay

    def _update(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        """``epochs`` × ``minibatches`` steps; means of what is logged of each."""
        actor_optimizer, *critic_optimizer = optimizers = _every(self.optimizers())
        actor_params, critic_params = list(self.actor.parameters()), self.critic_params()
        count = samples["observation"].shape[1]
        metrics: dict[str, list[Tensor]] = {}
        losses = self.losses if self._compiled is None else self._compiled
        learns = self.actor_learns
        for _ in range(self.epochs):
            for index in torch.randperm(count, device=self.device).tensor_split(self.minibatches):
                batch = {name: tensor.index_select(1, index) for name, tensor in samples.items()}
                critic_loss, actor_loss, found = losses(batch, learns)
                learns = learns and self.may_go_on(found)
                if not learns:
                    actor_loss = no_loss(actor_params)
                    found = {name: tensor for name, tensor in found.items() if name not in OF_STEPS}
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(actor_loss if critic_loss is None else actor_loss + critic_loss)
                if not learns:
                    self.encoder.zero_grad()  # it feeds the actor, too, which is to stay as it is
                if critic_optimizer:
                    found["gradient/critic"] = clipped_step(*critic_optimizer, critic_params, self.max_grad_norm)
                if learns:
                    found["gradient/actor"] = clipped_step(actor_optimizer, actor_params, self.max_grad_norm)
                    self.actor.noise.keep_minimum()
                for name, tensor in found.items():
                    metrics.setdefault(name, []).append(tensor.detach())
        for optimizer in optimizers:
            optimizer.zero_grad()
        result = {name: torch.stack(values).mean() for name, values in metrics.items()}
        result["policy/updates"] = torch.tensor(float(len(metrics.get("gradient/actor", []))), device=self.device)
        result["gradient/skipped"] = self._count_skipped(metrics)
        return result

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
        check_optimizers(self, self._iterations)
        optimizers = [self._actor_optimizer()]
        if params := self.critic_params():
            optimizers.append(self.critic_optimizer(params))
        return optimizers, [self.scheduler(optimizer, self._iterations) for optimizer in optimizers]

    def actor_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """The actor's parameters, with the noise as a second group."""
        noise = list(self.actor.noise.parameters())
        groups = [{"params": [p for p in self.actor.parameters() if p not in set(noise)]}]
        return [*groups, {"params": noise}] if noise else groups

    def _actor_optimizer(self) -> Optimizer:
        optimizer = self.optimizer(self.actor_groups())
        for group in optimizer.param_groups[1:]:
            group["lr"] *= self.noise_rate
        return optimizer

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._warn_of_idle_options()
            check_trainer(self.trainer, self.validated)
            if not isinstance(self.trainer.datamodule, CollectorDataModule):
                raise ConfigError("trainer.fit: rollouts come from a data module; allowed is a CollectorDataModule")
            self.check_rollouts(self.trainer.datamodule)

    def idle_options(self) -> dict[str, str]:
        """Options that nothing looks at in this run, and why; where one is given all the same, that is said."""
        if self.spec.action_type == "discrete":
            return dict.fromkeys(OF_NOISE, "actions are discrete")
        return {} if self.start is None else {"log_std": "model.start has its own"}

    def _warn_of_idle_options(self) -> None:
        for name, why in self.idle_options().items():
            of_classes = (inspect.signature(each.__init__).parameters.get(name) for each in type(self).__mro__)
            default = next(parameter.default for parameter in of_classes if parameter is not None)
            if (value := self.hparams.get(name, default)) != default:
                logger.warning("model.%s=%r has no effect: %s", name, value, why)

    def check(self, trainer: L.Trainer, data: CollectorDataModule) -> None:
        """Raise ``ConfigError`` for anything with which this module cannot be trained, before ``trainer.fit`` begins anything.

        That looks itself, once the module is on its device; optimisers may be for that device alone.
        """
        check_trainer(trainer, self.validated)
        self.check_rollouts(data)
        check_family(self)
        if trainer.strategy.root_device.type == "cpu":
            check_optimizers(self, data.iterations(trainer.world_size))

    def check_rollouts(self, data: CollectorDataModule) -> None:
        """Raise ``ConfigError`` for rollouts that this module cannot learn from."""
        if (data.spec.id, data.spec.kwargs) != (self.spec.id, self.spec.kwargs):
            raise ConfigError(
                f"data.env={data.spec.id!r}, with data.env_kwargs={data.spec.kwargs}: the module was made for {self.spec.id!r}, with "
                f"{self.spec.kwargs}; allowed is the same (spec=data.spec)"
            )
        data.check_learners(self.learners)
        samples = data.num_envs * data.rollout_length // self.learners
        if samples < self.minibatches:
            raise ConfigError(
                f"model.minibatches={self.minibatches}: a rollout has {samples} samples of each learner; allowed are at most as many"
            )

    def on_fit_start(self) -> None:
        if self.iteration and self.resumed == (0, 0):
            raise ConfigError(
                f"this module has learned for {int(self.iteration)} iterations already, and its schedules are at their end: allowed are a new "
                "one, which may begin with the dataset that it wrote (model.start), or ckpt_path"
            )
        if self.resumed == (0, 0):  # else the checkpoint's
            self.seed = torch.initial_seed() % 2**31
        check_family(self)
        self.rank = self.global_rank
        # Lightning runs training alone in the Trainer's precision; policies act in the same.
        self._precision = self.trainer.precision_plugin.forward_context
        if self.compiles:
            self._compiled = CompiledLosses(self.losses, list(self.actor.parameters()), self.critic_params())
        self._began_at = time.perf_counter()

    def on_train_start(self) -> None:
        """A run that goes on may be longer than it was: its schedulers take anew, over the present length, the steps that they have taken."""
        for optimizer, scheduler in zip(_every(self.optimizers()), _every(self.lr_schedulers()), strict=True):
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
        metrics["policy/optimizer_lr"] = _every(self.optimizers())[0].param_groups[0]["lr"]
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

    # --- the parts ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin_as(self, dataset: DistilledDataset) -> None:
        """Take what the dataset teaches, its encoder, noise and normaliser as the initial state."""
        check_begins(f"model.start={self.start!r}", dataset, self.spec)
        dataset = self._at_encoder_level(dataset)
        self.encoder.load_state_dict(dict(dataset.encoder))
        self.begin_actor_as(dataset)
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

    def _make_encoder(self, level: int) -> tuple[int, nn.Module, tuple[int, ...]]:
        """The level, its encoder, and the shape of what it returns."""
        shape = self.spec.observation_shape
        if not 0 <= level <= LEVELS or (level and not self.spec.frames):
            allowed = f"0 … {LEVELS}" if self.spec.frames else "0: encoders are for Atari's frames"
            raise ConfigError(f"model.encoder_level={level} with env={self.spec.id!r}: allowed are {allowed}")
        encoder = make_encoder(level)
        with torch.no_grad():
            return level, encoder, tuple(encoder(torch.zeros(1, *shape)).shape[1:])

    def critic_params(self) -> list[nn.Parameter]:
        """What ``critic_optimizer`` changes: the critic, if there is one, and the encoder."""
        return [*(self.critic or nn.Identity()).parameters(), *self.encoder.parameters()]


def _every(found: Any) -> list[Any]:
    """Lightning's optimisers or schedulers, which are one or several."""
    return found if isinstance(found, list) else [found]
