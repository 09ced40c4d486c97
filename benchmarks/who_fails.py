"""Which learners of a mixture fail: a table of RESULTS.md, of every network that the mixture can draw.

    python benchmarks/who_fails.py humanoid

Each kind of network is taught and plays one episode with sampled actions; a learner fails that has less than half of the mean of all.
Rows are networks of one size; columns sum over initialisations.
"""

from __future__ import annotations

import argparse
from collections import Counter

import marked
import torch

from lightning_distill import load
from lightning_distill.envs import env_spec
from lightning_distill.evaluation import Evaluator
from lightning_distill.matching import trained_family
from lightning_distill.mixtures import members

SEED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name in the zoo, distilled with a mixture of MLPs")
    parser.add_argument("--learners", type=int, default=8, help="of each kind of network")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    dataset = load(args.dataset)
    evaluator = Evaluator(env_spec(dataset.env, dataset.env_kwargs), args.learners, threads=args.threads)
    kinds = members(trained_family(dataset))
    returns = torch.stack([evaluator(dataset, kind, seed=SEED).per_learner for kind in kinds])
    evaluator.close()
    failed, played = Counter(), Counter()
    for kind, its in zip(kinds, returns, strict=True):
        cell = (kind.width, kind.depth), kind.activation + (", layer norm" if kind.norm == "layer" else "")
        failed[cell] += int((its < returns.mean() / 2).sum())
        played[cell] += len(its)
    sizes, columns = (sorted(set(part)) for part in zip(*played, strict=True))
    rows = [
        [f"{size[1]} × {size[0]}", *(f"{failed[size, column]} of {played[size, column]}" for column in columns)]
        for size in sizes
    ]
    marked.write(f"who fails {args.dataset}", marked.table(["hidden layers", *columns], rows))
    print(f"{int(sum(failed.values()))} of {returns.numel()} learners, mean {returns.mean():.0f}")


if __name__ == "__main__":
    main()
