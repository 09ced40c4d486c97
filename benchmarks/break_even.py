"""Distil once and teach N networks, against training N policies by PPO: when does it pay?

    python benchmarks/break_even.py cartpole_1d_plain halfcheetah_plain

For each dataset of the zoo whose environment has a config in conf/ppo/: CPU minutes of all the training that its command's configs
and that one ask for, extrapolated from their first iterations as in costs.py, and the time to teach; a table in RESULTS.md, and docs/break_even.png. Of a command's options `--data.env_steps` is known,
others that change what a run takes are not. Returns are those of the files: the dataset's, and of PPO those in benchmarks/records/.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path

import costs
import marked
import results
import torch
from matplotlib.figure import Figure

from lightning_distill import MLP, load, teach_many
from lightning_distill.dataset import DistilledDataset

ROOT = costs.COSTS.parents[1]
PICTURE = ROOT / "docs" / "break_even.png"
#: Of how many agents the picture shows the time.
AGENTS = (1, 1000)


def runs_of(command: str) -> list[tuple[str, str]]:
    """Configs in a command, each with the environment steps that are said of it before the next; "" where none are."""
    parts = [f"conf/{part}" for part in command.split("conf/")[1:]]
    steps = [re.search(r"--data\.env_steps=([\d_]+)", part) for part in parts]
    configs = [re.match(r"\S+\.yaml", part).group() for part in parts]
    return [(config, found.group(1) if found else "") for config, found in zip(configs, steps, strict=True)]


def minutes(config: str, steps: str = "") -> tuple[float, int]:
    """CPU minutes of a run of ``conf/…``, and its environment steps: those of the config, or others."""
    found = costs.measure(ROOT / config)
    taken = int(steps or found["all_steps"])
    return found["cpu"] * taken / found["steps"] / 60, taken


def teaching_seconds(dataset: DistilledDataset, learners: int) -> float:
    """CPU seconds of drawing and teaching so many; the second call's, as the first loads what torch loads late."""
    for _ in range(2):
        began = time.process_time()
        teach_many(MLP(), dataset, learners)
        taken = time.process_time() - began
    return taken


def draw(times: dict[str, tuple[float, float, float]]) -> None:
    """Minutes against the number of agents, by dataset; each of (distilling, teaching one, one PPO run) in minutes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    agents = torch.logspace(*(math.log10(end) for end in AGENTS), 100)
    for index, (name, (distil, teach, ppo)) in enumerate(times.items()):
        colour = f"C{index}"
        axes.plot(agents, distil + teach * agents, colour, label=f"{name}: distil once, teach N")
        axes.plot(agents, ppo * agents, colour, linestyle="--", label="N runs of direct PPO")
    axes.set(xscale="log", yscale="log", xlabel="agents N", ylabel="CPU minutes", xlim=AGENTS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, times = [], {}
    for name in args.datasets:
        dataset = load(name)
        runs = runs_of(dataset.metadata["command"])
        distil = sum(minutes(config, steps)[0] for config, steps in runs)
        ppo, steps = minutes(f"conf/ppo/{Path(runs[-1][0]).name}")
        one, thousand = (teaching_seconds(dataset, learners) for learners in (1, 1000))
        teach = thousand / 1000 / 60
        times[name] = distil, teach, ppo
        least = math.floor(distil / (ppo - teach)) + 1
        rows.append(
            [
                f"`{name}`",
                f"{distil:.1f}",
                f"{dataset.metadata['returns']['in-distribution']['sampled']['mean']:.0f}",
                f"{one * 1000:.1f} ms",
                f"{thousand:.2f} s",
                f"{ppo:.1f}",
                results.of_environment(dataset.env, results.ppo_returns(steps)),
                f"{distil + 100 * thousand / 60000:.1f} / {100 * ppo:.0f}",
                least,
            ]
        )
    header = ["dataset", "distil, minutes", "return of learners", "teach one", "teach 1000", "PPO, minutes"]
    header += ["its return", "100 agents, minutes: taught / PPO", "break-even N"]
    marked.write("break-even", marked.table(header, rows))
    draw(times)


if __name__ == "__main__":
    main()
