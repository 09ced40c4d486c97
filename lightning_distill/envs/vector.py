"""Any Gymnasium environment as one batched TorchRL environment, at close to the simulator's own speed.

TorchRL's own wrappers and batched environments cost more than a MuJoCo step; a thin ``EnvBase`` over a vectorised
simulator costs a few microseconds. Finished environments are reset explicitly and separately from the step, so that
the terminal observation is kept as ``next.observation`` and no bogus transition enters the data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from .spec import EnvSpec

#: Observation, reward, terminated, truncated.
Results = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Simulator(Protocol):
    """What a vectorised simulator offers; arrays have the number of environments as first dimension and are its caller's."""

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        """Reset the environments in ``mask`` (None: all); observations of all, of which only the reset ones count."""

    def step(self, action: np.ndarray, mask: np.ndarray | None = None) -> Results:
        """Step the environments in ``mask`` (None: all), or more; results of all, of which only theirs count.

        Environments that are not in ``mask`` may have finished.
        """

    def close(self) -> None: ...


def gymnasium_env(env: str, kwargs: dict[str, Any]) -> Any:
    """A Gymnasium environment whose observations are arrays: those of another space, such as ``Dict`` or ``Discrete``, as Gymnasium
    flattens them, where it can."""
    import gymnasium

    from . import registration  # noqa: F401  here, as simulators' processes know of no other import

    if env.startswith("ALE/") or (env.split("-")[0].endswith("NoFrameskip") and importlib.util.find_spec("ale_py")):
        from .atari import register_games

        register_games()
    made = gymnasium.make(env, disable_env_checker=True, **kwargs)
    space = made.observation_space
    if not space.is_np_flattenable or (isinstance(space, gymnasium.spaces.Box) and space.shape):
        return made
    return gymnasium.wrappers.FlattenObservation(made)


class GymnasiumSimulator:
    """Gymnasium environments one after the other: works everywhere."""

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int) -> None:
        self.envs = [gymnasium_env(spec.id, spec.kwargs) for _ in range(num_envs)]
        self.seeds: list[int | None] = [seed + i for i in range(num_envs)]

    def _empty_observation(self) -> np.ndarray:
        space = self.envs[0].observation_space
        return np.zeros((len(self.envs), *space.shape), space.dtype)

    def _chosen(self, mask: np.ndarray | None) -> Sequence[int]:
        return range(len(self.envs)) if mask is None else np.flatnonzero(mask)

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        observation = self._empty_observation()
        for i in self._chosen(mask):
            observation[i], _ = self.envs[i].reset(seed=self.seeds[i])
            self.seeds[i] = None
        return observation

    def step(self, action: np.ndarray, mask: np.ndarray | None = None) -> Results:
        observation, reward = self._empty_observation(), np.zeros(len(self.envs))
        terminated, truncated = np.zeros((2, len(self.envs)), dtype=bool)
        action = _within(action, self.envs[0].action_space)
        for i in self._chosen(mask):
            observation[i], reward[i], terminated[i], truncated[i], _ = self.envs[i].step(action[i])
        return observation, reward, terminated, truncated

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _within(action: np.ndarray, space: Any) -> np.ndarray:
    """Actions in the precision of their space: a bound that is rounded to another lies outside as often as not."""
    if action.dtype == space.dtype or not np.issubdtype(action.dtype, np.floating):
        return action
    return action.astype(space.dtype).clip(space.low, space.high)


class ProcessSimulator:
    """Gymnasium environments in a process each."""

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode

        make = partial(gymnasium_env, spec.id, spec.kwargs)
        # Where there is a server to fork from it imports this once, for all: each import takes a second and 0.25 GB.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None
        multiprocessing.set_forkserver_preload([__name__])
        with _lost_ones_named():
            self.envs = AsyncVectorEnv([make] * num_envs, context=method, autoreset_mode=AutoresetMode.DISABLED)
        self.seed: int | None = seed

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        options = None if mask is None else {"reset_mask": mask}
        with _lost_ones_named():
            observation, _ = self.envs.reset(seed=self.seed, options=options)
        self.seed = None
        return observation

    def step(self, action: np.ndarray, mask: np.ndarray | None = None) -> Results:
        with _lost_ones_named():
            action = _within(action, self.envs.single_action_space)
            observation, reward, terminated, truncated = self.envs.step(action)[:4]
        # All processes step or none, so those not in the mask play on, unseen.
        if mask is not None and (unseen := (terminated | truncated) & ~mask).any():
            self.reset(unseen)
        return observation, reward, terminated, truncated

    def close(self) -> None:
        self.envs.close()


@contextlib.contextmanager
def _lost_ones_named() -> Iterator[None]:
    """What a broken pipe means."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            "a simulator's process was lost: it failed, as it says above, or was killed, perhaps for want of memory"
        ) from error


class EnvPoolSimulator:
    """``envpool``: the same physics in C++ threads (extra ``fast``); of its observations only ``entries`` are shown."""

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        seed: int,
        threads: int,
        kwargs: dict[str, Any],
        entries: np.ndarray | slice = slice(None),
    ) -> None:
        import envpool

        self.entries = entries
        self.envs = envpool.make(
            spec.id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **kwargs
        )
        _ = self.envs.observation_space  # made once, here, where what that warns of is filtered

    def _of_all(self, partial: np.ndarray, info: dict[str, np.ndarray]) -> np.ndarray:
        whole = np.zeros((len(self.envs), *partial.shape[1:]), partial.dtype)
        whole[info["env_id"]] = partial
        return whole

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return self.envs.reset()[0][:, self.entries]
        return self._of_all(*self.envs.reset(np.flatnonzero(mask).astype(np.int32)))[:, self.entries]

    def step(self, action: np.ndarray, mask: np.ndarray | None = None) -> Results:
        if mask is None:
            observation, *results = self.envs.step(action)[:4]
        else:
            *partial, info = self.envs.step(action[mask], np.flatnonzero(mask).astype(np.int32))
            observation, *results = (self._of_all(part, info) for part in partial)
        return observation[:, self.entries], *results

    def close(self) -> None:
        self.envs.close()


class VectorEnv(EnvBase):
    """A batch of environments behind one ``Simulator``; observations as the spec says, actions clipped to their space.

    Args:
        spec: the environment.
        num_envs: environments stepped together.
        make_simulator: seed → simulator; called again whenever the seed is set.
        seed: environment i starts from seed + i.
        limit: truncate episodes after so many steps, the first one of environment i after (i + 1)/N of them: environments in
            which nobody falls would otherwise all be in the same phase of an episode for ever. None: as the simulator ends them.
    """

    #: The present observation [N, *obs]; each step and reset makes a new tensor.
    observation: torch.Tensor

    def __init__(
        self,
        spec: EnvSpec,
        num_envs: int,
        make_simulator: Callable[[int], Simulator],
        seed: int,
        limit: int | None = None,
    ) -> None:
        super().__init__(device="cpu", batch_size=[num_envs])
        batch = (num_envs,)
        self.spec_, self.make_simulator, self.simulator = spec, make_simulator, None
        self.limit = limit
        observation = Unbounded((*batch, *spec.observation_shape), dtype=getattr(torch, spec.observation_dtype))
        self.observation_spec = Composite(observation=observation, shape=batch)
        if spec.action_type == "discrete":
            self.action_spec = Categorical(spec.actions, shape=batch, dtype=torch.int64)
        else:
            self.bounds = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
            low, high = (bound.expand(*batch, -1) for bound in self.bounds)
            self.action_spec = Bounded(low, high, shape=(*batch, spec.actions))
        self.reward_spec = Unbounded((*batch, 1))
        flag = Binary(1, shape=(*batch, 1), dtype=torch.bool)
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.close_simulator()
        self.simulator = self.make_simulator(seed if seed is not None else torch.seed() % 2**30)
        if self.limit is not None:
            num_envs = self.batch_size[0]
            self.elapsed = self.limit - np.arange(1, num_envs + 1) * self.limit // num_envs

    def close_simulator(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
            self.simulator = None

    def close(self, **kwargs: Any) -> None:
        super().close(**kwargs)
        self.close_simulator()

    # --- arrays, for who steps many times ----------------------------------------------------------------------------

    def advance(self, action: torch.Tensor, mask: np.ndarray | None = None) -> Results:
        """Step the environments in ``mask`` (None: all) by actions [N] or [N, d]; ``observation`` follows."""
        if self.spec_.action_type == "continuous":
            action = action.clamp(*self.bounds)
        observation, reward, terminated, truncated = self.simulator.step(action.numpy(), mask)
        observation = observation.astype(self.spec_.observation_dtype)
        self.observation = torch.from_numpy(observation)
        if self.limit is not None:
            self.elapsed += 1
            truncated = truncated | (self.elapsed >= self.limit)
            self.elapsed[terminated | truncated] = 0
        return observation, reward, terminated, truncated

    def restart(self, mask: np.ndarray | None) -> None:
        """Reset the environments in ``mask`` (None: all); ``observation`` follows."""
        observation = torch.from_numpy(self.simulator.reset(mask).astype(self.spec_.observation_dtype))
        if mask is not None:
            chosen = torch.from_numpy(mask).view(-1, *[1] * (observation.dim() - 1))
            observation = torch.where(chosen, observation, self.observation)
        self.observation = observation

    # --- TorchRL -----------------------------------------------------------------------------------------------------

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        mask = tensordict.get("_reset", None) if tensordict is not None else None
        self.restart(None if mask is None else mask.squeeze(-1).numpy())
        never = torch.zeros(self.batch_size, dtype=torch.bool)
        return TensorDict({"observation": self.observation, **flags(never, never)}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        mask = tensordict.get("_step", None)
        mask = None if mask is None else mask.view(-1).numpy()
        observation, *results = self.advance(tensordict["action"], mask)
        if mask is not None:
            # Who was not stepped earned nothing and has not finished.
            results = [part * mask for part in results]
        return following(observation, *results)


def flags(terminated: torch.Tensor, truncated: torch.Tensor) -> dict[str, torch.Tensor]:
    """TorchRL's three flags [..., 1] of [...]."""
    ends = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    return {name: flag.unsqueeze(-1) for name, flag in ends.items()}


def following(*results: np.ndarray) -> TensorDict:
    """TorchRL's ``next`` of arrays [*batch, …]: observation, reward, terminated, truncated."""
    observation, reward, terminated, truncated = (torch.from_numpy(np.ascontiguousarray(part)) for part in results)
    return TensorDict(
        {"observation": observation, "reward": reward.float().unsqueeze(-1), **flags(terminated, truncated)},
        reward.shape,
    )
