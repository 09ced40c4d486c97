"""Evaluation: fresh learners are drawn, taught by one step, and play whole episodes.

One implementation behind the callbacks, the command line and the API. The protocol:

- each fresh learner plays a fixed number of episodes to their end, so short ones count no more than long ones;
- learners, start states and actions follow from a seed and never from training's;
- families, controls and sampled or greedy actions are compared on the same start states;
- statistics are over learners, since they are what is drawn afresh.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, get_args

import torch
from torch import Tensor, nn

from .dataset import DistilledDataset, as_dataset
from .envs import Backend, ConfigError, EnvSpec, make_env, simulator_threads, stream_seed
from .envs.variations import Variation, make_varied_env
from .families import as_families
from .learners import LearnerFamily
from .matching import check_matches, check_taught, own_family, played_in, trained_family
from .returns import IN_DISTRIBUTION, RANDOM, SHUFFLED, UNTAUGHT, Evaluation, Kind, reported_rules, row_name
from .step_rules import STEP_RULES
from .teaching import StackedPolicy, seeded, teach_many, with_line_search

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

logger = logging.getLogger(__name__)

#: Seeds of evaluations. A dataset is chosen by validation, so what is reported of it comes from another seed: by default
#: that of the test at a run's end, whose returns the file states.
VALIDATION_SEED, TEST_SEED = 0, 1

#: Where an episode is cut that no environment and no time limit ends; Atari's longest have 27 000 steps.
LONGEST_EPISODE = 100_000


class StackedActor(Protocol):
    """What an evaluation needs of policies that act at once; a ``StackedPolicy`` is one."""

    def __call__(self, observation: Tensor, sample: bool = False) -> Tensor:
        """Actions [learners, episodes] or [learners, episodes, d] for observations [learners, episodes, *obs]."""


class RandomActions:
    """Actions that know nothing of observations: uniform ones; of continuous actions without bounds standard normal ones."""

    def __init__(self, spec: EnvSpec) -> None:
        self.spec = spec

    def __call__(self, observation: Tensor, sample: bool = True) -> Tensor:
        count, device = observation.shape[:2], observation.device
        if self.spec.action_type == "discrete":
            return torch.randint(self.spec.actions, count, device=device)
        low, high = (torch.tensor(bound, device=device) for bound in (self.spec.action_low, self.spec.action_high))
        drawn = (
            torch.rand(*count, self.spec.actions, device=device),
            torch.randn(*count, self.spec.actions, device=device),
        )
        return torch.where((high - low).isfinite(), low + drawn[0] * (high - low), drawn[1])


class Evaluator:
    """Parallel environments, kept between evaluations, each playing one whole episode at a time.

    Args:
        spec: the environment.
        learners: fresh learners of one evaluation.
        episodes: of each of them. All run in parallel, one environment each (of MuJoCo: about 1 MB each).
        backend, threads: as in :func:`lightning_distill.envs.make_env`.
        device: where learners are taught and run.
        variation: changes to the environment; it is then simulated by Gymnasium, in this process.
    """

    def __init__(
        self,
        spec: EnvSpec,
        learners: int = 100,
        episodes: int = 1,
        backend: Backend = "auto",
        threads: int | None = None,
        device: torch.device | str = "cpu",
        variation: Variation | None = None,
    ) -> None:
        for name, value in (("learners", learners), ("episodes", episodes)):
            if not isinstance(value, Integral) or value < 1:
                raise ConfigError(f"{name}={value!r}: allowed are integers ≥ 1")
        if variation and backend not in ("auto", "gymnasium"):
            raise ConfigError(f"backend={backend!r} with a variation: allowed are auto, gymnasium")
        if variation:
            make_varied_env(spec, 1, 0, variation).close()  # what cannot be varied is named before anybody is taught
        self.spec, self.learners, self.episodes, self.device = spec, learners, episodes, torch.device(device)
        self.options = {"backend": backend, "threads": threads, "device": device}
        self.variation = variation
        self.env: EnvBase | None = None

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None

    def __call__(
        self,
        dataset: DistilledDataset,
        family: LearnerFamily,
        greedy: bool = False,
        seed: int = TEST_SEED,
        taught: bool = True,
        step_rule: str | None = None,
    ) -> Evaluation:
        """Teach fresh learners of a family and let them play; the caller's random state is left as it was.

        Args:
            dataset: what they are taught on.
            family: what they are drawn from.
            greedy: largest logit or mean action, instead of sampled actions.
            seed: of learners, start states and actions; never one of training's. Another one is another sample.
            taught: False lets them play as they were drawn, for comparison.
            step_rule: how they are taught; default: as the dataset recommends.
        """
        check_matches(dataset, self.spec)

        def draw() -> StackedPolicy:
            if taught:
                return teach_many(family, dataset, self.learners, step_rule, device=self.device)
            fresh = family.draw(self.learners, dataset.learner_shape, dataset.outputs, self.device)
            return StackedPolicy(family.forward, fresh, dataset.to(self.device))

        return self.play(draw, greedy, seed)

    def play(self, draw: Callable[[], StackedActor], greedy: bool = False, seed: int = TEST_SEED) -> Evaluation:
        """Let any policies play; the caller's random state is left as it was.

        Args:
            draw: makes them, called in the random state that ``seed`` gives.
            greedy, seed: as above.
        """
        # Environments outlive this call: nothing in them may be a tensor of a caller's inference mode.
        # In full precision, whatever a trainer's is: a file's returns are those that its user gets.
        exact = torch.autocast(self.device.type, enabled=False)
        random = seeded(stream_seed(seed, 1, evaluation=True), self.device)
        with random, torch.inference_mode(False), torch.no_grad(), exact:
            policy = draw()
            env = self._env(stream_seed(seed, 2, evaluation=True))
            with simulator_threads(env):
                return Evaluation(self._play(env, policy, greedy), greedy)

    def _env(self, seed: int) -> EnvBase:
        if self.env is None:
            count = self.learners * self.episodes
            if self.variation:
                self.env = make_varied_env(self.spec, count, seed, self.variation)
            else:
                self.env = make_env(self.spec, count, seed, **self.options)
        else:
            self.env.set_seed(seed)
        return self.env

    def _play(self, env: EnvBase, policy: StackedActor, greedy: bool) -> Tensor:
        """Returns [learners, episodes] of whole episodes."""
        state = env.reset()
        count = len(state)
        returns = torch.zeros(count, dtype=torch.float64)
        playing = torch.ones(count, dtype=torch.bool)
        for taken in range(LONGEST_EPISODE):
            if not playing.any():
                break
            self._check_finite("an observation", state["observation"], playing, taken)
            observation = state["observation"].to(self.device).unflatten(0, (self.learners, self.episodes))
            state["action"] = policy(observation, sample=not greedy).flatten(0, 1).to(env.device)
            # Only environments that still play are stepped, where the simulator can; what others do does not count.
            state["_step"] = playing.to(env.device, copy=True)
            step, state = env.step_and_maybe_reset(state)
            reward = step["next", "reward"].squeeze(-1).cpu()
            self._check_finite("a reward", reward, playing, taken + 1)
            returns += torch.where(playing, reward, 0)
            playing &= ~step["next", "done"].squeeze(-1).cpu()
        if playing.any():
            logger.warning(
                "env=%r: %d of %d episodes had not ended after %d steps and were cut; a time limit ends them sooner",
                self.spec.id,
                int(playing.sum()),
                count,
                LONGEST_EPISODE,
            )
        return returns.view(self.learners, self.episodes).float()

    def _check_finite(self, what: str, values: Tensor, playing: Tensor, taken: int) -> None:
        """Raise ``ConfigError`` for NaN or infinity in what environments [B] that still play return."""
        if values.is_floating_point() and not values[playing.to(values.device)].isfinite().all():
            raise ConfigError(
                f"env={self.spec.id!r} returned {what} that is NaN or infinite in an evaluation, after {taken} steps of its episode"
            )


def shuffle_targets(dataset: DistilledDataset, seed: int = TEST_SEED) -> DistilledDataset:
    """The same dataset with the targets permuted over the pairs so that none keeps its own (a control).

    Raises:
        ConfigError: a single pair has nothing to be exchanged with.
    """
    if dataset.pairs < 2:
        raise ConfigError("shuffled targets: needs a dataset of at least 2 pairs")
    order = torch.randperm(dataset.pairs, generator=torch.Generator().manual_seed(seed))
    targets = torch.empty_like(dataset.targets)
    targets[order] = dataset.targets[order.roll(1)]  # one cycle through all pairs: no fixed point
    return dataclasses.replace(dataset, targets=targets)


def evaluate(
    dataset: DistilledDataset | str | os.PathLike[str],
    env: str | None = None,
    family: LearnerFamily | Callable[..., nn.Module] | str | None = None,
    *,
    learners: int = 100,
    episodes: int = 1,
    greedy: bool = False,
    seed: int = TEST_SEED,
    step_rule: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    variation: Variation | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Returns of fresh learners taught on a dataset.

    Args:
        dataset: from :func:`lightning_distill.load`, or what that is given.
        env: another environment id than the dataset's own (its shapes must agree).
        family: what learners are drawn from, as :func:`lightning_distill.teach_many` takes it; default: what the dataset was
            distilled with.
        learners, episodes, greedy, seed: see :class:`Evaluator`.
        step_rule: how learners are taught; default: as the dataset recommends. For ``line_search`` of a dataset without an
            α, it is the one of :func:`lightning_distill.teaching.with_line_search`.
        env_kwargs: arguments of the environment; default: the dataset's own, and in another environment none.
        variation, backend, threads, device: see :class:`Evaluator`.

    Raises:
        ConfigError: an option cannot work with this dataset and environment; the message names it.
    """
    dataset = as_dataset(dataset)
    kind: Kind = "greedy" if greedy else "sampled"
    families = {IN_DISTRIBUTION: family or trained_family(dataset)}
    table = evaluate_all(
        dataset,
        families,
        env=env,
        kinds=(kind,),
        controls=False,
        learners=learners,
        episodes=episodes,
        seed=seed,
        step_rules=(step_rule or dataset.step_rule,),
        env_kwargs=env_kwargs,
        variation=variation,
        backend=backend,
        threads=threads,
        device=device,
    )
    return table[row_name(IN_DISTRIBUTION, step_rule or dataset.step_rule, dataset)][kind]


def evaluate_all(
    dataset: DistilledDataset | str | os.PathLike[str],
    families: Mapping[str, LearnerFamily | Callable[..., nn.Module] | str] | Iterable[str] | None = None,
    *,
    controls: bool = True,
    kinds: Sequence[Kind] = ("sampled", "greedy"),
    env: str | None = None,
    learners: int = 100,
    episodes: int = 1,
    seed: int = TEST_SEED,
    step_rules: Sequence[str] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    variation: Variation | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Evaluation]]:
    """The whole table: {row: {sampled|greedy: evaluation}}, a row for each family and for each control.

    Args:
        dataset: from :func:`lightning_distill.load`, or what that is given.
        families: name → family, or names of families; the first is the one controls are drawn from. Default: the one that the dataset was
            distilled with, as ``in-distribution``.
        controls: add rows of learners that were not taught, of learners taught on shuffled targets (two pairs or
            more), and of actions drawn at random (sampled ones): the same learners on the same start states.
        kinds: of actions.
        step_rules: how learners are taught; default: as the dataset recommends, and by the plain step. Rows of another
            rule than the recommended one say so in their names.
        env, learners, episodes, seed, env_kwargs, variation, backend, threads, device: see :func:`evaluate`.
    """
    dataset = as_dataset(dataset)
    spec = played_in(dataset, env, env_kwargs)
    families = as_families(families or {IN_DISTRIBUTION: trained_family(dataset)})
    step_rules = reported_rules(dataset) if step_rules is None else step_rules
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(get_args(Kind)):
        raise ConfigError(f"kinds={kinds!r}: allowed are lists of one or more of {', '.join(get_args(Kind))}")
    if isinstance(step_rules, str) or not step_rules:
        raise ConfigError(f"step_rules={step_rules!r}: allowed are lists of one or more of {', '.join(STEP_RULES)}")
    if controls and (taken := {UNTAUGHT, SHUFFLED, RANDOM} & set(families)):
        raise ConfigError(f"family: {', '.join(taken)}: the name of a control; allowed is any other")
    if "line_search" in step_rules and dataset.line_search_scale is None:
        dataset = with_line_search(dataset, own_family(dataset, families))
    for name, family in families.items():
        check_taught(f"family {name!r}", family, dataset, step_rules)
    rows = {
        row_name(name, rule, dataset): (dataset, family, True, rule)
        for rule in step_rules
        for name, family in families.items()
    }
    if controls:
        first = next(iter(families.values()))
        rows[UNTAUGHT] = (dataset, first, False, None)
        if dataset.pairs > 1:
            rows[SHUFFLED] = (shuffle_targets(dataset, seed), first, True, step_rules[0])
    evaluator = Evaluator(spec, learners, episodes, backend, threads, device, variation)
    try:
        table = {
            name: {kind: evaluator(pairs, family, kind == "greedy", seed, taught, rule) for kind in kinds}
            for name, (pairs, family, taught, rule) in rows.items()
        }
        if controls:
            table[RANDOM] = {"sampled": evaluator.play(lambda: RandomActions(spec), seed=seed)}
        return table
    finally:
        evaluator.close()
