"""Direct PPO from scratch against direct PPO from a learner taught on a dataset, in environment steps to a level.

    python benchmarks/head_start.py halfcheetah_plain --levels 1000 2000 4000

Both have the settings of ``conf/ppo``: 16 environments × 128 steps an iteration, PPO's defaults. From each seed one run of
each; the returns are means of whole episodes of the policy as it is then, sampled actions.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean
from typing import Any

import lightning as L
import marked
import torch
from training import train

from lightning_distill import PPO, CollectorDataModule, load
from lightning_distill.envs import env_spec
from lightning_distill.evaluation import VALIDATION_SEED, Evaluator

NUM_ENVS, ROLLOUT = 16, 128


class Curve(L.Callback):
    """Keeps (environment steps, mean return), ``points`` of them evenly spread over the run, beside the one before it."""

    def __init__(self, evaluator: Evaluator, points: int) -> None:
        self.evaluator, self.points, self.curve = evaluator, points, []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._measure(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = (batch_idx + 1) * self.points
        if done // trainer.num_training_batches > (done - self.points) // trainer.num_training_batches:
            self._measure(pl_module)

    def _measure(self, pl_module: Any) -> None:
        found = self.evaluator.play(pl_module.present_policy, seed=VALIDATION_SEED)
        self.curve.append((int(pl_module.env_steps), found.mean))


def curve(name: str, start: bool, seed: int, evaluator: Evaluator, args: argparse.Namespace) -> list[tuple[int, float]]:
    L.seed_everything(seed, verbose=False)
    sizes = {"env_steps": args.env_steps, "num_envs": NUM_ENVS, "rollout_length": ROLLOUT}
    data = CollectorDataModule(load(name).env, threads=args.threads, **sizes)
    kept = Curve(evaluator, args.points)
    train(PPO(data.spec, start=name if start else None), data, kept, accelerator="cpu")
    return kept.curve


def steps_to(level: float, points: list[tuple[int, float]]) -> float:
    """Environment steps after which the return is at least ``level``; infinite if it never is."""
    return next((steps for steps, value in points if value >= level), math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--levels", type=float, nargs="+", required=True)
    parser.add_argument("--env_steps", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=8, help="of each point")
    parser.add_argument("--threads", type=int, default=2, help="of the simulator")
    args = parser.parse_args()

    torch.set_num_threads(1)
    evaluator = Evaluator(env_spec(load(args.dataset).env), args.episodes, threads=args.threads)
    rows = []
    for start in (False, True):
        curves = [curve(args.dataset, start, seed, evaluator, args) for seed in args.seeds]
        at = [curves[0][round(share * args.points)][0] for share in (0, 0.25, 0.5, 1)]
        cells = [
            " ".join(f"{dict(points)[steps]:.0f}" for points in curves)
            + f" ({mean(dict(p)[steps] for p in curves):.0f})"
            for steps in at
        ]
        reached = []
        for level in args.levels:
            steps = [steps_to(level, points) for points in curves]
            reached.append(" ".join("–" if math.isinf(s) else f"{s / 1000:.0f} k" for s in steps))
        rows.append([f"a learner taught on `{args.dataset}`" if start else "scratch", *cells, *reached])
    header = ["PPO from", *(f"return after {s / 1000:.0f} k" for s in at), *(f"steps to {v:g}" for v in args.levels)]
    marked.write(f"head start {args.dataset}", marked.table(header, rows))


if __name__ == "__main__":
    main()
