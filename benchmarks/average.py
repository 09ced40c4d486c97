"""What the mean of taught learners reaches, the policy that ``conf/steady/`` has each of them imitate.

    python benchmarks/average.py walker2d_plain path/to/distilled.safetensors

40 whole episodes each, sampled with the dataset's noise. What is above the learners' own return is lost to the draw of learners.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from lightning_distill.dataset import load
from lightning_distill.envs import env_spec
from lightning_distill.evaluation import Evaluator, StackedActor
from lightning_distill.experts import TaughtLearners
from lightning_distill.policies import action_distribution
from lightning_distill.returns import Evaluation

EPISODES = 40


def average(name: str) -> Evaluation:
    """Returns of the mean policy of a dataset's learners."""
    dataset = load(name)
    spec = env_spec(dataset.env, dataset.env_kwargs)

    def mean_policy() -> StackedActor:
        expert = TaughtLearners(name, spec)

        def act(observation: Tensor, sample: bool = False) -> Tensor:
            output = expert.output(observation.flatten(0, 1).float()).unflatten(0, observation.shape[:2])
            distribution = action_distribution(output, expert.log_std)
            return distribution.sample() if sample else distribution.mode

        return act

    evaluator = Evaluator(spec, learners=EPISODES)
    try:
        return evaluator.play(mean_policy)
    finally:
        evaluator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", help="names in the zoo, or paths")
    for name in parser.parse_args().datasets:
        found = average(name)
        print(f"{name}: {found.mean:.0f} ± {found.ci95:.0f}, worst {found.worst:.0f}")


if __name__ == "__main__":
    main()
