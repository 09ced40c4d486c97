"""Steps of optimisers, and the schedule of their learning rates."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearAnneal(LambdaLR):
    """From the optimiser's learning rate down to ``final`` times it over ``iterations``.

    The number of iterations is not part of its state: a run that is resumed for longer anneals over its new length.
    """

    def __init__(self, optimizer: Optimizer, iterations: int, final: float = 0.0) -> None:
        super().__init__(optimizer, lambda step: 1 - (1 - final) * min(step / iterations, 1.0))


def no_loss(params: Iterable[nn.Parameter]) -> Tensor:
    """0, with every parameter in the graph, as DDP expects, and a gradient of zero for each."""
    return sum(parameter.sum() * 0.0 for parameter in params)


def clipped_step(optimizer: Optimizer, params: list[nn.Parameter], max_norm: float) -> Tensor:
    """Step with gradients scaled to at most ``max_norm`` together; returns their norm [] before.

    Where that is NaN or infinite nothing is changed, the optimiser's own moments neither.
    """
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    if norm.isfinite():
        optimizer.step()
    return norm
