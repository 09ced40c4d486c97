"""Return against the number of pairs, from the folders that ``lightning-distill search`` leaves: a table of RESULTS.md.

    lightning-distill search conf/halfcheetah.yaml --pairs 1 2 4 8 16 64 512 --level 1e9 --output runs/pairs/halfcheetah
    python benchmarks/pairs.py pairs runs/pairs/*

A level that no run reaches makes the search run them all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import marked

from lightning_distill import load


def table(folders: list[Path]) -> str:
    """One row for each finished run below searches' folders.

    Raises:
        SystemExit: a folder has none.
    """
    rows = []
    for folder in folders:
        runs = [Path(json.loads(path.read_text())["folder"]) for path in folder.glob("pairs_*/finished.json")]
        if not runs:
            raise SystemExit(
                f"error: no finished run in {folder}; allowed are --output folders of lightning-distill search"
            )
        for dataset in sorted((load(run / "distilled.safetensors") for run in runs), key=len):
            kinds = dataset.metadata["returns"]["in-distribution"]
            cells = [marked.interval(kinds[kind]) for kind in ("sampled", "greedy")]
            steps, seed = dataset.metadata["env_steps"], dataset.metadata["seed"]
            rows.append(
                [dataset.env, len(dataset), *cells, f"{kinds['sampled']['worst']:.1f}", f"{steps / 1e6:.2f} M", seed]
            )
    header = ["environment", "pairs", "sampled", "greedy", "worst learner", "steps of the best", "seed"]
    return marked.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the table's marks in RESULTS.md")
    parser.add_argument("folders", type=Path, nargs="+", help="--output of searches")
    args = parser.parse_args()
    marked.write(args.name, table(args.folders))


if __name__ == "__main__":
    main()
