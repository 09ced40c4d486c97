"""MetaPPO: distil an environment into a synthetic batch (Wilhelm & Ventura 2025).

Fresh learners take one step on the batch, act in the environment, and the PPO loss of what they did is
back-propagated through that step into the batch.
"""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveFloat

from .distillation import Distillation
from .ppo import PPO


class MetaPPO(Distillation, PPO):
    """Distils an environment by reward: the objective of :class:`PPO`, with a synthetic batch for what is learned.

    Args:
        spec: as in :class:`lightning_distill.rollout_module.RolloutModule`.
        target_kl: as in :class:`lightning_distill.ppo.PPO`, with another default.
        kwargs: of :class:`lightning_distill.distillation.Distillation` and :class:`lightning_distill.ppo.PPO`.
    """

    def __init__(self, spec: dict[str, Any], *, target_kl: PositiveFloat = 0.05, **kwargs: Any) -> None:
        super().__init__(spec, target_kl=target_kl, **kwargs)
