"""TorchRL's collectors: one at the simulator's speed, or several in worker processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import EnvBase

from .envs import stream_seed
from .envs.vector import Results, VectorEnv, flags, following

if TYPE_CHECKING:
    from .rollout_module import RolloutModule

State = MutableMapping[str, Tensor]
Acting = Callable[[State], State]


def make_collector(env: EnvBase, policy: Acting, rollout_length: int, device: torch.device) -> Collector:
    """Endless rollouts [N, T] of an environment of batch size [N].

    Args:
        env: where to act.
        policy: called with a mapping that holds ``observation``; writes ``action``, and whatever is to be kept.
        rollout_length: T.
        device: of the policy and of rollouts.
    """
    kind = VectorCollector if isinstance(env, VectorEnv) else Collector
    return kind(
        env,
        policy,
        frames_per_batch=env.batch_size[0] * rollout_length,
        total_frames=-1,
        policy_device=device,
        env_device=env.device,
        storing_device=device,
        trust_policy=True,
        track_traj_ids=False,
        use_buffers=False,
    )


class VectorCollector(Collector):
    """The same rollouts, of a :class:`VectorEnv`: arrays are kept as they come and become one TensorDict at the end.

    While simulators fill the caches, whatever else a step does costs several times what it costs alone, so a
    step does nothing that can wait: a TensorDict for each would take as long as the policy.
    """

    def __init__(self, env: VectorEnv, policy: Acting, **kwargs: object) -> None:
        self.acting = policy
        # A rollout's tensors are its own, so nobody needs a copy of them.
        super().__init__(env, policy, return_same_td=True, **kwargs)

    def rollout(self) -> TensorDictBase:
        env, device = self.env, self.storing_device
        states: list[State] = []
        results: list[Results] = []
        for _ in range(self.frames_per_batch):  # as TorchRL counts: of each environment
            state = self.acting({"observation": env.observation.to(device)})
            result = env.advance(state["action"].cpu())
            states.append(state)
            results.append(result)
            _, _, terminated, truncated = result
            if (done := terminated | truncated).any():
                env.restart(done)
        # Along time, the second dimension.
        acted = {name: torch.stack([state[name] for state in states], 1) for name in states[0]}
        after = following(*(np.stack(parts, 1) for parts in zip(*results, strict=True))).to(device)
        never = torch.zeros(after.shape, dtype=torch.bool, device=device)
        return TensorDict({**acted, **flags(never, never), "next": after}, after.shape, device=device)


class WorkersCollector:
    """Endless rollouts [N, T] of TorchRL's ``MultiSyncCollector``: workers collect at the same time, by the same policies.

    Weights are in memory that all share, and change while all workers wait: what these collect is on-policy.

    Args:
        make_envs: one for each worker; each makes an environment of batch size [N / workers].
        num_envs: N.
        module: whose policies act.
        rollout_length: T.
    """

    def __init__(
        self, make_envs: Sequence[Callable[[], EnvBase]], num_envs: int, module: RolloutModule, rollout_length: int
    ) -> None:
        self.module, self.folder, self.threads = module, TemporaryDirectory(), torch.get_num_threads()
        self.weights = TensorDict(module.state_dict()).cpu().memmap_(self.folder.name)
        mirror = _on_its_own(module)
        # A worker gives up after so many idle seconds: as many as it takes, since it waits while learners are evaluated.
        os.environ.setdefault("MAX_IDLE_COUNT", "1000000")
        self.workers = MultiSyncCollector(
            list(make_envs),
            policy_factory=[
                partial(WorkerPolicy, mirror, self.folder.name, worker) for worker in range(len(make_envs))
            ],
            frames_per_batch=num_envs * rollout_length,
            total_frames=-1,
            device="cpu",
            num_threads=self.threads,
            trust_policy=True,
            use_buffers=False,
            cat_results="stack",
        )

    def __iter__(self) -> Iterator[TensorDictBase]:
        rollouts, learners = iter(self.workers), self.module.learners
        while True:
            self.weights.update_(TensorDict(self.module.state_dict()))
            try:
                rollout = next(rollouts)
            except (RuntimeError, ValueError, ConnectionError, EOFError) as error:
                raise RuntimeError("a worker of data.collectors ended; its own message is on standard error") from error
            rollout = rollout.exclude("collector").to(self.module.device)
            # [workers, environments, T]; a learner's environments, which all workers have some of, stand together.
            apart = rollout.unflatten(1, (learners, rollout.shape[1] // learners))
            yield apart.permute(1, 0, 2, 3).flatten(0, 2)

    def shutdown(self) -> None:
        self.workers.shutdown()
        torch.set_num_threads(self.threads)
        self.folder.cleanup()


class WorkerPolicy(nn.Module):
    """A module's policies in a worker: drawn and taught there when the weights of a new iteration have come.

    Args:
        module: a copy of it, on the CPU.
        folder: of its weights' shared memory.
        worker: which one; the learners of all are the same, the noise of their actions is not.
    """

    def __init__(self, module: RolloutModule, folder: str, worker: int) -> None:
        super().__init__()
        self.module, self.worker, self.began = module, worker, -1
        self.weights = TensorDict.load_memmap(folder)

    def forward(self, state: State) -> State:
        module, iteration = self.module, int(self.weights["iteration"])
        if iteration != self.began:
            module.load_state_dict(self.weights)
            module.begin_rollout()
            torch.manual_seed(stream_seed(module.seed, module.rank, iteration, 4, self.worker))
            self.began = iteration
        return module.act(state)


def _on_its_own(module: RolloutModule) -> RolloutModule:
    """A copy on the CPU that can go to another process."""
    bare = copy.copy(module)  # Lightning leaves the trainer out
    bare.prepare_for_worker()
    return copy.deepcopy(bare).cpu()
