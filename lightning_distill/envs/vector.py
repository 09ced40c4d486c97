"""Any Gymnasium environment as one batched TorchRL environment, at close to the simulator's own speed.

TorchRL's own wrappers and batched environments cost more than a MuJoCo step; a thin ``EnvBase`` over a vectorised
simulator costs a few microseconds. Finished environments are reset explicitly and separately from the step, so that
the terminal observation is kept as ``next.observation`` and no bogus transition enters the data.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from .spec import EnvSpec


class Simulator(Protocol):
    """What a vectorised simulator offers; arrays have the number of environments as first dimension."""

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        """Reset the environments in ``mask`` (None: all); observations of all, of which only the reset ones count."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Observation, reward, terminated, truncated."""

    def close(self) -> None: ...


class GymnasiumSimulator:
    """``gymnasium.vector``: works everywhere, one environment after the other (or one process each, ``processes``)."""

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int, processes: bool = False) -> None:
        import gymnasium
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        vector = AsyncVectorEnv if processes else SyncVectorEnv
        self.envs = vector(
            [lambda: gymnasium.make(spec.id, disable_env_checker=True, **spec.kwargs)] * num_envs,
            autoreset_mode=AutoresetMode.DISABLED,
            copy=False,
        )
        self.seed: int | None = seed

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        options = None if mask is None else {"reset_mask": mask}
        observation, _ = self.envs.reset(seed=self.seed, options=options)
        self.seed = None
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.envs.step(action)[:4]

    def close(self) -> None:
        self.envs.close()


class EnvPoolSimulator:
    """``envpool``: the same physics in C++ threads (extra ``fast``)."""

    def __init__(self, spec: EnvSpec, num_envs: int, seed: int, threads: int) -> None:
        import envpool

        self.envs = envpool.make(
            spec.id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=seed, **spec.kwargs
        )

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return self.envs.reset()[0]
        partial, info = self.envs.reset(np.flatnonzero(mask).astype(np.int32))
        observation = np.zeros((len(mask), *partial.shape[1:]), partial.dtype)
        observation[info["env_id"]] = partial
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.envs.step(action)[:4]

    def close(self) -> None:
        self.envs.close()


class VectorEnv(EnvBase):
    """A batch of environments behind one ``Simulator``; observations as the spec says, actions clipped to their space.

    Args:
        spec: the environment.
        num_envs: environments stepped together.
        make_simulator: seed → simulator; called again whenever the seed is set.
        seed: environment i starts from seed + i.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, make_simulator: Any, seed: int) -> None:
        super().__init__(device="cpu", batch_size=[num_envs])
        batch = (num_envs,)
        self.spec_, self.make_simulator, self.simulator = spec, make_simulator, None
        self.observation_dtype = getattr(torch, spec.observation_dtype)
        observation = Unbounded((*batch, *spec.observation_shape), dtype=self.observation_dtype)
        self.observation_spec = Composite(observation=observation, shape=batch)
        if spec.action_type == "discrete":
            self.action_spec = Categorical(spec.actions, shape=batch, dtype=torch.int64)
        else:
            self.low = np.asarray(spec.action_low, dtype=np.float32)
            self.high = np.asarray(spec.action_high, dtype=np.float32)
            low, high = (torch.from_numpy(bound).expand(*batch, -1) for bound in (self.low, self.high))
            self.action_spec = Bounded(low, high, shape=(*batch, spec.actions))
        self.reward_spec = Unbounded((*batch, 1))
        flag = Binary(1, shape=(*batch, 1), dtype=torch.bool)
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.close_simulator()
        self.simulator = self.make_simulator(seed if seed is not None else torch.seed() % 2**30)

    def close_simulator(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
            self.simulator = None

    def close(self, **kwargs: Any) -> None:
        super().close(**kwargs)
        self.close_simulator()

    def _flags(self, terminated: np.ndarray, truncated: np.ndarray) -> dict[str, torch.Tensor]:
        terminated, truncated = (torch.tensor(flag).unsqueeze(-1) for flag in (terminated, truncated))
        return {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        mask = tensordict.get("_reset", None) if tensordict is not None else None
        observation = self.simulator.reset(None if mask is None else mask.squeeze(-1).numpy())
        observation = torch.tensor(observation, dtype=self.observation_dtype)
        if mask is not None:
            mask = mask.view(-1, *[1] * (observation.dim() - 1))
            observation = torch.where(mask, observation, self.observation)
        self.observation = observation
        never = np.zeros(self.batch_size, dtype=bool)
        return TensorDict({"observation": observation, **self._flags(never, never)}, batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"].numpy()
        if self.spec_.action_type == "continuous":
            action = np.clip(action, self.low, self.high)
        observation, reward, terminated, truncated = self.simulator.step(action)
        self.observation = torch.tensor(observation, dtype=self.observation_dtype)
        return TensorDict(
            {
                "observation": self.observation,
                "reward": torch.tensor(reward, dtype=torch.float32).unsqueeze(-1),
                **self._flags(terminated, truncated),
            },
            batch_size=self.batch_size,
        )
