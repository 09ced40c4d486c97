"""Evaluation: fresh learners are drawn, taught by one step, and play whole episodes.

One implementation behind the callbacks, the command line and the API.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dataset import DistilledDataset
from .envs import Backend, ConfigError, EnvSpec, env_spec, make_env, simulator_threads, stream_seed
from .learners import MLP, LearnerFamily, Params
from .policies import action_distribution
from .teaching import sgd_step

if TYPE_CHECKING:
    from torchrl.envs import EnvBase


@dataclass(frozen=True)
class Evaluation:
    """Returns of fresh learners: ``returns`` [learners, episodes], undiscounted, of whole episodes."""

    returns: Tensor
    greedy: bool

    @property
    def per_learner(self) -> Tensor:
        """Mean return of each learner [learners]: the unit of all statistics, as learners are what is drawn afresh."""
        return self.returns.mean(1)

    @property
    def mean(self) -> float:
        return self.per_learner.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over learners."""
        return self.per_learner.std().item() if len(self.returns) > 1 else 0.0

    @property
    def ci95(self) -> float:
        """Half width of the 95 % confidence interval of the mean, by the bootstrap over learners (Efron 1979)."""
        if len(self.returns) < 2:
            return math.inf
        generator = torch.Generator().manual_seed(0)
        n = len(self.returns)
        draws = torch.randint(n, (2000, n), generator=generator)
        means = self.per_learner.cpu()[draws].mean(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975]))
        return ((high - low) / 2).item()

    @property
    def iqm(self) -> float:
        """Interquartile mean over learners (Agarwal et al. 2021)."""
        ordered = self.per_learner.sort().values
        cut = len(ordered) // 4
        return ordered[cut : len(ordered) - cut].mean().item()

    @property
    def worst(self) -> float:
        """The worst learner's mean return."""
        return self.per_learner.min().item()

    def as_dict(self) -> dict[str, Any]:
        names = ("mean", "std", "ci95", "iqm", "worst")
        values = {name: getattr(self, name) for name in names}
        return {**values, "learners": self.returns.shape[0], "episodes": self.returns.shape[1], "greedy": self.greedy}


class Evaluator:
    """Parallel environments, kept between evaluations, each playing one whole episode at a time.

    Args:
        spec: the environment.
        learners, episodes: fresh learners, and episodes of each. All run in parallel, one environment each.
        backend, threads: as in :func:`lightning_distill.envs.make_env`.
        device: where learners are taught and run.
    """

    def __init__(
        self,
        spec: EnvSpec,
        learners: int = 100,
        episodes: int = 1,
        backend: Backend = "auto",
        threads: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("learners", learners), ("episodes", episodes)):
            if value < 1:
                raise ConfigError(f"{name}={value}: allowed are integers ≥ 1")
        self.spec, self.learners, self.episodes, self.device = spec, learners, episodes, torch.device(device)
        self.options = {"backend": backend, "threads": threads, "device": device}
        self.env: EnvBase | None = None

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None

    def __call__(
        self, dataset: DistilledDataset, family: LearnerFamily, greedy: bool = False, seed: int = 0
    ) -> Evaluation:
        """Teach fresh learners of a family and let them play; the caller's random state is left as it was.

        Args:
            dataset: what they are taught on.
            family: what they are drawn from.
            greedy: largest logit or mean action, instead of sampled actions.
            seed: of learners, start states and actions; disjoint from every training seed.
        """
        check_matches(dataset, self.spec)
        devices = [self.device] if self.device.type == "cuda" else []
        # torch.func needs ordinary tensors, which a surrounding inference mode would not give.
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
            torch.manual_seed(stream_seed(seed, 1, evaluation=True))
            dataset = dataset.to(self.device)
            params = family.draw(self.learners, self.spec.observation_shape, self.spec.actions, self.device)
            params = sgd_step(family.forward, params, dataset.observations, dataset.targets, dataset.learning_rate)
            env = self._env(stream_seed(seed, 2, evaluation=True))
            with simulator_threads(env):
                return Evaluation(self._play(env, dataset, family, params, greedy), greedy)

    def _env(self, seed: int) -> EnvBase:
        if self.env is None:
            self.env = make_env(self.spec, self.learners * self.episodes, seed, **self.options)
        else:
            self.env.set_seed(seed)
        return self.env

    def _play(
        self, env: EnvBase, dataset: DistilledDataset, family: LearnerFamily, params: Params, greedy: bool
    ) -> Tensor:
        state = env.reset()
        count = len(state)
        returns = torch.zeros(count, dtype=torch.float64)
        playing = torch.ones(count, dtype=torch.bool)
        while playing.any():
            observation = dataset.normalise(state["observation"].to(self.device).float())
            output = family.forward(params, observation.unflatten(0, (self.learners, self.episodes))).flatten(0, 1)
            if greedy:
                action = output.argmax(-1) if dataset.log_std is None else output
            else:
                action = action_distribution(output, dataset.log_std).sample()
            state["action"] = action.to(env.device)
            step, state = env.step_and_maybe_reset(state)
            # An environment that has finished goes on with another episode, which does not count.
            returns += step["next", "reward"].squeeze(-1).cpu() * playing
            playing &= ~step["next", "done"].squeeze(-1).cpu()
        return returns.view(self.learners, self.episodes).float()


def check_matches(dataset: DistilledDataset, spec: EnvSpec) -> None:
    """Raise ``ConfigError`` unless the dataset's shapes and kind of action are the environment's."""
    mine = (dataset.observation_shape, dataset.action_type, dataset.outputs)
    its = (spec.observation_shape, spec.action_type, spec.actions)
    if mine != its:
        raise ConfigError(
            f"the dataset (for {dataset.env}) has observations {mine[0]}, {mine[1]} actions, {mine[2]} outputs; "
            f"env={spec.id!r} needs {its[0]}, {its[1]}, {its[2]}"
        )


def evaluate(
    dataset: DistilledDataset,
    env: str | None = None,
    family: LearnerFamily | None = None,
    *,
    learners: int = 100,
    episodes: int = 1,
    greedy: bool = False,
    seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    backend: Backend = "auto",
    threads: int = 2,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Returns of fresh learners taught on a dataset.

    Args:
        dataset: from :func:`lightning_distill.load`.
        env: another environment id than the dataset's own (its shapes must agree).
        family: what learners are drawn from; default: the paper's, MLP 64-64 tanh.
        learners, episodes, greedy, seed: see :class:`Evaluator`.
        env_kwargs: arguments of the environment; default: the dataset's own.
    """
    spec = env_spec(env or dataset.env, dataset.env_kwargs if env_kwargs is None else env_kwargs)
    evaluator = Evaluator(spec, learners, episodes, backend, threads, device)
    try:
        return evaluator(dataset, family or MLP(), greedy, seed)
    finally:
        evaluator.close()


def as_returns(evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{family: {sampled|greedy: evaluation}} as the ``returns`` entry of a dataset's metadata."""

    def plain(evaluation: Evaluation) -> dict[str, Any]:
        return {key: value for key, value in evaluation.as_dict().items() if key != "greedy"}

    return {family: {kind: plain(entry) for kind, entry in kinds.items()} for family, kinds in evaluations.items()}
