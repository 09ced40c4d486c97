"""One way to make any environment: ``make_env`` for stepping, ``env_spec`` for its shapes.

Importing this package is cheap; simulators and TorchRL are imported when an environment is made.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from .spec import ConfigError, EnvSpec, reason

if TYPE_CHECKING:
    import torch
    from torchrl.envs import EnvBase

__all__ = [
    "Backend",
    "ConfigError",
    "EnvSpec",
    "env_spec",
    "make_env",
    "reason",
    "simulator_threads",
    "stream_seed",
    "usable_cores",
]

Backend = Literal["auto", "gymnasium", "processes", "envpool"]

#: What envpool makes without the contact forces that Gymnasium's observe or pay for.
WITHOUT_CONTACTS = ("Humanoid-v4", "HumanoidStandup-v4")

#: Arguments of Gymnasium's MuJoCo environments that envpool's have by the same name.
SHARED_ARGUMENTS = (
    "forward_reward_weight",
    "ctrl_cost_weight",
    "contact_cost_weight",
    "healthy_reward",
    "terminate_when_unhealthy",
    "reset_noise_scale",
)

#: Seeds of evaluation start here and never meet those of training, which end below.
EVALUATION_SEEDS = 2**30


def stream_seed(*key: int, evaluation: bool = False) -> int:
    """A seed for the stream named by ``key`` (run seed, rank, …); training and evaluation seeds are disjoint."""
    import numpy as np

    if key[0] < 0:
        raise ConfigError(f"seed={key[0]}: allowed are integers ≥ 0")
    offset = int(np.random.SeedSequence(key).generate_state(1)[0] % (EVALUATION_SEEDS // 2))
    return offset + EVALUATION_SEEDS * evaluation


def usable_cores() -> int:
    """How many cores this process may use: it may be bound to some of the machine's, as on a cluster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def simulator_threads(env: EnvBase) -> Iterator[None]:
    """While a simulator with its own threads steps, torch keeps to one: idle torch threads would spin on its cores."""
    import torch

    threads = torch.get_num_threads()
    if hasattr(env, "simulator"):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _known_warnings_filtered() -> Iterator[None]:
    """Lines that every environment would repeat and no user can act on; all other warnings pass.

    Comparing with published figures needs the older MuJoCo environments, whose age is known; and Gymnasium's models use
    a compiler attribute that MuJoCo 4 calls deprecated (it would also write a log file into the working directory). Bounds of
    its spaces become float32.
    """
    import mujoco

    def passed_on(message: str) -> None:
        if "settotalmass" not in message:
            warnings.warn(message, stacklevel=2)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(passed_on)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*(out of date|precision lowered by casting).*")
            yield
    finally:
        mujoco.set_mju_user_warning(before)


def _gymnasium_env(env: str, kwargs: dict[str, Any]) -> Any:
    import gymnasium

    from .atari import register_games
    from .vector import gymnasium_env

    try:
        with _known_warnings_filtered():
            return gymnasium_env(env, kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        if importlib.util.find_spec("ale_py"):
            register_games()
        close = difflib.get_close_matches(env, gymnasium.registry.keys() - {env}, n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(
            f"data.env={env!r} is not an environment that can be made ({error}){hint} "
            "Allowed: any installed Gymnasium id, or the class path of a TorchRL environment"
        ) from error
    except Exception as error:  # somebody else's constructor may raise anything
        raise ConfigError(_not_accepted(env, kwargs, error)) from error


def _not_accepted(env: str, kwargs: dict[str, Any], error: Exception) -> str:
    if not kwargs:
        return f"data.env={env!r} cannot be made ({type(error).__name__}: {error})"
    return (
        f"data.env_kwargs={kwargs!r}: not accepted by {env} ({type(error).__name__}: {error}); "
        "allowed: what its constructor takes, or null to give it nothing"
    )


def _torchrl_class(env: str) -> type[EnvBase] | None:
    """The TorchRL environment class that a dotted path names; None for a Gymnasium id."""
    module, _, name = env.rpartition(".")
    if not module or "/" in env or ":" in env:
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # somebody else's module may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return None  # there is no such module
        raise ConfigError(f"data.env={env!r}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    import gymnasium
    from torchrl.envs import EnvBase

    if isinstance(found, type) and issubclass(found, EnvBase):
        return found
    if env in gymnasium.registry:
        return None
    raise ConfigError(
        f"data.env={env!r}: {module} has no TorchRL environment of the name {name}; allowed: a subclass of torchrl's EnvBase, or a "
        f"Gymnasium environment that is registered, as its id ({module}:ID if that module registers it)"
    )


def env_spec(env: str, kwargs: dict[str, Any] | None = None) -> EnvSpec:
    """Shapes and kinds of an environment.

    Raises:
        ConfigError: unknown id, or an action or observation space that cannot be learned from (it is named).
    """
    from .cartpole import DIMENSIONS

    if not isinstance(env, str):
        raise ConfigError(
            f"data.env={env!r}: allowed are an installed Gymnasium id, and the class path of a TorchRL environment"
        )
    kwargs = dict(kwargs or {})
    if env in DIMENSIONS and not kwargs:
        n = DIMENSIONS[env]
        return EnvSpec(env, (4 * n,), "discrete", 2 * n)
    if (torchrl_class := _torchrl_class(env)) is not None:
        return _torchrl_spec(env, torchrl_class, kwargs)
    from .atari import atari_spec, rom_of

    if rom_of(env) is not None:
        return atari_spec(env, kwargs)
    import numpy as np
    from gymnasium.spaces import Box, Discrete

    made = _gymnasium_env(env, kwargs)
    observation, action = made.observation_space, made.action_space
    rest = {"kwargs": kwargs, "time_limit": made.spec.max_episode_steps}
    try:
        if not isinstance(observation, Box) or observation.shape == ():
            raise ConfigError(
                f"data.env={env!r} has the observation space {observation}; allowed: Box with a shape, and what Gymnasium flattens to "
                "one (Dict, Tuple, Discrete, …)"
            )
        _try_out(env, made)
    finally:
        made.close()
    if isinstance(action, Discrete) and action.start == 0 and action.n > 1:
        return EnvSpec(env, observation.shape, "discrete", int(action.n), **rest)
    if isinstance(action, Box) and len(action.shape) == 1 and np.issubdtype(action.dtype, np.floating):
        bounds = action.low.tolist(), action.high.tolist()
        return EnvSpec(env, observation.shape, "continuous", action.shape[0], *bounds, **rest)
    raise ConfigError(
        f"data.env={env!r} has the action space {action}; allowed: Discrete of two or more starting at 0, or Box of floating-point numbers with one dimension"
    )


def _try_out(env: str, made: Any) -> None:
    """Raise ``ConfigError`` unless an environment begins an episode and steps as Gymnasium's interface has it: an own one may not."""
    import numpy as np

    shape = made.observation_space.shape
    try:
        observation, _ = made.reset(seed=0)
        following, reward, terminated, truncated, _ = made.step(made.action_space.sample())
        float(reward), bool(terminated), bool(truncated)
    except Exception as error:
        raise ConfigError(
            f"data.env={env!r}: {type(error).__name__} in a first step ({error}); allowed: reset(seed=…) returns observation and info, "
            "step(action) observation, reward, terminated, truncated and info"
        ) from error
    for seen in (observation, following):
        if np.shape(seen) != shape:
            raise ConfigError(
                f"data.env={env!r}: an observation has the shape {np.shape(seen)}; allowed is that of its observation_space, {shape}"
            )


def _torchrl_spec(env: str, torchrl_class: type[EnvBase], kwargs: dict[str, Any]) -> EnvSpec:
    from torchrl.data import Bounded, Categorical, Unbounded

    try:
        made = torchrl_class(**kwargs)
    except Exception as error:  # somebody else's constructor may raise anything
        raise ConfigError(_not_accepted(env, kwargs, error)) from error
    if made.batch_size:
        raise ConfigError(
            f"data.env={env!r} has the batch size {list(made.batch_size)}; allowed: one environment, batch size []"
        )
    if "observation" not in made.observation_spec:
        keys = sorted(map(str, made.observation_spec.keys()))
        raise ConfigError(f"data.env={env!r} observes {keys}; allowed: an environment with the key 'observation'")
    shape, action = tuple(made.observation_spec["observation"].shape), made.action_spec
    made.close()
    if isinstance(action, Categorical) and not action.shape and action.space.n > 1:
        return EnvSpec(env, shape, "discrete", int(action.space.n), kwargs=kwargs)
    if isinstance(action, Bounded | Unbounded) and len(action.shape) == 1:
        low, high = (bound.tolist() for bound in (action.space.low, action.space.high))
        return EnvSpec(env, shape, "continuous", action.shape[-1], low, high, kwargs=kwargs)
    raise ConfigError(
        f"data.env={env!r} has the action spec {action}; allowed: Categorical of two or more, or a bounded vector"
    )


@_known_warnings_filtered()
def _envpool_options(spec: EnvSpec) -> dict[str, Any] | None:
    """What makes this environment by :class:`EnvPoolSimulator`; None if envpool cannot.

    Arguments may leave parts of the observation out (Gymnasium's MuJoCo environments name these arguments
    ``include_PART_in_observation``, and the parts' sizes), or be such as both have.
    """
    if importlib.util.find_spec("envpool") is None:
        return None
    import envpool
    import numpy as np

    if spec.id not in envpool.list_all_envs() or spec.id.startswith("ALE/") or spec.id in WITHOUT_CONTACTS:
        return None
    its = envpool.make_spec(spec.id)
    kwargs = {name: value for name, value in spec.kwargs.items() if name in SHARED_ARGUMENTS}
    left_out = spec.kwargs.keys() - kwargs.keys()
    if any(map(spec.kwargs.get, left_out)) or not kwargs.keys() <= set(its.config._fields):
        return None
    if not left_out:
        # It flattens nothing.
        return {"kwargs": kwargs} if its.gymnasium_observation_space.shape == spec.observation_shape else None
    hidden = {key.removeprefix("include_").removesuffix("_in_observation") for key in left_out}
    made = _gymnasium_env(spec.id, {})
    sizes = getattr(made.unwrapped, "observation_structure", {})
    made.close()
    if not hidden <= sizes.keys():
        return None
    parts = {part: size for part, size in sizes.items() if not part.startswith("skipped_")}
    entries = np.flatnonzero(np.repeat([part not in hidden for part in parts], list(parts.values())))
    return {"kwargs": kwargs, "entries": entries}


def make_env(
    spec: EnvSpec,
    num_envs: int,
    seed: int,
    backend: Backend = "auto",
    threads: int | None = None,
    device: torch.device | str = "cpu",
    training: bool = False,
    max_episode_steps: int | None = None,
) -> EnvBase:
    """``num_envs`` copies of an environment, stepped together as one TorchRL environment.

    Args:
        spec: from :func:`env_spec`.
        num_envs: batch size of the environment.
        seed: of its start states.
        backend: who simulates: ``gymnasium`` (one after the other), ``processes`` (Gymnasium's or TorchRL's, one
            process each), ``envpool`` (C++ threads; needs the extra ``fast``, and ``env_kwargs`` that only leave parts of
            the observation out or are among ``SHARED_ARGUMENTS``); ``auto`` takes envpool where it can. Atari games have a
            simulator of their own.
        threads: of envpool and of the Atari emulator; default: one for each core that the process may use.
        device: where a torch environment (cart-pole) computes; the others compute on the CPU.
        training: first episodes are truncated at staggered times, see :class:`VectorEnv`; Atari: clip rewards, and end an
            episode with a lost life.
        max_episode_steps: truncate episodes after so many steps; default: as the environment ends them.

    Raises:
        ConfigError: the backend cannot make the environment.
    """
    from .cartpole import DIMENSIONS, CartPole
    from .vector import EnvPoolSimulator, GymnasiumSimulator, ProcessSimulator, VectorEnv

    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r}: allowed are {', '.join(get_args(Backend))}")
    if threads is not None and (not isinstance(threads, Integral) or threads < 1):
        raise ConfigError(f"threads={threads!r}: allowed are integers ≥ 1")
    threads = threads or usable_cores()
    limits = [max_episode_steps, spec.time_limit if training else None]
    limit = min(filter(None, limits), default=None)
    if spec.frames:
        from .atari import AtariSimulator

        if backend != "auto":
            raise ConfigError(f"data.backend={backend!r} for {spec.id}: allowed is auto, ale-py's vector environment")
        simulator = partial(_make, AtariSimulator, spec, num_envs, threads=threads, training=training)
        return VectorEnv(spec, num_envs, simulator, seed, limit)
    if backend == "auto" and spec.id in DIMENSIONS and not spec.kwargs:
        return _truncated(CartPole(DIMENSIONS[spec.id], num_envs, seed, device), max_episode_steps)
    if (torchrl_class := _torchrl_class(spec.id)) is not None:
        from torchrl.envs import ParallelEnv, SerialEnv, TransformedEnv

        from .clipping import ClippedActions

        if backend not in ("auto", "processes"):
            raise ConfigError(
                f"data.backend={backend!r} for {spec.id}, a TorchRL environment: allowed are auto, processes"
            )
        together = ParallelEnv if backend == "processes" else SerialEnv
        env = together(num_envs, partial(torchrl_class, **spec.kwargs))
        env.set_seed(seed)
        if spec.action_type == "continuous":
            env = TransformedEnv(env, ClippedActions(spec))
        return _truncated(env, max_episode_steps)
    options = _envpool_options(spec) if backend in ("auto", "envpool") else None
    if backend == "envpool" or options is not None:
        if options is None:
            raise ConfigError(
                f"data.backend='envpool' cannot make {spec.id!r} with env_kwargs={spec.kwargs}; allowed: an id that an "
                f"installed envpool (extra 'fast') lists, and of env_kwargs include_PART_in_observation=false, {', '.join(SHARED_ARGUMENTS)}. "
                "Otherwise: auto, gymnasium, processes"
            )
        simulator = partial(_make, EnvPoolSimulator, spec, num_envs, threads=threads, **options)
        return VectorEnv(spec, num_envs, simulator, seed, limit)
    simulator = ProcessSimulator if backend == "processes" else GymnasiumSimulator
    return VectorEnv(spec, num_envs, partial(_make, simulator, spec, num_envs), seed, limit)


def _truncated(env: EnvBase, steps: int | None) -> EnvBase:
    from torchrl.envs import StepCounter, TransformedEnv

    return env if steps is None else TransformedEnv(env, StepCounter(max_steps=steps))


def _make(simulator: Any, spec: EnvSpec, num_envs: int, seed: int, **kwargs: Any) -> Any:
    with _known_warnings_filtered():
        return simulator(spec, num_envs, seed, **kwargs)
