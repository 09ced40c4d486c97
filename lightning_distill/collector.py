"""TorchRL's collector, at the simulator's speed."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from .envs.vector import Results, VectorEnv, flags, following

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
