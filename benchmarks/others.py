"""Other fresh learners than those whose returns a file states: how steady its return is, and how many of them fail.

    python benchmarks/others.py               # all of the zoo but games, about half an hour on one core
    python benchmarks/others.py halfcheetah_plain ant_plain

300 learners of the family that the file was distilled with, one episode each, sampled actions, seed 2. What is found goes into
`benchmarks/others.json`, and from there into the zoo's table by `benchmarks/results.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_distill import DistilledDataset, evaluate, load
from lightning_distill.dataset import write_atomically, zoo

FOUND = Path(__file__).parent / "others.json"
LEARNERS, SEED = 300, 2


def kept() -> dict[str, dict[str, Any]]:
    """All that was found, by the files' names."""
    return json.loads(FOUND.read_text()) if FOUND.is_file() else {}


def found(name: str, dataset: DistilledDataset) -> dict[str, Any] | None:
    """What was found of a file of the zoo; None of one that was made since."""
    entry = kept().get(name, {})
    return entry if entry.get("created") == dataset.metadata["created"] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="datasets of the zoo; default: all but games")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.names or [name for name in zoo() if not load(name).env.startswith("ALE/")]:
        dataset = load(name)
        evaluation = evaluate(dataset, learners=LEARNERS, seed=SEED, threads=arguments.threads)
        returns = evaluation.per_learner
        # Of costs (Pusher, Reacher) no share of the mean says who failed.
        failed = int((returns < evaluation.mean / 2).sum()) if evaluation.mean > 0 else None
        entry = evaluation.as_dict() | {"failed": failed, "created": dataset.metadata["created"]}
        entries = sorted((kept() | {name: entry}).items())
        write_atomically(FOUND, (json.dumps(dict(entries), indent=1) + "\n").encode())
        print(f"{name:24} {entry['mean']:9.1f} ± {entry['ci95']:.1f}, worst {entry['worst']:.1f}, failed: {failed}")


if __name__ == "__main__":
    main()
