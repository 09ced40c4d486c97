"""Small datasets for tests, with the shapes of known environments."""

from __future__ import annotations

import torch

from lightning_distill import DistilledDataset

SHAPES = {
    "CartPole-v1": ((4,), 2, "discrete"),
    "HalfCheetah-v5": ((17,), 6, "continuous"),
    "InvertedPendulum-v5": ((4,), 1, "continuous"),
}


def make_dataset(env: str = "HalfCheetah-v5", pairs: int = 8, **changes) -> DistilledDataset:
    """A dataset of random pairs for one of ``SHAPES``; ``changes`` replace fields."""
    shape, outputs, action_type = SHAPES[env]
    generator = torch.Generator().manual_seed(pairs)
    fields = {
        "observations": torch.randn(pairs, *shape, generator=generator),
        "targets": torch.randn(pairs, outputs, generator=generator),
        "learning_rate": torch.tensor(0.7),
        "observation_mean": torch.linspace(-0.1, 0.2, shape[0]),
        "observation_std": torch.linspace(0.5, 1.5, shape[0]),
        "log_std": torch.linspace(-2.0, -1.0, outputs) if action_type == "continuous" else None,
        "env": env,
        "action_type": action_type,
    }
    return DistilledDataset(**fields | changes)
