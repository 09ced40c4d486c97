"""Other fresh learners than those whose returns a file states: how steady its return is, and how many of them fail.

    python benchmarks/others.py               # all of the zoo but games, about half an hour on one core
    python benchmarks/others.py halfcheetah_plain ant_plain

300 learners of the family that the file was distilled with, one episode each, sampled actions, seed 2. Where some of these fail, 100 play
five episodes each: a learner that can play falls now and then, one that cannot falls every time. What is found goes into
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
LEARNERS, JUDGED, EPISODES, SEED = 300, 100, 5, 2


def kept() -> dict[str, dict[str, Any]]:
    """All that was found, by the files' names."""
    return json.loads(FOUND.read_text()) if FOUND.is_file() else {}


def found(name: str, dataset: DistilledDataset) -> dict[str, Any] | None:
    """What was found of a file of the zoo; None of one that was made since."""
    entry = kept().get(name, {})
    return entry if entry.get("created") == dataset.metadata["created"] else None


def measured(dataset: DistilledDataset, learners: int, episodes: int, threads: int) -> dict[str, Any]:
    """Returns, and how many learners have less than half of their mean."""
    evaluation = evaluate(dataset, learners=learners, episodes=episodes, seed=SEED, threads=threads)
    # Of costs (Pusher, Reacher) no share of the mean says who failed.
    failed = int((evaluation.per_learner < evaluation.mean / 2).sum()) if evaluation.mean > 0 else None
    return evaluation.as_dict() | {"failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="datasets of the zoo; default: all but games")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.names or [name for name in zoo() if not load(name).env.startswith("ALE/")]:
        dataset = load(name)
        entry = measured(dataset, LEARNERS, 1, arguments.threads) | {"created": dataset.metadata["created"]}
        if entry["failed"]:
            entry["judged"] = measured(dataset, JUDGED, EPISODES, arguments.threads)
        entries = sorted((kept() | {name: entry}).items())
        write_atomically(FOUND, (json.dumps(dict(entries), indent=1) + "\n").encode())
        for kind in (entry, entry.get("judged")):
            if kind is not None:
                print(
                    f"{name:24} {kind['learners']} learners × {kind['episodes']}: {kind['mean']:9.1f} ± {kind['ci95']:.1f}, "
                    f"worst {kind['worst']:.1f}, failed: {kind['failed']}"
                )


if __name__ == "__main__":
    main()
