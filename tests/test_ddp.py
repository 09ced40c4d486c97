import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from lightning_distill import MetaPPO
from lightning_distill.envs import env_spec, stream_seed
from lightning_distill.evaluation import VALIDATION_SEED, Evaluator

SCRIPT = Path(__file__).with_name("ddp_script.py")


def in_two_processes(folder, *arguments):
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    return in_two_processes(folder, "20", "cartpole")


@pytest.fixture(scope="module")
def playing(tmp_path_factory):
    """A game, with an encoder."""
    return in_two_processes(tmp_path_factory.mktemp("game"), "2", "game")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("compiled"), "2", "compiled")


@pytest.fixture(scope="module")
def imitating(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("imitation"), "4", "imitation")


def trained(rank):
    """The module as it ended, without a trainer."""
    module = MetaPPO(env_spec("CartPole-v1"), pairs=3, learners=4)
    module.load_state_dict(rank["state"])
    return module


@pytest.mark.parametrize("which", ["ranks", "playing", "compiled", "imitating"])
def test_processes_agree_bit_for_bit(which, request):
    """…after twenty iterations of cart-pole, two of a game, two of compiled losses, and four of imitation."""
    first, second = request.getfixturevalue(which)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_an_expert_is_seen_by_all_processes(imitating):
    first, second = imitating
    assert first["state"]["env_steps"] == 2 * (16 * 1000 + 4 * 8 * 20)
    assert not torch.equal(first["before"]["rollout"]["observation"], second["before"]["rollout"]["observation"])
    # Of a pendulum's angle, over the episodes of both, the sum of squares of sine and cosine is 1.
    mean, variance = (first["state"][f"observation_moments.{name}"][:2] for name in ("mean", "variance"))
    assert (mean.square() + variance).sum().item() == pytest.approx(1, abs=1e-3)


def expected_gradients(module, ranks):
    """Those of one process: twice the learners, all of both rollouts, its own statistics and its own sums."""
    before = [rank["before"] for rank in ranks]
    module.load_state_dict(before[0]["state"])
    module._sum_over_processes = lambda tensor: tensor
    module._fresh = {name: torch.cat([part["fresh"][name] for part in before]) for name in before[0]["fresh"]}
    module._normaliser, module._acting_log_std = before[0]["normaliser"], None
    module._running = torch.cat([part["running"] for part in before])
    count, steps = before[0]["rollout"]["action"].shape
    rollout = torch.cat([TensorDict.from_dict(part["rollout"], batch_size=[count, steps]) for part in before])
    samples = module.samples(rollout)
    samples |= module._inputs(samples["observation"])
    policy_loss, *_ = module._policy_loss(samples)
    value_loss = (module.critic(samples["critic_input"]).squeeze(-1) - samples["value_target"]).square().mean()
    (policy_loss + value_loss).backward()
    return [[parameter.grad for parameter in part] for part in (module.critic_params(), module.actor.parameters())]


def check_gradients(module, ranks):
    expected = expected_gradients(module, ranks)
    for rank in ranks:
        for found, wanted in zip(rank["gradients"], expected, strict=True):
            for gradient, reference in zip(found, wanted, strict=True):
                assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_gradients_of_two_processes_are_those_of_one_with_all_the_data(ranks):
    check_gradients(MetaPPO(env_spec("CartPole-v1"), pairs=3, learners=8), ranks)


def test_compiled_gradients_of_two_processes_are_those_of_one(compiled):
    check_gradients(MetaPPO(env_spec("CartPole-v1"), pairs=50_000, learners=4), compiled)


def test_gradients_of_an_encoder_are_those_of_one_process(playing):
    module = MetaPPO(env_spec("ALE/Pong-v5"), pairs=3, learners=4, encoder_level=4)
    check_gradients(module, playing)
    assert all(parameter.grad.abs().max() > 0 for parameter in module.encoder.parameters())


def test_files_are_written_once(ranks, folder):
    [run] = (folder / "run").iterdir()
    names = {path.name for path in run.iterdir()}
    assert {"distilled.safetensors", "last.safetensors", "metrics.csv", "environment.json", "checkpoints"} <= names
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    with (run / "metrics.csv").open(newline="") as file:
        steps = [float(row["env_steps"]) for row in csv.DictReader(file) if row["env_steps"]]
    assert steps == [640.0 * iteration for iteration in range(1, 21)]


def test_each_process_draws_learners_of_its_own(ranks):
    drawn = torch.cat([*ranks[0]["fresh"], *ranks[1]["fresh"]]).flatten(1)
    generations = 3  # learners live for 8 of the 20 iterations
    assert len(drawn.unique(dim=0)) == 2 * generations * 4


def test_steps_and_statistics_are_of_all_processes(ranks):
    assert ranks[0]["state"]["env_steps"] == 2 * 16 * 20 * 20
    assert ranks[0]["state"]["observation_moments.count"] == 2 * 16 * 20 * 20
    for name in ("return", "policy/kl", "steps/s", "val/return"):
        assert ranks[0]["logged"][name] == ranks[1]["logged"][name], name


def test_evaluation_is_shared_out_and_known_to_all(ranks):
    """5 learners: 3 are played by either process, one of them for nothing; each share is what one process plays alone."""
    module = trained(ranks[0])
    shares = []
    for seed in (VALIDATION_SEED, stream_seed(VALIDATION_SEED, 1)):
        evaluator = Evaluator(module.spec, learners=3, episodes=2)
        shares.append(evaluator(module.distilled(), module.family, seed=seed).returns)
        evaluator.close()
    assert torch.equal(ranks[0]["returns"], torch.cat(shares)[:5])
    assert torch.equal(ranks[0]["returns"], ranks[1]["returns"])
    assert not torch.equal(*shares)
