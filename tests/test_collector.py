import pytest
import torch
from torchrl.collectors import Collector

from lightning_distill.collector import VectorCollector, make_collector
from lightning_distill.envs import env_spec, make_env

ENVS, STEPS, ACTIONS = 6, 40, 3


def policy(state):
    """Some function of the observation, so that whoever sees the same acts the same."""
    weights = torch.linspace(-3, 3, state["observation"].shape[-1] * ACTIONS).view(-1, ACTIONS)
    state["output"] = state["observation"] @ weights
    state["action"] = 1.5 * state["output"].sin()  # also beyond the bounds of the action space
    return state


def rollouts(kind, backend, count=3):
    env = make_env(env_spec("Hopper-v5"), ENVS, seed=5, backend=backend)
    if kind is VectorCollector:
        collector = make_collector(env, policy, STEPS, torch.device("cpu"))
        assert isinstance(collector, VectorCollector)
    else:
        collector = Collector(env, policy, frames_per_batch=ENVS * STEPS, total_frames=-1, trust_policy=True,
                              track_traj_ids=False, use_buffers=False)  # fmt: skip
    found = [rollout for _, rollout in zip(range(count), collector, strict=False)]
    collector.shutdown()
    return found


@pytest.mark.parametrize("backend", ["gymnasium", "envpool"])
def test_rollouts_are_bit_for_bit_those_of_torchrls_own_collector(backend):
    if backend == "envpool":
        pytest.importorskip("envpool")
    mine, theirs = rollouts(VectorCollector, backend), rollouts(Collector, backend)
    assert sum(rollout["next", "done"].sum() for rollout in mine) > 5
    for ours, expected in zip(mine, theirs, strict=True):
        assert ours.shape == expected.shape == (ENVS, STEPS)
        assert set(ours.keys(True, True)) == set(expected.keys(True, True))
        for key in expected.keys(True, True):
            assert ours[key].dtype == expected[key].dtype
            assert torch.equal(ours[key], expected[key]), key


def test_a_rollout_goes_on_where_the_one_before_ended_and_keeps_its_own_tensors():
    first, second, _ = found = rollouts(VectorCollector, "gymnasium")
    whole = torch.cat(list(found), 1)
    following, observation = whole["next", "observation"][:, :-1], whole["observation"][:, 1:]
    done = whole["next", "done"][:, :-1].squeeze(-1)
    assert torch.equal(following[~done], observation[~done])
    # A hopper starts upright at a height of 1.25 and ends fallen or tilted.
    assert (observation[done][:, 0] - 1.25).abs().lt(0.01).all()
    assert (following[done] - observation[done]).abs().amax(-1).gt(0.1).all()
    assert first["observation"].data_ptr() != second["observation"].data_ptr()
