"""Keep what a finished run found, for the tables of RESULTS.md: a small JSON file in benchmarks/records/.

    python benchmarks/record.py runs/Hopper-v5/version_0 hopper --command "lightning fit --config conf/hopper.yaml"

Distillation and direct PPO alike; the name is that of the config. Nothing is typed: returns are those of the run's test,
the curve is its validation, minutes are those between the first and the last update without evaluation. What the runs took that it began
with is found in their folders, as its config names their files, and in those of the other runs that a pipeline chose it from; of files
that lie elsewhere say it by ``--before STEPS MINUTES``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import yaml

RECORDS = Path(__file__).parent / "records"


def spent(rows: list[dict[str, str]]) -> tuple[int, float, list]:
    """Environment steps and minutes of a run by what it logged, and its validation curve."""
    steps, curve, seconds, before = 0.0, [], 0.0, 0.0
    for row in rows:
        if row.get("env_steps"):
            steps = float(row["env_steps"])
        if row.get("steps/s"):
            seconds += (steps - before) / float(row["steps/s"])
            before = steps
        if row.get("val/return"):
            curve.append([steps, float(row["val/return"])])
    return int(steps), seconds / 60, curve


def spent_before(folder: Path) -> tuple[int, float]:
    """Environment steps and minutes of the runs whose files a run began with, and of those before them."""
    config = settings(folder)
    files = {"ckpt_path": config.get("ckpt_path"), **config["model"]["init_args"]}
    began_with = {key: run_of(files[key]) for key in ("ckpt_path", "start", "expert") if files.get(key)}
    steps, minutes = 0, 0.0
    for run in {each for one in began_with.values() for each in of_the_stage(one)}:
        # The steps of a run that goes on include those of the one that it goes on from.
        own = (0, 0.0) if run == began_with.get("ckpt_path") else spent(logged(run))[:2]
        for taken in (own, spent_before(run)):
            steps, minutes = steps + taken[0], minutes + taken[1]
    return steps, minutes


def run_of(file: str) -> Path:
    """The folder of the run that wrote a file."""
    found = next((parent for parent in Path(file).parents if (parent / "metrics.csv").is_file()), None)
    if found is None:
        raise SystemExit(f"{file}: not in the folder of its run: say by --before STEPS MINUTES what it took")
    return found


def of_the_stage(run: Path) -> list[Path]:
    """The runs of which a pipeline took this one as the best; it alone where there were no others."""
    stage = next((parent for parent in run.parents if (parent / "finished.json").is_file()), None)
    if stage is None or not stage.name.isdigit():
        return [run]
    finished = sorted(stage.parent.glob("*/finished.json"))
    return [Path(json.loads(path.read_text())["folder"]) for path in finished]


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def settings(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def record(folder: Path, name: str, command: str, before: tuple[int, float] | None = None) -> dict:
    """What a run folder says: environment, method, pairs, family, seed, steps, minutes, returns of the test, validation curve."""
    config, rows = settings(folder), logged(folder)
    steps, minutes, curve = spent(rows)
    before = before or spent_before(folder)
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
        "env_steps": steps,
        "minutes": round(minutes, 2),
        "before": {"env_steps": int(before[0]), "minutes": round(before[1], 2)},
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
    parser.add_argument("--before", nargs=2, type=float, metavar=("STEPS", "MINUTES"))
    args = parser.parse_args()
    found = record(args.folder, args.name, args.command, args.before)
    path = RECORDS / f"{found['method']}-{args.name}-{found['env']}-seed{found['seed']}.json".replace("/", "_")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
