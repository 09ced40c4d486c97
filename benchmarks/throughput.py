"""Environment steps a second: bare simulator with random actions, collection, and all of training, side by side.

    python benchmarks/throughput.py HalfCheetah-v5
    python benchmarks/throughput.py CartPole-v1 --num_envs 256 --rollout_length 100 --pairs 2
    python benchmarks/throughput.py ALE/Breakout-v5 --num_envs 16 --rollout_length 64 --pairs 3 --learners 4 \
        --encoder_level 4 --precision bf16-mixed --accelerator gpu

The three alternate within one process, so that a change of the machine's speed meets all of them. Medians over iterations
are printed; ratios are of neighbours in time, with their quartiles. Memory is the peak of the device's tensors on a GPU, of
the whole process on a CPU.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import lightning as L
import torch
from training import train

from lightning_distill import CollectorDataModule, MetaPPO
from lightning_distill.envs import make_env


class Throughput(L.Callback):
    """Times collection and update of each iteration, and as many steps of the bare simulator between them."""

    def __init__(self, data: CollectorDataModule) -> None:
        self.data = data
        self.bare_env = make_env(data.spec, data.num_envs, 1, data.backend, data.threads)
        self.bare_env.reset()
        self.seconds: dict[str, list[float]] = {"bare": [], "collect": [], "update": []}
        self.ended = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()
        if self.ended is not None:
            self.seconds["collect"].append(self.began - self.ended)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["update"].append(time.perf_counter() - self.began)
        self.seconds["bare"].append(self._bare())
        self.ended = time.perf_counter()

    def _bare(self) -> float:
        env, steps = self.bare_env, self.data.rollout_length
        actions = torch.stack([env.action_spec.rand() for _ in range(steps)])
        if hasattr(env, "simulator"):
            simulator, actions = env.simulator, actions.numpy()
            began = time.perf_counter()
            for action in actions:
                _, _, terminated, truncated = simulator.step(action)
                if (done := terminated | truncated).any():
                    simulator.reset(done)
            return time.perf_counter() - began
        state = env.reset()
        began = time.perf_counter()
        for action in actions:
            state["action"] = action
            _, state = env.step_and_maybe_reset(state)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--num_envs", type=int, default=32)
    parser.add_argument("--rollout_length", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learners", type=int, default=8)
    parser.add_argument("--encoder_level", type=int, default=0, help="Atari's")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--compile", action="store_true", help="losses and their gradients")
    args = parser.parse_args()

    torch.set_num_threads(1)  # as the command line does
    L.seed_everything(1, verbose=False)
    frames = args.num_envs * args.rollout_length
    data = CollectorDataModule(
        args.env,
        env_steps=frames * args.iterations,
        num_envs=args.num_envs,
        rollout_length=args.rollout_length,
        backend=args.backend,
    )
    model = MetaPPO(
        data.spec,
        pairs=args.pairs,
        learners=args.learners,
        family="nature" if data.spec.frames else "paper",
        encoder_level=args.encoder_level,
        epochs=args.epochs,
        compile=args.compile,
    )
    timer = Throughput(data)
    train(model, data, timer, accelerator=args.accelerator, precision=args.precision)

    bare, collect, update = map(torch.tensor, timer.seconds.values())
    # Of each iteration but the first two: the bare simulator's steps before it, its collection, its update.
    bare, collect, update = bare[1:-1], collect[1:], update[2:]
    on_gpu = args.accelerator != "cpu" and torch.cuda.is_available()
    print(
        f"{args.env}, {args.num_envs} environments × {args.rollout_length} steps, {args.epochs} epochs, {data.threads} threads, "
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}"
    )
    for name, seconds in {
        "bare simulator, random actions": bare,
        "collection": collect,
        "training": collect + update,
    }.items():
        speed, share = frames / seconds, bare / seconds
        low, high = share.quantile(torch.tensor([0.25, 0.75])).tolist()
        print(f"  {name:31} {speed.median():>12,.0f} steps/s  {share.median():4.0%} ({low:.0%} … {high:.0%})")
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    updates = model.learners * model.epochs * model.minibatches / update
    print(f"  {'learner updates':31} {updates.median():>12,.0f} /s")
    print(f"  {'peak memory':31} {memory / 2**30:>12.2f} GiB")


if __name__ == "__main__":
    main()
