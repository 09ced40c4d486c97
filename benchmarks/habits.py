"""What ordinary training habits make of a dataset that was distilled for one SGD step.

    python benchmarks/habits.py cartpole_1d_plain cartpole_5d_plain halfcheetah_plain

Every row: 100 fresh learners of the paper's family, trained on the pairs as the row says, sampled actions, one episode each.
η is the dataset's step size; it can be far beyond the step at which repeated ones diverge, so smaller ones are tried as well. "Fit" is
the median over learners of the mean squared error on the pairs that is left, as a share of that of answering 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import marked
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_distill import MLP, DistilledDataset, load
from lightning_distill.envs import env_spec
from lightning_distill.evaluation import Evaluator
from lightning_distill.learners import Params

Habit = tuple[Callable[[Iterable, float], Optimizer], int, int]

#: Name → optimiser of (parameters, η), steps, minibatches of one pass.
HABITS: dict[str, Habit] = {
    "one SGD step (the claim)": (lambda p, eta: SGD(p, eta), 1, 1),
    "one step of 2η": (lambda p, eta: SGD(p, 2 * eta), 1, 1),
    "one step of η/2": (lambda p, eta: SGD(p, eta / 2), 1, 1),
    "one step of η/10": (lambda p, eta: SGD(p, eta / 10), 1, 1),
    "one step of η/100": (lambda p, eta: SGD(p, eta / 100), 1, 1),
    "weight decay 0.01, one step": (lambda p, eta: SGD(p, eta, weight_decay=0.01), 1, 1),
    "2 steps": (lambda p, eta: SGD(p, eta), 2, 1),
    "10 steps": (lambda p, eta: SGD(p, eta), 10, 1),
    "10 steps of η/10": (lambda p, eta: SGD(p, eta / 10), 10, 1),
    "100 steps of η/100": (lambda p, eta: SGD(p, eta / 100), 100, 1),
    "1000 steps of η/100": (lambda p, eta: SGD(p, eta / 100), 1000, 1),
    "momentum 0.9, 100 steps of η/100": (lambda p, eta: SGD(p, eta / 100, momentum=0.9), 100, 1),
    "2 minibatches, one pass": (lambda p, eta: SGD(p, eta), 2, 2),
    "2 minibatches, 50 passes of η/100": (lambda p, eta: SGD(p, eta / 100), 100, 2),
    "Adam 1e-3, 100 steps": (lambda p, eta: Adam(p, 1e-3), 100, 1),
    "Adam 1e-2, 100 steps": (lambda p, eta: Adam(p, 1e-2), 100, 1),
    "AdamW 1e-3, decay 0.01, 100 steps": (lambda p, eta: AdamW(p, 1e-3, weight_decay=0.01), 100, 1),
}


class Trained(MLP):
    """Draws learners that have been trained on a dataset; stacked, as optimisers act on each number by itself."""

    def __init__(self, dataset: DistilledDataset, habit: Habit) -> None:
        super().__init__()
        self.dataset, self.habit = dataset, habit

    def draw(self, learners: int, *args: Any, **kwargs: Any) -> Params:
        make_optimizer, steps, minibatches = self.habit
        params = {name: value.requires_grad_() for name, value in super().draw(learners, *args, **kwargs).items()}
        optimizer = make_optimizer(params.values(), self.dataset.learning_rate.item())
        parts = torch.randperm(self.dataset.pairs).tensor_split(minibatches)
        with torch.enable_grad():
            for step in range(steps):
                x, y = self.dataset[parts[step % minibatches]]
                loss = (self.forward(params, x.expand(learners, *x.shape)) - y).square().flatten(1).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {name: value.detach() for name, value in params.items()}


def fit(family: Trained) -> float:
    """Error on the pairs that is left, as a share of that of answering 0."""
    dataset = family.dataset
    params = family.draw(10, dataset.observation_shape, dataset.outputs)
    outputs = family.forward(params, dataset.observations.expand(10, *dataset.observations.shape))
    errors = (outputs - dataset.targets).square().flatten(1).mean(1).median()
    return (errors / dataset.targets.square().mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--learners", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets = {name: load(name) for name in args.datasets}
    evaluators = {
        name: Evaluator(env_spec(dataset.env, dataset.env_kwargs), args.learners) for name, dataset in datasets.items()
    }
    rows = []
    for title, habit in HABITS.items():
        cells = []
        for name, dataset in datasets.items():
            family = Trained(dataset, habit)
            left = fit(family)
            if not left < 1e6:  # exploding outputs are unsafe to simulate
                cells += ["diverges", ""]
            else:
                found = evaluators[name](dataset, family, taught=False)
                cells += [f"{found.mean:.1f} ± {found.ci95:.1f}", f"{left:.2g}"]
        rows.append([title, *cells])
        print(*rows[-1], flush=True)
    header = [cell for name in datasets for cell in (f"`{name}`", "fit")]
    marked.write("habits", marked.table(["training", *header], rows))


if __name__ == "__main__":
    main()
