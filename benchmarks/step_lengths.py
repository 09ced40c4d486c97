"""Which step of the hidden layers different learners want, by the rule ``projection``, and how long: a table of docs/experiments.md.

    python benchmarks/step_lengths.py walker2d

For each family the error of 8 taught learners in % of the variance of what they should do, with one length of the step for all (no search): on the
pairs, and, after the stroke, on states that the mean of 16 learners taught on the dataset comes to with five times its noise. Along
the polar factor of each parameter's gradient, and along the gradient itself, by the same lengths.
"""

from __future__ import annotations

import argparse
import itertools
from unittest.mock import patch

import marked
import torch
from torch import Tensor

from lightning_distill import load, step_rules
from lightning_distill.dataset import DistilledDataset
from lightning_distill.envs import env_spec, make_env
from lightning_distill.experts import TaughtLearners
from lightning_distill.families import FAMILIES
from lightning_distill.teaching import teach_many

LENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHOWN = ("paper", "xavier", "width_512", "attention", "depth_5", "residual", "relu", "kaiming", "layer_norm")
DIRECTIONS = {
    "gradient": lambda gradient: step_rules._unit(step_rules._as_matrices(gradient)).view_as(gradient),
    "polar factor": step_rules._polar_factor,
}
LEARNERS, ENVIRONMENTS, STEPS, NOISE = 8, 16, 300, 5.0


@torch.no_grad()
def states(dataset: DistilledDataset, expert: TaughtLearners) -> Tensor:
    """Observations [m, *obs] of the disturbed expert."""
    env = make_env(env_spec(dataset.env, dataset.env_kwargs), ENVIRONMENTS, seed=1)
    state, seen = env.reset(), []
    for _ in range(STEPS):
        seen.append(state["observation"].float())
        output = expert.output(seen[-1])
        state["action"] = output + NOISE * expert.log_std.exp() * torch.randn_like(output)
        _, state = env.step_and_maybe_reset(state)
    env.close()
    return torch.cat(seen)


def error(outputs: Tensor, expected: Tensor) -> float:
    return (100 * (outputs - expected).square().mean() / expected.var(0).mean()).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    args = parser.parse_args()
    torch.manual_seed(1)
    dataset = load(args.dataset)
    if dataset.log_std is None:
        parser.error(
            f"dataset={args.dataset}: has {dataset.action_type} actions; allowed are datasets with continuous ones"
        )
    expert = TaughtLearners(args.dataset, env_spec(dataset.env, dataset.env_kwargs))
    seen = states(dataset, expert)
    wanted = expert.output(seen)
    pairs = dataset.observations * dataset.observation_std + dataset.observation_mean
    rows = []
    for name, (kind, along) in itertools.product(SHOWN, DIRECTIONS.items()):
        cells = []
        for length in LENGTHS:
            with patch.multiple("lightning_distill.step_rules", LENGTHS=(length,), _polar_factor=along):
                torch.manual_seed(1)
                taught = teach_many(FAMILIES[name], dataset, LEARNERS)
            on_pairs, on_states = (taught(each.expand(LEARNERS, *each.shape)) for each in (pairs, seen))
            cells.append(f"{error(on_pairs, dataset.targets):.2g} / {error(on_states, wanted):.2g}")
        rows.append([name.replace("_", " "), kind, *cells])
    heads = [f"κ = {LENGTHS[0]:g}", *(f"{length:g}" for length in LENGTHS[1:])]
    marked.write("step lengths", marked.table(["family", "along", *heads], rows), marked.EXPERIMENTS)


if __name__ == "__main__":
    main()
