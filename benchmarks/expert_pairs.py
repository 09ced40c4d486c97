"""Are distilled pairs better than an expert's own? n expert pairs, at random or by k-means, against the n distilled ones.

    python benchmarks/expert_pairs.py cartpole_1d_plain halfcheetah_plain

The expert is a learner taught on the distilled dataset itself, so all rows share the level that is to be reached. Its
observations are collected over 20 greedy episodes, with its outputs (logits or action means) as targets. Expert pairs are
taught by one SGD step, and by many, each of the best of twelve step sizes; the size is chosen on other learners than
those reported.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import marked
import numpy as np
import torch

from lightning_distill import MLP, DistilledDataset, load
from lightning_distill.envs import env_spec, make_env, stream_seed
from lightning_distill.evaluation import Evaluator
from lightning_distill.learners import Params
from lightning_distill.returns import Evaluation
from lightning_distill.step_rules import sgd

EPISODES, SELECTION_SEED, REPORT_SEED = 20, 100, 1


def expert_samples(dataset: DistilledDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised observations [m, *obs] and expert's outputs [m, d] of whole episodes played greedily."""
    family, spec = MLP(), env_spec(dataset.env, dataset.env_kwargs)
    torch.manual_seed(0)
    params = family.draw(1, spec.observation_shape, spec.actions)
    params = sgd(family, params, dataset.observations, dataset.targets, dataset.learning_rate)
    env = make_env(spec, EPISODES, stream_seed(7, evaluation=True))
    state, playing = env.reset(), torch.ones(EPISODES, dtype=torch.bool)
    observations, outputs = [], []
    while playing.any():
        observation = dataset.normalise(state["observation"].float())
        output = family.forward(params, observation.unsqueeze(0))[0]
        observations.append(observation[playing])
        outputs.append(output[playing])
        state["action"] = output.argmax(-1) if dataset.log_std is None else output
        step, state = env.step_and_maybe_reset(state)
        playing &= ~step["next", "done"].squeeze(-1)
    return torch.cat(observations), torch.cat(outputs)


def nearest_to_centres(points: torch.Tensor, n: int, rounds: int = 25) -> torch.Tensor:
    """Indices of the points nearest to the n centres of Lloyd's k-means."""
    points = points.flatten(1)
    centres = points[torch.randperm(len(points))[:n]]
    for _ in range(rounds):
        label = torch.cdist(points, centres).argmin(1)
        centres = torch.stack([points[label == k].mean(0) if (label == k).any() else centres[k] for k in range(n)])
    return torch.cdist(centres, points).argmin(1)


class ManySteps(MLP):
    """Draws learners that have already taken some SGD steps on a dataset."""

    def __init__(self, dataset: DistilledDataset, steps: int) -> None:
        super().__init__()
        self.dataset, self.steps = dataset, steps

    def draw(self, *args: Any, **kwargs: Any) -> Params:
        params, data = super().draw(*args, **kwargs), self.dataset
        for _ in range(self.steps):
            params = sgd(self, params, data.observations, data.targets, data.learning_rate)
        return params


def diverges(dataset: DistilledDataset, steps: int) -> bool:
    """Whether learners' outputs on the pairs explode: such a step size is out of the question, and unsafe to simulate."""
    family = ManySteps(dataset, steps)
    params = family.draw(10, dataset.observation_shape, dataset.outputs)
    outputs = family.forward(params, dataset.observations.expand(10, *dataset.observations.shape))
    return not bool(outputs.abs().max() < 1e3)


def returns(dataset: DistilledDataset, evaluator: Evaluator, seed: int, steps: int) -> Evaluation:
    """Of fresh learners after ``steps`` SGD steps, of which the evaluation takes the last; sampled actions."""
    return evaluator(dataset, ManySteps(dataset, steps - 1), seed=seed)


def rows_of(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one dataset."""
    dataset = load(name)
    spec = env_spec(dataset.env, dataset.env_kwargs)
    few, all_ = Evaluator(spec, learners=10), Evaluator(spec, learners=args.learners)
    observations, outputs = expert_samples(dataset)
    torch.manual_seed(1)
    n, rows = dataset.pairs, []
    chosen = {"random": torch.randperm(len(observations))[:n], "k-means": nearest_to_centres(observations, n)}

    def report(pairs: str, data: DistilledDataset, steps: int) -> None:
        found, size = returns(data, all_, REPORT_SEED, steps), data.learning_rate.item()
        rows.append(
            [
                f"`{name}` ({n})",
                pairs,
                steps,
                f"{size:.3g}",
                f"{found.mean:.1f} ± {found.ci95:.1f}",
                f"{found.worst:.1f}",
            ]
        )
        print(*rows[-1], flush=True)

    report("distilled", dataset, 1)
    for title, index in chosen.items():
        pairs = dataclasses.replace(dataset, observations=observations[index], targets=outputs[index])

        def sized(size: float, pairs: DistilledDataset = pairs) -> DistilledDataset:
            return dataclasses.replace(pairs, learning_rate=torch.tensor(float(size)))

        for steps in (1, args.many):
            # One step bears, and needs, larger steps than many do.
            sizes = np.geomspace(0.01, 30, 12) * (1 if steps == 1 else 0.1)
            sizes = [size for size in sizes if not diverges(sized(size), steps)]
            scores = [returns(sized(size), few, SELECTION_SEED, steps).mean for size in sizes]
            report(f"expert's, {title}", sized(sizes[int(np.argmax(scores))]), steps)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--learners", type=int, default=100)
    parser.add_argument("--many", type=int, default=1000, help="steps of the rows with many steps")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows = [row for name in args.datasets for row in rows_of(name, args)]
    header = ["dataset (pairs)", "pairs", "steps", "step size", "return ± 95 % CI", "worst"]
    marked.write("expert pairs", marked.table(header, rows))


if __name__ == "__main__":
    main()
