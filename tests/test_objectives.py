import numpy as np
import pytest
import torch

from lightning_distill.moments import RunningMoments
from lightning_distill.objectives import (
    approximate_kl,
    discounted_sums,
    explained_variance,
    generalized_advantages,
    ppo_loss,
)
from lightning_distill.policies import action_distribution


def slow_advantages(reward, value, next_value, terminated, done, gamma, lam):
    """Equation 16 of Schulman et al. 2016, summed term by term for every state."""
    n, t = reward.shape
    result = np.zeros((n, t))
    for i in range(n):
        for start in range(t):
            weight = 1.0
            for k in range(start, t):
                delta = reward[i, k] + gamma * next_value[i, k] * (1 - terminated[i, k]) - value[i, k]
                result[i, start] += weight * delta
                weight *= gamma * lam
                if done[i, k]:
                    break
    return result


def test_advantages_are_the_sum_of_discounted_errors():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 4, 30))
    done = rng.random((4, 30)) < 0.2
    terminated = done & (rng.random((4, 30)) < 0.5)
    ours = generalized_advantages(
        *map(torch.tensor, (reward, value, next_value, terminated, done)), gamma=0.97, gae_lambda=0.9
    )
    expected = slow_advantages(reward, value, next_value, terminated, done, 0.97, 0.9)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)  # γ is rounded to float32


def test_discounted_sums_restart_after_done_and_continue_over_rollouts():
    reward = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    done = torch.tensor([[False, True, False, False]])
    assert discounted_sums(reward, done, torch.tensor([10.0]), 0.5).tolist() == [[6.0, 5.0, 3.0, 5.5]]
    assert discounted_sums(reward, done, torch.tensor([20.0]), 1.0).tolist() == [[21.0, 23.0, 3.0, 7.0]]


def test_surrogate_is_clipped_only_where_that_is_pessimistic():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = ppo_loss(log_ratio, advantage, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert gradient.tolist() == pytest.approx([0.0, 1.5 / 4, -0.5 / 4, 0.0])


def test_divergence_estimate_is_unbiased():
    old = torch.tensor([0.5, 0.3, 0.2]).log()
    new = torch.tensor([0.4, 0.4, 0.2]).log()
    exact = (old.exp() * (old - new)).sum()
    actions = torch.multinomial(old.exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert approximate_kl((new - old)[actions]).item() == pytest.approx(exact.item(), rel=0.02)
    assert approximate_kl(torch.zeros(5)).item() == 0


def test_gaussian_log_probability_is_of_the_joint_action():
    mean, log_std, action = torch.randn(3, 5, 2), torch.tensor([-0.3, 0.4]), torch.randn(3, 5, 2)
    found = action_distribution(mean, log_std).log_prob(action)
    std = log_std.exp()
    each = -0.5 * ((action - mean) / std) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(found, each.sum(-1))
    entropy = (0.5 + 0.5 * np.log(2 * np.pi) + log_std).sum()
    torch.testing.assert_close(action_distribution(mean, log_std).entropy(), entropy.expand(3, 5))


def test_gaussian_samples_have_its_mean_and_standard_deviation():
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([-0.7, 0.4])
    sample = action_distribution(mean.expand(100_000, 2), log_std).sample()
    torch.testing.assert_close(sample.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(sample.std(0), log_std.exp(), atol=0.02, rtol=0)


def test_explained_variance_of_perfect_and_constant_predictions():
    target = torch.randn(100)
    assert explained_variance(target, target).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(100), target).item() == pytest.approx(0)


def test_running_moments_are_those_of_everything_seen():
    torch.manual_seed(0)
    batches = [torch.randn(n, 3) * 5 + 1000 for n in (1, 7, 200)]
    moments = RunningMoments((3,))
    for batch in batches:
        moments.update(batch)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(moments.mean, everything.mean(0))
    torch.testing.assert_close(moments.variance, everything.var(0, unbiased=False))
    assert moments.count.item() == 208


@pytest.mark.parametrize(("value", "count"), [(1_013_250.7, 3000), (10_000_001.0, 2000)])
def test_what_never_varies_has_no_variance_however_large_it_is(value, count):
    moments = RunningMoments((1,))
    moments.update(torch.full((count, 1), value))
    assert 0 <= moments.variance.item() < 0.1
    assert moments.std.isfinite().all()


def test_running_moments_of_two_processes_are_those_of_all_data():
    torch.manual_seed(0)
    first, second = torch.randn(50, 2) + 3, torch.randn(30, 2) * 2
    alone, shared = RunningMoments((2,)), RunningMoments((2,))
    alone.update(torch.cat([first, second]))

    def others(total):
        shifted = second.double()
        return total + torch.stack([torch.full((2,), 30.0).double(), shifted.sum(0), shifted.square().sum(0)])

    shared.update(first, reduce=others)
    torch.testing.assert_close(shared.mean, alone.mean)
    torch.testing.assert_close(shared.variance, alone.variance)
    assert shared.count == alone.count == 80
