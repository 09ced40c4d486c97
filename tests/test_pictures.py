"""Frames and pictures: what they show, and that nothing fails where nothing can be drawn."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from handmade import make_dataset
from PIL import Image

from lightning_distill import ConfigError, DistilledDataset, load
from lightning_distill.envs import _gymnasium_env
from lightning_distill.envs.cartpole import GymnasiumCartPole
from lightning_distill.envs.rendering import _pose_reader, draw_cart_poles, make_rendered, render_poses
from lightning_distill.pictures import draw_pairs, stacked_frames

POLE, ARROW, VELOCITY = (201, 138, 75), (32, 96, 192), (208, 48, 80)


def where(frame: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a colour."""
    return np.nonzero((frame == colour).all(-1))


def cart_poles(dimensions: int, pairs: int) -> DistilledDataset:
    generator = torch.Generator().manual_seed(pairs)
    return DistilledDataset(
        observations=torch.randn(pairs, 4 * dimensions, generator=generator) * 3,
        targets=torch.randn(pairs, 2 * dimensions, generator=generator) * 3,
        learning_rate=torch.tensor(4.0),
        observation_mean=torch.zeros(4 * dimensions),
        observation_std=torch.ones(4 * dimensions),
        env=f"CartPole{dimensions}D-v0",
        action_type="discrete",
    )


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def test_a_cart_pole_frame_shows_position_tilt_and_push():
    state = np.array([[-1.0, 0, 0.2, 0], [1.5, 0, -0.2, 0]])
    frame = draw_cart_poles(state, np.array([10.0, 0.0]))
    assert frame.shape == (352, 608, 3)
    assert frame.dtype == np.uint8
    upper, lower = frame[:176], frame[176:]
    for lane, side, tilt in ((upper, -1, 1), (lower, 1, -1)):
        rows, columns = where(lane, POLE)
        assert np.sign(columns.mean() - 304) == side
        top, bottom = columns[rows == rows.min()].mean(), columns[rows == rows.max()].mean()
        assert np.sign(top - bottom) == tilt
    assert where(upper, ARROW)[1].min() > where(upper, POLE)[1].min()  # pushed to the right, from the cart's side
    assert where(lower, ARROW)[1].size == 0


def test_gymnasium_cart_pole_renders_what_it_plays():
    env = GymnasiumCartPole(3, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(2)  # pushes the second to the left
    second = env.render()
    assert first.shape == second.shape == (528, 608, 3)
    assert [where(second[176 * lane : 176 * (lane + 1)], ARROW)[0].size > 0 for lane in range(3)] == [
        False,
        True,
        False,
    ]
    assert GymnasiumCartPole(1).render() is None


def test_cart_pole_v1_needs_no_pygame():
    assert make_rendered("CartPole-v1").render().shape == (176, 608, 3)


BODIES = [
    "Ant-v4",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v4",
    "Walker2d-v5",
    "Swimmer-v5",
    "Reacher-v5",
]


@pytest.mark.parametrize("env", [*BODIES, "InvertedPendulum-v5", "InvertedDoublePendulum-v5"])
def test_poses_are_read_from_observations(env):
    made = _gymnasium_env(env, {})
    start, _ = made.reset(seed=1)
    reader = _pose_reader(start, made.unwrapped.data.qpos.copy())
    made.action_space.seed(1)
    for _ in range(10):
        observation = made.step(made.action_space.sample())[0]
    qpos = made.unwrapped.data.qpos
    found = reader(np.asarray(observation))
    left_out = 2 if env[:3] in ("Ant", "Hum", "Swi") else 0 if env[:3] in ("Inv", "Rea") else 1
    np.testing.assert_allclose(found[left_out:], qpos[left_out:], atol=1e-5)
    assert (found[:left_out] == 0).all()
    made.close()


def test_environments_without_a_pose_in_their_observations():
    assert render_poses("Pusher-v5", {}, np.zeros((1, 23))) is None
    assert render_poses("Pendulum-v1", {}, np.zeros((1, 3))) is None
    assert render_poses("torchrl.envs.GymEnv", {"env_name": "Hopper-v5"}, np.zeros((1, 11))) is None


def test_bodies_are_drawn_in_their_poses():
    crouched, stretched = np.zeros((2, 17), dtype=np.float32)
    stretched[2:8] = 0.4
    try:
        frames = render_poses("HalfCheetah-v5", {}, np.stack([crouched, stretched, crouched, crouched - 50]), size=64)
    except ConfigError as error:
        pytest.skip(f"no OpenGL here: {error}")
    assert frames.shape == (4, 64, 64, 3)
    assert np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[0], frames[1])
    assert frames[3].std() > 5  # joints in their ranges and above the floor: still a body in the picture
    dataset = load("halfcheetah_plain")
    states = (dataset.observations * dataset.observation_std + dataset.observation_mean).numpy()[[11, 30]]
    assert render_poses("HalfCheetah-v5", {}, states)[:, :40].min() > 200  # no stripes on the floor behind the body


def test_slow_cart_poles_have_arrows_that_can_be_seen(tmp_path):
    slow = dataclasses.replace(cart_poles(2, 2), observation_std=torch.full((8,), 0.01))
    with Image.open(draw_pairs(slow, tmp_path / "pairs.png")) as image:
        assert len(where(np.asarray(image.convert("RGB")), VELOCITY)[0]) > 100


@pytest.mark.parametrize(("dimensions", "pairs"), [(1, 2), (1, 40), (3, 4)])
def test_cart_pole_pairs_are_drawn_as_cart_poles(tmp_path, dimensions, pairs):
    path = draw_pairs(cart_poles(dimensions, pairs), tmp_path / "new" / "pairs.png")
    width, height = size_of(path)
    assert width == 1440
    assert height > 500
    with Image.open(path) as image:
        poles = where(np.asarray(image.convert("RGB")), POLE)[1]
    cells = np.unique(poles * max(dimensions, min(pairs, 3)) // width)
    assert len(cells) == max(dimensions, min(pairs, 3))  # one pole at least in every column


def test_frames_are_drawn_with_the_distribution_of_actions(tmp_path):
    dataset = DistilledDataset(
        observations=torch.randn(3, 4, 84, 84),
        targets=torch.tensor([[0.0, 5, 0], [5, 0, 0], [0, 0, 1]]),
        learning_rate=torch.tensor(0.3),
        observation_mean=torch.zeros(4, 84, 84),
        observation_std=torch.ones(4, 84, 84),
        env="Game-v0",
        action_type="discrete",
    )
    with Image.open(draw_pairs(dataset, tmp_path / "pairs.png")) as image:
        rows, columns = where(np.asarray(image.convert("RGB")), ARROW)
    # The first pair's bar is at the second action, the second pair's at the first.
    first, second = (columns[(rows > low) & (rows < low + 60)] for low in (rows.min(), rows.min() + 187))
    assert np.median(first) > np.median(second)


def test_a_picture_with_its_colours_last_is_drawn_as_numbers(tmp_path):
    moments = torch.zeros(24, 24, 3)
    pairs = make_dataset(
        "CartPole-v1", observations=torch.randn(8, 24, 24, 3), observation_mean=moments, observation_std=moments + 1
    )
    assert not stacked_frames(pairs)
    assert size_of(draw_pairs(pairs, tmp_path / "pairs.png"))[0] == 1440


def test_where_nothing_can_be_drawn_the_numbers_are(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with caplog.at_level(logging.WARNING):
        path = draw_pairs(make_dataset("HalfCheetah-v5"), tmp_path / "pairs.png")
    assert "poses not drawn" in caplog.text
    assert size_of(path)[0] == 1440


def test_other_environments_have_heat_maps(tmp_path, caplog):
    pairs = dataclasses.replace(make_dataset("HalfCheetah-v5"), env=r"My$\frac-v0$")
    assert size_of(draw_pairs(pairs, tmp_path / "pairs.png"))[0] == 1440
    assert "poses not drawn" in caplog.text
