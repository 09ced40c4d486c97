"""Direct RL: the same data module and evaluation as distillation, with one policy instead of fresh learners."""

import gymnasium
import numpy as np
import probes  # noqa: F401  registers the probe environments
import pytest
import torch
from test_meta_ppo import small_run, trainer

from lightning_distill import CollectorDataModule, load
from lightning_distill.envs import ConfigError, EnvSpec, env_spec
from lightning_distill.evaluation import Evaluator
from lightning_distill.policies import ActionNoise
from lightning_distill.ppo import PPO


def adam(parameters):
    return torch.optim.Adam(parameters, lr=2.5e-3, eps=1e-5)


@pytest.fixture(scope="module")
def cart_pole():
    """A policy for cart-pole after a few seconds."""
    data = {"env_steps": 120_000, "num_envs": 32, "rollout_length": 64}
    options = {"epochs": 4, "minibatches": 4, "optimizer": adam, "critic_optimizer": adam}
    return small_run(model=PPO, data=data, **options)


def evaluated(module, method="test", **data):
    """Validate or test a module; the metrics that are logged."""
    data = CollectorDataModule("CartPole-v1", **{"val_learners": 3, "test_learners": 20, **data})
    return getattr(trainer(limit_val_batches=1), method)(module, data, verbose=False)[0]


def test_it_learns(cart_pole):
    metrics = evaluated(cart_pole)
    assert metrics["test/return_sampled"] > 400
    assert metrics["test/return_greedy"] > 400


def test_every_row_of_an_evaluation_is_the_one_policy(cart_pole):
    metrics = evaluated(cart_pole, test_learners=6, episodes=2)
    assert list(cart_pole.evaluations) == ["trained policy"]
    found = cart_pole.evaluations["trained policy"]
    assert {kind: entry.returns.shape for kind, entry in found.items()} == {"sampled": (6, 2), "greedy": (6, 2)}
    assert metrics["test/return_greedy"] == pytest.approx(found["greedy"].mean)
    assert metrics["test/return_sampled_ci95"] == pytest.approx(found["sampled"].ci95)


def test_validation_logs_what_checkpoints_are_chosen_by(cart_pole):
    metrics = evaluated(cart_pole, "validate")
    entry = cart_pole.evaluations["trained policy"]["sampled"]
    assert metrics["val/return"] == pytest.approx(entry.mean)
    assert metrics["val/return_worst"] == entry.returns.min()


def test_an_evaluation_leaves_weights_and_random_state_alone(cart_pole):
    before = {name: value.clone() for name, value in cart_pole.state_dict().items()}
    state = torch.get_rng_state()
    first = evaluated(cart_pole)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in cart_pole.state_dict().items())
    assert evaluated(cart_pole) == first


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_greedy_actions_are_those_of_the_weights_on_normalised_observations(env):
    """Against a network of torch.nn with the same weights, on observations normalised by hand."""
    module = small_run(env, PPO, minibatches=4)
    params = module.policy_params()
    layers = [torch.nn.Linear(*params[f"{i}.weight"].shape[1:]) for i in range(3)]
    for i, layer in enumerate(layers):
        layer.weight.data, layer.bias.data = params[f"{i}.weight"][0].T, params[f"{i}.bias"].flatten()
    network = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    observations = torch.randn(4, 5, *module.spec.observation_shape) * 30
    moments = module.observation_moments
    inputs = ((observations - moments.mean) / (moments.variance + 1e-8).sqrt()).clamp(-10, 10).float()
    output = network(inputs)
    expected = output.argmax(-1) if module.spec.action_type == "discrete" else output
    torch.testing.assert_close(module.present_policy()(observations), expected)


def test_outputs_and_values_are_not_rounded_under_autocast():
    module = PPO(env_spec("Hopper-v5"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, value = module.present_output(torch.randn(7, 11)), module.critic(torch.randn(7, 11))
    for found in (output, value):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())


def test_sampled_actions_have_the_policys_spread():
    module = small_run("Pendulum-v1", PPO, minibatches=4, log_std=-1.0, data={"env_steps": 1})
    observations = torch.zeros(1, 20_000, 3)
    actions = module.present_policy()(observations, sample=True)
    # Half the action range of Pendulum is 2.
    assert actions.std().item() == pytest.approx(2 * np.exp(-1.0), rel=0.05)
    greedy = module.present_policy()(observations)
    torch.testing.assert_close(greedy, greedy[:, :1].expand_as(greedy))
    assert actions.mean().item() == pytest.approx(greedy[0, 0].item(), abs=0.02)


def test_returns_are_those_that_gymnasium_gives(cart_pole):
    """The same policy in Gymnasium's own cart-pole, greedy: as good there."""
    env, act, lengths = gymnasium.make("CartPole-v1"), cart_pole.present_policy(), []
    for seed in range(3):
        observation, done, length = env.reset(seed=seed)[0], False, 0
        while not done:
            action = act(torch.tensor(observation).view(1, 1, -1)).item()
            observation, _, terminated, truncated, _ = env.step(action)
            done, length = terminated or truncated, length + 1
        lengths.append(length)
    assert min(lengths) > 300


def test_a_checkpoint_restores_the_policy_and_what_it_has_counted(tmp_path):
    data = CollectorDataModule("CartPole-v1", env_steps=2048, num_envs=16, rollout_length=32, test_learners=8)
    module = PPO(data.spec, minibatches=4)
    fit = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    fit.fit(module, data)
    (path,) = tmp_path.rglob("*.ckpt")
    restored = PPO(data.spec, minibatches=4)
    assert not torch.equal(restored.policy_params()["0.weight"], module.policy_params()["0.weight"])
    before = trainer().test(module, data, verbose=False)
    assert trainer().test(restored, data, ckpt_path=path, verbose=False, weights_only=True) == before
    assert restored.env_steps == 2048
    assert restored.observation_moments.count == 2048


def test_a_module_that_has_learned_is_not_trained_with_schedules_that_have_ended():
    data = CollectorDataModule("CartPole-v1", env_steps=1024, num_envs=16, rollout_length=32)
    module = PPO(data.spec, minibatches=4)
    trainer().fit(module, data)
    with pytest.raises(ConfigError, match=r"has learned for 2 iterations already.*\(model\.start\)"):
        trainer().fit(module, data)


def test_the_return_that_is_logged_is_of_the_latest_episodes_of_all_environments():
    module = PPO(env_spec("CartPole-v1"))
    reward = torch.arange(8.0).unsqueeze(1).expand(8, 50)  # each step an episode, more of them than are kept
    module._collect_returns(reward, torch.ones_like(reward, dtype=torch.bool))
    assert len(module._episode_returns) < reward.numel()
    assert set(module._episode_returns) == set(range(8))


def test_a_critic_begins_the_same_whatever_the_policy_begins_with():
    critics = []
    for start in (None, "cartpole_1d_plain"):
        torch.manual_seed(1)
        critics.append(PPO(env_spec("CartPole-v1"), start=start).critic.state_dict())
    for name, value in critics[0].items():
        assert torch.equal(critics[1][name], value)


def test_any_policy_can_be_played():
    """An evaluation asks of a policy no more than actions for observations [learners, episodes, *obs]."""
    evaluator = Evaluator(env_spec("ProbeContext-v0"), learners=3, episodes=2)
    seen = []

    def right(observation, sample=False):
        seen.append((tuple(observation.shape), sample))
        return (observation[..., 0] > 0).long()

    def wrong(observation, sample=False):
        return 1 - right(observation)

    assert torch.equal(evaluator.play(lambda: right).returns, torch.ones(3, 2))
    assert seen == [((3, 2, 1), True)]
    assert torch.equal(evaluator.play(lambda: wrong, greedy=True).returns, -torch.ones(3, 2))
    evaluator.close()


@pytest.mark.parametrize("env", ["cartpole_1d", "inverted_pendulum"])
def test_a_run_starts_as_a_learner_taught_on_a_dataset(env):
    dataset = load(env)
    spec = env_spec(dataset.env)
    torch.manual_seed(3)
    module = PPO(spec, start=env)
    evaluator = Evaluator(spec, learners=5)
    assert (
        evaluator.play(module.present_policy).mean
        > 0.95 * dataset.metadata["returns"]["in-distribution"]["sampled"]["mean"]
    )
    evaluator.close()
    if dataset.log_std is not None:
        least = module.actor.noise.log_half_range - 3.0  # the default of log_std_min
        torch.testing.assert_close(module.log_std, dataset.log_std.maximum(least))


def test_a_taught_start_keeps_its_normaliser_and_its_weights_are_trained():
    begun = load("inverted_pendulum")
    module = small_run("InvertedPendulum-v5", PPO, iterations=2, start="inverted_pendulum")
    fresh = PPO(module.spec, start="inverted_pendulum")
    torch.testing.assert_close(module.observation_moments.mean.float(), begun.observation_mean)
    torch.testing.assert_close(module.observation_moments.std.float(), begun.observation_std)
    assert not torch.equal(module.policy_params()["2.weight"], fresh.policy_params()["2.weight"])


def test_an_action_that_has_one_value_alone_has_noise_of_a_size():
    spec = EnvSpec("Mine-v0", (3,), "continuous", 2, (-4.0, 0.0), (4.0, 0.0))
    torch.testing.assert_close(ActionNoise(spec, log_std=0.0, log_std_min=-3.0).log_std.exp(), torch.tensor([4.0, 1.0]))


def test_a_start_needs_a_family_of_one_architecture():
    with pytest.raises(
        ConfigError, match=r"model.start='cartpole_1d': .* allowed is a model.family of one architecture"
    ):
        PPO(env_spec("CartPole-v1"), family="mixture", start="cartpole_1d")


def test_a_start_for_another_environment_is_named():
    with pytest.raises(ConfigError, match="observations"):
        PPO(env_spec("Hopper-v5"), start="inverted_pendulum")
