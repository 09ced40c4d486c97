"""Put a run's dataset into the zoo: evaluate it by the protocol and write down the command that makes it again.

    python benchmarks/publish.py runs/CartPole-v1/version_0/distilled.safetensors cartpole_1d_plain \
        --command "lightning fit --config conf/cartpole_1d.yaml"

The returns in the file are of 100 fresh learners (Atari's whole games: 32) of the family it was distilled with, sampled and greedy.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lightning_distill import evaluate_all, load
from lightning_distill.matching import trained_family
from lightning_distill.returns import as_returns
from lightning_distill.tables import returns_table
from lightning_distill.teaching import with_encoder_level

ZOO = Path(__file__).parents[1] / "lightning_distill" / "zoo"


def without_folders(config: str) -> str:
    """The config with file names in place of absolute paths, which are nobody else's."""
    return re.sub(r"(?<![^\s'\"])/(?:[^\s/'\"]+/)+", "", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("name")
    parser.add_argument("--command", required=True)
    parser.add_argument("--learners", type=int, default=100)
    parser.add_argument("--encoder_level", type=int, help="first keep no more than so many layers of its encoder")
    args = parser.parse_args()

    from rich.console import Console

    dataset = load(args.dataset)
    if args.encoder_level is not None:
        dataset = with_encoder_level(dataset, args.encoder_level, trained_family(dataset))
    evaluations = evaluate_all(dataset, learners=args.learners, controls=False)
    Console().print(returns_table(args.name, evaluations))
    config = without_folders(dataset.metadata["config"])
    dataset = dataset.with_metadata(returns=as_returns(evaluations), command=args.command, config=config)
    print(dataset.save(ZOO / f"{args.name}.safetensors"))


if __name__ == "__main__":
    main()
