"""What an output layer alone can do: the best that the plain step or ``newton`` could make of an expert, with any number of pairs.

    python benchmarks/readout.py reacher_plain --expert path/to/best.ckpt --gain 0.5 1 2

One plain step leaves the hidden layers of the paper's learners nearly as they were drawn, so what is taught is a linear readout of
random features. Here thousands of an expert's states are the pairs and the rule is ``newton``, which is then the best readout there is
(least squares, with a small ridge): no 64 pairs can do better in these states. The expert acts with up to five times its noise.

Per gain of what learners are fed and scale of the outputs that they are taught (logits: of 3 means more decided), the squared error in
states of other episodes in % of the variance of what the expert does there, and whole episodes of fresh learners.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import marked
import torch
from torch import Tensor

from lightning_distill import load
from lightning_distill.envs import EnvSpec, env_spec, make_env
from lightning_distill.evaluation import evaluate
from lightning_distill.experts import Expert, expert_from
from lightning_distill.matching import trained_family
from lightning_distill.policies import action_distribution
from lightning_distill.teaching import teach_many, with_encoder_level

ENVIRONMENTS, NOISE, ERROR_LEARNERS = 16, 5.0, 4


@torch.no_grad()
def states(spec: EnvSpec, expert: Expert, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Observations [m, *obs] of the expert in whole rounds of all environments, at least ``number``, and its outputs [m, d]."""
    env = make_env(spec, ENVIRONMENTS, seed)
    torch.manual_seed(seed)
    share = torch.linspace(0.01, 1, ENVIRONMENTS).unsqueeze(1).log()
    log_std = None if expert.log_std is None else expert.log_std + torch.tensor(NOISE).log() + share
    state, seen, outputs = env.reset(), [], []
    for _ in range(-(-number // ENVIRONMENTS)):
        seen.append(state["observation"].float())
        outputs.append(expert.output(seen[-1]))
        state["action"] = action_distribution(outputs[-1], log_std).sample()
        _, state = env.step_and_maybe_reset(state)
    env.close()
    return torch.cat(seen), torch.cat(outputs)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dataset", help="a name in the zoo, or a path: whose family, environment and normaliser are used"
    )
    parser.add_argument("--expert", required=True, help="a checkpoint of PPO, or a dataset (the mean of 16 learners)")
    parser.add_argument("--encoder_level", type=int, help="of games: cut the dataset's encoder to this; 0 leaves none")
    parser.add_argument("--states", type=int, nargs="+", default=[8192], help="how many are taught")
    parser.add_argument(
        "--of", type=int, default=0, help="how many are seen, of which those are drawn; default: the most taught"
    )
    parser.add_argument(
        "--gain", type=float, nargs="+", default=[1.0], help="times what the dataset's normaliser gives"
    )
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0], help="times the expert's outputs")
    parser.add_argument("--centre", action="store_true", help="feed observations less their mean over these states")
    parser.add_argument("--ridge", type=float, default=1e-5)
    parser.add_argument("--learners", type=int, default=100)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dataset = load(args.dataset)
    if args.encoder_level is not None:
        dataset = with_encoder_level(dataset, args.encoder_level, trained_family(dataset))
    spec = env_spec(dataset.env, dataset.env_kwargs)
    expert = expert_from(args.expert, spec)
    seen, outputs = states(spec, expert, max(args.of, *args.states), seed=1)
    unseen, expected = states(spec, expert, 2048, seed=2)
    mean = seen.mean(0) if args.centre else dataset.observation_mean
    family, rows = trained_family(dataset), []
    for number, gain, scale in itertools.product(args.states, args.gain, args.scale):
        fed = dataclasses.replace(dataset, observation_mean=mean, observation_std=dataset.observation_std / gain)
        chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(1))[:number]
        taught = dataclasses.replace(
            fed,
            observations=fed.normalise(seen[chosen]),
            targets=scale * outputs[chosen],
            newton_ridge=torch.tensor(args.ridge),
        )
        torch.manual_seed(1)
        policy = teach_many(family, taught, ERROR_LEARNERS, step_rule="newton")
        found = torch.cat([policy.output(part.expand(ERROR_LEARNERS, *part.shape)) for part in unseen.split(64)], 1)
        error = (found / scale - expected).square().mean() / expected.var(0).mean()
        returns = [
            evaluate(taught, learners=args.learners, greedy=greedy, step_rule="newton") for greedy in (False, True)
        ]
        rows.append(
            [number, gain, scale, f"{100 * error:.0f}", *(f"{entry.mean:.2f} ± {entry.ci95:.2f}" for entry in returns)]
        )
        print(*rows[-1], flush=True)
    print(marked.table(["states", "gain", "scale", "error, %", "sampled", "greedy"], rows))


if __name__ == "__main__":
    main()
