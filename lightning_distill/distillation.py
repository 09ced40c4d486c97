"""Distillation: what is learned is a synthetic batch, and policies are fresh learners after one step on it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn

from .configs import check_numbers
from .data import Stage
from .dataset import DistilledDataset
from .envs import ConfigError, stream_seed
from .learners import Params
from .returns import IN_DISTRIBUTION, Evaluation, reported_rules, row_name
from .rollout_module import Normaliser, RolloutModule
from .step_rules import STEP_RULES
from .synthetic import SyntheticBatch
from .teaching import seeded, with_encoder_level, with_plain_step
from .versions import versions

#: Options by which pairs are drawn.
OF_PAIRS = ("observation_scale", "target_scale", "observation_gain")


class Distillation(RolloutModule):
    """Distils into ``pairs`` (observation, target) rows; by which objective, a subclass says.

    Each iteration teaches ``learners`` networks, fresh ones every ``lifetime`` iterations, by one step, lets them act in the data module's
    environments (an equal share each), and re-teaches them from the same θ₀ in every minibatch, so that the gradient of
    the loss reaches the batch through the step.

    Args:
        spec: the environment, as an ``EnvSpec``. The command line gives its ``as_dict()``, from the data module, and plain values for all
            else, which a checkpoint then keeps.
        pairs: n, rows of the synthetic batch; default: the paper's c / 2 + 1, rounded up, for c discrete actions; 64 for continuous ones.
        learners: K, fresh learners in each rollout; divides the number of environments.
        lifetime: rollouts for which learners act before others take their place. They are re-taught all the while. A learner
            that acts longer comes to the states that its own behaviour leads to, where it may fail.
        observation_scale: standard deviation of the initial synthetic observations.
        target_scale: standard deviation of the initial targets.
        observation_gain: initial gain of normalised observations, before learners are fed them. A small one makes taught learners
            more alike, so that fewer fail; the step size has to be larger then.
        step_rule: ``sgd``, ``line_search``, ``newton`` or ``projection``, see :mod:`lightning_distill.step_rules`; its
            numbers are learned.
        learning_rate: initial step size η of ``sgd``, per output dimension. The loss is a mean over dimensions, so the step
            size that moves a learner equally far grows with their number.
        line_search_scale: initial α of ``line_search``.
        newton_ridge: initial λ of ``newton`` and ``projection``.
        log_std, log_std_min, noise_rate, final_noise, noise_falls_from: as in :class:`lightning_distill.rollout_module.RolloutModule`.
        encoded_pairs: with an encoder: the synthetic observations are its features rather than frames.
        start: a dataset, by name in the zoo or by path, whose pairs, numbers of the step rule, noise (at least ``log_std_min``),
            normaliser and encoder the run begins with; the normaliser stays as it is there but for what is learned. A critic begins anew. Of an
            encoder with more layers than ``encoder_level`` the first are taken, and the step size fits the learners that follow.
        kwargs: of :class:`lightning_distill.rollout_module.RolloutModule`; the actor is the synthetic batch.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        pairs: PositiveInt | None = None,
        learners: PositiveInt = 8,
        lifetime: PositiveInt = 8,
        observation_scale: PositiveFloat = 0.5,
        target_scale: PositiveFloat = 0.5,
        observation_gain: PositiveFloat = 1.0,
        step_rule: Literal["sgd", "line_search", "newton", "projection"] = "sgd",
        learning_rate: PositiveFloat = 0.3,
        line_search_scale: PositiveFloat = 1.0,
        newton_ridge: PositiveFloat = 0.1,
        log_std: float = -0.3,
        log_std_min: float = -1.5,
        noise_rate: PositiveFloat = 0.2,
        final_noise: PositiveFloat = 0.1,
        noise_falls_from: ClosedUnitInterval = 0.6,
        encoded_pairs: bool = False,
        start: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_numbers("model", Distillation.__init__, locals())
        if step_rule not in STEP_RULES:
            raise ConfigError(f"model.step_rule={step_rule!r}: allowed are {', '.join(STEP_RULES)}")
        if encoded_pairs and not kwargs.get("encoder_level"):
            raise ConfigError(
                "model.encoded_pairs=true with model.encoder_level=0: allowed with an encoder, levels 1 … 4"
            )
        self._learners, self.lifetime = learners, lifetime
        self.step_rule, self.encoded_pairs = step_rule, encoded_pairs
        self._numbers = {
            "learning_rate": learning_rate,
            "line_search_scale": line_search_scale,
            "newton_ridge": newton_ridge,
        }
        self._pairs = pairs
        self._initial = {
            "observation_scale": observation_scale,
            "target_scale": target_scale,
            "gain": observation_gain,
        }
        #: What the present learners were drawn by and where, if any were.
        self._born: tuple[Any, ...] | None = None
        super().__init__(
            spec,
            log_std=log_std,
            log_std_min=log_std_min,
            noise_rate=noise_rate,
            final_noise=final_noise,
            noise_falls_from=noise_falls_from,
            start=start,
            **kwargs,
        )
        if self.spec.frames and observation_gain != 1:
            raise ConfigError(f"model.observation_gain={observation_gain}: frames have none; allowed is 1")

    def _at_encoder_level(self, dataset: DistilledDataset) -> DistilledDataset:
        return with_encoder_level(dataset, self.encoder_level, self.family)

    def begin_actor_as(self, dataset: DistilledDataset) -> None:
        batch = self.synthetic_batch
        for name, parameter in (("observations", batch.observations), ("targets", batch.targets)):
            begun = getattr(dataset, name)
            if begun.shape != parameter.shape:
                raise ConfigError(
                    f"its {name} are {list(begun.shape)}, the synthetic batch's "
                    f"{list(parameter.shape)}; allowed: as many pairs as model.pairs"
                )
            parameter.copy_(begun)
        for name in batch.numbers:
            if (number := getattr(dataset, name)) is None:
                raise ConfigError(f"has no {name}, which model.step_rule={self.step_rule!r} needs")
            batch.set_number(name, number)
        if not self.spec.frames:
            batch.log_gain.zero_()  # it is in the normaliser already

    def idle_options(self) -> dict[str, str]:
        used = self.synthetic_batch.numbers
        idle = {name: f"model.step_rule={self.step_rule!r} has none" for name in self._numbers if name not in used}
        if self.start is not None:
            idle |= dict.fromkeys((*OF_PAIRS, *used), "model.start has its own")
        return super().idle_options() | idle

    @property
    def synthetic_batch(self) -> SyntheticBatch:
        return self.actor

    @property
    def learners(self) -> int:
        return self._learners

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        initial = self._numbers | {"learning_rate": self._numbers["learning_rate"] * self.spec.actions}
        numbers = {name: initial[name] for name in STEP_RULES[self.step_rule].numbers}
        shape = self.learner_shape if self.encoded_pairs else self.spec.observation_shape
        pairs = self._pairs or (math.ceil(self.spec.actions / 2) + 1 if self.spec.action_type == "discrete" else 64)
        return SyntheticBatch(
            self.spec, shape, pairs, numbers=numbers, **self._initial, log_std=log_std, log_std_min=log_std_min
        )

    def draw(self) -> None:
        age = int(self.iteration) % self.lifetime
        born = self.seed, self.rank, int(self.iteration) - age, self.device
        if age and born == self._born:
            return
        self._born = born
        # A resumed run draws those that live on again, as they were.
        with seeded(stream_seed(*born[:3]), self.device) if age else nullcontext():
            self._fresh = self.family.draw(self.learners, self.learner_shape, self.spec.actions, self.device)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._born = None  # what was drawn to check the family is of no iteration

    def policy_params(self) -> Params:
        batch = self.synthetic_batch
        inputs = batch.observations if self.encoded_pairs else self.encoder(batch.observations)
        rule = STEP_RULES[self.step_rule]
        return rule(self.family, self._fresh, inputs, batch.targets, *batch.numbers.values())

    def policy_normaliser(self) -> Normaliser | None:
        """The running normaliser, corrected by what was learned; frames have none."""
        return None if self.spec.frames else self.synthetic_batch.corrected(*self._normaliser)

    def actor_metrics(self) -> dict[str, Tensor]:
        numbers = {name: number.detach() for name, number in self.synthetic_batch.numbers.items()}
        return {**super().actor_metrics(), **numbers}

    players = "fresh learners after one step"

    def evaluate(self, stage: Stage, greedy: bool = False) -> dict[str, Evaluation]:
        """Returns of fresh in-distribution learners; in the test by the plain step too, if they learn by another rule."""
        dataset = self.distilled()
        rules = reported_rules(dataset) if stage == "test" else [dataset.step_rule]
        return {
            row_name(IN_DISTRIBUTION, rule, dataset): self.trainer.datamodule.evaluate(
                dataset, self.family, stage, greedy, rule
            )
            for rule in rules
        }

    # --- the dataset ---------------------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        """The present synthetic batch as a dataset on its own, with the normaliser of this moment.

        The plain step's size is in it whatever the rule: where it is not learned, the best for the family on average.
        """
        batch, moments = self.synthetic_batch, self.observation_moments
        mean, std = moments.mean, moments.std
        if not self.spec.frames:
            mean, std = batch.corrected(mean, std)
        tensors = {
            "observations": batch.observations,
            "targets": batch.targets,
            "learning_rate": torch.ones(()),
            **batch.numbers,
            "observation_mean": mean,
            "observation_std": std,
        }
        if self.log_std is not None:
            tensors["log_std"] = self.log_std
        dataset = DistilledDataset(
            **{name: tensor.detach().float().clone() for name, tensor in tensors.items()},
            encoder={name: value.detach().contiguous().clone() for name, value in self.encoder.state_dict().items()},
            env=self.spec.id,
            action_type=self.spec.action_type,
            observation_clip=self.observation_clip,
            metadata={
                "env_kwargs": self.spec.kwargs,
                "learners": [self.family.describe()],
                "step_rule": self.step_rule,
                "encoder_level": str(self.encoder_level),
                "env_steps": int(self.env_steps),
                "seed": self.seed,
                "versions": versions(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "license": "MIT",
            },
        )
        return dataset if self.step_rule == "sgd" else with_plain_step(dataset, self.family)
