"""Distil a reinforcement-learning environment into a handful of supervised pairs.

from lightning_distill import load, teach
policy = teach(my_module, load("ant"))
action = policy(observation)
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .dataset import DatasetError, DistilledDataset, load
from .envs.spec import ConfigError, EnvSpec
from .envs.variations import Variation
from .learners import MLP, LearnerFamily
from .mixtures import Mixture, MLPs
from .modules import ModuleFamily
from .nature import NatureCNN
from .teaching import Policy, StackedPolicy, teach, teach_many

if TYPE_CHECKING:
    from .data import CollectorDataModule
    from .evaluation import evaluate, evaluate_all
    from .experts import Expert
    from .imitation import Imitation
    from .meta_ppo import MetaPPO
    from .ppo import PPO
    from .returns import Evaluation

__all__ = [
    "MLP",
    "MLPs",
    "CollectorDataModule",
    "ConfigError",
    "DatasetError",
    "DistilledDataset",
    "EnvSpec",
    "Evaluation",
    "Expert",
    "Imitation",
    "LearnerFamily",
    "MetaPPO",
    "Mixture",
    "ModuleFamily",
    "NatureCNN",
    "PPO",
    "Policy",
    "StackedPolicy",
    "Variation",
    "evaluate",
    "evaluate_all",
    "load",
    "teach",
    "teach_many",
]

if "gymnasium" in sys.modules:
    from .envs import registration as registration

# What trains or simulates is imported when it is asked for: loading and teaching need torch and safetensors alone.
_LAZY = {
    "CollectorDataModule": "data",
    "Evaluation": "returns",
    "evaluate": "evaluation",
    "evaluate_all": "evaluation",
    "Expert": "experts",
    "Imitation": "imitation",
    "MetaPPO": "meta_ppo",
    "PPO": "ppo",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
