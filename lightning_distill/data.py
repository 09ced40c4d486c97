"""CollectorDataModule: a TorchRL collector streams on-policy rollouts; evaluation environments stand beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import PositiveInt

from .configs import check_numbers
from .dataset import DistilledDataset
from .envs import Backend, ConfigError, env_spec, make_env, simulator_threads, stream_seed, usable_cores
from .evaluation import TEST_SEED, VALIDATION_SEED, Evaluator, StackedActor
from .learners import LearnerFamily
from .returns import Evaluation

logger = logging.getLogger(__name__)

#: Halves of action ranges that learning by the usual learning rates is at home with.
ACTIONS_WITHIN = (0.1, 10.0)

Stage = Literal["validate", "test"]
SEEDS = {"validate": VALIDATION_SEED, "test": TEST_SEED}


class CollectorDataModule(L.LightningDataModule):
    """Streams rollouts of the module's own policies; one epoch is the whole run.

    Args:
        env: Gymnasium id, or class path of a TorchRL environment.
        env_kwargs: arguments the environment is made with.
        env_steps: environment steps of the whole run, over all processes.
        num_envs: environments stepped together, in each process.
        rollout_length: T, steps of each environment in one rollout.
        max_episode_steps: truncate episodes after so many steps while training, so that their beginnings are seen more often; what
            would have come counts by its value. Default: as the environment ends them, as always in evaluation.
        backend: who simulates, see :func:`lightning_distill.envs.make_env`.
        threads: simulator threads; default: one for each core that the process may use.
        collectors: more than 1: so many worker processes in which policies act and environments are simulated, each with
            its share of ``num_envs``. For environments that are slow, or hold Python's lock. On the CPU: workers draw the learners
            that the main process draws, and a GPU draws others.
        val_learners: fresh learners at each validation; of direct PPO, which has one policy, runs of that policy.
        test_learners: the same in the final evaluation.
        episodes: whole episodes of each of them.
    """

    def __init__(
        self,
        env: str,
        env_kwargs: dict[str, Any] | None = None,
        env_steps: PositiveInt = 1_000_000,
        num_envs: PositiveInt = 32,
        rollout_length: PositiveInt = 64,
        max_episode_steps: PositiveInt | None = None,
        backend: Backend = "auto",
        threads: PositiveInt | None = None,
        collectors: PositiveInt = 1,
        val_learners: PositiveInt = 16,
        test_learners: PositiveInt = 100,
        episodes: PositiveInt = 1,
    ) -> None:
        super().__init__()
        check_numbers("data", CollectorDataModule.__init__, locals())
        _check_plain(env_kwargs or {})
        self.spec = env_spec(env, env_kwargs)
        self.env_steps, self.num_envs, self.rollout_length = env_steps, num_envs, rollout_length
        self.max_episode_steps = max_episode_steps
        self.backend, self.threads, self.collectors = backend, threads or usable_cores(), collectors
        self.learners = {"validate": val_learners, "test": test_learners}
        self.episodes = episodes
        self._rollouts: Rollouts | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._warn_of_units()
            device = self.trainer.strategy.root_device.type
            if self.collectors > 1 and device != "cpu":
                raise ConfigError(
                    f"data.collectors={self.collectors} on device {device!r}: allowed is 1, or more with trainer.accelerator=cpu, "
                    "as workers draw and teach the learners again, on the CPU"
                )

    def _warn_of_units(self) -> None:
        spec = self.spec
        halves = [(high - low) / 2 for low, high in zip(spec.action_low, spec.action_high, strict=True)]
        if any(math.isfinite(half) and not ACTIONS_WITHIN[0] <= half <= ACTIONS_WITHIN[1] for half in halves):
            logger.warning(
                "data.env=%r: actions between %s and %s; learning begins with outputs of about 1, whatever the units, and goes slowly to much "
                "larger or smaller ones: make the environment with gymnasium.wrappers.RescaleAction(env, -1, 1)",
                spec.id,
                list(spec.action_low),
                list(spec.action_high),
            )

    def _warn_of_length(self) -> None:
        processes = self.trainer.world_size
        least = self.num_envs * self.rollout_length * processes
        if self.env_steps < least and not self.trainer.fast_dev_run:
            logger.warning(
                "data.env_steps=%d: a run has at least one iteration, which is of %d steps (data.num_envs=%d × data.rollout_length=%d%s)",
                self.env_steps,
                least,
                self.num_envs,
                self.rollout_length,
                f" × {processes} processes" if processes > 1 else "",
            )

    def check_learners(self, learners: int) -> None:
        """Raise ``ConfigError`` unless every one of so many learners can act in as many environments."""
        if self.num_envs % (learners * self.collectors):
            times = f" × data.collectors={self.collectors}" if self.collectors > 1 else ""
            raise ConfigError(
                f"data.num_envs={self.num_envs}: allowed are multiples of model.learners={learners}{times}, "
                "so that every learner acts in as many environments"
            )

    def train_dataloader(self) -> Rollouts:
        self._warn_of_length()
        # A run may go on with other processes or environments: what is left counts in environment steps.
        module, processes = self.trainer.lightning_module, self.trainer.world_size
        made, taken = module.resumed
        length = self.iterations(processes, made, taken or module.first_steps * processes)
        self._rollouts = Rollouts(self, length, made)
        return self._rollouts

    def iterations(self, processes: int, made: int = 0, taken: int = 0) -> int:
        """Rollouts of a whole run, which has made so many and taken so many environment steps before."""
        # Not round(), by which 1.5 and 2.5 are both 2: a run would be longer for having been resumed.
        left = math.floor((self.env_steps - taken) / (self.num_envs * self.rollout_length * processes) + 0.5)
        return max(1, made + max(0, left))

    def val_dataloader(self) -> range:
        return range(1)

    def test_dataloader(self) -> range:
        return range(1)

    def evaluate(
        self,
        dataset: DistilledDataset,
        family: LearnerFamily,
        stage: Stage,
        greedy: bool = False,
        step_rule: str | None = None,
    ) -> Evaluation:
        """Returns of fresh learners of a family; validation and test differ in their number and in their seeds.

        Processes play an equal share each, with learners and start states of their own, and all get all returns.
        """
        return self._shared_out(
            stage, lambda evaluator, seed: evaluator(dataset, family, greedy, seed=seed, step_rule=step_rule)
        )

    def play(self, draw: Callable[[], StackedActor], stage: Stage, greedy: bool = False) -> Evaluation:
        """Returns of any policies, on the start states that fresh learners get."""
        return self._shared_out(stage, lambda evaluator, seed: evaluator.play(draw, greedy, seed=seed))

    def _shared_out(self, stage: Stage, play: Callable[[Evaluator, int], Evaluation]) -> Evaluation:
        trainer, learners = self.trainer, 2 if self.trainer.fast_dev_run else self.learners[stage]
        if stage not in self._evaluators:
            share = math.ceil(learners / trainer.world_size)
            device = trainer.lightning_module.device
            self._evaluators[stage] = Evaluator(self.spec, share, self.episodes, self.backend, self.threads, device)
        seed = SEEDS[stage] if trainer.global_rank == 0 else stream_seed(SEEDS[stage], trainer.global_rank)
        mine = play(self._evaluators[stage], seed)
        if trainer.world_size == 1:
            return mine
        every = trainer.strategy.all_gather(mine.returns.to(trainer.strategy.root_device)).cpu()
        return dataclasses.replace(mine, returns=every.flatten(0, 1)[:learners])

    def teardown(self, stage: str) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
        for evaluator in self._evaluators.values():
            evaluator.close()
        self._evaluators = {}


class Rollouts:
    """An iterable of on-policy rollouts [N, T]: learners are drawn, then act, then the rollout is handed out.

    It has a length, that of the whole run, so that Lightning fetches no rollout ahead of the update before it; those that were made before a run
    goes on are not made again, so that a run which has finished makes none.
    """

    def __init__(self, data: CollectorDataModule, length: int, made: int = 0) -> None:
        self.data, self.length, self.made = data, length, made
        self.collector: Any = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        from .collector import WorkersCollector, make_collector

        data, module = self.data, self.data.trainer.lightning_module
        # Environments start anew at each (re)start of a run, from seeds of their own for each process and moment.
        key = module.seed, module.rank, int(module.env_steps), 3
        module.begin_rollout()  # the collector tries the policy once when it is made
        if data.collectors > 1:
            make_envs = [
                self._env_maker(stream_seed(*key, worker), data.collectors, "cpu") for worker in range(data.collectors)
            ]
            self.collector = WorkersCollector(make_envs, data.num_envs, module, data.rollout_length)
            threads = nullcontext
        else:
            env = self._env_maker(stream_seed(*key), 1, module.device)()
            self.collector = make_collector(env, module.act, data.rollout_length, module.device)
            threads = partial(simulator_threads, env)
        try:
            rollouts = iter(self.collector)
            for _ in range(self.length - self.made):
                module.begin_rollout()
                with torch.no_grad(), threads():
                    rollout = next(rollouts)
                yield rollout
        finally:
            self.close()

    def _env_maker(self, seed: int, parts: int, device: Any) -> Callable[[], Any]:
        data = self.data
        num_envs, threads = data.num_envs // parts, max(1, data.threads // parts)
        return partial(make_env, data.spec, num_envs, seed, data.backend, threads, device, True, data.max_episode_steps)

    def state_dict(self) -> dict:
        """Nothing: a resumed run restarts its environments. Tells Lightning that resuming within an epoch is fine."""
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def close(self) -> None:
        if self.collector is not None:
            self.collector.shutdown()
            self.collector = None


def _check_plain(env_kwargs: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for arguments that a dataset file, which is to make the environment again, cannot hold."""
    for name, value in env_kwargs.items():
        try:
            held = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            held = None
        # Ranges are tuples as often as lists.
        if not isinstance(name, str) or held != (list(value) if isinstance(value, tuple) else value):
            raise ConfigError(
                f"data.env_kwargs: {name}={value!r} ({type(value).__name__}); allowed are names with plain values: numbers, texts, true, false, "
                "None, and lists and mappings of them"
            )
