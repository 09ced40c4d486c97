"""MetaPPO: distil an environment into a synthetic batch (Wilhelm & Ventura 2025).

Fresh learners take one SGD step on the batch, act in the environment, and the PPO loss of what they did is
back-propagated through that step into the batch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from .dataset import DistilledDataset
from .envs import ConfigError
from .evaluation import IN_DISTRIBUTION, Evaluation
from .learners import Params
from .ppo import OBSERVATION_CLIP, PPO
from .synthetic import SyntheticBatch
from .teaching import sgd_step


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
        encoded_pairs: with an encoder: the synthetic observations are its features rather than frames.
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
        encoded_pairs: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value in (("pairs", pairs), ("learners", learners)):
            if value < 1:
                raise ConfigError(f"model.{name}={value}: allowed are integers ≥ 1")
        if encoded_pairs and not kwargs.get("encoder_level"):
            raise ConfigError(
                "model.encoded_pairs=true with model.encoder_level=0: allowed with an encoder, levels 1 … 4"
            )
        self._learners, self.encoded_pairs = learners, encoded_pairs
        self._initial = {
            "pairs": pairs,
            "observation_scale": observation_scale,
            "target_scale": target_scale,
            "learning_rate": learning_rate,
        }
        super().__init__(spec, **kwargs)
        self.evaluations: dict[str, dict[str, Evaluation]] = {}

    @property
    def synthetic_batch(self) -> SyntheticBatch:
        return self.actor

    @property
    def learners(self) -> int:
        return self._learners

    def make_actor(self, log_std: float, log_std_min: float) -> nn.Module:
        shape = self.learner_shape if self.encoded_pairs else self.spec.observation_shape
        return SyntheticBatch(self.spec, shape, **self._initial, log_std=log_std, log_std_min=log_std_min)

    def draw(self) -> None:
        self._fresh = self.family.draw(self.learners, self.learner_shape, self.spec.actions, self.device)

    def policy_params(self) -> Params:
        batch = self.synthetic_batch
        inputs = batch.observations if self.encoded_pairs else self.encoder(batch.observations)
        return sgd_step(self.family.forward, self._fresh, inputs, batch.targets, batch.learning_rate)

    def actor_metrics(self) -> dict[str, Tensor]:
        return {**super().actor_metrics(), "learning_rate": self.synthetic_batch.learning_rate.detach()}

    # --- evaluation ---------------------------------------------------------------------------------------------

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
            encoder={name: value.detach().contiguous().clone() for name, value in self.encoder.state_dict().items()},
            env=self.spec.id,
            action_type=self.spec.action_type,
            observation_clip=OBSERVATION_CLIP,
            metadata={
                "env_kwargs": self.spec.kwargs,
                "learners": [self.family.describe()],
                "encoder_level": str(self.encoder_level),
                "env_steps": int(self.env_steps),
                "seed": self.seed,
                "versions": {name: version(name) for name in ("lightning-distill", "torch", "gymnasium", "mujoco")},
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "license": "MIT",
            },
        )

    def on_validation_epoch_start(self) -> None:
        self.evaluations = {}

    def on_test_epoch_start(self) -> None:
        self.evaluations = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Fresh in-distribution learners play whole episodes with sampled actions."""
        evaluation = self.trainer.datamodule.evaluate(self.distilled(), self.family, "validate")
        self.evaluations[IN_DISTRIBUTION] = {"sampled": evaluation}
        self.log("val/return", evaluation.mean, batch_size=1, prog_bar=True)
        self.log("val/return_worst", evaluation.worst, batch_size=1)
        self.log("val/return_ci95", evaluation.ci95, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Fresh in-distribution learners play whole episodes, with sampled and with greedy actions."""
        self.evaluations[IN_DISTRIBUTION] = {}
        for kind in ("sampled", "greedy"):
            evaluation = self.trainer.datamodule.evaluate(
                self.distilled(), self.family, "test", greedy=kind == "greedy"
            )
            self.evaluations[IN_DISTRIBUTION][kind] = evaluation
            self.log(f"test/return_{kind}", evaluation.mean, batch_size=1)
            self.log(f"test/return_{kind}_ci95", evaluation.ci95, batch_size=1)
