import multiprocessing
import os
import signal
from functools import partial
from types import SimpleNamespace

import gymnasium
import lightning as L
import pytest
import torch
from test_meta_ppo import Watch, small_run
from torchrl.collectors import Collector

from lightning_distill import CollectorDataModule, ConfigError, MetaPPO
from lightning_distill.collector import VectorCollector, make_collector
from lightning_distill.envs import env_spec, make_env
from lightning_distill.imitation import Imitation

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


class Ratios(MetaPPO):
    """Keeps how far each minibatch's policies are from those that acted."""

    def _policy_loss(self, batch):
        loss, entropy, log_ratio = super()._policy_loss(batch)
        self.ratios = [*getattr(self, "ratios", []), log_ratio.abs().max().item()]
        return loss, entropy, log_ratio


def of_two_workers(*callbacks):
    # As the command line's: an optimiser's maker that cannot be copied.
    optimizer = partial(lambda _, parameters: torch.optim.Adam(parameters, lr=2.5e-3), (step for step in ()))
    options = {"pairs": 3, "learners": 4, "epochs": 2, "minibatches": 2, "optimizer": optimizer}
    return small_run("CartPole-v1", Ratios, callbacks, data={"collectors": 2}, **options)


def test_workers_do_not_take_what_an_imitation_keeps():
    options = {"pairs": 3, "learners": 4, "expert": "cartpole_1d_plain", "replay": 16 * 1000 + 320}
    module = small_run("CartPole-v1", Imitation, data={"collectors": 2, "env_steps": 16 * 1000 + 320}, **options)
    assert module.iteration == 1
    assert len(module._seen) == 16 * 1000 + 320


def test_workers_collect_together_what_the_present_policies_do():
    watch = Watch()
    module = of_two_workers(watch)
    first, second = watch.rollouts
    assert first.shape == second.shape == (16, 20)
    assert module.env_steps == 2 * 16 * 20
    # Also: each environment was acted in by the learner that it is counted for.
    assert module.ratios[0] < 1e-5
    assert module.ratios[4] < 1e-5, "the second rollout is of the changed batch"
    assert max(module.ratios) > 1e-4
    starts = first["observation"][:, 0]
    assert len(starts.unique(dim=0)) == 16, "workers have start states of their own"
    whole = torch.cat([first, second], 1)
    done = whole["next", "done"][:, :-1].squeeze(-1)
    assert torch.equal(whole["next", "observation"][:, :-1][~done], whole["observation"][:, 1:][~done])


@pytest.mark.parametrize("noticed", [True, False], ids=["seen to be dead", "dead when it is asked"])
def test_a_lost_collector_ends_the_run(noticed):
    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            worker = trainer.datamodule._rollouts.collector.workers.procs[0]
            os.kill(worker.pid, signal.SIGKILL)
            if not noticed:  # TorchRL looks first; whoever ends between that and the question leaves a broken pipe
                worker.join()
                worker.is_alive = lambda: True

    with pytest.raises(RuntimeError, match=r"a worker of data.collectors ended"):
        of_two_workers(Kill())
    assert not multiprocessing.active_children()


def test_environments_are_shared_out_evenly():
    with pytest.raises(
        ConfigError, match=r"num_envs=16: allowed are multiples of model.learners=4 × data.collectors=3"
    ):
        small_run(data={"collectors": 3})


def test_workers_are_refused_where_they_would_draw_other_learners():
    data = CollectorDataModule("CartPole-v1", num_envs=16, collectors=2)
    data.trainer = SimpleNamespace(
        lightning_module=MetaPPO(data.spec), strategy=SimpleNamespace(root_device=torch.device("cuda"))
    )
    with pytest.raises(ConfigError, match=r"data\.collectors=2 on device 'cuda'"):
        data.setup("fit")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to cores on Linux alone")
def test_a_simulator_has_a_thread_for_each_core_that_it_may_use():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert CollectorDataModule("CartPole-v1").threads == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert CollectorDataModule("CartPole-v1").threads == len(cores)


@pytest.mark.parametrize(("env", "warns"), [("Newtons-v0", True), ("HalfCheetah-v5", False)])
def test_units_that_are_slow_to_learn_are_said(env, warns, caplog):
    data = CollectorDataModule(env)
    data.trainer = SimpleNamespace(
        lightning_module=MetaPPO(data.spec), strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    data.setup("fit")
    assert ("RescaleAction" in caplog.text) is warns


gymnasium.register(
    "Newtons-v0", lambda: gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1000.0, 1000.0)
)
