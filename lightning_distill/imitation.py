"""Imitation: distil an expert by what it does instead of by reward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from tensordict import TensorDictBase
from torch import Tensor, nn

from .compiling import Losses
from .configs import check_numbers
from .data import CollectorDataModule
from .dataset import normalise
from .distillation import Distillation
from .envs import ConfigError, EnvSpec, make_env, stream_seed
from .experts import Expert, expert_from
from .policies import action_distribution
from .teaching import seeded

if TYPE_CHECKING:
    from torchrl.data import TensorDictReplayBuffer

#: Environments in which the expert's first states are seen, and steps in each of them.
EPISODES, STEPS = 16, 1000
#: What is imitated of a state, by its name in a rollout.
SEEN = ("observation", "output")


class Imitation(Distillation):
    """Distils an expert into a synthetic batch: what fresh learners would do after the step is compared with what it does.

    The expert acts; the loss is KL(expert ‖ learner) in the states that it visits, back-propagated through the step. Pairs
    begin as random states of its episodes with its outputs, as they are before ``observation_gain``: where that is small pairs lie
    further out than what learners are fed, for a longer step. Normaliser and noise are the expert's, ``log_std_min`` or not; in games
    learners without an encoder are fed frames less their mean over those states, as a static background dominates random features. The loss
    has no noise of returns, so it takes far fewer steps than reward; what it reaches is the expert's return at best.
    Where actions are clipped to bounds, means beyond the same bound count as alike (:func:`clip_means`).
    Learners' own states (DAgger, Ross et al. 2011) make a worse batch: those of learners that fall over outweigh all others.

    Args:
        spec: as in :class:`lightning_distill.rollout_module.RolloutModule`.
        expert: a checkpoint of :class:`PPO` (``*.ckpt``); a dataset, by name in the zoo or by path, whose expert is the
            mean output of 16 learners taught on it; or any policy, as an :class:`Expert` or what makes one of the spec, by class path.
        expert_noise: times the expert's standard deviation, with which it acts at most: in each environment and rollout it is drawn
            between none and this (continuous actions). More of it shows states beside the expert's way, where learners come to be,
            while what is imitated stays its mean (DART, Laskey et al. 2017).
        replay: states that each process keeps, the last so many; an iteration imitates as many of them, drawn at random, as a rollout has.
            Default: those of its own rollout. A game looks alike for hundreds of steps, as the score stands in the frame: learners that are taught
            to act at one score forget another. 28 kB each; a checkpoint does not hold them.
        lifetime, epochs, final_noise: as in :class:`Distillation`, with other defaults: it is the expert that acts.
        kwargs: of :class:`Distillation`; with ``start``, pairs begin as that dataset's. There is no critic: ``critic_optimizer`` is the encoder's.
    """

    OBJECTS = (*Distillation.OBJECTS, "expert")

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        expert: str | Callable[[EnvSpec], Expert],
        expert_noise: PositiveFloat = 1.0,
        replay: PositiveInt | None = None,
        lifetime: PositiveInt = 1,
        epochs: PositiveInt = 4,
        final_noise: PositiveFloat = 1.0,
        **kwargs: Any,
    ) -> None:
        check_numbers("model", Imitation.__init__, locals())
        super().__init__(spec, lifetime=lifetime, epochs=epochs, final_noise=final_noise, **kwargs)
        self._expert = expert_from(expert, self.spec)  # no module, so no part of this one's state
        log_std = self._expert.log_std
        self._expert_log_std = None if log_std is None else log_std + math.log(expert_noise)
        self._noise_share: Tensor | None = None
        self.replay = replay
        self._seen: TensorDictReplayBuffer | None = None
        bounds = torch.tensor([self.spec.action_low, self.spec.action_high])  # [2, d]; nothing if actions are discrete
        self.register_buffer("_bounds", bounds, persistent=False)
        if self.start is None:
            self.first_steps = EPISODES * STEPS
            if self._expert.mean is not None:
                self._freeze_normaliser(self._expert.mean, self._expert.std)

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        return super().make_actor(log_std, -math.inf)  # noise is the expert's or the start's, however small

    def idle_options(self) -> dict[str, str]:
        idle = dict.fromkeys(("log_std", "log_std_min"), "noise is the expert's")
        idle |= dict.fromkeys(("observation_scale", "target_scale"), "pairs begin as the expert's states")
        if self.spec.action_type == "discrete":
            idle["expert_noise"] = "actions are discrete"
        return idle | super().idle_options()

    def prepare_for_worker(self) -> None:
        super().prepare_for_worker()
        self._seen = None

    def check_rollouts(self, data: CollectorDataModule) -> None:
        super().check_rollouts(data)
        states = data.num_envs * data.rollout_length
        if self.replay is not None and self.replay < states:
            raise ConfigError(
                f"model.replay={self.replay}: a rollout has {states} states; allowed are at least as many"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.replay is not None:
            from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

            data = self.trainer.datamodule
            rollout = data.num_envs * data.rollout_length
            self._seen = TensorDictReplayBuffer(storage=LazyTensorStorage(self.replay), batch_size=rollout)
        if self.iteration == 0 and self.start is None:
            first = self._episodes()
            if self._seen is not None:
                self._seen.extend(first)
            states = first["observation"]
            self.env_steps += len(states) * self.trainer.world_size
            if self._expert.mean is None:
                moments = self.observation_moments
                moments.update(states.to(self.device), self._sum_over_processes)
                self._freeze_normaliser(moments.mean, moments.std)
            if self.spec.frames and self.encoder_level == 0:
                mean, std = states.mean(0, dtype=torch.float32), self.observation_moments.std
                self._freeze_normaliser(self.trainer.strategy.broadcast(mean), std)
            generator = torch.Generator().manual_seed(stream_seed(self.seed, 0, 6))
            rows = torch.randint(len(states), (self.synthetic_batch.pairs,), generator=generator)
            # Each process played episodes of its own; pairs are the same in all.
            self._begin_with(self.trainer.strategy.broadcast(states[rows]))

    @torch.no_grad()
    def _begin_with(self, observations: Tensor) -> None:
        """Pairs from as many states [n, *obs] of the expert, and its noise."""
        expert, batch = self._expert, self.synthetic_batch
        chosen = observations.to(self.device, torch.float32)
        seen = normalise(chosen, *self.running_normaliser(), self.observation_clip)
        batch.observations.copy_(self.encoder(seen) if self.encoded_pairs else seen)
        batch.targets.copy_(expert.output(chosen))
        if expert.log_std is not None:
            batch.noise.begin_with(expert.log_std)

    @torch.no_grad()
    def _episodes(self) -> TensorDictBase:
        """States [m] in which the expert acted: ``observation`` [m, *obs] and its ``output`` [m, d]."""
        data = self.trainer.datamodule
        env = make_env(self.spec, EPISODES, stream_seed(self.seed, self.rank, 5), data.backend, data.threads, "cpu")
        try:
            state, states = env.reset(), []
            with seeded(stream_seed(self.seed, self.rank, 7), self.device):
                for _ in range(10 if self.trainer.fast_dev_run else STEPS):
                    acted = self.act(state)
                    states.append(acted.select(*SEEN))
                    _, state = env.step_and_maybe_reset(acted)
        finally:
            env.close()
        return torch.cat(states)

    def draw(self) -> None:
        super().draw()
        self._noise_share = None

    @torch.no_grad()
    def act(self, state: TensorDictBase) -> TensorDictBase:
        """The collector's policy is the expert."""
        began = time.perf_counter()
        output = state["output"] = self._expert.output(state["observation"].float())
        log_std = self._expert_log_std
        if log_std is not None:
            if self._noise_share is None:
                self._noise_share = torch.rand(len(output), 1, device=output.device)
            log_std = log_std.to(output.device) + self._noise_share.log()
        state["action"] = action_distribution(output, log_std).sample()
        self._inference_seconds += time.perf_counter() - began
        return state

    def samples(self, rollout: TensorDictBase) -> dict[str, Tensor]:
        states = rollout.select(*SEEN).flatten()
        if self._seen is not None:
            self._seen.extend(states.cpu())
            states = self._seen.sample().to(self.device)
        observation, expert = (states[name].unflatten(0, (self.learners, -1)) for name in SEEN)
        return {"observation": observation, "expert": expert}

    def losses(self, batch: dict[str, Tensor], learns: bool) -> Losses:
        """KL(expert ‖ learner); there is no critic, and no bound on how far learners may move in an iteration."""
        output = self.family.forward(self.policy_params(), self.encode(batch["observation"], self.policy_normaliser()))
        entropy = action_distribution(output, self.log_std).entropy().mean()
        # The expert's noise is kept: learned, it would grow to cover what the worst learners miss, at the cost of all.
        wanted = batch["expert"]
        if self.log_std is not None:
            wanted, output = clip_means(wanted, output, self.log_std.detach().exp(), self._bounds)
        loss = kl_divergence(wanted, output, self._expert.log_std).mean()
        return None, loss - self.entropy_coef * entropy, {"loss/policy": loss, "policy/entropy": entropy}


def clip_means(expert: Tensor, output: Tensor, std: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Means [..., d] as they count where actions are clipped to bounds [2, d]: beyond the same bound all means act alike.

    An expert's mean is taken no further than two standard deviations [d] beyond a bound, where nearly all actions are clipped; a
    learner's mean that is further out on the same side is right: how far out is nothing that a learner has to hold.
    """
    lowest, highest = bounds[0] - 2 * std, bounds[1] + 2 * std
    output = torch.where(expert > highest, output.minimum(highest), output)
    output = torch.where(expert < lowest, output.maximum(lowest), output)
    return expert.clamp(lowest, highest), output


def kl_divergence(expert: Tensor, output: Tensor, log_std: Tensor | None) -> Tensor:
    """KL(expert ‖ learner) [...] of two policies with these outputs [..., d] and, if Gaussian, the same log_std [d]."""
    if log_std is None:
        return (expert.softmax(-1) * (expert.log_softmax(-1) - output.log_softmax(-1))).sum(-1)
    return ((expert - output) / log_std.to(output.device).exp()).square().sum(-1) / 2
