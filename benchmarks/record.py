"""Keep what a finished run found, for the tables of RESULTS.md: a small JSON file in benchmarks/records/.

    python benchmarks/record.py runs/Hopper-v5/version_0 hopper --command "lightning fit --config conf/hopper.yaml"

Distillation and direct PPO alike; the name is that of the config. Nothing is typed: returns are those of the run's test,
the curve is its validation, minutes are those between the first and the last update without evaluation.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import yaml

RECORDS = Path(__file__).parent / "records"


def record(folder: Path, name: str, command: str) -> dict:
    """What a run folder says: environment, method, pairs, family, seed, steps, minutes, returns of the test, validation curve."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    steps, curve, seconds, before = 0.0, [], 0.0, 0.0
    for row in rows:
        if row.get("env_steps"):
            steps = float(row["env_steps"])
        if row.get("steps/s"):
            seconds += (steps - before) / float(row["steps/s"])
            before = steps
        if row.get("val/return"):
            curve.append([steps, float(row["val/return"])])
    last = [row for row in rows if row.get("test/return_sampled")]
    if not last:
        raise SystemExit(f"{folder}: the run was not tested")
    returns = {
        kind: {"mean": float(last[-1][f"test/return_{kind}"]), "ci95": float(last[-1][f"test/return_{kind}_ci95"])}
        for kind in ("sampled", "greedy")
    }
    model, arguments = config["model"]["class_path"].rpartition(".")[2], config["model"]["init_args"]
    found = {
        "name": name,
        "method": model,
        "env": config["data"]["env"],
        "pairs": arguments.get("pairs"),
        "family": arguments["family"] if isinstance(arguments["family"], str) else arguments["family"]["class_path"],
        "seed": config["seed_everything"],
        "env_steps": int(steps),
        "minutes": round(seconds / 60, 2),
        "returns": returns,
        "curve": curve,
        "command": command,
    }
    if (folder / "distilled.safetensors").is_file():
        from lightning_distill.dataset import load

        dataset = load(folder / "distilled.safetensors")
        found["pairs"] = dataset.pairs
        stated = dataset.metadata["returns"]["in-distribution"]
        for kind, entry in returns.items():
            entry["worst"] = stated[kind]["worst"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command", required=True)
    args = parser.parse_args()
    found = record(args.folder, args.name, args.command)
    path = RECORDS / f"{found['method']}-{args.name}-{found['env']}-seed{found['seed']}.json".replace("/", "_")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
