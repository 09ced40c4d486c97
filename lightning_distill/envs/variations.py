"""Environments that differ a little from those a dataset was distilled in: what a taught policy still does there."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .spec import ConfigError, EnvSpec

if TYPE_CHECKING:
    import gymnasium
    from torchrl.envs import EnvBase


@dataclass(frozen=True)
class Variation:
    """Changes to an environment; the default changes nothing.

    Attributes:
        gravity, mass, friction: factors on the gravity vector, on the masses and inertias of all bodies, and on the
            friction coefficients of all geometries. MuJoCo only.
        sticky_actions: probability that a step repeats the action before it (Machado et al. 2018). Any Gymnasium
            environment; of Atari games it replaces ``repeat_action_probability``, which is 0 unless ``env_kwargs``
            say otherwise.
    """

    gravity: float = 1.0
    mass: float = 1.0
    friction: float = 1.0
    sticky_actions: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gravity", "mass", "friction"):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name != "mass"))):
                raise ConfigError(f"variation.{name}={value}: allowed are factors ≥ 0 (mass: > 0)")
        if not 0 <= self.sticky_actions < 1:
            raise ConfigError(f"variation.sticky_actions={self.sticky_actions}: allowed are probabilities in [0, 1)")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self != Variation()

    def __str__(self) -> str:
        changed = {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(Variation, name)}
        return ", ".join(f"{name}={value:g}" for name, value in changed.items()) or "none"

    def apply(self, env: gymnasium.Env) -> gymnasium.Env:
        """The environment with the changes made to it (MuJoCo's model is changed in place).

        Raises:
            ConfigError: factors other than 1 for an environment that MuJoCo does not simulate.
        """
        if (self.gravity, self.mass, self.friction) != (1.0, 1.0, 1.0):
            self._scale(env)
        if self.sticky_actions:
            from gymnasium.wrappers import StickyAction

            env = StickyAction(env, self.sticky_actions)
        return env

    def _scale(self, env: gymnasium.Env) -> None:
        import mujoco

        model = getattr(env.unwrapped, "model", None)
        if not isinstance(model, mujoco.MjModel):
            raise ConfigError(
                f"variation {self}: env={env.spec.id if env.spec else env!r} is not simulated by MuJoCo; "
                "allowed: gravity, mass and friction 1"
            )
        model.opt.gravity[:] *= self.gravity
        model.geom_friction[:] *= self.friction
        if self.mass != 1.0:
            model.body_mass[:] *= self.mass
            model.body_inertia[:] *= self.mass
            # What MuJoCo derives from masses (inverse weights of the constraint solver) has to follow them.
            mujoco.mj_setConst(model, env.unwrapped.data)


def make_varied_env(spec: EnvSpec, num_envs: int, seed: int, variation: Variation) -> EnvBase:
    """As :func:`lightning_distill.envs.make_env` with the backend ``gymnasium``, each environment varied.

    Raises:
        ConfigError: the environment is none of Gymnasium's, or cannot be varied so.
    """
    import gymnasium

    from . import _make, make_env
    from .vector import GymnasiumSimulator, VectorEnv

    try:
        gymnasium.spec(spec.id.rpartition(":")[2])  # without the module that registers it
    except gymnasium.error.Error as error:
        raise ConfigError(f"variation {variation}: env={spec.id!r} is no Gymnasium environment ({error})") from None

    if spec.frames:
        if variation != Variation(sticky_actions=variation.sticky_actions):
            raise ConfigError(f"variation {variation}: {spec.id} is an Atari game; allowed: sticky_actions")
        sticky = {**spec.kwargs, "repeat_action_probability": variation.sticky_actions}
        return make_env(dataclasses.replace(spec, kwargs=sticky), num_envs, seed)

    def make(spec: EnvSpec, num_envs: int, seed: int) -> Any:
        simulator = GymnasiumSimulator(spec, num_envs, seed)
        simulator.envs = [variation.apply(env) for env in simulator.envs]
        return simulator

    return VectorEnv(spec, num_envs, partial(_make, make, spec, num_envs), seed)
