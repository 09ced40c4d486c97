"""How much of a learner's error an expert forgives: its return while its outputs are a little wrong, before anything imitates it.

    python benchmarks/expert_errors.py Walker2d-v5 runs/…/checkpoints/last.ckpt walker2d_plain

Taught learners do what they imitate up to an error that stays the same for a learner's life: near the linear ones it is a linear map of their inputs. Here
each of 100 players has the outputs (I + εM) output + 0.3 εb, M and b standard normal and its own, without noise, for one episode; "fell" are players of less
than half the best one's return.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from lightning_distill.envs import EnvSpec, env_spec
from lightning_distill.evaluation import Evaluator, StackedActor
from lightning_distill.experts import Expert, expert_from
from lightning_distill.returns import Evaluation
from lightning_distill.teaching import seeded

PLAYERS = 100
ERRORS = (0.0, 0.02, 0.04)


def with_errors(expert: Expert, spec: EnvSpec, error: float) -> Evaluation:
    """Returns [players, 1] of an expert whose outputs are wrong by this share."""
    with seeded(0):
        maps = torch.eye(spec.actions) + error * torch.randn(PLAYERS, spec.actions, spec.actions)
        shifts = 0.3 * error * torch.randn(PLAYERS, spec.actions)

    def act(observation: Tensor, sample: bool = False) -> Tensor:
        output = expert.output(observation.flatten(0, 1).float()).unflatten(0, observation.shape[:2])
        return torch.einsum("pij,pej->pei", maps, output) + shifts.unsqueeze(1)

    def draw() -> StackedActor:
        return act

    evaluator = Evaluator(spec, learners=PLAYERS)
    try:
        return evaluator.play(draw, greedy=True)
    finally:
        evaluator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="with continuous actions")
    parser.add_argument("experts", nargs="+", help="checkpoints of PPO, names in the zoo, or paths of datasets")
    given = parser.parse_args()
    spec = env_spec(given.env)
    if spec.action_type != "continuous":
        parser.error(f"env={given.env}: has {spec.action_type} actions; allowed are environments with continuous ones")
    for name in given.experts:
        expert = expert_from(name, spec)
        for error in ERRORS:
            found = with_errors(expert, spec, error)
            fell = int((found.per_learner < found.per_learner.max() / 2).sum())
            print(
                f"{name}: error {error:.0%}: {found.mean:.0f} ± {found.ci95:.0f}, {fell} of {PLAYERS} fell", flush=True
            )


if __name__ == "__main__":
    main()
