"""Experts: what is imitated. The learners of a distilled dataset together, one policy trained by direct RL, or any other policy."""

from __future__ import annotations

import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import AtomicCheckpointIO
from .dataset import load
from .envs import ConfigError, EnvSpec
from .evaluation import check_matches, trained_family
from .families import as_family, family_from
from .learners import class_path
from .ppo import PPO
from .teaching import keep_random_state, teach_many

#: Taught learners whose mean output is a dataset's: what any of them does by chance is averaged out.
TAUGHT = 16


class Expert(ABC):
    """A policy to imitate. One of your own is a subclass, made as ``MyExpert(spec)`` of the environment's ``EnvSpec``.

    Attributes:
        mean, std: the normaliser [*obs] that learners' observations get; None: mean and standard deviation of the states that it
            comes to first.
        log_std: log standard deviation [d] of its continuous actions, in the environment's units: the noise with which it acts, and
            learners after it; None if discrete.
    """

    mean: Tensor | None = None
    std: Tensor | None = None
    log_std: Tensor | None = None

    @abstractmethod
    def output(self, observations: Tensor) -> Tensor:
        """Logits or means [B, d], in the environment's units, for an environment's observations [B, *obs] (float32)."""


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


def expert_from(expert: str | Expert | Callable[[EnvSpec], Expert], spec: EnvSpec) -> Expert:
    """The expert of a checkpoint (``*.ckpt``), of a class path (``package.module.Name``), or of a dataset (any other path, or a name in the zoo).

    Raises:
        ConfigError: there is none, or it is for other observations or actions than the environment's.
    """
    if isinstance(expert, str):
        if Path(expert).suffix == ".ckpt":
            return TrainedPolicy(expert, spec)
        if not _is_class_path(expert):
            return TaughtLearners(expert, spec)
    return _own(expert, spec)


def _is_class_path(name: str) -> bool:
    dotted = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name)
    return dotted is not None and not name.endswith(".safetensors") and not Path(name).exists()


def _own(given: str | Expert | Callable[[EnvSpec], Expert], spec: EnvSpec) -> Expert:
    """Somebody else's policy, looked at before anything is learned from it."""
    name = f"model.expert={given if isinstance(given, str) else class_path(given)!r}"
    try:
        found = pkgutil.resolve_name(given) if isinstance(given, str) else given
        expert = found if isinstance(found, Expert) else found(spec)
        if not isinstance(expert, Expert):
            raise TypeError(f"is a {type(expert).__name__}; allowed are subclasses of lightning_distill.experts.Expert")
        with torch.no_grad():
            output = expert.output(torch.zeros(2, *spec.observation_shape))
    except Exception as error:  # which may be any
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error
    expected = {"output": (output, (2, spec.actions))}
    if spec.action_type == "continuous":
        expected["log_std"] = expert.log_std, (spec.actions,)
    if expert.mean is not None or expert.std is not None:
        expected |= {part: (getattr(expert, part), spec.observation_shape) for part in ("mean", "std")}
    for part, (value, shape) in expected.items():
        if getattr(value, "shape", None) != shape:
            has = f"is {value!r}" if value is None else f"has shape {list(value.shape)}"
            raise ConfigError(f"{name}: its {part} {has}; {spec.id} needs {list(shape)}")
    return expert
