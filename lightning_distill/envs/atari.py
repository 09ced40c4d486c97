"""Atari games by ale-py's own vector environment: C++ threads, frames preprocessed as they are made (Mnih et al. 2015).

Four steps of the emulator with one action, the maximum of the last two frames, grey, 84×84, the last four stacked; up to
30 no-ops at the start, and FIRE where a game waits for it. Training alone clips rewards to −1, 0, 1 (unless
``reward_clipping`` is false) and takes a lost life for the end of an episode; the game then goes on where it is. Evaluation
counts the raw score of whole games.

Actions are not sticky unless ``repeat_action_probability`` says so, although Gymnasium's ids of the same name are (0.25).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from .spec import ConfigError, EnvSpec

#: What an environment can be made with, and the values where nothing is said; 108 000 frames are 27 000 steps.
OPTIONS: dict[str, Any] = {
    "repeat_action_probability": 0.0,
    "reward_clipping": True,
    "full_action_space": False,
    "max_num_frames_per_episode": 108_000,
}


def register_games() -> None:
    """Atari's environments, which Gymnasium knows once ale-py has been imported."""
    import ale_py

    gymnasium.register_envs(ale_py)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each game made


def rom_of(env: str) -> str | None:
    """The game's name in the emulator (``ms_pacman``) if ``env`` is an Atari id that shows frames, else None."""
    if not env.startswith("ALE/"):
        return None
    register_games()
    found = gymnasium.registry.get(env)
    return found.kwargs["game"] if found is not None and found.kwargs.get("obs_type", "rgb") == "rgb" else None


def atari_spec(env: str, kwargs: dict[str, Any]) -> EnvSpec:
    """Shapes and kinds of an Atari game; all options are in its ``kwargs``, so that a dataset's file says them.

    Raises:
        ConfigError: an option that is not in ``OPTIONS``, or a value it cannot have.
    """
    unknown = sorted(set(kwargs) - set(OPTIONS))
    if unknown:
        raise ConfigError(f"data.env_kwargs: {', '.join(unknown)} for {env}; allowed are {', '.join(OPTIONS)}")
    kwargs = OPTIONS | kwargs
    sticky = kwargs["repeat_action_probability"]
    if not isinstance(sticky, int | float) or not 0 <= sticky < 1:
        raise ConfigError(f"data.env_kwargs.repeat_action_probability={sticky!r}: allowed are probabilities in [0, 1)")
    frames = kwargs["max_num_frames_per_episode"]
    if not isinstance(frames, int) or frames < 4:
        raise ConfigError(f"data.env_kwargs.max_num_frames_per_episode={frames!r}: allowed are integers ≥ 4")
    for name in ("reward_clipping", "full_action_space"):
        if not isinstance(kwargs[name], bool):
            raise ConfigError(f"data.env_kwargs.{name}={kwargs[name]!r}: allowed are true and false")
    simulator = AtariSimulator(EnvSpec(env, (), "discrete", 0, kwargs=kwargs), 1, 0, 1)
    space = simulator.envs.single_observation_space
    spec = EnvSpec(
        env,
        space.shape,
        "discrete",
        int(simulator.envs.single_action_space.n),
        kwargs=kwargs,
        observation_dtype=space.dtype.name,
    )
    simulator.close()
    return spec


class AtariSimulator:
    """``ale_py.vector_env.AtariVectorEnv``; observations uint8 [num_envs, 4, 84, 84].

    Args:
        spec: of :func:`atari_spec`.
        num_envs: games played together.
        seed: game i starts from seed + i.
        threads: of the emulator.
        training: clip rewards as the spec says, and end an episode with a lost life.
        layout: other arguments of the vector environment, for what is drawn rather than played.
    """

    def __init__(
        self, spec: EnvSpec, num_envs: int, seed: int, threads: int, training: bool = False, **layout: Any
    ) -> None:
        from ale_py.vector_env import AtariVectorEnv

        options = OPTIONS | spec.kwargs
        options["reward_clipping"] = training and options["reward_clipping"]
        self.envs = AtariVectorEnv(rom_of(spec.id), num_envs, num_threads=min(threads, num_envs), **options, **layout)
        self.seed, self.training = seed, training

    def reset(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            self.observation, info = self.envs.reset(seed=self.seed)
            self.lives = info["lives"]
            self.life_lost = np.zeros(len(self.lives), dtype=bool)
            return self.observation
        # After a lost life the game goes on from what is seen now.
        over, self.life_lost = mask & ~self.life_lost, self.life_lost & ~mask
        if over.any():
            self.observation, info = self.envs.reset(options={"reset_mask": over})
            self.lives = info["lives"]
        return self.observation

    def step(
        self, action: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        self.observation, reward, terminated, truncated, info = self.envs.step(action)
        if self.training:
            self.life_lost = (info["lives"] < self.lives) & ~terminated & ~truncated
            terminated = terminated | self.life_lost
        self.lives = info["lives"]
        # All games step or none, so those not in the mask play on, unseen.
        if mask is not None and (unseen := (terminated | truncated) & ~mask).any():
            self.reset(unseen)
        return self.observation, reward, terminated, truncated

    def close(self) -> None:
        self.envs.close()


class RenderedAtari(gymnasium.Env):
    """One game twice, in lockstep: as learners see it, and in the colours of the screen.

    The emulator is deterministic in its seed, so both show the same moment.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    render_mode = "rgb_array"
    #: Of the emulator, in pixels; drawn at twice that size.
    HEIGHT, WIDTH = 210, 160

    def __init__(self, spec: EnvSpec) -> None:
        screen = {"img_height": self.HEIGHT, "img_width": self.WIDTH, "grayscale": False, "stack_num": 1}
        self.played = AtariSimulator(spec, 1, 0, 1)
        self.shown = AtariSimulator(spec, 1, 0, 1, **screen)
        self.observation_space = self.played.envs.single_observation_space
        self.action_space = self.played.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        for simulator in (self.played, self.shown):
            simulator.seed = int(self.np_random.integers(2**30)) if seed is None else seed
            simulator.reset(None)
        return self.played.observation[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        actions = np.array([action])
        self.shown.step(actions)
        observation, reward, terminated, truncated = self.played.step(actions)
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> np.ndarray:
        """uint8 [420, 320, 3]."""
        return self.shown.observation[0, 0].repeat(2, 0).repeat(2, 1)

    def close(self) -> None:
        self.played.close()
        self.shown.close()
