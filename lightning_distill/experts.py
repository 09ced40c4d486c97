"""Experts: what is imitated. The learners of a distilled dataset together, one policy trained by direct RL, or any other policy."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import AtomicCheckpointIO
from .class_paths import class_path, imported
from .dataset import load
from .envs import ConfigError, EnvSpec
from .families import as_family, family_from
from .learners import LearnerFamily
from .matching import check_begins, trained_family
from .modules import ModuleFamily
from .ppo import PPO
from .rollout_module import OBSERVATION_CLIP
from .teaching import seeded, teach_many

#: Taught learners whose mean output is a dataset's: what any of them does by chance is averaged out.
TAUGHT = 16


class Expert(ABC):
    """A policy to imitate. One of your own is a subclass, made as ``MyExpert(spec)`` of the environment's ``EnvSpec``.

    Attributes:
        mean, std: the normaliser [*obs] that learners' observations get; None or left out: mean and standard deviation of the states
            that it comes to first.
        log_std: log standard deviation [d] of its continuous actions, in the environment's units: the noise with which it acts, and
            learners after it; None or left out if discrete.
    """

    mean: Tensor | None
    std: Tensor | None
    log_std: Tensor | None

    @abstractmethod
    def output(self, observations: Tensor) -> Tensor:
        """Logits or means [B, d], in the environment's units, for an environment's observations [B, *obs] (float32, on the device that trains)."""


class TaughtLearners(Expert):
    """The mean output of learners taught on a dataset: its name in the zoo, or a path."""

    def __init__(self, name: str, spec: EnvSpec) -> None:
        try:
            dataset = load(name)
            check_begins(f"model.expert={name!r}", dataset, spec)
            family = trained_family(dataset)
        except ValueError as error:
            raise ConfigError(f"model.expert={name!r}: {error}") from None
        self.mean, self.std, self.log_std = dataset.observation_mean, dataset.observation_std, dataset.log_std
        with seeded(0):
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
            if isinstance(named, str):
                family = as_family(named)
            elif named and not named["class_path"].startswith("lightning_distill."):
                family = _own_family(named["class_path"], named.get("init_args", {}))
            else:
                family = family_from(checkpoint["family"])
            names = ("encoder_level", "log_std_min")
            module = PPO(checkpoint["env"], family=family, **{name: settings[name] for name in names})
            module.load_state_dict(state)
            module.observation_clip = checkpoint.get("observation_clip", OBSERVATION_CLIP)
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise ConfigError(f"model.expert={path!r}: its policy cannot be built ({error})") from None
        mine, its = module.spec.interface, spec.interface
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


def _own_family(path: str, arguments: dict[str, Any]) -> LearnerFamily:
    """A family from a checkpoint's class path and arguments; subclasses of nn.Module and LearnerFamily alone, as the file may hold any words."""
    found = imported(path)
    if not isinstance(found, type) or not issubclass(found, nn.Module | LearnerFamily):
        raise TypeError(f"family={path!r}: with arguments allowed are classes of nn.Module and LearnerFamily")
    return found(**arguments) if issubclass(found, LearnerFamily) else ModuleFamily(partial(found, **arguments))


class OwnPolicy(Expert):
    """A policy from elsewhere, looked at before anything is learned from it; no gradient reaches it.

    Args:
        given: an :class:`Expert`, what makes one of the spec, or the class path of either.
    """

    def __init__(self, given: str | Expert | Callable[[EnvSpec], Expert], spec: EnvSpec) -> None:
        self.name = name = f"model.expert={given if isinstance(given, str) else class_path(given)!r}"
        try:
            if isinstance(given, str):
                given = imported(given)
            self.policy = given if isinstance(given, Expert) else given(spec)
            if not isinstance(self.policy, Expert):
                made = type(self.policy).__name__
                raise TypeError(f"is a {made}; allowed are subclasses of lightning_distill.experts.Expert")
            with torch.no_grad():
                output = self.policy.output(torch.zeros(2, *spec.observation_shape))
        except Exception as error:  # which may be any
            raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error

        def numbers(part: str, value: Any, shape: tuple[int, ...]) -> Tensor:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                is_one = f"of {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise ConfigError(f"{name}: its {part} is {is_one}; allowed are tensors of floating-point numbers")
            if value.shape != shape:
                raise ConfigError(f"{name}: its {part} has shape {list(value.shape)}; {spec.id} needs {list(shape)}")
            if not value.isfinite().all():
                raise ConfigError(f"{name}: its {part} is {value.tolist()}; allowed are finite numbers")
            return value.detach().float()

        numbers("output", output, (2, spec.actions))
        mean, std, log_std = (getattr(self.policy, part, None) for part in ("mean", "std", "log_std"))
        self.log_std = numbers("log_std", log_std, (spec.actions,)) if spec.action_type == "continuous" else None
        self.mean = self.std = None
        if mean is not None or std is not None:
            shape = spec.observation_shape
            self.mean, self.std = numbers("mean", mean, shape), numbers("std", std, shape)

    @torch.no_grad()
    def output(self, observations: Tensor) -> Tensor:
        output = self.policy.output(observations).to(observations)
        if output.isnan().any():
            raise ConfigError(
                f"{self.name}: its output holds NaN for observations that it came to; allowed are numbers"
            )
        return output


def expert_from(expert: str | Expert | Callable[[EnvSpec], Expert], spec: EnvSpec) -> Expert:
    """The expert of a checkpoint (``*.ckpt``), of a class path (``package.module.Name``), or of a dataset (any other path, or a name in the zoo).

    Raises:
        ConfigError: there is none, or it is for other observations or actions than the environment's.
    """
    if not isinstance(expert, str) or _is_class_path(expert):
        return OwnPolicy(expert, spec)
    return (TrainedPolicy if Path(expert).suffix == ".ckpt" else TaughtLearners)(expert, spec)


def _is_class_path(name: str) -> bool:
    dotted = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name)
    return dotted is not None and not name.endswith((".ckpt", ".safetensors")) and not Path(name).exists()
