"""What a run costs, extrapolated from its first iterations: the table of docs/costs.md.

    python benchmarks/costs.py conf/*.yaml

Each config runs in a process of its own, without evaluations; rows of configs that are not named stay. CPU time is of all
threads: what else the machine does changes it little, unlike the time on the clock, of which it is an upper bound on one core.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import marked

ITERATIONS, WARM_UP = 8, 2
COSTS = Path(__file__).parents[1] / "docs" / "costs.md"
MARK = "costs:"


class Costs(L.Callback):
    """Prints CPU seconds and environment steps of the iterations after the warm-up, and the process's peak memory."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP - 1:
            self.began, self.steps = time.process_time(), int(pl_module.env_steps)
        if batch_idx == ITERATIONS - 1:
            costs = {
                "cpu": time.process_time() - self.began,
                "steps": int(pl_module.env_steps) - self.steps,
                "all_steps": trainer.datamodule.env_steps,
                "mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts KiB
            }
            print(MARK, json.dumps(costs), flush=True)


def measure(config: Path) -> dict[str, float]:
    options = [
        f"--trainer.limit_train_batches={ITERATIONS}",
        "--trainer.limit_val_batches=0",
        "--trainer.limit_test_batches=0",
        "--trainer.enable_checkpointing=false",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--model.critic_warmup=0",  # most iterations are not of it
        "--trainer.callbacks+=costs.Costs",
    ]
    command = [sys.executable, "-m", "lightning_distill.cli", "fit", f"--config={config.resolve()}", *options]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"{config}: {done.stderr[-2000:]}")


def main() -> None:
    before = [line.strip("| ").split(" | ") for line in COSTS.read_text().splitlines() if line.startswith("| `conf/")]
    rows = {name: numbers for name, *numbers in before}
    for config in map(Path, sys.argv[1:]):
        found, name = measure(config), f"`{config}`"
        per_second = found["steps"] / found["cpu"]
        minutes = found["all_steps"] / per_second / 60
        rows[name] = [
            f"{found['all_steps'] / 1e6:g} M",
            f"{per_second:,.0f}",
            f"{minutes:.1f}",
            f"{found['mebibytes']:.0f}",
        ]
        print(name, *rows[name], flush=True)
    header = [
        "config",
        "environment steps",
        "steps per CPU second",
        "CPU minutes of training",
        "peak memory, MiB",
    ]
    names = sorted(rows, key=lambda name: (name.count("/"), name))
    marked.write("costs", marked.table(header, ([name, *rows[name]] for name in names)), COSTS)


if __name__ == "__main__":
    main()
