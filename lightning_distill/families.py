"""Learner families by name, for configs and the command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .envs.spec import ConfigError
from .learners import MLP, LearnerFamily, ModuleFamily
from .nature import FRAME_FAMILIES

#: Name → arguments of ``MLP``; what a name does not say is as in the paper's learner.
FAMILIES: dict[str, dict[str, Any]] = {
    "paper": {},
    "linear": {"depth": 0},
    "depth_1": {"depth": 1},
    "depth_3": {"depth": 3},
    "width_32": {"width": 32},
    "width_256": {"width": 256},
    "width_512": {"width": 512},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "elu": {"activation": "elu"},
    "sin": {"activation": "sin"},
    "gain_1": {"gain": 1.0},
    "xavier": {"init": "xavier"},
    "kaiming": {"init": "kaiming"},
    "default_init": {"init": "default"},
}


def family_named(name: str) -> LearnerFamily:
    """The family of a name in ``FAMILIES`` or ``FRAME_FAMILIES``, or what a class path ``package.module.Name`` names.

    That may be a ``LearnerFamily`` (or a class of them, made without arguments), or what makes an ``nn.Module`` when
    called as ``factory(observation_shape, outputs)``. Modules of the working directory are found too.

    Raises:
        ConfigError: unknown name, or a class path that cannot be imported or is neither.
    """
    if name in FAMILIES:
        return MLP(**FAMILIES[name])
    if name in FRAME_FAMILIES:
        return FRAME_FAMILIES[name]()
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"family={name!r}: allowed are {', '.join((*FAMILIES, *FRAME_FAMILIES))}, and class paths (package.module.Name) of a "
            "LearnerFamily or of what makes an nn.Module from (observation_shape, outputs)"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(f"family={name!r}: cannot be imported ({error})") from error
    if isinstance(found, LearnerFamily):
        return found
    if isinstance(found, type) and issubclass(found, LearnerFamily):
        return found()
    if callable(found):
        return ModuleFamily(found)
    raise ConfigError(f"family={name!r}: is a {type(found).__name__}, expected a LearnerFamily or an nn.Module factory")


def as_family(family: LearnerFamily | str) -> LearnerFamily:
    """A family, given itself or by what :func:`family_named` knows."""
    return family_named(family) if isinstance(family, str) else family
