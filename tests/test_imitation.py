"""Imitation: a dataset distilled into another one for other learners."""

import pytest
import torch
from test_meta_ppo import small_run
from torch.distributions import Categorical, Normal, kl_divergence

from lightning_distill import MLP, ConfigError, evaluate, load, teach_many
from lightning_distill.imitation import EXPERTS, Imitation, divergence


def other_learners(iterations, model=Imitation):
    return small_run(
        model=model,
        expert="cartpole_1d",
        pairs=16,
        step_rule="newton",
        family=MLP(width=32, activation="relu"),
        learners=4,
        iterations=iterations,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        data={"num_envs": 32},
    )


class Untrained(Imitation):
    def training_step(self, rollout, batch_idx):
        """Leaves everything as it was in the beginning."""


def test_other_learners_learn_what_the_expert_does():
    trained, untrained = other_learners(25), other_learners(1, Untrained)
    assert trained.distilled().step_rule == "newton"
    mean = [evaluate(module.distilled(), learners=50, greedy=True).mean for module in (trained, untrained)]
    assert mean[0] > 1.5 * mean[1] > 30  # untaught learners reach 10


def test_pairs_begin_as_states_of_the_expert_with_its_outputs():
    module = other_learners(1)
    start = other_learners(1)
    assert torch.equal(module.synthetic_batch.targets, start.synthetic_batch.targets), "the same seed, the same pairs"
    assert module.env_steps == 16 * 1000 + 640
    module = other_learners(1, Untrained)
    batch, moments = module.synthetic_batch, module.observation_moments
    states = batch.observations * moments.std + moments.mean
    torch.testing.assert_close(module.expert_output(states.float()), batch.targets, atol=1e-3, rtol=1e-3)
    expert = load("cartpole_1d")
    torch.testing.assert_close(module.distilled().observation_std, expert.observation_std, atol=1e-6, rtol=1e-5)


def test_the_expert_is_the_mean_of_learners_taught_on_its_dataset():
    random_state = torch.get_rng_state()
    module = Imitation(spec_of("cartpole_1d"), expert="cartpole_1d", pairs=3)
    assert not torch.equal(torch.get_rng_state(), random_state), "the batch is drawn"
    observations = torch.randn(5, 4) * 0.1
    torch.manual_seed(0)
    dataset = load("cartpole_1d")
    policy = teach_many(MLP(), dataset, EXPERTS)
    outputs = policy.module(dataset.normalise(observations).expand(EXPERTS, 5, 4))
    torch.testing.assert_close(module.expert_output(observations), outputs.mean(0))
    assert not [name for name in module.state_dict() if "expert" in name]


def test_gradient_of_the_divergence_reaches_the_batch_alone():
    for name in ("cartpole_1d", "inverted_pendulum"):
        module = Imitation(spec_of(name), expert=name, pairs=3, learners=2, step_rule="projection")
        module.draw()
        observation = torch.randn(2, 6, 4)
        expert = torch.randn(2, 6, module.spec.actions)
        loss, entropy, log_ratio = module._policy_loss(
            {"observation": observation, "expert": expert, "log_prob": torch.zeros(2, 6)}
        )
        (loss - 0.0 * entropy).backward()
        touched = {key for key, parameter in module.named_parameters() if parameter.grad is not None}
        assert touched == {key for key, _ in module.named_parameters() if key.startswith("actor.")}
        assert not log_ratio.any()
        assert entropy.isfinite()


def test_divergences_are_those_of_torch():
    expert, output, log_std = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.randn(2)
    categorical = [Categorical(logits=logits) for logits in (expert, output)]
    torch.testing.assert_close(divergence(expert, output, None), kl_divergence(*categorical))
    normal = [Normal(mean, log_std.exp()) for mean in (expert, output)]
    torch.testing.assert_close(divergence(expert, output, log_std), kl_divergence(*normal).sum(-1))


def test_an_expert_of_another_environment_is_refused():
    with pytest.raises(ConfigError, match=r"the dataset \(for CartPole-v1\).*needs"):
        Imitation(spec_of("halfcheetah"), expert="cartpole_1d")


def spec_of(name):
    from lightning_distill.envs import env_spec

    return env_spec(load(name).env)
