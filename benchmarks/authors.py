"""The datasets that the paper's authors released, by our protocol: benchmarks/authors/*.json and a table of RESULTS.md.

    python benchmarks/authors.py FOLDER/*

FOLDER holds their files (DOI 10.5281/zenodo.16658503); those that are not in the list below are left out. 100 fresh learners each, one step, one episode. MuJoCo's come without an
observation normaliser: learners are fed observations as they are, clipped to ±10.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import marked
import torch

from lightning_distill import evaluate_all
from lightning_distill.importing import import_released
from lightning_distill.returns import IN_DISTRIBUTION, as_returns

RECORDS = Path(__file__).with_suffix("")
#: File → environment.
FILES = {
    "cartpole_1dcp_b2.pt": "CartPole-v1",
    "cartpole_1dcp_b512.pt": "CartPole-v1",
    "cartpole_2dcp_b3.pt": "CartPole2D-v0",
    "cartpole_2dcp_b512.pt": "CartPole2D-v0",
    "cartpole_4dcp_b5.pt": "CartPole4D-v0",
    "cartpole_4dcp_b512.pt": "CartPole4D-v0",
    "cartpole_5dcp_b6.pt": "CartPole5D-v0",
    "cartpole_5dcp_b512.pt": "CartPole5D-v0",
    "halfcheetah_b64.ckpt": "HalfCheetah-v4",
    "hopper_b64.ckpt": "Hopper-v4",
    "inverteddoublependulum_b64.ckpt": "InvertedDoublePendulum-v4",
    "ant_b64.ckpt": "Ant-v4",
    "humanoid_b64.ckpt": "Humanoid-v4",
    "humanoidstandup_b64.ckpt": "HumanoidStandup-v4",
}


def measure(path: Path, learners: int) -> None:
    """Evaluate one of their files, and keep what is found."""
    dataset = import_released(path, FILES[path.name])
    found = as_returns(evaluate_all(dataset, controls=False, learners=learners, threads=1))[IN_DISTRIBUTION]
    command = f"lightning-distill import {path.name} --env {dataset.env} -o OUT --evaluate {learners}"
    record = {"file": path.name, "env": dataset.env, "pairs": len(dataset), "returns": found, "command": command}
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{path.name}.json").write_text(json.dumps(record, indent=1) + "\n")


def records() -> list[dict[str, Any]]:
    """What was found, in the order of the list above."""
    paths = [RECORDS / f"{file}.json" for file in FILES]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="without them, the table is written anew from the records")
    parser.add_argument("--learners", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for path in args.files:
        if path.name in FILES:
            measure(path, args.learners)
    rows = []
    for record in records():
        cells = map(marked.interval, record["returns"].values())
        worst = record["returns"]["sampled"]["worst"]
        rows.append([f"`{record['file']}`", record["env"], record["pairs"], *cells, f"{worst:.1f}"])
    header = ["file", "environment", "pairs", "sampled", "greedy", "worst learner, sampled"]
    marked.write("authors", marked.table(header, rows))


if __name__ == "__main__":
    main()
