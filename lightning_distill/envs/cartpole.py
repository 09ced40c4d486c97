"""N-dimensional cart-pole: N independent cart-poles that share one clock, one of them pushed at each step.

The state is [N, 4] = (x, ẋ, θ, θ̇) per dimension, observed flat in that order. There are 2N actions: action a pushes
dimension a // 2 with +10 N if a is odd and with −10 N if it is even; every other dimension feels no force. Start: every
entry uniform in ±0.05. Terminates when any |x| > 2.4 m or any |θ| > 12°, truncated after 500 steps, reward 1 a step.
N = 1 is Gymnasium's ``CartPole-v1`` (Barto, Sutton & Anderson 1983); N > 1 follows Wilhelm & Ventura 2025.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from . import registration as registration

GRAVITY, CART_MASS, POLE_MASS, HALF_LENGTH, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MAX_POSITION, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360
START, MAX_STEPS = 0.05, 500
DIMENSIONS = {"CartPole-v1": 1} | {f"CartPole{n}D-v0": n for n in range(1, 6)}


def advance(x: Any, x_dot: Any, theta: Any, theta_dot: Any, force: Any, xp: ModuleType) -> tuple[Any, Any, Any, Any]:
    """One explicit Euler step of cart-poles; ``xp`` is torch or numpy, whichever the arrays belong to."""
    cos, sin = xp.cos(theta), xp.sin(theta)
    total_mass, pole_moment = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
    push = (force + pole_moment * theta_dot**2 * sin) / total_mass
    theta_acc = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos**2 / total_mass))
    x_acc = push - pole_moment * theta_acc * cos / total_mass
    return x + TAU * x_dot, x_dot + TAU * x_acc, theta + TAU * theta_dot, theta_dot + TAU * theta_acc


class CartPole(EnvBase):
    """A batch of N-dimensional cart-poles in torch: millions of steps a second on one core.

    Args:
        dimensions: N, the number of cart-poles in one environment.
        num_envs: environments stepped together (the batch size).
        seed: seed of the start states.
        device: where states live and are advanced.
        dtype: of states and observations.
    """

    def __init__(
        self,
        dimensions: int = 1,
        num_envs: int = 1,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device=device, batch_size=[num_envs])
        batch = (num_envs,)
        self.dimensions, self.dtype_ = dimensions, dtype
        self.observation_spec = Composite(
            observation=Unbounded((*batch, 4 * dimensions), dtype=dtype, device=device),
            shape=batch,
            device=device,
        )
        self.action_spec = Categorical(2 * dimensions, shape=batch, dtype=torch.int64, device=device)
        self.reward_spec = Unbounded((*batch, 1), dtype=torch.float32, device=device)
        flag = Binary(1, shape=(*batch, 1), dtype=torch.bool, device=device)
        self.full_done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=batch, device=device
        )
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.rng = torch.Generator(device=self.device)
        if seed is None:
            self.rng.seed()
        else:
            self.rng.manual_seed(seed)

    def _start(self) -> torch.Tensor:
        shape = (*self.batch_size, 4 * self.dimensions)
        return (torch.rand(shape, generator=self.rng, device=self.device, dtype=self.dtype_) * 2 - 1) * START

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        start = self._start()
        steps = torch.zeros((*self.batch_size, 1), dtype=torch.int64, device=self.device)
        mask = tensordict.get("_reset", None) if tensordict is not None else None
        if mask is not None:
            start, steps = torch.where(mask, start, self.state), torch.where(mask, steps, self.steps)
        self.state, self.steps = start, steps
        flag = torch.zeros((*self.batch_size, 1), dtype=torch.bool, device=self.device)
        return TensorDict(
            {"observation": start, "done": flag, "terminated": flag, "truncated": flag},
            batch_size=self.batch_size,
            device=self.device,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state = self.state.unflatten(-1, (self.dimensions, 4))
        action = tensordict["action"].unsqueeze(-1)
        force = torch.zeros(state.shape[:-1], dtype=state.dtype, device=self.device)
        force.scatter_(-1, action // 2, (action % 2).to(state.dtype) * (2 * FORCE) - FORCE)
        state = torch.stack(advance(*state.unbind(-1), force, torch), dim=-1)
        out = (state[..., 0].abs() > MAX_POSITION) | (state[..., 2].abs() > MAX_ANGLE)
        terminated = out.any(-1, keepdim=True)
        self.state, self.steps = state.flatten(-2), self.steps + 1
        truncated = self.steps >= MAX_STEPS
        return TensorDict(
            {
                "observation": self.state,
                "reward": torch.ones((*self.batch_size, 1), device=self.device),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
            device=self.device,
        )


class GymnasiumCartPole(gymnasium.Env):
    """The same environment for everybody else: ``gymnasium.make("CartPole3D-v0")``, one at a time, float64 inside.

    ``render_mode="rgb_array"`` draws the cart-poles under one another, with the last push as an arrow.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, dimensions: int = 1, render_mode: str | None = None) -> None:
        self.dimensions, self.render_mode = dimensions, render_mode
        high = np.tile(np.array([2 * MAX_POSITION, np.inf, 2 * MAX_ANGLE, np.inf], dtype=np.float32), dimensions)
        self.observation_space = gymnasium.spaces.Box(-high, high, dtype=np.float32)
        self.action_space = gymnasium.spaces.Discrete(2 * dimensions)
        self.state, self.force = np.zeros((dimensions, 4)), np.zeros(dimensions)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-START, START, size=(self.dimensions, 4))
        self.force = np.zeros(self.dimensions)
        return self.state.astype(np.float32).ravel(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"action={action!r}: allowed are 0 … {2 * self.dimensions - 1}")
        self.force = np.zeros(self.dimensions)
        self.force[action // 2] = FORCE if action % 2 else -FORCE
        self.state = np.stack(advance(*self.state.T, self.force, np), axis=-1)
        terminated = bool(
            np.any(np.abs(self.state[:, 0]) > MAX_POSITION) or np.any(np.abs(self.state[:, 2]) > MAX_ANGLE)
        )
        return self.state.astype(np.float32).ravel(), 1.0, terminated, False, {}

    def render(self) -> np.ndarray | None:
        """The present state as a frame [176 N, 608, 3], uint8; None unless ``render_mode`` is ``rgb_array``."""
        from .rendering import draw_cart_poles

        return draw_cart_poles(self.state, self.force) if self.render_mode == "rgb_array" else None
