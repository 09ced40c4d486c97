import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

import lightning_distill.envs as envs
from lightning_distill.envs.cartpole import CartPole


@pytest.mark.parametrize("dimensions", [1, 3])
def test_specs_are_what_the_environment_does(dimensions):
    check_env_specs(CartPole(dimensions, num_envs=4, seed=0))


def test_one_dimension_is_gymnasiums_cartpole_step_by_step():
    reference = gymnasium.make("CartPole-v1").unwrapped
    batched = CartPole(1, num_envs=1, seed=0, dtype=torch.float64)
    ours = gymnasium.make("CartPole1D-v0").unwrapped
    rng = np.random.default_rng(0)
    for episode in range(20):
        reference.reset(seed=episode)
        batched.reset()
        batched.state = torch.tensor(reference.state, dtype=torch.float64).unsqueeze(0)
        ours.reset()
        ours.state = np.array([reference.state])
        for _ in range(500):
            action = int(rng.integers(2))
            observation, reward, terminated, *_ = reference.step(action)
            step = batched.step(batched.fake_tensordict().set("action", torch.tensor([action])).exclude("next"))["next"]
            mine = ours.step(action)
            np.testing.assert_allclose(step["observation"][0].numpy(), reference.state, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(mine[0], observation)
            assert step["reward"].item() == mine[1] == reward == 1.0
            assert step["terminated"].item() == mine[2] == terminated
            if terminated:
                break


def test_action_pushes_only_its_own_dimension():
    env = CartPole(3, num_envs=6, dtype=torch.float64)
    env.reset()
    env.state = torch.zeros_like(env.state)
    env.step(env.fake_tensordict().set("action", torch.arange(6)).exclude("next"))
    velocity = env.state.unflatten(-1, (3, 4))[..., 1]
    push = 0.02 * 10 / 1.1 * (1 + 0.05 / 1.1 / (0.5 * (4 / 3 - 0.1 / 1.1)))
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for action in range(6):
        expected[action, action // 2] = push if action % 2 else -push
    torch.testing.assert_close(velocity, expected)


def test_gymnasium_and_torch_agree_in_three_dimensions():
    batched, single = CartPole(3, num_envs=1, dtype=torch.float64), gymnasium.make("CartPole3D-v0").unwrapped
    batched.reset()
    single.reset(seed=5)
    batched.state = torch.tensor(single.state.reshape(1, 12))
    for action in [0, 5, 3, 2, 1, 4, 0, 0]:
        step = batched.step(batched.fake_tensordict().set("action", torch.tensor([action])).exclude("next"))["next"]
        observation, _, terminated, *_ = single.step(action)
        np.testing.assert_allclose(step["observation"][0].numpy(), observation, atol=1e-7)
        assert step["terminated"].item() == terminated


def test_finished_environments_restart_and_their_last_observation_is_kept():
    env = CartPole(1, num_envs=64, seed=0)
    state = env.reset()
    finished = 0
    for _ in range(60):
        state["action"] = torch.ones(64, dtype=torch.int64)
        before = state["observation"]
        step, state = env.step_and_maybe_reset(state)
        done = step["next", "done"].squeeze(-1)
        finished += int(done.sum())
        last = step["next", "observation"]
        out = (last[:, 0].abs() > 2.4) | (last[:, 2].abs() > 12 * torch.pi / 180)
        assert torch.equal(out, done), "the observation beside done is the terminal one"
        assert state["observation"][done].abs().le(0.05).all(), "and the next step starts anew"
        assert torch.equal(state["observation"][~done], last[~done]), "others go on undisturbed"
        assert not torch.equal(before, last)
    assert finished > 64


def test_time_limit_truncates_without_terminating():
    env = CartPole(1, num_envs=1, seed=0)
    env.reset()
    env.steps = torch.full_like(env.steps, 499)
    step = env.step(env.fake_tensordict().set("action", torch.tensor([0])).exclude("next"))["next"]
    assert step["truncated"].item()
    assert not step["terminated"].item()


def test_same_seed_same_start_and_cartpole_ids_use_the_batched_environment():
    spec = envs.env_spec("CartPole-v1")
    first, again, other = (envs.make_env(spec, 5, seed).reset()["observation"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert isinstance(envs.make_env(spec, 5, 0), CartPole)
    assert gymnasium.make("CartPole5D-v0").observation_space.shape == (20,)
