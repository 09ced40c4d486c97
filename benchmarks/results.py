"""Write the tables of RESULTS.md from the files of the zoo and from benchmarks/records/: never by hand.

python benchmarks/results.py
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import authors
import marked
import others

from lightning_distill.dataset import DistilledDataset, load, zoo

RECORDS = Path(__file__).parent / "records"
CURVES = Path(__file__).parents[1] / "docs" / "learning_curves.png"
COLUMNS = 4
SUITES = ("cartpole", "mujoco", "games")
#: In characters: what is longer stands below the table.
LONGEST_COMMAND = 80


def zoo_table() -> str:
    rows = []
    in_all = {
        (command, record["seed"]): f"{total(record, 'env_steps') / 1e6:.2f} M"
        for (command, _), group in records().items()
        for record in group
    }
    for name in zoo():
        dataset = load(name)
        returns = dataset.metadata["returns"]["in-distribution"]
        plain = dataset.metadata["returns"].get("in-distribution, sgd step", returns)
        rows.append(
            [
                f"`{name}`",
                dataset.env,
                dataset.pairs,
                dataset.step_rule,
                f"{dataset.metadata['env_steps'] / 1e6:.2f} M",
                in_all.get((dataset.metadata["command"], dataset.metadata["seed"]), ""),
                dataset.metadata["seed"],
                marked.interval(returns["sampled"]),
                f"{returns['sampled']['worst']:.1f}",
                marked.interval(returns["greedy"]),
                marked.interval(plain["sampled"]),
                *of_others(name, dataset),
                f"`{dataset.metadata['command']}`",
            ]
        )
    header = ["dataset", "environment", "pairs", "step rule", "its steps", "in all", "seed"]
    header += ["sampled", "worst", "greedy", "plain step, sampled", f"{others.LEARNERS} others", "worst", "failed"]
    header += [f"worst, {others.EPISODES} episodes", "failed"]
    return with_commands([*header, "command"], rows)


def of_others(name: str, dataset: DistilledDataset) -> tuple[str, ...]:
    """Mean, worst and number of failures of other learners, where they were measured; where some fail, of those judged by more episodes."""
    entry = others.found(name, dataset)
    if entry is None:
        return ("",) * 5
    return marked.interval(entry), *worst_and_failed(entry), *worst_and_failed(entry.get("judged"))


def worst_and_failed(entry: dict[str, Any] | None) -> tuple[str, str]:
    if entry is None:
        return "", ""
    return f"{entry['worst']:.1f}", "" if entry["failed"] is None else str(entry["failed"])


def with_commands(header: Sequence[str], rows: Sequence[list[Any]]) -> str:
    """A table whose last column is the command: a long one is a number there, and stands below the table."""
    long = list(dict.fromkeys(row[-1] for row in rows if len(row[-1]) > LONGEST_COMMAND))
    cells = [[*row[:-1], f"({long.index(row[-1]) + 1})" if row[-1] in long else row[-1]] for row in rows]
    notes = [f"{number}. {command}" for number, command in enumerate(long, 1)]
    return "\n".join([marked.table(header, cells), "", *notes])


@cache
def records() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of all seeds, by command and method, in the order of environments."""
    found = defaultdict(list)
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        found[record["command"], record["method"]].append(record)
    groups = sorted(found.items(), key=lambda entry: (entry[1][0]["env"], entry[0]))
    return {key: sorted(group, key=lambda record: record["seed"]) for key, group in groups}


def suite_of(env: str) -> str:
    return "games" if env.startswith("ALE/") else "cartpole" if env.startswith("CartPole") else "mujoco"


def suite_table(suite: str) -> str:
    theirs: dict[int, dict[str, float]] = defaultdict(dict)
    for record in authors.records():
        theirs[record["pairs"]][record["env"]] = record["returns"]["sampled"]["mean"]
    rows = []
    for (command, method), group in records().items():
        first, sampled = group[0], [record["returns"]["sampled"] for record in group]
        if suite_of(first["env"]) != suite:
            continue
        rows.append(
            [
                first["env"],
                what(method, first),
                f"{total(first, 'env_steps') / 1e6:.2f} M",
                f"{mean(total(record, 'minutes') for record in group):.1f}",
                ", ".join(f"{shown(entry['mean'])} ± {entry['ci95']:.{decimals(entry['mean'])}f}" for entry in sampled),
                shown(mean(entry["mean"] for entry in sampled)),
                shown(min(entry["worst"] for entry in sampled)) if "worst" in sampled[0] else "",
                shown(mean(record["returns"]["greedy"]["mean"] for record in group)),
                "" if method == "PPO" else of_environment(first["env"], ppo_returns(total(first, "env_steps"))),
                "" if method == "PPO" else of_environment(first["env"], theirs[first["pairs"]]),
                f"`{command}`",
            ]
        )
    header = ("environment", "what", "steps", "minutes", "sampled, by seed", "mean", "worst learner", "greedy", "PPO")
    return with_commands([*header, "authors'", "command"], rows)


def total(record: dict[str, Any], what: str) -> float:
    """Environment steps or minutes of a run and of those that it began with."""
    return record[what] + record.get("before", {}).get(what, 0)


def decimals(number: float) -> int:
    """Of a return: of small ones one counts."""
    return 0 if abs(number) >= 100 else 1


def shown(number: float) -> str:
    return f"{number:.{decimals(number)}f}"


def what(method: str, record: dict[str, Any]) -> str:
    """What a row is of: pairs and method, and learners that are not the paper's."""
    named = "PPO" if method == "PPO" else f"{record['pairs']} pairs{', by imitation' * (method == 'Imitation')}"
    return named if is_usual(record) else f"{named}, {record['family']}"


def is_usual(record: dict[str, Any]) -> bool:
    """Whether its learners are the paper's: what the first records, which do not say, are of."""
    return record.get("family", "paper") in ("paper", "nature")


def ppo_returns(steps: int) -> dict[str, float]:
    """Mean return of direct PPO by environment, over its runs of about so many steps: the nearest number that there is."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, method), group in records().items():
        if method == "PPO" and is_usual(group[0]):
            for record in group:
                found[record["env"]][record["env_steps"]].append(record["returns"]["sampled"]["mean"])
    return {env: mean(runs[min(runs, key=lambda made: abs(made - steps))]) for env, runs in found.items()}


def of_environment(env: str, returns: dict[str, float]) -> str:
    """The return of an environment; where there is none, that of another version of it, which is then named."""
    if env in returns:
        return shown(returns[env])
    name = env.rpartition("-")[0]
    other = next((known for known in returns if known.rpartition("-")[0] == name), None)
    return "" if other is None else f"{shown(returns[other])} ({other.rpartition('-')[2]})"


def tables() -> dict[str, str]:
    """The tables of RESULTS.md, by their marks."""
    return {"zoo": zoo_table()} | {suite: suite_table(suite) for suite in SUITES}


def draw_curves() -> None:
    """Validation returns against environment steps of every environment that both methods have records of."""
    from matplotlib.figure import Figure

    by_env: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for (command, method), group in records().items():
        # These begin where another run ended; and one curve is of one family.
        if method == "Imitation" or "model.start" in command or not is_usual(group[0]):
            continue
        for record in group:
            by_env[record["env"]][method].append(record["curve"])
    both = {env: methods for env, methods in by_env.items() if len(methods) > 1}
    if not both:
        return
    lines = math.ceil(len(both) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3 * lines), layout="constrained")
    for index, (env, methods) in enumerate(both.items(), 1):
        axes = figure.add_subplot(lines, COLUMNS, index)
        for (method, curves), colour in zip(sorted(methods.items()), ("C0", "C1"), strict=False):
            for curve in curves:
                steps, returns = zip(*curve, strict=True)
                label = {"MetaPPO": "distillation", "PPO": "direct PPO"}.get(method, method)
                axes.plot([s / 1e6 for s in steps], returns, colour, label=label if curve is curves[0] else None)
        axes.set(title=env, xlabel="environment steps (millions)", ylabel="return, validation")
        axes.legend()
    figure.savefig(CURVES, dpi=80)


def main() -> None:
    for name, content in tables().items():
        marked.write(name, content)
    draw_curves()


if __name__ == "__main__":
    main()
