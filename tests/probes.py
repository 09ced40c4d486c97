"""Tiny environments that are solved only if one thing in the learning is right."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Sequence


class Context(gymnasium.Env):
    """One step; +1 for action 1 where the observation is positive and for action 0 where it is negative, else −1.

    Solved only if the sign of the advantage is right.
    """

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = 1 if self.np_random.random() < 0.5 else -1
        return np.array([self.sign], dtype=np.float32), {}

    def step(self, action):
        right = (action == 1) == (self.sign > 0)
        return np.array([self.sign], dtype=np.float32), 1.0 if right else -1.0, True, False, {}


class NowOrLater(gymnasium.Env):
    """Action 0 earns 1 and ends; action 1 earns nothing, and 1.5 one step later. The better one depends on γ."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.waited = False
        return np.array([-1], dtype=np.float32), {}

    def step(self, action):
        observation = np.array([1], dtype=np.float32)
        if self.waited:
            return observation, 1.5, True, False, {}
        self.waited = action == 1
        return observation, 0.0 if self.waited else 1.0, not self.waited, False, {}


class EndOrTimeLimit(gymnasium.Env):
    """Action 0 earns 1 and ends in a terminal state; action 1 earns 0.5 and meets a time limit.

    Behind a time limit the world goes on, so action 1 is worth 0.5 / (1 − γ), more than 1. A time limit taken for a terminal
    state, or a terminal state taken for a time limit, makes action 0 look better.
    """

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 0.5 if action == 1 else 1.0, action == 0, action == 1, {}


class NotANumber(gymnasium.Env):
    """Returns a reward that is NaN."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), float("nan"), False, False, {}


class NotAnObservation(NotANumber):
    """Returns an observation that is NaN."""

    def step(self, action):
        return np.full(1, np.nan, dtype=np.float32), 0.0, False, False, {}


class Breaks(gymnasium.Env):
    """Raises in its 100th step."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 100:
            raise RuntimeError("the simulator broke")
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}


class AnyLength(Context):
    """Observes as many numbers as it likes: no network is fed those."""

    observation_space = Sequence(Box(-1, 1, (1,)))


for probe in (Context, NowOrLater, EndOrTimeLimit, NotANumber, NotAnObservation, Breaks, AnyLength):
    gymnasium.register(f"Probe{probe.__name__}-v0", entry_point=probe, order_enforce=False)
