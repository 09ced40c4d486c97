"""Critics: state values V(s) [..., 1] of what policies are fed, by a network that is trained along and never distilled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .activations import tanh
from .nature import OutputLayer, make_nature_critic


def make_critic(shape: Sequence[int], frames: bool) -> nn.Module:
    """A freshly initialised critic.

    Args:
        shape: of one input: a vector's, or an encoder's features of frames.
        frames: the rest of the Nature CNN after that encoder, with one output; else an MLP 64-64 tanh.
    """
    return make_nature_critic(shape) if frames else _mlp(shape)


def _mlp(shape: Sequence[int]) -> nn.Sequential:
    """Orthogonal, with gain √2, of the output 1 (Huang et al. 2022)."""
    sizes = [torch.Size(shape).numel(), 64, 64]
    layers: list[nn.Module] = [nn.Flatten(start_dim=-len(shape))]
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), Tanh()]
    layers.append(OutputLayer(sizes[-1], 1))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 2**0.5 if layer.out_features > 1 else 1.0)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Tanh(nn.Module):
    """As a layer, :func:`lightning_distill.activations.tanh`."""

    def forward(self, inputs: Tensor) -> Tensor:
        return tanh(inputs)
