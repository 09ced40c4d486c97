import importlib.util
import math
import sys

import gymnasium
import numpy as np
import probes  # noqa: F401  registers the probe environments
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from lightning_distill import CollectorDataModule
from lightning_distill.envs import ConfigError, env_spec, make_env, stream_seed
from lightning_distill.envs.vector import GymnasiumSimulator


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Acrobot-v1"])
def test_specs_are_what_the_environment_does(env, backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    check_env_specs(make_env(env_spec(env), 3, seed=0, backend=backend))


@pytest.mark.parametrize("backend", ["auto", "gymnasium", "processes"])
@pytest.mark.parametrize(("env", "entries"), [("Blackjack-v1", 45), ("FrozenLake-v1", 16)])  # a tuple, a number
def test_observations_of_other_spaces_are_flattened(env, entries, backend):
    spec = env_spec(env)
    assert spec.observation_shape == (entries,)
    made = make_env(spec, 2, seed=3, backend=backend)
    one = gymnasium.make(env)
    first, _ = one.reset(seed=4)
    seen = made.reset()["observation"]
    assert seen[1].tolist() == gymnasium.spaces.flatten(one.observation_space, first).tolist()
    made.close()


def random_play(env):
    """Of 60 steps: who finished [N], the observations [N, *obs] they led to, and those that the next ones begin from."""
    state = env.reset()
    for _ in range(60):
        state["action"] = env.action_spec.rand()
        step, state = env.step_and_maybe_reset(state)
        done = step["next", "done"].squeeze(-1)
        last, following = step["next", "observation"], state["observation"]
        assert torch.equal(following[~done], last[~done])
        yield done, last, following


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_terminal_observation_is_kept_and_only_finished_environments_restart(backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    finished = 0
    for done, last, following in random_play(make_env(env_spec("Hopper-v5"), 16, seed=0, backend=backend)):
        # A hopper starts upright at a height of 1.25 and ends fallen or tilted.
        assert (following[done][:, 0] - 1.25).abs().lt(0.01).all()
        assert not torch.isclose(last[done], following[done], atol=1e-3).all(1).any()
        finished += int(done.sum())
    assert finished > 5


@pytest.mark.parametrize("backend", ["gymnasium", "envpool", "processes"])
def test_training_is_in_all_phases_of_an_episode_at_once(backend):
    """Pendulum's episodes are 200 steps long: first ones are cut so that ends never coincide again."""
    if backend == "envpool":
        pytest.importorskip("envpool")
    env = make_env(env_spec("Pendulum-v1"), 4, seed=0, backend=backend, training=True)
    state, ends = env.reset(), []
    for step in range(1, 501):
        state["action"] = env.action_spec.rand()
        result, state = env.step_and_maybe_reset(state)
        done, truncated = (result["next", key].squeeze(-1) for key in ("done", "truncated"))
        assert torch.equal(done, truncated), "the value of what would have come is kept"
        ends += [(step, i) for i in done.nonzero().flatten().tolist()]
        assert not torch.isclose(result["next", "observation"][done], state["observation"][done]).all(1).any()
    first = [(50, 0), (100, 1), (150, 2), (200, 3)]
    assert ends == first + [(step + 200, i) for step, i in first] + [(450, 0), (500, 1)]
    env.close()


def test_a_longer_limit_than_the_environments_own_leaves_first_episodes_of_all_lengths():
    env = make_env(env_spec("Pendulum-v1"), 4, seed=0, training=True, max_episode_steps=1000)
    assert env.limit == 200
    env.close()


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_training_episodes_are_as_short_as_asked_for(env):
    env = make_env(env_spec(env), 2, seed=0, training=True, max_episode_steps=7)
    state, since = env.reset(), torch.tensor([4, 0]) if env.__class__.__name__ == "VectorEnv" else torch.zeros(2)
    for _ in range(60):
        state["action"] = env.action_spec.rand()
        result, state = env.step_and_maybe_reset(state)
        since = since + 1
        truncated, done = (result["next", key].squeeze(-1) for key in ("truncated", "done"))
        assert torch.equal(truncated, since == 7)
        assert torch.equal(done, truncated), "no pole falls within 7 steps"
        since = since.masked_fill(done, 0)
    env.close()


def test_who_ends_by_itself_is_not_cut():
    env = make_env(env_spec("Hopper-v5"), 2, seed=0, backend="gymnasium", training=True)
    state = env.reset()
    ended = torch.zeros(2, dtype=torch.bool)
    for _ in range(1000):
        state["action"] = env.action_spec.rand()
        result, state = env.step_and_maybe_reset(state)
        ended |= result["next", "terminated"].squeeze(-1)
        assert not result["next", "truncated"].any()
    assert ended.all()


WITHOUT_FORCES = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}


@pytest.mark.parametrize(
    ("env", "kwargs", "positions", "absolute", "within"),
    [
        *[(f"HalfCheetah-v{version}", {}, 8, 1, 1e-4) for version in (4, 5)],
        *[(f"Hopper-v{version}", {}, 5, 1, 1e-4) for version in (4, 5)],
        *[(f"InvertedPendulum-v{version}", {}, 2, 0, 1e-4) for version in (4, 5)],
        *[(f"Swimmer-v{version}", {}, 3, 2, 1e-4) for version in (4, 5)],
        *[(f"Walker2d-v{version}", {}, 8, 1, 1e-4) for version in (4, 5)],
        ("Ant-v4", {}, 13, 2, 1e-3),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}, 13, 2, 1e-3),
        ("Humanoid-v5", WITHOUT_FORCES, 22, 2, 1e-4),
        ("HumanoidStandup-v5", WITHOUT_FORCES, 22, 2, 1e-4),
        ("HalfCheetah-v5", {"ctrl_cost_weight": 0, "forward_reward_weight": 2}, 8, 1, 1e-4),
        ("Hopper-v5", {"healthy_reward": 0.1, "ctrl_cost_weight": 0.5}, 5, 1, 1e-4),
        ("Walker2d-v5", {"healthy_reward": 0.1, "ctrl_cost_weight": 0.5, "forward_reward_weight": 2}, 8, 1, 1e-4),
        (
            "Ant-v5",
            {"include_cfrc_ext_in_observation": False, "healthy_reward": 3, "contact_cost_weight": 1},
            13,
            2,
            1e-3,
        ),
        ("Humanoid-v5", WITHOUT_FORCES | {"healthy_reward": 1.5, "ctrl_cost_weight": 0}, 22, 2, 1e-4),
    ],
)
def test_faster_backend_has_the_same_physics(env, kwargs, positions, absolute, within):
    """From the same state, the same actions: the simulators agree as far as their chaos lets them.

    An observation begins with positions, but for absolute ones, and velocities.
    """
    pytest.importorskip("envpool")
    import gymnasium

    spec = env_spec(env, kwargs)
    fast = make_env(spec, 1, seed=3, backend="envpool")
    start = fast.reset()["observation"][0].double().numpy()
    slow = gymnasium.make(env, **kwargs).unwrapped
    slow.reset()
    slow.set_state(np.concatenate([np.zeros(absolute), start[:positions]]), start[positions:])
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = rng.uniform(spec.action_low, spec.action_high)[None]
        observation, reward, *_ = fast.simulator.step(action)
        expected, expected_reward, *_ = slow.step(action[0])
        np.testing.assert_allclose(observation[0], expected, atol=within)
        np.testing.assert_allclose(reward[0], expected_reward, atol=1e-4)


@pytest.mark.parametrize(
    ("env", "kwargs"), [("HalfCheetah-v5", {}), ("Ant-v5", {"include_cfrc_ext_in_observation": False})]
)
def test_without_the_faster_backend_gymnasium_simulates(env, kwargs, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "envpool" else find(name, *rest)
    )
    assert isinstance(make_env(env_spec(env, kwargs), 2, seed=0).simulator, GymnasiumSimulator)
    with pytest.raises(ConfigError, match=r"data.backend=.envpool. cannot make"):
        make_env(env_spec(env, kwargs), 2, seed=0, backend="envpool")


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_arguments_of_how_episodes_begin_and_end(backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    kwargs = {"terminate_when_unhealthy": False, "reset_noise_scale": 0}
    env = make_env(env_spec("Hopper-v5", kwargs), 4, seed=0, backend=backend)
    assert torch.equal(*env.reset()["observation"][:2])
    assert not any(done.any() for done, *_ in random_play(env))  # a hopper falls within 60 steps, as is seen above


@pytest.mark.parametrize("env", ["Humanoid-v4", "HumanoidStandup-v4"])
def test_an_environment_that_the_faster_backend_makes_otherwise_is_gymnasiums(env):
    assert isinstance(make_env(env_spec(env), 2, seed=0).simulator, GymnasiumSimulator)


@pytest.mark.parametrize(
    "kwargs", [{"healthy_z_range": [0.3, 0.85]}, {"use_contact_forces": True}, {"xml_file": "ant.xml"}]
)
def test_arguments_that_the_faster_backend_lacks_are_gymnasiums(kwargs):
    name = "Ant-v4" if "use_contact_forces" in kwargs else "Ant-v5"
    assert isinstance(make_env(env_spec(name, kwargs), 2, seed=0).simulator, GymnasiumSimulator)


def test_finished_environments_restart_in_a_smaller_observation():
    pytest.importorskip("envpool")
    finished = 0
    env = make_env(env_spec("Humanoid-v5", WITHOUT_FORCES), 8, seed=0, backend="envpool")
    for done, last, following in random_play(env):
        assert following.shape == (8, 45)
        # A humanoid starts upright, at a height of 1.4, and falls below 1.
        assert (following[done][:, 0] - 1.4).abs().lt(0.02).all()
        assert last[done][:, 0].lt(1.0).all()
        finished += int(done.sum())
    assert finished > 5


def test_actions_are_clipped_to_the_action_space():
    env = make_env(env_spec("Pendulum-v1"), 2, seed=0, backend="gymnasium")
    states = []
    for size in (2.0, 100.0):
        env.set_seed(0)
        state = env.reset()
        states.append(env.step(state.set("action", torch.full((2, 1), size)))["next", "observation"])
    assert torch.equal(*states)


def test_any_registered_environment_is_made_from_its_id():
    discrete, continuous = env_spec("Acrobot-v1"), env_spec("Ant-v5")
    assert (discrete.observation_shape, discrete.action_type, discrete.actions) == ((6,), "discrete", 3)
    assert (continuous.observation_shape, continuous.action_type, continuous.actions) == ((105,), "continuous", 8)
    assert continuous.action_low == (-1.0,) * 8
    smaller = env_spec("Ant-v5", {"include_cfrc_ext_in_observation": False})
    assert smaller.observation_shape == (27,)
    assert make_env(smaller, 2, seed=0).reset()["observation"].shape == (2, 27)


def test_a_backend_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"backend='gymnasum': allowed are auto, gymnasium, processes, envpool"):
        make_env(env_spec("Acrobot-v1"), 2, seed=0, backend="gymnasum")


def test_torchrl_environment_by_class_path():
    spec = env_spec("torchrl.envs.GymEnv", {"env_name": "Pendulum-v1"})
    assert (spec.observation_shape, spec.action_type, spec.actions) == ((3,), "continuous", 1)
    assert (spec.action_low, spec.action_high) == ((-2.0,), (2.0,))
    env = make_env(spec, 3, seed=0)
    step, following = env.step_and_maybe_reset(env.reset().set("action", env.action_spec.rand()))
    assert step["next", "reward"].shape == (3, 1)
    assert following["observation"].shape == (3, 3)


@pytest.mark.parametrize(
    ("env", "kwargs", "here", "actions"),
    [
        ("CartPole2D-v0", {}, "gymnasium", torch.tensor([[0, 0], [1, 0], [2, 0]])),
        (
            "torchrl.envs.GymEnv",
            {"env_name": "Pendulum-v1"},
            "auto",
            torch.tensor([[[0.0]] * 2, [[0.1]] * 2, [[0.2]] * 2]),
        ),
    ],
)
def test_processes_know_the_projects_own_environments_and_torchrls(env, kwargs, here, actions):
    """They are new interpreters: what was registered or imported here is not there."""
    spec, seen = env_spec(env, kwargs), {}
    for backend in (here, "processes"):
        made = make_env(spec, 2, seed=3, backend=backend)
        state, seen[backend] = made.reset(), []
        for action in actions:
            _, state = made.step_and_maybe_reset(state.set("action", action))
            seen[backend].append(state["observation"].clone())
        made.close()
    one, other = seen.values()
    torch.testing.assert_close(torch.stack(one), torch.stack(other))


def test_a_backend_that_a_torchrl_environment_does_not_have_is_refused():
    with pytest.raises(
        ConfigError, match=r"data\.backend='envpool' for torchrl.envs.GymEnv.*: allowed are auto, processes"
    ):
        make_env(env_spec("torchrl.envs.GymEnv", {"env_name": "Pendulum-v1"}), 2, seed=0, backend="envpool")


class Echo(gymnasium.Env):
    """Earns its action, and never ends."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, frameskip=1):
        """TorchRL gives every environment this argument."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), float(action[0]), False, False, {}


gymnasium.register("Echo-v0", Echo)


@pytest.mark.parametrize(("env", "kwargs"), [("Echo-v0", {}), ("torchrl.envs.GymEnv", {"env_name": "Echo-v0"})])
def test_actions_are_clipped_where_they_act_and_kept_as_they_were_chosen(env, kwargs):
    env = make_env(env_spec(env, kwargs), 2, seed=0, max_episode_steps=3)
    chosen = torch.tensor([[2.0], [-0.5]])
    step, _ = env.step_and_maybe_reset(env.reset().set("action", chosen))
    assert step["next", "reward"].flatten().tolist() == [1.0, -0.5]
    assert torch.equal(step["action"], chosen)


@pytest.mark.parametrize(
    ("env", "kwargs", "message"),
    [
        ("Foo-v1", {}, "Foo-v1"),
        ("HalfCheeta-v5", {}, "HalfCheetah"),
        ("ProbeAnyLength-v0", {}, "observation space Sequence"),
        ("HalfCheetah-v5", {"wings": 2}, "wings"),
        ("Ant-v4", {"include_cfrc_ext_in_observation": False}, "allowed: .* or null"),
        ("Pusher-v4", {}, "did you mean (?!Pusher-v4).*Pusher-v5"),
        ("Ant-v5", {"xml_file": "nope.xml"}, r"data\.env_kwargs=.*nope\.xml.*OSError"),
        ("Ant-v5", {"frame_skip": 0}, r"data\.env_kwargs=.*ZeroDivisionError"),
        ("FrozenLake-v1", {"map_name": "9x9"}, r"data\.env_kwargs=.*9x9"),
        ("torchrl.envs.PendulumEnv", {}, "observation"),
        ("lightning_distill.envs.cartpole.CartPole", {"num_envs": 4}, r"batch size \[4\]"),
    ],
)
def test_what_cannot_be_learned_from_is_named(env, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        env_spec(env, kwargs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import what_is_not_installed", "my_own cannot be imported.*what_is_not_installed"),
        ("def broken(:", "my_own cannot be imported.*SyntaxError"),
        ("1 / 0", "my_own cannot be imported.*ZeroDivisionError"),
        ("class Other: ...", r"my_own has no TorchRL environment of the name MyEnv"),
        ("class MyEnv: ...", r"my_own has no TorchRL environment of the name MyEnv"),
    ],
)
def test_why_an_own_module_cannot_be_imported_is_said(source, message, tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own", raising=False)
    with pytest.raises(ConfigError, match=message):
        env_spec("my_own.MyEnv")


ACTION_SPACES = {
    "two": gymnasium.spaces.MultiDiscrete([2, 3]),
    "integers": gymnasium.spaces.Box(-3, 3, (2,), np.int64),
    # −0.1 is rounded down where it is taken for a float32.
    "double": gymnasium.spaces.Box(-0.1, 0.1, (2,), np.float64),
}


class Strange(gymnasium.Env):
    """An environment that is not as Gymnasium has it, in one of several ways."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Discrete(2)

    def __init__(self, way: str = "") -> None:
        self.way = way
        if way in ACTION_SPACES:
            self.action_space = ACTION_SPACES[way]

    def reset(self, *, seed=None, options=None):
        shape = {"smaller": (1,), "larger": (5,)}.get(self.way, (3,))
        observation = np.zeros(shape, np.float32)
        return observation if self.way == "old reset" else (observation, {})

    def step(self, action):
        if self.way == "breaks":
            raise KeyError("wheels")
        assert self.action_space.contains(action)
        results = np.zeros(3, np.float32), 1.0, False, False, {}
        return results[:4] if self.way == "old step" else results


@pytest.fixture
def strange():
    gymnasium.register("Strange-v0", Strange)
    yield
    del gymnasium.registry["Strange-v0"]


@pytest.mark.usefixtures("strange")
@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("smaller", r"shape \(1,\); allowed is that of its observation_space, \(3,\)"),
        ("larger", r"shape \(5,\); allowed is that of its observation_space, \(3,\)"),
        ("old reset", r"in a first step .*allowed: reset\(seed=…\) returns observation and info"),
        ("old step", "in a first step .*truncated and info"),
        ("breaks", "KeyError in a first step .*wheels"),
    ],
)
def test_an_environment_that_is_not_as_gymnasium_has_it_is_named(way, message):
    assert env_spec("Strange-v0").observation_shape == (3,)
    with pytest.raises(ConfigError, match=r"data\.env='Strange-v0'.*" + message):
        env_spec("Strange-v0", {"way": way})


def test_an_environment_of_one_action_is_refused():
    class Only(Echo):
        action_space = gymnasium.spaces.Discrete(1)

        def step(self, action):
            return np.zeros(1, dtype=np.float32), 0.0, False, False, {}

    gymnasium.register("Only-v0", Only)
    with pytest.raises(
        ConfigError, match=r"Only-v0.* has the action space Discrete\(1\); allowed: Discrete of two or more"
    ):
        env_spec("Only-v0")


@pytest.mark.usefixtures("strange")
def test_torchrl_environments_that_cannot_be_made_or_learned_from_are_named():
    with pytest.raises(ConfigError, match=r"data\.env_kwargs=.*lenth.*not accepted by torchrl\.envs\.PendulumEnv"):
        env_spec("torchrl.envs.PendulumEnv", {"lenth": 5})
    with pytest.raises(ConfigError, match="action spec MultiCategorical"):
        env_spec("torchrl.envs.GymEnv", {"env_name": "Strange-v0", "way": "two", "categorical_action_encoding": True})


@pytest.mark.usefixtures("strange")
def test_actions_are_numbers_of_their_space():
    with pytest.raises(ConfigError, match=r"Strange-v0.* has the action space Box.*int64.*allowed: .* floating-point"):
        env_spec("Strange-v0", {"way": "integers"})
    env = make_env(env_spec("Strange-v0", {"way": "double"}), 2, seed=0, backend="gymnasium")
    for bound in (-5.0, 5.0):
        step, _ = env.step_and_maybe_reset(env.reset().set("action", torch.full((2, 2), bound)))
        assert (step["next", "reward"] == 1).all()


def test_arguments_that_a_file_cannot_hold_are_named():
    CollectorDataModule("Hopper-v5", {"healthy_z_range": (0.5, math.inf)})
    with pytest.raises(
        ConfigError, match=r"data\.env_kwargs: healthy_reward=.*1.* \(float32\); allowed are names with plain"
    ):
        CollectorDataModule("Hopper-v5", {"healthy_reward": np.float32(1)})


def test_backend_that_cannot_make_an_environment_says_so():
    with pytest.raises(ConfigError, match="envpool"):
        make_env(env_spec("ProbeContext-v0"), 2, seed=0, backend="envpool")
    with pytest.raises(ConfigError, match="frame_skip"):
        make_env(env_spec("Ant-v5", {"frame_skip": 2}), 2, seed=0, backend="envpool")


def test_training_and_evaluation_seeds_never_meet():
    training = {stream_seed(seed, rank, step) for seed in range(20) for rank in range(4) for step in range(20)}
    evaluation = {stream_seed(seed, 2, evaluation=True) for seed in range(50)}
    assert len(training) > 1500
    assert max(training) + 10_000 < 2**30 <= min(evaluation)
