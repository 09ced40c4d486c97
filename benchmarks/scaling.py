"""Environment steps a second of one process and of several (DDP), by the same command.

    python benchmarks/scaling.py HalfCheetah-v5
    python benchmarks/scaling.py CartPole-v1 --processes 2 --rounds 3

Every process has ``--num_envs`` environments and one simulator thread. One and several take turns, so that a change of the
machine's speed meets both; each figure is the median over a run's iterations, the ratio the median over rounds.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def steps_per_second(args: argparse.Namespace, processes: int) -> float:
    """Median over the iterations of one run, the first two left out."""
    frames = args.num_envs * args.rollout_length * processes
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_distill.cli", "fit", f"--data.env={args.env}", "--data.threads=1"]
        command += [f"--data.num_envs={args.num_envs}", f"--data.rollout_length={args.rollout_length}"]
        command += [f"--data.env_steps={frames * args.iterations}", f"--model.pairs={args.pairs}"]
        command += [
            f"--trainer.devices={processes}",
            "--trainer.strategy=ddp",
            f"--trainer.accelerator={args.accelerator}",
        ]
        command += ["--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0", "--report.pictures=false"]
        command += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
        command += [f"--trainer.default_root_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        with next(Path(folder).rglob("metrics.csv")).open(newline="") as file:
            speeds = [float(row["steps/s"]) for row in csv.DictReader(file) if row["steps/s"]]
    return statistics.median(speeds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--num_envs", type=int, default=32)
    parser.add_argument("--rollout_length", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()

    ratios = []
    for _ in range(args.rounds):
        one, several = steps_per_second(args, 1), steps_per_second(args, args.processes)
        ratios.append(several / one)
        print(
            f"{args.env}: 1 process {one:,.0f} steps/s, {args.processes} {several:,.0f}: × {ratios[-1]:.2f}", flush=True
        )
    print(f"median of {args.rounds}: × {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
