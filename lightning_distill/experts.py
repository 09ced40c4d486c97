"""Experts: what is imitated. The learners of a distilled dataset together, or one policy trained by direct RL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import AtomicCheckpointIO
from .dataset import load
from .envs import ConfigError, EnvSpec
from .evaluation import check_matches, trained_family
from .families import as_family, family_from
from .ppo import PPO
from .teaching import keep_random_state, teach_many

#: Taught learners whose mean output is a dataset's: what any of them does by chance is averaged out.
TAUGHT = 16


class Expert(ABC):
    """A policy to imitate.

    Attributes:
        mean, std: the normaliser [*obs] of its observations.
        log_std: log standard deviation [d] of its continuous actions; None if discrete.
    """

    mean: Tensor
    std: Tensor
    log_std: Tensor | None

    @abstractmethod
    def output(self, observations: Tensor) -> Tensor:
        """Logits or means [B, d] for an environment's observations [B, *obs]."""


class TaughtLearners(Expert):
    """The mean output of learners taught on a dataset: its name in the zoo, or a path."""

    def __init__(self, name: str, spec: EnvSpec) -> None:
        try:
            dataset = load(name)
            check_matches(dataset, spec)
            family = trained_family(dataset)
        except ValueError as error:
            raise ConfigError(f"model.expert={name!r}: {error}") from None
        self.mean, self.std, self.log_std = dataset.observation_mean, dataset.observation_std, dataset.log_std
        with keep_random_state(torch.device("cpu")):
            torch.manual_seed(0)
            self.policy = teach_many(family, dataset, TAUGHT)

    def output(self, observations: Tensor) -> Tensor:
        policy = self.policy.to(observations.device)
        inputs = policy.normalised(observations)  # and encoded, once for all
        return policy.module(inputs.expand(TAUGHT, *inputs.shape)).float().mean(0)


class TrainedPolicy(Expert):
    """The policy in a checkpoint of :class:`PPO`. Nothing that the checkpoint holds is executed."""

    def __init__(self, path: str, spec: EnvSpec) -> None:
        try:
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace("ckpt_path=", "model.expert=", 1)) from error
        settings, state = checkpoint.get("hyper_parameters", {}), checkpoint.get("state_dict", {})
        if "actor.weights.0" not in state:
            raise ConfigError(
                f"model.expert={path!r}: holds no policy; allowed are checkpoints of PPO, and distilled datasets"
            )
        try:
            # Options given in Python are not among the settings.
            named = settings.get("family")
            family = as_family(named) if isinstance(named, str) else family_from(checkpoint["family"])
            names = ("encoder_level", "log_std_min")
            module = PPO(checkpoint["env"], family, **{name: settings[name] for name in names})
            module.load_state_dict(state)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ConfigError(f"model.expert={path!r}: its policy cannot be built ({error})") from None
        mine, its = [(s.observation_shape, s.action_type, s.actions) for s in (module.spec, spec)]
        if mine != its:
            raise ConfigError(
                f"model.expert={path!r}: of {module.spec.id}, with observations, actions, outputs {mine}; "
                f"data.env={spec.id!r} has {its}"
            )
        self.module = module.eval().requires_grad_(False)
        self.mean, self.std = module.running_normaliser()
        self.log_std = module.log_std

    def output(self, observations: Tensor) -> Tensor:
        return self.module.to(observations.device).present_output(observations)


def expert_from(name: str, spec: EnvSpec) -> Expert:
    """The expert of a checkpoint (``*.ckpt``) or of a dataset (any other path, or a name in the zoo).

    Raises:
        ConfigError: there is none, or it is for other observations or actions than the environment's.
    """
    return (TrainedPolicy if Path(name).suffix == ".ckpt" else TaughtLearners)(name, spec)
