"""Write the tables of RESULTS.md from the files of the zoo: never by hand.

python benchmarks/results.py
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_distill.dataset import load, zoo

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


def row(name: str) -> str:
    dataset = load(name)
    returns = dataset.metadata["returns"]["in-distribution"]

    def cell(kind: str) -> str:
        entry = returns[kind]
        return f"{entry['mean']:.1f} ± {entry['ci95']:.1f}"

    steps = f"{dataset.metadata['env_steps'] / 1e6:.2f} M"
    cells = (
        f"`{name}`",
        dataset.env,
        dataset.pairs,
        steps,
        dataset.metadata["seed"],
        cell("sampled"),
        f"{returns['sampled']['worst']:.1f}",
        cell("greedy"),
        f"`{dataset.metadata['command']}`",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    table = [
        "| dataset | environment | pairs | steps | seed | sampled | worst | greedy | command |",
        "|---|---|---|---|---|---|---|---|---|",
        *[row(name) for name in zoo()],
    ]
    text = RESULTS.read_text()
    content = "\n".join([BEGIN, *table, END])
    RESULTS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: content, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
