"""What one action for ever scores in an Atari game, action by action: a policy has to be better than the best of them to be one.

    python benchmarks/constant_actions.py ALE/Centipede-v5 --episodes 64 --actions 1 10 11 12 13 14 15 16 17

Whole games, raw score, no sticky actions, in environments of the same seed as a test's (mean ± 95 % bootstrap interval over games).
"""

import argparse

import torch

from lightning_distill.envs import env_spec
from lightning_distill.evaluation import Evaluator
from lightning_distill.returns import Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", help="id of an environment with discrete actions")
    parser.add_argument("--episodes", type=int, default=16, help="of each action")
    parser.add_argument("--actions", type=int, nargs="+", help="by number; default: all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    spec = env_spec(arguments.env)
    if spec.action_type != "discrete":
        parser.error(f"env={arguments.env}: has {spec.action_type} actions; expected an environment with discrete ones")
    actions = arguments.actions or range(spec.actions)
    if unknown := set(actions) - set(range(spec.actions)):
        parser.error(f"--actions: {sorted(unknown)}; allowed are 0 … {spec.actions - 1}")
    evaluator = Evaluator(spec, 1, arguments.episodes, threads=arguments.threads)
    try:
        for action in actions:
            always = torch.full((1, arguments.episodes), action)
            returns = evaluator.play(
                lambda always=always: lambda observation, sample=False: always, greedy=True
            ).returns
            played = Evaluation(returns.T, greedy=True)  # of one policy, statistics are over games
            print(f"{action:3} {played.mean:9.1f} ± {played.ci95:.1f}", flush=True)
    finally:
        evaluator.close()


if __name__ == "__main__":
    main()
