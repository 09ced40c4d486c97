"""Write the tables of RESULTS.md from the files of the zoo and from benchmarks/records/: never by hand.

python benchmarks/results.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_distill.dataset import load, zoo

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
RECORDS = Path(__file__).parent / "records"
CURVES = Path(__file__).parents[1] / "docs" / "learning_curves.png"
#: Sampled actions; the datasets of Wilhelm & Ventura 2025 (DOI 10.5281/zenodo.16658503), imported and evaluated here: see
#: the section on imported files. Their MuJoCo environments are of version v4 and come without a normaliser.
AUTHORS = {
    "CartPole-v1": 500,
    "CartPole2D-v0": 358,
    "CartPole4D-v0": 132,
    "CartPole5D-v0": 91,
    "Ant-v4": 735,
    "HalfCheetah-v4": 832,
    "Hopper-v4": 252,
    "Humanoid-v4": 387,
    "HumanoidStandup-v4": 89_000,
    "InvertedDoublePendulum-v4": 132,
}


def line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(header: Iterable[str], rows: Iterable[str]) -> list[str]:
    columns = list(header)
    return [line(*columns), "|" + "---|" * len(columns), *rows]


def interval(entry: dict[str, Any]) -> str:
    return f"{entry['mean']:.1f} ± {entry['ci95']:.1f}"


def zoo_table() -> list[str]:
    rows = []
    for name in zoo():
        dataset = load(name)
        returns = dataset.metadata["returns"]["in-distribution"]
        rows.append(
            line(
                f"`{name}`",
                dataset.env,
                dataset.pairs,
                dataset.step_rule,
                f"{dataset.metadata['env_steps'] / 1e6:.2f} M",
                dataset.metadata["seed"],
                interval(returns["sampled"]),
                f"{returns['sampled']['worst']:.1f}",
                interval(returns["greedy"]),
                f"`{dataset.metadata['command']}`",
            )
        )
    header = ("dataset", "environment", "pairs", "step rule", "steps", "seed", "sampled", "worst", "greedy", "command")
    return table(header, rows)


def records() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of all seeds, by command and method."""
    found = defaultdict(list)
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        found[record["command"], record["method"]].append(record)
    return {key: sorted(group, key=lambda record: record["seed"]) for key, group in sorted(found.items())}


def suite_table() -> list[str]:
    groups = records()
    direct = {group[0]["env"]: group for (_, method), group in groups.items() if method == "PPO"}
    rows = []
    for (command, method), group in groups.items():
        first, sampled = group[0], [record["returns"]["sampled"] for record in group]
        ppo = "" if method == "PPO" else _mean(direct.get(first["env"], []))
        rows.append(
            line(
                first["env"],
                "PPO" if method == "PPO" else f"{first['pairs']} pairs",
                f"{first['env_steps'] / 1e6:.2f} M",
                f"{mean(record['minutes'] for record in group):.1f}",
                ", ".join(f"{entry['mean']:.0f} ± {entry['ci95']:.0f}" for entry in sampled),
                f"{mean(entry['mean'] for entry in sampled):.0f}",
                f"{min(entry['worst'] for entry in sampled):.0f}" if "worst" in sampled[0] else "",
                f"{mean(record['returns']['greedy']['mean'] for record in group):.0f}",
                ppo,
                AUTHORS.get(first["env"], "") if method != "PPO" else "",
                f"`{command}`",
            )
        )
    header = ("environment", "what", "steps", "minutes", "sampled, by seed", "mean", "worst learner", "greedy", "PPO")
    return table([*header, "authors'", "command"], rows)


def _mean(group: list[dict[str, Any]]) -> str:
    return f"{mean(record['returns']['sampled']['mean'] for record in group):.0f}" if group else ""


def draw_curves() -> None:
    """Validation returns against environment steps of every environment that both methods have records of."""
    from matplotlib.figure import Figure

    by_env: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (_, method), group in records().items():
        for record in group:
            by_env[record["env"]][method].append(record["curve"])
    both = {env: methods for env, methods in by_env.items() if len(methods) > 1}
    if not both:
        return
    figure = Figure(figsize=(4 * len(both), 3), layout="constrained")
    for axes, (env, methods) in zip(figure.subplots(1, len(both), squeeze=False)[0], both.items(), strict=True):
        for (method, curves), colour in zip(sorted(methods.items()), ("C0", "C1"), strict=False):
            for curve in curves:
                steps, returns = zip(*curve, strict=True)
                label = {"MetaPPO": "distillation", "PPO": "direct PPO"}.get(method, method)
                axes.plot([s / 1e6 for s in steps], returns, colour, label=label if curve is curves[0] else None)
        axes.set(title=env, xlabel="environment steps (millions)", ylabel="return, validation")
        axes.legend()
    figure.savefig(CURVES, dpi=80)


def main() -> None:
    text = RESULTS.read_text()
    for name, content in (("zoo", zoo_table()), ("suite", suite_table())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        content = "\n".join([begin, *content, end])
        text = re.sub(f"{begin}.*{end}", lambda _, content=content: content, text, flags=re.DOTALL)
    RESULTS.write_text(text)
    draw_curves()


if __name__ == "__main__":
    main()
