"""Learner families by name, for configs and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from . import architectures
from .class_paths import imported
from .envs.spec import ConfigError
from .learners import MLP, LearnerFamily
from .mixtures import Mixture, MLPs, members
from .modules import ModuleFamily
from .nature import FRAME_FAMILIES, FRAMES, NatureCNN

#: What most learners of ``mixture`` are drawn from: no width, and no combination, of the held-out names below.
_VARIED: dict[str, Any] = {
    "widths": [48, 96, 192],
    "depths": [1, 2, 3],
    "activations": ["tanh", "relu", "gelu", "silu"],
    "inits": ["orthogonal", "xavier", "kaiming", "default"],
    "gains": [1.0, 2**0.5],
}

#: What a name does not say is as in the paper's learner, MLP 64-64 tanh, orthogonal.
FAMILIES: dict[str, LearnerFamily] = {
    "paper": MLP(),
    "linear": MLP(depth=0),
    "depth_1": MLP(depth=1),
    "depth_3": MLP(depth=3),
    "depth_5": MLP(depth=5),
    "width_32": MLP(width=32),
    "width_256": MLP(width=256),
    "width_512": MLP(width=512),
    "relu": MLP(activation="relu"),
    "gelu": MLP(activation="gelu"),
    "silu": MLP(activation="silu"),
    "elu": MLP(activation="elu"),
    "sin": MLP(activation="sin"),
    "gain_1": MLP(gain=1.0),
    "xavier": MLP(init="xavier"),
    "kaiming": MLP(init="kaiming", activation="relu"),
    "default_init": MLP(init="default"),
    "default_relu_256": MLP(width=256, init="default", activation="relu"),
    "layer_norm": MLP(norm="layer", activation="relu"),
    "residual": ModuleFamily(architectures.Residual),
    "attention": ModuleFamily(architectures.EntryAttention),
    # Some with layer normalisation, and some of so small a gain that tanh is nearly linear.
    "mixture": Mixture(
        [MLPs(**_VARIED), MLPs(**_VARIED, norms=["layer"]), MLPs([48, 96, 192], [1], gains=[0.2])],
        weights=[5.0, 2.0, 1.0],
    ),
}

#: Held out by default, none of them in ``mixture``: widths 32–512, depths 0–5, every activation and initialisation.
HELD_OUT = (
    "width_512",
    "relu",
    "default_init",
    "linear",
    "width_32",
    "depth_5",
    "gelu",
    "silu",
    "elu",
    "sin",
    "gain_1",
    "xavier",
    "kaiming",
    "default_relu_256",
    "layer_norm",
    "residual",
    "attention",
)


#: The same for games, whatever the encoder leaves of the network.
HELD_OUT_OF_FRAMES = ("nature_default_init", "nature_xavier", "nature_tanh", "nature_256", "nature_1024")

#: ``attention`` has a token for each entry of an observation, and so as much memory as the square of their number: no more than these.
TOKENS = 512

TRAINED_ON = " (trained on)"


def held_out_from(observation_shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the families that are held out by default, of learners of an environment's observations [*obs]."""
    if tuple(observation_shape) == FRAMES:
        return HELD_OUT_OF_FRAMES
    return tuple(name for name in HELD_OUT if name != "attention" or math.prod(observation_shape) <= TOKENS)


def family_named(name: str) -> LearnerFamily:
    """The family of a name in ``FAMILIES`` or ``FRAME_FAMILIES``, or what a class path ``package.module.Name`` names.

    That may be a ``LearnerFamily`` (or a class of them, made without arguments), or what makes an ``nn.Module`` when
    called as ``factory(observation_shape, outputs)``.

    Raises:
        ConfigError: unknown name, or a class path that cannot be imported or is neither.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    if name in FRAME_FAMILIES:
        return FRAME_FAMILIES[name]()
    if "{" in name:  # what the command line makes of a mapping that it cannot read
        raise ConfigError(
            f"family={name!r}: a mapping with something in it that is not understood; from a file, or typed one by one as "
            "--held_out.families.NAME={class_path: ..., init_args: ...}, it is named"
        )
    if not name.rpartition(".")[0]:
        raise ConfigError(
            f"family={name!r}: allowed are {', '.join((*FAMILIES, *FRAME_FAMILIES))}, and class paths (package.module.Name) of a "
            "LearnerFamily or of what makes an nn.Module from (observation_shape, outputs)"
        )
    try:
        found = imported(name)
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(
            f"family={name!r}: cannot be imported ({error}); modules in the working directory and installed ones can"
        ) from error
    if isinstance(found, str):  # which would be taken for a name
        raise ConfigError(f"family={name!r}: is a str, expected a LearnerFamily or an nn.Module factory")
    try:
        return as_family(found)
    except Exception as error:  # a class of families may need arguments
        raise ConfigError(f"family={name!r}: {error}") from error


def as_families(
    families: Mapping[str, LearnerFamily | Callable[..., Any] | str] | Iterable[str],
) -> dict[str, LearnerFamily]:
    """Families by name, given as such or by names that :func:`family_named` knows."""
    named = families if isinstance(families, Mapping) else {name: name for name in families}
    return {name: as_family(family) for name, family in named.items()}


def as_family(family: LearnerFamily | Callable[..., Any] | str) -> LearnerFamily:
    """A family, given by what :func:`family_named` knows, itself, as a class of them, or as what makes an ``nn.Module``."""
    if isinstance(family, str):
        return family_named(family)
    if isinstance(family, LearnerFamily):
        return family
    if isinstance(family, type) and issubclass(family, LearnerFamily):
        return family()
    if callable(family) and not isinstance(family, nn.Module):
        return ModuleFamily(family)
    raise ConfigError(f"family: is a {type(family).__name__}, expected a LearnerFamily or an nn.Module factory")


def can_draw(family: LearnerFamily, other: LearnerFamily) -> bool:
    """Whether learners of ``other`` may be among those drawn of ``family``: of what is drawn so, nothing is held out."""
    return any(_same(mine, its) for mine in members(family) for its in members(other))


def _same(family: LearnerFamily, other: LearnerFamily) -> bool:
    """Whether two families draw the same learners. Functions and objects are themselves alone: two lambdas have one name."""
    if isinstance(family, ModuleFamily) and isinstance(other, ModuleFamily):
        return family.factory == other.factory or (
            isinstance(family.factory, partial) and family.describe() == other.describe()
        )
    return family.describe() == other.describe()


def families_apart(families: dict[str, LearnerFamily], trained: LearnerFamily) -> dict[str, LearnerFamily]:
    """The same families, with "(trained on)" after the names of those that are not held out from ``trained``."""
    return {
        f"{name}{TRAINED_ON}" if can_draw(trained, family) and not name.endswith(TRAINED_ON) else name: family
        for name, family in families.items()
    }


def family_from(description: Any) -> LearnerFamily:
    """The family that ``describe`` described. Of a file's words only what comes with this package is built.

    Raises:
        ValueError: any other class, or arguments it does not take.
    """
    path, arguments = description.get("class_path"), description.get("init_args", {})
    try:
        if path == "lightning_distill.MLP":
            return MLP(**arguments)
        if path == "lightning_distill.NatureCNN":
            return NatureCNN(**arguments)
        if path == "lightning_distill.MLPs":
            return MLPs(**arguments)
        if path == "lightning_distill.Mixture":
            return Mixture(**arguments | {"families": [family_from(part) for part in arguments["families"]]})
        for family in FAMILIES.values():
            if family.describe() == description:
                return family
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"init_args={str(arguments)[:200]}: not accepted by {path} ({error})") from None
    raise ValueError(f"class_path={path!r}: from a description only families of lightning_distill are built")
