"""Running mean and variance, updated by whole batches and agreed across processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .nature import FRAMES, MAX_PIXEL


class FrameScale(nn.Module):
    """The normaliser of frames of bytes, in place of running moments: mean 0 unless it is set, standard deviation 255."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FRAMES))
        self.register_buffer("std", torch.full(FRAMES, MAX_PIXEL), persistent=False)

    def update(self, values: Tensor, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> None:
        """Nothing: what a byte means is known."""

    def freeze(self, mean: Tensor, std: Tensor) -> None:
        """Take this mean [*FRAMES]; the standard deviation is the same always."""
        self.mean.copy_(mean)


class RunningMoments(nn.Module):
    """Mean and variance of everything seen so far, elementwise over ``shape`` (Chan, Golub & LeVeque 1979).

    Statistics are float64 buffers: they travel in checkpoints and never drift, whatever the number of samples.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, values: Tensor, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> None:
        """Take in ``values`` [*batch, *shape]; ``reduce`` sums a tensor over processes."""
        values = values.reshape(-1, *self.mean.shape).to(torch.float64)
        # Sums about the present mean: stable, and one reduction serves all three.
        shifted = values - self.mean
        count = torch.full_like(self.mean, len(values))
        count, first, second = reduce(torch.stack([count, shifted.sum(0), shifted.square().sum(0)]))
        delta = first / count
        # Of what hardly varies about a large mean, rounding may leave less than nothing.
        variance = (second / count - delta.square()).clamp(min=0)
        total = self.count + count
        weight = count / total
        self.variance.copy_(self.variance * (1 - weight) + variance * weight + delta.square() * weight * (1 - weight))
        self.mean.add_(delta * weight)
        self.count.copy_(total.flatten()[0])

    def freeze(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and std [*shape] for good: later updates have no effect."""
        self.mean.copy_(mean)
        self.variance.copy_(std.double().square() - 1e-8)  # which ``std`` adds
        self.count.fill_(torch.inf)

    @property
    def std(self) -> Tensor:
        return (self.variance + 1e-8).sqrt()
