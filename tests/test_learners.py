"""Initialisations, against torch's own."""

import pytest
import torch
from torch import nn

from lightning_distill import MLP

INITIALISERS = {"xavier": nn.init.xavier_uniform_, "kaiming": nn.init.kaiming_uniform_, "default": None}


@pytest.mark.parametrize("init", INITIALISERS)
def test_weights_are_distributed_as_torchs(init):
    """Uniform up to the same bound: layers of 3 → 40 → 5, 2000 learners."""
    torch.manual_seed(0)
    params = MLP(width=40, depth=1, init=init).draw(2000, (3,), 5)
    for layer, (fan_in, fan_out) in enumerate([(3, 40), (40, 5)]):
        layers = [nn.Linear(fan_in, fan_out) for _ in range(2000)]
        for linear in layers if INITIALISERS[init] else []:
            INITIALISERS[init](linear.weight)
            nn.init.zeros_(linear.bias)
        weights = torch.stack([linear.weight.detach().mT for linear in layers])
        biases = torch.stack([linear.bias.detach() for linear in layers]).unsqueeze(1)
        for found, expected in ((params[f"{layer}.weight"], weights), (params[f"{layer}.bias"], biases)):
            assert found.shape == expected.shape
            torch.testing.assert_close(found.abs().max(), expected.abs().max(), rtol=1e-3, atol=0)
            torch.testing.assert_close(found.std(), expected.std(), rtol=0.02, atol=0)
            assert found.mean().abs() <= 0.01 * expected.abs().max()
            if expected.any():
                assert len(found.unique(dim=0)) == 2000, "each learner has its own"


@pytest.mark.parametrize(("inputs", "width", "outputs"), [(3, 40, 5), (50, 20, 30)])
def test_orthogonal_weights_have_the_singular_values_of_their_gain(inputs, width, outputs):
    torch.manual_seed(0)
    params = MLP(width=width, depth=1, gain=1.7, output_gain=0.3).draw(6, (inputs,), outputs)
    for layer, gain in ((0, 1.7), (1, 0.3)):
        torch.testing.assert_close(
            torch.linalg.svdvals(params[f"{layer}.weight"]).min(), torch.tensor(gain), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            torch.linalg.svdvals(params[f"{layer}.weight"]).max(), torch.tensor(gain), rtol=1e-5, atol=0
        )
        assert not params[f"{layer}.bias"].any()


def test_orthogonal_weights_have_no_preferred_direction():
    """Uniform over orthogonal matrices, as torch's: without the signs of R the diagonal would lean to one side."""
    torch.manual_seed(0)
    weights = MLP(width=4, depth=0, output_gain=1.0).draw(20_000, (4,), 4)["0.weight"]
    assert weights.mean(0).abs().max() <= 0.02
    torch.testing.assert_close(weights.square().mean(0), torch.full((4, 4), 0.25), rtol=0.05, atol=0)
