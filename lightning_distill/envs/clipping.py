"""Actions of TorchRL environments are clipped to their space, as those of all others are."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.envs.transforms import Transform

from .spec import EnvSpec


class ClippedActions(Transform):
    """What an environment is given is within its bounds; what was chosen stays in the rollout, as policies are told of it."""

    def __init__(self, spec: EnvSpec) -> None:
        super().__init__(in_keys_inv=["action"], out_keys_inv=["action"])
        self.register_buffer("low", torch.tensor(spec.action_low))
        self.register_buffer("high", torch.tensor(spec.action_high))

    def _inv_apply_transform(self, action: Tensor) -> Tensor:
        return action.clamp(self.low, self.high)
