"""Return against the number of pairs, from the folders that ``lightning-distill search`` leaves: a table of RESULTS.md.

    lightning-distill search conf/halfcheetah.yaml --pairs 1 2 4 8 16 64 512 --level 1e9 --output runs/pairs/halfcheetah
    python benchmarks/pairs.py pairs runs/pairs/*

A level that no run reaches makes the search run them all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import marked

from lightning_distill import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the table's marks in RESULTS.md")
    parser.add_argument("folders", type=Path, nargs="+", help="--output of searches")
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        datasets = sorted(map(load, folder.glob("pairs_*/distilled.safetensors")), key=len)
        for dataset in datasets:
            kinds = dataset.metadata["returns"]["in-distribution"]
            cells = [marked.interval(kinds[kind]) for kind in ("sampled", "greedy")]
            steps, seed = dataset.metadata["env_steps"], dataset.metadata["seed"]
            rows.append(
                [dataset.env, len(dataset), *cells, f"{kinds['sampled']['worst']:.1f}", f"{steps / 1e6:.2f} M", seed]
            )
    header = ["environment", "pairs", "sampled", "greedy", "worst learner", "steps of the best", "seed"]
    marked.write(args.name, marked.table(header, rows))


if __name__ == "__main__":
    main()
